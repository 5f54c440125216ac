#!/usr/bin/env python3
"""Draws how the system clock did: its offset with the page's bound, disruptions, and the Allan deviation.

    offset_plot.py [--journal FILE] [--output PNG] [--title TEXT] FILE...

FILE is what `vmclock-refclock run --log-samples` or `vmclock-refclock sample --format csv` wrote, or chrony's own
refclocks.log (`log refclocks`); several of one kind, such as rotated ones, are one record.  Names that end in .gz are
unpacked.  `--journal` marks what happened, from the daemon's journal.jsonl.

    top       the offset, reference - system: positive means that the system clock is behind
    middle    its magnitude beside the page's bound, on a logarithmic scale, on which steps and nanoseconds both show
    bottom    the overlapping Allan deviation of the system clock against the page, over averaging times; disruptions,
              gaps and steps part the record, and no difference is taken across them

Ends with 0; 64 for a wrong command line, 69 without the file, 77 without permission, 78 for a file of neither kind.
Needs matplotlib and numpy only: pip install 'vmclock-refclock[scripts]'.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EACCES, EPERM
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import dates
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import EngFormatter, NullFormatter
except ImportError:
    sys.exit("offset_plot: matplotlib or numpy is missing; pip install 'vmclock-refclock[scripts]'")

EX_OK, EX_USAGE, EX_UNAVAILABLE, EX_NOPERM, EX_CONFIG = 0, 64, 69, 77, 78
NSEC_PER_SEC = 1_000_000_000

#: What `--log-samples` writes; the columns that are used here.
COLUMNS = ("reference_ns", "offset_ns", "uncertainty_ns", "maxerror_ns", "disruption_marker")
#: A sample log's heading starts with this column, each of its lines with a digit.
HEADING_START = "system_ns,"
#: So many points across the picture are as many as it can show.
BINS = 1600
#: A pause longer than so many sampling intervals parts the record.
GAP_INTERVALS = 8
#: A clock that moves between two samples by so many times what it does in 99 of 100 was stepped.
STEP_FACTOR = 50
LEAST_STEP_NS = 1000
#: The fewest second differences that make an Allan deviation worth a point.
FEWEST_DIFFERENCES = 8

OFFSET, BOUND, INK = "#1f5fa8", "#e39a2d", "#444444"
EVENTS = {"disruption": "#c0392b", "generation": "#7b4fb5", "drill": "#8a8a8a"}


class BadFile(Exception):
    """A file that is of neither kind.  One line says why."""


@dataclass
class Record:
    """Samples in the order of time: UTC, offset and bound in nanoseconds, and the marker.

    ``bound_ns`` is -1 where the page gave none; it contains the uncertainty of the pairing.
    """

    time_ns: Any
    offset_ns: Any
    bound_ns: Any
    marker: Any

    def __len__(self) -> int:
        return len(self.time_ns)


# ---- Reading -----------------------------------------------------------------------------------------------


def read(paths: list[str]) -> Record:
    """All files as one record.  Raises OSError and BadFile."""
    records = [read_one(path) for path in paths]
    whole = Record(*(np.concatenate(parts) for parts in zip(*(vars(one).values() for one in records), strict=True)))
    if len(whole) < 2:
        raise BadFile(f"{', '.join(paths)}: fewer than two samples")
    order = np.argsort(whole.time_ns, kind="stable")
    return Record(*(column[order] for column in vars(whole).values()))


def read_one(path: str) -> Record:
    """One file of either kind."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        text = file.read()
    # The daemon may be writing: a line without an end is not whole.
    text = text[: text.rfind("\n") + 1]
    if text.startswith(HEADING_START):
        return _samples(path, text)
    if text.startswith("=") or (text[:4].isdigit() and text[4:5] == "-"):
        return _refclocks(path, text)
    raise BadFile(f"{path}: neither samples of vmclock-refclock nor chrony's refclocks.log; name one of them")


