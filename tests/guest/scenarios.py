"""The daemon, chronyd and the driver in a real guest, and what each disruption cost: one row of figures an event.

    with Lab() as lab:
        lab.boot()
        lab.warm()
        row = lab.row("lose 0.1", lab.guest.migrate(lost_s=0.1, frequency_ppm=20))

Rows are printed, and appended to `rows.jsonl` in the directory that VMCLOCK_GUEST_RESULTS names (or one of its own).
Seconds in a row are true ones since the guest went on; signs are the project's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

from tests import debs
from tests.guest import truth
from tests.guest.guest import Background, Event, Guest
from tests.guest.page import NANOSECONDS

ROOT = Path(__file__).resolve().parents[2]
SOCK = "/run/chrony.vmclock.sock"
JOURNAL = "/var/lib/vmclock-refclock/journal.jsonl"
QUICK = ("--watch", "0.001")
#: The line that the README gives, and the rest of Debian's configuration.
REFCLOCK = f"refclock SOCK {SOCK} refid VMCK poll -4 filter 1 precision 1e-9 delay 2e-5 prefer"
DEBIAN = ("makestep 1 3", "rtcsync", "maxupdateskew 100.0")
PATIENCE_S = 30.0
MS = 1e3

Row = dict[str, Any]


@functools.cache
def wheel() -> Path:
    """The package's wheel, built from this tree (or the one that VMCLOCK_GUEST_TREE names) unless it is in the cache."""
    tree = Path(os.environ.get("VMCLOCK_GUEST_TREE", ROOT))
    parts = [*sorted(tree.glob("refclock/*.p*")), *sorted(tree.glob("refclock/*.h")), *sorted(tree.glob("shm/*"))]
    sources = [path for path in parts if path.is_file()]
    sources += [tree / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")]
    contents = hashlib.sha256(sys.version.encode())
    for path in sources:
        contents.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes() + b"\0")
    directory = debs.cache_dir() / "guest" / f"wheel-{contents.hexdigest()[:16]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            copy, built = Path(temporary, "tree"), Path(temporary, "built")
            for path in sources:
                (copy / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy / path.relative_to(tree))
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
            subprocess.run([*command, "--wheel-dir", str(built), str(copy)], check=True, timeout=300)
            built.rename(directory)
    return next(directory.glob("*.whl"))


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
    return row


class Lab:
    """A guest with a published page, the driver, chronyd, the daemon from its wheel, and the sampler."""

    def __init__(self, watch: str | None = "0.001", **options: Any) -> None:
        self.guest = Guest(**options)
        self.watch = watch
        self.daemon: Background | None = None
        self.chronyd: Background | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.complain()
        self.guest.__exit__(kind)

    def complain(self) -> None:
        """What the guest's programs said, for a failed test."""
        for program in (self.daemon, self.chronyd):
            try:
                print(program.said()[-3000:] if program else "", file=sys.stderr)
            except Exception as error:
                print(f"the guest does not say: {error}", file=sys.stderr)

    def boot(self, *options: str, chronyd: tuple[str, ...] = (REFCLOCK, *DEBIAN), **fields: int) -> None:
        """Page, driver, sampler, chronyd, daemon; `options` are the daemon's, `fields` the page's."""
        self.guest.install_wheel(wheel())
        self.guest.publish(self.guest.host_line(), **fields)
        self.guest.load_driver()
        self.guest.sample_clock()
        self.chronyd = self.guest.chronyd(*chronyd)
        self.start_daemon(*options)

    def start_daemon(self, *options: str, command: tuple[str, ...] = ()) -> None:
        watch = ("--watch", self.watch) if self.watch else ()
        program = (*command, "vmclock-refclock", "run", "--sock", SOCK, *watch, *options)
        self.daemon = self.guest.start(*program)

    def status(self) -> Row:
        return json.loads(self.guest.run("vmclock-refclock", "status", "--json").stdout)

    def wait(self, timeout_s: float = PATIENCE_S) -> None:
        """Until the daemon calls the clock good."""
        self.guest.run("vmclock-refclock", "wait", "--timeout", f"{timeout_s:g}", timeout_s=timeout_s + 10)

    def warm(self, settle_s: float = 15.0) -> None:
        """Until the clock is good, and then until the daemon knows the boot's constant rate."""
        self.wait()
        time.sleep(settle_s)

    def journal(self) -> list[Row]:
        """The records, the last line of each."""
        content = self.guest.read(JOURNAL).decode() if self.guest.run("ls", JOURNAL, check=False).exit_code == 0 else ""
        return list({record["id"]: record for record in map(json.loads, content.splitlines())}.values())

    def steady(self, samples: int = 5000) -> Row:
        """How far off the clock was in the last samples, in ns."""
        errors = sorted(abs(sample.offset_ns) for sample in self.guest.samples()[-samples:])
        return {"median_ns": errors[len(errors) // 2], "p99_ns": errors[len(errors) * 99 // 100], "worst_ns": errors[-1]}

    def row(self, name: str, event: Event, quiet_s: float = 3.0, timeout_s: float = PATIENCE_S, **more: Any) -> Row:
        """The figures of a disruption, kept once the clock has been right for `quiet_s`."""
        self.guest.watch(event, quiet_s=quiet_s, timeout_s=timeout_s)
        return keep(self.figures(name, event) | more)

    def figures(self, name: str, event: Event) -> Row:
        samples = self.guest.samples()
        records = self.journal()
        record = records[-1] if records else None
        found = truth.react(samples, event.sequence, event.line)._asdict()
        begin, moment = beginning(samples, event)
        after = samples[begin:]
        row: Row = {"name": name, "watch": self.watch or "default"}
        row |= {key: value for key, value in found.items()}
        if record:
            row["detected_s"] = (detected_ns(record, after, event) - event.line.ns(moment)) / NANOSECONDS
            usable_s = row["detected_s"]
            row["usable_s"] = usable_s
            until_s = row["over_1us_until_s"]
            row["over_1us_after_usable_s"] = None if until_s is None else max(0.0, until_s - usable_s)
            row |= settled(after, event, moment, usable_s + 0.01)
            row["record"] = record
        return row


def beginning(samples: list[truth.Sample], event: Event) -> tuple[int, int]:
    """The index of the first sample after an event, and the counter's value when the guest went on."""
    begin = next(i for i, sample in enumerate(samples) if truth._reached(sample.sequence, event.sequence))
    return begin, samples[begin - 1].counter


def detected_ns(record: Row, after: list[truth.Sample], event: Event) -> int:
    """True UTC at which the daemon saw the marker.

    The record has the page's UTC where the page had time, else the system clock's, which was off by then.
    """
    detected = record["detected_at_ns"]
    if any(action["name"] == "fallback" for action in record["actions"]) or record["offset_ns"] is None:
        return detected + after[0].offset_ns
    return detected


def settled(after: list[truth.Sample], event: Event, moment: int, from_s: float) -> Row:
    """How far off the clock was from then on, and how fast it ran away over a quarter of a second, at worst."""
    line = event.line
    times = [line.seconds(moment, sample.counter) for sample in after]
    begin = bisect_left(times, from_s)
    rest, times = after[begin:], times[begin:]
    slopes = []
    for i in range(0, len(rest), 10):
        j = bisect_left(times, times[i] + 0.25)
        if j < len(rest):
            slopes.append(abs(rest[j].offset_ns - rest[i].offset_ns) / (times[j] - times[i]) / 1e3)
    return {
        "worst_after_usable_10ms_ns": max((abs(sample.offset_ns) for sample in rest), default=None),
        "frequency_error_ppm": max(slopes, default=None),
    }


