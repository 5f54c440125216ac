"""Torn reads: none, however fast the page is written; and a page that is written for ever is given up in time."""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refclock import model
from refclock.errors import PageStalled
from refclock.hypervisor import PageWriter
from refclock.model import Snapshot, encode
from refclock.page import LOCAL_COUNTER_ID, Page
from tests.harness import environment, make_page, write_page

SEQ_COUNT = 0x0C

# ---- Native writers and readers -----------------------------------------------------------------------------


def torture(program: Path, *arguments: str, timeout_s: float = 100) -> list[dict[str, int]]:
    """Runs it to its end; the figures of each reader."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)
    print(done.stdout, end="")
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    return [{k: int(v) for k, v in re.findall(r"(\w+) (\d+)", line)} for line in done.stdout.splitlines()]


def is_sound(figures: list[dict[str, int]], readers: int) -> None:
    assert len(figures) == readers
    for one in figures:
        assert one["torn"] == one["backwards"] == 0, one
        assert one["distinct"] >= 2000, one


def test_ten_million_reads_of_a_mapping(native: Callable[..., Path]) -> None:
    is_sound(torture(native("page_torture"), "10000000", "map"), 1)


def test_two_readers_at_once(native: Callable[..., Path]) -> None:
    is_sound(torture(native("page_torture"), "1000000", "map", "2"), 2)


def test_reads_through_a_descriptor(native: Callable[..., Path]) -> None:
    is_sound(torture(native("page_torture"), "20000", "pread"), 1)


@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_no_optimisation_matters(native: Callable[..., Path], optimisation: str) -> None:
    is_sound(torture(native("page_torture", optimisation), "1000000", "map"), 1)


def test_under_the_sanitizers(native: Callable[..., Path]) -> None:
    flags = ("-g", "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
    is_sound(torture(native("page_torture", *flags), "200000", "map"), 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_million_reads(native: Callable[..., Path]) -> None:
    is_sound(torture(native("page_torture"), "1000000000", "map", timeout_s=1700), 1)


# ---- Page against a PageWriter in another process -----------------------------------------------------------

VARIANTS = 61
#: A page whose every field is a function of n. Its period is 0, so that its time is, too.
WRITER = """
import random, sys
from refclock.hypervisor import PageWriter
from tests.test_seqlock import VARIANTS, variant

writer = PageWriter(sys.argv[1])
pages = [variant(n) for n in range(VARIANTS)]
pauses = [range(random.randrange(2000)) for _ in range(997)]
writer.publish(pages[0])
print("ready", flush=True)
number = 0
while True:
    number += 1
    writer.publish(pages[number % VARIANTS])
    for _ in pauses[number % 997]:
        pass
