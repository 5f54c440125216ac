"""The metrics: what the text says and who can read it, the file that is written of it, and the command."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

from refclock import model
from refclock.metrics import SETTLE_NS, WRITE_NS, MetricsFile, render
from tests.harness import RunningDaemon, Simulator, SockListener, run, wait_until

EX_UNAVAILABLE = 69

#: What users' alerts and dashboards rely on.
NAMES = {
    "vmclock_offset_seconds": set(),
    "vmclock_error_bound_seconds": {"kind"},
    "vmclock_disruptions_total": {"kind"},
    "vmclock_samples_total": {"sink"},
    "vmclock_withheld_total": {"reason"},
    "vmclock_sink_up": {"sink"},
    "vmclock_recovery_seconds": set(),
    "vmclock_state": {"state"},
}


def make_status(**values: Any) -> dict[str, Any]:
    """A daemon's status with these values over those of a good day."""
    status = {
        "state": "synchronised",
        "reason": "",
        "good": True,
        "kind": "time",
        "device": "/dev/vmclock0",
        "clock_status": "synchronized",
        "offset_ns": -1_500,
        "maxerror_ns": 10_000,
        "esterror_ns": 1_000,
        "uncertainty_ns": 21,
        "max_error_ns": 1_000_000,
        "disruption_marker": 7,
        "generation": 2,
        "disruptions": 3,
        "disruptions_by_kind": {"disruption": 3, "generation": 1, "drill": 0},
        "last_disruption": make_record(3),
        "last_recovery_ns": 145_000_000,
        "samples": 42,
        "withheld": {"uncertain": 5},
        "sinks": [make_sink("sock", "/run/chrony.vmclock.sock", sent=40, dropped=2), make_sink("shm", "2", sent=42)],
        "chronyd": {"ok": True, "error": None, "normal": True, "tracking": None},
        "warning": None,
        "uptime_ns": 2_500_000_000,
    }
    unknown = values.keys() - status.keys()
    assert not unknown, f"a status has no {unknown}"
    return status | values


def make_record(number: int, **values: Any) -> dict[str, Any]:
    """A disruption that is over, with these values over its own."""
    record = {
        "id": number,
        "kind": "disruption",
        "marker_before": number,
        "marker_after": number + 1,
        "generation_before": 1,
        "generation_after": 1,
        "detected_at_ns": 1_790_000_000_250_000_000 + number * 60_000_000_000,
        "offset_ns": 400_000,
        "frequency_ppm": 18.5,
        "actions": [],
        "recovered_after_ns": 145_000_000,
    }
    return record | values


def make_sink(kind: str, name: str, sent: int = 0, dropped: int = 0, error: str | None = None) -> dict[str, Any]:
    ok = error is None and sent > 0
    return {"type": kind, "name": name, "ok": ok, "sent": sent, "dropped": dropped, "error": error}


