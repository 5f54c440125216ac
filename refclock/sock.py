"""chronyd's SOCK refclock: one datagram for each sample.

The datagram (chrony's refclock_sock.c, as its documentation and facts describe it) is 40 bytes on 64-bit
Linux, native order: the system clock as a timeval, the offset in seconds, pulse, leap, padding, magic.
chronyd binds the socket when it starts and removes it when it ends, so it is addressed anew for each datagram:
a connection would be lost with every restart of chronyd.
"""

from __future__ import annotations

import os
import socket
from errno import EACCES, EAGAIN, ECONNREFUSED, EDESTADDRREQ, ENOENT, ENOTDIR, ENOTSOCK, EPERM, EPROTOTYPE
from struct import Struct

from .errors import ConfigError
from .sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .page import Sample

MESSAGE = Struct("=qqdiiii")
MAGIC = 0x534F434B
LONGEST_PATH = 107  # sun_path, unix(7)

_CURES = {
    ENOENT: "chronyd has not made the socket (yet): it needs `refclock SOCK {path} ...` in chrony.conf and a restart",
    ENOTDIR: "a part of the path is no directory; check the path here and in chrony.conf",
    ECONNREFUSED: "nobody listens on the socket: chronyd has ended; samples go on once it is back",
    EACCES: "chronyd's socket may be written by its owner only: run as root or as the owner of {path}",
    EPERM: "refused by a security policy (AppArmor, SELinux): allow this program to write {path}",
    EAGAIN: "chronyd does not read: it is stopped or overloaded",
    EPROTOTYPE: "not chronyd's: a socket of another type; check the path here and in chrony.conf",
    ENOTSOCK: "no socket; check the path here and in chrony.conf",
    EDESTADDRREQ: "no address; check the path here and in chrony.conf",
}


def encode(sample: Sample) -> bytes:
    """The datagram for a sample.

    The timeval is truncated, never rounded: chronyd drops a sample from its future.  The offset is that of
    the exact moment and keeps its nanoseconds.
    """
    seconds, nanoseconds = divmod(sample.system_ns, 1_000_000_000)
    return MESSAGE.pack(seconds, nanoseconds // 1000, sample.offset_ns / 1e9, 0, sample.leap, 0, MAGIC)


class Sock(Sink):
    """Feeds the chronyd that listens on ``path``; rides out its absence and its restarts."""

    type = "sock"

    def __init__(self, path: str, log: Callable[[str, str], None]) -> None:
        super().__init__(path, log)
        length = len(os.fsencode(path))
        if not 0 < length <= LONGEST_PATH or "\0" in path:
            raise ConfigError(f"sock {path!r}: a socket's path has 1 to {LONGEST_PATH} bytes, this one {length}")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def _put(self, sample: Sample) -> str | None:
        try:
            self._socket.sendto(encode(sample), self.name)
        except OSError as error:
            cure = _CURES.get(error.errno or 0, "")
            return f"{error.strerror}{'; ' if cure else ''}{cure.format(path=self.name)}"
        return None

    def close(self) -> None:
        self._socket.close()
