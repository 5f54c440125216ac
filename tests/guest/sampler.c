/* Samples the guest's clock against its counter, and what chronyd says meanwhile, into a ring in a file.
 *
 *   sampler FILE CAPACITY INTERVAL_US NTP_EVERY USE_PHC
 *
 * Every INTERVAL_US it writes one record (`struct record`; truth.py has the same layout). Every NTP_EVERY samples it
 * asks the NTP server on 127.0.0.1:123 (0: never), and never waits for the answer. With USE_PHC it also takes a
 * pair (CLOCK_REALTIME, /dev/ptp0), which the kernel reads at one counter value: where the line that the PTP clock
 * follows is known, that names the counter value to the nanosecond. It is part of the measurement, not of what is measured:
 * it runs at real-time priority, and reads the page through /dev/mem, so that it needs no driver.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ptp_clock.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE_ADDRESS 0xfeffb000
#define SEQ_COUNT 0x0c
#define NO_ANSWER 255
#define BRACKETS 3

struct header {
	char magic[8];
	uint64_t capacity;
	uint64_t count; /* records written since the start; record i is in slot i % capacity */
	uint64_t unused[5];
};

struct record {
	uint64_t counter;        /* start of the bracket round the reading of CLOCK_REALTIME */
	uint64_t system_ns;      /* that reading */
	uint64_t pair_counter;   /* start of the bracket round the pair */
	uint64_t pair_system_ns; /* CLOCK_REALTIME of the pair; 0: no pair */
	uint64_t pair_device_ns; /* /dev/ptp0 at the same counter value */
	uint64_t ntp_counter;    /* when the last NTP answer was seen */
	uint32_t width;          /* of the first bracket, in ticks */
	uint32_t pair_width;
	uint32_t seq_before;     /* the page's seq_count before the first bracket */
	uint32_t seq_after;      /* and after the last */
	uint32_t root_dispersion; /* of the last NTP answer, 2^-16 s */
	uint8_t leap;            /* of the last NTP answer; 255: none yet */
	uint8_t stratum;
	uint16_t unused;
};

_Static_assert(sizeof(struct header) == 64, "header");
_Static_assert(sizeof(struct record) == 72, "record");

static inline uint64_t counter(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static int64_t nanoseconds(int64_t seconds, int64_t rest)
{
	return seconds * 1000000000 + rest;
}

static void fail(const char *what)
{
	perror(what);
	exit(71);
}

static void read_clock(struct record *r)
{
	r->width = UINT32_MAX;
	for (int i = 0; i < BRACKETS; i++) {
		struct timespec now;
		uint64_t before = counter();

		clock_gettime(CLOCK_REALTIME, &now);
		uint64_t width = counter() - before;
		if (width < r->width) {
			r->width = width;
			r->counter = before;
			r->system_ns = nanoseconds(now.tv_sec, now.tv_nsec);
		}
	}
}

static void read_pair(int phc, struct record *r)
{
	struct ptp_sys_offset_precise pair = {0};
	uint64_t before = counter();

	if (ioctl(phc, PTP_SYS_OFFSET_PRECISE, &pair) < 0)
		return;
	r->pair_width = counter() - before;
	r->pair_counter = before;
	r->pair_system_ns = nanoseconds(pair.sys_realtime.sec, pair.sys_realtime.nsec);
	r->pair_device_ns = nanoseconds(pair.device.sec, pair.device.nsec);
}

static int ntp_socket(void)
{
	struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(123)};
	int ntp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (ntp < 0 || connect(ntp, (struct sockaddr *)&server, sizeof server) < 0)
		fail("NTP socket");
	return ntp;
}

static void ask(int ntp)
{
	uint8_t request[48] = {4 << 3 | 3};
	uint64_t now = counter();

	memcpy(request + 40, &now, sizeof now);
	(void)!send(ntp, request, sizeof request, 0);
}

/* `last` keeps the fields of the newest answer from one record to the next. */
static void hear(int ntp, struct record *last)
{
	uint8_t answer[128];

	while (recv(ntp, answer, sizeof answer, 0) >= 48) {
		uint32_t dispersion;

		memcpy(&dispersion, answer + 8, sizeof dispersion);
		last->root_dispersion = ntohl(dispersion);
		last->leap = answer[0] >> 6;
		last->stratum = answer[1];
		last->ntp_counter = counter();
	}
}

int main(int argc, char **argv)
{
	if (argc != 6) {
		fputs("usage: sampler FILE CAPACITY INTERVAL_US NTP_EVERY USE_PHC\n", stderr);
		return 64;
	}
	uint64_t capacity = strtoull(argv[2], NULL, 0);
	long interval_ns = atol(argv[3]) * 1000;
	unsigned ntp_every = atoi(argv[4]);
	int use_phc = atoi(argv[5]);

	int file = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	size_t size = sizeof(struct header) + capacity * sizeof(struct record);
	if (file < 0 || ftruncate(file, size) < 0)
		fail(argv[1]);
	struct header *header = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
	int memory = open("/dev/mem", O_RDONLY);
	volatile uint8_t *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, memory, PAGE_ADDRESS);
	if (header == MAP_FAILED || page == MAP_FAILED)
		fail("mmap");
	volatile uint32_t *seq_count = (volatile uint32_t *)(page + SEQ_COUNT);
	struct record *ring = (struct record *)(header + 1);
	header->capacity = capacity;
	memcpy(header->magic, "VMSAMPLE", 8);

	struct sched_param priority = {.sched_priority = 1};
	if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0 || sched_setscheduler(0, SCHED_FIFO, &priority) < 0)
		fail("real-time priority");

	int ntp = ntp_socket(), phc = -1;
	struct record last = {.leap = NO_ANSWER};
	struct timespec next;
	clock_gettime(CLOCK_MONOTONIC, &next);
	for (uint64_t i = 0;; i++) {
		if (use_phc && phc < 0 && i % 256 == 0)
			phc = open("/dev/ptp0", O_RDONLY | O_CLOEXEC);
		struct record r = last;
		r.seq_before = *seq_count;
		read_clock(&r);
		if (phc >= 0)
			read_pair(phc, &r);
		r.seq_after = *seq_count;
		ring[i % capacity] = r;
		__atomic_store_n(&header->count, i + 1, __ATOMIC_RELEASE);

		hear(ntp, &last);
		if (ntp_every && i % ntp_every == 0)
			ask(ntp);

		struct timespec now;
		next.tv_nsec += interval_ns;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (nanoseconds(next.tv_sec, next.tv_nsec) < nanoseconds(now.tv_sec, now.tv_nsec)) {
			next = now; /* late, after a pause of the machine say: no burst of samples to catch up */
			next.tv_nsec += interval_ns;
		}
		next.tv_sec += next.tv_nsec / 1000000000;
		next.tv_nsec %= 1000000000;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
	}
}
