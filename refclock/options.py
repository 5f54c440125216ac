"""Every option of the daemon, once: command line, configuration file, validation and help come from this table."""

from __future__ import annotations

import os

from .errors import ConfigError

NSEC_PER_SEC = 1_000_000_000

CONFIG_PATH = "/etc/vmclock-refclock.toml"
DEVICE_PATH = "/dev/vmclock0"
STATUS_PATH = "/run/vmclock-refclock/status.sock"
STATE_DIR = "/var/lib/vmclock-refclock"
CHRONYD_PATH = "/run/chrony/chronyd.sock"

LONGEST_SOCKET_PATH = 107  # sun_path, unix(7)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Option:
    """One option.  ``parse`` turns a string or a TOML value into what the program uses, or raises ValueError
    with what is allowed."""

    __slots__ = ("attribute", "default", "help", "metavar", "name", "parse", "repeatable")

    def __init__(
        self,
        name: str,
        metavar: str,
        default: str | None,
        parse: Callable[[Any], Any],
        help: str,
        repeatable: bool = False,
    ) -> None:
        self.name = name
        self.metavar = metavar
        self.default = default
        self.parse = parse
        self.help = help
        self.repeatable = repeatable
        self.attribute = name.replace("-", "_")


def seconds(least: float, most: float) -> Callable[[Any], int]:
    """A parser of seconds within a range; what it returns is nanoseconds."""

    def parse(value: Any) -> int:
        allowed = f"seconds from {least:g} to {most:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(allowed)
        try:
            number = float(value)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= number <= most:
            raise ValueError(allowed)
        return round(number * NSEC_PER_SEC)

    return parse


def choice(*allowed: str) -> Callable[[Any], str]:
    """A parser of one of a few words."""

    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(" or ".join(allowed))
        return str(value)

    return parse


def path(value: Any) -> str:
    """A parser of a path."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("a path")
    return value


def path_or_none(value: Any) -> str | None:
    """A parser of a path, or the word none."""
    return None if value == "none" else path(value)


def socket_path(value: Any) -> str:
    """A parser of a Unix socket's path."""
    if len(os.fsencode(path(value))) > LONGEST_SOCKET_PATH:
        raise ValueError(f"a path of at most {LONGEST_SOCKET_PATH} bytes, as a socket's must be")
    return path(value)


def socket_path_or_none(value: Any) -> str | None:
    """A parser of a Unix socket's path, or the word none."""
    return None if value == "none" else socket_path(value)


def shm(value: Any) -> tuple[int, int]:
    """A parser of ``UNIT[:perm=OCTAL]``: the unit and the permissions for a segment that is made anew."""
    allowed = "UNIT[:perm=OCTAL], a unit from 0 to 255, for example 2:perm=0640"
    unit, _, rest = str(value).partition(":")
    key, _, octal = rest.partition("=")
    if isinstance(value, bool) or not unit.isdecimal() or int(unit) > 255 or (rest and key != "perm"):
        raise ValueError(allowed)
    try:
        permissions = int(octal, 8) if rest else 0o600
    except ValueError:
        raise ValueError(allowed) from None
    if not 0 <= permissions <= 0o777:
        raise ValueError(allowed)
    return int(unit), permissions


def command(value: Any) -> list[str]:
    """A parser of an executable's path with arguments, quoted as for a shell; no shell runs it."""
    import shlex

    allowed = "an executable's absolute path, with arguments"
    if not isinstance(value, str):
        raise ValueError(allowed)
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"{allowed} ({error})") from None
    if not words or not words[0].startswith("/"):
        raise ValueError(allowed)
    return words


