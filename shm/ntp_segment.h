/*
 * The NTP shared memory segment (ntpd's driver 28, chrony's SHM refclock), mode 1.
 *
 * Layout: struct shmTime as ntpd and chrony declare it, on a 64-bit system.
 */
#ifndef REFCLOCK_NTP_SEGMENT_H
#define REFCLOCK_NTP_SEGMENT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define NTP_SEGMENT_KEY 0x4e545030 /* "NTP0"; the unit is added */
#define NTP_SEGMENT_NOT_IN_SYNC 3

struct ntp_segment {
	int32_t mode;
	int32_t count;
	int64_t clock_sec; /* reference time */
	int32_t clock_usec;
	int64_t receive_sec; /* system time at that moment */
	int32_t receive_usec;
	int32_t leap;
	int32_t precision; /* log2 s */
	int32_t nsamples;
	int32_t valid;
	uint32_t clock_nsec;
	uint32_t receive_nsec;
	int32_t dummy[8];
};

#define NTP_AT(field, offset) _Static_assert(offsetof(struct ntp_segment, field) == (offset), "NTP segment: " #field)

NTP_AT(mode, 0);
NTP_AT(count, 4);
NTP_AT(clock_sec, 8);
NTP_AT(clock_usec, 16);
NTP_AT(receive_sec, 24);
NTP_AT(receive_usec, 32);
NTP_AT(leap, 36);
NTP_AT(precision, 40);
NTP_AT(nsamples, 44);
NTP_AT(valid, 48);
NTP_AT(clock_nsec, 52);
NTP_AT(receive_nsec, 56);
NTP_AT(dummy, 60);
_Static_assert(sizeof(struct ntp_segment) == 96, "NTP segment: size");

#undef NTP_AT

/*
 * Publishes one state of the segment.  A mode 1 reader takes `count` before and after its copy and throws
 * the copy away when they differ.  The release fences pair with its read barriers: the first keeps the
 * fields from showing before the new count, the second shows the fields before the next count, and the
 * release of `valid` comes after both.
 */
static inline void ntp_segment_put(struct ntp_segment *segment, const struct ntp_segment *state)
{
	__atomic_store_n(&segment->valid, 0, __ATOMIC_RELAXED);
	__atomic_fetch_add(&segment->count, 1, __ATOMIC_RELAXED);
	atomic_thread_fence(memory_order_release);
	__atomic_store_n(&segment->mode, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->clock_sec, state->clock_sec, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->clock_usec, state->clock_usec, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->receive_sec, state->receive_sec, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->receive_usec, state->receive_usec, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->leap, state->leap, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->precision, state->precision, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->clock_nsec, state->clock_nsec, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->receive_nsec, state->receive_nsec, __ATOMIC_RELAXED);
	atomic_thread_fence(memory_order_release);
	__atomic_fetch_add(&segment->count, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&segment->valid, state->valid, __ATOMIC_RELEASE);
}

#endif
