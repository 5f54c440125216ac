# cython: language_level=3, embedsignature=True
"""The hypervisor's page, read: consistent copies of it, and pairs of system time and reference time from it.

Everything here is measurement; whether a pair is believed is for :mod:`refclock.policy` to say.
"""

import os
import stat
from errno import ENODATA, ETIMEDOUT

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.math cimport ceil, fmax, fmin, llrint
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, mmap, munmap
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from shm.counter cimport COUNTER_ID, counter_barrier, counter_edge, counter_read
from shm.vmclock_page cimport (
    VMCLOCK_STALL_NS,
    int128,
    vmclock_copy,
    vmclock_error_ns,
    vmclock_monotonic_ns,
    vmclock_page,
    vmclock_period_ns,
    vmclock_sequence,
    vmclock_source,
    vmclock_time_ns,
    vmclock_unchanged,
)

from .errors import PageInvalid, PageStalled, RefclockError, SampleWithheld, UsageError, from_os
from .model import (
    FREERUNNING,
    MAGIC,
    NOTIFICATION_PRESENT,
    PAGE_BYTES,
    PERIOD_ESTERROR_VALID,
    PERIOD_MAXERROR_VALID,
    SMALLEST_SIZE,
    SYNCHRONIZED,
    TIME_ESTERROR_VALID,
    TIME_MAXERROR_VALID,
    VERSION,
    Snapshot,
    clock_status_name,
)
from .timescale import timescale, why_no_time, why_no_timescale

cdef extern from "sigbus.h" nogil:
    int sigbus_guard(void *start, size_t length)
    void sigbus_release(void *start)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    const short POLLIN, POLLERR, POLLHUP, POLLNVAL
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *sigmask)

cdef enum:
    MOST_READINGS = 64
    MOST_FDS = 64
    # So many wake-ups in a row without a change of the sequence mean that poll() does not wait at all, as
    # with the driver before Linux 7.0, whose descriptor is always ready.
    SPURIOUS_WAKEUPS = 8

cdef int64_t NSEC_PER_SEC = 1000000000

#: ``counter_id`` of the counter that this machine has.
LOCAL_COUNTER_ID = COUNTER_ID


cdef object _int(int128 value):
    """A Python int of any 128-bit value."""
    cdef int64_t low = <int64_t>value
    if <int128>low == value:
        return low
    cdef object high = <int64_t>(value >> 64)
    return (high << 64) | <uint64_t>value


