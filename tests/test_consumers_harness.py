"""The harness of real consumers, proved by feeders of its own: nothing of the package under test takes part.

Each consumer is fed a reference that is 5 ms ahead of the system clock, and has to believe +5 ms. That also pins the
signs and layouts which everybody else's tests rest on.
"""

from __future__ import annotations

import math
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import consumers, debs
from tests.consumers import SUITES, build, feeders, shmmon
from tests.consumers.chronyd import Chronyd
from tests.consumers.daemon import Daemon
from tests.consumers.ntpdrs import NtpdRs
from tests.consumers.ntpsec import Ntpd

OFFSET_S = 0.005
#: What the feeders' own time stamps, the way through a scheduler and an NTP exchange may add.
NEAR_S = 0.001

CAP_SYS_TIME = 25

pytestmark = pytest.mark.timeout(60)


def near(value_s: float) -> object:
    return pytest.approx(value_s, abs=NEAR_S)


def best_offset_s(daemon: Chronyd | Ntpd) -> float:
    """What an NTP client makes of the answers: of several exchanges the one with the shortest way."""
    replies = [daemon.ntp() for _ in range(8)]
    return min(replies, key=lambda reply: reply.received_ns - reply.sent_ns).offset_ns / 1e9


def status_field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


# ---- chronyd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_s", [OFFSET_S, -OFFSET_S])
@pytest.mark.parametrize("suite", SUITES["chronyd"])
def test_chronyd_believes_the_offset(suite: str, offset_s: float) -> None:
    with Chronyd(build("chronyd", suite)) as chronyd, feeders.feeding_sock(chronyd.sock_path, offset_s):
        tracking = chronyd.wait_normal()

        assert (tracking.name, tracking.stratum, tracking.leap_status) == ("VMCK", 1, "Normal")
        assert chronyd.believed_offset_s() == near(offset_s)
        word = "slow" if offset_s > 0 else "fast"
        assert f"{word} of NTP time" in chronyd.chronyc("tracking")
        assert chronyd.sources()["VMCK"].state == "*"
        assert chronyd.sourcestats()["VMCK"].samples >= 1
        assert best_offset_s(chronyd) == near(offset_s)


@pytest.mark.parametrize("suite", SUITES["chronyd"])
def test_chronyd_tells_its_clients_the_same_by_both_decoders(suite: str) -> None:
    with Chronyd(build("chronyd", suite)) as chronyd:
        before = chronyd.ntp()
        assert (before.leap, before.stratum, before.synchronised) == (3, 0, False)
        with feeders.feeding_sock(chronyd.sock_path, OFFSET_S):
            reply = chronyd.wait_leap({0}, 10)
            header = chronyd.ntp_scapy()

    assert (reply.mode, reply.version, reply.leap, reply.stratum, reply.refid_text) == (4, 4, 0, 1, "VMCK")
    assert (header.mode, header.version, header.leap, header.stratum) == (4, 4, 0, 1)
    assert bytes(header.ref_id)[:4] == b"VMCK" == reply.refid
    assert math.isclose(header.delay, reply.root_delay_s, abs_tol=1e-3)
    assert 0 < reply.root_dispersion_s < 0.1


@pytest.mark.parametrize("suite", SUITES["chronyd"])
def test_chronyd_is_commanded_and_unsynchronised(suite: str) -> None:
    with Chronyd(build("chronyd", suite)) as chronyd:
        with feeders.feeding_sock(chronyd.sock_path, OFFSET_S):
            chronyd.wait_normal()
        assert "200 OK" in chronyd.chronyc("reset", "sources")
        assert chronyd.tracking().leap_status == "Not synchronised"
        assert chronyd.ntp().leap == 3
        with pytest.raises(RuntimeError, match="burst"):
            chronyd.chronyc("burst", "1/1")  # it has no NTP source
        assert "No such source" in chronyd.chronyc("burst", "1/1", check=False)


def test_chronyd_dies_and_returns_on_the_same_paths() -> None:
    with Chronyd(build("chronyd"), extra_conf="log refclocks") as chronyd:
        paths = chronyd.sock_path, chronyd.command_socket, chronyd.ntp_address
        chronyd.kill()
        assert stat.S_ISSOCK(chronyd.sock_path.stat().st_mode), "a crash leaves the socket"
        assert not feeders.send_sock(chronyd.sock_path, OFFSET_S)
        chronyd.start()
        assert paths == (chronyd.sock_path, chronyd.command_socket, chronyd.ntp_address)
        with feeders.feeding_sock(chronyd.sock_path, OFFSET_S):
            chronyd.wait_normal()
        assert chronyd.stop() == 0
        assert not chronyd.sock_path.exists(), "a clean end removes it"
        # date, time, refid, number, leap, pulse, raw offset …
        assert float(chronyd.stats_log("refclocks")[0][6]) == near(OFFSET_S)


