"""Telling others: hooks, and the service manager."""

from __future__ import annotations

import json
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000


class Hooks:
    """Runs the user's programs on events.  Nothing here waits for them."""

    def __init__(self, commands: list[list[str]], log: Callable[[str, str], None]) -> None:
        self.commands = commands
        self._log = log
        self._running: dict[int, str] = {}

    def run(self, event: str, fields: dict[str, object]) -> None:
        """Starts each hook with the fields as JSON on its standard input and VMCLOCK_EVENT in its environment."""
        if not self.commands:
            return
        document = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        for command in self.commands:
            try:
                self._running[_spawn(command, event, document)] = command[0]
            except OSError as error:
                self._log("warning", f"hook {command[0]}: {error.strerror}")

    def reap(self) -> None:
        """Takes note of those that have ended."""
        for pid, name in list(self._running.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 0
            if ended:
                del self._running[pid]
                if status:
                    self._log("warning", f"hook {name} ended with status {os.waitstatus_to_exitcode(status)}")

    def close(self) -> None:
        """Hooks that still run are left to it: they are the user's."""
        self.reap()


def _spawn(command: list[str], event: str, document: bytes) -> int:
    # A file that is never named: a pipe might be full before the hook reads, and a hook need not read at all.
    descriptor = os.memfd_create("vmclock-record", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, document)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.posix_spawn(
            command[0],
            command,
            {**os.environ, "VMCLOCK_EVENT": event},
            file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, 0)],
            setsigdef=_CAUGHT_SIGNALS,
        )
    finally:
        os.close(descriptor)


_CAUGHT_SIGNALS = (1, 2, 10, 13, 15)


class Supervisor:
    """systemd's side of a service of Type=notify (sd_notify(3)): READY, STATUS, WATCHDOG, STOPPING."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = os.environ.get("WATCHDOG_USEC", "") if watched else ""
        # Twice within the limit, as sd_watchdog_enabled(3) asks.
        self._pulse_ns = int(microseconds) * 1000 // 2 if self._address and microseconds.isdigit() else None
        self._due_ns = 0
        self._state = ""

    def ready(self) -> None:
        self._send("READY=1", 0)

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def tick(self, now_ns: int, state: str) -> None:
        """Once each time round the loop: it is alive, and this is its state."""
        if not self._address:
            return
        if state != self._state:
            self._state = state
            self._send(f"STATUS={state}")
        if self._pulse_ns is not None and now_ns >= self._due_ns:
            self._due_ns = now_ns + self._pulse_ns
            self._send("WATCHDOG=1")

    def due_ns(self) -> int | None:
        """When the next pulse is due, or None."""
        return self._due_ns if self._pulse_ns is not None else None

    def _send(self, text: str, flags: int = socket.MSG_DONTWAIT) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            try:
                notify.sendto(text.encode(), flags, self._address)
            except OSError:
                pass  # a manager that does not listen will act on its own time limit
