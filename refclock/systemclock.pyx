# cython: language_level=3
"""The kernel's clock: its state, and the only place where it is ever set.

Sources: adjtimex(2), clock_adjtime(2), timerfd_create(2) and the kernel's uapi/linux/timex.h.
"""

import os
from errno import EAGAIN, ECANCELED

from libc.errno cimport errno
from libc.math cimport llrint
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport labs
from posix.time cimport CLOCK_REALTIME, itimerspec
from posix.unistd cimport read

from .errors import NotPermitted, RefclockError, from_os

cdef extern from "<sys/timex.h>" nogil:
    struct timex_time "timeval":
        long tv_sec
        long tv_usec
    struct timex:
        unsigned int modes
        long freq
        long maxerror
        long esterror
        int status
        long tick
        timex_time time
    const unsigned int ADJ_FREQUENCY, ADJ_TICK, ADJ_SETOFFSET, ADJ_NANO, ADJ_STATUS, ADJ_MAXERROR, ADJ_ESTERROR
    const int STA_UNSYNC
    int clock_adjtime(int clock, timex *state)

cdef extern from "<sys/timerfd.h>" nogil:
    const int TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)

cdef int64_t NSEC_PER_SEC = 1000000000

#: No step may land before this: 2020-01-01, in nanoseconds since 1970.
EARLIEST_NS = 1_577_836_800 * NSEC_PER_SEC

# One tick is 1/100 s, so a microsecond of it is 100 ppm; freq is in units of 2^-16 ppm, and at most 500 ppm
# (adjtimex(2)).
cdef double TICK_USEC = 10000, FREQ_SCALE = 65536e6
cdef long MOST_FREQ = 500 << 16

#: The kernel's own limit for maxerror (NTP_PHASE_LIMIT, 16 s), in microseconds: the clock may be anywhere.
UNSYNCHRONISED_USEC = 16_000_000

#: How far from its nominal rate the clock is ever made to run: no counter is further off than the kernel's idea of it.
MOST_RATE_PPM = 1000

CAP_SYS_TIME = 25


class Kernel:
    """The system calls, nothing else.  Each raises OSError."""

    def rate(self):
        """How fast the kernel runs the clock, relative to running it without corrections: tick and freq together."""
        cdef timex state
        state.modes = 0
        _adjust(&state)
        return state.tick / TICK_USEC + state.freq / FREQ_SCALE

    def set_rate(self, double rate):
        """Makes the kernel run the clock at ``rate``, as :meth:`rate` says it.

        Both words at once, whatever they were: chronyd sets both as well, perhaps at this very moment, and one of
        its with one of ours would be hundreds of ppm off.  By freq alone where that is enough, for ntpd's sake.
        """
        cdef timex state
        state.modes = ADJ_FREQUENCY | ADJ_TICK
        state.tick = llrint(TICK_USEC)
        state.freq = llrint((rate - 1) * FREQ_SCALE)
        if labs(state.freq) > MOST_FREQ:
            state.tick = llrint(rate * TICK_USEC)
            state.freq = llrint((rate - state.tick / TICK_USEC) * FREQ_SCALE)
        _adjust(&state)

    def is_unsynchronised(self):
        """Whether STA_UNSYNC is set."""
        cdef timex state
        state.modes = 0
        _adjust(&state)
        return bool(state.status & STA_UNSYNC)

    def step(self, int64_t offset_ns):
        """Adds ``offset_ns`` to the clock, exactly, whatever moment it is."""
        cdef timex state
        state.modes = ADJ_SETOFFSET | ADJ_NANO
        # With ADJ_NANO the field named microseconds holds nanoseconds, which must not be negative.
        state.time.tv_sec = offset_ns // NSEC_PER_SEC
        state.time.tv_usec = offset_ns - state.time.tv_sec * NSEC_PER_SEC
        if state.time.tv_usec < 0:
            state.time.tv_sec -= 1
            state.time.tv_usec += NSEC_PER_SEC
        _adjust(&state)

    def set_unsynchronised(self, long error_usec):
        """Sets STA_UNSYNC, and both error estimates to ``error_usec``."""
        cdef timex state
        state.modes = 0
        _adjust(&state)
        state.modes = ADJ_STATUS | ADJ_MAXERROR | ADJ_ESTERROR
        state.status |= STA_UNSYNC
        state.maxerror = state.esterror = error_usec
        _adjust(&state)


