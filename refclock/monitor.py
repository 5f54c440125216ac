"""`monitor`: the daemon's status as a live view for a terminal, with a plot of the offset and its bound.

Needs rich and plotext (the extra ``monitor``).  Nothing here is part of the daemon: it asks over the status socket,
twice a second.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import termios
import textwrap
import time
import tty
from collections import deque
from contextlib import contextmanager

import plotext
from rich.box import ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ._version import __version__
from .errors import EX_OK, RefclockError
from .show import chronyd_text, duration, seconds, severity, warning_text
from .status import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

    from rich.console import RenderableType

    #: Time in seconds, value in nanoseconds (None: not known), severity.
    Point = tuple[float, int | None, str]

INTERVAL_S = 0.5
#: How long an answer of the daemon may take.
PATIENCE_S = 2.0
LEAST_PLOT_LINES = 5
#: What the plot may span, in seconds; `+` and `-` choose.
SPANS = (60, 300, 900, 3600)

STYLES = {"good": "green", "doubtful": "yellow", "bad": "bold red"}
#: plotext's names of the same colours, of the terminal's own palette.
_PLOT_COLOURS = {"good": "green", "doubtful": "orange", "bad": "red"}


class View:
    """What is known of the daemon, and how it came to this; times are seconds of one clock of the caller's."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None
        #: Why the daemon does not answer, where it does not.
        self.error = ""
        self.records: list[dict[str, Any]] = []
        #: Time, offset, bound (both in ns, None where not known), severity.
        self.points: deque[tuple[float, int | None, int | None, str]] = deque(maxlen=round(SPANS[-1] / INTERVAL_S))
        #: When disruptions were seen.
        self.marks: deque[float] = deque(maxlen=100)
        self.span_s = SPANS[0]
        self.with_bound = True

    def take(self, now_s: float, status: dict[str, Any]) -> bool:
        """Takes in a status; True where the records have changed and are to be asked for."""
        before = _last(self.status)
        if self.status is not None and _last(status)[0] != before[0]:
            self.marks.append(now_s)
        changed = self.status is None or _last(status) != before
        self.status, self.error = status, ""
        self.points.append((now_s, status["offset_ns"], status["maxerror_ns"], severity(status)))
        return changed

    def lose(self, now_s: float, error: str) -> None:
        """The daemon did not answer."""
        self.error = error
        self.points.append((now_s, None, None, "bad"))

    def press(self, key: str) -> bool:
        """Acts on a key; False where it ends the view."""
        place = SPANS.index(self.span_s)
        if key in "+-":
            self.span_s = SPANS[min(max(place + (1 if key == "-" else -1), 0), len(SPANS) - 1)]
        elif key == "b":
            self.with_bound = not self.with_bound
        return key not in "qQ"


def _last(status: dict[str, Any] | None) -> tuple[int | None, int | None]:
    record = (status or {}).get("last_disruption") or {}
    return record.get("id"), record.get("recovered_after_ns")


# ---- The picture -----------------------------------------------------------------------------------------


