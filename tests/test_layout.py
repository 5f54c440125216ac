"""Every layout that another program shares with us: the compiler's view, a description by hand, and scapy's."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy import fields as f
from scapy.packet import Packet

from refclock import model, sock
from refclock.model import FIELDS, PAGE_BYTES, SMALLEST_SIZE, Snapshot, encode
from refclock.page import Sample
from tests.harness import NATIVE, ROOT

ARM_COMPILER = "aarch64-linux-gnu-gcc"

# ---- By hand: name and struct code, in order, padding written out -------------------------------------------

PAGE = """
    magic I  size I  version H  counter_id B  time_type B  seq_count I  disruption_marker Q  flags Q  pad 2s
    clock_status B  leap_second_smearing_hint B  tai_offset_sec h  leap_indicator B  counter_period_shift B
    counter_value Q  counter_period_frac_sec Q  counter_period_esterror_rate_frac_sec Q
    counter_period_maxerror_rate_frac_sec Q  time_sec Q  time_frac_sec Q  time_esterror_nanosec Q
    time_maxerror_nanosec Q  vm_generation_counter Q
"""
SEGMENT = """
    mode i  count i  clock_sec q  clock_usec i  - 4x  receive_sec q  receive_usec i  leap i  precision i  nsamples i
    valid i  clock_nsec I  receive_nsec I  dummy 32s  - 4x