"""


def variant(n: int) -> bytes:
    return encode(
        {
            "magic": model.MAGIC,
            "size": 4096,
            "version": 1,
            "counter_id": LOCAL_COUNTER_ID,
            "time_type": model.TIME_TAI,
            "disruption_marker": n,
            "flags": model.TAI_OFFSET_VALID | model.TIME_ESTERROR_VALID | model.TIME_MAXERROR_VALID,
            "clock_status": 2 + n % 2,
            "tai_offset_sec": -37,
            "counter_value": n * 10**12,
            "counter_period_maxerror_rate_frac_sec": n,
            "time_sec": 1_800_000_000 + n * n,
            "time_frac_sec": (n % 2) << 63,
            "time_esterror_nanosec": 3 * n,
            "time_maxerror_nanosec": 7 * n + 1,
            "vm_generation_counter": ~n % 2**64,
        }
    )


@pytest.fixture
def fast_writer(short_path: Path) -> Iterator[Path]:
    """A page that another process changes every few microseconds."""
    path = short_path / "page"
    root = str(Path(__file__).parent.parent)
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{root}"}
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield path
        finally:
            process.kill()


@pytest.mark.parametrize("access", ["map", "pread"])
def test_every_snapshot_is_of_one_update(fast_writer: Path, access: str) -> None:
    expected = [Snapshot(variant(n)).fields() for n in range(VARIANTS)]
    seen = set()
    reads = 0
    give_up = time.monotonic() + 60
    with Page(fast_writer, access=access) as page:
        assert page.access == access
        while reads < 20_000 or len(seen) < 500:
            assert time.monotonic() < give_up, (reads, len(seen))
            with contextlib.suppress(PageStalled):  # the writer may lose its CPU for long
                fields = page.read().fields()
                seen.add(fields.pop("seq_count"))
                wanted = expected[fields["disruption_marker"]]
                assert fields == {name: value for name, value in wanted.items() if name != "seq_count"}
                reads += 1


@pytest.mark.parametrize("access", ["map", "pread"])
def test_every_sample_is_of_one_update(fast_writer: Path, access: str) -> None:
    samples = stalls = 0
    markers = set()
    give_up = time.monotonic() + 60
    with Page(fast_writer, access=access) as page:
        while samples < 5000 or len(markers) < VARIANTS:
            assert time.monotonic() < give_up, (samples, stalls, markers)
            try:
                sample = page.sample(readings=2)
            except PageStalled:
                stalls += 1
                continue
            n = sample.disruption_marker
            samples += 1
            markers.add(n)
            assert sample.reference_ns == (1_800_000_000 + n * n - 37) * 10**9 + n % 2 * 500_000_000
            assert (sample.esterror_ns, sample.maxerror_ns) == (3 * n, 7 * n + 1)
            assert sample.clock_status == ("synchronized", "freerunning")[n % 2]
    print(f"{access}: {samples} samples, {stalls} stalls")


#: Each update has a new marker; the counter after it is put down for the marker.
DATED = """
import mmap, random, struct, sys
from refclock.hypervisor import PageWriter
from refclock.page import read_counter
from tests.test_seqlock import MOST_DATED, variant

writer = PageWriter(sys.argv[1])
with open(sys.argv[2], "w+b") as file:
    file.truncate(8 * MOST_DATED)
    after = mmap.mmap(file.fileno(), 8 * MOST_DATED)
page = bytearray(variant(0))
pauses = [range(random.randrange(500)) for _ in range(997)]
for number in range(1, MOST_DATED):
    struct.pack_into("<Q", page, 0x10, number)
    writer.publish(bytes(page))
    struct.pack_into("<Q", after, 8 * number, read_counter())
    if number == 1:
        print("ready", flush=True)
    for _ in pauses[number % 997]:
        pass
"""
MOST_DATED = 1_000_000


def test_a_sample_is_over_before_the_next_update(short_path: Path) -> None:
    """Whoever sees an old marker has read the counter while that marker stood: no pair reaches past a disruption."""
    path, dates = short_path / "page", short_path / "dates"
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parent.parent}"}
    command = [sys.executable, "-c", DATED, str(path), str(dates)]
    taken: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            give_up = time.monotonic() + 60
            with Page(path) as page:
                while len(taken) < 300 and process.poll() is None:
                    assert time.monotonic() < give_up
                    with contextlib.suppress(PageStalled):
                        sample = page.sample(readings=48)
                        taken[sample.disruption_marker] = sample.counter
        finally:
            process.kill()
            process.wait()
    after = struct.unpack(f"<{MOST_DATED}Q", dates.read_bytes())
    pairs = [(counter, after[marker + 1]) for marker, counter in taken.items() if after[marker + 1]]
    assert len(pairs) > 200
    assert all(counter < ended for counter, ended in pairs)


def test_a_page_that_never_stands_still_is_given_up(fast_writer: Path) -> None:
    """64 readings take longer than any pause of the writer: either one was luckily long, or it is said in time."""
    with Page(fast_writer) as page:
        for _ in range(10):
            began = time.monotonic()
            with contextlib.suppress(PageStalled):
                page.sample(readings=64)
            assert time.monotonic() - began < 1.0


# ---- A writer that died half-way ----------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["map", "pread"])
def test_an_odd_sequence_is_given_up_within_150_ms(short_path: Path, access: str) -> None:
    path = short_path / "page"
    writer = PageWriter(path)
    writer.publish(variant(5))
    with Page(path, access=access) as page:
        assert page.read().disruption_marker == 5
        writer.begin_update()
        for take in (page.read, page.sample):
            fastest = float("inf")
            for _ in range(10):
                began, busy = time.monotonic(), time.process_time()
                with pytest.raises(PageStalled) as stalled:
                    take()
                elapsed, busy = time.monotonic() - began, time.process_time() - busy
                assert elapsed >= 0.1
                assert busy < 0.05, "it must not burn the CPU that the writer needs"
                fastest = min(fastest, elapsed)
                if fastest < 0.15:
                    break
            assert fastest < 0.15
            assert stalled.value.errno == 110
            assert "\n" not in str(stalled.value)
        with pytest.raises(PageStalled):
            Page(path, access=access)
        writer.publish(variant(6))
        assert page.read().disruption_marker == 6
        assert page.sample().disruption_marker == 6


def test_an_update_that_ends_meanwhile_is_waited_for(short_path: Path) -> None:
    """50 ms of writing are no stall."""
    code = """