def frame(view: View, now_s: float, width: int, height: int) -> RenderableType:
    """The whole picture for a terminal of this size; the plot takes what the rest leaves."""
    if view.status is None:
        return Text(view.error, STYLES["bad"])
    head = _headlines(view, view.status)
    parts = _parts(view.status, width)
    left = height - len(head) - (len(parts) + 2) - 1
    # Of the disruptions at least two lines, and more where there is more room.
    records = _records(view.records, max(2, left // 3 - 2)) if left >= 4 else []
    left -= len(records) + 2
    picture: list[RenderableType] = [*head]
    if left >= LEAST_PLOT_LINES + 2:
        title = "offset: reference - system clock" + (", and its bound" if view.with_bound else "")
        picture.append(_panel([plot(view, now_s, width - 4, left - 2)], title))
    picture.append(_panel(_aligned(parts), "clock and feeds"))
    if records:
        picture.append(_panel(_aligned(records), "disruptions: offset, frequency, good again after"))
    picture.append(_keys(view))
    return Group(*picture)


def _headlines(view: View, status: dict[str, Any]) -> list[RenderableType]:
    kind = severity(status)
    first = Table.grid(expand=True)
    first.add_column(no_wrap=True)
    first.add_column(justify="right", no_wrap=True)
    clock = time.strftime("%H:%M:%S UTC", time.gmtime())
    up = f"up {duration(status['uptime_ns'])}   {clock}"
    first.add_row(Text.assemble(("vmclock-refclock", "bold"), f" {__version__}  {status['device']}"), Text(up, "dim"))
    second = Text(no_wrap=True, overflow="ellipsis")
    if view.error:
        second.append(f" {view.error} ", f"reverse {STYLES['bad']}")
        return [first, second]
    second.append(f" {status['state']} ", f"reverse {STYLES[kind]}")
    if status["offset_ns"] is not None:
        bound = "no bound" if status["maxerror_ns"] is None else f"bound {seconds(status['maxerror_ns'])}"
        second.append(f"  {seconds(status['offset_ns'], sign=True)}", "bold").append(f", {bound}")
    if status["reason"]:
        second.append(f"  {status['reason']}", "dim")
    lines: list[RenderableType] = [first, second]
    if status["warning"]:
        lines.append(Text(warning_text(status["warning"]), f"reverse {STYLES['doubtful']}", no_wrap=True))
    return lines


def _parts(status: dict[str, Any], width: int) -> list[list[Text]]:
    """How the page, chronyd and each sink do: a line for each, two where there is something to be told."""
    page = {None: "not read yet", "time": "gives time", "signal": "tells of disruptions only"}[status["kind"]]
    if status["clock_status"] is not None:
        page += f", {status['clock_status']}, marker {status['disruption_marker']}"
        page += "" if status["generation"] is None else f", generation {status['generation']}"
    if status["kind"] == "signal":
        found = [("page", page, "good")]
    else:
        found = [("page", page, {"synchronized": "good", "freerunning": "doubtful"}.get(status["clock_status"], "bad"))]
    if status["chronyd"] is not None:
        said, kind = chronyd_text(status["chronyd"])
        tracking = status["chronyd"]["tracking"]
        if tracking is not None and kind == "good":
            said = f"offset {seconds(tracking['last_offset_ns'], sign=True)}"
            said += f", {tracking['frequency_ppm']:+.3f} ppm, skew {tracking['skew_ppm']:.3f} ppm"
            said += f", dispersion {seconds(tracking['root_dispersion_ns'])}"
        found.append(("chronyd", said, kind))
    for sink in status["sinks"]:
        kind = "good" if sink["ok"] else "bad" if sink["error"] else "doubtful"
        counts = f"{sink['sent']} sent" + (f", {sink['dropped']} dropped" if sink["dropped"] else "")
        found.append((sink["type"], f"{sink['name']}  {sink['error'] or counts}", kind))
    withheld = ", ".join(f"{count} {cause}" for cause, count in sorted(status["withheld"].items()))
    found.append(("samples", f"{status['samples']} fed" + (f"; withheld: {withheld}" if withheld else ""), "good"))
    room = max(20, width - 4 - max(len(name) for name, _, _ in found) - 5)
    return [row for name, said, kind in found for row in _rows(name, said, kind, room)]


def _rows(name: str, text: str, kind: str, room: int) -> list[list[Text]]:
    if kind != "bad":
        return [[Text(name, "dim"), Text("●", STYLES[kind]), Text(text)]]
    lines = textwrap.wrap(text, room, max_lines=2, placeholder=" …")
    heads = [[Text(name, "dim"), Text("●", STYLES[kind])], [Text(), Text()]]
    return [[*head, Text(line, STYLES[kind])] for head, line in zip(heads, lines, strict=False)]


def _records(records: list[dict[str, Any]], count: int) -> list[list[Text]]:
    """The last so many records, the newest first, a line each."""
    rows = []
    for record in reversed(records[-count:]):
        when = time.strftime("%b %d %H:%M:%S", time.gmtime(record["detected_at_ns"] // 1_000_000_000))
        offset = "" if record["offset_ns"] is None else seconds(record["offset_ns"], sign=True)
        frequency = "" if record["frequency_ppm"] is None else f"{record['frequency_ppm']:+.3f} ppm"
        if record["recovered_after_ns"] is not None:
            end = Text(seconds(record["recovered_after_ns"]), STYLES["good"])
        elif record.get("superseded_by") is not None:
            end = Text(f"see {record['superseded_by']}", "dim")
        else:
            end = Text("not yet", STYLES["bad"])
        what = Text(f"{record['kind']} {record['id']}")
        rows.append([Text(when, "dim"), what, Text(offset, justify="right"), Text(frequency, justify="right"), end])
    return rows or [[Text("none so far", "dim")]]


def _aligned(rows: list[list[Text]]) -> list[RenderableType]:
    """The rows as lines, each column as wide as it needs; what does not fit is cut off at the end."""
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    lines: list[RenderableType] = []
    for row in rows:
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.align("right" if cell.justify == "right" else "left", width)
        line = Text("  ").join(row)
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    return lines


def _panel(content: list[RenderableType], title: str) -> Panel:
    return Panel(Group(*content), title=title, title_align="left", box=ROUNDED, border_style="bright_black")


def _keys(view: View) -> Text:
    keys = Text(style="dim", no_wrap=True, overflow="ellipsis")
    span = duration(view.span_s * 1_000_000_000)
    for key, what in (("q", "quit"), ("+ -", f"time span ({span})"), ("b", "bound on or off")):
        keys.append(f" {key} ", "reverse").append(f" {what}   ")
    return keys


# ---- The plot --------------------------------------------------------------------------------------------


def plot(view: View, now_s: float, width: int, height: int) -> Text:
    """Offset over time, coloured by the state, between the lines of its bound; disruptions are upright lines."""
    points = [(at - now_s, offset, bound, kind) for at, offset, bound, kind in view.points if now_s - at <= view.span_s]
    offsets: list[Point] = [(at, offset, kind) for at, offset, _, kind in points]
    bounds: list[list[Point]] = [
        [
            (at, None if offset is None or bound is None else offset + sign * bound, "")
            for at, offset, bound, _ in points
        ]
        for sign in (1, -1)
        if view.with_bound
    ]
    values_ns = [0, *(ns for line in (offsets, *bounds) for _, ns, _ in line if ns is not None)]
    scale_ns, unit = unit_for(max(map(abs, values_ns)))
    low, high = min(values_ns) / scale_ns, max(values_ns) / scale_ns
    margin = (high - low) * 0.05 or 1.0
    low, high = low - margin, high + margin

    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)  # it is for us to know the room there is
    figure.plot_size(width, height)
    figure.theme("colorless")  # the others paint the terminal's background over
    figure.axes(False, side=1)
    marks = ticks(low, high, max(3, height // 3))
    figure.ruler("y").lim(low, high).ticks(marks, [f"{mark:g} {unit}" for mark in marks])
    times = [-view.span_s * part / 4 for part in range(4, -1, -1)]
    figure.ruler("x").lim(-view.span_s, 0).ticks(times, [_ago(at) for at in times])

    def draw(line: list[tuple[float, float]], colour: str) -> None:
        figure.draw(figure.signal(*zip(*line, strict=True), marker=plotext.marker("braille", colour)).lines())

    for mark in view.marks:
        if now_s - mark <= view.span_s:
            draw([(mark - now_s, low), (mark - now_s, high)], "red")
    for line, colour in [*((line, "gray") for line in bounds), (offsets, "")]:
        for run in _runs(line):
            kept = thin([(at, ns / scale_ns) for at, ns, _ in run], 2 * width)
            draw(kept, colour or _PLOT_COLOURS[run[0][2]])
    return Text.from_ansi(figure.build().string().rstrip())


def _runs(points: list[Point]) -> Iterator[list[tuple[float, int, str]]]:
    """Runs of known values of one colour; each reaches to the first value of the next, if there is no gap."""
    run: list[tuple[float, int, str]] = []
    for at, value, kind in points:
        if value is not None and run and kind != run[0][2]:
            run.append((at, value, kind))
        if run and (value is None or kind != run[0][2]):
            yield run
            run = []
        if value is not None:
            run.append((at, value, kind))
    if run:
        yield run


def thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """No more than so many of the points, the extremes of each stretch among them."""
    if len(points) <= most:
        return points
    length = -(-len(points) // (most // 2))
    kept = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def unit_for(largest_ns: float) -> tuple[int, str]:
    """The unit, in nanoseconds and by name, in which this is at most a thousand."""
    for scale_ns, unit in ((1, "ns"), (1_000, "us"), (1_000_000, "ms")):
        if largest_ns <= 1000 * scale_ns:
            return scale_ns, unit
    return 1_000_000_000, "s"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between the two, 0 among them if it lies there, and no more than about so many."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _ago(at_s: float) -> str:
    if at_s == 0:
        return "now"
    return f"{at_s:g} s" if at_s > -120 else f"{at_s / 60:g} min"


# ---- The terminal ----------------------------------------------------------------------------------------


def monitor(path: str, once: bool) -> int:
    """Shows it until `q` or Ctrl-C; or one frame, where that is asked for or standard output is no terminal.

    Raises Unavailable where there is no daemon to begin with; one that goes away meanwhile is waited for.
    """
    view = View()
    _look(view, path, patient=False)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console(highlight=False)
    if once or not sys.stdout.isatty():
        width, height = console.size
        console.print(frame(view, time.monotonic(), width, height))
        return EX_OK
    with _keyboard() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(frame(view, time.monotonic(), *console.size), refresh=True)
            if not all(view.press(key) for key in keys(INTERVAL_S)):
                return EX_OK
            _look(view, path, patient=True)


def _look(view: View, path: str, patient: bool) -> None:
    """Asks the daemon, and for its journal where that has changed."""
    try:
        if view.take(time.monotonic(), ask(path, "status", PATIENCE_S)):
            view.records = ask(path, "history", PATIENCE_S)
    except (RefclockError, TimeoutError) as error:
        if not patient:
            raise
        view.lose(time.monotonic(), str(error) if isinstance(error, RefclockError) else "the daemon does not answer")


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed, unseen: a function that waits so many seconds for some.  Ctrl-C and SIGTERM end it.

    Leaves the terminal as it was.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor) if os.isatty(descriptor) else None

    def keys(timeout_s: float) -> str:
        if before is None:
            time.sleep(timeout_s)
            return ""
        ready, _, _ = select.select([descriptor], [], [], timeout_s)
        return os.read(descriptor, 64).decode(errors="replace") if ready else ""

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    if before is not None:
        tty.setcbreak(descriptor)
    try:
        yield keys
    except KeyboardInterrupt:
        pass
    finally:
        if before is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
