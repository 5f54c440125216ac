"""chronyd's configuration, read as chronyd reads it: which directives are in force, and where each stands.

Source: chrony.conf(5).  A comment is a whole line; words are separated by white space; the directives' names are
the same in any case.  `include` takes a pattern, `confdir` directories with `*.conf`, `sourcedir` directories with
`*.sources`; of files with one name in several directories the first directory's counts.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .system import System

#: Where distributions keep it: Debian and its kin, then Fedora and most others.
PATHS = ("/etc/chrony/chrony.conf", "/etc/chrony.conf")
COMMENT = "!;#%"
DEEPEST = 10

_FLAGS = {"local", "pps", "tai", "noselect", "prefer", "trust", "require"}


class Directive(NamedTuple):
    """One directive: ``name`` in lower case, its words, and where it stands (``file:line``)."""

    name: str
    words: list[str]
    where: str

    @property
    def text(self) -> str:
        """The directive as one would write it."""
        return " ".join([self.name, *self.words])


class Refclock(NamedTuple):
    """A `refclock` directive: driver (``SOCK``, ``SHM``, ``PHC``, ...), its parameter, the options by name."""

    driver: str
    parameter: str
    options: dict[str, str]
    where: str
    text: str

    @property
    def path(self) -> str:
        """The parameter without the driver's own options, which follow a colon."""
        return self.parameter.partition(":")[0]

    def number(self, option: str, default: float) -> float:
        """An option's value; the default where it is not given, or no number."""
        try:
            return float(self.options[option])
        except (KeyError, ValueError):
            return default


def find(system: System) -> str | None:
    """The file that chronyd reads: the one that a running chronyd was given, else a distribution's."""
    for words in system.command_lines("chronyd"):
        for option, value in pairwise(words):
            if option == "-f" and system.exists(value):
                return value
    return next((path for path in PATHS if system.exists(path)), None)


def load(system: System, path: str) -> list[Directive]:
    """Every directive of a configuration, in chronyd's order, included files where they are included."""
    return list(_directives(system, path, 0))


def refclocks(directives: list[Directive]) -> list[Refclock]:
    """The `refclock` directives that name a driver and its parameter."""
    return [
        Refclock(each.words[0].upper(), each.words[1], _options(each.words[2:]), each.where, each.text)
        for each in directives
        if each.name == "refclock" and len(each.words) >= 2
    ]


def _options(words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        options[word.lower()] = "" if word.lower() in _FLAGS else next(rest, "")
    return options


def _directives(system: System, path: str, depth: int) -> list[Directive]:
    found: list[Directive] = []
    for number, line in enumerate(system.read(path).splitlines(), 1):
        words = line.split()
        if not words or words[0][0] in COMMENT:
            continue
        directive = Directive(words[0].lower(), words[1:], f"{path}:{number}")
        found.append(directive)
        if depth < DEEPEST:
            for included in _included(system, directive):
                found += _directives(system, included, depth + 1)
    return found


def _included(system: System, directive: Directive) -> list[str]:
    if directive.name == "include":
        return [path for pattern in directive.words[:1] for path in system.glob(pattern)]
    ending = {"confdir": ".conf", "sourcedir": ".sources"}.get(directive.name)
    if ending is None:
        return []
    files: dict[str, str] = {}
    for directory in directive.words:
        for path in system.glob(f"{directory}/*{ending}"):
            files.setdefault(os.path.basename(path), path)
    return [files[name] for name in sorted(files)]
