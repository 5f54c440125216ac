"""Page: what it takes for a page and what not, what a sample is made of, and a file that is pulled away from it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refclock
from refclock import model
from refclock.errors import (
    NotPermitted,
    PageInvalid,
    PageStalled,
    RefclockError,
    SampleWithheld,
    Unavailable,
    UsageError,
)
from refclock.model import FIELDS
from refclock.page import LOCAL_COUNTER_ID, Page, Sample, counter_period_ns, error_ns, pair, read_counter, time_ns
from tests.harness import Simulator, environment, make_page, run, write_page

NSEC_PER_SEC = 10**9
PageFile = Callable[..., Path]
ACCESSES = ("map", "pread")


def one_line(error: BaseException) -> str:
    """Its text, which must say something in one line."""
    text = str(error)
    assert text and "\n" not in text, repr(text)
    return text


# ---- What it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["auto", *ACCESSES])
def test_a_sound_page(page_file: PageFile, access: str) -> None:
    path = page_file(disruption_marker=77)
    with Page(path, access=access) as page:
        assert page.access == ("map" if access == "auto" else access)
        assert (page.path, page.kind, page.is_device) == (str(path), "time", False)
        assert page.read().raw == path.read_bytes()[:112]
        assert page.snapshot.disruption_marker == 77
        assert page.snapshot.fields().keys() == {name for name, _, _ in FIELDS}
        assert page.still_there()
        assert not page.notifies


def test_the_package_offers_it(page_file: PageFile) -> None:
    with refclock.Page(page_file()) as page:
        assert isinstance(page.read(), refclock.Snapshot)
        assert isinstance(page.sample(readings=8), refclock.Sample)
    for name in refclock.__all__:
        assert hasattr(refclock, name)


def test_a_path_of_bytes_and_one_that_is_no_utf_8(short_path: Path) -> None:
    path = os.fsencode(short_path) + b"/p\xe4ge"
    with open(path, "wb") as file:
        file.write(make_page().ljust(4096, b"\0"))
    with Page(path) as page:
        assert page.still_there()
        page.sample()
    with Page(os.fsdecode(path)) as page:
        page.sample()


def test_a_page_of_all_the_types(page_file: PageFile) -> None:
    for number, name in enumerate(model.TIME_TYPES):
        with Page(page_file(time_type=number)) as page:
            assert page.kind == ("time" if name in ("utc", "tai") else "signal"), name


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"counter_id": 0xFF}, "signal"),
        ({"counter_id": 1 - LOCAL_COUNTER_ID}, "signal"),
        ({"flags": 0}, "signal"),
        ({"flags": 0, "time_type": 0}, "time"),
        ({"size": 24}, "signal"),
        ({"size": 40}, "signal"),
        ({"size": 104}, "time"),
        ({"size": 112}, "time"),
        ({"size": 1 << 31}, "time"),
        ({"flags": 2**64 - 1}, "time"),
    ],
)
@pytest.mark.parametrize("access", ACCESSES)
def test_the_kind_of_a_page(page_file: PageFile, access: str, fields: dict[str, int], kind: str) -> None:
    with Page(page_file(**fields), access=access) as page:
        assert page.kind == kind
        if kind == "time":
            assert page.sample().maxerror_ns is None or page.sample().maxerror_ns >= 10_000
        else:
            with pytest.raises(SampleWithheld) as withheld:
                page.sample()
            assert withheld.value.cause == "signal"
            one_line(withheld.value)


def test_a_short_file_that_its_size_covers_is_a_page(page_file: PageFile) -> None:
    for access in ACCESSES:
        with Page(page_file(size=104, length=0), access=access) as page:
            assert page.snapshot.vm_generation_counter is None
        with Page(page_file(name="small", size=112, length=0), access=access) as page:
            assert page.sample().maxerror_ns is not None


# ---- What it is not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"magic": 0}, "magic 0x00000000, not 0x4b4c4356"),
        ({"magic": 0x56434C4B}, "magic 0x56434c4b"),
        ({"version": 0}, "version 0"),
        ({"version": 2}, "version 2, this program knows 1; upgrade it"),
        ({"version": 65535}, "version 65535"),
        ({"size": 0}, "size 0"),
        ({"size": 16}, "size 16"),
        ({"size": 23}, "size 23"),
    ],
)
@pytest.mark.parametrize("access", ACCESSES)
def test_another_content(page_file: PageFile, access: str, fields: dict[str, int], words: str) -> None:
    with pytest.raises(PageInvalid, match="no vmclock page") as invalid:
        Page(page_file(**fields), access=access)
    assert words in one_line(invalid.value)


@pytest.mark.parametrize("length", [0, 1, 4, 12, 15, 16, 23, 50, 103, 111])
@pytest.mark.parametrize("access", ACCESSES)
def test_a_file_that_ends_too_early(short_path: Path, access: str, length: int) -> None:
    path = short_path / "page"
    path.write_bytes(make_page(size=112)[:length])
    with pytest.raises(PageInvalid) as invalid:
        Page(path, access=access)
    assert "too short" in one_line(invalid.value) or f"only {length} bytes" in str(invalid.value)


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


def make_loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        pytest.param(lambda path: path, Unavailable, "No such file", id="missing"),
        pytest.param(lambda path: path / "below", Unavailable, "No such file", id="missing directory"),
        pytest.param(lambda path: write_page(path, b"") / "below", Unavailable, "Not a directory", id="below a file"),
        pytest.param(lambda path: path.parent, PageInvalid, "a directory", id="directory"),
        pytest.param(make_fifo, PageInvalid, "a FIFO", id="fifo"),
        pytest.param(make_socket, Unavailable, "No such device", id="socket"),
        pytest.param(make_loop, RefclockError, "symbolic links", id="loop"),
        pytest.param(lambda _: Path("/dev/null"), PageInvalid, "too short", id="null"),
        pytest.param(lambda _: Path("/dev/zero"), PageInvalid, "magic", id="zero"),
        pytest.param(lambda _: Path("/dev/full"), PageInvalid, "magic", id="full"),
        pytest.param(lambda _: Path("/proc/self/mem"), RefclockError, "", id="mem"),
        pytest.param(lambda _: "", Unavailable, "No such file", id="empty"),
        pytest.param(lambda _: "with\0null", UsageError, "cannot be a path", id="NUL"),
        pytest.param(lambda _: "x" * 5000, RefclockError, "too long", id="too long"),
    ],
)
def test_something_else(
    short_path: Path, make: Callable[[Path], Path | str], kind: type[RefclockError], words: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind) as error:
        Page(make(short_path / "there"))  # type: ignore[arg-type]
    assert words in one_line(error.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_fifo_does_not_hold_it_up(short_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(PageInvalid):
        Page(make_fifo(short_path / "fifo"))
    assert time.monotonic() - began < 1


def test_no_permission(page_file: PageFile, nobody: tuple[str, ...]) -> None:
    path = page_file()
    path.chmod(0o600)
    done = run("show", "--device", path, prefix=nobody)
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.count("\n") == 1 and "Permission denied" in done.stderr and "root" in done.stderr
    path.chmod(0o644)
    assert run("show", "--device", path, prefix=nobody).returncode == 0


def test_what_was_refused_keeps_its_errno(short_path: Path) -> None:
    with pytest.raises(Unavailable) as missing:
        Page(short_path / "none")
    assert missing.value.errno == 2 and missing.value.exit_status == 69
    assert issubclass(NotPermitted, RefclockError) and NotPermitted.exit_status == 77


def test_words_that_make_no_sense(page_file: PageFile) -> None:
    with pytest.raises(UsageError):
        Page(page_file(), access="mmap")
    with Page(page_file()) as page:
        for readings in (0, -1, 65):
            with pytest.raises(UsageError):
                page.sample(readings=readings)
        with pytest.raises(UsageError):
            page.__init__(page.path)  # type: ignore[misc]
        page.read()


# ---- A sample -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("readings", [1, 2, 8, 64])
def test_a_sample_is_one_consistent_triple(page_file: PageFile, access: str, readings: int) -> None:
    fields = {
        "counter_period_maxerror_rate_frac_sec": 2**60,
        "counter_period_esterror_rate_frac_sec": 2**58,
        "flags": 0b1111001,
    }
    with Page(page_file(disruption_marker=2**63 + 5, **fields), access=access) as page:
        for _ in range(50):
            before_counter, before_ns = read_counter(), time.time_ns()
            sample = page.sample(readings=readings)
            after_ns, after_counter = time.time_ns(), read_counter()
            assert before_counter < sample.counter < after_counter
            assert before_ns <= sample.system_ns + sample.uncertainty_ns
            assert sample.system_ns - sample.uncertainty_ns <= after_ns
            assert sample.reference_ns == time_ns(page.snapshot, sample.counter) - 37 * NSEC_PER_SEC
            assert sample.offset_ns == sample.reference_ns - sample.system_ns
            assert (sample.esterror_ns, sample.maxerror_ns) == error_ns(page.snapshot, sample.counter)
            assert sample.maxerror_ns is not None and sample.maxerror_ns > 10_000
            assert sample.uncertainty_ns > 0
            assert (sample.leap, sample.clock_status) == (0, "synchronized")
            assert sample.disruption_marker == 2**63 + 5


@pytest.mark.parametrize("offset_s", [0.0, 0.000123456, -3.25, 86400.0])
def test_the_offset_is_what_the_hypervisor_says_less_what_the_clock_says(
    simulate: Callable[..., Simulator], offset_s: float
) -> None:
    with Page(simulate(f"--offset={offset_s}").path) as page:
        samples = [page.sample() for _ in range(20)]
    errors = [abs(sample.offset_ns - round(offset_s * 1e9)) for sample in samples]
    assert min(errors) < 1_000, errors
    assert sorted(errors)[10] < 3_000, errors


def test_a_wrong_sign_of_the_offset_to_tai_changes_nothing(page_file: PageFile) -> None:
    for sign in (-37, 37):
        with Page(page_file(tai_offset_sec=sign)) as page:
            assert abs(page.sample().offset_ns) < 10**6


@pytest.mark.parametrize("status", range(7))
def test_the_status_decides(page_file: PageFile, status: int) -> None:
    with Page(page_file(clock_status=status)) as page:
        assert page.kind == "time"
        if status in (2, 3):
            assert page.sample().clock_status == model.CLOCK_STATUSES[status]
            return
        with pytest.raises(SampleWithheld) as withheld:
            page.sample()
        assert withheld.value.cause == "status"
        assert model.clock_status_name(status) in one_line(withheld.value)


def test_errors_that_the_page_does_not_give_are_none(page_file: PageFile) -> None:
    with Page(page_file(flags=model.TAI_OFFSET_VALID)) as page:
        assert (page.sample().esterror_ns, page.sample().maxerror_ns) == (None, None)
    with Page(page_file(flags=model.TAI_OFFSET_VALID | model.TIME_MAXERROR_VALID)) as page:
        assert page.sample().esterror_ns is None
        assert page.sample().maxerror_ns == 10_000


END_OF_2026 = timegm((2027, 1, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("leap", "from_end_s", "expected"),
    [
        (1, -100, (-100, 1)),
        (2, -100, (-100, 2)),
        (1, -1, None),
        (1, 2, None),
        (2, -2, None),
        (2, 0, None),
        (0, -1, (-1, 0)),
        (1, 100, (99, 0)),
        (2, 100, (101, 0)),
        (3, 0, None),
        (3, 5, (4, 0)),
        (4, 5, (5, 0)),
        (5, 5, (5, 0)),
        (6, -100, None),
    ],
)
def test_leap_seconds_in_a_sample(
    page_file: PageFile, leap: int, from_end_s: int, expected: tuple[int, int] | None
) -> None:
    """The page's reference lies before (leap 1, 2), in (3) or after (4, 5) the leap; the reading `from_end_s` of it."""
    reference_s = {1: -200, 2: -200, 3: 0, 4: 1, 5: 1}.get(leap, from_end_s)
    period_ns = counter_period_ns()
    counter = read_counter() - round((from_end_s - reference_s + 0.25) * 1e9 / period_ns)
    path = page_file(
        time_type=0,
        leap_indicator=leap,
        counter_value=counter % 2**64,
        counter_period_shift=28,
        counter_period_frac_sec=int(period_ns * 1e-9 * 2.0**92),
        time_sec=END_OF_2026 + reference_s,
        time_frac_sec=0,
    )
    with Page(path) as page:
        if expected is None:
            with pytest.raises(SampleWithheld) as withheld:
                page.sample()
            assert withheld.value.cause == "leap"
            one_line(withheld.value)
            return
        sample = page.sample()
        assert sample.leap == expected[1]
        assert abs(sample.reference_ns / 1e9 - END_OF_2026 - expected[0] - 0.25) < 0.2