import sys, time
from refclock.hypervisor import PageWriter
from tests.test_seqlock import variant
writer = PageWriter(sys.argv[1])
writer.publish(variant(5))
print("ready", flush=True)
sys.stdin.readline()
writer.begin_update()
print("odd", flush=True)
time.sleep(0.05)
writer.publish(variant(6))
sys.stdin.readline()
"""
    root = str(Path(__file__).parent.parent)
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{root}"}
    command = [sys.executable, "-c", code, str(short_path / "page")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with Page(short_path / "page") as page:
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == "odd\n"
                assert page.read().disruption_marker == 6
        finally:
            process.kill()


# ---- The sequence's own numbers -----------------------------------------------------------------------------


def test_a_sequence_of_zero_is_a_page_like_any_other(short_path: Path) -> None:
    """A page that was never updated: Firecracker's at its first boot."""
    with Page(write_page(short_path / "page", make_page(seq_count=0, disruption_marker=7))) as page:
        assert page.read().disruption_marker == 7
        assert page.read().seq_count == 0


def test_the_sequence_wraps(short_path: Path) -> None:
    path = write_page(short_path / "page", make_page(seq_count=0xFFFFFFFE, disruption_marker=1))
    with Page(path) as page, open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        assert page.read().seq_count == 0xFFFFFFFE
        struct.pack_into("<I", memory, SEQ_COUNT, 0xFFFFFFFF)
        with pytest.raises(PageStalled):
            page.read()
        struct.pack_into("<Q", memory, 0x10, 2)
        struct.pack_into("<I", memory, SEQ_COUNT, 0)
        assert page.read().disruption_marker == 2
        assert page.wait(time.monotonic_ns() + 10**6, 10**6, [])[0] is False


def test_a_change_without_the_sequence_is_seen_all_the_same(short_path: Path) -> None:
    """A writer that forgets to count: the next read shows what is there."""
    path = write_page(short_path / "page", make_page(disruption_marker=1))
    with Page(path) as page, open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        struct.pack_into("<Q", memory, 0x10, 9)
        assert page.read().disruption_marker == 9


def test_the_writer_counts_by_two(short_path: Path) -> None:
    path = short_path / "page"
    writer = PageWriter(path)
    counts = []
    for n in range(3):
        writer.publish(variant(n))
        counts.append(struct.unpack_from("<I", path.read_bytes(), SEQ_COUNT)[0])
    writer.begin_update()
    counts.append(struct.unpack_from("<I", path.read_bytes(), SEQ_COUNT)[0])
    writer.end_update()
    counts.append(struct.unpack_from("<I", path.read_bytes(), SEQ_COUNT)[0])
    assert counts == [2, 4, 6, 7, 8]
