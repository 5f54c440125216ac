"""Makes a user and a network namespace, hands out sockets of it, and becomes the program of its command line.

    inside.py CHANNEL SOCKETS CLOCK PROGRAM ARGUMENT…

CHANNEL is the descriptor of a Unix socket, on which the answer comes: ``ready`` with the descriptors of SOCKETS bound
UDP sockets, or why it did not work. CLOCK is ``refuse`` (the system calls that set the clock fail with EPERM, by the
user namespace) or ``pretend`` (they do nothing and say that they did, by a seccomp filter). A script of its own, run by
`namespace.start`: only a process without threads may enter a new user namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_ALLOW = 0x7FFF0000
BPF_LD_W_ABS = 0x20
BPF_JEQ_K = 0x15
BPF_RET_K = 0x06

# clock_adjtime, adjtimex, clock_settime, settimeofday
CLOCK_CALLS = {"x86_64": (305, 159, 227, 164), "aarch64": (266, 171, 112, 170)}


def enter_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    with contextlib.suppress(OSError):  # only an ordinary user has to, and only with a kernel that knows it
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def pretend_clock() -> None:
    """From here on the system calls that set the clock return 0 and do nothing."""
    calls = CLOCK_CALLS[os.uname().machine]
    instructions = [struct.pack("=HBBI", BPF_LD_W_ABS, 0, 0, 0)]  # the number of the system call
    for index, call in enumerate(calls):
        instructions.append(struct.pack("=HBBI", BPF_JEQ_K, len(calls) - index, 0, call))
    instructions.append(struct.pack("=HBBI", BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW))
    instructions.append(struct.pack("=HBBI", BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO))
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program):
        raise OSError(ctypes.get_errno(), f"seccomp filter: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        enter_namespaces()
        raise_loopback()
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(int(sys.argv[2]))]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        if sys.argv[3] == "pretend":
            pretend_clock()
    except OSError as error:
        channel.send(str(error).encode())
        raise SystemExit(1) from None
    socket.send_fds(channel, [b"ready"], [sock.fileno() for sock in sockets])
    channel.close()
    os.execv(sys.argv[4], sys.argv[4:])


if __name__ == "__main__":
    main()