@pytest.mark.parametrize("sec", [0, 37, 2**31, 2**33, 2**34, 2**63, 2**64 - 1])
def test_any_year(page_file: PageFile, sec: int) -> None:
    with Page(page_file(time_sec=sec)) as page:
        sample = page.sample()
        assert sample.reference_ns == time_ns(page.snapshot, sample.counter) - 37 * NSEC_PER_SEC
        assert abs(sample.reference_ns - (sec - 37) * NSEC_PER_SEC) < 2 * NSEC_PER_SEC
        assert json.loads(json.dumps(sample.fields())) == sample.fields()


def test_a_samples_fields_are_the_contracts() -> None:
    assert Sample.FIELDS == (
        "system_ns",
        "reference_ns",
        "offset_ns",
        "uncertainty_ns",
        "esterror_ns",
        "maxerror_ns",
        "leap",
        "clock_status",
        "disruption_marker",
        "counter",
    )
    sample = Sample(system_ns=5, reference_ns=3)
    assert sample.offset_ns == -2
    assert tuple(sample.fields()) == Sample.FIELDS
    assert "offset_ns=-2" in repr(sample)
    with pytest.raises(AttributeError):
        sample.offset_ns = 0  # type: ignore[misc]


# ---- The counter and the system clock -----------------------------------------------------------------------


