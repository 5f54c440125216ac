"""`monitor`: its picture at many sizes, its keys, and the command on a real pseudo-terminal; `status` in colour."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from refclock import model
from refclock.monitor import INTERVAL_S, SPANS, View, frame, plot, thin, ticks, unit_for
from refclock.show import duration, severity, status_text
from tests.harness import (
    TIMEOUT_S,
    RunningDaemon,
    Simulator,
    command,
    environment,
    never_set_the_clock,
    run,
    wait_until,
)
from tests.test_metrics import make_record, make_sink, make_status

EX_UNAVAILABLE = 69
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def make_view(seconds: float = 30, **values: Any) -> View:
    """A view that has looked on for so long, the last time at 1000 s; the offset is a saw."""
    view = View()
    status = make_status(**values)
    for number in range(int(seconds / INTERVAL_S), -1, -1):
        offset_ns = None if status["offset_ns"] is None else number % 40 * 1000
        view.take(1000 - number * INTERVAL_S, status | {"offset_ns": offset_ns})
    return view


def shown(view: View, width: int = 80, height: int = 24, colour: str | None = None) -> list[str]:
    """The picture as lines, as wide as they are."""
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=colour is not None, color_system=colour
    )
    console.print(frame(view, 1000, width, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


# ---- The picture -------------------------------------------------------------------------------------------


def test_it_says_everything_in_80_by_24() -> None:
    view = make_view(
        chronyd={
            "ok": True,
            "error": None,
            "normal": True,
            "tracking": {
                "last_offset_ns": -12,
                "frequency_ppm": -20.5,
                "skew_ppm": 0.03,
                "root_dispersion_ns": 1_200,
            },
        }
    )
    view.records = [make_record(number) for number in range(1, 5)]
    lines = shown(view)
    text = "\n".join(lines)
    assert len(lines) == 24
    for said in (
        "vmclock-refclock",
        "/dev/vmclock0",
        "synchronised",
        "+0 ns, bound 10.000 us",
        "synchronized, marker 7, generation 2",
        "offset -12 ns, -20.500 ppm, skew 0.030 ppm, dispersion 1.200 us",
        "/run/chrony.vmclock.sock  40 sent, 2 dropped",
        "42 fed; withheld: 5 uncertain",
        "disruption 4  +400.000 us  +18.500 ppm  145.000 ms",
        "disruption 3",
        "-60 s",
        "now",
        "q  quit",
    ):
        assert said in text, said
    assert "disruption 1" not in text
    assert sum(0x2800 < ord(character) < 0x2900 for character in text) > 20


STATUSES: dict[str, dict[str, Any]] = {
    "good": {},
    "warned": {"warning": "imminent"},
    "nothing yet": {"state": "waiting", "kind": None, "clock_status": None, "offset_ns": None, "maxerror_ns": None},
    "no bound": {"maxerror_ns": None},
    "without time": {"state": "watching", "kind": "signal", "offset_ns": None, "clock_status": "unknown"},
    "all broken": {
        "state": "unsynchronised",
        "good": False,
        "reason": "the page's bound is 0.002000 s, --max-error is 0.001 s, and so on " * 3,
        "chronyd": {"ok": False, "error": "no such socket " * 30, "normal": None, "tracking": None},
        "sinks": [make_sink("sock", "/run/" + "long/" * 10, error="not there " * 30) for _ in range(3)],
    },
}


@pytest.mark.parametrize("size", [(80, 24), (60, 18), (100, 30), (132, 43), (220, 70)])
@pytest.mark.parametrize("name", STATUSES)
def test_it_fits(name: str, size: tuple[int, int]) -> None:
    width, height = size
    view = make_view(**STATUSES[name])
    for records in ([], [make_record(number, recovered_after_ns=None) for number in range(100)]):
        view.records = records
        lines = shown(view, width, height)
        assert len(lines) <= height
        # With room for it, all of it is used.
        assert len(lines) == height or width < 80 or not records or name == "all broken"
        assert all(len(line) <= width for line in lines)
        assert "q  quit" in lines[-1]


@pytest.mark.parametrize("size", [(1, 1), (10, 3), (20, 10)])
def test_a_tiny_terminal_is_no_error(size: tuple[int, int]) -> None:
    assert shown(make_view(), *size)


def test_what_is_broken_is_said_with_its_cure() -> None:
    error = "No such file or directory; chronyd has not made the socket (yet): it needs a line in chrony.conf"
    text = " ".join(shown(make_view(sinks=[make_sink("sock", "/run/chrony.vmclock.sock", error=error)])))
    assert error in " ".join(text.replace("│", " ").split())


def test_how_disruptions_end() -> None:
    view = make_view()
    view.records = [
        make_record(1, recovered_after_ns=None, superseded_by=2),
        make_record(2, recovered_after_ns=None, offset_ns=None, frequency_ppm=None),
    ]
    text = "\n".join(shown(view, 80, 40))
    assert "see 2" in text and "not yet" in text
    assert "none so far" in "\n".join(shown(make_view()))


def test_colours_follow_the_state() -> None:
    def headline(**values: Any) -> str:
        return shown(make_view(**values), colour="standard")[1]

    assert ";32m synchronised " in headline()
    assert ";33m holdover " in headline(state="holdover")
    assert ";31m disrupted " in headline(state="disrupted", good=False)
    assert not COLOUR.search("\n".join(shown(make_view(state="disrupted", good=False))))


def test_a_daemon_that_went_away_is_said() -> None:
    view = make_view()
    view.lose(1000.25, "the daemon does not answer")
    lines = shown(view)
    assert "the daemon does not answer" in lines[1] and "synchronised" not in lines[1]
    view.take(1000.5, make_status())
    assert "synchronised" in shown(view)[1]


# ---- The plot ----------------------------------------------------------------------------------------------


def dots(view: View, width: int = 76, height: int = 20) -> list[tuple[int, int]]:
    """Row and column of all that is drawn."""
    lines = plot(view, 1000, width, height).plain.splitlines()
    return [(row, column) for row, line in enumerate(lines) for column, at in enumerate(line) if ord(at) > 0x2800]


def test_a_plot_has_the_size_that_is_asked_for() -> None:
    for width, height in ((40, 6), (76, 10), (200, 50)):
        lines = plot(make_view(), 1000, width, height).plain.splitlines()
        assert len(lines) == height and {len(line) for line in lines} == {width}


def test_time_goes_to_the_right_and_a_positive_offset_is_up() -> None:
    view = View()
    view.with_bound = False
    for number in range(61):
        view.take(940 + number, make_status(offset_ns=number * 1000))
    found = dots(view)
    assert max(found, key=lambda dot: dot[1])[0] < min(found, key=lambda dot: dot[1])[0]
    assert len({column for _, column in found}) > 60


def test_a_gap_stays_a_gap() -> None:
    view = View()
    for number in range(61):
        gap = 20 <= number < 40
        view.take(940 + number, make_status(offset_ns=None if gap else 5_000))
    columns = {column for _, column in dots(view)}
    assert all(any(column in columns for column in part) for part in (range(10, 25), range(60, 75)))
    assert not columns & set(range(36, 50))


def test_the_bound_is_drawn_and_may_be_left_out() -> None:
    view = make_view(maxerror_ns=400_000)
    assert "400 us" in plot(view, 1000, 76, 20).plain
    assert view.press("b")
    assert "400 us" not in plot(view, 1000, 76, 20).plain
    assert "30 us" in plot(view, 1000, 76, 20).plain


def test_a_disruption_is_an_upright_line() -> None:
    view = View()
    last = None
    for number in range(61):
        last = make_record(1) if number > 30 else None
        view.take(940 + number, make_status(offset_ns=0, last_disruption=last))
    assert list(view.marks) == [971]
    by_column: dict[int, int] = {}
    for _, column in dots(view):
        by_column[column] = by_column.get(column, 0) + 1
    assert max(by_column.values()) > 10


def test_an_hour_is_thinned_out() -> None:
    view = make_view(3600)
    view.span_s = SPANS[-1]
    assert len(view.points) > 7000
    lines = plot(view, 1000, 76, 20).plain.splitlines()
    # The saw's teeth are narrower than a column: all of it is drawn, from the left to the right.
    assert all(sum(ord(line[column]) > 0x2800 for line in lines) > 10 for column in range(10, 74))


def test_extreme_values() -> None:
    for offset_ns, maxerror_ns in ((10**19, 10**19), (-(10**19), 0), (0, 0), (1, None)):
        assert plot(make_view(offset_ns=offset_ns, maxerror_ns=maxerror_ns), 1000, 76, 10).plain


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-1e9, 1e9)), unique_by=lambda point: point[0]).map(sorted))
def test_thin_keeps_the_extremes_and_the_order(points: list[tuple[float, float]]) -> None:
    kept = thin(points, 20)
    assert len(kept) <= 20 and kept == sorted(kept) and set(kept) <= set(points)
    if points:
        for extreme in (min, max):
            assert extreme(value for _, value in kept) == extreme(value for _, value in points)


@given(st.floats(-1000, 999), st.floats(0.001, 2000), st.integers(2, 20))
def test_ticks_are_few_round_and_inside(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert len(found) <= most + 1
    assert all(low - 1e-9 <= tick <= low + width + 1e-9 for tick in found)
    assert all(len(f"{tick:g}".strip("-0.").replace(".", "")) <= 6 for tick in found)
    assert not low <= 0 <= low + width or 0 in found


@pytest.mark.parametrize(
    ("largest_ns", "unit"), [(0, "ns"), (999, "ns"), (1001, "us"), (1_500_000, "ms"), (10**12, "s")]
)
def test_units(largest_ns: int, unit: str) -> None:
    assert unit_for(largest_ns)[1] == unit


# ---- Keys --------------------------------------------------------------------------------------------------


def test_keys() -> None:
    view = View()
    for key, span_s in (("+", SPANS[0]), ("-", SPANS[1]), ("-", SPANS[2]), ("-", SPANS[3]), ("-", SPANS[3])):
        assert view.press(key) and view.span_s == span_s
    assert view.press("b") and not view.with_bound
    assert view.press("x")
    assert not view.press("q") and not view.press("Q")


def test_records_are_asked_for_when_they_change() -> None:
    view = View()
    assert view.take(0, make_status(last_disruption=None))
    assert not view.take(1, make_status(last_disruption=None))
    assert view.take(2, make_status(last_disruption=make_record(1, recovered_after_ns=None)))
    assert view.take(3, make_status(last_disruption=make_record(1)))
    assert not view.take(4, make_status(last_disruption=make_record(1)))
    assert list(view.marks) == [2]


# ---- The command -------------------------------------------------------------------------------------------


def test_one_frame_for_a_pipe(simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]) -> None:
    simulate("--offset", "0.0001")
    running = daemon()
    running.wait_state("synchronised")
    for options in (["--once"], []):
        done = run("monitor", "--status", running.status_path, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert " synchronised " in done.stdout and "bound 10.000 us" in done.stdout
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_locale_without_the_signs(daemon: Callable[..., RunningDaemon]) -> None:
    running = daemon()
    latin = environment() | {"PYTHONIOENCODING": "latin-1"}
    done = run("monitor", "--once", "--status", running.status_path, env=latin, encoding="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "waiting" in done.stdout


def test_without_a_daemon(short_path: Path) -> None:
    done = run("monitor", "--status", short_path / "nobody")
    assert (done.returncode, done.stdout) == (EX_UNAVAILABLE, "")
    assert done.stderr.count("\n") == 1 and "is the daemon running?" in done.stderr


@pytest.mark.parametrize("module", ["rich", "plotext"])
def test_without_its_libraries(module: str, short_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from refclock.cli import main; sys.exit(main(['monitor', '--status', {str(short_path / 's')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (done.returncode, done.stdout) == (EX_UNAVAILABLE, "")
    assert done.stderr == (f"vmclock-refclock: {module} is not installed; pip install 'vmclock-refclock[monitor]'\n")


class Terminal:
    """A program on a pseudo-terminal of its own, the controlling one."""

    def __init__(self, *arguments: str | Path, width: int = 80, height: int = 24) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self.theirs)
        self.said = b""

        def take_terminal() -> None:
            never_set_the_clock()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command(*arguments),
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env=environment() | {"TERM": "xterm-256color", "LANG": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=take_terminal,
        )

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def read(self) -> bytes:
        """What it has said so far."""
        while select.select([self.ours], [], [], 0)[0]:
            self.said += os.read(self.ours, 65536)
        return self.said

    def wait_for(self, text: str, after: int = 0) -> None:
        wait_until(lambda: text in self.read()[after:].decode(errors="replace"), what=f"{text!r} on the terminal")

    def wait(self) -> int:
        """Its exit status; what it says meanwhile is read."""
        return_code: int | None = wait_until(
            lambda: (self.read(), self.process.poll() is not None)[1] and self.process, what="end of it"
        ).returncode
        assert return_code is not None
        return return_code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(TIMEOUT_S)
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def watching(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]
) -> Iterator[tuple[Terminal, Simulator, RunningDaemon]]:
    """A monitor that shows a good clock."""
    simulator = simulate("--offset", "0.0001")
    running = daemon()
    running.wait_state("synchronised")
    terminal = Terminal("monitor", "--status", running.status_path)
    with contextlib.closing(terminal):
        terminal.wait_for("synchronised")
        yield terminal, simulator, running


@pytest.mark.parametrize(
    "leave", [b"q", b"Q", b"\x03", signal.SIGTERM, signal.SIGHUP], ids=["q", "Q", "ctrl-c", "SIGTERM", "SIGHUP"]
)
def test_it_leaves_the_terminal_as_it_was(
    leave: bytes | signal.Signals, watching: tuple[Terminal, Simulator, RunningDaemon]
) -> None:
    terminal, _, running = watching
    # Keys come at once and unseen while it runs.
    assert not termios.tcgetattr(terminal.theirs)[3] & (termios.ICANON | termios.ECHO)
    if isinstance(leave, bytes):
        terminal.type(leave)
    else:
        terminal.process.send_signal(leave)
    assert terminal.wait() == 0
    assert termios.tcgetattr(terminal.theirs) == terminal.before
    assert terminal.said.count(ENTER) == terminal.said.count(LEAVE) == 1
    assert terminal.said.endswith((LEAVE, LEAVE + b"\x1b[?25h"))
    assert running.running


def test_it_follows_the_daemon_the_keys_and_the_size(watching: tuple[Terminal, Simulator, RunningDaemon]) -> None:
    terminal, simulator, running = watching
    simulator.do("disrupt offset=0.0002")
    terminal.wait_for("disruption 1")
    terminal.wait_for("+200.0")
    terminal.type(b"-")
    terminal.wait_for("5 min")
    terminal.resize(132, 43)
    seen = len(terminal.read())
    terminal.wait_for("─" * 100, after=seen)

    simulator.do("status unreliable")
    terminal.wait_for("unsynchronised")
    running.stop()
    terminal.wait_for("no daemon on")
    assert terminal.process.poll() is None


def test_a_client_that_is_gone_before_its_answer_costs_nothing(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]
) -> None:
    """A monitor that is killed at the wrong moment: the daemon lets go of it, and does not try again and again."""
    simulate()
    running = daemon()
    running.wait_state("synchronised")

    def sockets() -> int:
        return sum(os.path.exists(f"/proc/{running.pid}/fd/{fd}") for fd in range(256))

    before = sockets()
    running.send_signal(signal.SIGSTOP)
    for _ in range(4):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(running.status_path))
            connection.sendall(b"watch\nstatus\nhistory\n")
    running.send_signal(signal.SIGCONT)
    wait_until(lambda: running.status() and sockets() <= before + 1, what="end of the broken connections")
    samples, started = running.status()["samples"], time.monotonic()
    time.sleep(0.5)
    rate = (running.status()["samples"] - samples) / (time.monotonic() - started)
    assert rate < 60, "it spins"


# ---- `status` ----------------------------------------------------------------------------------------------


def status_on_a_terminal(*options: str | Path, **variables: str) -> str:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            command("status", *options),
            stdout=theirs,
            env=environment() | {"TERM": "xterm"} | variables,
            timeout=TIMEOUT_S,
            check=True,
        )
        assert done.returncode == 0
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_status_has_colour_on_a_terminal_only(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]
) -> None:
    simulate()
    running = daemon()
    running.wait_state("synchronised")
    options = ("--status", running.status_path)
    assert "\x1b[32msynchronised\x1b[0m" in status_on_a_terminal(*options)
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in status_on_a_terminal(*options, **variables)
    assert "\x1b" not in run("status", *options).stdout
    assert "\x1b" not in status_on_a_terminal(*options, "--json")


@pytest.mark.parametrize("name", STATUSES)
def test_status_is_aligned(name: str) -> None:
    status = make_status(**STATUSES[name])
    plain = status_text(status)
    assert all(re.match(r"\w+ {1,11}\b|\w+ +\S", line) and line[12] == " " != line[13] for line in plain.splitlines())
    assert COLOUR.sub("", status_text(status, colour=True)) == plain


def test_every_state_has_a_severity() -> None:
    assert {
        state: severity(make_status(state=state, good=state in ("holdover", "synchronised", "watching")))
        for state in model.STATES
    } == {
        "waiting": "bad",
        "unknown": "bad",
        "disrupted": "bad",
        "unsynchronised": "bad",
        "adjusting": "doubtful",
        "holdover": "doubtful",
        "synchronised": "good",
        "watching": "good",
    }
    assert severity(make_status(state="watching", good=False)) == "bad"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90_061, "1 d 1 h"),
        (86_460, "1 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(round(seconds * 1e9)) == text
