"""The commands: what each prints, its exit status, and that nothing wrong is more than one line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import refclock
from refclock import cli, model
from refclock.model import FIELDS
from refclock.page import Sample
from tests.harness import ROOT, Program, RunningDaemon, Simulator, command, environment, never_set_the_clock, run

PageFile = Callable[..., Path]
Daemon = Callable[..., RunningDaemon]
Simulate = Callable[..., Simulator]
Capture = pytest.CaptureFixture[str]

COMMANDS = ("run", "show", "sample", "simulate", "validate", "doctor", "demo", "check")
OF_THE_DAEMON = ("status", "wait", "history", "drill", "metrics", "monitor")

STATUS_KEYS = {
    "state",
    "kind",
    "device",
    "clock_status",
    "offset_ns",
    "maxerror_ns",
    "disruption_marker",
    "generation",
    "disruptions",
    "last_disruption",
    "samples",
    "sinks",
    "chronyd",
    "warning",
}
RECORD_KEYS = {
    "id",
    "kind",
    "marker_before",
    "marker_after",
    "generation_before",
    "generation_after",
    "detected_at_ns",
    "offset_ns",
    "frequency_ppm",
    "actions",
    "recovered_after_ns",
}


def fails(status: int, *arguments: str | Path, **options: Any) -> str:
    """Runs a command that must fail so, with nothing but one line on standard error; that line."""
    done = run(*arguments, **options)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("vmclock-refclock: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    return str(done.stderr)


def fails_inside(capsys: Capture, status: int, *arguments: str | Path) -> str:
    """The same in this process, for the many."""
    returned = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (returned, printed.out) == (status, ""), printed
    assert printed.err.startswith("vmclock-refclock: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def works(*arguments: str | Path, **options: Any) -> str:
    """Runs a command that must work and say nothing on standard error; what it printed."""
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stdout, done.stderr)
    return str(done.stdout)


# ---- Itself -------------------------------------------------------------------------------------------------


def test_the_version() -> None:
    assert works("--version") == f"vmclock-refclock {refclock.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", refclock.__version__)


def test_the_commands_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["vmclock-refclock"] == "refclock.cli:main"
    assert project["name"] == "vmclock-refclock"


def test_help() -> None:
    text = works("--help")
    for name in COMMANDS + OF_THE_DAEMON:
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name
        assert works(name, "--help").startswith(f"usage: vmclock-refclock {name}")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("bogus",),
        ("--bogus",),
        ("show", "extra"),
        ("show", "--bogus"),
        ("show", "--device"),
        ("sample", "--count", "0"),
        ("sample", "--count", "x"),
        ("sample", "--count", "1.5"),
        ("sample", "--readings", "0"),
        ("sample", "--readings", "65"),
        ("sample", "--interval", "-1"),
        ("sample", "--interval", "nan"),
        ("sample", "--format", "xml"),
        ("wait", "--timeout", "-1"),
        ("wait", "--timeout", "soon"),
        ("validate",),
        ("simulate",),
        ("run", "--bogus", "1"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(capsys: Capture, arguments: tuple[str, ...]) -> None:
    assert "--help" in fails_inside(capsys, 64, *arguments)


# ---- show ---------------------------------------------------------------------------------------------------

SHOWN = [name for name, _, _ in FIELDS]
WORDS = ["kind", "time_type_name", "clock_status_name", "leap_name", "flag_names"]
TIMES = ["reference_ns", "esterror_ns", "maxerror_ns"]


def show(path: Path) -> dict[str, Any]:
    text = works("show", "--device", path, "--json")
    assert text.count("\n") == 1
    shown: dict[str, Any] = json.loads(text)
    return shown


def test_show_json(page_file: PageFile) -> None:
    path = page_file(disruption_marker=2**64 - 1, vm_generation_counter=2**63, tai_offset_sec=-37)
    before = time.time_ns()
    shown = show(path)
    after = time.time_ns()
    assert list(shown) == SHOWN + WORDS + TIMES
    raw = path.read_bytes()
    assert {name: shown[name] for name in SHOWN} == model.Snapshot(raw[:112]).fields()
    assert shown["disruption_marker"] == 2**64 - 1 and shown["clock_status"] == 2
    assert shown["kind"] == "time"
    assert (shown["time_type_name"], shown["clock_status_name"], shown["leap_name"]) == ("tai", "synchronized", "none")
    assert shown["flag_names"] == ["tai-offset-valid", "time-esterror-valid", "time-maxerror-valid"]
    assert before - 10**7 < shown["reference_ns"] < after + 10**7
    assert (shown["esterror_ns"], shown["maxerror_ns"]) == (1_000, 10_000)


def test_show_gives_fields_whatever_their_flags_say(page_file: PageFile) -> None:
    shown = show(page_file(flags=0, time_type=0, time_maxerror_nanosec=5))
    assert list(shown) == SHOWN + WORDS + TIMES
    assert shown["time_maxerror_nanosec"] == 5 and shown["tai_offset_sec"] == -37
    assert (shown["esterror_ns"], shown["maxerror_ns"], shown["flag_names"]) == (None, None, [])


@pytest.mark.parametrize("size", [24, 40, 104, 111, 112, 4096])
def test_show_gives_the_fields_that_the_size_covers(page_file: PageFile, size: int) -> None:
    shown = show(page_file(size=size))
    covered = [name for name, offset, code in FIELDS if offset + {"B": 1, "H": 2, "I": 4, "Q": 8}[code.upper()] <= size]
    assert list(shown) == covered + WORDS + (TIMES if size >= 104 else [])


def test_show_of_a_page_without_time(simulate: Simulate) -> None:
    shown = show(simulate("--no-time").path)
    assert list(shown) == SHOWN + WORDS
    assert (shown["kind"], shown["counter_id"], shown["clock_status_name"]) == ("signal", 255, "unknown")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"clock_status": 77}, {"clock_status_name": "status-77"}),
        ({"leap_indicator": 9}, {"leap_name": "leap-9", "reference_ns": None}),
        ({"time_type": 9}, {"time_type_name": "type-9", "kind": "signal"}),
        ({"flags": 1 << 40}, {"flag_names": ["flag-40"], "kind": "signal"}),
        ({"clock_status": 4}, {"clock_status_name": "unreliable", "kind": "time"}),
    ],
)
def test_show_of_what_nobody_knows(page_file: PageFile, fields: dict[str, int], expected: dict[str, Any]) -> None:
    shown = show(page_file(**fields))
    assert {name: shown[name] for name in expected} == expected


def test_show_text(page_file: PageFile) -> None:
    text = works("show", "--device", page_file(tai_offset_sec=37))
    for words in ("disruption_marker", "kind  ", "(synchronized)", "(tai)", "sign is odd", "UTC)"):
        assert words in text
    assert all(re.match(r"\w+ +\S", line) for line in text.splitlines())
    text = works("show", "--device", page_file(counter_id=0xFF, clock_status=0))
    assert "tells of disruptions only: the page has no counter" in text and "reference_ns" not in text


def test_show_of_nothing(short_path: Path) -> None:
    assert "No such file" in fails(69, "show", "--device", short_path / "none")
    assert "a directory" in fails(69, "show", "--device", short_path)
    (short_path / "empty").touch()
    assert "only 0 bytes" in fails(69, "show", "--json", "--device", short_path / "empty")


def test_show_of_a_page_that_is_being_written_for_ever(page_file: PageFile) -> None:
    assert "being written" in fails(71, "show", "--device", page_file(seq_count=1))


def test_show_of_a_path_that_is_no_utf_8(short_path: Path) -> None:
    assert "none" in fails(69, "show", "--device", os.fsdecode(os.fsencode(short_path) + b"/\xffnone"))


# ---- sample -------------------------------------------------------------------------------------------------


def test_sample_json(page_file: PageFile) -> None:
    path = page_file(disruption_marker=7)
    for arguments in (("--json",), ("--format", "json")):
        lines = works("sample", "--device", path, "--count", "3", "--interval", "0", *arguments).splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == 3
        for sample in samples:
            assert tuple(sample) == Sample.FIELDS
            assert sample["offset_ns"] == sample["reference_ns"] - sample["system_ns"]
            assert (sample["clock_status"], sample["leap"], sample["disruption_marker"]) == ("synchronized", 0, 7)
            assert (sample["esterror_ns"], sample["maxerror_ns"]) == (1_000, 10_000)
            assert abs(sample["system_ns"] - time.time_ns()) < 60 * 10**9
        assert samples[0]["counter"] < samples[1]["counter"] < samples[2]["counter"]


def test_sample_gives_null_where_the_page_gives_nothing(page_file: PageFile) -> None:
    path = page_file(flags=model.TAI_OFFSET_VALID)
    sample = json.loads(works("sample", "--device", path, "--json"))
    assert sample["esterror_ns"] is sample["maxerror_ns"] is None
    assert ",,,0,synchronized," in works("sample", "--device", path, "--format", "csv")
    assert "bound none" in works("sample", "--device", path)


def test_sample_csv(page_file: PageFile) -> None:
    text = works("sample", "--device", page_file(), "--format", "csv", "--count", "2", "--interval", "0.01")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == ",".join(Sample.FIELDS)
    assert len(rows) == 2
    for row in rows:
        assert int(row["offset_ns"]) == int(row["reference_ns"]) - int(row["system_ns"])


def test_sample_text(page_file: PageFile) -> None:
    text = works("sample", "--device", page_file())
    pattern = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z  offset [+-]0\.\d{9} s ± \d+ ns  bound 10000 ns  synchronized\n"
    assert re.fullmatch(pattern, text)
    assert re.match(
        r"\d{12,} s|\d{5,}-", works("sample", "--device", page_file(time_sec=10**15)).partition(".")[0] + " s"
    )


def test_sample_keeps_its_interval(page_file: PageFile) -> None:
    lines = works("sample", "--device", page_file(), "--count", "6", "--interval", "0.1", "--json").splitlines()
    times = [json.loads(line)["system_ns"] for line in lines]
    assert 0.45 < (times[-1] - times[0]) / 1e9 < 1.5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"counter_id": 0xFF}, "no counter"),
        ({"time_type": 2}, "monotonic"),
        ({"flags": 0}, "offset"),
        ({"clock_status": 0}, "unknown"),
        ({"clock_status": 1}, "initializing"),
        ({"clock_status": 4}, "unreliable"),
        ({"clock_status": 9}, "status-9"),
        ({"leap_indicator": 9}, "leap-9"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_sample_of_a_page_that_gives_none(
    capsys: Capture, page_file: PageFile, fields: dict[str, int], reason: str, form: str
) -> None:
    assert reason in fails_inside(capsys, 1, "sample", "--device", page_file(**fields), "--format", form)


def test_sample_does_not_judge(page_file: PageFile) -> None:
    """Years and rates may be odd, the bound wide: that is for `run`."""
    path = page_file(time_sec=37, time_maxerror_nanosec=10**15, clock_status=3)
    sample = json.loads(works("sample", "--device", path, "--json"))
    assert 0 <= sample["reference_ns"] < 10**10 and sample["clock_status"] == "freerunning"


# ---- The commands that ask the daemon -----------------------------------------------------------------------


@pytest.fixture
def synchronised(simulate: Simulate, daemon: Daemon) -> tuple[Simulator, RunningDaemon]:
    simulator = simulate()
    running = daemon()
    running.wait_state("synchronised")
    return simulator, running


@pytest.mark.parametrize("name", OF_THE_DAEMON)
def test_without_a_daemon(short_path: Path, name: str) -> None:
    if name == "monitor":
        pytest.importorskip("rich", reason="NOT TESTED: monitor needs rich")
    arguments = ["--timeout", "0.2"] if name == "wait" else []
    text = fails(69, name, "--status", short_path / "none", *arguments)
    assert str(short_path / "none") in text and "vmclock-refclock run" in text


def test_status_json(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    _, running = synchronised
    text = works("status", "--json", "--status", running.status_path)
    status = json.loads(text)
    assert text.count("\n") == 1
    assert status.keys() >= STATUS_KEYS
    assert (status["state"], status["kind"], status["clock_status"]) == ("synchronised", "time", "synchronized")
    assert status["device"] == str(running.directory / "page")
    assert isinstance(status["offset_ns"], int) and status["maxerror_ns"] == 10_000
    assert (status["disruption_marker"], status["generation"], status["disruptions"]) == (1, 1, 0)
    assert status["last_disruption"] is status["chronyd"] is status["warning"] is None
    assert status["sinks"] == [] and status["samples"] > 0


def test_status_tells_of_each_sink(simulate: Simulate, daemon: Daemon, short_path: Path, listener: Any) -> None:
    simulate()
    running = daemon(sock=[listener.path, short_path / "nobody"])
    listener.wait(1)
    good, bad = running.status()["sinks"]
    assert set(good) == set(bad) == {"name", "type", "ok", "sent", "dropped", "error"}
    assert (good["name"], good["type"], good["ok"], good["error"]) == (str(listener.path), "sock", True, None)
    assert (bad["ok"], bad["sent"]) == (False, 0) and bad["dropped"] > 0 and "No such file" in bad["error"]
    text = works("status", "--status", running.status_path)
    assert str(listener.path) in text and "No such file" in text


def test_status_text(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    simulator, running = synchronised
    simulator.do("flags +disruption-soon")
    running.wait_until(lambda status: status["warning"] == "soon")
    text = works("status", "--status", running.status_path)
    for words in ("synchronised", str(running.directory / "page"), "bound 10.000 us", "announces"):
        assert words in text, text
    assert "\x1b" not in text, "colours are for terminals"


def test_wait(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    simulator, running = synchronised
    assert works("wait", "--status", running.status_path) == ""
    assert works("wait", "--status", running.status_path, "--timeout", "5") == ""
    simulator.do("status unreliable")
    running.wait_state("unsynchronised")
    began = time.monotonic()
    text = fails(1, "wait", "--status", running.status_path, "--timeout", "0.5")
    assert "unsynchronised" in text and "0.5 s" in text
    assert time.monotonic() - began >= 0.5


def test_wait_returns_when_the_clock_becomes_good(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    simulator, running = synchronised
    simulator.do("status unknown")
    running.wait_state("unsynchronised")
    with Waiting(running) as waiting:
        running.wait_until(lambda _: b"" == b"")
        assert waiting.process.poll() is None
        simulator.do("status freerunning")
        assert waiting.wait() == 0
        assert running.status()["state"] == "holdover"


class Waiting(Program):
    """`wait`, as long as it takes."""

    def __init__(self, running: RunningDaemon) -> None:
        arguments = command("wait", "--status", running.status_path, "--timeout", "20")
        super().__init__("wait", arguments, running.directory)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_wait_waits_for_the_daemon_too(simulate: Simulate, daemon: Daemon, short_path: Path) -> None:
    simulate("--status", "unreliable")
    running = daemon()
    running.stop(signal.SIGKILL)
    with Waiting(running) as waiting:
        assert waiting.running
        running = daemon()
        running.wait_state("unsynchronised")
        running.stop()
        assert waiting.running
        simulate("--status", "synchronized")
        running = daemon()
        running.wait_state("synchronised")
        assert waiting.wait() == 0


@pytest.mark.parametrize(
    ("options", "state", "status"),
    [(("--offset", "0.0005"), "synchronised", 0), (("--offset", "1"), "adjusting", 1), (("--no-time",), "watching", 0)],
)
def test_wait_in_each_state(
    simulate: Simulate, daemon: Daemon, options: tuple[str, ...], state: str, status: int
) -> None:
    simulate(*options)
    running = daemon()
    running.wait_state(state)
    assert run("wait", "--status", running.status_path, "--timeout", "0.2").returncode == status


def test_history(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    simulator, running = synchronised
    path = ("--status", running.status_path)
    assert works("history", *path) == "no disruption so far\n"
    assert works("history", "--json", *path) == ""
    simulator.do("disrupt offset=0.0001 generation")
    running.wait_history(1)
    simulator.do("generation")
    running.wait_history(2)
    records = [json.loads(line) for line in works("history", "--json", *path).splitlines()]
    assert [record["kind"] for record in records] == ["disruption", "generation"]
    disruption, generation = records
    for record in records:
        assert record.keys() >= RECORD_KEYS and record.keys() - RECORD_KEYS <= {"superseded_by"}
        for action in record["actions"]:
            assert set(action) == {"name", "ok", "after_ns", "detail"}
    assert (disruption["marker_before"], disruption["marker_after"]) == (1, 2)
    assert (disruption["generation_before"], disruption["generation_after"]) == (1, 2)
    assert abs(disruption["offset_ns"] - 100_000) < 20_000
    assert disruption["recovered_after_ns"] > 0
    assert (generation["marker_before"], generation["marker_after"]) == (2, 2)
    assert (generation["generation_before"], generation["generation_after"]) == (2, 3)

    text = works("history", *path)
    assert "disruption 1, marker 1 -> 2" in text and "good after" in text and "generation 2 -> 3" in text
    journal = running.state_dir / "journal.jsonl"
    running.wait_for_log("this guest is a copy")
    assert works("history", "--json", "--journal", journal) == works("history", "--json", *path)
    assert works("history", "--journal", journal) == text
    running.stop()
    assert works("history", "--journal", journal) == text


def test_history_of_a_file_that_is_none(short_path: Path) -> None:
    assert "No such file" in fails(78, "history", "--journal", short_path / "none")
    fails(78, "history", "--journal", short_path)
    for content in (
        b"",
        b"\xff\xfe\0\n",
        b"[1, 2]\n{}\n3\nnull\n",
        b'{"id": 1}\n{"id": "x"}\n{"id": 2, "kind"',
        b"{" * 9000,
    ):
        (short_path / "journal").write_bytes(content)
        assert works("history", "--journal", short_path / "journal") == "no disruption so far\n"


def test_drill(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    _, running = synchronised
    assert "drill begun" in works("drill", "--status", running.status_path)
    (record,) = running.wait_history()
    assert record["kind"] == "drill" and record["marker_before"] == record["marker_after"] == 1
    assert running.status()["disruptions"] == 0


def test_a_drill_is_not_for_everyone(synchronised: tuple[Simulator, RunningDaemon], nobody: tuple[str, ...]) -> None:
    _, running = synchronised
    assert "permission" in fails(77, "drill", "--status", running.status_path, prefix=nobody)
    assert json.loads(works("status", "--json", "--status", running.status_path, prefix=nobody))["state"]
    assert works("history", "--status", running.status_path, prefix=nobody) == "no disruption so far\n"


def test_metrics_and_check(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    _, running = synchronised
    assert works("metrics", "--status", running.status_path).endswith("# EOF\n")
    assert works("check", "--status", running.status_path).startswith("VMCLOCK OK")


def test_check_without_a_daemon(short_path: Path) -> None:
    done = run("check", "--status", short_path / "none")
    assert (done.returncode, done.stderr) == (3, "") and done.stdout.count("\n") == 1
    assert done.stdout.startswith("VMCLOCK UNKNOWN")


def test_demo_without_a_chronyd(short_path: Path) -> None:
    assert "install it" in fails(69, "demo", "--chronyd-binary", short_path / "none")


# ---- A daemon that is not well ------------------------------------------------------------------------------


def test_a_daemon_that_is_stopped(synchronised: tuple[Simulator, RunningDaemon]) -> None:
    """It takes the connection, by the kernel, and says nothing."""
    _, running = synchronised
    running.send_signal(signal.SIGSTOP)
    try:
        fails(69, "status", "--status", running.status_path, timeout_s=20)
        fails(1, "wait", "--status", running.status_path, "--timeout", "0.3")
    finally:
        running.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "answer", [b"", b"\n", b"hello\n", b"{}\n", b"[]\n", b"5\n", b'{"state": 5}\n', b"\xff\0\n", b'{"a']
)
@pytest.mark.parametrize("name", ["status", "history", "drill", "metrics", "wait"])
def test_another_program_on_the_socket(capsys: Capture, short_path: Path, name: str, answer: bytes) -> None:
    if (name, answer) == ("history", b"[]\n"):
        pytest.skip("a good answer")
    path = short_path / "other"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        arguments = ["--timeout", "0.3"] if name == "wait" else []
        try:
            fails_inside(capsys, 69, name, "--status", path, *arguments)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_paths_that_no_socket_can_have(short_path: Path) -> None:
    for name in OF_THE_DAEMON[:5]:
        arguments = ["--timeout", "5"] if name == "wait" else []
        began = time.monotonic()
        fails(64, name, "--status", "/" + "x" * 200, *arguments)
        assert time.monotonic() - began < 4
    (short_path / "file").touch()
    fails(69, "status", "--status", short_path / "file")


# ---- Whoever reads ------------------------------------------------------------------------------------------


def closed_pipe() -> int:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


PRINTING = [
    ("--help",),
    ("--version",),
    ("show", "--help"),
    ("show",),
    ("show", "--json"),
    ("sample",),
    ("sample", "--count", "100000", "--interval", "0"),
    ("sample", "--count", "100", "--interval", "0.01"),
    ("sample", "--format", "csv"),
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_seen_enough(page_file: PageFile, arguments: tuple[str, ...]) -> None:
    """`| head`: no word about it."""
    device = ("--device", page_file()) if arguments[0] in ("show", "sample") and "--help" not in arguments else ()
    writer = closed_pipe()
    try:
        done = run(*arguments, *device, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["status", "history", "metrics", "check"])
def test_a_reader_that_has_seen_enough_of_the_daemon(synchronised: tuple[Simulator, RunningDaemon], name: str) -> None:
    _, running = synchronised
    writer = closed_pipe()
    try:
        done = run(name, "--status", running.status_path, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", PRINTING[3:], ids=" ".join)
def test_a_disk_that_is_full(page_file: PageFile, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run(*arguments, "--device", page_file(), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 71
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


def test_no_standard_output_at_all(page_file: PageFile) -> None:
    line = ["sh", "-c", 'exec "$@" >&-', "sh", *command("show", "--device", page_file())]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, env=environment(), check=False, timeout=10)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_a_terminal_that_knows_ascii_only(
    page_file: PageFile, daemon: Daemon, short_path: Path, locale: dict[str, str]
) -> None:
    path = Path(os.fsdecode(os.fsencode(page_file()) + b"\xff"))
    (short_path / "page").rename(path)
    running = daemon(device=path)
    running.wait_until(lambda status: status["kind"])
    env = environment() | locale
    for arguments in (
        ("sample", "--device", path),
        ("show", "--device", path),
        ("status", "--status", running.status_path),
    ):
        done = run(*arguments, env=env, text=False)
        assert (done.returncode, done.stderr) == (0, b""), arguments
        assert done.stdout
    done = run("show", "--device", f"{path}x", env=env, text=False)
    assert done.returncode == 69 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [("sample", "--count", "1000", "--interval", "0.01"), ("wait",)], ids=" ".join)
def test_ctrl_c(page_file: PageFile, short_path: Path, arguments: tuple[str, ...]) -> None:
    where = ("--device", page_file()) if arguments[0] == "sample" else ("--status", short_path / "none")
    process = subprocess.Popen(
        command(*arguments, *where),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=never_set_the_clock,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        if arguments[0] == "sample":
            process.stdout.readline()
        else:
            handles = f"/proc/{process.pid}/status"
            deadline = time.monotonic() + 10
            # Python catches SIGINT (bit 1) once it runs.
            while not int(Path(handles).read_text().split("SigCgt:")[1].split()[0], 16) & 2:
                assert time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
