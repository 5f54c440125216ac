"""Takes out of a copy of the source, one by one, what keeps time right after a disruption: tests must notice.

    python -m tests.mutate [WORD...]        only the mutations whose names hold one of the words

The tests with the real daemon run where the pure ones notice nothing, and for what must be noticed by both. Prints a
table; the exit status is 1 where a mutation went unnoticed. What runs here cannot set this machine's clock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.harness import ROOT, environment, never_set_the_clock

#: The tests that are to notice: the pure ones, and a few with the real daemon.
PURE = ["tests/test_policy.py", "tests/test_reaction.py"]
REAL = [
    "tests/test_disruption.py",
    "-k",
    "users_see_it or shared_memory or restarted_across or middle_of or new_frequency or sixty",
]
TIMEOUT_S = 300


class Mutation(NamedTuple):
    """One thing taken out: in which file, what, and what is put in its place."""

    name: str
    file: str
    old: str
    new: str
    by_both: bool = False


MUTATIONS = (
    Mutation(
        "the sinks are not invalidated (policy)",
        "policy.py",
        '[("invalidate", None), ("react", self._open)]',
        '[("react", self._open)]',
        by_both=True,
    ),
    Mutation(
        "the sinks are not invalidated (service)", "service.py", "            sink.invalidate()\n", "            pass\n"
    ),
    Mutation(
        "no first reset",
        "reaction.py",
        '        record.note(now_ns, "invalidate", True)\n        self._reset_sources(record, now_ns)\n',
        '        record.note(now_ns, "invalidate", True)\n',
        by_both=True,
    ),
    Mutation(
        "no second reset",
        "reaction.py",
        "        self._reset_sources(record, now_ns)\n        self._bursting = False\n",
        "        self._bursting = False\n",
        by_both=True,
    ),
    Mutation(
        "no reset after the fallback",
        "reaction.py",
        "            self._reset_sources(record, now_ns)\n            self._last_by",
        "            self._last_by",
    ),
    Mutation(
        "the marker is not compared",
        "policy.py",
        "if markers[0] is not None and markers[0] != markers[1]:",
        "if False:",
        by_both=True,
    ),
    Mutation(
        "only a greater marker counts",
        "policy.py",
        "markers[0] is not None and markers[0] != markers[1]",
        "markers[0] is not None and markers[0] < markers[1]",
    ),
    Mutation(
        "the marker is not remembered", "service.py", "remembered=self._last_seen.load(),", "remembered=(None, None),"
    ),
    Mutation(
        "an open disruption is forgotten by a restart", "service.py", " and self._policy.open_record is None:", ":"
    ),
    Mutation(
        "it is fed before the clock is corrected",
        "policy.py",
        "self._uncorrected = self.corrects\n",
        "self._uncorrected = False\n",
    ),
    Mutation("recovered without chronyd", "policy.py", "self._fed and self.chronyd_normal is not False", "self._fed"),
    Mutation(
        "recovered by a clock that is far off",
        "policy.py",
        'self._judged[0] in ("synchronised", "holdover") and self._fed',
        "self._fed",
    ),
    Mutation(
        "what chronyd said before the reset counts",
        "reaction.py",
        "return self._tracking is None and (self._reset is None or self._reset.ok is not None)",
        "return self._tracking is None",
    ),
    Mutation(
        "a superseded record stays open",
        "policy.py",
        '            superseded.superseded_by = self._open.id\n            actions.append(("closed", superseded))\n',
        "            pass\n",
    ),
    Mutation(
        "dfreq has the other sign", "reaction.py", '(record, "dfreq", dfreq(-ppm)', '(record, "dfreq", dfreq(ppm)'
    ),
    Mutation(
        "a new chronyd is told the other sign",
        "reaction.py",
        '(None, "dfreq", dfreq(-ppm)',
        '(None, "dfreq", dfreq(ppm)',
    ),
    Mutation(
        "a new chronyd is told nothing",
        "reaction.py",
        "                self._is_owed = True\n",
        "                pass\n",
    ),
    Mutation(
        "a new chronyd is told by a page that is not believed",
        "reaction.py",
        " or self._policy.offset_ns is None:",
        ":",
    ),
    Mutation("no dfreq", "reaction.py", 'self._awaited = self._command(record, "dfreq", dfreq(-ppm), now_ns)', "pass"),
    Mutation(
        "the slew's rate is taken for the clock's",
        "reaction.py",
        "if self._hears() and self._base_rate is None:",
        "if False:",
    ),
    Mutation(
        "what chronyd said last is never put right",
        "reaction.py",
        "if self._hears() and left_ppm is not None and abs(left_ppm) >= LEAST_PPM:",
        "if False:",
    ),
    Mutation(
        "the kernel's frequency is left to chronyd",
        "reaction.py",
        "if self._is_device and rate is not None:\n            try:",
        "if False:\n            try:",
    ),
    Mutation(
        "the rest is left",
        "reaction.py",
        "if self._stepped and abs(sample.offset_ns) > sample.uncertainty_ns:",
        "if False:",
    ),
    Mutation(
        "the rest is stepped again and again",
        "reaction.py",
        '        self._policy.corrected()\n        return "follow"\n\n    def _do_follow',
        '        return "settle"\n\n    def _do_follow',
    ),
    Mutation(
        "a simulation steps the clock", "reaction.py", "self._clock.step(self._is_device,", "self._clock.step(True,"
    ),
    Mutation(
        "a simulation flags the clock",
        "reaction.py",
        "self._clock.flag_unsynchronised(self._is_device)",
        "self._clock.flag_unsynchronised(True)",
    ),
    Mutation("without the right it is tried all the same", "reaction.py", "and not self._clock.may_set()", "and False"),
    Mutation(
        "a wide bound counts as good",
        "policy.py",
        "if bound_ns is not None and bound_ns > self._max_error_ns:",
        "if False:",
    ),
    Mutation("a disturbed pair is fed", "policy.py", "if sample.uncertainty_ns > MOST_UNCERTAINTY_NS:", "if False:"),
)


def main() -> int:
    words = sys.argv[1:]
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    rows = [("nothing is taken out", *notice(None))]
    print(row(*rows[0]), flush=True)
    if rows[0][1] or rows[0][2]:
        print("the tests fail without a mutation: there is nothing to compare with")
        return 1
    for mutation in chosen:
        rows.append((mutation.name, *notice(mutation)))
        print(row(*rows[-1]), flush=True)
    unnoticed = [name for name, pure, real, _ in rows[1:] if not pure and not real]
    print(f"{len(rows) - 1} mutations, {len(unnoticed)} unnoticed{': ' if unnoticed else ''}{', '.join(unnoticed)}")
    return 1 if unnoticed else 0


def row(name: str, pure: str, real: str, seconds: float) -> str:
    return f"{name:<50} {pure or '-':<56} {real or '-':<50} {seconds:5.1f} s"


def notice(mutation: Mutation | None) -> tuple[str, str, float]:
    """The first pure test and the first real test that fail, each empty where none does; and how long it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmclock-mutant-") as name:
        copy = Path(name)
        for part in ("refclock", "tests", "shm"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.c.orig"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutation is not None:
            source = copy / "refclock" / mutation.file
            text = source.read_text()
            assert text.count(mutation.old) == 1, (
                f"{mutation.name}: {text.count(mutation.old)} places in {mutation.file}"
            )
            source.write_text(text.replace(mutation.old, mutation.new))
        pure = first_failure(copy, PURE)
        everything = mutation is None or mutation.by_both or not pure
        real = first_failure(copy, REAL) if everything else "(not asked)"
    return pure, real, time.monotonic() - started


def first_failure(copy: Path, tests: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=60", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment() | {"PYTHONPATH": str(copy)},
            preexec_fn=never_set_the_clock,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "(hangs)"
    if done.returncode == 0:
        return ""
    failed = [
        line.split("::")[1].split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    return failed[0] if failed else f"(exit {done.returncode}) {done.stdout.strip().splitlines()[-1:]}"


if __name__ == "__main__":
    sys.exit(main())
