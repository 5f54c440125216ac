"""What the tests have in common: pages, the package's programs as real processes, and a listener for what they send."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import refclock
from refclock import model

T = TypeVar("T")

#: Where the package under test lies: in the source tree, or installed.
PACKAGE_PARENT = Path(refclock.__file__).parent.parent
ROOT = Path(__file__).resolve().parent.parent
NATIVE = Path(__file__).resolve().parent / "native"

TIMEOUT_S = 10.0
NSEC_PER_SEC = 1_000_000_000
SOCK_LAYOUT = struct.Struct("=qqdiiii")
SOCK_MAGIC = 0x534F434B

_CAP_SYS_TIME = 25
_PR_CAPBSET_DROP = 24
_libc = ctypes.CDLL(None, use_errno=True)


# ---- Pages -------------------------------------------------------------------------------------------------


def make_page(**fields: int) -> bytes:
    """The 112 bytes of a page with these ABI fields over a sound one: this machine's counter, TAI, synchronized.

    Its time is the system clock's, to about a microsecond, with the period of the counter as measured in 1 ms.
    """
    from refclock.page import LOCAL_COUNTER_ID, counter_period_ns, pair

    period_ns = counter_period_ns()
    counter, system_ns, _ = pair(16, period_ns)
    tai_ns = system_ns + 37 * NSEC_PER_SEC
    shift = 28
    page = {
        "magic": model.MAGIC,
        "size": 4096,
        "version": 1,
        "counter_id": LOCAL_COUNTER_ID,
        "time_type": model.TIME_TAI,
        "seq_count": 2,
        "disruption_marker": 1,
        "flags": model.TAI_OFFSET_VALID | model.TIME_ESTERROR_VALID | model.TIME_MAXERROR_VALID,
        "clock_status": model.SYNCHRONIZED,
        "tai_offset_sec": -37,
        "counter_period_shift": shift,
        "counter_value": counter,
        "counter_period_frac_sec": int(period_ns * 1e-9 * 2.0 ** (64 + shift)),
        "time_sec": tai_ns // NSEC_PER_SEC,
        "time_frac_sec": (tai_ns % NSEC_PER_SEC << 64) // NSEC_PER_SEC,
        "time_esterror_nanosec": 1_000,
        "time_maxerror_nanosec": 10_000,
    }
    unknown = fields.keys() - {name for name, _, _ in model.FIELDS}
    assert not unknown, f"no such fields: {unknown}"
    return model.encode(page | fields)


def write_page(path: Path | str, content: bytes, length: int = 4096) -> Path:
    """A new file with this page, filled up with zeros; takes the place of what was there."""
    path = Path(path)
    hidden = path.with_name(path.name + ".new")
    hidden.write_bytes(content.ljust(length, b"\0"))
    hidden.rename(path)
    return path


# ---- Waiting -----------------------------------------------------------------------------------------------


def wait_until(
    look: Callable[[], T], timeout_s: float = TIMEOUT_S, what: str = "what was waited for", interval_s: float = 0.005
) -> T:
    """Looks until it sees something true, and returns that; TimeoutError with the last thing seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {timeout_s} s; last seen: {seen!r}")
        time.sleep(interval_s)


# ---- The package's programs --------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """For a subprocess that is to run the package under test as a user's shell would, without a service manager."""
    unwanted = ("NOTIFY_SOCKET", "JOURNAL_STREAM", "PYTHONUNBUFFERED", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"PYTHONPATH": str(PACKAGE_PARENT)}


def command(*arguments: str | Path) -> list[str]:
    """The command line of `vmclock-refclock` with these arguments."""
    return [sys.executable, "-m", "refclock", *map(str, arguments)]


def never_set_the_clock() -> None:
    """For preexec_fn: what runs next cannot set this machine's clock, whatever it does."""
    _libc.prctl(_PR_CAPBSET_DROP, _CAP_SYS_TIME, 0, 0, 0)


