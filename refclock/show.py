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


def status_text(status: dict[str, Any]) -> str:
    """The daemon's status for a person to read."""
    lines = [("state", status["state"] + (f": {status['reason']}" if status["reason"] else ""))]
    lines.append(("device", f"{status['device']} ({status['kind'] or 'not read yet'})"))
    if status["clock_status"] is not None:
        lines.append(("hypervisor", f"{status['clock_status']}, marker {status['disruption_marker']}"))
    if status["offset_ns"] is not None:
        bound = status["maxerror_ns"]
        lines.append(
            (
                "offset",
                f"{seconds(status['offset_ns'], sign=True)}, bound {'none' if bound is None else seconds(bound)}",
            )
        )
    if status["warning"]:
        lines.append(("warning", f"a disruption is announced: {status['warning']}"))
    for sink in status["sinks"]:
        health = "good" if sink["ok"] else sink["error"] or "nothing sent yet"
        lines.append((sink["type"], f"{sink['name']}: {sink['sent']} sent, {sink['dropped']} dropped; {health}"))
    if status["chronyd"] is not None:
        lines.append(("chronyd", "answers" if status["chronyd"]["ok"] else status["chronyd"]["error"]))
    withheld = ", ".join(f"{count} {cause}" for cause, count in sorted(status["withheld"].items()))
    lines.append(("samples", f"{status['samples']} fed" + (f"; withheld: {withheld}" if withheld else "")))
    lines.append(("disruptions", f"{status['disruptions']} since the start"))
    if status["last_disruption"]:
        lines.append(("last", record_text(status["last_disruption"])))
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


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


def _stamp(ns: int) -> str:
    try:
        return (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ns // 1_000_000_000)) + f".{ns // 1_000_000 % 1000:03d} UTC"
        )
    except (OverflowError, ValueError, OSError):
        return f"{ns / 1e9:.3f} s"
