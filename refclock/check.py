"""The judgement of `check`, a plugin for Nagios and its like (the guidelines of the Monitoring Plugins).

One line on standard output, beginning with a word that the exit status repeats, and figures behind a ``|``.
"""

from __future__ import annotations

from .show import chronyd_text, seconds, severity, warning_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OK, WARNING, CRITICAL, UNKNOWN = range(4)
WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")

#: The critical threshold, where none is given: so many times the warning threshold.
CRITICAL_FACTOR = 10

_CODES = {"good": OK, "doubtful": WARNING, "bad": CRITICAL}


def line(code: int, text: str, figures: str = "") -> str:
    """What the plugin prints; ``|`` and line ends, which mean something to Nagios, are kept out of the text."""
    text = " ".join(text.replace("|", "/").split())
    return f"VMCLOCK {WORDS[code]} - {text}" + (f" | {figures}" if figures else "")


def judge(status: dict[str, Any], warning_ns: int | None = None, critical_ns: int | None = None) -> tuple[int, str]:
    """Exit status and line for the daemon's status.

    The thresholds are for |offset| + bound, the most by which the clock may be off.  By default a warning comes
    at the daemon's own limit for a good clock (``--max-error``), and the critical threshold is ten times the
    warning threshold.
    """
    if warning_ns is None:
        warning_ns = status["max_error_ns"]
        if critical_ns is not None:
            warning_ns = min(warning_ns, critical_ns)
    if critical_ns is None:
        critical_ns = CRITICAL_FACTOR * warning_ns
    found = [*_of_the_clock(status, warning_ns, critical_ns), *_of_the_others(status)]
    code = max((code for code, _ in found), default=OK)
    # The worst first: a pager shows the beginning.
    complaints = [text for _, text in sorted(found, key=lambda finding: -finding[0])]
    text = "; ".join([*complaints, _summary(status)])
    return code, line(code, text, _figures(status, warning_ns, critical_ns))


def _of_the_clock(status: dict[str, Any], warning_ns: int, critical_ns: int) -> list[tuple[int, str]]:
    """What speaks against the system clock."""
    found = []
    code = _CODES[severity(status)]
    if code != OK:
        why = status["reason"] or ("chronyd is not synchronised" if status["state"] == "watching" else "")
        found.append((code, f"{status['state']}: {why}" if why else status["state"]))
    error_ns = _error_ns(status)
    if error_ns is not None and error_ns > warning_ns:
        code, limit_ns = (CRITICAL, critical_ns) if error_ns > critical_ns else (WARNING, warning_ns)
        found.append((code, f"may be off by {seconds(error_ns)}, more than {seconds(limit_ns)}"))
    return found


def _of_the_others(status: dict[str, Any]) -> list[tuple[int, str]]:
    """What does not work, or is to come."""
    found = [
        (WARNING, f"{sink['type']} {sink['name']}: {sink['error']}")
        for sink in status["sinks"]
        if sink["error"] is not None
    ]
    if status["chronyd"] is not None:
        said, kind = chronyd_text(status["chronyd"])
        if kind == "bad" and severity(status) != "bad":
            found.append((WARNING, f"chronyd: {said}"))
    if status["warning"]:
        found.append((WARNING, warning_text(status["warning"])))
    return found


def _error_ns(status: dict[str, Any]) -> int | None:
    """The most by which the clock may be off, as far as it is known."""
    if status["offset_ns"] is None:
        return None
    error_ns: int = abs(status["offset_ns"]) + (status["maxerror_ns"] or 0)
    return error_ns


def _summary(status: dict[str, Any]) -> str:
    count = status["disruptions"]
    text = f"{count} disruption{'' if count == 1 else 's'} since the daemon's start"
    if status["offset_ns"] is not None:
        bound = "no bound" if status["maxerror_ns"] is None else f"bound {seconds(status['maxerror_ns'])}"
        text = f"offset {seconds(status['offset_ns'], sign=True)}, {bound}, {text}"
    return f"{status['state']}, {text}" if severity(status) == "good" else text


def _figures(status: dict[str, Any], warning_ns: int, critical_ns: int) -> str:
    """Performance data: 'label'=value[unit];[warning];[critical];[least];[most]."""
    figures = []
    error_ns = _error_ns(status)
    if error_ns is not None:
        figures.append(f"error={_s(error_ns)}s;{_s(warning_ns)};{_s(critical_ns)};0")
        figures.append(f"offset={_s(status['offset_ns'])}s")
    if status["maxerror_ns"] is not None:
        figures.append(f"bound={_s(status['maxerror_ns'])}s;;;0")
    figures.append(f"disruptions={status['disruptions']}c;;;0")
    figures.append(f"samples={status['samples']}c;;;0")
    return " ".join(figures)


def _s(ns: int) -> str:
    """Seconds without an exponent, which not every reader of performance data understands."""
    return f"{ns / 1e9:.9f}"
