# cython: language_level=3
"""The NTP shared memory segment: ntpd's driver 28, and chrony's SHM refclock.

A reader that looks before the first sample, after a disruption or after the end finds it invalid and not in
sync.  The segment is never removed: a reader keeps the one that it is attached to, so a new one under the same
key would be fed for nobody.
"""

import os
from errno import EACCES, EEXIST, EINVAL, ENOENT, ENOSPC, EPERM

cimport cython
from libc.errno cimport errno
from libc.math cimport log2
from libc.stdint cimport int64_t
from libc.string cimport memset

from shm.ntp_segment cimport NTP_SEGMENT_KEY, NTP_SEGMENT_NOT_IN_SYNC, ntp_segment, ntp_segment_put

from .sink import Sink

cdef extern from "<sys/shm.h>" nogil:
    struct ipc_perm:
        unsigned int uid
        unsigned short mode
    struct shmid_ds:
        ipc_perm shm_perm
        size_t shm_segsz
    const int IPC_CREAT, IPC_EXCL, IPC_STAT, SHM_DEST
    int shmget(int key, size_t size, int flags)
    void *shmat(int id, const void *address, int flags)
    int shmdt(const void *address)
    int shmctl(int id, int command, shmid_ds *buffer)

cdef int64_t NSEC_PER_SEC = 1000000000

# How many samples go by between two looks at whether the segment is still the one that a reader would find.
CHECK_EVERY = 64


cdef class Segment:
    """One attached segment.  Any OSError is the caller's to explain."""

    cdef ntp_segment *_segment
    cdef int _id
    cdef int _key
    cdef readonly int owner
    cdef readonly int mode

    def __cinit__(self, int unit, int permissions):
        self._key = NTP_SEGMENT_KEY + unit
        self._id = shmget(self._key, sizeof(ntp_segment), 0)
        if self._id < 0 and errno == ENOENT:
            self._id = shmget(self._key, sizeof(ntp_segment), IPC_CREAT | IPC_EXCL | permissions)
        if self._id < 0 and errno == EEXIST:
            self._id = shmget(self._key, sizeof(ntp_segment), 0)
        if self._id < 0:
            raise OSError(errno, os.strerror(errno))
        cdef void *address = shmat(self._id, NULL, 0)
        if <Py_ssize_t>address == -1:
            raise OSError(errno, os.strerror(errno))
        self._segment = <ntp_segment *>address
        cdef shmid_ds state
        shmctl(self._id, IPC_STAT, &state)
        self.owner = state.shm_perm.uid
        self.mode = state.shm_perm.mode & 0o777

    def __dealloc__(self):
        if self._segment != NULL:
            shmdt(self._segment)

    def stands(self):
        """Whether a reader that comes now would find this segment: False once it was removed or replaced."""
        return shmget(self._key, sizeof(ntp_segment), 0) == self._id

    @cython.cdivision(False)  # a time before 1970 is to be rounded down, too
    def put(self, int64_t reference_ns, int64_t system_ns, int leap, int precision):
        """Publishes a valid sample.  ``precision`` is log2 of seconds.

        Microseconds are the truncated nanoseconds: ntpd ignores the nanoseconds of any others.
        """
        cdef ntp_segment state
        state.clock_sec, state.clock_nsec = reference_ns // NSEC_PER_SEC, reference_ns % NSEC_PER_SEC
        state.receive_sec, state.receive_nsec = system_ns // NSEC_PER_SEC, system_ns % NSEC_PER_SEC
        state.clock_usec, state.receive_usec = state.clock_nsec // 1000, state.receive_nsec // 1000
        state.leap, state.precision, state.valid = leap, precision, 1
        ntp_segment_put(self._segment, &state)

    def invalidate(self):
        """Publishes: nothing to read, not in sync."""
        cdef ntp_segment state
        memset(&state, 0, sizeof(state))
        state.leap = NTP_SEGMENT_NOT_IN_SYNC
        ntp_segment_put(self._segment, &state)


_CURES = {
    EACCES: "unit {unit} belongs to another user: run as that user or as root, or use a unit from 2 up",
    EPERM: "unit {unit} belongs to another user: run as that user or as root, or use a unit from 2 up",
    EINVAL: "unit {unit} has another size than NTP's 96 bytes: see `ipcs -m`, remove it with `ipcrm -M {key}`",
    ENOSPC: "the system has no room for another segment: see `ipcs -lm`",
}


class Shm(Sink):
    """Feeds the consumer of NTP shared memory ``unit``; made with ``permissions`` where it is not there yet."""

    type = "shm"

    def __init__(self, unit, permissions, log):
        super().__init__(str(unit), log)
        self._unit = unit
        self._permissions = permissions
        self._segment = None
        self._since_check = 0
        error = self._attach()
        if error is not None:
            self._note(error)

    def _attach(self):
        try:
            self._segment = Segment(self._unit, self._permissions)
        except OSError as error:
            cure = _CURES.get(error.errno, "").format(unit=self._unit, key=f"{NTP_SEGMENT_KEY + self._unit:#x}")
            return f"{error.strerror}{'; ' if cure else ''}{cure}"
        self._segment.invalidate()
        if self._segment.owner not in (0, os.geteuid()):
            self._log("warning", f"shm {self.name}: the segment was made by user {self._segment.owner}, who can write to it too")
        elif self._segment.mode & 0o022 & ~self._permissions:
            self._log("warning", f"shm {self.name}: the segment has mode {self._segment.mode:#o}: others can write to it too")
        return None

    def _put(self, sample):
        self._since_check += 1
        if self._segment is None or (self._since_check >= CHECK_EVERY and not self._segment.stands()):
            error = self._attach()
            if error is not None:
                self._segment = None
                return error
        if self._since_check >= CHECK_EVERY:
            self._since_check = 0
        precision = max(-30, min(0, _log2_s(sample.uncertainty_ns)))
        try:
            self._segment.put(sample.reference_ns, sample.system_ns, sample.leap, precision)
        except OverflowError:
            return f"{sample.reference_ns} ns is beyond what the segment can say"
        return None

    def invalidate(self):
        if self._segment is not None:
            self._segment.invalidate()

    def close(self):
        self.invalidate()
        self._segment = None


def _log2_s(ns):
    return <int>log2(max(ns, 1) * 1e-9)
