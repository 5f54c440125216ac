"""Pages that tell of disruptions only: chronyd's NTP server, or a PTP clock, has the time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.guest import page
from tests.guest.figures import CONTINUED_S, RESTORED_S, SLACK, keep
from tests.guest.guest import Event
from tests.guest.scenarios import DEBIAN, PATIENCE_S, REFCLOCK, Lab, compiled
from tests.harness import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

#: The time fields tell the sampler, the PTP clock and the NTP server the truth; to the daemon it is a page without.
TIMELESS = {"counter_id": page.COUNTER_NONE, "clock_status": page.UNKNOWN}
NTP_PORT = 1123
NTP = f"server 127.0.0.1 port {NTP_PORT} iburst minpoll 4 maxpoll 4"


def boot(lab: Lab, *options: str) -> None:
    """As Lab.boot, with an NTP server in the guest; the page loses its time once the driver has its PTP clock."""
    lab.guest.start("/usr/bin/ntp_server", str(NTP_PORT))
    lab.prepare()
    lab.guest.publish(lab.guest.truth.last, **TIMELESS)
    lab.start_chronyd(REFCLOCK, NTP, *DEBIAN)
    lab.start_daemon(*options)
    lab.state("watching")
    lab.wait()


def served() -> Lab:
    return Lab(overlay={"/usr/bin/ntp_server": compiled("ntp_server.c")})


def test_ntp() -> None:
    with served() as lab:
        boot(lab)
        time.sleep(10)
        keep({"name": "steady on NTP", **lab.steady()})
        for name, cause in (
            ("no time, NTP: lose 20", lambda: lab.guest.migrate(lost_s=20, **TIMELESS)),
            ("no time, NTP: restore 20", lambda: restored(lab, **TIMELESS)),
        ):
            check_ntp(lab, name, cause)


def restored(lab: Lab, **fields: int) -> Event:
    lab.guest.save()
    return lab.guest.restore(lost_s=20, **fields)


def check_ntp(lab: Lab, name: str, cause: Callable[[], Event]) -> None:
    event = cause()
    lab.recovered()
    # What follows is as good as the NTP server is: the promise is about the first seconds.
    row = lab.row(name, event, timeout_s=1)
    flagged_s = row["over_1ms_while_normal_s"]
    assert flagged_s <= (RESTORED_S if "restore" in name else CONTINUED_S) * SLACK
    actions = {action["name"]: action for action in row["record"]["actions"]}
    assert actions["burst"]["ok"] and actions["makestep"]["ok"]
    assert row["over_1ms_until_s"] is not None and row["over_1ms_until_s"] <= 10


def test_fallback() -> None:
    with served() as lab:
        boot(lab, "--fallback", "/dev/ptp0")
        known = "fallback /dev/ptp0: says TAI, 37 s ahead"
        wait_until(lambda: known in lab.daemon.said(), PATIENCE_S, "the fallback's time scale")
        for name, cause in (
            ("no time, fallback: lose 20, first", lambda: lab.guest.migrate(lost_s=20, **TIMELESS)),
            ("no time, fallback: lose 20", lambda: lab.guest.migrate(lost_s=20, **TIMELESS)),
            ("no time, fallback: restore 20", lambda: restored(lab, **TIMELESS)),
        ):
            event = cause()
            lab.recovered()
            row = lab.row(name, event, timeout_s=1)
            lab.wait()
            assert row["over_1ms_until_s"] is not None
            assert row["over_1ms_until_s"] <= (CONTINUED_S if name.endswith("lose 20") else RESTORED_S) * SLACK
