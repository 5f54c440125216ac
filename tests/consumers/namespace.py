"""A program in a user and a network namespace of its own: port 123 is free there, and the clock out of its reach.

In the namespaces the program is root, so that it may bind port 123; the kernel looks for the right to set the clock
in the first user namespace alone, so that clock_settime and adjtimex fail with EPERM whatever the program tries.
System V shared memory and the file system are the machine's.

The caller talks to the program through UDP sockets that were made inside and handed out: a socket stays in the network
namespace in which it was made.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

from tests.debs import Unobtainable

_INSIDE = str(Path(__file__).with_name("inside.py"))


def start(
    command: list[str], sockets: int, *, log: IO[bytes], clock: str = "refuse", timeout_s: float = 10.0
) -> tuple[subprocess.Popen[bytes], list[socket.socket]]:
    """Start `command` in new namespaces, output to `log`; the process and as many UDP sockets from inside.

    `clock`: what the program meets that tries to set the clock, ``refuse`` (EPERM) or ``pretend`` (success, and nothing
    happens; for a program that does not start otherwise). The sockets are bound to free ports of the namespace's
    127.0.0.1. Raises Unobtainable where this machine does not let us make the namespaces.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(timeout_s)
        launcher = [sys.executable, "-I", "-S", _INSIDE, str(theirs.fileno()), str(sockets), clock]
        process = subprocess.Popen(
            launcher + command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        try:
            message, descriptors, _flags, _address = socket.recv_fds(ours, 1024, sockets)
        except TimeoutError:
            message, descriptors = b"no answer", []
    if message != b"ready":
        process.kill()
        process.wait()
        raise Unobtainable(f"no user and network namespace on this machine: {message.decode() or 'launcher died'}")
    return process, [socket.socket(fileno=descriptor) for descriptor in descriptors]