def _samples(path: str, text: str) -> Record:
    heading = text[: text.index("\n")]
    names = heading.split(",")
    if not set(COLUMNS) <= set(names):
        raise BadFile(f"{path}: no column {', '.join(sorted(set(COLUMNS) - set(names)))}")
    # Where files were put together the heading stands in between; where a disk was full, half a line.
    commas = len(names) - 1
    lines = [line for line in text.splitlines() if line.count(",") == commas and line[0] != HEADING_START[0]]
    if not lines:
        return Record(*np.empty((4, 0), np.int64))
    used = [names.index(name) for name in COLUMNS]
    try:
        # An empty cell is a bound that the page does not give.
        table = np.loadtxt(
            [line.replace(",,", ",-1,") for line in lines] if ",," in text else lines,
            dtype=np.int64,
            delimiter=",",
            usecols=used,
            ndmin=2,
        )
    except ValueError as error:
        raise BadFile(f"{path}: {error}") from None
    time_ns, offset_ns, uncertainty_ns, maxerror_ns, marker = table.T
    return Record(time_ns, offset_ns, np.where(maxerror_ns < 0, -1, maxerror_ns + uncertainty_ns), marker)


def _refclocks(path: str, text: str) -> Record:
    """chrony's log: raw samples (the filtered ones, whose raw offset is `-`, are left out); offsets in seconds."""
    lines = [words for words in map(str.split, text.splitlines()) if len(words) == 9 and words[6] not in ("-", "Raw")]
    try:
        stamps = np.array([f"{words[0]}T{words[1]}" for words in lines], dtype="datetime64[ns]").astype(np.int64)
        offset_ns = np.array([words[6] for words in lines], dtype=float) * NSEC_PER_SEC
    except ValueError as error:
        raise BadFile(f"{path}: {error}") from None
    unknown = np.full(len(lines), -1, dtype=np.int64)
    return Record(stamps, np.rint(offset_ns).astype(np.int64), unknown, unknown)


def read_journal(path: str) -> list[dict[str, Any]]:
    """The journal's records; of several lines with one id the last holds."""
    records = {}
    with open(path) as lines:
        for line in lines:
            try:
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return [records[number] for number in sorted(records)]


# ---- Working out -------------------------------------------------------------------------------------------


def segments(record: Record) -> list[slice]:
    """The stretches without a gap, a disruption or a step of the clock."""
    pauses_ns = np.diff(record.time_ns)
    moves_ns = np.abs(np.diff(record.offset_ns))
    step_ns = max(LEAST_STEP_NS, STEP_FACTOR * float(np.percentile(moves_ns, 99)))
    broken = (pauses_ns > gap_ns(record)) | (moves_ns > step_ns) | (np.diff(record.marker) != 0)
    edges = [0, *(np.flatnonzero(broken) + 1).tolist(), len(record)]
    return [slice(start, end) for start, end in pairwise(edges) if end - start >= 3]


def allan_deviation(record: Record) -> tuple[Any, Any]:
    """Averaging times in seconds, and the overlapping Allan deviation of the clock's rate at each.

    Each stretch is put on an even grid of the median sampling interval, along straight lines between samples.
    """
    tau0_ns = max(1, int(np.median(np.diff(record.time_ns))))
    phases = []
    for part in segments(record):
        times = record.time_ns[part] - record.time_ns[part.start]
        grid = np.arange(0, times[-1] + 1, tau0_ns)
        phases.append(np.interp(grid, times, record.offset_ns[part] - record.offset_ns[part.start]) * 1e-9)
    taus, deviations = [], []
    longest = max((len(phase) for phase in phases), default=0) // 3
    for factor in sorted({round(10 ** (step / 6)) for step in range(60)}):
        if factor > longest:
            break
        squares, count = 0.0, 0
        for phase in phases:
            if len(phase) > 2 * factor:
                second = phase[2 * factor :] - 2 * phase[factor:-factor] + phase[: -2 * factor]
                squares += float(np.dot(second, second))
                count += len(second)
        if count >= FEWEST_DIFFERENCES:
            tau_s = factor * tau0_ns * 1e-9
            taus.append(tau_s)
            deviations.append((squares / count / 2) ** 0.5 / tau_s)
    return np.array(taus), np.array(deviations)


def envelope(record: Record, values: Any) -> tuple[Any, Any, Any, Any]:
    """For each column of the picture its time, and the least, the middle and the greatest of the values in it.

    So no outlier is lost, however many samples there are.  Where the record has a gap the values are NaN: no line is
    drawn across.
    """
    times = record.time_ns
    column = ((times - times[0]) * (BINS / (times[-1] - times[0] + 1))).astype(np.int64)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    middles = (starts + np.append(starts[1:], len(times))) // 2
    shown = (np.minimum.reduceat(values, starts), values[middles], np.maximum.reduceat(values, starts))
    gaps = np.flatnonzero((np.diff(times[middles]) > gap_ns(record)) & (np.diff(column[middles]) > 2)) + 1
    columns = (np.insert(one.astype(float), gaps, np.nan) for one in shown)
    return np.insert(times[middles], gaps, times[middles][gaps] - 1), *columns


