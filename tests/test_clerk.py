"""refclock.clerk: in order, off the caller's way, and nothing left undone; and a daemon whose disk stalls."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from refclock.clerk import Clerk, at_once
from tests.harness import RunningDaemon, Simulator, SockListener, wait_until

TIMEOUT_S = 10.0


def test_in_order_and_not_in_the_caller_s_thread() -> None:
    clerk, done = Clerk(print), []
    for number in range(1000):
        clerk.do(lambda number: done.append((number, _thread.get_ident())), number)
    assert clerk.wait(TIMEOUT_S)
    assert [number for number, _ in done] == list(range(1000))
    assert _thread.get_ident() not in {thread for _, thread in done}


def test_the_caller_does_not_wait() -> None:
    clerk, disk, done = Clerk(print), threading.Event(), []
    clerk.do(disk.wait, TIMEOUT_S)
    clerk.do(done.append, 1)
    assert not clerk.wait(0.01) and not done
    disk.set()
    assert clerk.wait(TIMEOUT_S) and done == [1]


def test_a_task_that_fails() -> None:
    """It is said; the next one is done, and nobody waits for ever."""
    lines: list[tuple[str, str]] = []
    clerk, done = Clerk(lambda *line: lines.append(line)), []
    clerk.do(lambda: 1 // 0)
    clerk.do(done.append, 1)
    assert clerk.wait(TIMEOUT_S) and done == [1]
    clerk.do(done.append, 2)
    assert clerk.wait(TIMEOUT_S) and done == [1, 2]
    [(level, text)] = lines
    assert level == "error" and "ZeroDivisionError" in text


def test_waiting_a_little() -> None:
    """Once for what was given; a disk that still stalls is not waited for again and again."""
    clerk, disk, done = Clerk(print), threading.Event(), []
    clerk.do(done.append, 1)
    clerk.settle(TIMEOUT_S)
    assert done == [1]
    clerk.do(disk.wait, TIMEOUT_S)
    clerk.settle(0.01)
    began = time.monotonic()
    clerk.settle(TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S / 2
    disk.set()
    assert clerk.wait(TIMEOUT_S)


def test_no_thread_without_work() -> None:
    clerk, before = Clerk(print), _thread._count()
    assert clerk.wait(0)
    for _ in range(100):
        clerk.do(lambda: None)
        assert clerk.wait(TIMEOUT_S)
    wait_until(lambda: _thread._count() <= before, what="an end of the clerk's thread")


def test_where_no_thread_may_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    clerk, done = Clerk(print), []
    clerk.do(done.append, 1)
    clerk.do(done.append, 2)
    assert done == [1, 2] and clerk.wait(0)


def test_at_once() -> None:
    done: list[int] = []
    at_once(done.append, 1)
    assert done == [1]


def test_a_disk_that_stalls(
    short_path: Path,
    simulate: Callable[..., Simulator],
    daemon: Callable[..., RunningDaemon],
    listener: SockListener,
    native: Callable[..., Path],
) -> None:
    """What is written to it is late. The clock, those who are fed and those who ask notice nothing."""
    state, stalled = short_path / "state", short_path / "stalled"
    library = native("stall_disk", "-shared", "-fPIC")
    simulator = simulate()
    prefix = ("env", f"LD_PRELOAD={library}", f"STALL_UNDER={state}", f"STALL_WHILE={stalled}")
    running = daemon(prefix=prefix, sock=listener.path, state_dir=state, metrics=state / "metrics")
    running.wait_state("synchronised")
    journal = state / "journal.jsonl"
    stalled.touch()
    for number in (1, 2):
        simulator.do("disrupt offset=0.0001")
        record = running.wait_until(lambda status, number=number: status["disruptions"] == number)["last_disruption"]
        assert record["id"] == number
        running.wait_state("synchronised")
        listener.fresh(20)
    assert not journal.exists()
    stalled.unlink()
    wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) == 4, what="the journal")
    wait_until((state / "metrics").exists, what="the metrics")


def test_a_disk_that_never_answers(
    short_path: Path,
    simulate: Callable[..., Simulator],
    daemon: Callable[..., RunningDaemon],
    native: Callable[..., Path],
) -> None:
    """It does not keep the daemon from ending, which says what is lost."""
    state, stalled = short_path / "state", short_path / "stalled"
    library = native("stall_disk", "-shared", "-fPIC")
    simulate()
    prefix = ("env", f"LD_PRELOAD={library}", f"STALL_UNDER={state}", f"STALL_WHILE={stalled}")
    running = daemon(prefix=prefix, state_dir=state, metrics=state / "metrics")
    running.wait_state("synchronised")
    stalled.touch()
    running.wait_until(lambda status: status["uptime_ns"] > 6_000_000_000)  # the metrics are due every five seconds
    assert running.stop() == 0
    assert "a disk has not answered for 5 s" in running.log()
