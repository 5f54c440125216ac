/*
 * LD_PRELOAD: a clock_adjtime that never reaches the kernel.  It writes down what it was asked, and tick and freq
 * before that, one line each on the descriptor PRETEND_FD, and answers as the kernel would: from a clock state of
 * its own, or with PRETEND_ERRNO.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/timex.h>
#include <time.h>

static struct timex kept = { .status = STA_PLL | STA_NANO };
static int started;

int pretends_clock(void)
{
	return 1;
}

int clock_adjtime(clockid_t clock, struct timex *asked)
{
	const char *fd = getenv("PRETEND_FD"), *error = getenv("PRETEND_ERRNO");

	if (!started) {
		kept.freq = getenv("PRETEND_FREQ") ? atol(getenv("PRETEND_FREQ")) : 0;
		kept.tick = getenv("PRETEND_TICK") ? atol(getenv("PRETEND_TICK")) : 10000;
		started = 1;
	}
	dprintf(fd ? atoi(fd) : 2, "%d %u %ld %ld %ld %ld %d %ld %ld\n", (int)clock, asked->modes,
		(long)asked->time.tv_sec, (long)asked->time.tv_usec, asked->maxerror, asked->esterror, asked->status,
		kept.tick, kept.freq);
	if (error && (asked->modes || getenv("PRETEND_MUTE"))) {
		errno = atoi(error);
		return -1;
	}
	if (asked->modes & ADJ_STATUS && !getenv("PRETEND_FORGETS"))
		kept.status = asked->status;
	if (asked->modes & ADJ_FREQUENCY)
		kept.freq = asked->freq;
	if (asked->modes & ADJ_TICK)
		kept.tick = asked->tick;
	*asked = kept;
	return 0;
}
