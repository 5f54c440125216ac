"""`doctor`: looks at everything between the hypervisor's page and a right clock, and says what to do.

Each check is a function of a :class:`~refclock.system.System` that returns one finding, or None where it has nothing
to say about this machine; its docstring says what is as it should be.  ``CHECKS`` is the order in which they are told:
along the way from the hypervisor to the consumers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import checks_consumer, checks_machine
from .finding import GOOD, NOTE, PROBLEM, Finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from .system import System


CHECKS: tuple[Callable[[System], Finding | None], ...] = (*checks_machine.CHECKS, *checks_consumer.CHECKS)


class Diagnosis(NamedTuple):
    """All findings, and the line for chrony.conf that fits the page's bounds (None: the page gives no time)."""

    findings: list[Finding]
    line: str | None

    @property
    def good(self) -> bool:
        """Whether there is no problem."""
        return all(finding.level != PROBLEM for finding in self.findings)

    def fields(self) -> dict[str, object]:
        """For JSON."""
        return {"good": self.good, "findings": [finding._asdict() for finding in self.findings], "line": self.line}


def diagnose(system: System) -> Diagnosis:
    """Runs every check."""
    findings = []
    for check in CHECKS:
        finding = check(system)
        if finding is not None:
            findings.append(finding._replace(check=check.__name__.replace("_", "-")))
    return Diagnosis(findings, checks_consumer.suggested_line(system))


#: Select graphic rendition, ECMA-48.
_COLOURS = {GOOD: "32", NOTE: "33", PROBLEM: "31"}


def as_text(diagnosis: Diagnosis, colour: bool = False) -> str:
    """The diagnosis for a person; ``colour`` is for a terminal."""
    lines = []
    for level, check, what, cure in diagnosis.findings:
        mark = f"{level:<8}"
        if colour:
            mark = f"\033[{_COLOURS[level]}m{mark}\033[0m"
        lines.append(f"{mark} {check:<16} {what}")
        if cure:
            lines.append(f"{'':<25} -> {cure}")
    if diagnosis.line is not None:
        lines += ["", "for chrony.conf, by this page's bounds:", f"    {diagnosis.line}"]
    problems = sum(finding.level == PROBLEM for finding in diagnosis.findings)
    lines += ["", f"{problems} problem{'' if problems == 1 else 's'}" if problems else "all is well"]
    return "\n".join(lines)