"""
SOCK = "tv 16s  offset d  pulse i  leap i  padding i  magic i"

#: From the ABI's own numbers, for the fields that a mistake in the order would not move.
PAGE_OFFSETS = {
    "seq_count": 0x0C,
    "clock_status": 0x22,
    "counter_value": 0x28,
    "time_sec": 0x48,
    "vm_generation_counter": 0x68,
}

Layout = dict[str, tuple[int, int]]


def by_hand(text: str) -> Layout:
    """Name -> (offset, size), and `whole`."""
    layout: Layout = {}
    offset = 0
    for name, code in zip(*[iter(text.split())] * 2, strict=True):
        size = struct.calcsize("<" + code)
        if name != "-":
            layout[name] = (offset, size)
        offset += size
    return layout | {"whole": (0, offset)}


@pytest.fixture(scope="module")
def compiled(native: Callable[..., Path]) -> dict[str, Layout]:
    """What the compiler says of each structure."""
    output = subprocess.run([native("layout")], capture_output=True, text=True, check=True, timeout=10).stdout
    layouts: dict[str, Layout] = {}
    for line in output.splitlines():
        structure, name, offset, size = line.split()
        layouts.setdefault(structure, {})[name] = (int(offset), int(size))
    return layouts


@pytest.mark.parametrize(
    ("structure", "text"), [("vmclock_page", PAGE), ("ntp_segment", SEGMENT), ("sock_sample", SOCK)]
)
def test_the_compiler_agrees_with_the_description(compiled: dict[str, Layout], structure: str, text: str) -> None:
    assert compiled[structure] == by_hand(text)


def test_the_segment_is_the_one_of_the_c_library(compiled: dict[str, Layout]) -> None:
    """Declared with int and time_t, as ntpd and chrony do, it is the same."""
    assert compiled["ntp_segment"] == compiled["shm_time"]


def test_the_header_has_no_field_more(compiled: dict[str, Layout]) -> None:
    text = (ROOT / "shm" / "vmclock_page.h").read_text()
    body = re.search(r"struct vmclock_page \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    assert set(re.findall(r"(\w+)(?:\[\d+\])?;", body[1])) == compiled["vmclock_page"].keys() - {"whole"}


def test_the_models_fields_are_the_compilers(compiled: dict[str, Layout]) -> None:
    fields = {name: (offset, struct.calcsize("<" + code)) for name, offset, code in FIELDS}
    assert fields | {"pad": (0x20, 2), "whole": (0, PAGE_BYTES)} == compiled["vmclock_page"]
    assert {name: fields[name][0] for name in PAGE_OFFSETS} == PAGE_OFFSETS
    assert sum(fields["disruption_marker"]) == SMALLEST_SIZE
    signs = {name for name, _, code in FIELDS if code.islower()}
    assert signs == {"tai_offset_sec"}


def test_the_models_words_are_the_contracts() -> None:
    assert model.MAGIC.to_bytes(4, "little") == b"VCLK"
    assert model.CLOCK_STATUSES == ("unknown", "initializing", "synchronized", "freerunning", "unreliable")
    assert model.TIME_TYPES == ("utc", "tai", "monotonic", "smeared", "maybe-smeared")
    assert model.LEAPS == ("none", "pre-pos", "pre-neg", "pos", "post-pos", "post-neg")
    flags = "tai-offset-valid disruption-soon disruption-imminent period-esterror-valid period-maxerror-valid"
    flags += " time-esterror-valid time-maxerror-valid time-monotonic vm-gen-counter-present notification-present"
    assert [model.flag_names(1 << bit) for bit in range(10)] == [[word] for word in flags.split()]
    assert model.flag_names(1 << 10 | 1 << 63) == ["flag-10", "flag-63"]
    assert model.clock_status_name(5) == "status-5" and model.clock_status_name(2) == "synchronized"
    assert model.leap_name(6) == "leap-6" and model.time_type_name(5) == "type-5"


# ---- scapy: a third description, and bytes made and taken apart by it ---------------------------------------


class VmclockPage(Packet):  # type: ignore[misc]
    """The vmclock page."""

    fields_desc = (
        f.XLEIntField("magic", 0x4B4C4356),
        f.LEIntField("size", 4096),
        f.LEShortField("version", 1),
        f.ByteField("counter_id", 1),
        f.ByteField("time_type", 1),
        f.LEIntField("seq_count", 0),
        f.LELongField("disruption_marker", 0),
        f.XLELongField("flags", 0),
        f.StrFixedLenField("pad", b"\0\0", 2),
        f.ByteField("clock_status", 2),
        f.ByteField("leap_second_smearing_hint", 0),
        f.LESignedShortField("tai_offset_sec", -37),
        f.ByteField("leap_indicator", 0),
        f.ByteField("counter_period_shift", 0),
        f.LELongField("counter_value", 0),
        f.LELongField("counter_period_frac_sec", 0),
        f.LELongField("counter_period_esterror_rate_frac_sec", 0),
        f.LELongField("counter_period_maxerror_rate_frac_sec", 0),
        f.LELongField("time_sec", 0),
        f.LELongField("time_frac_sec", 0),
        f.LELongField("time_esterror_nanosec", 0),
        f.LELongField("time_maxerror_nanosec", 0),
        f.LELongField("vm_generation_counter", 0),
    )


class SockSample(Packet):  # type: ignore[misc]
    """chrony's SOCK datagram on a little-endian 64-bit system."""

    fields_desc = (
        f.LESignedLongField("tv_sec", 0),
        f.LESignedLongField("tv_usec", 0),
        f.Field("offset", 0.0, "<d"),
        f.LESignedIntField("pulse", 0),
        f.LESignedIntField("leap", 0),
        f.LESignedIntField("padding", 0),
        f.XLEIntField("magic", 0x534F434B),
    )


#: A value for each field in which every byte is another one.
DISTINCT = {
    name: int.from_bytes(bytes(range(offset + 1, offset + 1 + struct.calcsize("<" + code))), "little")
    for name, offset, code in FIELDS
}


def test_scapys_page_is_decoded() -> None:
    raw = bytes(VmclockPage(**DISTINCT | {"size": 112}))
    assert len(raw) == 112
    assert Snapshot(raw).fields() == DISTINCT | {"size": 112}


def test_our_page_is_decoded_by_scapy() -> None:
    packet = VmclockPage(encode(DISTINCT))
    assert {name: packet.getfieldval(name) for name in DISTINCT} == DISTINCT
    assert packet.pad == b"\0\0"


@pytest.mark.parametrize(("stored", "raw"), [(-37, b"\xdb\xff"), (37, b"\x25\x00"), (-32768, b"\x00\x80")])
def test_the_tai_offset_is_signed(stored: int, raw: bytes) -> None:
    assert encode({"tai_offset_sec": stored})[0x24:0x26] == raw
    assert Snapshot(bytes(VmclockPage(size=112, tai_offset_sec=stored))).tai_offset_sec == stored