def gap_ns(record: Record) -> int:
    """The shortest pause that parts the record."""
    return GAP_INTERVALS * max(1, int(np.median(np.diff(record.time_ns))))


# ---- Drawing -----------------------------------------------------------------------------------------------


def draw(record: Record, events: list[dict[str, Any]], title: str, output: str) -> None:
    """The three panels, into a PNG."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK})
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(3, 2.4, 2.4))
    linear = figure.add_subplot(grid[0])
    magnitude = figure.add_subplot(grid[1], sharex=linear)
    stability = figure.add_subplot(grid[2])
    _draw_offset(linear, record)
    _draw_magnitude(magnitude, record)
    shown = [event for event in events if record.time_ns[0] <= event["detected_at_ns"] <= record.time_ns[-1]]
    for event in shown:
        _mark(linear, event)
        _mark(magnitude, event)
        _tell(linear, event)
        _show_size(magnitude, event)
    _whole_decades(magnitude)
    locator = dates.AutoDateLocator()
    magnitude.xaxis.set_major_locator(locator)
    magnitude.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    linear.tick_params(labelbottom=False)
    magnitude.set_xlabel("UTC")
    _draw_stability(stability, *allan_deviation(record))
    figure.suptitle(title, fontsize=12)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _days(time_ns: Any) -> Any:
    """matplotlib's dates, with the resolution of microseconds that a day's double has."""
    return time_ns / (86400 * NSEC_PER_SEC)


def _draw_offset(axes: Axes, record: Record) -> None:
    # Steps of seconds would hide everything else; the panel below has them.
    lowest, highest = np.percentile(record.offset_ns, (0.5, 99.5))
    room = max(highest - lowest, 10.0) * 0.6
    lowest, highest = lowest - room, highest + room
    # Of a clock that is far off, and steady, the steadiness would not show.
    centre = int(np.median(record.offset_ns)) if max(abs(lowest), abs(highest)) > 20 * (highest - lowest) else 0
    scale, unit = _unit(max(abs(lowest - centre), abs(highest - centre)))
    times, least, middle, greatest = envelope(record, (record.offset_ns - centre) / scale)
    days = _days(times)
    bound = _column_bound(record)
    if bound is not None:
        inside = (middle - bound / scale, middle + bound / scale)
        axes.fill_between(days, *inside, color=BOUND, alpha=0.15, lw=0, label="± the page's bound")
    axes.fill_between(days, least, greatest, color=OFFSET, alpha=0.35, lw=0)
    axes.plot(days, middle, color=OFFSET, lw=0.8, label="offset (reference - system)")
    axes.axhline(0, color=INK, lw=0.6)
    axes.set_ylim((lowest - centre) / scale, (highest - centre) / scale)
    axes.set_xlim(days[0], days[-1])
    outside = int(np.count_nonzero((record.offset_ns < lowest) | (record.offset_ns > highest)))
    label = f"offset from {centre / 1e9:+.9f} s" if centre else "offset"
    axes.set_ylabel(f"{label}, {unit}" + (f"\n({outside} samples beyond)" if outside else ""))
    _name(axes)


def _draw_magnitude(axes: Axes, record: Record) -> None:
    times, _, _, greatest = envelope(record, np.abs(record.offset_ns))
    axes.plot(_days(times), np.maximum(greatest, 1) * 1e-9, color=OFFSET, lw=0.8, label="greatest |offset|")
    bound = _column_bound(record)
    if bound is not None:
        axes.plot(_days(times), np.maximum(bound, 1) * 1e-9, color=BOUND, lw=1.2, label="the page's bound")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("magnitude")
    axes.grid(axis="y", color="#dddddd", lw=0.5)
    _name(axes)


def _whole_decades(axes: Axes) -> None:
    """So that there is a line with a figure above what is shown, and one below."""
    lowest, highest = axes.get_ylim()
    axes.set_ylim(10 ** np.floor(np.log10(lowest)), 10 ** np.ceil(np.log10(highest)))


def _name(axes: Axes) -> None:
    """What the lines mean, above the panel, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, ncols=2)


def _column_bound(record: Record) -> Any:
    """The greatest bound in each column of the picture; None where the page gave none."""
    if int(record.bound_ns.max()) < 0:
        return None
    return envelope(record, record.bound_ns)[3]


