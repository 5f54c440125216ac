"""The daemon, chronyd and the driver in a real guest, and what each disruption cost: one row of figures an event.

    with Lab() as lab:
        lab.boot()
        lab.warm()
        row = lab.row("lose 0.1", lab.guest.migrate(lost_s=0.1, frequency_ppm=20))

Rows are kept by figures.keep. Seconds in a row are true ones since the guest went on; signs are the project's.
"""

from __future__ import annotations

import compileall
import contextlib
import functools
import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import debs
from tests.guest import figures, page, truth
from tests.guest.figures import Row
from tests.guest.guest import Background, Event, Guest, GuestError
from tests.guest.page import NANOSECONDS, Line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOCK = "/run/chrony.vmclock.sock"
JOURNAL = "/var/lib/vmclock-refclock/journal.jsonl"
STATUS = "/run/vmclock-refclock/status.sock"
#: The line that the README gives, and the rest of Debian's configuration.
REFCLOCK = f"refclock SOCK {SOCK} refid VMCK poll -4 filter 1 precision 1e-9 delay 2e-5 prefer"
DEBIAN = ("makestep 0.001 3", "rtcsync", "maxupdateskew 100.0")
PATIENCE_S = 30.0
#: From one sample to the next, a millisecond later, no wrong frequency makes so much: the clock was stepped.
STEP_NS = 20
#: A process's CPU time, by the clock that the kernel keeps of it, and its voluntary context switches.
COST = """
import re, sys, time
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
def look():
    status = open(f"/proc/{pid}/status").read()
    return time.clock_gettime_ns(~pid << 3 | 2), int(re.search(r"^voluntary_ctxt_switches:\\s*(\\d+)", status, re.M)[1])
first = look()
time.sleep(seconds)
last = look()
print((last[0] - first[0]) / seconds / 1e7, (last[1] - first[1]) / seconds)
"""