def test_a_snapshot_has_the_fields_that_its_size_covers() -> None:
    for size in range(24, 130):
        snapshot = Snapshot(encode(DISTINCT | {"size": size}))
        covered = {name for name, offset, code in FIELDS if offset + struct.calcsize("<" + code) <= size}
        assert set(snapshot.fields()) == covered
        assert all(getattr(snapshot, name) is None for name, _, _ in FIELDS if name not in covered)
    assert set(Snapshot(encode({"size": 40})).fields()) >= {"counter_period_shift"}
    assert "counter_value" not in Snapshot(encode({"size": 40})).fields()


@pytest.mark.parametrize("leap", [0, 1, 2])
@pytest.mark.parametrize("offset_ns", [0, 1, -1, 123_456_789, -74_000_000_000, 10**18])
def test_scapy_reads_our_datagram(offset_ns: int, leap: int) -> None:
    system_ns = 1_767_225_600_123_456_999
    raw = sock.encode(Sample(system_ns=system_ns, reference_ns=system_ns + offset_ns, leap=leap))
    packet = SockSample(raw)
    assert len(raw) == len(SockSample()) == sock.MESSAGE.size == 40
    assert (packet.tv_sec, packet.tv_usec) == (1_767_225_600, 123_456)
    assert packet.offset == offset_ns / 1e9
    assert (packet.pulse, packet.leap, packet.padding, packet.magic) == (0, leap, 0, 0x534F434B)


# ---- arm64 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arm() -> list[str]:
    if shutil.which(ARM_COMPILER) is None:
        pytest.skip(
            f"ARM64 IS NOT TESTED: no {ARM_COMPILER}; apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        )
    return [ARM_COMPILER, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "shm")]


def compile_arm(arm: list[str], source: str, *options: str) -> str:
    done = subprocess.run(
        [*arm, *options, "-x", "c", "-"], input=source, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("header", sorted(path.name for path in (ROOT / "shm").glob("*.h")))
def test_each_header_compiles_alone_for_arm64(arm: list[str], header: str) -> None:
    compile_arm(arm, f'#include "{header}"\n', "-fsyntax-only")


@pytest.mark.parametrize("name", sorted(path.name for path in NATIVE.glob("*.c")))
def test_the_native_tests_compile_for_arm64(arm: list[str], name: str) -> None:
    compile_arm(arm, f'#include "{NATIVE / name}"\n', "-fsyntax-only")


def test_arm64_has_the_barriers_that_x86_does_not_need(arm: list[str]) -> None:
    """No run on x86 can show that one is missing: its loads and stores keep their order by themselves."""
    source = """
        #include "counter.h"
        #include "ntp_segment.h"
        #include "vmclock_page.h"
        int sequence(const struct vmclock_source *s, uint32_t *n) { return vmclock_sequence(s, n); }
        int unchanged(const struct vmclock_source *s, uint32_t n) { return vmclock_unchanged(s, n); }
        void publish(struct vmclock_page *p, const struct vmclock_page *n) { vmclock_publish(p, n); }
        void put(struct ntp_segment *p, const struct ntp_segment *n) { ntp_segment_put(p, n); }
        uint64_t now(void) { return counter_read(); }
    """
    text = compile_arm(arm, source, "-S", "-o", "-", "-mno-outline-atomics")
    code = {name: re.search(rf"^{name}:(.*?)\.size\t{name}", text, re.DOTALL | re.MULTILINE) for name in FUNCTIONS}
    for name, instructions in FUNCTIONS.items():
        found = code[name]
        assert found is not None
        position = 0
        for instruction in instructions:
            position = found[1].find(instruction, position) + 1
            assert position, f"{name} lacks {instruction}, in this order: {instructions}"


#: In this order: how an acquire load, a fence before a load, and the fences of a writer look on Arm.
FUNCTIONS = {
    "sequence": ["ldar"],
    "unchanged": ["dmb\tishld", "ldar"],
    "publish": ["str\t", "dmb\tish", "str\t", "stlr"],
    "put": ["str\t", "dmb\tish", "str\t", "dmb\tish", "stlr"],
    "now": ["isb", "cntvct_el0", "isb"],
}