def run(
    *arguments: str | Path, prefix: tuple[str, ...] = (), timeout_s: float = TIMEOUT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs one command of the package to its end."""
    options = {"capture_output": True, "text": True, "env": environment(), "check": False, "cwd": "/"} | options
    command_line = [*prefix, *command(*arguments)]
    return subprocess.run(command_line, timeout=timeout_s, preexec_fn=never_set_the_clock, **options)


class Program:
    """A process of ours, with its log; ended by its pid."""

    def __init__(self, name: str, command_line: list[str], directory: Path, **options: Any) -> None:
        self.name = name
        self.log_path = directory / f"{name}.log"
        with open(self.log_path, "ab") as log:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command_line, stderr=log, env=environment(), cwd="/", preexec_fn=never_set_the_clock, **options
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def log(self) -> str:
        """All that it has said on standard error."""
        return self.log_path.read_text(errors="replace")

    def wait_for_log(self, text: str, times: int = 1, timeout_s: float = TIMEOUT_S) -> str:
        """Waits until its log holds `text` so many times; the log."""

        def look() -> str:
            log = self.log()
            if log.count(text) < times:
                self._ensure_running(f"{text!r} in its log")
                return ""
            return log

        return wait_until(look, timeout_s, f"{text!r} ({times} times) in the log of {self.name}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = TIMEOUT_S) -> int:
        """Ends it by a signal, and returns its exit status."""
        self.process.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for its own end; its exit status."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Ends it, whatever it takes."""
        if self.running:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(TIMEOUT_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _ensure_running(self, what: str) -> None:
        assert self.running, f"{self.name} ended ({self.process.returncode}) before {what}; its log:\n{self.log()}"


class Simulator(Program):
    """The real `simulate` process on `path`; its page is there once this is made."""

    def __init__(self, path: Path, directory: Path, *options: str, name: str = "simulate") -> None:
        super().__init__(
            name, command("simulate", path, *options), directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.path = path
        self._received = b""
        with self._closing_on_error():
            line = self._line(TIMEOUT_S)
            assert line == f"ready {path}", f"{line!r}; its log:\n{self.log()}"

    def send(self, line: str) -> str:
        """Sends one command; its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self._line(TIMEOUT_S)

    def do(self, line: str) -> None:
        """Sends one command, and returns once the page shows it."""
        answer = self.send(line)
        assert answer == "ok", f"{line!r} was answered {answer!r}"

    def _line(self, timeout_s: float) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left_s)[0]:
                raise TimeoutError(f"{self.name} says nothing; its log:\n{self.log()}")
            received = os.read(self.process.stdout.fileno(), 65536)
            assert received, f"{self.name} ended; its log:\n{self.log()}"
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()


class RunningDaemon(Program):
    """The real `run` process; all its paths lie in `directory`, and it talks to no chronyd unless told so.

    `options` as on the command line, without the dashes: `daemon(device=page, sock=[a, b], max_error="0.01")`.
    """

    def __init__(
        self, directory: Path, *, name: str = "daemon", prefix: tuple[str, ...] = (), ready: bool = True, **options: Any
    ) -> None:
        self.directory = directory
        self.state_dir = Path(options.pop("state_dir", directory / "state"))
        self.status_path = Path(options.pop("status", directory / "status.sock"))
        self.config = Path(options.pop("config", directory / "config.toml"))
        if not self.config.exists():
            self.config.touch()
        options = {"device": directory / "page", "chronyd": "none", "log_level": "debug"} | options
        arguments = ["--config", self.config, "--state-dir", self.state_dir, "--status", self.status_path]
        for option, values in options.items():
            for value in values if isinstance(values, list | tuple) else [values]:
                arguments += [f"--{option.replace('_', '-')}", str(value)]
        super().__init__(name, [*prefix, *command("run", *arguments)], directory, stdin=subprocess.DEVNULL)
        self._last: dict[str, Any] = {}
        if ready:
            with self._closing_on_error():
                wait_until(self._answers, what="answer on the status socket")

    def _answers(self) -> bool:
        self._ensure_running("an answer on its status socket")
        try:
            return bool(self.status())
        except OSError:
            return False

    def ask(self, request: str, timeout_s: float = 5.0) -> Any:
        """One line to the status socket, and its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(self.status_path))
            connection.sendall(request.encode() + b"\n")
            with connection.makefile("rb") as lines:
                return json.loads(lines.readline())

    def status(self) -> dict[str, Any]:
        """The contract's status."""
        status: dict[str, Any] = self.ask("status")
        return status

    def wait_until(self, predicate: Callable[[dict[str, Any]], object], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Asks for the status until `predicate` holds; that status."""

        def look() -> dict[str, Any]:
            self._ensure_running("the status that was waited for")
            status = self.status()
            self._last = status
            return status if predicate(status) else {}

        try:
            return wait_until(look, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"not in {timeout_s} s; last status {self._last}; log:\n{self.log()[-3000:]}") from None

    def wait_state(self, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Waits until it is in one of these states; that status."""
        return self.wait_until(lambda status: status["state"] in states, timeout_s)

    def history(self) -> list[dict[str, Any]]:
        """The records of the journal, by the status socket."""
        records: list[dict[str, Any]] = self.ask("history")
        return records

    def wait_history(self, count: int = 1) -> list[dict[str, Any]]:
        """Waits until the journal has so many records, all of them closed; the records."""

        def look() -> list[dict[str, Any]]:
            records = self.history()
            closed = [one for one in records if one["recovered_after_ns"] is not None or one.get("superseded_by")]
            return records if len(closed) >= count else []

        return wait_until(look, what=f"{count} closed records")

    def rss_kib(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


# ---- Listeners ---------------------------------------------------------------------------------------------


class Datagram(NamedTuple):
    """chrony's SOCK datagram, decoded by its layout."""

    tv_sec: int
    tv_usec: int
    offset_s: float
    pulse: int
    leap: int
    padding: int
    magic: int

    @property
    def offset_ns(self) -> int:
        return round(self.offset_s * 1e9)


class SockListener:
    """A chronyd as far as the SOCK refclock goes: bound on `path`, keeping what arrives."""

    def __init__(self, path: Path | str, mode: int = 0o755) -> None:
        self.path = Path(path)
        self.raw: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        self.path.chmod(mode)

    def receive(self) -> list[Datagram]:
        """What has arrived since the last call, without waiting. Anything but a SOCK datagram is an error."""
        got: list[Datagram] = []
        while True:
            try:
                raw = self._socket.recv(4096)
            except BlockingIOError:
                return got
            assert len(raw) == SOCK_LAYOUT.size, raw
            self.raw.append(raw)
            got.append(Datagram(*SOCK_LAYOUT.unpack(raw)))

    def wait(self, count: int = 1, timeout_s: float = TIMEOUT_S) -> list[Datagram]:
        """Waits for so many datagrams that were not received yet; all that came meanwhile."""
        got: list[Datagram] = []
        deadline = time.monotonic() + timeout_s
        while True:
            got += self.receive()
            if len(got) >= count:
                return got
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._socket], [], [], left_s)[0]:
                raise TimeoutError(f"{len(got)} of {count} datagrams in {timeout_s} s")

    def fresh(self, count: int = 1, timeout_s: float = TIMEOUT_S) -> list[Datagram]:
        """Waits for datagrams of samples taken from now on."""
        now_ns = time.time_ns()
        got: list[Datagram] = []
        deadline = time.monotonic() + timeout_s
        while len(got) < count:
            batch = self.wait(1, max(0.0, deadline - time.monotonic()))
            got += [one for one in batch if one.tv_sec * NSEC_PER_SEC + (one.tv_usec + 1) * 1000 > now_ns]
        return got

    def silent(self, for_s: float) -> list[Datagram]:
        """What arrives within a time in which nothing should."""
        self.receive()
        time.sleep(for_s)
        return self.receive()

    def close(self, unlink: bool = True) -> None:
        """Ends as chronyd does, by removing the socket; or as a killed one, leaving it."""
        self._socket.close()
        if unlink:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
