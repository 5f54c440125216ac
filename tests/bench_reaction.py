"""How long from a new marker in the page to leap 3 in chronyd's NTP answers, and to leap 0 again.

    python -m tests.bench_reaction [N=200]

A simulated page, the real daemon, a real chronyd (-x) that is asked for the time as fast as it answers.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from refclock.simulator import Simulation
from tests import consumers
from tests.consumers.chronyd import Chronyd
from tests.harness import RunningDaemon

MSEC = 1_000_000
QUESTION = bytes([4 << 3 | 3]) + bytes(47)
TIMEOUT_S = 15.0


class Stage:
    """A page of ours, a chronyd that is Normal by it, and the daemon between the two."""

    def __init__(self, directory: Path, simulation: Simulation, chronyd: Chronyd, daemon: RunningDaemon) -> None:
        self.directory = directory
        self.simulation = simulation
        self.chronyd = chronyd
        self.daemon = daemon
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(1.0)
        self._socket.connect(chronyd.ntp_address)

    def leap(self) -> int:
        """The leap indicator of chronyd's answer."""
        self._socket.send(QUESTION)
        return self._socket.recv(512)[0] >> 6

    def wait_leap(self, normal: bool) -> int:
        """Asks as fast as it goes until chronyd is synchronised, or is not; CLOCK_MONOTONIC at that answer, in ns."""
        give_up = time.monotonic() + TIMEOUT_S
        while (self.leap() != 3) != normal:
            if time.monotonic() > give_up:
                raise TimeoutError(f"no leap {'0' if normal else '3'}; the daemon's log:\n{self.daemon.log()[-3000:]}")
        return time.monotonic_ns()

    def disrupt(self, offset_s: float, frequency_ppm: float = 0.0) -> int:
        """A new marker; CLOCK_MONOTONIC once the page shows it, in ns."""
        self.simulation.disrupt(offset_s, frequency_ppm)
        return time.monotonic_ns()

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def stage(directory: Path, build: consumers.Build, poll: int = -4, **options: object) -> Iterator[Stage]:
    """Sets the stage, and waits until chronyd follows the page."""
    simulation = Simulation(str(directory / "page"))
    with Chronyd(build, poll=poll) as chronyd:
        given = {"sock": chronyd.sock_path, "chronyd": chronyd.command_socket, "log_level": "info"} | options
        daemon = RunningDaemon(directory, **given)
        try:
            made = Stage(directory, simulation, chronyd, daemon)
            made.wait_leap(True)
            daemon.wait_state("synchronised")
            yield made
            made.close()
        finally:
            daemon.close()


def reactions(on: Stage, count: int, seed: int = 1) -> tuple[list[float], list[float]]:
    """Milliseconds from the marker to leap 3, and to leap 0 again, of so many disruptions."""
    numbers = random.Random(seed)
    unsynchronised, normal = [], []
    for _ in range(count):
        # At any moment between two looks at the page.
        time.sleep(numbers.uniform(0.02, 0.05))
        begun_ns = on.disrupt(numbers.uniform(-400e-6, 400e-6), numbers.uniform(-100, 100))
        unsynchronised.append((on.wait_leap(False) - begun_ns) / MSEC)
        normal.append((on.wait_leap(True) - begun_ns) / MSEC)
    return unsynchronised, normal


def describe(what: str, figures: list[float]) -> str:
    """The distribution in a line."""
    ordered = sorted(figures)
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * part))] for name, part in PARTS}
    return f"{what:<44} n={len(ordered):<4} " + "  ".join(f"{name} {value:.2f}" for name, value in at.items()) + " ms"


PARTS = (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    build = consumers.find("chronyd", None)
    print(build)
    for poll, watch_s, number in ((-4, "0.01", count), (-4, "0.0005", count), (0, "0.01", count // 10)):
        with (
            tempfile.TemporaryDirectory(prefix="vmclock-") as name,
            stage(Path(name), build, poll, watch=watch_s) as on,
        ):
            unsynchronised, normal = reactions(on, number)
        print(describe(f"poll {poll}, --watch {watch_s}: marker to leap 3", unsynchronised))
        print(describe(f"poll {poll}, --watch {watch_s}: marker to leap 0 again", normal), flush=True)


if __name__ == "__main__":
    main()
