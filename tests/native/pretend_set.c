/*
 * LD_PRELOAD: a clock that seems to be set.  timerfd_create gives the FIFO named by PRETEND_SET instead, and reading
 * what a test wrote into it fails with ECANCELED, as a timer does once the clock was set.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <unistd.h>

static int pretended = -1;

int timerfd_create(int clock, int flags)
{
	(void)clock;
	(void)flags;
	pretended = open(getenv("PRETEND_SET"), O_RDWR | O_NONBLOCK | O_CLOEXEC);
	return pretended;
}

int timerfd_settime(int fd, int flags, const struct itimerspec *next, struct itimerspec *before)
{
	(void)flags;
	(void)next;
	(void)before;
	return fd == pretended ? 0 : -1;
}

ssize_t read(int fd, void *into, size_t length)
{
	static ssize_t (*real)(int, void *, size_t);

	if (!real)
		real = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
	ssize_t got = real(fd, into, length);
	if (fd == pretended && got > 0) {
		errno = ECANCELED;
		return -1;
	}
	return got;
}
