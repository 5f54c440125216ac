"""Time sources for the consumers, independent of the package under test: one datagram, one segment, by the layouts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SOCK_MAGIC = 0x534F434B
SHM_KEY = 0x4E545030
SHM_SIZE = 96
IPC_CREAT = 0o1000
IPC_RMID = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


def sock_sample(offset_s: float, leap: int = 0) -> bytes:
    """chrony's SOCK datagram for this moment; `offset_s` is reference - system."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return struct.pack("@qqdiiii", seconds, nanoseconds // 1000, offset_s, 0, leap, 0, SOCK_MAGIC)


def send_sock(path: Path | str, offset_s: float, leap: int = 0) -> bool:
    """Send one sample; False if nobody listens (or listens fast enough)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(sock_sample(offset_s, leap), socket.MSG_DONTWAIT, str(path))
        except OSError:
            return False
    return True


class Segment:
    """The NTP shared memory segment of a unit, made if it is not there (mode `permissions`)."""

    def __init__(self, unit: int, permissions: int = 0o600) -> None:
        self.identifier = _check(_libc.shmget(SHM_KEY + unit, SHM_SIZE, IPC_CREAT | permissions))
        address = _libc.shmat(self.identifier, None, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"shmat: {os.strerror(ctypes.get_errno())}")
        self._address = address
        self.memory = (ctypes.c_char * SHM_SIZE).from_address(address)

    def put(self, offset_s: float, leap: int = 0, *, age_s: float = 0.0, precision: int = -20) -> None:
        """Write one sample as a mode 1 writer does; `age_s` dates it back."""
        system_ns = time.time_ns() - round(age_s * 1e9)
        reference_s, reference_ns = divmod(system_ns + round(offset_s * 1e9), 1_000_000_000)
        receive_s, receive_ns = divmod(system_ns, 1_000_000_000)
        count = struct.unpack_from("i", self.memory, 4)[0] + 1
        self.set_valid(0)
        struct.pack_into("iiqi", self.memory, 0, 1, count, reference_s, reference_ns // 1000)
        struct.pack_into("qi", self.memory, 24, receive_s, receive_ns // 1000)
        struct.pack_into("iii", self.memory, 36, leap, precision, 0)
        struct.pack_into("II", self.memory, 52, reference_ns, receive_ns)
        struct.pack_into("i", self.memory, 4, count + 1)
        self.set_valid(1)

    def set_valid(self, valid: int) -> None:
        struct.pack_into("i", self.memory, 48, valid)

    @property
    def valid(self) -> int:
        """0 once a reader has taken the sample."""
        return int(struct.unpack_from("i", self.memory, 48)[0])

    def close(self) -> None:
        """Detach. The segment stays; `remove_segment` removes it."""
        if self._address is not None:
            del self.memory
            _libc.shmdt(ctypes.c_void_p(self._address))
            self._address = None


def segment_exists(unit: int) -> bool:
    return bool(_libc.shmget(SHM_KEY + unit, 0, 0) >= 0)


def remove_segment(unit: int) -> None:
    """Remove a unit's segment; those who have it attached keep it until they let go."""
    identifier = _libc.shmget(SHM_KEY + unit, 0, 0)
    if identifier >= 0:
        _libc.shmctl(identifier, IPC_RMID, None)


def free_unit() -> int:
    """A random unit of 2 to 7 (gpsd's ntpshmmon looks no further) that has no segment."""
    units = [unit for unit in range(2, 8) if not segment_exists(unit)]
    if not units:
        raise RuntimeError("the NTP shared memory units 2 to 7 are all in use: see ipcs -m, ipcrm")
    return random.choice(units)


@contextlib.contextmanager
def feeding_sock(path: Path | str, offset_s: float, interval_s: float = 0.05) -> Iterator[None]:
    """Meanwhile a thread sends samples."""
    with _repeating(lambda: send_sock(path, offset_s), interval_s):
        yield


@contextlib.contextmanager
def feeding_shm(unit: int, offset_s: float, interval_s: float = 0.05) -> Iterator[Segment]:
    """Meanwhile a thread writes samples into the unit's segment, which goes away at the end."""
    segment = Segment(unit, 0o666)
    try:
        with _repeating(lambda: segment.put(offset_s), interval_s):
            yield segment
    finally:
        segment.close()
        remove_segment(unit)


@contextlib.contextmanager
def _repeating(action: Callable[[], object], interval_s: float) -> Iterator[None]:
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval_s):
            action()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