def test_the_counters_period_is_right() -> None:
    measured = sorted(counter_period_ns() for _ in range(9))[4]
    counter, system_ns, _ = pair(16, measured)
    time.sleep(0.2)
    later, later_ns, _ = pair(16, measured)
    assert abs(measured * (later - counter) / (later_ns - system_ns) - 1) < 1e-3


def test_the_counters_period_is_right_on_a_busy_machine() -> None:
    """A CPU that is taken away in the middle of a measurement does not spoil it: a daemon measures but once."""
    busy = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        measured = sorted(counter_period_ns() for _ in range(300))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert measured[-1] / measured[0] - 1 < 0.01, (measured[0], measured[250], measured[-1])


def test_pairs_lie_on_one_line() -> None:
    """Any two pairs agree to their uncertainty, with the period from a baseline a hundred times as long."""
    period_ns = counter_period_ns(200_000_000)
    first = pair(16, period_ns)
    for _ in range(200):
        second = pair(16, period_ns)
        distance_ns = (second[1] - first[1]) - (second[0] - first[0]) * period_ns
        assert abs(distance_ns) <= first[2] + second[2] + 1e-5 * (second[1] - first[1])
        first = second


def test_the_uncertainty_is_small() -> None:
    period_ns = counter_period_ns()
    widths = sorted(pair(8, period_ns)[2] for _ in range(300))
    print(f"uncertainty of a pair: median {widths[250]} ns, least {widths[0]} ns")
    assert widths[250] < 1_000