cdef int _adjust(timex *state) except -1:
    if clock_adjtime(CLOCK_REALTIME, state) < 0:
        raise OSError(errno, os.strerror(errno))
    return 0


class SystemClock:
    """Sets the clock, on good grounds only.  ``kernel`` is a :class:`Kernel`, or a fake of it in tests."""

    def __init__(self, kernel=None):
        self._kernel = kernel if kernel is not None else Kernel()

    def may_set(self):
        """Whether this process has CAP_SYS_TIME (capabilities(7))."""
        with open("/proc/self/status") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name == "CapEff":
                    return bool(int(value, 16) >> CAP_SYS_TIME & 1)
        return False

    def rate(self):
        """:meth:`Kernel.rate`, or None where a sandbox keeps the kernel from saying it."""
        try:
            return self._kernel.rate()
        except OSError:
            return None

    def is_unsynchronised(self):
        """:meth:`Kernel.is_unsynchronised`."""
        return self._kernel.is_unsynchronised()

    def step(self, is_device, offset_ns, system_ns, bound_ns):
        """Steps the clock by ``offset_ns``, measured when it said ``system_ns`` and right to ``bound_ns``.

        Raises RefclockError, and leaves the clock alone, for a page in a plain file (a simulation), a step to
        before 2020, and an offset that its own bound does not tell from none.  NotPermitted without the right.
        """
        _only_for_devices(is_device)
        if system_ns + offset_ns < EARLIEST_NS:
            raise RefclockError(f"a step by {offset_ns} ns would land before 2020; the source is wrong")
        if abs(offset_ns) <= bound_ns:
            raise RefclockError(f"an offset of {offset_ns} ns is within its bound of {bound_ns} ns; no step is needed")
        try:
            self._kernel.step(offset_ns)
        except OSError as error:
            raise _explained(error, "cannot step the clock") from None

    def set_rate(self, is_device, rate):
        """Makes the clock run at ``rate``, as :meth:`rate` says it.

        Raises RefclockError, and leaves the clock alone, for a page in a plain file, and for a rate that is none.
        NotPermitted without the right.
        """
        _only_for_devices(is_device)
        if not abs(rate - 1) * 1e6 <= MOST_RATE_PPM:
            raise RefclockError(f"a frequency of {(rate - 1) * 1e6:+.0f} ppm is none of a counter's; the page is wrong")
        try:
            self._kernel.set_rate(rate)
        except OSError as error:
            raise _explained(error, "cannot set the clock's frequency") from None

    def flag_unsynchronised(self, is_device):
        """Tells the kernel, and by it every program that asks, that the clock may be anywhere; reads it back."""
        _only_for_devices(is_device)
        try:
            self._kernel.set_unsynchronised(UNSYNCHRONISED_USEC)
        except OSError as error:
            raise _explained(error, "cannot flag the clock") from None
        if not self._kernel.is_unsynchronised():
            raise RefclockError("the kernel did not keep the flag; another program sets the clock's state")


def _only_for_devices(is_device):
    if not is_device:
        raise RefclockError("a page in a plain file is a simulation: the system clock is left alone")


def _explained(error, what):
    return from_os(error, what, "give the daemon CAP_SYS_TIME, or run it with --on-disruption flag")


class ClockWatch:
    """Notices when the system clock is set, by anyone: a timer that the kernel cancels then (timerfd_create(2))."""

    def __init__(self):
        self._fd = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd < 0:
            raise from_os(OSError(errno, os.strerror(errno)), "cannot watch the clock for being set")
        self._arm()

    def _arm(self):
        cdef itimerspec never
        never.it_interval.tv_sec = never.it_interval.tv_nsec = never.it_value.tv_nsec = 0
        never.it_value.tv_sec = <long>1 << 40
        timerfd_settime(self._fd, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &never, NULL)

    def fileno(self):
        """For poll(): readable once the clock was set."""
        return self._fd

    def was_set(self):
        """Whether the clock was set since the last call."""
        cdef uint64_t expirations
        if read(self._fd, &expirations, sizeof(expirations)) < 0 and errno == ECANCELED:
            self._arm()
            return True
        return False

    def close(self):
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
