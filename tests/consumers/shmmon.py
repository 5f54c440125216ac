"""gpsd's ntpshmmon, the usual look at the NTP shared memory segments."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from tests.consumers import Build


@dataclass(frozen=True)
class Sample:
    """A line that it prints: a change of a segment. Its "Clock" is the system's time, its "Real" the reference's."""

    unit: int
    seen_ns: int
    system_ns: int
    reference_ns: int
    leap: int
    precision: int

    @property
    def offset_ns(self) -> int:
        """reference - system: positive when the system clock is behind."""
        return self.reference_ns - self.system_ns


def watch(build: Build, count: int, timeout_s: float = 10.0, unit: int | None = None) -> list[Sample]:
    """Run it until it has seen `count` samples (of all units, 0 to 7) or `timeout_s` is over; those of `unit`.

    ntpshmmon leaves the samples to the others: it does not clear the valid flag.
    """
    command = [*build.command("usr/bin/ntpshmmon"), "-n", str(count), "-t", str(max(1, round(timeout_s)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 10, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ntpshmmon: {done.stderr.strip() or done.returncode}")
    samples = []
    for line in done.stdout.splitlines():
        words = line.split()
        if words[:1] == ["sample"]:
            seen, system, reference = map(_nanoseconds, words[2:5])
            samples.append(
                Sample(int(words[1].removeprefix("NTP")), seen, system, reference, int(words[5]), int(words[6]))
            )
    return [sample for sample in samples if unit is None or sample.unit == unit]


def _nanoseconds(text: str) -> int:
    seconds, _point, fraction = text.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
