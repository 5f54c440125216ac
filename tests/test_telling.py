"""refclock.telling: hooks as processes, and the service manager as a socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refclock.telling import Hooks, Supervisor
from tests.harness import wait_until

SEC = 1_000_000_000
FIELDS: dict[str, object] = {"id": 3, "kind": "disruption", "actions": [{"name": "step"}] * 1000}


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, level: str, text: str) -> None:
        self.lines.append((level, text))


@pytest.fixture
def log() -> Log:
    return Log()


def script(path: Path, body: str) -> list[str]:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return [str(path)]


def wait_for(hooks: Hooks, path: Path) -> str:
    def look() -> bool:
        hooks.reap()
        return path.exists()

    wait_until(look, what=f"file {path}")
    return path.read_text()


def wait_for_all(hooks: Hooks) -> None:
    pids = set(hooks._running)

    def all_gone() -> bool:
        hooks.reap()
        return not hooks._running

    wait_until(all_gone, what="end of all hooks")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids), "a zombie"


# ---- Hooks -----------------------------------------------------------------------------------------------


def test_a_hook_gets_record_event_and_arguments(tmp_path: Path, log: Log) -> None:
    body = f'cat > {tmp_path}/part; echo "$VMCLOCK_EVENT $# $1" >> {tmp_path}/part; mv {tmp_path}/part {tmp_path}/got'
    hooks = Hooks([[*script(tmp_path / "hook", body), "an argument; $HOME"]], log)
    hooks.run("disrupted", FIELDS)
    record, event = wait_for(hooks, tmp_path / "got").splitlines()
    assert json.loads(record) == FIELDS
    assert event == "disrupted 1 an argument; $HOME"
    assert "VMCLOCK_EVENT" not in os.environ and not log.lines


def test_a_hook_that_reads_nothing_and_takes_its_time(tmp_path: Path, log: Log) -> None:
    """A record larger than a pipe's buffer goes to a hook that does not read: nobody waits."""
    go = tmp_path / "go"
    hook = script(tmp_path / "slow", f"exec 0<&-; until [ -e {go} ]; do sleep 0.05; done; touch {tmp_path}/done")
    hooks = Hooks([hook] * 3, log)
    started = time.monotonic()
    hooks.run("disrupted", FIELDS | {"padding": "x" * 1_000_000})
    assert time.monotonic() - started < 0.5
    go.touch()
    wait_for(hooks, tmp_path / "done")


def test_one_hook_that_cannot_run_does_not_keep_the_others(tmp_path: Path, log: Log) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    hooks = Hooks([["/nonexistent/hook"], [str(plain)], script(tmp_path / "hook", f"touch {tmp_path}/ran")], log)
    hooks.run("recovered", FIELDS)
    wait_for(hooks, tmp_path / "ran")
    texts = [text for level, text in log.lines if level == "warning"]
    assert any("/nonexistent/hook: No such file" in text for text in texts)
    assert any("plain: Permission denied" in text for text in texts)


def test_how_hooks_end_is_said_and_leaves_no_zombie(tmp_path: Path, log: Log) -> None:
    hooks = Hooks([script(tmp_path / "bad", "exit 7"), script(tmp_path / "killed", "kill -9 $$"), ["/bin/true"]], log)
    hooks.run("recovered", FIELDS)

    def both() -> bool:
        hooks.reap()
        return len(log.lines) == 2

    wait_until(both)
    assert sorted(text.split("/")[-1] for _, text in log.lines) == [
        "bad ended with status 7",
        "killed ended with status -9",
    ]
    wait_for_all(hooks)


def test_a_hook_has_default_signals_and_no_descriptor_of_ours(tmp_path: Path, log: Log) -> None:
    held = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    ignored = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        body = f"grep -E 'SigIgn|SigCgt' /proc/$$/status > {tmp_path}/part; ls /proc/$$/fd >> {tmp_path}/part"
        hooks = Hooks([script(tmp_path / "hook", f"{body}; mv {tmp_path}/part {tmp_path}/got")], log)
        hooks.run("soon", FIELDS)
        text = wait_for(hooks, tmp_path / "got")
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGPIPE, ignored)
        os.close(held)
    masks = {line.split(":")[0]: int(line.split(":")[1], 16) for line in text.splitlines() if ":" in line}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGPIPE, signal.SIGHUP):
        assert not masks["SigIgn"] >> (number - 1) & 1
    assert str(held) not in [line for line in text.splitlines() if line.isdigit() and int(line) > 2 and int(line) < 10]


def test_no_descriptor_is_lost(tmp_path: Path, log: Log) -> None:
    hooks = Hooks([["/bin/true"], ["/nonexistent"]], log)
    hooks.run("disrupted", FIELDS)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        hooks.run("disrupted", FIELDS)
    assert len(os.listdir("/proc/self/fd")) == before
    wait_for_all(hooks)


# ---- The service manager ----------------------------------------------------------------------------------


class Manager:
    """What systemd listens on."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(2)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[str]:
        self.socket.setblocking(False)
        texts = []
        while True:
            try:
                texts.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return texts


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    address = str(short_path / "notify") if request.param == "path" else f"@vmclock-test-{os.getpid()}"
    made = Manager(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    yield made
    made.socket.close()


def test_ready_status_and_stopping(manager: Manager) -> None:
    supervisor = Supervisor()
    assert "NOTIFY_SOCKET" not in os.environ, "hooks must not speak for the daemon"
    supervisor.ready()
    for state in ("unknown", "unknown", "synchronised", "disrupted", "disrupted"):
        supervisor.tick(0, state)
    supervisor.stopping()
    assert manager.heard() == ["READY=1", "STATUS=unknown", "STATUS=synchronised", "STATUS=disrupted", "STOPPING=1"]
    assert supervisor.due_ns() is None


def test_the_watchdog_is_fed_twice_within_its_time(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    supervisor = Supervisor()
    pulses = 0
    for now_ms in range(0, 10_000, 10):
        supervisor.tick(now_ms * 1_000_000, "synchronised")
        due_ns = supervisor.due_ns()
        assert due_ns is not None and due_ns - now_ms * 1_000_000 <= SEC // 2
        pulses += manager.heard().count("WATCHDOG=1")
    assert pulses == 20


@pytest.mark.parametrize(("pid", "usec"), [("1", "1000000"), (None, "never"), (None, "")])
def test_a_watchdog_that_is_not_ours(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, pid: str | None, usec: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    supervisor = Supervisor()
    supervisor.tick(SEC, "unknown")
    assert supervisor.due_ns() is None and manager.heard() == ["STATUS=unknown"]


def test_a_manager_that_does_not_read_holds_up_nothing(manager: Manager) -> None:
    supervisor = Supervisor()
    started = time.monotonic()
    for number in range(10_000):
        supervisor.tick(0, f"state {number % 2}")
    assert time.monotonic() - started < 5
    assert 0 < len(manager.heard()) < 10_000


def test_a_manager_that_is_gone(manager: Manager, short_path: Path) -> None:
    supervisor = Supervisor()
    manager.socket.close()
    supervisor.ready()
    supervisor.tick(0, "unknown")
    supervisor.stopping()


def test_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    supervisor = Supervisor()
    supervisor.ready()
    supervisor.tick(0, "unknown")
    assert supervisor.due_ns() is None
