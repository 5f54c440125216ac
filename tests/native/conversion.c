/*
 * The conversion over random pages, to be built with sanitizers.
 *
 *     conversion COUNT SEED
 *
 * Prints, in hexadecimal, what went in and what came out of every 64th: counter, counter_value, shift, period,
 * rate, time_sec, time_frac_sec, error, then time and error in nanoseconds as two words each.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "vmclock_page.h"

static uint64_t state;

static uint64_t any(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state * UINT64_C(0x2545f4914f6cdd1d);
}

/* Any number, and often one at an edge: a power of two, or next to it. */
static uint64_t edgy(void)
{
	uint64_t choice = any();

	if (choice % 4)
		return any() >> choice / 4 % 64;
	return (UINT64_C(1) << choice / 4 % 64) + (choice / 256 % 3) - 1;
}

static void show(__int128 value)
{
	printf(" %" PRIx64 " %" PRIx64, (uint64_t)(value >> 64), (uint64_t)value);
}

int main(int count, char **arguments)
{
	if (count < 3)
		return 2;
	state = strtoull(arguments[2], NULL, 0) | 1;
	for (long i = 0, most = atol(arguments[1]); i < most; i++) {
		struct vmclock_page page = {
			.counter_period_shift = (uint8_t)i,
			.counter_value = edgy(),
			.counter_period_frac_sec = edgy(),
			.time_sec = edgy(),
			.time_frac_sec = edgy(),
		};
		if (any() % 8 == 0) { /* half a nanosecond, or next to it */
			page.time_frac_sec = (any() | 1) << 54;
			page.counter_period_frac_sec = any() % 3;
		}
		uint64_t counter = any() % 2 ? page.counter_value + edgy() : page.counter_value - edgy();
		uint64_t rate = edgy(), error_ns = edgy();
		__int128 time = vmclock_time_ns(&page, counter), error = vmclock_error_ns(&page, counter, error_ns, rate);
		volatile double period = vmclock_period_ns(&page);

		(void)period;
		if (any() % 64)
			continue;
		printf("%" PRIx64 " %" PRIx64 " %x", counter, page.counter_value, page.counter_period_shift);
		printf(" %" PRIx64 " %" PRIx64, page.counter_period_frac_sec, rate);
		printf(" %" PRIx64 " %" PRIx64 " %" PRIx64, page.time_sec, page.time_frac_sec, error_ns);
		show(time);
		show(error);
		printf("\n");
	}
	return 0;
}
