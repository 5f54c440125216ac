/*
 * A plain file can be truncated while it is mapped; the next look at it is then a SIGBUS.  Devices have no
 * such trap, so only files (simulations) arm this: the handler puts a page of zeros in the place of the one
 * that went away, and the reader sees a page whose magic is wrong.
 */
#ifndef REFCLOCK_SIGBUS_H
#define REFCLOCK_SIGBUS_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#define SIGBUS_MAPS 256

static void *volatile sigbus_map[SIGBUS_MAPS];
static size_t sigbus_length;
static struct sigaction sigbus_before;
static volatile sig_atomic_t sigbus_armed;

static void sigbus_handler(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	for (int i = 0; i < SIGBUS_MAPS; i++) {
		char *start = sigbus_map[i];

		if (!start || (char *)info->si_addr < start || (char *)info->si_addr >= start + sigbus_length)
			continue;
		if (mmap(start, sigbus_length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
			return;
	}
	/* Not ours: the one before us gets it, when the faulting instruction runs again. */
	sigbus_armed = 0;
	sigaction(SIGBUS, &sigbus_before, NULL);
}

/* Guards one more mapping.  Returns 0, or -1 when there is no room or no handler to be had. */
static int sigbus_guard(void *start, size_t length)
{
	if (!sigbus_armed) {
		struct sigaction action = { .sa_sigaction = sigbus_handler, .sa_flags = SA_SIGINFO };

		sigbus_length = length;
		if (sigaction(SIGBUS, &action, &sigbus_before))
			return -1;
		sigbus_armed = 1;
	}
	for (int i = 0; i < SIGBUS_MAPS; i++) {
		if (!sigbus_map[i]) {
			sigbus_map[i] = start;
			return 0;
		}
	}
	return -1;
}

static void sigbus_release(void *start)
{
	for (int i = 0; i < SIGBUS_MAPS; i++)
		if (sigbus_map[i] == start)
			sigbus_map[i] = NULL;
}

#endif
