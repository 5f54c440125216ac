"""What the consumers have in common: a process in a directory of its own, started, paused, killed and stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tests.consumers import Build, namespace, skip
from tests.consumers.ntp import Reply, ScapyReply, ask, ask_scapy
from tests.debs import Unobtainable

T = TypeVar("T")

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0


class Daemon:
    """A program under test. As a context manager it runs inside, and leaves nothing behind.

    `workdir` holds configuration, sockets and logs; by default a new directory, with a short path (a Unix socket's may
    have 107 characters), which goes away at the end. A directory that is given stays.
    """

    name = "daemon"

    def __init__(self, workdir: Path | str | None = None) -> None:
        self._own_directory = workdir is None
        self.workdir = Path(workdir or tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = self.workdir / f"{self.name}.log"

    # What a consumer adds.

    def _launch(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _close(self) -> None:
        """Release what belongs to one run of the process."""

    # What a test calls.

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start, and wait until it answers. Raises RuntimeError, with the end of the log, if it does not."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        self.process = self._launch()
        try:
            self.wait_for(self._answers, timeout_s, "an answer")
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End it by SIGTERM; the exit code. Raises TimeoutExpired (and kills it) if it does not end."""
        process = self._running_process()
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would: sockets and pid file stay. Nothing happens if it does not run."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
            self.process = None
        self._close()

    def restart(self) -> None:
        """Stop and start on the same paths."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: it is there, and does nothing. Returns when it has stopped."""
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self._running_process().send_signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        return self._running_process().pid

    def log(self) -> str:
        """All that it has logged in this directory."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for(self, condition: Callable[[], T | None], timeout_s: float, what: str, interval_s: float = 0.01) -> T:
        """Ask `condition` until it gives something true, and return that.

        Raises RuntimeError when the process ends, TimeoutError when the time is up; both with the end of the log.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            if not self.running:
                raise RuntimeError(f"{self.name} ended ({self._exit_code()}); its log ends:\n{self._log_end()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: no {what} in {timeout_s} s; its log ends:\n{self._log_end()}")
            time.sleep(interval_s)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.running:
                self.stop()
        finally:
            self.kill()
            self._remove()

    def _remove(self) -> None:
        if self._own_directory:
            shutil.rmtree(self.workdir, ignore_errors=True)

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise RuntimeError(f"{self.name} does not run")
        return self.process

    def _exit_code(self) -> int | None:
        return None if self.process is None else self.process.returncode

    def _log_end(self) -> str:
        return "\n".join(self.log().splitlines()[-15:])


class NtpServer(Daemon):
    """A daemon that answers NTP at `ntp_address`, asked through a socket of its own network namespace."""

    ntp_address: tuple[str, int]

    def _ntp_socket(self) -> contextlib.AbstractContextManager[socket.socket]:
        raise NotImplementedError

    def ntp(self, timeout_s: float = 1.0) -> Reply:
        """Ask it for the time, as any client would. Raises TimeoutError."""
        with self._ntp_socket() as sock:
            return ask(sock, self.ntp_address, timeout_s)

    def ntp_scapy(self, timeout_s: float = 1.0) -> ScapyReply:
        """The same with another implementation of the protocol: scapy's NTPHeader of the answer."""
        with self._ntp_socket() as sock:
            return ask_scapy(sock, self.ntp_address, timeout_s)

    def wait_leap(self, leap: set[int], timeout_s: float, interval_s: float = 0.01) -> Reply:
        """Ask until the answer's leap indicator is one of these ({3}: not synchronised); that answer."""

        def look() -> Reply | None:
            with contextlib.suppress(TimeoutError):
                reply = self.ntp()
                if reply.leap in leap:
                    return reply
            return None

        return self.wait_for(look, timeout_s, f"answer with leap {leap}", interval_s)


class NamespacedServer(NtpServer):
    """An NTP server in namespaces of its own (`namespace`), where it has port 123 to itself."""

    def __init__(self, build: Build, workdir: Path | str | None) -> None:
        super().__init__(workdir)
        self.build = build
        self.ntp_address = ("127.0.0.1", 123)
        self._sockets: list[socket.socket] = []

    def _spawn(self, command: list[str], sockets: int, clock: str) -> subprocess.Popen[bytes]:
        """Start the program in its namespaces. Skips the running test where this machine does not allow them."""
        try:
            with self.log_path.open("ab") as log:
                process, self._sockets = namespace.start(command, sockets, log=log, clock=clock)
        except Unobtainable as error:
            skip(self.build.consumer, str(error))
        return process

    def _ntp_socket(self) -> contextlib.AbstractContextManager[socket.socket]:
        return contextlib.nullcontext(self._sockets[0])

    def _close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
