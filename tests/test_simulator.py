"""The simulator: a page that is whole at every moment, says what it was told, and survives what it is told wrongly."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refclock import cli, model
from refclock.errors import PageStalled, SampleWithheld
from refclock.model import Snapshot
from refclock.page import LOCAL_COUNTER_ID, Page
from tests.harness import TIMEOUT_S, Program, Simulator, command, make_page, run, wait_until

Simulate = Callable[..., Simulator]
#: What the comparison of the counter with the system clock is good for on a busy machine.
CLOSE_NS = 3_000


def offset_ns(page: Page, tries: int = 10) -> int:
    """The reference less the system clock, by the best of a few samples."""
    return min((page.sample() for _ in range(tries)), key=lambda sample: sample.uncertainty_ns).offset_ns


# ---- The page -----------------------------------------------------------------------------------------------


def test_what_it_says_unless_told_otherwise(simulate: Simulate) -> None:
    simulator = simulate()
    assert simulator.path.stat().st_size == 4096
    with Page(simulator.path) as page:
        snapshot = page.read()
        assert page.kind == "time"
        fields = snapshot.fields()
        for name, value in {
            "magic": 0x4B4C4356,
            "size": 4096,
            "version": 1,
            "counter_id": LOCAL_COUNTER_ID,
            "time_type": 1,
            "disruption_marker": 1,
            "clock_status": 2,
            "tai_offset_sec": -37,
            "leap_indicator": 0,
            "time_esterror_nanosec": 1_000,
            "time_maxerror_nanosec": 10_000,
            "vm_generation_counter": 1,
        }.items():
            assert fields[name] == value, name
        flags = {"tai-offset-valid", "time-esterror-valid", "time-maxerror-valid", "vm-gen-counter-present"}
        assert set(model.flag_names(fields["flags"])) == flags
        assert snapshot.seq_count % 2 == 0
        assert fields["counter_period_frac_sec"] >= 2**63, "the most precise period that fits"
        assert abs(offset_ns(page)) < CLOSE_NS


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (("--time-type", "utc"), "time_type", 0),
        (("--time-type", "monotonic"), "time_type", 2),
        (("--status", "freerunning"), "clock_status", 3),
        (("--status", "unreliable"), "clock_status", 4),
        (("--status", "status-9"), "clock_status", 9),
        (("--leap", "pre-pos"), "leap_indicator", 1),
        (("--leap", "post-neg"), "leap_indicator", 5),
        (("--leap", "leap-7"), "leap_indicator", 7),
        (("--tai-offset", "37"), "tai_offset_sec", 37),
        (("--tai-offset", "-36"), "tai_offset_sec", -36),
        (("--maxerror", "123456"), "time_maxerror_nanosec", 123456),
        (("--esterror", "0"), "time_esterror_nanosec", 0),
    ],
)
def test_what_it_is_told_at_the_start(simulate: Simulate, options: tuple[str, ...], field: str, value: int) -> None:
    with Page(simulate(*options).path) as page:
        assert getattr(page.read(), field) == value


@pytest.mark.parametrize("time_type", ["utc", "tai"])
@pytest.mark.parametrize("tai_offset", [-37, 37, -40])
@pytest.mark.parametrize("offset_s", [0.0, -0.0025])
def test_true_time(simulate: Simulate, time_type: str, tai_offset: int, offset_s: float) -> None:
    """UTC comes out the same, whatever it is told in."""
    simulator = simulate(f"--offset={offset_s}", "--time-type", time_type, f"--tai-offset={tai_offset}")
    with Page(simulator.path) as page:
        assert abs(offset_ns(page) - offset_s * 1e9) < CLOSE_NS


@pytest.mark.parametrize("frequency", [100.0, -37.5])
def test_it_drifts(simulate: Simulate, frequency: float) -> None:
    """Within one update by the period of the page, over many by its references: the same."""
    for update in ("1000", "0.02"):
        simulator = simulate(f"--frequency={frequency}", "--update", update, path=None)
        with Page(simulator.path) as page:
            first = page.sample(readings=64)
            time.sleep(0.5)
            last = page.sample(readings=64)
        slope = (last.offset_ns - first.offset_ns) / (last.system_ns - first.system_ns) * 1e6
        assert abs(slope - frequency) < 3, (update, slope)
        simulator.do("quit")
        assert simulator.wait() == 0


def test_no_time(simulate: Simulate) -> None:
    """As QEMU and Firecracker have it: the counter is none, the status unknown; markers move all the same."""
    simulator = simulate("--no-time")
    with Page(simulator.path) as page:
        snapshot = page.read()
        assert (page.kind, snapshot.counter_id, snapshot.clock_status) == ("signal", 0xFF, 0)
        assert (snapshot.time_sec, snapshot.counter_value) == (0, 0)
        assert model.flag_names(snapshot.flags or 0) == ["vm-gen-counter-present"]
        with pytest.raises(SampleWithheld):
            page.sample()
        simulator.do("disrupt generation")
        assert (page.read().disruption_marker, page.read().generation) == (2, 2)


def test_the_page_is_brought_up_to_date(simulate: Simulate) -> None:
    with Page(simulate("--update", "0.01").path) as page:
        first = page.read()
        wait_until(lambda: (page.read().seq_count - first.seq_count) % 2**32 >= 20, what="ten updates")
        assert page.read().counter_value > (first.counter_value or 0)
        assert page.read().disruption_marker == first.disruption_marker


# ---- Commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def told(simulate: Simulate) -> Iterator[tuple[Simulator, Page]]:
    """A simulator that changes its page on command only, and the page."""
    simulator = simulate("--offset", "0.001", "--update", "1000")
    with Page(simulator.path) as page:
        yield simulator, page


def test_the_page_shows_it_once_it_is_answered(told: tuple[Simulator, Page]) -> None:
    simulator, page = told
    for line, field, value in [
        ("disrupt", "disruption_marker", 2),
        ("generation", "vm_generation_counter", 2),
        ("status unreliable", "clock_status", 4),
        ("status synchronized", "clock_status", 2),
        ("leap pre-neg", "leap_indicator", 2),
        ("leap none", "leap_indicator", 0),
        ("tai -38", "tai_offset_sec", -38),
        ("disrupt generation", "vm_generation_counter", 3),
    ]:
        simulator.do(line)
        assert getattr(page.read(), field) == value, line
    assert page.read().disruption_marker == 3


def test_flags(told: tuple[Simulator, Page]) -> None:
    simulator, page = told

    def flags() -> set[str]:
        return set(model.flag_names(page.read().flags or 0))

    before = flags()
    simulator.do("flags +disruption-soon")
    assert flags() == before | {"disruption-soon"}
    simulator.do("flags -disruption-soon disruption-imminent -time-esterror-valid")
    assert flags() == before - {"time-esterror-valid"} | {"disruption-imminent"}
    simulator.do("flags +time-esterror-valid -disruption-imminent +flag-63")
    assert flags() == before | {"flag-63"}


def test_a_disruption_sets_the_offset_and_the_frequency(told: tuple[Simulator, Page]) -> None:
    simulator, page = told
    for line, expected_s in [
        ("disrupt", 0.001),
        ("disrupt offset=0.25", 0.25),
        ("disrupt", 0.25),
        ("disrupt offset=-3", -3.0),
        ("disrupt offset=0 generation", 0.0),
        ("generation", 0.0),
    ]:
        simulator.do(line)
        assert abs(offset_ns(page) - expected_s * 1e9) < CLOSE_NS, line
    period = page.period_ns
    simulator.do("disrupt frequency=200")
    assert abs(page.sample().offset_ns) < CLOSE_NS + 200_000, "the frequency alone moves no offset at once"
    assert abs((page.period_ns / period - 1) * 1e6 - 200) < 2


def test_the_offset_that_drifted_is_kept(simulate: Simulate) -> None:
    simulator = simulate("--frequency", "1000")
    with Page(simulator.path) as page:
        wait_until(lambda: page.sample().offset_ns > 500_000, what="drift")
        simulator.do("disrupt frequency=0")
        kept = offset_ns(page)
        assert kept > 500_000
        time.sleep(0.2)
        assert abs(offset_ns(page) - kept) < CLOSE_NS


def test_marker_and_truth_change_in_one_update(told: tuple[Simulator, Page]) -> None:
    """No copy of the page has a new marker with the old time, or the other way round."""
    simulator, _ = told
    expected = {1: 0.001}
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def look() -> None:
        with Page(simulator.path) as fast:
            while not done.is_set():
                try:
                    sample = fast.sample(readings=2)
                except PageStalled:
                    continue
                if sample.uncertainty_ns < CLOSE_NS:
                    seen.append((sample.disruption_marker, sample.offset_ns))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(2, 60):
            expected[number] = number / 10
            simulator.do(f"disrupt offset={number / 10}")
            wait_until(lambda: seen and seen[-1][0] == number, interval_s=0.0)  # noqa: B023
    finally:
        done.set()
        thread.join()
    for marker, offset in seen:
        assert abs(offset - expected[marker] * 1e9) < 100_000, (marker, offset)


def test_a_stall(told: tuple[Simulator, Page]) -> None:
    """`ok` at once, the sequence odd for so long; commands wait until it is over."""
    simulator, page = told
    began = time.monotonic()
    simulator.do("stall 0.5")
    assert time.monotonic() - began < 0.4
    with pytest.raises(PageStalled):
        page.read()
    simulator.do("status freerunning")
    assert time.monotonic() - began >= 0.5
    assert page.read().clock_status == 3
    assert page.read().seq_count % 2 == 0


def test_a_stall_of_no_time(told: tuple[Simulator, Page]) -> None:
    simulator, page = told
    simulator.do("stall 0")
    simulator.do("disrupt")
    assert page.read().disruption_marker == 2


NONSENSE = (
    "",
    "   ",
    "nonsense",
    "_do_quit",
    "disrupt bogus",
    "disrupt offset",
    "disrupt offset=",
    "disrupt offset=x",
    "disrupt offset=nan",
    "disrupt offset=inf",
    "disrupt offset=1e30",
    "disrupt offset=-1e12",
    "disrupt frequency=nan",
    "disrupt frequency=inf",
    "disrupt frequency=-1e6",
    "disrupt frequency=-2e6",
    "disrupt frequency=1e300",
    "disrupt marker=7",
    "generation 5",
    "status",
    "status good",
    "status status-256",
    "status status-x",
    "status synchronized twice",
    "leap maybe",
    "leap leap-256",
    "tai",
    "tai x",
    "tai 1.5",
    "tai 32768",
    "tai -40000",
    "flags +unheard-of",
    "flags +flag-64",
    "flags +disruption-soon -bogus",
    "stall",
    "stall x",
    "stall nan",
    "stall inf",
    "stall -1",
    "quit now",
    "\udc80\udcff",
)


def test_what_makes_no_sense_is_answered_and_changes_nothing(told: tuple[Simulator, Page]) -> None:
    simulator, page = told
    moving = ("seq_count", "counter_value", "counter_period_frac_sec", "time_sec", "time_frac_sec")

    def lasting() -> dict[str, int]:
        return {name: value for name, value in page.read().fields().items() if name not in moving}

    assert simulator.process.stdin is not None
    for number, line in enumerate(NONSENSE):
        before = lasting()
        simulator.process.stdin.write(line.encode(errors="surrogateescape") + b"\n")
        simulator.process.stdin.flush()
        answer = simulator._line(TIMEOUT_S)
        assert answer.startswith("error: ") and len(answer) > len("error: "), (line, answer)
        assert lasting() == before, line
        simulator.do("disrupt")
        assert page.read().disruption_marker == number + 2, line
        assert abs(offset_ns(page) - 1_000_000) < CLOSE_NS, line
    assert simulator.log() == ""


def test_counters_wrap(told: tuple[Simulator, Page]) -> None:
    """Many commands in one write are answered one by one, in order."""
    simulator, page = told
    assert simulator.process.stdin is not None
    simulator.process.stdin.write(b"disrupt\n" * 200 + b"bad\n" + b"generation\n" * 3)
    simulator.process.stdin.flush()
    answers = [simulator._line(TIMEOUT_S) for _ in range(204)]
    assert answers[:200] == ["ok"] * 200 and answers[200].startswith("error: ") and answers[201:] == ["ok"] * 3
    assert (page.read().disruption_marker, page.read().generation) == (201, 4)


# ---- Its beginning and its end ------------------------------------------------------------------------------


def test_the_page_is_whole_from_the_moment_at_which_it_is_there(simulate: Simulate, short_path: Path) -> None:
    path = short_path / "page"
    torn: list[bytes] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            if len(content) != 4096 or Snapshot(content[:112]).magic != model.MAGIC:
                torn.append(content)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        simulate()
    finally:
        done.set()
        thread.join()
    assert torn == []
    assert [entry.name for entry in short_path.iterdir() if not entry.name.endswith(".log")] == ["page"]


def test_quit(simulate: Simulate) -> None:
    simulator = simulate()
    assert simulator.send("quit") == "ok"
    assert simulator.wait() == 0
    with Page(simulator.path) as page:
        page.read()


def test_sigterm_ends_it(simulate: Simulate) -> None:
    simulator = simulate()
    assert simulator.stop() in (0, -signal.SIGTERM)
    assert simulator.log() == ""


def test_the_end_of_its_input_ends_the_commands_only(simulate: Simulate) -> None:
    simulator = simulate("--update", "0.01")
    assert simulator.process.stdin is not None
    simulator.process.stdin.close()
    with Page(simulator.path) as page:
        before = page.read().seq_count
        wait_until(lambda: page.read().seq_count >= before + 10, what="updates")
    assert simulator.running
    cpu = Path(f"/proc/{simulator.pid}/stat").read_text().split()
    began = int(cpu[13]) + int(cpu[14])
    time.sleep(0.5)
    cpu = Path(f"/proc/{simulator.pid}/stat").read_text().split()
    assert int(cpu[13]) + int(cpu[14]) - began < 25, "it must not spin on the end of its input"


def test_a_page_that_is_there_is_replaced(simulate: Simulate, short_path: Path) -> None:
    path = short_path / "page"
    path.write_bytes(make_page(disruption_marker=99).ljust(4096, b"\0"))
    with Page(path) as old:
        simulate()
        assert not old.still_there()
        assert old.read().disruption_marker == 99
    with Page(path) as page:
        assert page.read().disruption_marker == 1


def refused(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and the one line of a simulator that does not begin."""
    done = run("simulate", *arguments, stdin=subprocess.DEVNULL)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("vmclock-refclock: "), done.stderr
    return done.returncode, done.stderr


