"""The daemon as a process: whatever becomes of the page, the sinks or its files, nothing wrong is fed; it goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refclock.page import Page
from refclock.policy import Look, Policy
from refclock.sock import Sock
from tests.harness import RunningDaemon, Simulator, SockListener, make_page, run, wait_until, write_page
from tests.test_segment import View, is_no_time, remove, unit

__all__ = ["unit"]  # a fixture

Daemon = Callable[..., RunningDaemon]
Simulate = Callable[..., Simulator]
PageFile = Callable[..., Path]

MSEC = 1_000_000
#: As far off as a page of `make_page` may be after the seconds that a test takes.
CLOSE_NS = 900_000


def fed(status: dict[str, Any]) -> int:
    return int(status["samples"])


def all_close(datagrams: list[Any], offset_ns: int = 0) -> None:
    """None of them would lead a clock astray."""
    for one in datagrams:
        assert abs(one.offset_ns - offset_ns) < CLOSE_NS and one.leap == 0, one


# ---- Whatever becomes of the page ---------------------------------------------------------------------------


def overwrite(path: Path, **fields: int) -> None:
    """Another page in the same file, its time 1000 s off: whoever believes it is led astray."""
    content = make_page(**fields)
    (sec,) = struct.unpack_from("<Q", content, 0x48)
    wrong = content[:0x48] + struct.pack("<Q", (sec + 1000) % 2**64) + content[0x50:]
    with open(path, "r+b") as file:
        file.write(wrong)


def restore(path: Path) -> None:
    """A sound page, in the same file if there is one."""
    if path.is_dir():
        path.rmdir()
    elif path.exists() and not path.is_file():
        path.unlink()
    if path.exists():
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.write(make_page())
            file.truncate(4096)
    else:
        write_page(path, make_page())


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_rubbish(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(range(256)) * 16)


def to_odd_sequence(path: Path) -> None:
    overwrite(path, seq_count=3)


def wrong_page(**fields: int) -> Callable[[Path], None]:
    return lambda path: overwrite(path, **fields)


BAD = [
    pytest.param(lambda path: os.truncate(path, 0), "waiting", id="truncated to 0"),
    pytest.param(lambda path: os.truncate(path, 50), "waiting", id="truncated to 50"),
    pytest.param(Path.unlink, "waiting", id="removed"),
    pytest.param(to_directory, "waiting", id="a directory"),
    pytest.param(to_fifo, "waiting", id="a FIFO"),
    pytest.param(to_rubbish, "waiting", id="rubbish"),
    pytest.param(wrong_page(magic=0), "waiting", id="no magic"),
    pytest.param(wrong_page(version=2), "waiting", id="version 2"),
    pytest.param(wrong_page(size=16), "waiting", id="size 16"),
    pytest.param(wrong_page(size=40), "watching", id="size 40"),
    pytest.param(wrong_page(counter_id=0xFF), "watching", id="no counter"),
    pytest.param(wrong_page(counter_id=9), "watching", id="another counter"),
    pytest.param(wrong_page(time_type=2), "watching", id="monotonic"),
    pytest.param(wrong_page(time_type=3), "watching", id="smeared"),
    pytest.param(wrong_page(clock_status=0), "unsynchronised", id="status unknown"),
    pytest.param(wrong_page(clock_status=4), "unsynchronised", id="status unreliable"),
    pytest.param(wrong_page(clock_status=5), "unsynchronised", id="status 5"),
    pytest.param(wrong_page(leap_indicator=9), None, id="leap 9"),
    pytest.param(wrong_page(time_maxerror_nanosec=10**9), "unsynchronised", id="a wide bound"),
    pytest.param(wrong_page(time_sec=100), "unsynchronised", id="1970"),
    pytest.param(wrong_page(time_sec=2**40), "unsynchronised", id="a far year"),
    pytest.param(wrong_page(counter_period_shift=27), "unsynchronised", id="twice the period"),
    pytest.param(wrong_page(counter_period_frac_sec=0), "unsynchronised", id="no period"),
    pytest.param(to_odd_sequence, "unsynchronised", id="an odd sequence"),
]


@pytest.mark.parametrize(("spoil", "state"), BAD)
def test_a_page_that_goes_bad_and_gets_well_again(
    page_file: PageFile, daemon: Daemon, listener: SockListener, spoil: Callable[[Path], None], state: str | None
) -> None:
    """The same daemon throughout: it rides it out, feeds nothing meanwhile, and feeds again within two seconds."""
    path = page_file()
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    all_close(listener.wait(1))

    spoil(path)
    # A page that had its time a moment ago and has none is waited for: its state is not `watching` yet.
    if state == "watching":
        state = "unsynchronised"
    if state is None:
        running.wait_until(lambda status: status["withheld"].get("leap"))
    else:
        running.wait_state(state, timeout_s=4)
    all_close(listener.receive())
    samples, lines = fed(running.status()), running.log().count("\n")
    assert listener.silent(0.3) == []
    assert fed(running.status()) == samples
    assert running.log().count("\n") == lines, "one line for each change"

    restore(path)
    began = time.monotonic()
    running.wait_until(lambda status: fed(status) > samples, timeout_s=4)
    assert time.monotonic() - began < 2.5
    running.wait_state("synchronised")
    all_close(listener.fresh(2))
    assert running.running


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: os.truncate(path, 0), id="empty"),
        pytest.param(to_directory, id="directory"),
        pytest.param(to_fifo, id="fifo"),
        pytest.param(to_rubbish, id="rubbish"),
        pytest.param(to_odd_sequence, id="odd"),
        pytest.param(wrong_page(size=16), id="size 16"),
        pytest.param(wrong_page(version=7), id="version 7"),
    ],
)
def test_a_page_that_comes_late(
    page_file: PageFile, daemon: Daemon, listener: SockListener, spoil: Callable[[Path], None]
) -> None:
    """It is waited for, with one line that says what is wrong."""
    path = page_file()
    spoil(path)
    running = daemon(sock=listener.path)
    status = running.wait_state("waiting")
    assert str(path) in status["reason"] and "\n" not in status["reason"]
    assert (status["kind"], status["samples"], status["disruption_marker"]) == (None, 0, None)
    assert listener.silent(0.4) == []
    assert running.log().count("waiting") == 1, running.log()
    restore(path)
    began = time.monotonic()
    running.wait_state("synchronised")
    assert time.monotonic() - began < 2
    all_close(listener.fresh(2))
    assert running.status()["disruptions"] == 0


def test_a_page_that_it_may_not_read(
    page_file: PageFile, daemon: Daemon, listener: SockListener, short_path: Path, nobody: tuple[str, ...]
) -> None:
    path = page_file()
    path.chmod(0)
    for name in ("config.toml", "state"):
        (short_path / name).touch() if name.endswith("toml") else (short_path / name).mkdir(mode=0o777)
    short_path.chmod(0o777)
    listener.path.chmod(0o777)
    running = daemon(sock=listener.path, prefix=nobody)
    status = running.wait_state("waiting")
    assert "Permission denied" in status["reason"] and "root" in status["reason"]
    path.chmod(0o644)
    running.wait_state("synchronised")
    all_close(listener.fresh(2))


def test_a_page_that_is_replaced(page_file: PageFile, daemon: Daemon, listener: SockListener) -> None:
    """The new file is followed, and its marker compared with the old one's."""
    page_file(disruption_marker=5)
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    page_file(disruption_marker=5)
    running.wait_for_log("was removed or replaced", timeout_s=3)
    running.wait_state("synchronised")
    assert running.status()["disruptions"] == 0
    page_file(disruption_marker=6)
    running.wait_until(lambda status: status["disruption_marker"] == 6, timeout_s=3)
    running.wait_state("synchronised")
    assert running.status()["disruptions"] == 1
    all_close(listener.fresh(2))