def test_chronyd_paused_is_there_and_silent() -> None:
    with Chronyd(build("chronyd")) as chronyd:
        chronyd.pause()
        with pytest.raises(TimeoutError):
            chronyd.ntp(0.1)
        taken = sum(feeders.send_sock(chronyd.sock_path, OFFSET_S) for _ in range(100))
        assert 0 < taken < 100, "its queue fills"
        chronyd.resume()
        assert chronyd.ntp().mode == 4


def test_a_chronyd_that_cannot_start_says_why(tmp_path: Path) -> None:
    chronyd = Chronyd(build("chronyd"), ["refclock SOCK"], tmp_path)
    with pytest.raises(RuntimeError, match=r"(?i)refclock|syntax|arguments"), chronyd:
        pass
    assert not chronyd.running


# ---- ntpd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES["ntpd"])
def test_ntpd_believes_the_offset(suite: str) -> None:
    with Ntpd(build("ntpd", suite)) as ntpd:
        assert ntpd.ntp().leap == 3
        assert ntpd.peer().reach == 0
        with feeders.feeding_shm(ntpd.unit, OFFSET_S):
            peer = ntpd.wait_selected()

            assert peer.reach & 1
            assert (peer.refid, peer.stratum, peer.leap, peer.poll) == ("VMCK", 0, 0, 0)
            assert ntpd.believed_offset_s() == near(OFFSET_S)
            assert ntpd.system().offset_s == near(OFFSET_S)
            assert (ntpd.system().stratum, ntpd.system().leap) == (1, 0)
            reply, header = ntpd.ntp(), ntpd.ntp_scapy()
            assert (reply.leap, reply.stratum, reply.refid_text) == (0, 1, "VMCK")
            assert (header.leap, header.stratum, bytes(header.ref_id)[:4]) == (0, 1, b"VMCK")
            # ntpd serves the system clock, which it could not set here.
            assert best_offset_s(ntpd) == near(0.0)


@pytest.mark.parametrize("suite", SUITES["ntpd"])
def test_ntpd_is_configured_while_it_runs(suite: str) -> None:
    with Ntpd(build("ntpd", suite)) as ntpd:
        for line in (f"fudge 127.127.28.{ntpd.unit} time1 0.002", "tos minsane 1"):  # of different lengths
            assert "Succeeded" in ntpd.configure(line)
        with feeders.feeding_shm(ntpd.unit, OFFSET_S):
            ntpd.wait_selected()
            assert ntpd.believed_offset_s() == near(OFFSET_S + 0.002)


def test_ntpd_restarted_is_unsynchronised_at_first() -> None:
    with Ntpd(build("ntpd")) as ntpd, feeders.feeding_shm(ntpd.unit, OFFSET_S) as segment:
        ntpd.wait_selected()
        ntpd.stop()
        segment.set_valid(0)
        ntpd.start()
        ntpd.wait_leap({0}, 20)
        assert "adj_systime: Operation not permitted" in ntpd.log(), "it tried to set the clock, and was refused"


# ---- ntpshmmon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES["ntpshmmon"])
def test_ntpshmmon_shows_the_offset(suite: str) -> None:
    unit = feeders.free_unit()
    with feeders.feeding_shm(unit, OFFSET_S) as segment:
        samples = shmmon.watch(build("ntpshmmon", suite), 3, unit=unit)
        assert segment.valid, "it leaves the sample to those whom it is for"
    assert len(samples) >= 2
    for sample in samples:
        assert sample.offset_ns == round(OFFSET_S * 1e9)
        assert (sample.leap, sample.precision) == (0, -20)
        assert 0 <= sample.seen_ns - sample.system_ns < 1_000_000_000


# ---- ntpd-rs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_s", [OFFSET_S, -OFFSET_S])
@pytest.mark.parametrize("suite", SUITES["ntpd-rs"])
def test_ntpd_rs_believes_the_offset(suite: str, offset_s: float) -> None:
    with NtpdRs(build("ntpd-rs", suite)) as ntpd, feeders.feeding_sock(ntpd.sock_path, offset_s):
        assert ntpd.believed_offset_s() == near(offset_s)
        reply = ntpd.wait_leap({0}, 20)
        assert (reply.stratum, reply.refid) == (1, b"SOCK")
        assert "Stratum" in ntpd.status()


