# cython: language_level=3
"""The writing side of a page, for the simulator: what a hypervisor does to its guest's page."""

import os

from libc.string cimport memcpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from shm.vmclock_page cimport vmclock_begin_update, vmclock_end_update, vmclock_page, vmclock_publish

from .errors import RefclockError

cdef enum:
    FILE_BYTES = 4096


cdef class PageWriter:
    """A new file of one page, mapped for writing.  Any OSError is the caller's to explain."""

    cdef vmclock_page *_page

    def __cinit__(self, path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(fd, FILE_BYTES)
            self._page = <vmclock_page *>mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if self._page == MAP_FAILED:
            self._page = NULL
            raise RefclockError(f"cannot map {path} for writing")

    def __dealloc__(self):
        if self._page != NULL:
            munmap(self._page, FILE_BYTES)

    def publish(self, bytes raw):
        """Makes the page say ``raw`` (112 bytes), under the sequence; its seq_count is counted here."""
        if len(raw) != sizeof(vmclock_page):
            raise ValueError(f"{len(raw)} bytes are no page")
        cdef vmclock_page page
        memcpy(&page, <const char *>raw, sizeof(page))
        vmclock_publish(self._page, &page)

    def begin_update(self):
        """Makes the sequence odd, as for an update that takes long."""
        vmclock_begin_update(self._page)

    def end_update(self):
        """Makes it even again."""
        vmclock_end_update(self._page)