def test_a_page_whose_period_is_nonsense_is_no_crash(page_file: PageFile) -> None:
    for period, shift in ((0, 0), (2**64 - 1, 0), (1, 255), (2**64 - 1, 255), (2**63, 1)):
        with Page(page_file(counter_period_frac_sec=period, counter_period_shift=shift)) as page:
            sample = page.sample()
            assert sample.reference_ns == time_ns(page.snapshot, sample.counter) - 37 * NSEC_PER_SEC


def test_the_period_in_words(page_file: PageFile) -> None:
    with Page(page_file(counter_period_frac_sec=2**63, counter_period_shift=30)) as page:
        assert page.period_ns == 1e9 * 2.0**-31


# ---- Anything at all ----------------------------------------------------------------------------------------

anything = st.fixed_dictionaries(
    {},
    optional={
        name: st.integers(-(2**15), 2**15 - 1)
        if code == "h"
        else st.one_of(st.integers(0, 2 ** {"B": 8, "H": 16, "I": 32, "Q": 64}[code] - 1), st.integers(0, 5))
        for name, _, code in FIELDS
        if name not in ("magic", "version", "seq_count")
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(anything, st.sampled_from(ACCESSES))
def test_no_page_is_a_crash(short_path: Path, fields: dict[str, int], access: str) -> None:
    from refclock.show import as_json, as_text

    path = write_page(short_path / "page", make_page(**fields))
    with contextlib.suppress(PageInvalid), Page(path, access=access) as page:
        json.dumps(as_json(page))
        assert as_text(page)
        repr(page.snapshot)
        try:
            sample = page.sample(readings=2)
        except SampleWithheld as withheld:
            assert withheld.cause in model.WITHHELD
        else:
            assert page.kind == "time" and page.snapshot.status in (2, 3)
            assert isinstance(sample.reference_ns, int)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans(), st.sampled_from(ACCESSES))
def test_no_file_is_a_crash(short_path: Path, content: bytes, begins_well: bool, access: str) -> None:
    path = short_path / "page"
    path.write_bytes((b"VCLK" if begins_well else b"") + content)
    with contextlib.suppress(PageInvalid, PageStalled), Page(path, access=access) as page:
        page.read()


# ---- The file is pulled away from under it ------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 10, 50, 90])
@pytest.mark.parametrize("access", ACCESSES)
def test_truncated_while_it_is_open(page_file: PageFile, access: str, length: int) -> None:
    path = page_file(size=112)
    whole = path.read_bytes()
    with Page(path, access=access) as page:
        page.sample()
        os.truncate(path, length)
        for take in (page.read, page.sample, page.read):
            with pytest.raises(PageInvalid) as invalid:
                take()
            one_line(invalid.value)
        path.write_bytes(whole)
        with Page(path, access=access) as anew:
            anew.sample()


def test_truncated_while_two_have_it_open(page_file: PageFile) -> None:
    path, other = page_file(), page_file("other")
    with Page(path) as first, Page(path) as second, Page(other) as sound:
        os.truncate(path, 0)
        for page in (first, second):
            with pytest.raises(PageInvalid):
                page.read()
        sound.sample()


def test_truncated_while_it_waits(page_file: PageFile) -> None:
    path = page_file()
    with Page(path) as page:
        cut = threading.Timer(0.05, os.truncate, (path, 0))
        cut.start()
        changed, _ = page.wait(time.monotonic_ns() + 5 * NSEC_PER_SEC, 10**6, [])
        cut.join()
        assert changed
        with pytest.raises(PageInvalid):
            page.sample()


def test_truncated_and_filled_again_and_again(short_path: Path) -> None:
    """Whatever the moment at which the file shrinks: an error or a sample, never a crash, never another sample."""
    code = """
import os, sys, threading, time
from refclock.errors import PageInvalid, PageStalled
from refclock.page import Page
from tests.harness import make_page
path, done = sys.argv[1], threading.Event()
whole = make_page(disruption_marker=7).ljust(4096, b"\\0")
def cut():
    while not done.is_set():
        with open(path, "r+b") as file:
            file.write(whole)
        os.truncate(path, 0)
with open(path, "wb") as file:
    file.write(whole)
threading.Thread(target=cut, daemon=True).start()
good = bad = 0
end = time.monotonic() + 1.5
sys.setswitchinterval(1e-5)
while time.monotonic() < end:
    try:
        with Page(path) as page:
            for _ in range(20):
                assert page.sample(readings=2).disruption_marker == 7
                good += 1
    except (PageInvalid, PageStalled):
        bad += 1
done.set()
print(good, bad)
"""
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parent.parent}"}
    command = [sys.executable, "-c", code, str(short_path / "page")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    good, bad = map(int, done.stdout.split())
    assert bad > 10, (good, bad)


def test_a_sigbus_that_is_not_ours_is_not_swallowed(page_file: PageFile) -> None:
    code = """
import mmap, os, sys
from refclock.page import Page
page = Page(sys.argv[1])
with open(sys.argv[2], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
    file.truncate(0)
    print("so far", flush=True)
    memory[0]
print("went on")
"""
    path = page_file()
    command = [sys.executable, "-c", code, str(path), str(path.with_name("mine"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "so far\n"


def test_a_removed_or_replaced_file_is_noticed(page_file: PageFile) -> None:
    path = page_file(disruption_marker=1)
    with Page(path) as page:
        assert page.still_there()
        page_file(disruption_marker=2)
        assert not page.still_there()
        assert page.read().disruption_marker == 1
    with Page(path) as page:
        link = path.with_name("link")
        link.symlink_to(path)
        with Page(link) as by_link:
            assert by_link.still_there()
            path.unlink()
            assert not page.still_there() and not by_link.still_there()


@pytest.mark.parametrize("fields", [{"magic": 1}, {"version": 9}, {"size": 16}])
@pytest.mark.parametrize("access", ACCESSES)
def test_a_page_that_turns_into_something_else(page_file: PageFile, access: str, fields: dict[str, int]) -> None:
    path = page_file()
    with Page(path, access=access) as page:
        page.sample()
        with open(path, "r+b") as file:
            file.write(make_page(**fields))
        for _ in range(2):
            with pytest.raises(PageInvalid):
                page.sample()
        with open(path, "r+b") as file:
            file.write(make_page())
        page.sample()


def test_a_page_whose_constants_change(page_file: PageFile) -> None:
    """A restore on a host that has not published yet: the counter turns 0xff, and back."""
    path = page_file()
    with Page(path) as page:
        for counter_id, kind in ((0xFF, "signal"), (LOCAL_COUNTER_ID, "time")):
            with open(path, "r+b") as file:
                file.write(make_page(counter_id=counter_id))
            page.read()
            assert page.kind == kind


# ---- Resources ----------------------------------------------------------------------------------------------


def test_closing(page_file: PageFile) -> None:
    page = Page(page_file())
    page.close()
    page.close()
    for use in (page.read, page.sample, page.fileno, page.still_there, lambda: page.wait(0, 0, [])):
        with pytest.raises(RefclockError, match="closed"):
            use()


def count_resources() -> tuple[int, int]:
    """Open descriptors, and mappings of pages."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("/vmclock-")


def test_nothing_is_left_open(page_file: PageFile) -> None:
    good, bad = page_file(), page_file("bad", magic=3)
    before = count_resources()
    for _ in range(600):
        Page(good).close()
        with pytest.raises(PageInvalid):
            Page(bad)
        Page(good)  # dropped without being closed
    assert count_resources() == before


def test_more_pages_than_can_be_guarded_are_read_otherwise(page_file: PageFile) -> None:
    path = page_file()
    pages = [Page(path) for _ in range(300)]
    assert {page.access for page in pages} == {"map", "pread"}
    os.truncate(path, 0)
    for page in pages:
        with pytest.raises(PageInvalid):
            page.read()
        page.close()
    with Page(page_file("other")) as page:
        assert page.access == "map"


# ---- Waiting ------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting_page(page_file: PageFile) -> Iterator[Page]:
    with Page(page_file()) as page:
        yield page


def in_ms(ms: float) -> int:
    return time.monotonic_ns() + round(ms * 1e6)


def test_waiting_ends_at_the_deadline(waiting_page: Page) -> None:
    began = time.monotonic()
    assert waiting_page.wait(in_ms(50), 10**6, []) == (False, [])
    assert 0.05 <= time.monotonic() - began < 0.5
    began = time.monotonic()
    assert waiting_page.wait(0, 10**6, []) == (False, [])
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("access", ACCESSES)
def test_waiting_ends_when_the_page_changes(simulate: Callable[..., Simulator], access: str) -> None:
    simulator = simulate("--update", "1000")
    with Page(simulator.path, access=access) as page:
        assert page.wait(in_ms(20), 10**6, []) == (False, [])
        began = time.monotonic()
        sender = threading.Timer(0.05, simulator.do, ("disrupt",))
        sender.start()
        changed, ready = page.wait(in_ms(5000), 10**6, [])
        sender.join()
        assert (changed, ready) == (True, [])
        assert time.monotonic() - began < 1
        assert page.wait(in_ms(20), 10**6, [])[0] is False, "the same change twice"
        assert page.read().disruption_marker == 2


def test_waiting_ends_when_a_descriptor_is_ready(waiting_page: Page) -> None:
    reader, writer = os.pipe()
    other, other_writer = os.pipe()
    fds = [(reader, select.POLLIN), (other, select.POLLIN)]
    try:
        assert waiting_page.wait(in_ms(10), 10**6, fds) == (False, [])
        os.write(writer, b"x")
        began = time.monotonic()
        assert waiting_page.wait(in_ms(5000), 10**6, fds) == (False, [reader])
        assert time.monotonic() - began < 1
        os.close(other_writer)
        assert waiting_page.wait(in_ms(5000), 10**6, fds) == (False, [reader, other])
    finally:
        for descriptor in (reader, writer, other):
            os.close(descriptor)


def test_waiting_ends_on_a_signal(waiting_page: Page) -> None:
    heard = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began = time.monotonic()
        assert waiting_page.wait(in_ms(5000), 5 * 10**9, []) == (False, [])
        assert time.monotonic() - began < 1
        assert heard == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_waiting_lets_other_threads_run(waiting_page: Page) -> None:
    counted = 0

    def count() -> None:
        nonlocal counted
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    waiting_page.wait(in_ms(100), 10**9, [])
    thread.join()
    assert counted > 100


def test_too_many_descriptors_are_refused(waiting_page: Page) -> None:
    with pytest.raises(UsageError):
        waiting_page.wait(0, 0, [(0, 0)] * 65)
    waiting_page.wait(0, 0, [(0, 0)] * 64)
