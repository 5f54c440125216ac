"""The command line: one function for each command, each returning its exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace

from . import options
from ._version import __version__
from .errors import EX_NO, EX_OK, ConfigError, RefclockError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

PROGRAM = "vmclock-refclock"


class Parser(ArgumentParser):
    """Errors in one line, with the usual exit status of a wrong command line."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[-1]
        raise UsageError(f"{message}; see `{PROGRAM} {'' if command == PROGRAM else command + ' '}--help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    try:
        parsed = _parser().parse_args(arguments)
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except RefclockError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`| head`); Python's own flush at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_OK


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="The vmclock page as a reference clock for chrony and NTP.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[Namespace], int], help: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    run = command("run", _run, "run the daemon, in the foreground")
    run.add_argument(
        "--config", metavar="FILE", help=f"TOML; the command line wins [{options.CONFIG_PATH}, if it is there]"
    )
    for option in options.OPTIONS:
        default = f" [{option.default}]" if option.default is not None else ""
        run.add_argument(
            f"--{option.name}",
            metavar=option.metavar,
            action="append" if option.repeatable else "store",
            help=(option.help + default).replace("%", "%%"),
        )

    show = command("show", _show, "decode the page; judge nothing")
    _device(show)
    _json(show)

    sample = command("sample", _sample, "take pairs of system time and reference time")
    _device(sample)
    sample.add_argument("--count", metavar="N", type=_whole(1), default=1, help="how many [1]")
    sample.add_argument("--interval", metavar="S", type=_seconds, default=1.0, help="seconds between them [1]")
    sample.add_argument("--readings", metavar="N", type=_whole(1, 64), default=8, help="clock readings for each [8]")
    sample.add_argument("--format", choices=("text", "json", "csv"), default="text")
    _json(sample)

    status = command("status", _status, "show what the running daemon believes")
    _status_path(status)
    _json(status)

    wait = command("wait", _wait, "wait until the clock is good")
    _status_path(wait)
    wait.add_argument("--timeout", metavar="S", type=_seconds, help="give up after so many seconds [never]")

    history = command("history", _history, "list the disruptions")
    _status_path(history)
    history.add_argument("--journal", metavar="FILE", help="read this journal instead of asking the daemon")
    _json(history)

    drill = command("drill", _drill, "make the running daemon treat this moment as a disruption")
    _status_path(drill)

    validate = command("validate", _validate, "load a configuration and say what is wrong with it")
    validate.add_argument("file", metavar="FILE")

    simulate = command("simulate", _simulate, "play the hypervisor on a file")
    simulate.add_argument("path", metavar="PATH")
    simulate.add_argument("--offset", metavar="S", type=float, default=0.0, help="true time - system clock [0]")
    simulate.add_argument("--frequency", metavar="PPM", type=float, default=0.0, help="how fast that grows [0]")
    simulate.add_argument("--time-type", metavar="TYPE", default="tai", help="utc, tai or monotonic [tai]")
    simulate.add_argument("--status", metavar="NAME", default="synchronized", help="clock status [synchronized]")
    simulate.add_argument("--leap", metavar="NAME", default="none", help="leap indicator [none]")
    simulate.add_argument("--tai-offset", metavar="N", type=int, default=-37, help="UTC - TAI in seconds [-37]")
    simulate.add_argument("--maxerror", metavar="NS", type=_whole(0), default=10_000, help="[10000]")
    simulate.add_argument("--esterror", metavar="NS", type=_whole(0), default=1_000, help="[1000]")
    simulate.add_argument("--update", metavar="S", type=_seconds, default=1.0, help="between updates [1]")
    simulate.add_argument("--no-time", action="store_true", help="a page that tells of disruptions only")

    demo = command("demo", _demo, "show it at work with a simulated page and a private chronyd")
    demo.add_argument("--chronyd-binary", metavar="FILE", help="the chronyd to run [found in PATH or sbin]")
    return parser


def _device(parser: Parser) -> None:
    parser.add_argument("--device", metavar="PATH", default=options.DEVICE_PATH, help=f"[{options.DEVICE_PATH}]")


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status_path(parser: Parser) -> None:
    parser.add_argument(
        "--status", metavar="PATH", default=options.STATUS_PATH, help=f"the daemon's socket [{options.STATUS_PATH}]"
    )


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            raise ValueError
        return number

    parse.__name__ = f"number (from {least}{'' if most is None else f' to {most}'})"
    return parse


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise ValueError
    return number


_seconds.__name__ = "number of seconds"


# ---- The daemon ------------------------------------------------------------------------------------------


def _settings(parsed: Namespace) -> options.Settings:
    given: dict[str, Any] = {}
    if parsed.config is not None:
        given = options.load(parsed.config)
    elif os.path.exists(options.CONFIG_PATH):
        given = options.load(options.CONFIG_PATH)
    for option in options.OPTIONS:
        value = getattr(parsed, option.attribute)
        if value is None:
            continue
        try:
            given[option.name] = [option.parse(item) for item in value] if option.repeatable else option.parse(value)
        except ValueError as error:
            raise UsageError(f"--{option.name} {value!r}: allowed is {error}") from None
    return options.Settings(given)


