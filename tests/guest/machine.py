"""A QEMU process, commanded over QMP; and the page of its vmclock device, seen from outside.

A `Machine` is one process: a guest that is restored in a new process gets another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PAGE_ADDRESS = 0xFEFFB000
COMMAND_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 20.0


class MachineError(Exception):
    """QEMU ended, did not answer in time, or refused a command."""


def _hasten() -> None:
    """Ahead of whatever else this machine does, where that is allowed: it is a clock that is measured.

    Not in real time: QEMU's threads would then starve its own timers.
    """
    with contextlib.suppress(OSError):
        os.nice(-10)
        # With automatic groups a process's niceness counts among those of its session only.
        Path("/proc/self/autogroup").write_text("-10")


class Machine:
    """Starts QEMU and holds its two connections: QMP, and the virtio-serial port on which the guest's agent speaks.

    Its standard error goes to `directory`/qemu.log, the guest's serial console to `directory`/console.log (both
    appended to). The process dies with this one, even if this one is killed.
    """

    def __init__(self, qemu: Sequence[str], arguments: Sequence[str], directory: Path) -> None:
        self._directory = directory
        with _listener(directory / "qmp") as qmp, _listener(directory / "agent") as agent:
            command = [
                *("setpriv", "--pdeathsig", "KILL", "--", *qemu),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-chardev", f"socket,id=qmp,path={directory}/qmp", "-mon", "chardev=qmp,mode=control"),
                *("-chardev", f"file,id=console,path={directory}/console.log,append=on"),
                *("-serial", "chardev:console"),
                *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={directory}/agent"),
                *("-device", "virtserialport,chardev=agent"),
                *arguments,
            ]
            with open(directory / "qemu.log", "ab") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_hasten,
                )
            self._lines = None
            self.agent: socket.socket | None = None
            try:
                # QEMU makes its connections in the order of its chardevs.
                self._qmp = self._accept(qmp)
                self.agent = self._accept(agent)
                self._lines = self._qmp.makefile("rb")
                self._receive()
                self.command("qmp_capabilities")
            except BaseException:
                self.kill()
                raise
        self._page: int | None = None

    def command(self, name: str, **arguments: object) -> object:
        """A QMP command and its result."""
        request = {"execute": name, "arguments": arguments} if arguments else {"execute": name}
        self._qmp.settimeout(COMMAND_TIMEOUT_S)
        try:
            self._qmp.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise MachineError(f"{name}: {error}; {self._last_words()}") from error
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise MachineError(f"{name}: {answer['error']['desc']}")

    def monitor(self, line: str) -> str:
        """A command of the human monitor and its output."""
        return str(self.command("human-monitor-command", **{"command-line": line}))

    def change_state(self, line: str) -> None:
        """savevm or loadvm, which say nothing when they succeed."""
        complaint = self.monitor(line).strip()
        if complaint:
            raise MachineError(f"{line}: {complaint}")

    def read_page(self, size: int) -> bytes:
        with self._memory() as memory:
            return os.pread(memory, size, self._page_address())

    def write_page(self, offset: int, content: bytes) -> None:
        """One write into the page. Ordering among several is the caller's: each is done when this returns."""
        with self._memory() as memory:
            os.pwrite(memory, content, self._page_address() + offset)

    def end(self) -> None:
        """Asks QEMU to quit, so that its disk is closed; kills it when it does not."""
        with contextlib.suppress(MachineError, OSError):
            self.command("quit")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        for connection in (self._lines, getattr(self, "_qmp", None), self.agent):
            if connection is not None:
                connection.close()

    def _page_address(self) -> int:
        if self._page is None:
            answer = self.monitor(f"gpa2hva {PAGE_ADDRESS:#x}")
            found = re.search(r"is (0x[0-9a-f]+)", answer)
            if not found:
                raise MachineError(f"the vmclock page is not at {PAGE_ADDRESS:#x}: {answer.strip()}")
            self._page = int(found[1], 16)
        return self._page

    @contextlib.contextmanager
    def _memory(self):
        memory = os.open(f"/proc/{self.process.pid}/mem", os.O_RDWR)
        try:
            yield memory
        finally:
            os.close(memory)

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if self.process.poll() is not None:
                break
        raise MachineError(f"QEMU did not come up; {self._last_words()}")

    def _receive(self) -> dict:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise MachineError(f"QEMU did not answer within {COMMAND_TIMEOUT_S} s") from None
        if not line:
            raise MachineError(f"QEMU ended; {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        log = (self._directory / "qemu.log").read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.poll()}, last words: {log[-1] if log else 'none'}"


def empty_disk(size: int = 1 << 20) -> bytes:
    """An empty qcow2 image of version 2, to hold saved states: header, refcount table, refcount block, L1 table."""
    cluster = 1 << 16
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    table = struct.pack(">Q", 2 * cluster)
    block = struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(cluster, b"\0") for part in (header, table, block, b""))


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(0.2)
    return listener