@functools.cache
def wheel() -> Path:
    """The package's wheel, from the cache or built from this tree (or the one that VMCLOCK_GUEST_TREE names)."""
    tree = Path(os.environ.get("VMCLOCK_GUEST_TREE", ROOT))
    parts = [*sorted(tree.glob("refclock/*.p*")), *sorted(tree.glob("refclock/*.h")), *sorted(tree.glob("shm/*"))]
    sources = [path for path in parts if path.is_file()]
    sources += [tree / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")]
    contents = hashlib.sha256(f"compiled {sys.version}".encode())
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
            _compile(next(built.glob("*.whl")), Path(temporary, "unpacked"))
            with contextlib.suppress(OSError):  # another run was quicker
                built.rename(directory)
    return next(directory.glob("*.whl"))


def _compile(wheel: Path, directory: Path) -> None:
    """Adds compiled modules to a wheel, as an installer would: emulated, they would take the guest ten seconds."""
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.extractall(directory)
        compileall.compile_dir(directory, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        for path in sorted(directory.rglob("*.pyc")):
            archive.write(path, path.relative_to(directory))


class Lab:
    """A guest with a published page, the driver, the sampler, chronyd, and the daemon from its wheel."""

    def __init__(self, watch: str | None = "0.001", cpus: int = 2, **options: Any) -> None:
        self.guest = Guest(cpus=cpus, **options)
        self.cpus = cpus
        self.watch = watch
        self.daemon: Background | None = None
        self.chronyd: Background | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(self.said(), file=sys.stderr)
        self.guest.__exit__(kind)

    def said(self) -> str:
        """What the guest's programs said, for a failed test."""
        try:
            return "\n".join(program.said()[-3000:] for program in (self.daemon, self.chronyd) if program)
        except Exception as error:
            return f"the guest does not say: {error}"

    def boot(
        self, *options: str, chronyd: tuple[str, ...] = (REFCLOCK, *DEBIAN), line: Line | None = None, **fields: int
    ) -> None:
        """Page, driver, sampler, chronyd, daemon; `options` are the daemon's, `fields` the page's."""
        self.prepare(line, **fields)
        self.start_chronyd(*chronyd)
        self.start_daemon(*options)

    def prepare(self, line: Line | None = None, **fields: int) -> None:
        """All but chronyd and the daemon."""
        self.guest.install_wheel(wheel())
        self.guest.publish(line or self.guest.host_line(), **fields)
        self.guest.load_driver()
        self.guest.sample_clock()

    def start_chronyd(self, *lines: str) -> None:
        self.chronyd = self.guest.chronyd(*(lines or (REFCLOCK, *DEBIAN)))

    def start_daemon(self, *options: str, before: tuple[str, ...] = ()) -> None:
        """The daemon; `before` is a command that runs the rest of its arguments."""
        watch = ("--watch", self.watch) if self.watch else ()
        self.daemon = self.guest.start(
            *before, "/usr/local/bin/vmclock-refclock", "run", "--sock", SOCK, *watch, *options
        )

    def end(self, program: Background | None) -> None:
        assert program is not None
        program.kill()
        program.wait()

    def restart_daemon(self, *options: str, before: tuple[str, ...] = ()) -> None:
        self.end(self.daemon)
        self.start_daemon(*options, before=before)
        self.wait()

    def status(self) -> Row:
        """What `vmclock-refclock status --json` prints, without the second that the emulated command takes."""
        status: Row = json.loads(self.guest.ask(STATUS, "status"))
        return status

    def until(self, wanted: Callable[[Row], object], what: str, timeout_s: float = PATIENCE_S) -> Row:
        """The daemon's status, once it is as wanted; a daemon that is not there yet is waited for."""
        deadline = time.monotonic() + timeout_s
        status: Row = {}
        while True:
            with contextlib.suppress(GuestError):
                status = self.status()
                if wanted(status):
                    return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"the daemon is not {what} after {timeout_s:g} s: {status}")
            time.sleep(0.05)

    def state(self, wanted: str, timeout_s: float = PATIENCE_S) -> Row:
        return self.until(lambda status: status["state"] == wanted, wanted, timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> None:
        """Until the daemon is there and calls the clock good, and chronyd itself synchronised."""
        self.until(lambda status: status["good"] and status["chronyd"]["normal"], "good", timeout_s)

    def recovered(self) -> None:
        """Until the disruption that the page tells of now is over."""
        marker = self.guest.page().disruption_marker

        def is_over(status: Row) -> bool:
            last = status["last_disruption"]
            return bool(last) and last["marker_after"] == marker and last["recovered_after_ns"] is not None

        self.until(is_over, "recovered")

    def warm(self, settle_s: float = 10.0) -> None:
        """Until the clock is good, and then until the daemon knows the boot's constant rate."""
        self.wait()
        time.sleep(settle_s)

    def journal(self) -> list[Row]:
        """The records, the last line of each."""
        if self.guest.run("ls", JOURNAL, check=False).exit_code != 0:
            return []
        content = self.guest.read(JOURNAL).decode()
        return list({record["id"]: record for record in map(json.loads, content.splitlines())}.values())

    def cpu(self, seconds: float = 5.0) -> Row:
        """What the daemon costs: per cent of the guest's CPU, and how often it wakes, a second."""
        assert self.daemon is not None
        said = self.guest.python(COST, str(self.daemon.pid), str(seconds))
        return dict(zip(("cpu_percent", "wakeups_per_s"), map(float, said.split()), strict=True))

    def steady(self, samples: int = 5000) -> Row:
        """How far off the clock was in the last samples, in ns."""
        errors = sorted(abs(sample.offset_ns) for sample in self.guest.samples()[-samples:])
        return {
            "median_ns": errors[len(errors) // 2],
            "p99_ns": errors[len(errors) * 99 // 100],
            "worst_ns": errors[-1],
        }

    def now(self) -> Line:
        """The true line again, through a point of this moment: what a page tells whose errors grow from now on."""
        return self.guest.truth.last.moved(self.guest.samples()[-1].counter)

    def migrate_in_utc(self, lost_s: float, frequency_ppm: float) -> Event:
        """As Guest.migrate, to a host whose page counts UTC."""
        guest = self.guest
        guest.stop()
        line = guest.truth.last.moved(guest._stopped_at, lost_s, frequency_ppm)
        marker = guest.page().disruption_marker + 1
        event = guest.publish(line, disruption_marker=marker, time_type=page.UTC, time_sec=line.utc >> 64)
        guest.cont()
        return event

    def row(
        self,
        name: str,
        event: Event,
        usable: Event | None = None,
        quiet_s: float = 2.0,
        timeout_s: float = PATIENCE_S,
        **more: Any,
    ) -> Row:
        """The figures of a disruption, kept once the clock has been right for `quiet_s`.

        `usable` is the first page that told the new host's time, where that was not the event's own.
        """
        self.guest.watch(event, quiet_s=quiet_s, timeout_s=timeout_s)
        return figures.keep(self.figures(name, event, usable) | more)

    def figures(self, name: str, event: Event, usable: Event | None = None) -> Row:
        samples = self.guest.samples()
        records = self.journal()
        row: Row = {"name": name, "watch": self.watch or "default", "cpus": self.cpus}
        row |= truth.react(samples, event.sequence, event.line)._asdict()
        begin = next(i for i, sample in enumerate(samples) if truth._reached(sample.sequence, event.sequence))
        moment, after = samples[begin - 1].counter, samples[begin:]
        usable_s = 0.0
        if usable:
            told = next(sample for sample in after if truth._reached(sample.sequence, usable.sequence))
            usable_s = event.line.seconds(moment, told.counter)
        if records:
            record = records[-1]
            row["detected_s"] = (detected_ns(record, after) - event.line.ns(moment)) / NANOSECONDS
            usable_s = max(usable_s, row["detected_s"])
            row["unsynchronised_s"] -= usable_s - row["detected_s"]  # chronyd can only wait for the new host to publish
            row["record"] = record
        row["usable_s"] = usable_s
        until_s = row["over_1us_until_s"]
        row["over_1us_after_usable_s"] = None if until_s is None else max(0.0, until_s - usable_s)
        # From the last thing that was done about it: a step is no frequency.
        acted_s = [row["detected_s"] + action["after_ns"] / 1e9 for action in records[-1]["actions"]] if records else []
        return row | settled(after, event, moment, usable_s + 0.01, max(acted_s, default=usable_s))


def detected_ns(record: Row, after: list[truth.Sample]) -> int:
    """True UTC at which the daemon saw the marker.

    The record has the page's UTC where the page had time, else the system clock's, which was off by then.
    """
    detected: int = record["detected_at_ns"]
    elsewhere = detected + after[0].offset_ns
    first = after[0].utc_ns
    return min(detected, elsewhere, key=lambda at: abs(at - first))


def settled(after: list[truth.Sample], event: Event, moment: int, from_s: float, slope_from_s: float) -> Row:
    """How far off the clock was from then on, and how fast it ran away, from then and from the last action on."""
    points = [(event.line.seconds(moment, sample.counter), sample.offset_ns) for sample in after]
    return {
        "worst_after_usable_10ms_ns": max((abs(offset) for at, offset in points if at >= from_s), default=None),
        "frequency_error_10ms_ppm": steepest_ppm([point for point in points if point[0] >= from_s], 0.05),
        "frequency_error_ppm": steepest_ppm([point for point in points if point[0] >= slope_from_s], 0.25),
    }


def steepest_ppm(points: list[tuple[float, int]], span_s: float) -> float | None:
    """The greatest slope over `span_s` (offset in ns, time in s), the steps that the daemon makes left out."""
    smooth, gone_ns = [], 0
    for before, (at, offset) in zip([points[0], *points], points, strict=False) if points else ():
        change = offset - before[1]
        gone_ns += change * (abs(change) > STEP_NS)
        smooth.append((at, offset - gone_ns))
    slopes = []
    for i in range(0, len(smooth), 10):
        j = bisect_left(smooth, (smooth[i][0] + span_s,))
        if j < len(smooth):
            slopes.append(abs(smooth[j][1] - smooth[i][1]) / (smooth[j][0] - smooth[i][0]) / 1e3)
    return max(slopes, default=None)


def compiled(source: str) -> Path:
    """A C program of this directory, compiled for the guest."""
    path = HERE / source
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    program = debs.cache_dir() / "guest" / f"{path.stem}-{digest}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O2", "-static", "-s", "-o", str(unfinished), str(path)]
        subprocess.run(command, check=True, timeout=60)
        unfinished.rename(program)
    return program