def values(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Name -> the labels' values -> value, by a reader of Prometheus' text format."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in read_prometheus(text):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            key = tuple(sample.labels.values())
            assert key not in series, f"{sample.name}{key} is there twice"
            series[key] = sample.value
    return found


def as_openmetrics_1(text: str) -> str:
    """The same with counters named as OpenMetrics 1.0 has them; nothing else may need a change."""
    return re.sub(r"^(# (?:HELP|TYPE) \w+)_total ", r"\1 ", text, flags=re.MULTILINE)


# ---- The text ----------------------------------------------------------------------------------------------


def test_what_is_known_is_said_in_base_units() -> None:
    found = values(render(make_status()))

    assert found["vmclock_offset_seconds"] == {(): pytest.approx(-1.5e-6)}
    assert found["vmclock_error_bound_seconds"] == {
        ("maxerror",): pytest.approx(1e-5),
        ("esterror",): pytest.approx(1e-6),
        ("uncertainty",): pytest.approx(2.1e-8),
    }
    assert found["vmclock_max_error_seconds"] == {(): 0.001}
    assert found["vmclock_disruptions_total"] == {("disruption",): 3, ("generation",): 1, ("drill",): 0}
    assert found["vmclock_recovery_seconds"] == {(): 0.145}
    assert found["vmclock_last_disruption_timestamp_seconds"] == {(): 1_790_000_180.25}
    assert found["vmclock_last_disruption_offset_seconds"] == {(): pytest.approx(4e-4)}
    sock, shm = ("sock:/run/chrony.vmclock.sock",), ("shm:2",)
    assert found["vmclock_samples_total"] == {sock: 40, shm: 42}
    assert found["vmclock_samples_dropped_total"] == {sock: 2, shm: 0}
    assert found["vmclock_sink_up"] == {sock: 1, shm: 1}
    assert found["vmclock_withheld_total"] == {(cause,): 5 * (cause == "uncertain") for cause in model.WITHHELD}
    assert found["vmclock_state"] == {(state,): state == "synchronised" for state in model.STATES}
    assert found["vmclock_page_status"] == {(status,): status == "synchronized" for status in model.CLOCK_STATUSES}
    assert found["vmclock_device_info"] == {("/dev/vmclock0", "time", "7", "2"): 1}
    assert found["vmclock_disruption_announced"] == {("soon",): 0, ("imminent",): 0}
    assert found["vmclock_good"] == found["vmclock_chronyd_up"] == found["vmclock_chronyd_synchronised"] == {(): 1}
    assert found["vmclock_uptime_seconds"] == {(): 2.5}


def test_what_is_not_known_has_no_sample_but_a_help() -> None:
    text = render(
        make_status(
            state="waiting",
            good=False,
            kind=None,
            clock_status=None,
            disruption_marker=None,
            generation=None,
            offset_ns=None,
            maxerror_ns=None,
            esterror_ns=None,
            uncertainty_ns=None,
            last_disruption=None,
            last_recovery_ns=None,
            sinks=[make_sink("shm", "2"), make_sink("shm", "3", error="Permission denied")],
            chronyd=None,
        )
    )
    found = values(text)

    absent = ("offset", "error_bound", "recovery", "last_disruption_timestamp", "last_disruption_offset")
    for name in (*(f"vmclock_{name}_seconds" for name in absent), "vmclock_chronyd_up", "vmclock_chronyd_synchronised"):
        assert name not in found
        assert f"# HELP {name} " in text and f"# TYPE {name} " in text
    assert set(found["vmclock_page_status"].values()) == {0}
    assert found["vmclock_device_info"] == {("/dev/vmclock0", "", "", ""): 1}
    # Where there was nothing to send, it is not known whether it would arrive.
    assert found["vmclock_sink_up"] == {("shm:3",): 0}


@pytest.mark.parametrize("chronyd_normal", [None, False, True])
def test_chronyd(chronyd_normal: bool | None) -> None:
    found = values(render(make_status(chronyd={"ok": False, "error": "x", "normal": chronyd_normal, "tracking": None})))
    assert found["vmclock_chronyd_up"] == {(): 0}
    assert found.get("vmclock_chronyd_synchronised") == ({(): chronyd_normal} if chronyd_normal is not None else None)


def test_words_that_are_new_to_us_get_a_series_of_their_own() -> None:
    found = values(render(make_status(clock_status="status-7", withheld={"later": 2}, warning="imminent")))
    assert found["vmclock_page_status"]["status-7",] == 1
    assert sum(found["vmclock_page_status"].values()) == 1
    assert found["vmclock_withheld_total"]["later",] == 2
    assert found["vmclock_disruption_announced"] == {("soon",): 0, ("imminent",): 1}


def test_a_sink_that_is_configured_twice_is_one_series() -> None:
    twice = [make_sink("shm", "2", sent=3), make_sink("shm", "2", sent=3)]
    assert values(render(make_status(sinks=twice)))["vmclock_samples_total"] == {("shm:2",): 3}


def test_names_labels_and_types() -> None:
    families = {family.name: family for family in read_prometheus(render(make_status()))}
    for name, labels in NAMES.items():
        # This reader takes _total off a counter's name.
        family = families[name.removesuffix("_total")]
        assert family.type == ("counter" if name.endswith("_total") else "gauge")
        assert family.documentation.endswith(".")
        assert all(sample.labels.keys() == labels for sample in family.samples), name


def test_a_strict_reader_of_openmetrics_takes_it() -> None:
    text = as_openmetrics_1(render(make_status()))
    assert text.endswith("\n# EOF\n")
    families = {family.name: family for family in read_openmetrics(text)}
    assert families["vmclock_disruptions"].type == "counter"
    for name, family in families.items():
        assert family.unit == ("seconds" if name.endswith("_seconds") else "")


@given(st.text())
def test_any_path_survives(device: str) -> None:
    """A device's name is whatever its file system allows, bytes that are no text among them."""
    text = render(make_status(device=device + "\udc80"))
    expected = (device + "\udc80").encode(errors="replace").decode()
    for reader, shown in ((read_prometheus, text), (read_openmetrics, as_openmetrics_1(text))):
        (found,) = (family for family in reader(shown) if family.name == "vmclock_device_info")
        assert found.samples[0].labels["device"] == expected


@given(st.integers(-(10**20), 10**20))
def test_any_offset_is_a_number(offset_ns: int) -> None:
    found = values(render(make_status(offset_ns=offset_ns)))
    assert found["vmclock_offset_seconds"] == {(): pytest.approx(offset_ns / 1e9, rel=1e-15)}


# ---- The file ----------------------------------------------------------------------------------------------


class Log:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, level: str, text: str) -> None:
        self.lines.append((level, text))