def test_removed_and_made_again(simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path) -> None:
    first = simulate("--offset", "0.0003")
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    first.do("quit")
    first.path.unlink()
    running.wait_state("waiting", timeout_s=3)
    listener.receive()
    simulate("--offset", "-0.0003")
    began = time.monotonic()
    running.wait_state("synchronised")
    assert time.monotonic() - began < 2
    for one in listener.fresh(3):
        assert abs(one.offset_ns + 300_000) < 50_000


def test_a_stalled_writer(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulator = simulate()
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    simulator.do("stall 1.2")
    status = running.wait_state("unsynchronised")
    assert "being written" in status["reason"]
    listener.receive()
    assert listener.silent(0.3) == []
    running.wait_state("synchronised")
    all_close(listener.fresh(2))
    assert running.log().count("being written") == 1


def test_a_page_that_is_torn_at_again_and_again(
    page_file: PageFile, daemon: Daemon, listener: SockListener, short_path: Path
) -> None:
    """Two seconds of everything at once. It survives, and nothing wrong is fed."""
    path = page_file()
    running = daemon(sock=listener.path, watch="0.001", interval="0.002", log_level="info")
    running.wait_state("synchronised")
    end = time.monotonic() + 2
    spoilers = [param.values[0] for param in BAD]
    got = listener.receive()
    count = 0
    while time.monotonic() < end:
        for spoil in spoilers:
            spoil(path)  # type: ignore[operator]
            restore(path)
            got += listener.receive()
            count += 1
    assert count > 100
    restore(path)
    running.wait_state("synchronised")
    got += listener.fresh(2)
    all_close(got)


# ---- What the page says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "state", "is_fed"),
    [
        pytest.param({}, {}, "synchronised", True, id="synchronized"),
        pytest.param({"clock_status": 0}, {}, "unsynchronised", False, id="unknown"),
        pytest.param({"clock_status": 1}, {}, "unsynchronised", False, id="initializing"),
        pytest.param({"clock_status": 3}, {}, "holdover", True, id="freerunning"),
        pytest.param({"clock_status": 4}, {}, "unsynchronised", False, id="unreliable"),
        pytest.param({"clock_status": 200}, {}, "unsynchronised", False, id="status-200"),
        pytest.param({"clock_status": 3, "flags": 1}, {}, "unsynchronised", False, id="freerunning without bound"),
        pytest.param({"flags": 1}, {}, "synchronised", True, id="synchronized without bound"),
        pytest.param({"leap_indicator": 9}, {}, "unknown", False, id="leap 9"),
        pytest.param({"time_maxerror_nanosec": 2 * MSEC}, {}, "unsynchronised", False, id="bound beyond max-error"),
        pytest.param(
            {"time_maxerror_nanosec": 2 * MSEC}, {"max_error": 0.004}, "synchronised", True, id="wider max-error"
        ),
        pytest.param({"time_maxerror_nanosec": MSEC + 1}, {}, "unsynchronised", False, id="bound just beyond"),
        pytest.param({"tai_offset_sec": 37}, {}, "synchronised", True, id="+37"),
        pytest.param({"size": 104}, {}, "synchronised", True, id="size 104"),
        pytest.param({"counter_id": 0xFF, "clock_status": 0}, {}, "watching", False, id="no counter"),
        pytest.param({"time_type": 2}, {}, "watching", False, id="monotonic"),
        pytest.param({"flags": 0x60}, {}, "watching", False, id="TAI without offset"),
        pytest.param({"size": 24}, {}, "watching", False, id="size 24"),
    ],
)
def test_the_state_follows_the_page(
    page_file: PageFile,
    daemon: Daemon,
    listener: SockListener,
    fields: dict[str, int],
    options: dict[str, Any],
    state: str,
    is_fed: bool,
) -> None:
    page_file(**fields)
    running = daemon(sock=listener.path, **options)
    status = running.wait_state(state)
    assert (status["kind"] == "signal") == (state == "watching")
    assert status["good"] == (state in ("synchronised", "holdover", "watching"))
    if is_fed:
        all_close(listener.wait(3))
    else:
        assert listener.silent(0.3) == []
        assert running.status()["samples"] == 0
        assert bool(status["reason"]) == (state != "watching")


