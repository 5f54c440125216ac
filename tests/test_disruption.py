"""Disruptions of the real daemon: a simulated page, real chronyds (-x), and a listener that forgets nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refclock.model import SYNCHRONIZED, UNKNOWN
from refclock.simulator import Simulation
from tests import consumers
from tests.bench_reaction import describe, reactions, stage
from tests.consumers import feeders
from tests.consumers.chronyd import Chronyd
from tests.harness import (
    ROOT,
    SOCK_LAYOUT,
    Datagram,
    RunningDaemon,
    Simulator,
    SockListener,
    command,
    environment,
    run,
    wait_until,
)

SEC = 1_000_000_000
MSEC = 1_000_000
USEC = 1_000

Start = Callable[..., Any]


@pytest.fixture
def chronyd() -> Iterator[Chronyd]:
    """A chronyd with a SOCK at poll -4."""
    with Chronyd(consumers.build("chronyd")) as running:
        yield running


def last(daemon: RunningDaemon) -> dict[str, Any]:
    record: dict[str, Any] = daemon.status()["last_disruption"]
    return record


def closed(daemon: RunningDaemon, count: int = 1, timeout_s: float = 15.0) -> dict[str, Any]:
    """Waits until so many disruptions were seen and the last is over; its record."""
    status = daemon.wait_until(
        lambda status: (
            sum(status["disruptions_by_kind"][kind] for kind in ("disruption", "drill")) >= count
            and status["last_disruption"]["recovered_after_ns"] is not None
        ),
        timeout_s,
    )
    record: dict[str, Any] = status["last_disruption"]
    return record


def journal(daemon: RunningDaemon) -> list[dict[str, Any]]:
    """Every line of the journal."""
    return [json.loads(line) for line in (daemon.state_dir / "journal.jsonl").read_text().splitlines()]


def actions(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [action for action in record["actions"] if action["name"] == name]


def names(record: dict[str, Any]) -> list[str]:
    return [action["name"] for action in record["actions"]]


# ---- How fast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("watch", "median_ms", "p90_ms"), [("0.01", 9.0, 25.0), ("0.0005", 3.0, 20.0)])
def test_from_the_marker_to_leap_3(short_path: Path, watch: str, median_ms: float, p90_ms: float) -> None:
    """Margins for a machine that does other things too; tests/bench_reaction.py is for figures."""
    with stage(short_path, consumers.build("chronyd"), watch=watch) as on:
        unsynchronised, normal = reactions(on, 40)
    print(describe(f"--watch {watch}: marker to leap 3", unsynchronised))
    print(describe(f"--watch {watch}: marker to leap 0 again", normal))
    assert statistics.median(unsynchronised) <= median_ms
    assert statistics.quantiles(unsynchronised, n=10)[-1] <= p90_ms


@pytest.mark.parametrize("suite", consumers.SUITES["chronyd"])
@pytest.mark.parametrize(("poll", "count", "limit_ms"), [(-4, 8, 400.0), (0, 2, 4000.0)])
def test_from_the_marker_to_normal_again(short_path: Path, suite: str, poll: int, count: int, limit_ms: float) -> None:
    """And the record is closed within a poll of that; the samples of the new calibration are believed."""
    with stage(short_path, consumers.build("chronyd", suite), poll) as on:
        unsynchronised, normal = [], []
        for number in range(count):
            offset_s = (number + 1) * 50e-6
            begun_ns = on.disrupt(offset_s, 30.0)
            unsynchronised.append((on.wait_leap(False) - begun_ns) / MSEC)
            normal.append((on.wait_leap(True) - begun_ns) / MSEC)
            record = closed(on.daemon, number + 1)
            closed_ms = record["recovered_after_ns"] / MSEC
            assert abs(closed_ms - normal[-1]) < 2.0**poll * 1000 + 50, "within one poll of its being true"
            assert record["offset_ns"] == pytest.approx(offset_s * SEC, abs=20 * USEC)
            assert names(record).count("reset-sources") == 2 and all(
                action["ok"] for action in actions(record, "dfreq")
            )
            # The page has drifted on since, by 30 us a second.
            true_s = on.daemon.status()["offset_ns"] / SEC
            assert on.chronyd.tracking().system_offset_s == pytest.approx(true_s, abs=100e-6)
    print(describe(f"{on.chronyd.build}, poll {poll}: marker to leap 3", unsynchronised))
    print(describe(f"{on.chronyd.build}, poll {poll}: marker to leap 0 again", normal))
    assert statistics.median(normal) <= limit_ms and max(normal) <= 1.5 * limit_ms


def test_the_new_frequency_reaches_chronyd_at_once(short_path: Path) -> None:
    with stage(short_path, consumers.build("chronyd")) as on:
        on.simulation.disrupt(100e-6, 0.0)
        closed(on.daemon)
        wait_until(lambda: abs(on.chronyd.tracking().frequency_ppm) < 5, what="frequency near zero")
        on.simulation.disrupt(100e-6, 80.0)
        record = closed(on.daemon, 2)
        assert record["frequency_ppm"] == pytest.approx(80, abs=1)
        # chronyd says how fast the clock is: minus how fast the reference gains on it.
        assert on.chronyd.tracking().frequency_ppm == pytest.approx(-80, abs=5)


# ---- A real chronyd and a real simulator, one disruption ---------------------------------------------------------


def test_a_disruption_as_users_see_it(short_path: Path, simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator: Simulator = simulate("--offset", "0.0001")
    running: RunningDaemon = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("disrupt offset=0.0002 frequency=20 generation")
    record = closed(running)
    assert (record["kind"], record["marker_before"], record["marker_after"]) == ("disruption", 1, 2)
    assert (record["generation_before"], record["generation_after"]) == (1, 2)
    assert record["offset_ns"] == pytest.approx(200 * USEC, abs=10 * USEC)
    assert record["frequency_ppm"] == pytest.approx(20, abs=1)
    assert names(record) == ["invalidate", "step", "reset-sources", "dfreq", "reset-sources"]
    assert [action["ok"] for action in record["actions"]] == [True, False, True, True, True]
    assert "simulation" in actions(record, "step")[0]["detail"]
    after_ns = [action["after_ns"] for action in record["actions"]]
    assert after_ns == sorted(after_ns) and after_ns[-1] < record["recovered_after_ns"]
    assert abs(record["detected_at_ns"] - time.time_ns()) < 20 * SEC
    lines = journal(running)
    assert len(lines) == 2 and lines[1] == record and lines[0]["recovered_after_ns"] is None
    assert lines[0]["id"] == record["id"] and running.history() == [record]
    assert running.status()["disruptions"] == 1
    shown = run("history", "--json", "--journal", running.state_dir / "journal.jsonl")
    assert json.loads(shown.stdout) == record
    assert chronyd.tracking().leap_status == "Normal"


def test_flagging_only(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket, on_disruption="flag")
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("disrupt offset=0.0002 frequency=20")
    record = closed(running)
    assert (
        names(record) == ["invalidate", "step", "reset-sources"]
        and "only flagged" in actions(record, "step")[0]["detail"]
    )
    assert record["frequency_ppm"] is None


def test_the_generation_alone(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("generation")
    status = running.wait_until(lambda status: status["generation"] == 2)
    wait_until(lambda: journal(running))
    [record] = journal(running)
    assert (record["kind"], record["recovered_after_ns"], record["actions"]) == ("generation", 0, [])
    assert status["disruptions"] == 0 and status["state"] == "synchronised" and status["last_disruption"] is None
    assert chronyd.ntp().leap == 0


def test_a_second_marker_while_recovering(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("disrupt offset=0.0002")
    running.wait_until(lambda status: status["disruptions"] == 1)
    simulator.do("disrupt offset=0.0003")
    record = closed(running, 2)
    assert record["id"] == 2 and record["marker_before"] == 2
    by_id = {line["id"]: line for line in journal(running)}
    assert by_id[1]["recovered_after_ns"] is None and by_id[1]["superseded_by"] == 2
    assert "superseded_by" not in by_id[2]
    running.wait_for_log("disruption 1 is superseded by 2")


def test_a_new_host_that_publishes_late(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("status unknown")
    running.wait_state("unsynchronised")
    simulator.do("disrupt offset=0.0003")
    running.wait_state("disrupted")
    assert chronyd.wait_leap({3}, 2.0)
    samples = running.status()["samples"]
    time.sleep(0.5)
    status = running.status()
    assert status["samples"] == samples and status["state"] == "disrupted" and status["offset_ns"] is None
    assert names(status["last_disruption"]) == ["invalidate", "reset-sources"]
    simulator.do("status synchronized")
    record = closed(running)
    assert record["offset_ns"] == pytest.approx(300 * USEC, abs=20 * USEC)
    assert names(record).count("reset-sources") == 2
    # It is asked often again once there is something to follow.
    assert record["recovered_after_ns"] < 2 * SEC


def test_shared_memory_is_not_in_sync_at_once(short_path: Path, daemon: Start) -> None:
    """And stays so until the new host has published: what ntpd reads from it is never of before."""
    simulation = Simulation(str(short_path / "page"))
    unit = feeders.free_unit()
    try:
        running: RunningDaemon = daemon(shm=unit)
        running.wait_state("synchronised")
        segment = feeders.Segment(unit)
        wait_until(lambda: segment.valid, what="a sample in the segment")
        simulation.fields["clock_status"] = UNKNOWN
        simulation.disrupt(0.0003)
        running.wait_state("disrupted")
        assert segment.valid == 0 and leap_of(segment) == 3
        time.sleep(0.3)
        assert segment.valid == 0 and leap_of(segment) == 3
        simulation.fields["clock_status"] = SYNCHRONIZED
        simulation.publish()
        closed(running)
        assert segment.valid == 1 and leap_of(segment) == 0
        assert offset_of(segment) == pytest.approx(300 * USEC, abs=20 * USEC)
        running.stop()
        assert segment.valid == 0 and leap_of(segment) == 3
        segment.close()
    finally:
        feeders.remove_segment(unit)


def leap_of(segment: feeders.Segment) -> int:
    return int(struct.unpack_from("i", segment.memory, 36)[0])


def offset_of(segment: feeders.Segment) -> int:
    """Reference - system in the segment, in nanoseconds."""
    (clock_s,), (receive_s,) = struct.unpack_from("q", segment.memory, 8), struct.unpack_from("q", segment.memory, 24)
    clock_ns, receive_ns = struct.unpack_from("II", segment.memory, 52)
    return int((clock_s - receive_s) * SEC + clock_ns - receive_ns)


# ---- Pages without time ----------------------------------------------------------------------------------------


def test_a_page_without_time(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    """chronyd has another source, which a feeder of ours plays; its recovery closes the record."""
    simulator = simulate("--no-time")
    running = daemon(chronyd=chronyd.command_socket)
    running.wait_state("watching")
    waiting = run("wait", "--status", running.status_path, "--timeout", "0.3")
    assert waiting.returncode == 1 and "watching" in waiting.stderr, "chronyd is not Normal yet"
    with feeders.feeding_sock(chronyd.sock_path, 0.0001, 0.02):
        chronyd.wait_normal()
        assert run("wait", "--status", running.status_path, "--timeout", "5").returncode == 0
        simulator.do("disrupt")
        record = closed(running)
    assert names(record)[:2] == ["invalidate", "reset-sources"] and record["offset_ns"] is None
    assert not actions(record, "burst")[0]["ok"] and "no such source" in actions(record, "burst")[0]["detail"]
    assert not actions(record, "makestep")[0]["ok"], "-x"
    assert running.wait_state("watching")["disruptions"] == 1
    assert record["recovered_after_ns"] < 2 * SEC


def test_a_page_without_time_and_nobody_to_ask(short_path: Path, simulate: Start, daemon: Start) -> None:
    simulator = simulate("--no-time")
    running = daemon(chronyd=short_path / "nobody.sock")
    running.wait_state("watching")
    assert run("wait", "--status", running.status_path, "--timeout", "0.3").returncode == 1
    simulator.do("disrupt")
    running.wait_state("disrupted")
    time.sleep(0.5)
    assert running.status()["state"] == "disrupted", "nobody has said that the clock is good"
    assert "not there" in actions(last(running), "burst")[0]["detail"]


def test_a_fallback_that_is_none(short_path: Path, simulate: Start, daemon: Start) -> None:
    simulate("--no-time")
    running = daemon(fallback="/dev/null")
    running.wait_state("watching")
    assert "the fallback /dev/null is no PTP clock" in running.log()
    missing = daemon(fallback="/dev/ptp-is-not-there", status=short_path / "other.sock", state_dir=short_path / "other")
    missing.wait_state("watching")
    assert "cannot open the fallback /dev/ptp-is-not-there" in missing.log()


# ---- A chronyd that does not play along --------------------------------------------------------------------------


def recovered(running: RunningDaemon, simulator: Simulator, listener: SockListener) -> dict[str, Any]:
    """A disruption that chronyd has no part in, and yet what is fed afterwards is right; its record."""
    running.wait_state("synchronised")
    simulator.do("disrupt offset=0.0004")
    wait_until(lambda: "disrupted" in running.log(), what="disruption in the log")
    assert [datagram.offset_ns for datagram in listener.fresh(3)] == [pytest.approx(400 * USEC, abs=20 * USEC)] * 3
    record = closed(running, timeout_s=20)
    assert record["offset_ns"] == pytest.approx(400 * USEC, abs=20 * USEC)
    assert names(record)[0] == "invalidate" and "step" in names(record) and "dfreq" in names(record)
    [*_, line] = journal(running)
    assert line == record, "what is in the journal is the whole story"
    return record


def reset_details(record: dict[str, Any]) -> set[str]:
    resets = actions(record, "reset-sources")
    assert len(resets) == 2 and not any(action["ok"] for action in resets)
    return {action["detail"].split(";")[0] for action in resets}


def test_no_chronyd(simulate: Start, daemon: Start, listener: SockListener) -> None:
    simulator = simulate()
    record = recovered(daemon(sock=listener.path), simulator, listener)
    assert reset_details(record) == {"no chronyd is configured"}
    assert record["recovered_after_ns"] < SEC and "simulation" in actions(record, "flag")[0]["detail"]


def test_chronyd_is_absent(short_path: Path, simulate: Start, daemon: Start, listener: SockListener) -> None:
    simulator = simulate()
    path = short_path / "not-there.sock"
    record = recovered(daemon(sock=listener.path, chronyd=path), simulator, listener)
    assert reset_details(record) == {f"chronyd's socket {path} is not there"}
    assert record["recovered_after_ns"] < SEC


def test_chronyd_is_elsewhere(short_path: Path, simulate: Start, daemon: Start, listener: SockListener) -> None:
    simulator = simulate()
    (short_path / "file").touch()
    record = recovered(daemon(sock=listener.path, chronyd=short_path / "file"), simulator, listener)
    assert reset_details(record) == {f"{short_path / 'file'} is not chronyd's socket"}
    assert record["recovered_after_ns"] < SEC


def test_chronyd_was_killed(simulate: Start, daemon: Start, chronyd: Chronyd, listener: SockListener) -> None:
    simulator = simulate()
    running = daemon(sock=[listener.path, chronyd.sock_path], chronyd=chronyd.command_socket)
    chronyd.wait_normal()
    chronyd.kill()
    record = recovered(running, simulator, listener)
    assert reset_details(record) == {f"chronyd is gone from {chronyd.command_socket}"}
    # And it is there again.
    chronyd.start()
    chronyd.wait_normal()
    simulator.do("disrupt offset=0.0001")
    record = closed(running, 2)
    assert all(action["ok"] for action in actions(record, "reset-sources"))


def test_chronyd_is_stopped(simulate: Start, daemon: Start, chronyd: Chronyd, listener: SockListener) -> None:
    simulator = simulate()
    running = daemon(sock=[listener.path, chronyd.sock_path], chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    chronyd.pause()
    try:
        begun = time.monotonic()
        simulator.do("disrupt offset=0.0004 frequency=2")
        running.wait_state("disrupted")
        assert [datagram.offset_ns for datagram in listener.fresh(3)] == [pytest.approx(400 * USEC, abs=20 * USEC)] * 3
        assert time.monotonic() - begun < 1.0, "it is not waited for"
        record = closed(running, timeout_s=20)
        [told] = actions(record, "dfreq")
        assert not told["ok"] and "not known whether it was applied" in told["detail"]
        assert all("no answer" in action["detail"] for action in actions(record, "reset-sources"))
        assert "simulation" in actions(record, "flag")[0]["detail"], "it did not tell the kernel: we try"
        running.wait_for_log("chronyd: no answer")
    finally:
        chronyd.resume()
    # What lay in its queues does it no harm: it follows the new calibration.
    wait_until(lambda: chronyd.tracking().system_offset_s == pytest.approx(400e-6, abs=50e-6), what="the new offset")
    simulator.do("disrupt offset=0.0001")
    assert all(action["ok"] for action in actions(closed(running, 2), "reset-sources"))


def test_chronyd_was_stopped_for_long(simulate: Start, daemon: Start, chronyd: Chronyd, listener: SockListener) -> None:
    """Its queue is full, so that not even the reset can be handed over."""
    simulator = simulate()
    running = daemon(sock=[listener.path, chronyd.sock_path], chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    chronyd.pause()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as stuffing:
            for _ in range(1000):
                try:
                    stuffing.sendto(b"nothing", str(chronyd.command_socket))
                except BlockingIOError:
                    break
            else:
                pytest.fail("the queue has no end")
        simulator.do("disrupt offset=0.0004")
        record = closed(running, timeout_s=20)
        assert {detail.split(" ", 3)[1] for detail in reset_details(record)} == {"does"}, reset_details(record)
    finally:
        chronyd.resume()
    wait_until(lambda: chronyd.tracking().system_offset_s == pytest.approx(400e-6, abs=50e-6), what="the new offset")


def test_chronyd_may_not_be_spoken_to(
    short_path: Path, simulate: Start, daemon: Start, chronyd: Chronyd, nobody: tuple[str, ...]
) -> None:
    own = short_path / "nobody"
    own.mkdir()
    os.chown(own, 65534, 65534)
    simulator = simulate()
    with SockListener(short_path / "sock", mode=0o777) as listener:
        options = {"sock": listener.path, "chronyd": chronyd.command_socket, "prefix": nobody}
        running = daemon(**options, state_dir=own / "state", status=own / "status.sock")
        record = recovered(running, simulator, listener)
    assert reset_details(record) == {f"may not write to chronyd's socket {chronyd.command_socket}"}
    assert record["recovered_after_ns"] < SEC


# ---- The daemon goes, and comes back -----------------------------------------------------------------------------


def test_killed_and_restarted_across_a_marker(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    options = {"sock": chronyd.sock_path, "chronyd": chronyd.command_socket}
    first = daemon(**options)
    first.wait_state("synchronised")
    chronyd.wait_normal()
    first.stop(signal.SIGKILL)
    simulator.do("disrupt offset=0.0004")
    second = daemon(**options)
    record = closed(second)
    assert (record["kind"], record["marker_before"], record["marker_after"]) == ("disruption", 1, 2)
    assert len([action for action in actions(record, "reset-sources") if action["ok"]]) == 2
    second.stop()
    third = daemon(**options)
    third.wait_state("synchronised")
    assert third.status()["disruptions"] == 0, "nothing happened meanwhile"


def test_killed_in_the_middle_of_a_reaction(simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    """The disruption is not over: whoever comes next begins anew with it."""
    simulator = simulate()
    options = {"sock": chronyd.sock_path, "chronyd": chronyd.command_socket}
    first = daemon(**options)
    first.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("status unknown")
    simulator.do("disrupt offset=0.0004")
    first.wait_state("disrupted")
    wait_until(lambda: journal(first))
    first.stop(signal.SIGKILL)
    second = daemon(**options)
    second.wait_state("disrupted")
    simulator.do("status synchronized")
    record = closed(second)
    assert (record["id"], record["marker_before"], record["marker_after"]) == (2, 1, 2)
    by_id = {line["id"]: line for line in journal(second)}
    assert by_id[1]["superseded_by"] == 2 and by_id[1]["recovered_after_ns"] is None


def test_a_copy_while_the_daemon_was_down(simulate: Start, daemon: Start) -> None:
    simulator = simulate()
    first = daemon()
    first.wait_state("synchronised")
    assert first.stop() == 0
    simulator.do("generation")
    second = daemon()
    second.wait_state("synchronised")
    wait_until(lambda: (second.state_dir / "journal.jsonl").exists())
    assert journal(second)[0]["kind"] == "generation" and second.status()["disruptions"] == 0
    second.stop(signal.SIGKILL)
    third = daemon()
    third.wait_state("synchronised")
    assert len(journal(third)) == 1, "it is remembered at once"


# ---- Drills, announcements, and who is told ----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["signal", "command"])
def test_a_drill(simulate: Start, daemon: Start, chronyd: Chronyd, by: str) -> None:
    simulate()
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    if by == "signal":
        running.send_signal(signal.SIGUSR1)
    else:
        done = run("drill", "--status", running.status_path)
        assert done.returncode == 0 and "drill begun: disrupted" in done.stdout
    record = closed(running)
    assert record["kind"] == "drill" and record["marker_before"] == record["marker_after"] == 1
    assert len([action for action in actions(record, "reset-sources") if action["ok"]]) == 2
    assert running.status()["disruptions"] == 0
    running.wait_for_log("drill: this moment is treated as a disruption")
    running.wait_for_log("recovered from drill 1")


def test_a_drill_is_not_for_everybody(simulate: Start, daemon: Start, nobody: tuple[str, ...]) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    done = run("drill", "--status", running.status_path, prefix=nobody)
    assert done.returncode == 77 and "permission" in done.stderr and not running.history()
    assert run("status", "--status", running.status_path, prefix=nobody).returncode == 0


class Hook:
    """A hook that keeps what it got, in the order in which it was started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "told"
        self.directory.mkdir()
        path = directory / "hook"
        body = "n=$(date +%s%N)\ncat > $n.part\nmv $n.part $n.$VMCLOCK_EVENT\n"
        path.write_text(f"#!/bin/sh\ncd {self.directory}\n{body}")
        path.chmod(0o755)
        self.command = str(path)

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        files = sorted(file for file in self.directory.iterdir() if not file.name.endswith(".part"))
        return [(file.suffix[1:], json.loads(file.read_text())) for file in files]

    def wait(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        return wait_until(lambda: self.told() if len(self.told()) >= count else [], what=f"{count} hooks")


def test_hooks(short_path: Path, simulate: Start, daemon: Start, chronyd: Chronyd) -> None:
    simulator = simulate()
    hook = Hook(short_path)
    running = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket, hook=hook.command)
    running.wait_state("synchronised")
    chronyd.wait_normal()
    simulator.do("flags +disruption-soon")
    hook.wait(1)
    simulator.do("flags +disruption-imminent")
    hook.wait(2)
    simulator.do("disrupt offset=0.0002")
    record = closed(running)
    hook.wait(4)
    simulator.do("generation")
    told = hook.wait(5)
    assert [event for event, _ in told] == ["soon", "imminent", "disrupted", "recovered", "generation"]
    assert told[2][1]["id"] == 1 and told[2][1]["recovered_after_ns"] is None
    assert told[3][1] == record and told[4][1]["kind"] == "generation"
    assert told[0][1]["warning"] == "soon" and told[1][1]["warning"] == "imminent"