def test_it_is_written_at_once_then_every_few_seconds_and_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "vmclock.prom"
    asked: list[int] = []
    now_ns = 0

    def status() -> dict[str, Any]:
        asked.append(now_ns)
        return make_status(samples=len(asked))

    file = MetricsFile(str(path), Log())
    for now_ns in range(0, 3 * WRITE_NS, SETTLE_NS // 4):
        file.tick(now_ns, "synchronised" if now_ns < WRITE_NS * 3 // 2 else "disrupted", status)

    change_ns = WRITE_NS * 3 // 2
    assert asked == [0, WRITE_NS, change_ns + SETTLE_NS, change_ns + SETTLE_NS + WRITE_NS]
    assert file.due_ns() == asked[-1] + WRITE_NS
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_goes_to_and_fro_is_not_written_each_time(tmp_path: Path) -> None:
    asked: list[int] = []

    def status() -> dict[str, Any]:
        asked.append(1)
        return make_status()

    file = MetricsFile(str(tmp_path / "vmclock.prom"), Log())
    for number in range(1000):
        file.tick(number * 1_000_000, "ab"[number % 2], status)
    assert len(asked) <= 1_000_000_000 // SETTLE_NS + 1


def test_everybody_may_read_it_whatever_the_mask(tmp_path: Path) -> None:
    path = tmp_path / "vmclock.prom"
    before = os.umask(0o077)
    try:
        MetricsFile(str(path), Log()).tick(0, "synchronised", make_status)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["vmclock.prom"]


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "vmclock.prom"
    file = MetricsFile(str(path), Log())
    file.tick(0, "synchronised", make_status)
    ended = threading.Event()
    torn: list[bytes] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not ended.is_set():
            text = path.read_bytes()
            reads += 1
            if not text.startswith(b"# HELP") or not text.endswith(b"# EOF\n"):
                torn.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 1000):
        file.tick(number * WRITE_NS, "synchronised", make_status)
    ended.set()
    reader.join(10)
    assert reads > 10
    assert not torn


def test_a_full_disk_is_said_once_and_leaves_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "vmclock.prom"
    log = Log()
    file = MetricsFile(str(path), log)
    file.tick(0, "synchronised", make_status)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1024, limits[1])
    )  # part of it can be written, as on a disk that fills up
    try:
        for number in range(1, 4):
            file.tick(number * WRITE_NS, "synchronised", make_status)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.lines == [("warning", f"metrics {path}: not written: File too large; they are tried again")]
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["vmclock.prom"]

    file.tick(4 * WRITE_NS, "disrupted", lambda: make_status(state="disrupted"))
    assert log.lines[1:] == [("info", f"metrics {path}: written again")]
    assert b'vmclock_state{state="disrupted"} 1' in path.read_bytes()


