/*
 * NTP shared memory read by a mode 1 reader that knows the layout from elsewhere than ntp_segment.h.
 *
 *     segment_torture READS            a writer of its own over ntp_segment_put(), as fast as it can
 *     segment_torture READS KEY        the segment with this key, which another process feeds
 *
 * Every field is a function of the receive second, so that a copy of two samples shows (see is_torn).
 * The reader does as chrony does: the count, a copy that ends with `valid`, the count again.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ntp_segment.h"

enum { CONTESTED = 2000, PATIENCE_S = 100 };

struct shm_time {
	int mode;
	int count;
	time_t clock_sec;
	int clock_usec;
	time_t receive_sec;
	int receive_usec;
	int leap;
	int precision;
	int nsamples;
	int valid;
	unsigned clock_nsec;
	unsigned receive_nsec;
	int dummy[8];
};

static int is_torn(const struct shm_time *copy)
{
	long n = copy->receive_sec;

	return copy->mode != 1 || copy->receive_nsec != n * 7919 % 1000000000 || copy->clock_sec != 3 * n + 5
		|| copy->clock_nsec != n * 104729 % 1000000000 || copy->receive_usec != (int)(copy->receive_nsec / 1000)
		|| copy->clock_usec != (int)(copy->clock_nsec / 1000) || copy->leap != n % 3 || copy->precision != -(n % 31);
}

static void write_for_ever(struct ntp_segment *segment)
{
	for (long n = 1;; n++) {
		struct ntp_segment state = {
			.clock_sec = 3 * n + 5,
			.clock_nsec = n * 104729 % 1000000000,
			.receive_sec = n,
			.receive_nsec = n * 7919 % 1000000000,
			.leap = n % 3,
			.precision = -(n % 31),
			.valid = 1,
		};
		state.clock_usec = state.clock_nsec / 1000;
		state.receive_usec = state.receive_nsec / 1000;
		ntp_segment_put(segment, &state);
		for (long pause = n * 7919 % 256; pause; pause--)
			__asm__ volatile("" : : : "memory");
	}
}

static int read_many(volatile struct shm_time *segment, long reads)
{
	long good = 0, distinct = 0, torn = 0, clashes = 0, invalid = 0, before = 0;
	time_t give_up = time(NULL) + PATIENCE_S;

	for (long i = 0; i < reads || distinct < CONTESTED; i++) {
		struct shm_time copy;

		if (i % 1000000 == 0 && time(NULL) > give_up)
			return 2;
		copy.count = segment->count;
		atomic_thread_fence(memory_order_acquire);
		copy.mode = segment->mode;
		copy.clock_sec = segment->clock_sec;
		copy.clock_usec = segment->clock_usec;
		copy.receive_sec = segment->receive_sec;
		copy.receive_usec = segment->receive_usec;
		copy.leap = segment->leap;
		copy.precision = segment->precision;
		copy.clock_nsec = segment->clock_nsec;
		copy.receive_nsec = segment->receive_nsec;
		atomic_thread_fence(memory_order_acquire);
		copy.valid = segment->valid;
		atomic_thread_fence(memory_order_acquire);
		if (copy.count != segment->count) {
			clashes++;
		} else if (!copy.valid) {
			invalid++;
		} else {
			good++;
			torn += is_torn(&copy);
			distinct += copy.receive_sec != before;
			before = copy.receive_sec;
		}
	}
	printf("good %ld distinct %ld clashes %ld invalid %ld torn %ld\n", good, distinct, clashes, invalid, torn);
	return torn != 0;
}

int main(int count, char **arguments)
{
	if (count < 2)
		return 2;
	long reads = atol(arguments[1]);
	if (count > 2) {
		void *segment = shmat(shmget(strtoul(arguments[2], NULL, 0), sizeof(struct shm_time), 0), NULL, 0);

		return segment == (void *)-1 ? 2 : read_many(segment, reads);
	}

	void *segment = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t writer = fork();
	if (writer == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		write_for_ever(segment);
	}
	int worst = read_many(segment, reads);
	kill(writer, SIGKILL);
	waitpid(writer, NULL, 0);
	return worst;
}
