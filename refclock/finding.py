"""What a check of `doctor` comes to."""

from __future__ import annotations

from typing import NamedTuple

GOOD, NOTE, PROBLEM = "good", "note", "problem"

#: Where chronyd's socket should lie: the form that the usual AppArmor profile of chronyd allows.
SOCK_PATH = "/run/chrony.vmclock.sock"


class Finding(NamedTuple):
    """What one check came to: ``good``, ``note`` or ``problem``, what was found, and what cures it."""

    level: str
    check: str
    what: str
    cure: str = ""


def good(what: str) -> Finding:
    """As it should be."""
    return Finding(GOOD, "", what)


def note(what: str, cure: str) -> Finding:
    """Worth knowing; it works all the same."""
    return Finding(NOTE, "", what, cure)


def problem(what: str, cure: str) -> Finding:
    """Something does not work, or will not when it matters."""
    return Finding(PROBLEM, "", what, cure)


def from_error(text: str) -> Finding:
    """A problem from a message of ours, which says what is wrong, then what to do, with a semicolon between."""
    what, _, cure = text.partition("; ")
    return problem(what, cure or "see the system's log")
