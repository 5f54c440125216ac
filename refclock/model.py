"""The words and the numbers that every part of the program shares.  Imports nothing but the standard library.

Layout and meaning of the page: Linux, include/uapi/linux/vmclock-abi.h (version 1).
"""

from __future__ import annotations

from struct import Struct, calcsize, error, pack_into, unpack_from

# ---- The page ------------------------------------------------------------------------------------------

MAGIC = 0x4B4C4356
VERSION = 1
PAGE_BYTES = 112

#: Name, offset and struct code of every field, in the order of the page.
FIELDS = (
    ("magic", 0x00, "I"),
    ("size", 0x04, "I"),
    ("version", 0x08, "H"),
    ("counter_id", 0x0A, "B"),
    ("time_type", 0x0B, "B"),
    ("seq_count", 0x0C, "I"),
    ("disruption_marker", 0x10, "Q"),
    ("flags", 0x18, "Q"),
    ("clock_status", 0x22, "B"),
    ("leap_second_smearing_hint", 0x23, "B"),
    ("tai_offset_sec", 0x24, "h"),
    ("leap_indicator", 0x26, "B"),
    ("counter_period_shift", 0x27, "B"),
    ("counter_value", 0x28, "Q"),
    ("counter_period_frac_sec", 0x30, "Q"),
    ("counter_period_esterror_rate_frac_sec", 0x38, "Q"),
    ("counter_period_maxerror_rate_frac_sec", 0x40, "Q"),
    ("time_sec", 0x48, "Q"),
    ("time_frac_sec", 0x50, "Q"),
    ("time_esterror_nanosec", 0x58, "Q"),
    ("time_maxerror_nanosec", 0x60, "Q"),
    ("vm_generation_counter", 0x68, "Q"),
)
_FIELD_END = {name: offset + calcsize("<" + code) for name, offset, code in FIELDS}


def _layout() -> Struct:
    """The fields in a row, with what lies between them left out."""
    text, end = "<", 0
    for name, offset, code in FIELDS:
        text += "x" * (offset - end) + code
        end = _FIELD_END[name]
    return Struct(text)


_LAYOUT = _layout()

#: What `size` must cover at the least for the page to be of any use: the disruption marker.
SMALLEST_SIZE = _FIELD_END["disruption_marker"]

COUNTER_ARM_VCNT = 0
COUNTER_X86_TSC = 1
COUNTER_NONE = 0xFF

TIME_UTC = 0
TIME_TAI = 1
TIME_TYPES = ("utc", "tai", "monotonic", "smeared", "maybe-smeared")

UNKNOWN, INITIALIZING, SYNCHRONIZED, FREERUNNING, UNRELIABLE = range(5)
CLOCK_STATUSES = ("unknown", "initializing", "synchronized", "freerunning", "unreliable")

LEAP_NONE, LEAP_PRE_POS, LEAP_PRE_NEG, LEAP_POS, LEAP_POST_POS, LEAP_POST_NEG = range(6)
LEAPS = ("none", "pre-pos", "pre-neg", "pos", "post-pos", "post-neg")

FLAGS = (
    "tai-offset-valid",
    "disruption-soon",
    "disruption-imminent",
    "period-esterror-valid",
    "period-maxerror-valid",
    "time-esterror-valid",
    "time-maxerror-valid",
    "time-monotonic",
    "vm-gen-counter-present",
    "notification-present",
)
(
    TAI_OFFSET_VALID,
    DISRUPTION_SOON,
    DISRUPTION_IMMINENT,
    PERIOD_ESTERROR_VALID,
    PERIOD_MAXERROR_VALID,
    TIME_ESTERROR_VALID,
    TIME_MAXERROR_VALID,
    TIME_MONOTONIC,
    VM_GEN_COUNTER_PRESENT,
    NOTIFICATION_PRESENT,
) = (1 << bit for bit in range(len(FLAGS)))


def _name(names: tuple[str, ...], number: int, what: str) -> str:
    return names[number] if number < len(names) else f"{what}-{number}"


def clock_status_name(number: int) -> str:
    """The contract's word for a ``clock_status``; ``status-N`` for one that the ABI does not know."""
    return _name(CLOCK_STATUSES, number, "status")