def test_a_page_of_utc(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulate("--time-type", "utc", "--offset", "0.0002")
    daemon(sock=listener.path).wait_state("synchronised")
    for one in listener.wait(3):
        assert abs(one.offset_ns - 200_000) < 50_000


@pytest.mark.parametrize(
    ("offset", "max_error", "state"),
    [
        ("0.0005", "0.001", "synchronised"),
        ("-0.0005", "0.001", "synchronised"),
        ("0.002", "0.001", "adjusting"),
        ("-0.002", "0.001", "adjusting"),
        ("0.002", "0.01", "synchronised"),
        ("3600", "0.001", "adjusting"),
    ],
)
def test_the_offset_decides_whether_the_clock_is_good(
    simulate: Simulate, daemon: Daemon, listener: SockListener, offset: str, max_error: str, state: str
) -> None:
    """It is fed in any case: chronyd cannot take out what it is not told."""
    simulate(f"--offset={offset}")
    running = daemon(sock=listener.path, max_error=max_error)
    status = running.wait_state(state)
    assert abs(status["offset_ns"] - float(offset) * 1e9) < 100_000
    for one in listener.wait(3):
        assert abs(one.offset_ns - float(offset) * 1e9) < 100_000


def test_through_all_the_states(simulate: Simulate, daemon: Daemon, listener: SockListener, unit: int) -> None:
    """Each change is one line in the log, and seen by both sinks."""
    simulator = simulate()
    running = daemon(sock=listener.path, shm=unit)
    running.wait_state("synchronised")
    view = View(unit)
    wait_until(lambda: view.state().valid == 1, what="a valid segment")
    for line, state, is_valid in [
        ("status freerunning", "holdover", True),
        ("status unreliable", "unsynchronised", False),
        ("status synchronized", "synchronised", True),
        ("flags -time-maxerror-valid", "synchronised", True),
        ("status freerunning", "unsynchronised", False),
        ("flags +time-maxerror-valid", "holdover", True),
        ("status initializing", "unsynchronised", False),
        ("status status-77", "unsynchronised", False),
        ("status synchronized", "synchronised", True),
    ]:
        simulator.do(line)
        running.wait_state(state)
        if is_valid:
            wait_until(lambda: view.state().valid == 1, what=f"a valid segment after {line}")
            assert view.state().leap == 0
        else:
            wait_until(lambda: is_no_time(view.state()), what=f"an invalid segment after {line}")
            listener.receive()
            assert listener.silent(0.1) == []
    view.close()
    states = re.findall(r"info: (holdover|unsynchronised|synchronised|adjusting)", running.log())
    assert states == [
        "synchronised",
        "holdover",
        "unsynchronised",
        "synchronised",
        "unsynchronised",
        "holdover",
        "unsynchronised",
        "unsynchronised",
        "synchronised",
    ]
    all_close(listener.receive())


def test_nothing_is_said_twice(simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path) -> None:
    simulate("--update", "0.05")
    running = daemon(sock=[listener.path, short_path / "nobody"])
    running.wait_state("synchronised")
    listener.wait(2)
    before = running.log()
    listener.wait(15)
    assert running.log() == before
    assert before.count("No such file") == 1


def test_leap_seconds_are_announced(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulator = simulate("--leap", "pre-pos")
    daemon(sock=listener.path).wait_state("synchronised")
    assert {one.leap for one in listener.fresh(2)} == {1}
    for word, leap in (("pre-neg", 2), ("none", 0), ("post-pos", 0)):
        simulator.do(f"leap {word}")
        assert {one.leap for one in listener.fresh(3)} == {leap}


def test_a_page_without_time_tells_of_disruptions(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulator = simulate("--no-time")
    running = daemon(sock=listener.path)
    running.wait_state("watching")
    simulator.do("disrupt generation")
    status = running.wait_until(lambda status: status["disruptions"] == 1 and status["state"] == "watching")
    assert (status["disruption_marker"], status["generation"]) == (2, 2)
    assert listener.receive() == []


def test_a_disruption_parts_the_old_from_the_new(
    simulate: Simulate, daemon: Daemon, listener: SockListener, unit: int
) -> None:
    """No sample of the old calibration after one of the new, and none of the old once the page shows the marker."""
    simulator = simulate("--offset", "0.0001", "--update", "0.05")
    running = daemon(sock=listener.path, shm=unit, interval="0.005")
    running.wait_state("synchronised")
    listener.wait(5)
    for number in range(1, 11):
        offset_s = number / 10
        simulator.do(f"disrupt offset={offset_s}")
        shown_ns = time.time_ns()
        running.wait_until(lambda status, number=number: status["disruptions"] == number)
        got = listener.fresh(5)
        offsets = [one.offset_ns for one in got]
        new = [abs(offset - offset_s * 1e9) < 10_000_000 for offset in offsets]
        assert sorted(new) == new, offsets
        late = [one for one, is_new in zip(got, new, strict=True) if not is_new]
        # One that was taken before the page changed may be under way.
        assert all(one.tv_sec * 10**9 + one.tv_usec * 1000 < shown_ns + 20 * MSEC for one in late), (late, shown_ns)
    assert running.status()["state"] in ("adjusting", "disrupted")


def test_a_disruption_while_it_was_down(simulate: Simulate, daemon: Daemon) -> None:
    simulator = simulate()
    running = daemon()
    running.wait_state("synchronised")
    assert running.stop() == 0
    simulator.do("disrupt")
    running = daemon()
    running.wait_until(lambda status: status["disruptions"] == 1)
    (record,) = running.wait_history()
    assert (record["marker_before"], record["marker_after"]) == (1, 2)
    running.wait_state("synchronised")
    running.stop()
    running = daemon()
    running.wait_state("synchronised")
    assert running.status()["disruptions"] == 0
    assert [record["id"] for record in running.wait_history()] == [1]


# ---- The sinks ----------------------------------------------------------------------------------------------


def test_chronyd_comes_and_goes(simulate: Simulate, daemon: Daemon, short_path: Path) -> None:
    simulate()
    path = short_path / "chrony.sock"
    running = daemon(sock=path)
    running.wait_until(lambda status: status["sinks"][0]["dropped"] >= 2)
    assert running.status()["state"] == "synchronised", "the sink's trouble is not the clock's"
    with SockListener(path) as listening:
        all_close(listening.wait(3))
        assert running.wait_until(lambda status: status["sinks"][0]["ok"])["sinks"][0]["error"] is None
    running.wait_until(lambda status: status["sinks"][0]["error"])
    with SockListener(path) as listening:
        all_close(listening.wait(3))
    assert running.log().count("No such file") == 2
    assert running.log().count("samples arrive") == 2


def test_a_chronyd_that_hangs(simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path) -> None:
    simulate()
    with SockListener(short_path / "other") as other:
        running = daemon(sock=[listener.path, other.path], interval="0.005")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            other.wait(1)  # this one goes on, while `listener` takes nothing
        first, second = running.status()["sinks"]
        assert "does not read" in first["error"] and second["ok"] and first["dropped"] > 50
        queued = len(listener.receive())
        listener.fresh(2)
        assert queued < 100
        running.wait_until(lambda status: status["sinks"][0]["ok"])


def test_segments_from_the_first_to_the_last(simulate: Simulate, daemon: Daemon, unit: int) -> None:
    simulate("--offset", "0.0001")
    running = daemon(shm=f"{unit}:perm=0640")
    running.wait_state("synchronised")
    view = View(unit)
    wait_until(lambda: view.state().valid == 1)
    state = view.state()
    offset_ns = (state.clock_sec - state.receive_sec) * 10**9 + state.clock_nsec - state.receive_nsec
    assert abs(offset_ns - 100_000) < 20_000
    count = state.count
    wait_until(lambda: view.state().count > count + 4)
    assert (view.state().count - count) % 2 == 0
    assert running.stop() == 0
    assert is_no_time(view.state())
    view.close()


def test_a_segment_that_is_removed(simulate: Simulate, daemon: Daemon, unit: int) -> None:
    simulate()
    running = daemon(shm=unit, interval="0.005")
    running.wait_state("synchronised")
    remove(unit)
    wait_until(lambda: unit_exists(unit), what="a new segment")
    view = View(unit)
    wait_until(lambda: view.state().valid == 1)
    view.close()


def test_a_segment_of_another_size(simulate: Simulate, daemon: Daemon, listener: SockListener, unit: int) -> None:
    """Another program's: left alone, and no trouble for the other sink; once it is gone, ours is made."""
    simulate()
    view = View(unit, size=80, flags=0o1000 | 0o600)
    running = daemon(sock=listener.path, shm=unit, interval="0.01")
    running.wait_state("synchronised")
    all_close(listener.wait(3))
    good, bad = running.status()["sinks"]
    assert good["ok"] and not bad["ok"] and "ipcrm" in bad["error"]
    assert bytes(view.memory) == bytes(80)
    view.close()
    remove(unit)
    running.wait_until(lambda status: status["sinks"][1]["ok"])
    assert running.log().count("ipcrm") == 1


def test_a_socket_whose_path_is_no_utf_8(simulate: Simulate, daemon: Daemon, short_path: Path) -> None:
    simulate()
    path = os.fsdecode(os.fsencode(short_path) + b"/s\xf6ck")
    with SockListener(path) as listening:
        running = daemon(sock=path)
        all_close(listening.wait(2))
        assert os.fsencode(running.status()["sinks"][0]["name"]).endswith(b"/s\xf6ck")


def unit_exists(number: int) -> bool:
    with contextlib.suppress(AssertionError):
        View(number).close()
        return True
    return False


def test_killed_it_leaves_no_time_for_the_next(simulate: Simulate, daemon: Daemon, unit: int) -> None:
    """SIGKILL leaves the segment valid; ntpd drops it by its age. The next daemon's first act is to take it back."""
    simulator = simulate()
    running = daemon(shm=unit)
    view = View(unit)
    wait_until(lambda: view.state().valid == 1)
    running.stop(signal.SIGKILL)
    assert view.state().valid == 1
    simulator.do("status unreliable")
    running = daemon(shm=unit)
    running.wait_state("unsynchronised")
    assert is_no_time(view.state())
    view.close()


# ---- Signals, and its end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly(
    simulate: Simulate, daemon: Daemon, listener: SockListener, unit: int, number: signal.Signals
) -> None:
    simulate()
    running = daemon(sock=listener.path, shm=unit)
    running.wait_state("synchronised")
    view = View(unit)
    wait_until(lambda: view.state().valid == 1)
    began = time.monotonic()
    assert running.stop(number) == 0
    assert time.monotonic() - began < 2
    assert is_no_time(view.state())
    view.close()
    assert not running.status_path.exists()
    assert (running.state_dir / "last-seen.json").exists()
    assert f"ending on {number.name}" in running.log()
    listener.receive()
    assert listener.silent(0.2) == []


def test_it_ends_while_it_waits(daemon: Daemon) -> None:
    running = daemon()
    running.wait_state("waiting")
    assert running.stop() == 0


def test_it_ends_by_itself(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    began = time.monotonic()
    running = daemon(exit_after="0.7")
    assert running.wait(5) == 0
    assert 0.7 <= time.monotonic() - began < 3
    assert not running.status_path.exists()
    assert daemon(exit_after="0.3", device="/nonexistent", ready=False).wait(5) == 0
    assert daemon(exit_after="0", ready=False).wait(5) == 0


def test_a_second_daemon_is_refused(simulate: Simulate, daemon: Daemon, unit: int) -> None:
    """And does no harm to the first."""
    simulate()
    first = daemon(shm=unit)
    first.wait_state("synchronised")
    view = View(unit)
    wait_until(lambda: view.state().valid == 1)
    count = view.state().count
    second = daemon(shm=unit, ready=False)
    assert second.wait() == 69
    assert second.log().count("\n") == 1 and "already" in second.log()
    assert first.status()["state"] == "synchronised"
    wait_until(lambda: view.state().count > count)
    assert view.state().valid == 1
    view.close()


def test_the_socket_of_a_killed_daemon_is_taken_over(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    first = daemon()
    first.stop(signal.SIGKILL)
    assert first.status_path.exists()
    assert run("status", "--status", first.status_path).returncode == 69
    assert daemon().wait_state("synchronised")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_socket_is_not_taken_over(daemon: Daemon, short_path: Path, make: Callable[[Path], None]) -> None:
    path = short_path / "precious"
    make(path)
    before = path.lstat().st_ino
    running = daemon(status=path, ready=False)
    assert running.wait() != 0
    assert running.log().count("\n") == 1 and str(path) in running.log()
    assert path.lstat().st_ino == before


def test_the_status_sockets_place(daemon: Daemon, short_path: Path) -> None:
    path = short_path / "run" / "deep" / "status.sock"
    daemon(status=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0
    assert run("status", "--status", path).returncode == 0


# ---- SIGHUP -------------------------------------------------------------------------------------------------


def reload(running: RunningDaemon, text: str, word: str = "loaded anew") -> str:
    """Another configuration, and SIGHUP; the log that it wrote from then on."""
    before = running.log()
    running.config.write_text(text)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: word in running.log()[len(before) :], what=f"{word!r} in the log")
    return running.log()[len(before) :]


def test_other_sinks(simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path, unit: int) -> None:
    simulate()
    (short_path / "config.toml").write_text(f'sock = ["{listener.path}"]\n')
    running = daemon()
    running.wait_state("synchronised")
    listener.wait(2)
    with SockListener(short_path / "other") as other:
        reload(running, f'sock = ["{other.path}"]\nshm = [{unit}]\n')
        all_close(other.wait(2))
        listener.receive()
        assert listener.silent(0.2) == []
        assert [sink["name"] for sink in running.status()["sinks"]] == [str(other.path), str(unit)]
        view = View(unit)
        wait_until(lambda: view.state().valid == 1)
        reload(running, f'sock = ["{other.path}"]\n')
        assert is_no_time(view.state())
        view.close()
        all_close(other.fresh(2))
    reload(running, "")
    assert running.status()["sinks"] == []
    assert running.status()["state"] == "synchronised"


@pytest.mark.parametrize(
    "text", ["interval = 'x'\n", "nonsense = 1\n", "[", 'sock = [""]\n', "shm = [256]\n", f'sock = ["{"x" * 200}"]\n']
)
def test_a_bad_file_leaves_the_old_settings_in_force(
    simulate: Simulate, daemon: Daemon, listener: SockListener, text: str
) -> None:
    simulate()
    (listener.path.parent / "config.toml").write_text(f'sock = ["{listener.path}"]\n')
    running = daemon()
    running.wait_state("synchronised")
    said = reload(running, text, "not reloaded")
    assert said.count("\n") == 1 and "error: not reloaded: " in said and str(running.config) in said
    all_close(listener.fresh(3))
    assert [sink["name"] for sink in running.status()["sinks"]] == [str(listener.path)]


def test_a_file_that_is_gone_leaves_the_old_settings_in_force(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    running.config.unlink()
    running.send_signal(signal.SIGHUP)
    running.wait_for_log("not reloaded")
    assert running.wait_state("synchronised")


def test_what_can_change_does(simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path) -> None:
    simulate()
    (short_path / "config.toml").write_text("interval = 1\n")
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    listener.receive()
    assert len(listener.silent(0.3)) <= 1
    samples = short_path / "samples.csv"
    reload(running, f'interval = 0.01\nlog-samples = "{samples}"\n')
    assert len(listener.wait(20, timeout_s=3)) >= 20
    wait_until(lambda: samples.exists() and samples.read_text().count("\n") > 5)
    rotated = samples.rename(short_path / "samples.1")
    reload(running, f'interval = 0.01\nlog-samples = "{samples}"\n')
    wait_until(lambda: samples.exists() and samples.read_text().count("\n") > 5)
    size = rotated.stat().st_size
    listener.fresh(3)
    assert rotated.stat().st_size == size
    header = samples.read_text().splitlines()[0]
    assert header == rotated.read_text().splitlines()[0] and header.startswith("system_ns,reference_ns,")


def test_what_cannot_change_is_said(simulate: Simulate, daemon: Daemon, short_path: Path) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    said = reload(running, 'max-error = 1e-9\njournal = "/nonexistent/j"\nexit-after = 0\n')
    assert "only after a restart: " in said
    for name in ("max-error", "journal", "exit-after"):
        assert name in said, said
    assert running.status()["state"] == "synchronised" and running.running


def test_the_log_level(simulate: Simulate, daemon: Daemon, short_path: Path) -> None:
    simulator = simulate()
    (short_path / "config.toml").write_text("")
    running = daemon(log_level="error")
    running.wait_state("synchronised")
    simulator.do("disrupt")
    running.wait_until(lambda status: status["disruptions"] == 1)
    running.wait_state("synchronised")
    assert running.log() == ""


def test_sigusr1_is_a_drill(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    running.send_signal(signal.SIGUSR1)
    running.wait_until(lambda status: status["last_disruption"] and status["state"] == "synchronised")
    (record,) = running.wait_history()
    assert record["kind"] == "drill" and record["recovered_after_ns"] > 0


def test_many_signals_at_once(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    running = daemon(log_level="info")
    running.wait_state("synchronised")
    for _ in range(50):
        running.send_signal(signal.SIGHUP)
        running.send_signal(signal.SIGUSR1)
    running.wait_until(lambda status: status["state"] == "synchronised" and status["last_disruption"])
    assert running.stop() == 0


# ---- Its files, and those who ask ---------------------------------------------------------------------------


def test_files_that_cannot_be_written(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    """The clock comes first: each is said once, and it goes on."""
    simulator = simulate()
    nowhere = "/proc/nonexistent"
    running = daemon(
        sock=listener.path,
        state_dir=nowhere,
        journal=f"{nowhere}/j",
        metrics=f"{nowhere}/m",
        log_samples=f"{nowhere}/s",
    )
    running.wait_state("synchronised")
    for number in range(1, 4):
        simulator.do("disrupt")
        running.wait_until(lambda status, number=number: status["disruptions"] == number)
        running.wait_state("synchronised")
    all_close(listener.fresh(2))
    assert len(running.wait_history(3)) == 3
    for name in ("journal", "state", "samples"):
        assert len(re.findall(rf"warning: .*{name}.*{nowhere}", running.log())) == 1, running.log()


def test_questions_that_make_no_sense(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    for question in ("", "bogus", "status extra", "__class__", "\0", "é", "x" * 200):
        assert set(running.ask(question)) == {"refused"}, question
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(running.status_path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * 100_000)
            assert connection.recv(10) == b"", "it is let go"
    assert running.status()["state"] == "synchronised"


def test_several_questions_on_one_connection(simulate: Simulate, daemon: Daemon) -> None:
    simulate()
    running = daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(running.status_path))
        for part in (b"sta", b"tus\nhis", b"tory\nstatus\n"):
            connection.sendall(part)
        with connection.makefile("rb") as lines:
            assert b'"state"' in lines.readline()
            assert lines.readline() == b"[]\n"
            assert b'"state"' in lines.readline()


def connections(path: Path, count: int) -> Iterator[socket.socket]:
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(5)
        connection.connect(str(path))
        yield connection


def open_descriptors(running: RunningDaemon) -> int:
    """How many it has open when nobody has just come or gone."""
    counts = [len(os.listdir(f"/proc/{running.pid}/fd")) for _ in range(2)]
    while counts[-2] != counts[-1] or len(counts) < 6:
        time.sleep(0.02)
        counts.append(len(os.listdir(f"/proc/{running.pid}/fd")))
    return counts[-1]


def test_more_visitors_than_it_takes(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulate()
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    descriptors = open_descriptors(running)
    visitors = list(connections(running.status_path, 32))
    wait_until(lambda: open_descriptors(running) == descriptors + 32, what="32 visitors")
    (last,) = connections(running.status_path, 1)
    assert last.recv(10) == b"", "one too many is let go"
    all_close(listener.fresh(3))
    for visitor in [*visitors, last]:
        visitor.close()
    wait_until(lambda: open_descriptors(running) == descriptors, what="their end")
    assert running.status()["state"] == "synchronised"


def test_a_visitor_that_does_not_read(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    """It holds up nobody, and costs no more than a megabyte or so."""
    simulate()
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    before = running.rss_kib()
    with next(connections(running.status_path, 1)) as visitor:
        visitor.setblocking(False)
        for _ in range(20_000):
            try:
                visitor.send(b"status\n" * 8)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                break
        all_close(listener.fresh(5))
        assert running.status()["state"] == "synchronised"
        assert running.rss_kib() - before < 8192


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_visitor_that_half_hangs_up(simulate: Simulate, daemon: Daemon, how: int) -> None:
    """With more to be told than it takes: that must not keep the daemon busy."""
    simulate()
    running = daemon(log_level="info")
    running.wait_state("synchronised")
    with next(connections(running.status_path, 1)) as visitor:
        visitor.settimeout(1)
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            for _ in range(30):
                visitor.send(b"status\n" * 30)
        with contextlib.suppress(OSError):
            visitor.shutdown(how)
        running.status()
        began, busy = time.monotonic(), cpu_ns(running.pid)
        time.sleep(1)
        assert (cpu_ns(running.pid) - busy) / 1e9 / (time.monotonic() - began) < 0.1
        assert running.status()["state"] == "synchronised"


def test_those_who_ask_do_not_change_the_pace(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    """However often the daemon is asked, it samples as it was told."""
    simulate("--update", "1000")
    running = daemon(sock=listener.path, interval="0.1")
    running.wait_state("synchronised")
    listener.receive()
    count = 0
    began = time.monotonic()
    while time.monotonic() - began < 1:
        running.status()
        count += len(listener.receive())
    assert 5 <= count <= 12, count
    listener.wait(3, timeout_s=0.6)


def test_watching(simulate: Simulate, daemon: Daemon) -> None:
    """A line at once, and one for each change."""
    simulator = simulate()
    running = daemon()
    running.wait_state("synchronised")
    with next(connections(running.status_path, 1)) as connection, connection.makefile("rb") as lines:
        connection.sendall(b"watch\n")
        assert b'"state":"synchronised"' in lines.readline()
        for word, state in (("unreliable", b"unsynchronised"), ("freerunning", b"holdover")):
            simulator.do(f"status {word}")
            assert b'"state":"' + state + b'"' in lines.readline()
        running.stop()
        assert lines.readline() == b""


# ---- What it costs ------------------------------------------------------------------------------------------


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_a_hundred_thousand_samples_cost_no_memory(simulate: Simulate, listener: SockListener) -> None:
    """The page, the judgement and the sink in one process: after a warm-up its memory stands still."""
    policy = Policy(max_error_ns=MSEC, has_chronyd=False)
    sink = Sock(str(listener.path), lambda *_: None)
    with Page(simulate("--update", "0.01").path) as page:

        def take(count: int) -> None:
            for _ in range(count):
                sample = page.sample(readings=2)
                for verb, subject in policy.look(time.monotonic_ns(), time.time_ns(), Look(page.snapshot, sample)):
                    if verb == "feed":
                        sink.put(subject)  # type: ignore[arg-type]
                listener.receive()
                listener.raw.clear()

        take(5_000)
        before = resident_kib()
        take(100_000)
        grown = resident_kib() - before
    print(f"grown by {grown} KiB over 100000 samples, {sink.sent} sent")
    assert sink.sent > 90_000
    assert grown < 512


def cpu_ns(pid: int) -> int:
    """The time that it has spent on a CPU."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def test_an_idle_daemon_is_small_and_quiet(
    simulate: Simulate, daemon: Daemon, listener: SockListener, short_path: Path, unit: int
) -> None:
    simulate()
    running = daemon(
        sock=[listener.path, short_path / "nobody"],
        shm=unit,
        metrics=short_path / "metrics",
        log_samples=short_path / "samples",
        chronyd=short_path / "no-chronyd",
        log_level="info",
    )
    running.wait_state("synchronised")
    listener.wait(10)
    began, busy = time.monotonic(), cpu_ns(running.pid)
    listener.wait(30)
    share = (cpu_ns(running.pid) - busy) / 1e9 / (time.monotonic() - began)
    rss = running.rss_kib()
    print(f"idle daemon: {rss} KiB resident, {share:.2%} of a CPU")
    assert rss <= 16 * 1024
    assert share < 0.05


def test_a_daemon_that_waits_is_quiet(daemon: Daemon) -> None:
    running = daemon(chronyd="/nonexistent/chronyd.sock")
    running.wait_state("waiting")
    began, busy = time.monotonic(), cpu_ns(running.pid)
    time.sleep(1)
    share = (cpu_ns(running.pid) - busy) / 1e9 / (time.monotonic() - began)
    print(f"waiting daemon: {share:.2%} of a CPU")
    assert share < 0.03


def test_a_fast_daemon_does_not_grow(simulate: Simulate, daemon: Daemon, listener: SockListener) -> None:
    simulate("--update", "0.005")
    running = daemon(sock=listener.path, interval="0.001", watch="0.001", log_level="info")
    running.wait_state("synchronised")
    listener.wait(300)
    before = running.rss_kib()
    listener.wait(1500)
    assert running.rss_kib() - before < 256