cdef class Sample:
    """One consistent triple: the counter, the page's UTC at it, and the system clock at it.

    ``offset_ns`` is reference - system: positive means that the system clock is behind.  ``uncertainty_ns``
    is the pairing's own, half the bracket; ``esterror_ns`` and ``maxerror_ns`` are the page's at that counter
    value (None where it gives none) and do not contain it.  ``leap`` is 0, 1 (insert) or 2 (delete) at the
    end of this month; ``clock_status`` the contract's word.
    """

    cdef readonly int64_t system_ns
    cdef readonly object reference_ns
    cdef readonly object offset_ns
    cdef readonly int64_t uncertainty_ns
    cdef readonly object esterror_ns
    cdef readonly object maxerror_ns
    cdef readonly int leap
    cdef readonly str clock_status
    cdef readonly uint64_t disruption_marker
    cdef readonly uint64_t counter

    FIELDS = (
        "system_ns",
        "reference_ns",
        "offset_ns",
        "uncertainty_ns",
        "esterror_ns",
        "maxerror_ns",
        "leap",
        "clock_status",
        "disruption_marker",
        "counter",
    )

    def __init__(
        self,
        *,
        system_ns,
        reference_ns,
        uncertainty_ns=0,
        esterror_ns=None,
        maxerror_ns=None,
        leap=0,
        clock_status="synchronized",
        disruption_marker=0,
        counter=0,
    ):
        self.system_ns = system_ns
        self.reference_ns = reference_ns
        self.offset_ns = reference_ns - system_ns
        self.uncertainty_ns = uncertainty_ns
        self.esterror_ns = esterror_ns
        self.maxerror_ns = maxerror_ns
        self.leap = leap
        self.clock_status = clock_status
        self.disruption_marker = disruption_marker
        self.counter = counter

    def fields(self):
        """The contract's fields, by name."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def __repr__(self):
        return f"Sample({', '.join(f'{name}={value!r}' for name, value in self.fields().items())})"


cdef struct Pairing:
    uint64_t counter
    int64_t system_ns
    double half_width_ns


cdef void _measure(int readings, double period_ns, Pairing *pairing) noexcept nogil:
    """Brackets (counter, system clock, counter), and the line through the counter that fits them best.

    Each bracket confines the distance between the system clock and that line to an interval.  The distance
    does not move within microseconds, so it lies in the intersection of them all, whose half width is the
    uncertainty.  Inside it, the median of the narrow brackets' middles repeats best: some CPUs' counters move
    in steps (26 ticks, 10 ns, on one), so that the intersection's ends jump by a step now and then.  Where the
    brackets have nothing in common (the clock was stepped between two of them) the narrowest stands alone.
    """
    cdef uint64_t before[MOST_READINGS]
    cdef uint64_t after[MOST_READINGS]
    cdef double middle[MOST_READINGS]
    cdef timespec system[MOST_READINGS]
    cdef uint64_t narrowest
    cdef int i, j, best = 0, narrow = 0
    counter_barrier()
    for i in range(readings):
        before[i] = counter_edge()
        clock_gettime(CLOCK_REALTIME, &system[i])
        after[i] = counter_edge()
    counter_barrier()

    for i in range(readings):
        if after[i] - before[i] < after[best] - before[best]:
            best = i
    narrowest = after[best] - before[best]

    # Relative to the best bracket: small numbers, exact enough in a double.  The system clock shows whole
    # nanoseconds, rounded down: it stands up to one nanosecond further.
    cdef double low, high, best_low = -1, best_high = <double>narrowest * period_ns, lowest = best_low, highest = best_high
    cdef double elapsed_ns
    for i in range(readings):
        elapsed_ns = <double>(system[i].tv_sec - system[best].tv_sec) * 1e9 + <double>(system[i].tv_nsec - system[best].tv_nsec)
        low = <double><int64_t>(before[i] - before[best]) * period_ns - elapsed_ns - 1
        high = <double><int64_t>(after[i] - before[best]) * period_ns - elapsed_ns
        lowest, highest = fmax(lowest, low), fmin(highest, high)
        if after[i] - before[i] <= narrowest + narrowest // 2:
            j = narrow
            while j > 0 and middle[j - 1] > (low + high) / 2:
                middle[j] = middle[j - 1]
                j -= 1
            middle[j] = (low + high) / 2
            narrow += 1
    if lowest > highest:
        lowest, highest = best_low, best_high

    cdef double offset_ns = fmin(fmax((middle[narrow // 2] + middle[(narrow - 1) // 2]) / 2, lowest), highest)
    pairing.counter = before[best] + narrowest // 2
    pairing.system_ns = system[best].tv_sec * NSEC_PER_SEC + system[best].tv_nsec + llrint(
        <double>(narrowest // 2) * period_ns - offset_ns
    )
    pairing.half_width_ns = fmax(highest - offset_ns, offset_ns - lowest)


cdef class Page:
    """The vmclock page behind ``path``: a device, or a plain file with its layout (a simulation).

    Opens and validates it, or raises :class:`~refclock.errors.Unavailable` (not there),
    :class:`~refclock.errors.NotPermitted`, :class:`~refclock.errors.PageInvalid` (something else) or
    :class:`~refclock.errors.PageStalled`.  ``access`` is ``auto`` (mapped where the kernel allows it, else
    read with pread), ``map`` or ``pread``; the attribute says which it came to.

    ``kind`` is ``time`` when the page can give UTC on this machine, else ``signal``; ``is_device`` tells a
    character device from a file.  Both hold for the last read.  Not for use by two threads at once.
    """

    cdef readonly str path
    cdef readonly str access
    cdef readonly bint is_device
    cdef readonly str kind
    cdef readonly object snapshot
    cdef vmclock_source _source
    cdef size_t _mapped
    cdef vmclock_page _page
    cdef uint32_t _looked_at
    cdef int _wakeups
    cdef bint _notifies
    # What the last validated copy means, worked out once for each update.
    cdef bint _valid
    cdef bint _steady
    cdef object _withheld
    cdef object _scale
    cdef str _status
    cdef int64_t _utc_ns
    cdef double _period_ns

    def __cinit__(self):
        self._source.fd = -1
        self._source.map = NULL

    def __init__(self, path="/dev/vmclock0", *, access="auto"):
        if access not in ("auto", "map", "pread"):
            raise UsageError(f"access {access!r}: auto, map or pread")
        if self._source.fd >= 0:
            raise UsageError("a Page is opened once")
        self.path = os.fsdecode(path)
        self._notifies = True
        self._open()
        try:
            self._map(access)
            self.read()
        except BaseException:
            self.close()
            raise

    def _open(self):
        # O_NONBLOCK: a FIFO must not hold us up before we see that it is one.
        try:
            self._source.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            mode = os.fstat(self._source.fd).st_mode
        except OSError as error:
            raise from_os(error, f"cannot open {self.path}", _CURES.get(error.errno, "")) from None
        except ValueError:
            raise UsageError(f"{self.path!r} cannot be a path") from None
        self.is_device = stat.S_ISCHR(mode)
        if not (self.is_device or stat.S_ISREG(mode)):
            self.close()
            raise PageInvalid(f"{self.path} is {_file_type(mode)}, not a vmclock device; name the device, or a file that holds a page")

    def _map(self, access):
        self.access = "pread"
        if access == "pread":
            return
        cdef size_t length = os.sysconf("SC_PAGE_SIZE")
        cdef void *start = mmap(NULL, length, PROT_READ, MAP_SHARED, self._source.fd, 0)
        if start == MAP_FAILED:
            if access == "map":
                raise from_os(OSError(errno, os.strerror(errno)), f"cannot map {self.path}", "read it with access='pread'")
            return
        if not self.is_device and sigbus_guard(start, length):
            munmap(start, length)
            return
        self._source.map = <const vmclock_page *>start
        self._mapped = length
        self.access = "map"

    def close(self):
        """Unmaps and closes; harmless a second time."""
        if self._source.map != NULL:
            sigbus_release(<void *>self._source.map)
            munmap(<void *>self._source.map, self._mapped)
            self._source.map = NULL
        if self._source.fd >= 0:
            os.close(self._source.fd)
            self._source.fd = -1
        self._valid = False

    def __dealloc__(self):
        if self._source.map != NULL:
            sigbus_release(<void *>self._source.map)
            munmap(<void *>self._source.map, self._mapped)

    def __del__(self):
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def fileno(self):
        """The open descriptor, for poll()."""
        self._ensure_open()
        return self._source.fd

    def still_there(self):
        """Whether ``path`` still leads to what was opened: False once it was removed or replaced."""
        self._ensure_open()
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        opened = os.fstat(self._source.fd)
        return (there.st_dev, there.st_ino, there.st_rdev) == (opened.st_dev, opened.st_ino, opened.st_rdev)

    def read(self):
        """One consistent :class:`~refclock.model.Snapshot`, validated.

        Raises :class:`~refclock.errors.PageStalled` when the sequence stays odd for 100 ms, and
        :class:`~refclock.errors.PageInvalid` when the page is none.
        """
        self._refresh()
        return self.snapshot

    def sample(self, int readings=8):
        """One :class:`Sample`: the intersection of ``readings`` (1 to 64) brackets under one sequence.

        Raises what :meth:`read` raises, and :class:`~refclock.errors.SampleWithheld` when the page gives no
        time on this machine, its status is neither synchronized nor freerunning, or a leap second is near.
        """
        if not 1 <= readings <= MOST_READINGS:
            raise UsageError(f"readings {readings}: 1 to {MOST_READINGS}")
        cdef int64_t give_up_ns = 0
        cdef Sample sample
        while True:
            self._refresh()
            if self._withheld is not None:
                raise SampleWithheld(*self._withheld)
            sample = self._pair(readings)
            if vmclock_unchanged(&self._source, self._page.seq_count):
                return sample
            if give_up_ns == 0:
                give_up_ns = vmclock_monotonic_ns() + VMCLOCK_STALL_NS
            elif vmclock_monotonic_ns() > give_up_ns:
                raise PageStalled(f"{self.path} changes faster than it can be sampled; the hypervisor's side is broken")

    cdef Sample _pair(self, int readings):
        cdef Pairing pairing
        cdef vmclock_page *page = &self._page
        _measure(readings, self._period_ns, &pairing)
        cdef Sample sample = Sample.__new__(Sample)
        cdef int128 page_ns = vmclock_time_ns(page, pairing.counter)
        cdef int128 reference_ns = page_ns + self._utc_ns
        if not self._steady:
            utc = self._scale.at(_int(page_ns))
            if utc is None:
                raise SampleWithheld("leap", "a leap second is less than two seconds away")
            reference_ns = page_ns + <int64_t>utc[0]
            sample.leap = utc[1]
        sample.counter = pairing.counter
        sample.system_ns = pairing.system_ns
        sample.uncertainty_ns = <int64_t>ceil(pairing.half_width_ns)
        sample.reference_ns = _int(reference_ns)
        sample.offset_ns = _int(reference_ns - sample.system_ns)
        sample.esterror_ns = _esterror_ns(self.snapshot, page, sample.counter)
        sample.maxerror_ns = _maxerror_ns(self.snapshot, page, sample.counter)
        sample.clock_status = self._status
        sample.disruption_marker = page.disruption_marker
        return sample

    def wait(self, int64_t deadline_ns, int64_t watch_ns, list fds):
        """Sleeps, without Python and without the GIL, until there is something to do.

        It sleeps first, so that a page that never stands still is looked at every ``watch_ns`` and no more.
        Ends when the page's sequence has moved, when one of ``fds`` (pairs of descriptor and poll() events) is
        ready, when a signal arrives, or at ``deadline_ns`` of CLOCK_MONOTONIC.  A driver that notifies wakes
        it; otherwise it looks at the sequence every ``watch_ns``.  Returns whether the page changed, and the
        list of ready descriptors.
        """
        self._ensure_open()
        cdef pollfd polled[MOST_FDS + 1]
        cdef int count = len(fds), i, ready = 0, error = 0
        if count > MOST_FDS:
            raise UsageError(f"{count} descriptors: at most {MOST_FDS}")
        for i in range(count):
            polled[i].fd, polled[i].events = fds[i]
        cdef bint notifies = self.notifies
        if notifies:
            polled[count].fd = self._source.fd
            polled[count].events = POLLIN
        cdef int64_t left_ns
        cdef timespec pause
        cdef uint32_t sequence = self._looked_at
        with nogil:
            while True:
                left_ns = deadline_ns - vmclock_monotonic_ns()
                if left_ns < 0:
                    left_ns = 0
                elif not notifies and left_ns > watch_ns:
                    left_ns = watch_ns
                pause.tv_sec = left_ns // 1000000000
                pause.tv_nsec = left_ns % 1000000000
                ready = ppoll(polled, count + notifies, &pause, NULL)
                error = vmclock_sequence(&self._source, &sequence)
                if ready != 0 or error or sequence != self._looked_at or vmclock_monotonic_ns() >= deadline_ns:
                    break
        changed = error != 0 or sequence != self._looked_at
        self._looked_at = sequence
        if notifies and ready > 0 and polled[count].revents:
            self._notified(polled[count].revents, changed)
        return changed, [polled[i].fd for i in range(count) if ready > 0 and polled[i].revents]

    def _notified(self, short events, bint changed):
        """After a wake-up by the driver: only a read of the descriptor makes it wait again."""
        if events & (POLLERR | POLLHUP | POLLNVAL):
            self._notifies = False
            return
        try:
            os.pread(self._source.fd, PAGE_BYTES, 0)
        except OSError:
            pass  # a stalled page: the read that follows the wake-up says so
        self._wakeups = 0 if changed else self._wakeups + 1
        if self._wakeups > SPURIOUS_WAKEUPS:
            self._notifies = False

    @property
    def period_ns(self):
        """The page's counter period in nanoseconds, as near as a float can say it."""
        return self._period_ns

    @property
    def notifies(self):
        """Whether :meth:`wait` relies on the driver's notification."""
        return self.is_device and self._notifies and self.snapshot.has(NOTIFICATION_PRESENT)

    cdef int _ensure_open(self) except -1:
        if self._source.fd < 0:
            raise RefclockError(f"{self.path} is closed")
        return 0

    cdef int _refresh(self) except -1:
        """Takes a consistent copy; where it differs from the last one, works out anew what it means."""
        cdef vmclock_page copy
        cdef int error
        self._ensure_open()
        error = vmclock_copy(&self._source, &copy)
        if error:
            self._valid = False
            vmclock_sequence(&self._source, &self._looked_at)
            if error == ETIMEDOUT:
                raise PageStalled(
                    f"{self.path} is being written for more than 100 ms: the hypervisor's side stopped half-way",
                    ETIMEDOUT,
                )
            if error == ENODATA:
                raise PageInvalid(f"{self.path} is too short to be a vmclock page")
            raise from_os(OSError(error, os.strerror(error)), f"cannot read {self.path}")
        self._looked_at = copy.seq_count
        if self._valid and memcmp(&copy, &self._page, sizeof(copy)) == 0:
            return 0
        self._valid = False
        self._adopt(Snapshot(PyBytes_FromStringAndSize(<char *>&copy, sizeof(copy))))
        memcpy(&self._page, &copy, sizeof(copy))
        self._valid = True
        return 0

    cdef int _adopt(self, snapshot) except -1:
        wrong = _why_invalid(snapshot) if self.is_device else _why_cut_short(snapshot, self._source.fd) or _why_invalid(snapshot)
        if wrong is not None:
            raise PageInvalid(f"{self.path} is no vmclock page: {wrong}")
        no_time = why_no_time(snapshot, COUNTER_ID)
        self.snapshot = snapshot
        self.kind = "time" if no_time is None else "signal"
        self._status = clock_status_name(snapshot.status)
        self._scale = None
        self._withheld = None
        if no_time is not None:
            self._withheld = "signal", f"{no_time}: it tells of disruptions only"
            return 0
        self._scale = timescale(snapshot)
        if snapshot.status not in (SYNCHRONIZED, FREERUNNING):
            self._withheld = "status", f"the page's clock status is {self._status}"
        elif self._scale is None:
            self._withheld = "leap", why_no_timescale(snapshot)
        else:
            self._steady = self._scale.withheld_from_sec is None
            self._utc_ns = self._scale.before_sec * NSEC_PER_SEC
        cdef vmclock_page raw
        _load(&raw, snapshot)
        self._period_ns = vmclock_period_ns(&raw)
        return 0


