/*
 * LD_PRELOAD: a disk that stalls.  To open what lies below STALL_UNDER takes until the file STALL_WHILE is gone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int opened(const char *name, const char *path, int flags, int mode)
{
	const char *under = getenv("STALL_UNDER"), *pending = getenv("STALL_WHILE");
	int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);

	if (!strncmp(path, under, strlen(under)) && flags & (O_WRONLY | O_RDWR))
		while (!access(pending, F_OK))
			usleep(1000);
	return real(path, flags, mode);
}

#define OPEN(name)                                          \
	int name(const char *path, int flags, ...)          \
	{                                                   \
		va_list rest;                               \
		va_start(rest, flags);                      \
		int mode = va_arg(rest, int);               \
		va_end(rest);                               \
		return opened(#name, path, flags, mode);    \
	}

OPEN(open)
OPEN(open64)