@pytest.mark.parametrize("body", ["sleep 30", "exec 0<&-; sleep 30", "kill -9 $$", "exit 3"])
def test_hooks_never_delay(short_path: Path, simulate: Start, daemon: Start, listener: SockListener, body: str) -> None:
    """Not the clock work, not the feeding, not each other."""
    simulator = simulate()
    bad = short_path / "bad"
    bad.write_text(f"#!/bin/sh\n{body}\n")
    bad.chmod(0o755)
    hook = Hook(short_path)
    running = daemon(sock=listener.path, hook=[str(bad), str(bad), hook.command, str(bad)])
    running.wait_state("synchronised")
    for number in range(3):
        simulator.do(f"disrupt offset=0.000{number + 1}")
        record = closed(running, number + 1)
        assert record["recovered_after_ns"] < 200 * MSEC
        assert actions(record, "dfreq")[0]["after_ns"] < 50 * MSEC
    told = {(event, record["id"]) for event, record in hook.wait(6)}
    assert told == {(event, number) for event in ("disrupted", "recovered") for number in (1, 2, 3)}
    assert len(listener.fresh(10)) >= 10
    if "sleep" not in body:
        running.wait_for_log("bad ended with status", times=18)
    for child in children(running.pid):
        os.kill(child, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_announcements_are_told_once(short_path: Path, simulate: Start, daemon: Start) -> None:
    simulator = simulate("--update", "0.02")
    hook = Hook(short_path)
    running = daemon(hook=hook.command)
    running.wait_state("synchronised")
    for change, warning in [
        ("+disruption-soon", "soon"),
        ("+disruption-imminent", "imminent"),
        ("-disruption-imminent -disruption-soon", None),
    ]:
        simulator.do(f"flags {change}")
        running.wait_until(lambda status, warning=warning: status["warning"] == warning)
        time.sleep(0.2)  # ten updates that say the same
        assert running.status()["warning"] == warning and running.status()["state"] == "synchronised"
    assert [event for event, _ in hook.wait(2)] == ["soon", "imminent"]
    log = running.log()
    assert log.count("announces a disruption") == 2 and log.count("within about a day") == 1
    assert log.count("within about an hour") == 1 and log.count("is off, or over") == 1


def test_the_service_manager(short_path: Path, simulate: Start, daemon: Start) -> None:
    address = short_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(10)
        simulator = simulate()
        hook = short_path / "hook"
        hook.write_text(f"#!/bin/sh\nenv > {short_path}/hooked.part; mv {short_path}/hooked.part {short_path}/hooked\n")
        hook.chmod(0o755)
        prefix = ("env", f"NOTIFY_SOCKET={address}", "WATCHDOG_USEC=400000")
        running = daemon(prefix=prefix, hook=str(hook))
        heard = [manager.recv(4096).decode()]
        assert heard == ["READY=1"]

        def hear_until(text: str) -> None:
            deadline = time.monotonic() + 10
            while text not in heard and time.monotonic() < deadline:
                heard.append(manager.recv(4096).decode())
            assert text in heard, heard

        hear_until("STATUS=synchronised")
        pulses = heard.count("WATCHDOG=1")
        since = time.monotonic()
        while heard.count("WATCHDOG=1") < pulses + 5:
            heard.append(manager.recv(4096).decode())
        assert 0.5 < time.monotonic() - since < 5 * 0.4, "each within half of the limit, as the manager asks"
        del heard[:]
        simulator.do("disrupt offset=0.0002")
        hear_until("STATUS=disrupted")
        hear_until("STATUS=synchronised")
        wait_until(lambda: (short_path / "hooked").exists())
        assert "NOTIFY_SOCKET" not in (short_path / "hooked").read_text()
        running.stop()
        hear_until("STOPPING=1")


def test_wait(short_path: Path, simulate: Start, daemon: Start) -> None:
    status = short_path / "status.sock"
    assert run("wait", "--status", status, "--timeout", "0.3").returncode == 69
    early = subprocess.Popen(
        command("wait", "--status", status, "--timeout", "20"), env=environment(), cwd="/", stderr=subprocess.PIPE
    )
    try:
        simulator = simulate()
        running = daemon()
        assert early.wait(20) == 0, "it waits for a daemon that is not there yet, too"
    finally:
        early.kill()
        early.communicate(timeout=10)
    simulator.do("status unreliable")
    running.wait_state("unsynchronised")
    late = run("wait", "--status", status, "--timeout", "0.5")
    assert (
        late.returncode == 1 and "not good after 0.5 s: unsynchronised" in late.stderr and late.stderr.count("\n") == 1
    )
    simulator.do("status freerunning")
    assert run("wait", "--status", status, "--timeout", "10").returncode == 0
    assert running.status()["state"] == "holdover"


def test_a_clock_set_by_another(
    short_path: Path, simulate: Start, daemon: Start, listener: SockListener, native: Callable[..., Path]
) -> None:
    """It is logged, and compared anew at once: not after the interval."""
    fifo = short_path / "set"
    os.mkfifo(fifo)
    library = native("pretend_set", "-shared", "-fPIC")
    simulate("--update", "1000")
    prefix = ("env", f"LD_PRELOAD={library}", f"PRETEND_SET={fifo}")
    running = daemon(prefix=prefix, sock=listener.path, interval="30")
    running.wait_state("synchronised")
    listener.wait()
    with open(fifo, "wb", buffering=0) as end:
        for number in (1, 2):
            samples = running.status()["samples"]
            end.write(b"set")
            running.wait_for_log("the system clock was set by another program", times=number)
            listener.wait(timeout_s=2)
            assert (
                running.wait_until(lambda status, before=samples: status["samples"] > before)["state"] == "synchronised"
            )
    assert running.status()["disruptions"] == 0


# ---- Many --------------------------------------------------------------------------------------------------------


class Recorder:
    """Listens in place of a chronyd, on a thread of its own so that nothing is lost; keeps stamp, arrival, offset."""

    def __init__(self, path: Path) -> None:
        self.got: list[tuple[int, int, int]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.1)
        self._ending = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ending:
            try:
                raw = self._socket.recv(4096)
            except TimeoutError:
                continue
            arrived_ns = time.time_ns()
            datagram = Datagram(*SOCK_LAYOUT.unpack(raw))
            self.got.append((datagram.tv_sec * SEC + datagram.tv_usec * USEC, arrived_ns, datagram.offset_ns))

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        self._socket.close()


class Storm:
    """Disruptions in a row, with what the page said at every moment; the truth that samples are held against."""

    def __init__(self, simulation: Simulation, seed: int, unknown_s: float, stall_s: float) -> None:
        self.simulation = simulation
        self.numbers = random.Random(seed)
        self.unknown_s, self.stall_s = unknown_s, stall_s
        #: When the page began to say something else, when it was done; offset (None: no time), ppm, and since when.
        self.epochs: list[tuple[int, int, float | None, float, int]] = [(0, 0, 0.0, 0.0, time.time_ns())]
        self.slowest_ns = 0

    def change(self, offset_s: float | None, ppm: float, act: Callable[[], None]) -> None:
        before_ns = time.time_ns()
        act()
        # The simulator takes the time from which it drifts while it acts.
        since_ns = self.simulation._since_ns
        self.epochs.append((before_ns, time.time_ns(), offset_s, ppm, since_ns))

    def disrupt(self, number: int) -> None:
        """The next one; each kind in its turn."""
        offset_s = ((number * 37) % 200 - 100) * 100e-6
        ppm = self.numbers.uniform(-100, 100)
        kind = number % 25
        if kind == 7:
            self.simulation.fields["clock_status"] = UNKNOWN
            self.change(None, 0.0, lambda: self.simulation.disrupt(offset_s, ppm))
            time.sleep(self.unknown_s)
            self.simulation.fields["clock_status"] = SYNCHRONIZED
            self.change(offset_s, ppm, self.simulation.publish)
        elif kind == 13:
            self.change(None, 0.0, self.simulation.begin_stall)
            time.sleep(self.stall_s)
            self.change(offset_s, ppm, lambda: self.simulation.disrupt(offset_s, ppm))
        else:
            self.change(offset_s, ppm, lambda: self.simulation.disrupt(offset_s, ppm, generation=kind == 3))

    def check(self, got: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Holds every sample against what the page said when it was taken; how many, and the worst error in ns."""
        worst_ns, index = 0, 0
        for stamp_ns, arrived_ns, offset_ns in got:
            while index + 1 < len(self.epochs) and self.epochs[index + 1][0] <= stamp_ns:
                index += 1
            self.slowest_ns = max(self.slowest_ns, arrived_ns - stamp_ns)
            _, done_ns, offset_s, ppm, since_ns = self.epochs[index]
            # The stamp is cut to microseconds, and one that was taken while the page changed may be of either.
            if stamp_ns <= done_ns + USEC or (
                index + 1 < len(self.epochs) and stamp_ns + USEC >= self.epochs[index + 1][0]
            ):
                continue
            assert offset_s is not None, f"fed from a page without time, {(stamp_ns - done_ns) / MSEC} ms after"
            true_ns = offset_s * SEC + ppm * 1e-6 * (stamp_ns - since_ns)
            since_ms = (stamp_ns - done_ns) / MSEC
            assert abs(offset_ns - true_ns) < 50 * USEC, (
                f"epoch {index}, {since_ms:.3f} ms after it began: fed {offset_ns}, true {true_ns:.0f}"
            )
            worst_ns = max(worst_ns, round(abs(offset_ns - true_ns)))
        return len(got), worst_ns


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def storm(
    directory: Path, daemon: Start, chronyd: Chronyd, count: int, *, unknown_s: float, stall_s: float, growth_kib: int
) -> None:
    simulation = Simulation(str(directory / "page"))
    told = Storm(simulation, seed=count, unknown_s=unknown_s, stall_s=stall_s)
    recorder = Recorder(directory / "sock")
    try:
        running: RunningDaemon = daemon(
            sock=[directory / "sock", chronyd.sock_path],
            chronyd=chronyd.command_socket,
            max_error="1",
            hook="/bin/true",
            log_level="notice",
        )
        running.wait_state("synchronised")
        chronyd.wait_normal()
        # The first few bring in what is imported and allocated once.
        for number in range(5):
            told.disrupt(number)
            closed(running, number + 1)
        before = descriptors(running.pid), running.rss_kib()
        for number in range(5, count):
            told.disrupt(number)
            if told.numbers.random() < 0.3:
                marker = simulation.fields["disruption_marker"]
                running.wait_until(
                    lambda status, marker=marker: (
                        (status["state"], status["disruption_marker"]) == ("synchronised", marker)
                    )
                )
            else:
                time.sleep(told.numbers.uniform(0.001, 0.1))
        running.wait_state("synchronised", timeout_s=20)
        time.sleep(0.2)
        status = running.status()
        after = descriptors(running.pid), running.rss_kib()
    finally:
        recorder.close()
    samples, worst_ns = told.check(recorder.got)
    records = {line["id"]: line for line in journal(running)}
    print(f"{count} disruptions: {samples} samples, the worst {worst_ns} ns off; {len(records)} records;")
    print(f"the slowest sample {told.slowest_ns / MSEC:.1f} ms on its way;")
    print(f"descriptors {before[0]} -> {after[0]}; RSS {before[1]} -> {after[1]} KiB")
    assert samples > 3 * count
    # Every record is closed, or explained by the one after it; no marker is missing.
    seen = [record for record in records.values() if record["kind"] == "disruption"]
    assert [record["id"] for record in seen] == sorted(record["id"] for record in seen)
    marker = 1
    for record, following in zip(seen, [*seen[1:], None], strict=True):
        assert record["marker_before"] == marker
        marker = record["marker_after"]
        if record["recovered_after_ns"] is None:
            assert following is not None and record["superseded_by"] == following["id"]
        else:
            assert "superseded_by" not in record
            assert len([action for action in actions(record, "reset-sources") if action["ok"]]) == 2, record
    assert marker == count + 1 == status["disruption_marker"]
    assert status["disruptions"] == len(seen)
    assert status["disruptions_by_kind"]["generation"] == 0, "with a marker it is one record"
    # Two that came within one look at the page are one record.
    assert len(seen) > 0.8 * count
    assert after[0] <= before[0] + 2
    assert after[1] - before[1] < growth_kib


def test_sixty_in_a_row(short_path: Path, daemon: Start, chronyd: Chronyd) -> None:
    storm(short_path, daemon, chronyd, 60, unknown_s=0.4, stall_s=0.25, growth_kib=1500)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_in_a_row(short_path: Path, daemon: Start, chronyd: Chronyd) -> None:
    storm(short_path, daemon, chronyd, 1000, unknown_s=2.0, stall_s=0.5, growth_kib=4000)


# ---- Would these tests notice? -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mutations_are_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutate"], cwd=ROOT, capture_output=True, text=True, timeout=1750, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