OPTIONS = (
    Option("device", "PATH", DEVICE_PATH, path, "the vmclock device; waited for if it is not there"),
    Option("sock", "PATH", None, socket_path, "chronyd's SOCK socket, as in chrony.conf", repeatable=True),
    Option("shm", "UNIT[:perm=OCTAL]", None, shm, "NTP shared memory unit; perm (0600) if we make it", repeatable=True),
    Option("interval", "S", "0.05", seconds(0.001, 3600), "time between samples"),
    Option("watch", "S", "0.01", seconds(0.0001, 10), "time between looks at the page, where nothing notifies"),
    Option(
        "on-disruption",
        "step|flag",
        "step",
        choice("step", "flag"),
        "set the clock right, or only say that it is wrong",
    ),
    Option("step-threshold", "S", "0.000001", seconds(0, 3600), "an offset below it is left to chronyd"),
    Option("max-error", "S", "0.001", seconds(1e-9, 3600), "the widest error that counts as good"),
    Option("chronyd", "PATH|none", CHRONYD_PATH, socket_path_or_none, "chronyd's command socket"),
    Option("fallback", "PHC|none", "none", path_or_none, "a PTP clock, for pages without time"),
    Option("status", "PATH", STATUS_PATH, socket_path, "where status, wait and drill find the daemon"),
    Option("state-dir", "DIR", STATE_DIR, path, "where the last marker and the journal are kept"),
    Option("journal", "FILE", None, path, "the record of disruptions [DIR/journal.jsonl]"),
    Option("metrics", "FILE", None, path, "OpenMetrics text, for node_exporter's textfile collector"),
    Option("log-samples", "FILE", None, path, "every sample, as CSV"),
    Option("hook", "CMD", None, command, "run on disrupted, recovered, generation, soon, imminent", repeatable=True),
    Option("log-level", "LEVEL", "info", choice("error", "warning", "notice", "info", "debug"), "how much to say"),
    Option("exit-after", "S", None, seconds(0, 1e9), "end by itself [never]"),
)
BY_NAME = {option.name: option for option in OPTIONS}


class Settings:
    """The options' values as the program uses them, by attribute; seconds have become nanoseconds."""

    device: str
    sock: list[str]
    shm: list[tuple[int, int]]
    interval: int
    watch: int
    on_disruption: str
    step_threshold: int
    max_error: int
    chronyd: str | None
    fallback: str | None
    status: str
    state_dir: str
    journal: str | None
    metrics: str | None
    log_samples: str | None
    hook: list[list[str]]
    log_level: str
    exit_after: int | None

    def __init__(self, given: dict[str, Any]) -> None:
        """``given`` are parsed values by option name; the others take their defaults."""
        for option in OPTIONS:
            value: Any = [] if option.repeatable else None
            if option.name in given:
                value = given[option.name]
            elif option.default is not None:
                value = option.parse(option.default)
            setattr(self, option.attribute, value)
        if self.journal is None:
            self.journal = f"{self.state_dir}/journal.jsonl"


def load(file: str) -> dict[str, Any]:
    """The parsed values in a TOML file, by option name.

    Raises ConfigError, with the line and what is allowed, for anything that is not as it should be.
    """
    import tomllib

    try:
        with open(file, "rb") as stream:
            raw = stream.read()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name another file with --config", error.errno) from None
    try:
        text = raw.decode()
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no TOML: {error}") from None
    return {name: _from_file(name, value, f"{file}:{_line_of(name, text)}") for name, value in table.items()}


def _from_file(name: str, value: Any, where: str) -> Any:
    option = BY_NAME.get(name)
    if option is None:
        raise ConfigError(f"{where}: no option {name!r}; there are: {', '.join(BY_NAME)}")
    try:
        if not option.repeatable:
            return option.parse(value)
        if not isinstance(value, list):
            raise ValueError(f"a list, each {option.metavar}")
        return [option.parse(item) for item in value]
    except ValueError as error:
        raise ConfigError(f"{where}: {name} = {value!r}: allowed is {error}") from None


def _line_of(name: str, text: str) -> int:
    """The line on which a top-level key is set."""
    for number, line in enumerate(text.splitlines(), 1):
        key = line.partition("=")[0].strip().strip("[]\"'").partition(".")[0]
        if key.strip() == name:
            return number
    return 1