def _mark(axes: Axes, event: dict[str, Any]) -> None:
    """A line where something happened, a shade until it was over."""
    start_ns, color = event["detected_at_ns"], EVENTS.get(event["kind"], INK)
    axes.axvline(_days(start_ns), color=color, lw=0.8, ls="--", alpha=0.7)
    if event["recovered_after_ns"]:
        axes.axvspan(_days(start_ns), _days(start_ns + event["recovered_after_ns"]), color=color, alpha=0.25, lw=0)


def _tell(axes: Axes, event: dict[str, Any]) -> None:
    """What happened, in words beside its line."""
    text = f"{event['kind']} {event['id']}"
    if event["offset_ns"] is not None:
        scale, unit = _unit(abs(event["offset_ns"]))
        text += f"\noff by {event['offset_ns'] / scale:+.4g} {unit}"
    if event["recovered_after_ns"]:
        scale, unit = _unit(event["recovered_after_ns"])
        text += f"\ngood after {event['recovered_after_ns'] / scale:.3g} {unit}"
    axes.annotate(
        text,
        (_days(event["detected_at_ns"]), 0.04),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        color=EVENTS.get(event["kind"], INK),
        fontsize=8,
    )


def _show_size(axes: Axes, event: dict[str, Any]) -> None:
    """How wrong it left the clock: nothing was fed then, so that no sample says it."""
    if event["offset_ns"]:
        size_s = abs(event["offset_ns"]) * 1e-9
        axes.plot(_days(event["detected_at_ns"]), size_s, marker="D", ms=4, color=EVENTS.get(event["kind"], INK))


def _draw_stability(axes: Axes, taus: Any, deviations: Any) -> None:
    axes.set_xlabel("averaging time, seconds")
    axes.set_ylabel("Allan deviation")
    if len(taus) == 0 or not deviations.any():
        axes.text(0.5, 0.5, "too few samples in a row", transform=axes.transAxes, ha="center", color=INK)
        return
    axes.loglog(taus, deviations, color=OFFSET, marker="o", ms=3, lw=1)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", lw=0.5)


def _unit(ns: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "ns"), (1e3, "µs"), (1e6, "ms")):
        if ns < 1000 * scale:
            return scale, unit
    return 1e9, "s"


# ---- The command -------------------------------------------------------------------------------------------


def summary(record: Record) -> str:
    """The record in figures."""
    magnitudes = np.abs(record.offset_ns)
    median, most, greatest = (float(value) for value in np.percentile(magnitudes, (50, 99, 100)))
    first, last = (
        datetime.fromtimestamp(record.time_ns[place] / NSEC_PER_SEC, UTC).strftime("%Y-%m-%d %H:%M:%S")
        for place in (0, -1)
    )
    words = []
    for name, value in (("median", median), ("99 %", most), ("greatest", greatest)):
        scale, unit = _unit(value)
        words.append(f"{name} {value / scale:.4g} {unit}")
    text = f"{len(record)} samples, {first} to {last} UTC\n|offset|: {', '.join(words)}"
    bounded = record.bound_ns >= 0
    if bounded.any():
        inside = np.count_nonzero(magnitudes[bounded] <= record.bound_ns[bounded]) / np.count_nonzero(bounded)
        text += f"\nwithin the page's own bound: {100 * inside:.2f} %"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="offset_plot", description="Draws the offset, its bound and its stability.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="of --log-samples, or chrony's refclocks.log")
    parser.add_argument("--journal", metavar="FILE", help="marks the disruptions in this journal")
    parser.add_argument("--output", metavar="PNG", default="offset.png", help="[offset.png]")
    parser.add_argument("--title", metavar="TEXT", help="above the picture [the first file's name]")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:
        return EX_USAGE if end.code else EX_OK
    try:
        record = read(arguments.files)
        events = read_journal(arguments.journal) if arguments.journal else []
        draw(record, events, arguments.title or Path(arguments.files[0]).name, arguments.output)
    except OSError as error:
        print(f"offset_plot: {error.filename}: {error.strerror}; check the name", file=sys.stderr)
        return EX_NOPERM if error.errno in (EACCES, EPERM) else EX_UNAVAILABLE
    except BadFile as error:
        print(f"offset_plot: {error}", file=sys.stderr)
        return EX_CONFIG
    print(f"{summary(record)}\nwritten: {arguments.output}")
    return EX_OK


if __name__ == "__main__":
    sys.exit(main())