def test_another_file_is_not_replaced(short_path: Path) -> None:
    path = short_path / "precious"
    path.write_text("letters")
    status, text = refused(path)
    assert status == 64 and "something else" in text
    assert path.read_text() == "letters"


def test_places_where_no_page_can_be(short_path: Path) -> None:
    assert refused(short_path)[0] != 0
    assert refused(short_path / "none" / "page")[0] == 69
    (short_path / "file").write_bytes(b"VCLK")
    assert refused(short_path / "file" / "page")[0] == 69
    assert [entry.name for entry in short_path.iterdir()] == ["file"]


def test_a_place_without_permission(short_path: Path, nobody: tuple[str, ...]) -> None:
    done = run("simulate", short_path / "page", prefix=nobody, stdin=subprocess.DEVNULL)
    assert done.returncode == 77 and done.stderr.count("\n") == 1 and "Permission denied" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--status", "bogus"),
        ("--status", "status-256"),
        ("--time-type", "gps"),
        ("--leap", "leap"),
        ("--tai-offset", "x"),
        ("--tai-offset", "40000"),
        ("--maxerror", "-1"),
        ("--maxerror", "1.5"),
        ("--maxerror", str(2**64)),
        ("--esterror", str(2**64)),
        ("--offset", "x"),
        ("--offset", "nan"),
        ("--offset", "inf"),
        ("--offset", "1e30"),
        ("--offset", "-1e12"),
        ("--frequency", "nan"),
        ("--frequency", "-1e6"),
        ("--frequency", "1e300"),
        ("--update", "-1"),
        ("--update", "nan"),
        ("--bogus",),
        ("more",),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(
    short_path: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("refclock.simulator.CounterRate", None)  # they are refused before anything is measured
    arguments = options if len(options) == 1 else (f"{options[0]}={options[1]}",)
    assert cli.main(["simulate", str(short_path / "page"), *arguments]) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("vmclock-refclock: ") and printed.err.count("\n") == 1
    assert list(short_path.iterdir()) == []


def test_a_reader_of_its_answers_that_goes_away(short_path: Path) -> None:
    program = Program(
        "simulate", command("simulate", short_path / "page"), short_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert program.process.stdout is not None and program.process.stdin is not None
        program.process.stdout.readline()
        program.process.stdout.close()
        program.process.stdin.write(b"disrupt\n")
        program.process.stdin.flush()
        program.wait()
        assert "Traceback" not in program.log() and "Exception" not in program.log()
    finally:
        program.close()
