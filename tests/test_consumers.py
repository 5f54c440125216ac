"""The daemon and real consumers: what they believe of a page whose time is 5 ms ahead of the system clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.consumers import SUITES, build, feeders, shmmon
from tests.consumers.chronyd import Chronyd
from tests.consumers.ntpdrs import NtpdRs
from tests.consumers.ntpsec import Ntpd
from tests.harness import RunningDaemon, Simulator, wait_until

OFFSET_S = 0.005
NEAR_S = 0.0005

Simulate = Callable[..., Simulator]
StartDaemon = Callable[..., RunningDaemon]

pytestmark = pytest.mark.timeout(90)


def near(value_s: float) -> object:
    return pytest.approx(value_s, abs=NEAR_S)


def samples(daemon: RunningDaemon) -> int:
    return int(daemon.status()["sinks"][0]["sent"])


@pytest.mark.parametrize("offset_s", [OFFSET_S, -OFFSET_S])
@pytest.mark.parametrize("suite", SUITES["chronyd"])
def test_chronyd_follows_by_sock(suite: str, offset_s: float, simulate: Simulate, daemon: StartDaemon) -> None:
    simulate("--offset", str(offset_s))
    with Chronyd(build("chronyd", suite)) as chronyd:
        fed = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
        tracking = chronyd.wait_normal()
        assert (tracking.name, tracking.stratum, tracking.leap_status) == ("VMCK", 1, "Normal")
        assert chronyd.believed_offset_s() == near(offset_s)
        answer, scapy_answer = chronyd.ntp(), chronyd.ntp_scapy()
        assert (answer.leap, answer.stratum, answer.refid_text) == (0, 1, "VMCK")
        assert (scapy_answer.leap, scapy_answer.stratum) == (0, 1)
        # It is the virtual clock of `chronyd -x` that is corrected, so its answers are ahead of ours.
        assert best_offset_s(chronyd) == near(offset_s)
        status = fed.status()
        assert status["chronyd"]["ok"] and status["sinks"][0]["ok"]
        assert status["offset_ns"] == pytest.approx(offset_s * 1e9, abs=1e5)


def best_offset_s(chronyd: Chronyd) -> float:
    """What an NTP client makes of the answers: of several exchanges the one with the shortest way."""
    replies = [chronyd.ntp() for _ in range(8)]
    return min(replies, key=lambda reply: reply.received_ns - reply.sent_ns).offset_ns / 1e9


def test_what_chronyd_makes_of_the_noise(simulate: Simulate, daemon: StartDaemon) -> None:
    """20 ns on an idle machine; one that runs other tests beside gets more room."""
    simulate("--offset", str(OFFSET_S))
    with Chronyd(build("chronyd", "trixie")) as chronyd:
        daemon(sock=chronyd.sock_path)
        chronyd.wait_normal()
        stats = wait_until(
            lambda: (found := chronyd.sourcestats()["VMCK"]).samples >= 16 and found, 20, "16 samples in chronyd"
        )
        print(f"chronyd's standard deviation: {stats.std_dev_s * 1e9:.0f} ns of {stats.samples} samples")
        assert stats.std_dev_s < 1e-6


@pytest.mark.parametrize("suite", SUITES["chronyd"])
def test_chronyd_killed_and_restarted_is_fed_again(suite: str, simulate: Simulate, daemon: StartDaemon) -> None:
    simulate()
    with Chronyd(build("chronyd", suite)) as chronyd:
        fed = daemon(sock=chronyd.sock_path)
        chronyd.wait_normal()
        chronyd.kill()
        fed.wait_until(lambda status: status["sinks"][0]["error"])
        assert fed.running
        chronyd.start()
        before = samples(fed)
        fed.wait_until(lambda status: status["sinks"][0]["sent"] >= before + 2)
        chronyd.wait_normal()
        log = fed.log()
        assert log.count("samples arrive") == 2, log


def test_the_daemon_before_chronyd(simulate: Simulate, daemon: StartDaemon) -> None:
    simulate()
    chronyd = Chronyd(build("chronyd", "trixie"))
    fed = daemon(sock=chronyd.sock_path, chronyd=chronyd.command_socket)
    fed.wait_until(lambda status: "chronyd has not made the socket" in (status["sinks"][0]["error"] or ""))
    with chronyd:
        fed.wait_until(lambda status: status["sinks"][0]["ok"])
        chronyd.wait_normal()
        fed.wait_until(lambda status: status["chronyd"]["ok"])


def test_chronyd_follows_by_shared_memory(simulate: Simulate, daemon: StartDaemon, short_path: Path) -> None:
    simulate("--offset", str(OFFSET_S))
    unit = feeders.free_unit()
    daemon(shm=f"{unit}:perm=0600")
    line = f"refclock SHM {unit}:perm=0600 refid VMCK poll -4 filter 1 precision 1e-9 delay 1e-6"
    try:
        with Chronyd(build("chronyd", "trixie"), [line]) as chronyd:
            chronyd.wait_normal()
            assert chronyd.believed_offset_s() == near(OFFSET_S)
    finally:
        feeders.remove_segment(unit)


def test_unsynchronised_pages_are_not_followed(simulate: Simulate, daemon: StartDaemon) -> None:
    page = simulate()
    with Chronyd(build("chronyd", "trixie")) as chronyd:
        fed = daemon(sock=chronyd.sock_path)
        chronyd.wait_normal()
        page.do("status unreliable")
        status = fed.wait_state("unsynchronised")
        sent = status["sinks"][0]["sent"]
        assert status["clock_status"] == "unreliable" and "unreliable" in status["reason"]
        fed.wait_until(lambda status: status["withheld"].get("status", 0) > 5)
        assert samples(fed) == sent
        page.do("status synchronized")
        fed.wait_state("synchronised")


@pytest.mark.parametrize("offset_s", [OFFSET_S, -OFFSET_S])
@pytest.mark.parametrize("suite", SUITES["ntpd"])
def test_ntpd_follows_by_shared_memory(suite: str, offset_s: float, simulate: Simulate, daemon: StartDaemon) -> None:
    simulate("--offset", str(offset_s))
    with Ntpd(build("ntpd", suite)) as ntpd:
        fed = daemon(shm=f"{ntpd.unit}:perm=0600")
        peer = ntpd.wait_selected()
        assert peer.offset_s == near(offset_s)
        assert (peer.refid, peer.stratum, peer.leap, peer.reach & 1) == ("VMCK", 0, 0, 1)
        system = ntpd.system()
        assert (system.leap, system.stratum, system.refid) == (0, 1, "VMCK")
        answer = ntpd.ntp()
        assert (answer.leap, answer.stratum, answer.refid_text) == (0, 1, "VMCK")
        fed.stop()


@pytest.mark.parametrize("suite", SUITES["ntpshmmon"])
def test_ntpshmmon_sees_the_samples(suite: str, simulate: Simulate, daemon: StartDaemon) -> None:
    simulate("--offset", str(OFFSET_S))
    unit = feeders.free_unit()
    try:
        daemon(shm=str(unit))
        seen = shmmon.watch(build("ntpshmmon", suite), 3, unit=unit)
        assert len(seen) >= 3
        for sample in seen:
            assert sample.offset_ns == pytest.approx(OFFSET_S * 1e9, abs=1e5)
            assert sample.leap == 0
    finally:
        feeders.remove_segment(unit)


@pytest.mark.parametrize("suite", SUITES["ntpd-rs"])
def test_ntpd_rs_follows_by_sock(suite: str, simulate: Simulate, daemon: StartDaemon) -> None:
    simulate("--offset", str(OFFSET_S))
    with NtpdRs(build("ntpd-rs", suite)) as ntpd_rs:
        daemon(sock=ntpd_rs.sock_path)
        assert ntpd_rs.believed_offset_s() == near(OFFSET_S)