@pytest.mark.parametrize("suite", SUITES["ntpd-rs"])
def test_ntpd_rs_advances_a_clock_that_is_behind(suite: str) -> None:
    """The sign that counts is that of the step: it logs (and here only believes to make) one of +20 s."""
    with NtpdRs(build("ntpd-rs", suite)) as ntpd, feeders.feeding_sock(ntpd.sock_path, 20.0):
        ntpd.wait_for(lambda: "Jumped offset by 20000.0" in ntpd.log(), 20, "step forward")


# ---- what holds for all ----------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[], Daemon]] = {
    "chronyd": lambda: Chronyd(build("chronyd")),
    "ntpd": lambda: Ntpd(build("ntpd")),
    "ntpd-rs": lambda: NtpdRs(build("ntpd-rs")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_consumer_has_the_right_to_set_the_clock(name: str) -> None:
    with MAKERS[name]() as daemon:
        foreign = Path(f"/proc/{daemon.pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
        effective = int(status_field(daemon.pid, "CapEff"), 16)
        # The kernel asks for the capability in the first user namespace: in another one it is worth nothing.
        assert foreign or not effective >> CAP_SYS_TIME & 1
        if name == "chronyd":
            assert b"-x" in Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")
        else:
            assert foreign
        assert (status_field(daemon.pid, "Seccomp") == "2") == (name == "ntpd-rs")


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_left_behind(name: str) -> None:
    with MAKERS[name]() as daemon:
        workdir, pid = daemon.workdir, daemon.pid
        unit = daemon.unit if isinstance(daemon, Ntpd) else None
    assert not workdir.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert unit is None or not feeders.segment_exists(unit)


def test_two_of_each_run_side_by_side() -> None:
    with (
        Chronyd(build("chronyd")) as one,
        Chronyd(build("chronyd")) as two,
        Ntpd(build("ntpd")) as three,
        Ntpd(build("ntpd")) as four,
    ):
        assert one.ntp_address != two.ntp_address
        assert three.unit != four.unit
        with feeders.feeding_sock(one.sock_path, OFFSET_S), feeders.feeding_shm(three.unit, OFFSET_S):
            one.wait_normal()
            three.wait_selected()
        assert (two.ntp().leap, four.ntp().leap) == (3, 3)


def test_what_was_had_and_skipped_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "_report", consumers.Report())
    monkeypatch.setattr(consumers, "_builds", {})
    monkeypatch.setattr(debs, "unpack", _refuse)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="chronyd CANNOT BE TESTED HERE: sid: no mirror"):
            build("chronyd", "sid")
    report = consumers.report()
    assert report.missing() == ["chronyd"]
    assert report.missing(("ntpd",)) == []
    assert report.lines() == ["chronyd: SKIPPED, sid: no mirror"]


def _refuse(*_arguments: object, **_options: object) -> Path:
    raise debs.Unobtainable("no mirror")


# ---- packages --------------------------------------------------------------------------------------------------------


def test_a_mirror_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as sock:  # bound and not listening: connections to it are refused
        sock.bind(("127.0.0.1", 0))
        monkeypatch.setenv("VMCLOCK_TEST_MIRROR", f"http://127.0.0.1:{sock.getsockname()[1]}/debian")
        monkeypatch.setenv("VMCLOCK_TEST_CACHE", str(tmp_path))
        with pytest.raises(debs.Unobtainable) as caught:
            debs.unpack(["chrony"], suite="sid", timeout_s=30)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "prefix").exists()


def test_two_processes_unpack_at_once_and_a_third_finds_it_done(tmp_path: Path) -> None:
    build("ntpshmmon", "bookworm")  # skips where there is no mirror; the archive is in the cache from here on
    call = "import sys; from tests import debs; print(debs.unpack(['gpsd'], sys.argv[1], 'bookworm'))"
    command = [sys.executable, "-c", call, str(tmp_path / "prefix")]
    root = Path(__file__).resolve().parent.parent
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=50)[0].strip() for process in both] == [str(tmp_path / "prefix")] * 2
    assert [process.returncode for process in both] == [0, 0]

    assert set(debs.unpacked(tmp_path / "prefix")) == {"gpsd"}
    stamp = next((tmp_path / "prefix").glob(".unpacked-*"))
    written = stamp.stat().st_mtime_ns
    without_apt = {**os.environ, "PATH": "/nonexistent"}
    subprocess.run(command, cwd=root, env=without_apt, timeout=50, check=True)
    assert stamp.stat().st_mtime_ns == written
