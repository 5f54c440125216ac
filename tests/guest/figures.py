"""The figures of the guest tier: kept, one JSON object a line, and held against what the project promises.

They go to `rows.jsonl` in the directory that VMCLOCK_GUEST_RESULTS names, or in one of their own.
``python -m tests.guest.figures FILE`` prints the table that ends a run.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

#: What an event was, in a row's key `kind`: stopped, republished and continued; restored in a new QEMU process; the
#: first after a boot, which pays the emulator's cold start as a restore does.
CONTINUED, RESTORED, FIRST = "continued", "restored", "first"
#: For how long the clock may be off by more than 1 ms, and chronyd Normal all the same, after each of the first two.
CONTINUED_S, RESTORED_S = 0.020, 0.250
#: How many times a promised figure may be exceeded on a machine that does other things too.
SLACK = float(os.environ.get("VMCLOCK_GUEST_SLACK", "3"))
#: The name of the rows of test_never_worse.
NEVER_WORSE = "never worse"
#: What is worth a word of rows for which nothing is promised in numbers.
WORTH_SAYING = (
    *("good_after_host_s", "host_s", "median_ns", "p99_ns", "over_1ms_while_normal_s", "over_1ms_until_s"),
    *("unsynchronised_s", "worst_at_end_ns", "cpu_percent", "wakeups_per_s", "holdover_s"),
    *("least_ns", "most_ns", "bracket_bias_median_ns", "worst_5s_before_ns", "worst_5s_after_ns"),
)

#: What was kept in this run.
kept: list[Row] = []


@functools.cache
def results() -> Path:
    """The directory for the figures."""
    directory = Path(os.environ.get("VMCLOCK_GUEST_RESULTS") or tempfile.mkdtemp(prefix="vmclock-guest-results-"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def keep(row: Row) -> Row:
    """Prints a row of figures and appends it to the file."""
    line = json.dumps(row)
    print(line, flush=True)
    with open(results() / "rows.jsonl", "a") as file:
        file.write(line + "\n")
    kept.append(row)
    return row


class Promise(NamedTuple):
    """A figure that every event of these kinds is to stay below; the median of them, where that is said."""

    what: str
    key: str
    unit: str
    scale: float
    most: float
    kinds: Sequence[str]
    median: bool = False


PROMISES = (
    Promise("> 1 ms off, Normal", "over_1ms_while_normal_s", "ms", 1e3, CONTINUED_S * 1e3, (FIRST, CONTINUED)),
    Promise("the same, after a restore", "over_1ms_while_normal_s", "ms", 1e3, RESTORED_S * 1e3, (RESTORED,)),
    Promise("> 1 us off, from the usable page on", "over_1us_after_usable_s", "ms", 1e3, 10, (CONTINUED,)),
    Promise("the same, cold", "over_1us_after_usable_s", "ms", 1e3, 100, (FIRST, RESTORED)),
    Promise("worst from 10 ms after it on", "worst_after_usable_10ms_ns", "ns", 1, 500, (CONTINUED,)),
    Promise("frequency wrong from then on", "frequency_error_10ms_ppm", "ppm", 1, 0.2, (CONTINUED,)),
    Promise("the same, from the last action on", "frequency_error_ppm", "ppm", 1, 0.2, (FIRST, CONTINUED, RESTORED)),
    Promise("chronyd unsynchronised", "unsynchronised_s", "ms", 1e3, 250, (FIRST, CONTINUED, RESTORED), median=True),
)


def table(rows: Sequence[Row]) -> list[str]:
    """The promises, what was measured, and how many of the events kept to them; for each kind of guest."""
    lines = []
    groups = sorted({(row["cpus"], row["watch"]) for row in rows if "kind" in row}, reverse=True)
    for cpus, watch in groups:
        chosen = [row for row in rows if row.get("kind") and (row["cpus"], row["watch"]) == (cpus, watch)]
        events = f"{len(chosen)} event{'s' if len(chosen) > 1 else ''}"
        lines.append(f"{cpus} processor{'s' if cpus > 1 else ''}, --watch {watch}: {events}")
        lines.append(f"  {'':<40} {'promised':>9} {'median':>9} {'worst':>9}  kept")
        for promise in PROMISES:
            # One that was never reached counts as the worst.
            found = [row[promise.key] for row in chosen if row["kind"] in promise.kinds]
            values = [float("inf") if value is None else value * promise.scale for value in found]
            if values:
                lines.append(_line(promise, values))
    return lines


def _line(promise: Promise, values: Sequence[float]) -> str:
    median, worst = statistics.median(values), max(values)
    judged = [median] if promise.median else values
    promised = f"{'~' if promise.median else ''}{promise.most:g}"
    kept = f"{sum(value <= promise.most for value in judged)} of {len(judged)}"
    return f"  {promise.what:<40} {promised:>9} {median:>9.3g} {worst:>9.3g}  {kept:<8} {promise.unit}"


def others(rows: Sequence[Row]) -> list[str]:
    """The rest, a line each; and what came of the comparison with a guest that has no daemon."""
    lines = []
    for row in rows:
        if "kind" not in row and row["name"] != NEVER_WORSE:
            said = (f"{key} {row[key]:.3g}" for key in WORTH_SAYING if row.get(key) is not None)
            lines.append(f"{row['name']}: {', '.join(said)}")
    compared = [row for row in rows if row["name"] == NEVER_WORSE]
    if compared:
        worse = sum(bool(row["worse_moments"]) for row in compared)
        lied = sum(row["lied_longer"] for row in compared)
        lines.append(
            f"{NEVER_WORSE}: {len(compared)} events; worse after {worse}, wrong and Normal for longer after {lied}"
        )
    return lines


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    rows = load(Path(sys.argv[1]))
    print("\n".join([*table(rows), *others(rows)]))
