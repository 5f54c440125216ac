"""Pages, states and records in words, for people and as JSON."""

from __future__ import annotations

import time

from .model import clock_status_name, flag_names, leap_name, time_type_name
from .page import LOCAL_COUNTER_ID, error_ns, read_counter, time_ns
from .timescale import odd_tai_sign, timescale, why_no_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .page import Page


def as_json(page: Page) -> dict[str, Any]:
    """The contract's object for `show`: the raw fields, their names, and UTC with its errors where there is time."""
    snapshot = page.read()
    shown: dict[str, Any] = dict(snapshot.fields())
    shown["kind"] = page.kind
    shown["time_type_name"] = time_type_name(snapshot.time_type)
    shown["clock_status_name"] = clock_status_name(snapshot.status)
    shown["leap_name"] = leap_name(snapshot.leap_indicator or 0)
    shown["flag_names"] = flag_names(snapshot.flags or 0)
    if page.kind == "time":
        counter = read_counter()
        page_ns = time_ns(snapshot, counter)
        scale = timescale(snapshot)
        utc = scale.at(page_ns) if scale is not None else None
        shown["reference_ns"] = None if utc is None else page_ns + utc[0]
        shown["esterror_ns"], shown["maxerror_ns"] = error_ns(snapshot, counter)
    return shown


def as_text(page: Page) -> str:
    """The page for a person to read."""
    shown = as_json(page)
    lines = [(name, str(value)) for name, value in shown.items() if name not in _TOLD_IN_WORDS]
    words = {
        "magic": "VCLK",
        "time_type": shown["time_type_name"],
        "clock_status": shown["clock_status_name"],
        "leap_indicator": shown["leap_name"],
        "flags": " ".join(shown["flag_names"]) or "none",
    }
    if page.kind == "signal":
        words["kind"] = f"tells of disruptions only: {why_no_time(page.snapshot, LOCAL_COUNTER_ID)}"
    if odd_tai_sign(page.snapshot):
        words["tai_offset_sec"] = "the sign is odd (UTC - TAI is negative); its magnitude is used"
    if shown.get("reference_ns") is not None:
        words["reference_ns"] = _stamp(shown["reference_ns"])
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        f"{name:<{width}}  {value}{f'  ({words[name]})' if name in words else ''}" for name, value in lines
    )


_TOLD_IN_WORDS = ("time_type_name", "clock_status_name", "leap_name", "flag_names")


def status_text(status: dict[str, Any], colour: bool = False) -> str:
    """The daemon's status for a person to read; ``colour`` is for a terminal."""

    def paint(text: str, kind: str) -> str:
        return f"\033[{_PAINT[kind]}m{text}\033[0m" if colour else text

    state = paint(status["state"], severity(status))
    lines = [("state", f"{state}: {status['reason']}" if status["reason"] else state)]
    if status["offset_ns"] is not None:
        bound = status["maxerror_ns"]
        offset = f"{seconds(status['offset_ns'], sign=True)}, bound {'none' if bound is None else seconds(bound)}"
        lines.append(("offset", offset))
    page = {None: "not read yet", "time": "gives time", "signal": "tells of disruptions only"}[status["kind"]]
    lines.append(("page", f"{status['device']} {page}"))
    if status["clock_status"] is not None:
        generation = "" if status["generation"] is None else f", generation {status['generation']}"
        lines.append(("hypervisor", f"{status['clock_status']}, marker {status['disruption_marker']}{generation}"))
    if status["warning"]:
        lines.append(("warning", paint(warning_text(status["warning"]), "doubtful")))
    if status["chronyd"] is not None:
        said, kind = chronyd_text(status["chronyd"])
        lines.append(("chronyd", paint(said, kind)))
    width = max((len(sink["name"]) for sink in status["sinks"]), default=0)
    for sink in status["sinks"]:
        health = paint("good", "good") if sink["ok"] else "nothing sent yet"
        if sink["error"] is not None:
            health = paint(sink["error"], "bad")
        dropped = f", {sink['dropped']} dropped" if sink["dropped"] else ""
        lines.append((sink["type"], f"{sink['name']:<{width}}  {sink['sent']} sent{dropped}; {health}"))
    withheld = ", ".join(f"{count} {cause}" for cause, count in sorted(status["withheld"].items()))
    lines.append(("samples", f"{status['samples']} fed" + (f"; withheld: {withheld}" if withheld else "")))
    lines.append(("disruptions", f"{status['disruptions']} in the {duration(status['uptime_ns'])} since the start"))
    if status["last_disruption"]:
        lines.append(("last", record_text(status["last_disruption"])))
    return "\n".join(f"{paint(f'{name:<12}', 'label')} {text}" for name, text in lines)


#: Select graphic rendition, ECMA-48.
_PAINT = {"good": "32", "doubtful": "33", "bad": "31", "label": "2"}


def severity(status: dict[str, Any]) -> str:
    """``good``, ``doubtful`` or ``bad``: what the state means to one who relies on the clock."""
    if status["state"] in ("adjusting", "holdover"):
        return "doubtful"
    return "good" if status["good"] else "bad"


def chronyd_text(chronyd: dict[str, Any]) -> tuple[str, str]:
    """What is to be said of chronyd, and how good that is."""
    if not chronyd["ok"]:
        return chronyd["error"] or "does not answer", "bad"
    if chronyd["normal"] is None:
        return "not asked yet", "doubtful"
    return ("follows a source", "good") if chronyd["normal"] else ("is not synchronised", "bad")


def warning_text(word: str) -> str:
    """The announcement of a disruption."""
    return f"the hypervisor announces a disruption within about {'an hour' if word == 'imminent' else 'a day'}"


def record_text(record: dict[str, Any]) -> str:
    """One journal record in a line."""
    what = f"{record['kind']} {record['id']}"
    if record["marker_before"] != record["marker_after"]:
        what += f", marker {record['marker_before']} -> {record['marker_after']}"
    if record["generation_before"] != record["generation_after"]:
        what += f", generation {record['generation_before']} -> {record['generation_after']}"
    if record["offset_ns"] is not None:
        what += f", off by {seconds(record['offset_ns'], sign=True)}"
    if record["frequency_ppm"] is not None:
        what += f", {record['frequency_ppm']:+.3f} ppm"
    if record["recovered_after_ns"] is not None:
        end = f"good after {seconds(record['recovered_after_ns'])}"
    elif record.get("superseded_by") is not None:
        end = f"superseded by {record['superseded_by']}"
    else:
        end = "not over"
    return f"{_stamp(record['detected_at_ns'])}  {what}: {end}"


def seconds(ns: int, sign: bool = False) -> str:
    """Nanoseconds in the unit that suits them."""
    scale, unit = next((pair for pair in _UNITS if abs(ns) < pair[0] * 1000), (1_000_000_000, "s"))
    return f"{ns / scale:{'+' if sign else ''}.{0 if scale == 1 else 3}f} {unit}"


_UNITS = ((1, "ns"), (1_000, "us"), (1_000_000, "ms"))


def duration(ns: int) -> str:
    """A long time, in the two units that suit it."""
    left = ns // 1_000_000_000
    counts = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        counts.append((left // length, unit))
        left %= length
    first = next((place for place, (count, _) in enumerate(counts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in counts[first : first + 2] if count) or "0 s"


def _stamp(ns: int) -> str:
    try:
        return (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ns // 1_000_000_000)) + f".{ns // 1_000_000 % 1000:03d} UTC"
        )
    except (OverflowError, ValueError, OSError):
        return f"{ns / 1e9:.3f} s"
