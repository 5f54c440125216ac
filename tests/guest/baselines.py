"""What a user has without this project: chronyd alone on the vmclock PTP clock, measured after a disruption.

``python -m tests.guest.baselines [ROW…]`` measures the rows named, or all, and prints one JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.guest.guest import Event, Guest

DEBIAN = ("driftfile /var/lib/chrony/chrony.drift", "maxupdateskew 100.0", "rtcsync")


class Row(NamedTuple):
    chronyd: tuple[str, ...]
    settle_s: float
    "From synchronised to the event: so that the frequency is known."
    event: Callable[[Guest], Event]


def restore(guest: Guest, lost_s: float) -> Event:
    """A snapshot resumed `lost_s` later, with no need to wait so long: the new host's page says so."""
    guest.save()
    return guest.restore(lost_s=lost_s)


ROWS = {
    "phc-poll-2-lose-0.1:20": Row(
        ("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 -1", *DEBIAN),
        10,
        lambda guest: guest.migrate(lost_s=0.1, frequency_ppm=20),
    ),
    "phc-poll-2-restore-20": Row(
        ("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 -1", *DEBIAN),
        10,
        lambda guest: restore(guest, 20),
    ),
    "phc-poll0-makestep-0.1-restore-20": Row(
        ("refclock PHC /dev/ptp0 poll 0 tai", "makestep 0.1 -1", *DEBIAN),
        20,
        lambda guest: restore(guest, 20),
    ),
}


def measure(row: Row, timeout_s: float = 60.0) -> dict[str, object]:
    with Guest() as guest:
        guest.publish(guest.host_line())
        guest.load_driver()
        guest.sample_clock()
        guest.chronyd(*row.chronyd)
        guest.wait_normal()
        time.sleep(row.settle_s)
        steady = sorted(abs(sample.offset_ns) for sample in guest.samples()[-2000:])
        event = row.event(guest)
        found = guest.watch(event, quiet_s=5, timeout_s=timeout_s)
        return {"steady_median_ns": steady[len(steady) // 2], **found._asdict()}


if __name__ == "__main__":
    for name in sys.argv[1:] or ROWS:
        print(json.dumps({"row": name, **measure(ROWS[name])}), flush=True)