def leap_name(number: int) -> str:
    """The contract's word for a ``leap_indicator``."""
    return _name(LEAPS, number, "leap")


def time_type_name(number: int) -> str:
    """The contract's word for a ``time_type``."""
    return _name(TIME_TYPES, number, "type")


def flag_names(flags: int) -> list[str]:
    """The contract's words for the flags that are set; ``flag-N`` for one that the ABI does not know."""
    return [_name(FLAGS, bit, "flag") for bit in range(64) if flags >> bit & 1]


class Snapshot:
    """One consistent copy of the page: the ABI's fields as attributes, raw.

    A field that the page's ``size`` does not cover is None; those up to the disruption marker, without which it
    is no page, are always there.  Whether a field that is covered also means something is for its flag to say:
    see :meth:`has`.
    """

    __slots__ = ("raw", *_FIELD_END)

    raw: bytes
    magic: int
    size: int
    version: int
    counter_id: int
    time_type: int
    seq_count: int
    disruption_marker: int
    flags: int | None
    clock_status: int | None
    leap_second_smearing_hint: int | None
    tai_offset_sec: int | None
    leap_indicator: int | None
    counter_period_shift: int | None
    counter_value: int | None
    counter_period_frac_sec: int | None
    counter_period_esterror_rate_frac_sec: int | None
    counter_period_maxerror_rate_frac_sec: int | None
    time_sec: int | None
    time_frac_sec: int | None
    time_esterror_nanosec: int | None
    time_maxerror_nanosec: int | None
    vm_generation_counter: int | None

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        (size,) = unpack_from("<I", raw, 4)
        covered = max(size, SMALLEST_SIZE)
        for (name, end), value in zip(_FIELD_END.items(), _LAYOUT.unpack_from(raw), strict=True):
            setattr(self, name, value if end <= covered else None)

    def has(self, flag: int) -> bool:
        """Whether ``flag`` (one of the constants above) is set, in a page that has flags at all."""
        return bool((self.flags or 0) & flag)

    @property
    def status(self) -> int:
        """``clock_status``, or unknown where the page is too small to say."""
        return UNKNOWN if self.clock_status is None else self.clock_status

    @property
    def generation(self) -> int | None:
        """``vm_generation_counter`` where the page has one, else None."""
        return self.vm_generation_counter if self.has(VM_GEN_COUNTER_PRESENT) else None

    @property
    def warning(self) -> str | None:
        """``imminent`` (about an hour), ``soon`` (about a day) or None: the announced disruption."""
        if self.has(DISRUPTION_IMMINENT):
            return "imminent"
        return "soon" if self.has(DISRUPTION_SOON) else None

    def fields(self) -> dict[str, int]:
        """Every field that ``size`` covers, by its ABI name."""
        values = ((name, getattr(self, name)) for name in _FIELD_END)
        return {name: value for name, value in values if value is not None}

    def __repr__(self) -> str:
        return f"Snapshot({', '.join(f'{name}={value}' for name, value in self.fields().items())})"


def encode(fields: dict[str, int]) -> bytes:
    """The 112 bytes of a page with these fields; those not named are 0.  ValueError for a value that does not fit."""
    raw = bytearray(PAGE_BYTES)
    for name, offset, code in FIELDS:
        value = fields.get(name, 0)
        try:
            pack_into("<" + code, raw, offset, value)
        except error:
            raise ValueError(f"{value} does not fit {name}") from None
    return bytes(raw)


#: Why a sound page gives no sample; what withheld samples are counted by.
WITHHELD = ("signal", "status", "bound", "leap", "stalled", "invalid", "implausible", "uncertain", "disrupted")

# ---- The system clock ----------------------------------------------------------------------------------

#: What `status` says of the system clock, worst first.
STATES = (
    "waiting",
    "unknown",
    "disrupted",
    "unsynchronised",
    "adjusting",
    "holdover",
    "synchronised",
    "watching",
)

#: What every record of the journal has; one that was superseded also says by which.
RECORD_KEYS = (
    "id",
    "kind",
    "marker_before",
    "marker_after",
    "generation_before",
    "generation_after",
    "detected_at_ns",
    "offset_ns",
    "frequency_ppm",
    "actions",
    "recovered_after_ns",
)