_CURES = {
    2: "load the ptp_vmclock module (Linux 6.13 or later), or name the device with --device",
    13: "run as root, or give the daemon's group the right to read it",
    1: "run as root, or give the daemon's group the right to read it",
}


def _file_type(mode):
    for test, name in ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a block device")):
        if test(mode):
            return name
    return "no regular file"


def _why_invalid(snapshot):
    if snapshot.magic != MAGIC:
        return f"magic {snapshot.magic:#010x}, not {MAGIC:#010x}"
    if snapshot.version != VERSION:
        return f"version {snapshot.version}, this program knows {VERSION}; upgrade it"
    if snapshot.size < SMALLEST_SIZE:
        return f"size {snapshot.size} does not reach the disruption marker ({SMALLEST_SIZE})"
    return None


def _why_cut_short(snapshot, fd):
    """A plain file may end before the page in it does; what lies behind its end reads as zeros."""
    length = os.fstat(fd).st_size
    if length < SMALLEST_SIZE or (snapshot.magic == MAGIC and length < min(snapshot.size, PAGE_BYTES)):
        return f"the file has only {length} bytes"
    return None


cdef int _load(vmclock_page *page, snapshot) except -1:
    cdef bytes raw = snapshot.raw
    memcpy(page, <const char *>raw, sizeof(vmclock_page))
    return 0


