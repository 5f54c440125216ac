/* The same reading in C: 8 brackets and the conversion; prints offsets, then nanoseconds a sample. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "counter.h"
#include "vmclock_page.h"

enum { READINGS = 8, SAMPLES = 1000, ROUNDS = 100 };

static int64_t offset_ns(const struct vmclock_source *source)
{
	uint64_t before[READINGS], after[READINGS];
	struct timespec system[READINGS];
	struct vmclock_page page;
	int best = 0;

	do {
		if (vmclock_copy(source, &page))
			exit(1);
		counter_barrier();
		for (int i = 0; i < READINGS; i++) {
			before[i] = counter_edge();
			clock_gettime(CLOCK_REALTIME, &system[i]);
			after[i] = counter_edge();
			if (after[i] - before[i] < after[best] - before[best])
				best = i;
		}
		counter_barrier();
	} while (!vmclock_unchanged(source, page.seq_count));
	uint64_t counter = before[best] + (after[best] - before[best]) / 2;
	return (int64_t)(vmclock_time_ns(&page, counter) - (__int128)system[best].tv_sec * NSEC_PER_SEC - system[best].tv_nsec);
}

int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDONLY);
	struct vmclock_source source = { mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0), fd };

	if (source.map == MAP_FAILED)
		return 1;
	for (int i = 0; i < SAMPLES; i++)
		printf("%ld\n", (long)offset_ns(&source));
	int64_t start = vmclock_monotonic_ns();
	for (int i = 0; i < SAMPLES * ROUNDS; i++)
		offset_ns(&source);
	fprintf(stderr, "%.1f\n", (double)(vmclock_monotonic_ns() - start) / (SAMPLES * ROUNDS));
	return 0;
}
