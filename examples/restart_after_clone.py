#!/usr/bin/env python3
"""A hook for vmclock-refclock: brings services round after this machine was copied, restored or migrated.

    restart_after_clone.py [--reseed] [--off-by S] [--drills] [UNIT...]

In /etc/vmclock-refclock.toml:

    hook = ["/usr/local/lib/vmclock/restart_after_clone.py --reseed --off-by 1 myapp.service"]

The daemon starts it on every event, with the journal's record on standard input and the event's name in
VMCLOCK_EVENT.  What it does:

    disrupted, generation   with --reseed, if the generation moved: this machine is a copy.  Fresh entropy goes into
                            the kernel's random numbers, so that two copies do not draw the same ones.
    recovered               if the clock was off by --off-by seconds or more, or by nobody knows how much, or if this
                            machine is a copy: each UNIT is restarted if it runs (`systemctl try-restart`), now that
                            the clock is right again.
    generation              the same, where the generation moved alone: the clock was right all the time.

A drill is told, and not acted upon without --drills.  Ends with 0, or with 1 when something did not work.  Standard
library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from typing import Any

HWRNG, URANDOM = "/dev/hwrng", "/dev/urandom"
ENTROPY_BYTES = 64
#: _IO('R', 7) of linux/random.h: take up at once what was written.  Needs CAP_SYS_ADMIN.
RNDRESEEDCRNG = 0x5207
RESTART_TIMEOUT_S = 120


def is_copy(record: dict[str, Any]) -> bool:
    """Whether the generation moved, with the marker or without it."""
    return record["generation_before"] != record["generation_after"] and record["generation_before"] is not None


def reseed() -> bool:
    """Mixes what differs from copy to copy into the kernel's random numbers.  Whether all of it worked.

    The host's generator (virtio-rng) is what counts.  The time alone can be guessed.  A kernel that has the VM
    generation device does all this by itself, and sooner.
    """
    entropy = f"{time.time_ns()} {time.monotonic_ns()} {os.getpid()}".encode()
    try:
        with open(HWRNG, "rb", buffering=0) as source:
            entropy += source.read(ENTROPY_BYTES) or b""
        fresh = True
    except OSError as error:
        print(f"no entropy from the host: {HWRNG}: {error.strerror}; give the machine a virtio-rng", file=sys.stderr)
        fresh = False
    try:
        with open(URANDOM, "wb", buffering=0) as sink:
            sink.write(entropy)
            fcntl.ioctl(sink, RNDRESEEDCRNG)
    except OSError as error:
        print(f"not reseeded at once: {URANDOM}: {error.strerror}; CAP_SYS_ADMIN is needed", file=sys.stderr)
        return False
    return fresh


def restart(unit: str) -> bool:
    """Restarts a unit if it runs.  Whether systemd did so."""
    try:
        done = subprocess.run(["systemctl", "try-restart", "--", unit], timeout=RESTART_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{unit} is not restarted: {error}", file=sys.stderr)
        return False
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A hook: restarts services after a disruption, reseeds a copy.")
    parser.add_argument("units", metavar="UNIT", nargs="*", help="restarted if it runs")
    parser.add_argument("--reseed", action="store_true", help="give a copy random numbers of its own")
    parser.add_argument("--off-by", metavar="S", type=float, default=0.0, help="the least error that matters [0]")
    parser.add_argument("--drills", action="store_true", help="act on drills too")
    arguments = parser.parse_args()

    event = os.environ.get("VMCLOCK_EVENT", "")
    if event not in ("disrupted", "generation", "recovered"):
        return 0  # soon and imminent: nothing has happened yet
    record = json.load(sys.stdin)
    if record["kind"] == "drill" and not arguments.drills:
        print(f"{event}: a drill; nothing is restarted without --drills", file=sys.stderr)
        return 0

    done = []
    copied = is_copy(record)
    if arguments.reseed and copied and event in ("disrupted", "generation"):
        done.append(reseed())
    # A page without time cannot say how wrong the clock was: then it was wrong enough.
    matters = record["offset_ns"] is None or abs(record["offset_ns"]) >= arguments.off_by * 1e9
    if event == "generation" or (event == "recovered" and (copied or matters)):
        done += [restart(unit) for unit in arguments.units]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