cdef object _esterror_ns(snapshot, const vmclock_page *page, uint64_t counter):
    if not snapshot.has(TIME_ESTERROR_VALID) or snapshot.time_esterror_nanosec is None:
        return None
    rate = page.counter_period_esterror_rate_frac_sec if snapshot.has(PERIOD_ESTERROR_VALID) else 0
    return _int(vmclock_error_ns(page, counter, page.time_esterror_nanosec, rate))


cdef object _maxerror_ns(snapshot, const vmclock_page *page, uint64_t counter):
    if not snapshot.has(TIME_MAXERROR_VALID) or snapshot.time_maxerror_nanosec is None:
        return None
    rate = page.counter_period_maxerror_rate_frac_sec if snapshot.has(PERIOD_MAXERROR_VALID) else 0
    return _int(vmclock_error_ns(page, counter, page.time_maxerror_nanosec, rate))


def time_ns(snapshot, uint64_t counter):
    """The page's own time (its time_type's, not UTC) at ``counter``, rounded to the nanosecond, ties to even."""
    cdef vmclock_page page
    _load(&page, snapshot)
    return _int(vmclock_time_ns(&page, counter))


def error_ns(snapshot, uint64_t counter):
    """The page's estimated and maximum error at ``counter``, rounded up; None for one that it does not give.

    A period error counts only where its flag says that it is there.
    """
    cdef vmclock_page page
    _load(&page, snapshot)
    return _esterror_ns(snapshot, &page, counter), _maxerror_ns(snapshot, &page, counter)


def read_counter():
    """This machine's counter, now."""
    return counter_read()


def pair(int readings, double period_ns):
    """The counter, the system clock at it (ns) and the uncertainty (ns), from ``readings`` brackets.

    ``period_ns`` is the counter's period, right to a few per cent: it only spans the microseconds between
    the brackets.
    """
    cdef Pairing pairing
    _measure(readings, period_ns, &pairing)
    return pairing.counter, pairing.system_ns, <int64_t>ceil(pairing.half_width_ns)


def counter_period_ns(int64_t baseline_ns=1000000):
    """The counter's period against the system clock, over a short wait; right to 0.1 ‰ for the default of 1 ms.

    Each end is the narrowest of a few brackets: one during which the CPU did something else is far off.
    """
    cdef Pairing first, last
    _measure(8, 0.0, &first)
    while True:
        _measure(8, 0.0, &last)
        if last.system_ns - first.system_ns >= baseline_ns:
            return <double>(last.system_ns - first.system_ns) / <double>(last.counter - first.counter)
        if last.system_ns < first.system_ns:
            first = last  # the clock was stepped back
