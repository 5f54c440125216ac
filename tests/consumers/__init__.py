"""Programs that take our time, started for tests: real ones, several versions, each in a directory of its own.

    with Chronyd(build("chronyd", "trixie")) as chronyd:      # skips the test, loudly, if it cannot be had
        …

Nothing here knows the package under test, and none of these programs can set this machine's clock: chronyd runs with
``-x`` and without the capability, the others in a user namespace (`namespace`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from tests import debs

#: What each consumer is unpacked from, and whether the closure of its libraries comes with it (else they are named).
_PACKAGES = {
    "chronyd": (["chrony"], True),
    "ntpd": (["ntpsec"], True),
    "ntpd-rs": (["ntpd-rs"], True),
    "ntpshmmon": (["gpsd", "libc6"], False),  # gpsd's own closure holds a desktop
}

#: The program that stands for the consumer, below the prefix.
_PROGRAM = {
    "chronyd": "usr/sbin/chronyd",
    "ntpd": "usr/sbin/ntpd",
    "ntpd-rs": "usr/bin/ntp-daemon",
    "ntpshmmon": "usr/bin/ntpshmmon",
}

#: The suites that the default tests use: chrony 4.3, 4.6 and newest; NTPsec 1.2.2, 1.2.3 and newest; and so on.
SUITES = {
    "chronyd": ("bookworm", "trixie", "sid"),
    "ntpd": ("bookworm", "trixie", "sid"),
    "ntpd-rs": ("trixie", "sid"),
    "ntpshmmon": ("bookworm", "trixie"),
}

#: Stands for a suite: the machine's own program.
INSTALLED = "installed"


@dataclass(frozen=True)
class Build:
    """One version of a consumer. `prefix` is where it was unpacked, None for the machine's own."""

    consumer: str
    suite: str
    version: str
    prefix: Path | None

    def command(self, path: str) -> list[str]:
        """The command line of one of its programs, such as ``usr/bin/chronyc``."""
        if self.prefix is not None:
            return debs.program(self.prefix, path)
        installed = shutil.which(Path(path).name, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin")
        if installed is None:
            raise debs.Unobtainable(f"{Path(path).name} is not installed")
        return [installed]

    @property
    def upstream(self) -> tuple[int, ...]:
        """The upstream version as numbers: (4, 6, 1)."""
        return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[-+]", self.version)[0]))

    def __str__(self) -> str:
        return f"{self.consumer} {'.'.join(map(str, self.upstream))} ({self.suite})"


@dataclass
class Report:
    """What this test session had and what it had to skip: consumer -> builds, consumer -> reasons."""

    obtained: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def missing(self, required: tuple[str, ...] = ("chronyd", "ntpd")) -> list[str]:
        """The required consumers of which at least one build was asked for in vain."""
        return [consumer for consumer in required if self.skipped.get(consumer)]

    def lines(self) -> list[str]:
        """For the end of a test run."""
        had = [f"{consumer}: {', '.join(builds)}" for consumer, builds in sorted(self.obtained.items())]
        lost = [
            f"{consumer}: SKIPPED, {reason}" for consumer, reasons in sorted(self.skipped.items()) for reason in reasons
        ]
        return had + lost


_report = Report()
_builds: dict[tuple[str, str], Build | debs.Unobtainable] = {}


def report() -> Report:
    """What `build` gave and refused so far, in this process."""
    return _report


def skip(consumer: str, reason: str) -> NoReturn:
    """Skip the running test because of a consumer that cannot be had or cannot run here, and remember it."""
    if reason not in _report.skipped[consumer]:
        _report.skipped[consumer].append(reason)
    pytest.skip(f"{consumer} CANNOT BE TESTED HERE: {reason}")


def build(consumer: str, suite: str | None = None) -> Build:
    """A version of ``chronyd``, ``ntpd`` (NTPsec's), ``ntpd-rs`` or ``ntpshmmon``, unpacked if it is not yet.

    `suite` is one of `SUITES` or `INSTALLED`; by default trixie's, or the machine's own where no Debian mirror is at
    hand. Skips the running test if it cannot be had; `report` tells.
    """
    try:
        return find(consumer, suite)
    except debs.Unobtainable as error:
        skip(consumer, f"{suite or 'any suite'}: {error}")


def find(consumer: str, suite: str | None = None) -> Build:
    """Like `build`, but raises `debs.Unobtainable`. A refusal is remembered, so that it is waited for once."""
    if suite is None:
        try:
            return find(consumer, "trixie")
        except debs.Unobtainable:
            return find(consumer, INSTALLED)
    key = consumer, suite
    if key not in _builds:
        try:
            _builds[key] = _make(consumer, suite)
            _report.obtained[consumer].append(str(_builds[key]))
        except debs.Unobtainable as error:
            _builds[key] = error
    found = _builds[key]
    if isinstance(found, debs.Unobtainable):
        raise found
    return found


def installed_versions(consumer: str) -> list[tuple[str, Build]]:
    """The builds that this process has obtained: [("4.3", Build), …]."""
    found = [item for item in _builds.values() if isinstance(item, Build) and item.consumer == consumer]
    return sorted((".".join(map(str, item.upstream)), item) for item in found)


def fetch_all() -> int:
    """Unpack everything that the default tests use, a line each; the number of those that cannot be had."""
    failures = 0
    for consumer, suites in SUITES.items():
        for suite in suites:
            started = time.monotonic()
            try:
                found = find(consumer, suite)
                print(f"  {found}: {time.monotonic() - started:.1f} s", flush=True)
            except debs.Unobtainable as error:
                failures += 1
                print(f"  {consumer} ({suite}): UNOBTAINABLE, {error}", flush=True)
    return failures


def _make(consumer: str, suite: str) -> Build:
    if suite == INSTALLED:
        found = Build(consumer, suite, "", None)
        options = ["-V"] if consumer == "ntpshmmon" else ["--version"]
        command = found.command(_PROGRAM[consumer]) + options
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        version = re.search(r"\d+(\.\d+)+", output.stdout + output.stderr)
        return Build(consumer, suite, version[0] if version else "0", None)
    packages, with_depends = _PACKAGES[consumer]
    prefix = debs.unpack(packages, suite=suite, with_depends=with_depends)
    return Build(consumer, suite, debs.unpacked(prefix)[packages[0]], prefix)