def _run(parsed: Namespace) -> int:
    from .log import Log
    from .service import Service

    settings = _settings(parsed)
    Service(settings, lambda: _settings(parsed), Log(settings.log_level)).run()
    return EX_OK


def _validate(parsed: Namespace) -> int:
    options.Settings(options.load(parsed.file))
    print(f"{parsed.file}: good")
    return EX_OK


# ---- The page --------------------------------------------------------------------------------------------


def _show(parsed: Namespace) -> int:
    from .page import Page
    from .show import as_json, as_text

    with Page(parsed.device) as page:
        print(json.dumps(as_json(page)) if parsed.json else as_text(page))
    return EX_OK


def _sample(parsed: Namespace) -> int:
    from .page import Page, Sample
    from .samplelog import HEADER, row

    def text(sample: Sample) -> str:
        bound = "none" if sample.maxerror_ns is None else f"{sample.maxerror_ns} ns"
        offset = f"offset {sample.offset_ns / 1e9:+.9f} s ± {sample.uncertainty_ns} ns"
        return f"{_utc(sample.reference_ns)}  {offset}  bound {bound}  {sample.clock_status}"

    formatter: Callable[[Sample], str] = text
    if parsed.json or parsed.format == "json":
        formatter = lambda sample: json.dumps(sample.fields())  # noqa: E731
    elif parsed.format == "csv":
        print(HEADER)
        formatter = row
    with Page(parsed.device) as page:
        due = time.monotonic()
        for number in range(parsed.count):
            if number and parsed.interval:
                due += parsed.interval
                time.sleep(max(0.0, due - time.monotonic()))
            print(formatter(page.sample(parsed.readings)), flush=parsed.interval > 0)
    return EX_OK


def _utc(ns: int) -> str:
    seconds, nanoseconds = divmod(ns, 1_000_000_000)
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"
    except (OverflowError, ValueError, OSError):
        return f"{seconds}.{nanoseconds:09d} s"


def _simulate(parsed: Namespace) -> int:
    from . import model
    from .simulator import Simulation, number_of, play

    time_type = number_of(parsed.time_type, model.TIME_TYPES, "type")
    simulation = Simulation(
        parsed.path,
        offset_s=parsed.offset,
        frequency_ppm=parsed.frequency,
        time_type=time_type,
        status=number_of(parsed.status, model.CLOCK_STATUSES, "status"),
        leap=number_of(parsed.leap, model.LEAPS, "leap"),
        tai_offset_sec=parsed.tai_offset,
        maxerror_ns=parsed.maxerror,
        esterror_ns=parsed.esterror,
        no_time=parsed.no_time,
    )
    play(simulation, parsed.update or 0.001, f"ready {parsed.path}")
    return EX_OK


def _demo(parsed: Namespace) -> int:
    from .demo import demo

    return demo(parsed.chronyd_binary)


# ---- The running daemon ----------------------------------------------------------------------------------


def _status(parsed: Namespace) -> int:
    from .show import status_text
    from .status import ask

    status = ask(parsed.status, "status")
    print(json.dumps(status) if parsed.json else status_text(status))
    return EX_OK


def _wait(parsed: Namespace) -> int:
    from .status import answers

    give_up = None if parsed.timeout is None else time.monotonic() + parsed.timeout
    state = "not there"
    try:
        # The daemon may not be there yet, or be restarted meanwhile: it is waited for as well.
        while True:
            left = None if give_up is None else max(0.001, give_up - time.monotonic())
            try:
                for status in answers(parsed.status, "watch", left):
                    state = status["state"]
                    if status["good"]:
                        return EX_OK
                    if give_up is not None and time.monotonic() >= give_up:
                        raise TimeoutError
            except RefclockError:
                if give_up is not None and time.monotonic() + 0.1 >= give_up:
                    raise
                time.sleep(0.1)
    except TimeoutError:
        print(
            f"{PROGRAM}: the clock is not good after {parsed.timeout:g} s: {state}; see `{PROGRAM} status`",
            file=sys.stderr,
        )
        return EX_NO


def _history(parsed: Namespace) -> int:
    from . import journal
    from .show import record_text
    from .status import ask

    if parsed.journal is None:
        records = ask(parsed.status, "history")
    else:
        try:
            records = [record for _, record in journal.latest(journal.read(parsed.journal))]
        except OSError as error:
            raise ConfigError(f"{parsed.journal}: {error.strerror}", error.errno) from None
    for record in records:
        print(json.dumps(record) if parsed.json else record_text(record))
    if not records and not parsed.json:
        print("no disruption so far")
    return EX_OK


def _drill(parsed: Namespace) -> int:
    from .status import ask

    status = ask(parsed.status, "drill")
    print(f"drill begun: {status['state']}; `{PROGRAM} history` tells how it goes")
    return EX_OK