def test_a_directory_that_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "later" / "vmclock.prom"
    log = Log()
    file = MetricsFile(str(path), log)
    file.tick(0, "synchronised", make_status)
    file.tick(WRITE_NS, "synchronised", make_status)
    assert [level for level, _ in log.lines] == ["warning"]
    path.parent.mkdir()
    file.tick(2 * WRITE_NS, "synchronised", make_status)
    assert [level for level, _ in log.lines] == ["warning", "info"]
    assert path.exists()


def test_what_is_no_plain_file_stays_as_it_is(tmp_path: Path) -> None:
    """`--metrics /dev/stdout`, run by root, must not put a file in the place of /dev/stdout."""
    target = tmp_path / "target"
    target.write_text("mine")
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(target)
    os.mkfifo(fifo)
    for path in (link, fifo, tmp_path):
        log = Log()
        file = MetricsFile(str(path), log)
        file.tick(0, "synchronised", make_status)
        file.close()
        assert "not a plain file" in log.lines[0][1]
    assert link.is_symlink() and target.read_text() == "mine" and stat.S_ISFIFO(fifo.stat().st_mode)


def test_somebody_elses_link_is_not_written_through(tmp_path: Path) -> None:
    """The collector's directory may be open to others, who know the name of the file that is to be renamed."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "vmclock.prom.new").symlink_to(target)
    MetricsFile(str(tmp_path / "vmclock.prom"), Log()).tick(0, "synchronised", make_status)
    assert target.read_text() == "mine"
    assert not (tmp_path / "vmclock.prom").is_symlink()


def test_a_new_name_takes_the_old_file_along(tmp_path: Path) -> None:
    old, new = tmp_path / "old.prom", tmp_path / "new.prom"
    file = MetricsFile(str(old), Log())
    file.tick(0, "synchronised", make_status)
    file.reopen(str(new))
    file.tick(1, "synchronised", make_status)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new.prom"]
    file.reopen(None)
    file.tick(2, "synchronised", make_status)
    assert file.due_ns() is None
    assert list(tmp_path.iterdir()) == []


# ---- The daemon --------------------------------------------------------------------------------------------


def test_the_daemon_writes_what_happens(
    simulate: Callable[..., Simulator],
    daemon: Callable[..., RunningDaemon],
    listener: SockListener,
    short_path: Path,
) -> None:
    path = short_path / "vmclock.prom"
    simulator = simulate("--offset", "0.0001", "--maxerror", "20000")
    running = daemon(metrics=path, sock=listener.path)
    running.wait_state("synchronised")

    def seen(name: str, *labels: str) -> float | None:
        return values(path.read_text()).get(name, {}).get(labels)

    wait_until(lambda: path.exists() and seen("vmclock_state", "synchronised"), what="file that says synchronised")
    assert seen("vmclock_offset_seconds") == pytest.approx(1e-4, abs=2e-5)
    assert seen("vmclock_error_bound_seconds", "maxerror") == pytest.approx(2e-5, rel=0.5)
    assert 0 <= (seen("vmclock_error_bound_seconds", "uncertainty") or 0) < 1e-5
    assert seen("vmclock_disruptions_total", "disruption") == 0
    assert seen("vmclock_recovery_seconds") is None

    simulator.do("disrupt offset=0.0003 generation")
    wait_until(lambda: seen("vmclock_disruptions_total", "disruption") == 1, what="disruption in the file")
    wait_until(lambda: seen("vmclock_state", "synchronised"), what="recovery in the file")
    (record,) = running.history()
    assert seen("vmclock_recovery_seconds") == pytest.approx(record["recovered_after_ns"] / 1e9)
    assert seen("vmclock_last_disruption_offset_seconds") == pytest.approx(record["offset_ns"] / 1e9)
    assert seen("vmclock_last_disruption_timestamp_seconds") == pytest.approx(record["detected_at_ns"] / 1e9)
    # Marker and generation that move together are one disruption.
    assert seen("vmclock_disruptions_total", "generation") == 0
    assert seen("vmclock_good") == 1

    simulator.do("generation")
    running.wait_until(lambda status: status["disruptions_by_kind"] == {"disruption": 1, "generation": 1, "drill": 0})
    running.send_signal(signal.SIGUSR1)
    running.wait_until(lambda status: status["disruptions_by_kind"]["drill"] == 1 and status["good"])

    simulator.do("status unreliable")
    wait_until(lambda: seen("vmclock_state", "unsynchronised"), what="state in the file")
    assert seen("vmclock_offset_seconds") is None
    assert seen("vmclock_page_status", "unreliable") == 1
    assert (seen("vmclock_withheld_total", "status") or 0) > 0

    listener.close()
    simulator.do("status synchronized")
    wait_until(lambda: seen("vmclock_sink_up", f"sock:{listener.path}") == 0, what="sink that is down")

    assert running.stop() == 0
    assert not path.exists()


def test_sighup_moves_the_file(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon], short_path: Path
) -> None:
    simulate()
    old, new, config = short_path / "old.prom", short_path / "new.prom", short_path / "daemon.toml"
    config.write_text(f'metrics = "{old}"\n')
    running = daemon(config=config)
    wait_until(old.exists)
    config.write_text(f'metrics = "{new}"\n')
    running.send_signal(signal.SIGHUP)
    wait_until(new.exists)
    assert not old.exists()


def test_a_daemon_without_a_device_writes_too(daemon: Callable[..., RunningDaemon], short_path: Path) -> None:
    path = short_path / "vmclock.prom"
    daemon(metrics=path)
    wait_until(path.exists)
    assert values(path.read_text())["vmclock_state"]["waiting",] == 1


def test_the_file_is_kept_fresh_however_rarely_samples_are_taken(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon], short_path: Path
) -> None:
    simulate()
    path = short_path / "vmclock.prom"
    daemon(metrics=path, interval=3600)
    wait_until(path.exists)
    inode = path.stat().st_ino
    wait_until(lambda: path.stat().st_ino != inode, timeout_s=WRITE_NS / 1e9 + 5, what="file in its place")


def test_the_command(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon], listener: SockListener
) -> None:
    simulate("--offset", "-0.0002")
    running = daemon(sock=listener.path)
    running.wait_state("synchronised")
    done = run("metrics", "--status", running.status_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("# EOF\n")
    assert values(done.stdout)["vmclock_offset_seconds"] == {(): pytest.approx(-2e-4, abs=2e-5)}
    assert values(done.stdout)["vmclock_samples_total"].keys() == {(f"sock:{listener.path}",)}


def test_the_command_without_a_daemon(short_path: Path) -> None:
    done = run("metrics", "--status", short_path / "nobody")
    assert (done.returncode, done.stdout) == (EX_UNAVAILABLE, "")
    assert done.stderr.count("\n") == 1 and "is the daemon running?" in done.stderr


def test_the_command_and_a_daemon_that_is_stopped(daemon: Callable[..., RunningDaemon]) -> None:
    running = daemon()
    running.send_signal(signal.SIGSTOP)
    done = run("metrics", "--status", running.status_path, timeout_s=20)
    assert (done.returncode, done.stdout) == (EX_UNAVAILABLE, "")
    assert done.stderr.count("\n") == 1 and "does not answer" in done.stderr
