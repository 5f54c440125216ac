"""The guest itself: it boots, sees the published page, is disrupted, and is measured to the nanosecond."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest import page
from tests.guest.guest import Guest, GuestError
from tests.guest.page import NANOSECONDS, Page

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

Boot = Callable[..., Guest]

MAPPED = """
import mmap, os
device = os.open("/dev/vmclock0", os.O_RDONLY)
print(mmap.mmap(device, mmap.PAGESIZE, prot=mmap.PROT_READ)[:112].hex())
"""
POLLED = """
import os, select
device = os.open("/dev/vmclock0", os.O_RDONLY)
poll = select.poll()
poll.register(device, select.POLLIN)
os.pread(device, 112, 0)
print("waiting", flush=True)
print(poll.poll(20_000), os.pread(device, 112, 0).hex())
"""


@pytest.fixture
def timed(boot: Boot) -> Guest:
    """A guest whose page tells the host's time, with the driver loaded and the sampler at work."""
    guest = boot()
    guest.publish(guest.host_line())
    guest.load_driver()
    guest.sample_clock()
    return guest


def seen(guest: Guest) -> Page:
    return Page.unpack(bytes.fromhex(guest.python(MAPPED)))


def test_page_as_qemu_leaves_it(boot: Boot) -> None:
    guest = boot()
    guest.load_driver()
    assert guest.shell("ls /dev/ptp0 2>/dev/null || :") == ""
    first = seen(guest)
    assert first == guest.page()
    assert (first.magic, first.version) == (page.MAGIC, 1)
    assert (first.counter_id, first.clock_status) == (page.COUNTER_NONE, page.UNKNOWN)


def test_time_from_the_host(timed: Guest) -> None:
    timed.run("ls", "/dev/ptp0")
    event = timed.publish(timed.host_line(), time_maxerror_nanosec=12_345)
    mapped = seen(timed)
    assert mapped.pack() == timed.page().pack()
    assert (mapped.seq_count, mapped.time_maxerror_nanosec) == (event.sequence, 12_345)

    page.write_sequence(timed._machine, event.sequence + 1)
    with pytest.raises(GuestError, match="TimeoutError"):
        timed.python("import os; os.pread(os.open('/dev/vmclock0', os.O_RDONLY), 112, 0)")
    page.write_sequence(timed._machine, event.sequence)

    timed.chronyd("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 3")
    timed.wait_normal()
    deadline = time.monotonic() + 30
    while abs(timed.samples()[-1].offset_ns) > 1000:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    last = timed.samples()[-1]
    assert (last.leap, last.stratum, last.uncertainty_ns) == (0, 1, 1)


def test_migration_is_measured_exactly(timed: Guest) -> None:
    """Nobody corrects the clock, so the offset is what was lost, plus what the frequency makes of it since."""
    timed.migrate(lost_s=0)  # from here on the offset's slope is the kernel's own
    time.sleep(1)
    event = timed.migrate(lost_s=0.1, frequency_ppm=20, disruption_marker=77)
    time.sleep(1)
    assert seen(timed).disruption_marker == 77
    samples = timed.samples()
    before = [sample for sample in samples if sample.sequence == event.sequence - 2]
    after = [sample for sample in samples if sample.sequence == event.sequence]
    assert {sample.uncertainty_ns for sample in before + after} == {1}

    def slope(points: list) -> float:
        first, last = points[0], points[-1]
        return (last.offset_ns - first.offset_ns) / event.line.seconds(first.counter, last.counter)

    own = slope(before)  # ns/s
    gap_s = event.line.seconds(before[-1].counter, after[0].counter)
    assert slope(after) - own == pytest.approx(20_000, abs=50)
    # The page's line begins some milliseconds before the guest goes on: at 20 ppm, less than a microsecond.
    jump_ns = after[0].offset_ns - before[-1].offset_ns
    assert jump_ns == pytest.approx(0.1 * NANOSECONDS + own * gap_s, abs=1000)
    reaction = timed.reaction(event)
    assert reaction.over_1ms_until_s is None
    assert reaction.watched_s > 0.5


def test_restored_in_a_new_process(timed: Guest) -> None:
    timed.chronyd("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 3")
    timed.wait_normal()
    marker = timed.page().disruption_marker
    first_process = timed._machine.process.pid
    before_save = time.monotonic()
    timed.save()
    time.sleep(2)
    event = timed.restore()
    stored_s = time.monotonic() - before_save
    assert timed._machine.process.pid != first_process
    assert not os.path.exists(f"/proc/{first_process}")
    assert seen(timed).disruption_marker == marker + 1
    assert timed.page().seq_count == event.sequence
    reaction = timed.watch(event, quiet_s=1, timeout_s=1)
    assert 2 < reaction.jump_ns / NANOSECONDS < stored_s


def test_rewound_in_the_same_process(timed: Guest) -> None:
    marker = timed.page().disruption_marker
    before = timed.samples()[-1].offset_ns
    timed.save()
    timed.cont()
    timed.shell("touch /forgotten")
    event = timed.rewind(lost_s=0)
    assert timed.run("ls", "/forgotten", check=False).exit_code == 1
    assert timed.page().disruption_marker == marker + 1
    assert timed.watch(event, timeout_s=1).jump_ns == pytest.approx(before, abs=1_000_000)
    assert timed.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "tsc\n"


def test_restore_notifies(boot: Boot) -> None:
    guest = boot(notification=True)
    guest.publish(guest.host_line(), flags=page.NOTIFICATION_PRESENT)
    guest.load_driver()
    guest.write("/tmp/polled.py", POLLED)
    watcher = guest.start("python3", "/tmp/polled.py")
    deadline = time.monotonic() + 20
    while "waiting" not in watcher.said():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    marker = guest.page().disruption_marker
    guest.save()
    guest.restore(lost_s=1)
    assert watcher.wait() == 0
    events, content = watcher.said().splitlines()[-1].rsplit(" ", 1)
    assert events == "[(3, 1)]"
    assert Page.unpack(bytes.fromhex(content)).disruption_marker == marker + 1


def test_wheel_and_overlay(boot: Boot, tmp_path: Path) -> None:
    wheel = tmp_path / "greeting-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("greeting.py", "def main():\n    print('hello')\n    return 3\n")
        entries = "[console_scripts]\ngreet = greeting:main\n"
        archive.writestr("greeting-1.dist-info/entry_points.txt", entries)
    guest = boot(overlay={"/etc/greeting": b"from the overlay"})
    guest.install_wheel(wheel)
    assert guest.run("greet", check=False) == (3, "hello\n", "")
    assert guest.read("/etc/greeting") == b"from the overlay"


def test_nothing_is_left(boot: Boot) -> None:
    guest = boot()
    process, directory = guest._machine.process, guest.directory
    guest.start("sleep", "1000")
    guest.close()
    assert process.poll() is not None
    assert not directory.exists()

    with pytest.raises(RuntimeError), boot() as guest:
        process, directory = guest._machine.process, guest.directory
        raise RuntimeError
    assert process.poll() is not None
    assert sorted(path.name for path in directory.glob("*.log")) == ["console.log", "qemu.log"]
    guest.keep = False
