"""The command line: one function for each command, each returning its exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from io import TextIOWrapper

from . import options
from ._version import __version__
from .errors import EX_NO, EX_OK, ConfigError, RefclockError, Unavailable, UsageError, from_os

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
    if arguments is None:
        arguments = sys.argv[1:]
    _ready_streams()
    try:
        status = _run_command(arguments)
        sys.stdout.flush()
        return status
    except RefclockError as error:
        return _fail(error, arguments)
    except TimeoutError:
        return _fail(Unavailable("the daemon does not answer in time; is it stopped, or overloaded?"), arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return EX_OK  # the reader has seen enough (`| head`)
    except OSError as error:
        _drop_output()
        return _fail(from_os(error, f"refused for {error.filename or 'the output'}"), arguments)


def _run_command(arguments: Sequence[str]) -> int:
    try:
        parsed = _parser().parse_args(arguments)
    except SystemExit as end:  # --help, --version
        return int(end.code or EX_OK)
    status: int = parsed.run(parsed)
    return status


def _ready_streams() -> None:
    """Output that was closed (`>&-`) goes nowhere; what the terminal cannot show is escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stands until the end
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Whatever is still to be written is not: Python's own flush at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: RefclockError, arguments: Sequence[str]) -> int:
    """Says what is wrong; the exit status for it."""
    if arguments[:1] == ["check"]:
        from .check import UNKNOWN, line

        print(line(UNKNOWN, str(error)))
        return UNKNOWN
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return error.exit_status


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="The vmclock page as a reference clock for chrony and NTP.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[Namespace], int], help: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    run = command("run", _run, "run the daemon, in the foreground")
    _daemon_options(run, *options.BY_NAME)

    show = command("show", _show, "decode the page; judge nothing")
    _device(show)
    _json(show)

    sample = command("sample", _sample, "take pairs of system time and reference time")
    _device(sample)
    sample.add_argument("--count", metavar="N", type=_whole(1), default=1, help="how many [1]")
    sample.add_argument("--interval", metavar="S", type=_seconds, default=1.0, help="seconds between them [1]")
    sample.add_argument("--readings", metavar="N", type=_whole(1, 64), default=8, help="clock readings for each [8]")
    sample.add_argument("--format", choices=("text", "json", "csv"), default="text", help="how to print them [text]")
    _json(sample)

    status = command("status", _status, "show what the running daemon believes")
    _status_path(status)
    _json(status)

    monitor = command("monitor", _monitor, "watch it live in a terminal; q ends")
    _status_path(monitor)
    monitor.add_argument("--once", action="store_true", help="print one frame and end")

    check = command("check", _check, "judge the clock, as a plugin for Nagios and its like")
    check.epilog = (
        "The thresholds are for |offset| + bound, the most by which the clock may be off. "
        "CRITICAL are also the states disrupted, unsynchronised, unknown and waiting, and watching while chronyd "
        "is not synchronised; WARNING are adjusting, holdover, a sink or chronyd that does not take part, and an "
        "announced disruption. UNKNOWN: the daemon does not answer."
    )
    _status_path(check)
    check.add_argument(
        "-w",
        "--warning",
        metavar="S",
        type=_seconds,
        help="warn above so many seconds [the daemon's --max-error, at which the clock stops being good]",
    )
    check.add_argument(
        "-c", "--critical", metavar="S", type=_seconds, help="critical above so many seconds [ten times the warning's]"
    )
    check.add_argument(
        "-t", "--timeout", metavar="S", type=_seconds, default=5.0, help="wait so long for the daemon's answer [5]"
    )

    metrics = command("metrics", _metrics, "print OpenMetrics text, for Prometheus and its like")
    _status_path(metrics)

    wait = command("wait", _wait, "wait until the clock is good")
    _status_path(wait)
    wait.add_argument("--timeout", metavar="S", type=_seconds, help="give up after so many seconds [never]")

    history = command("history", _history, "list the disruptions")
    _status_path(history)
    history.add_argument("--journal", metavar="FILE", help="read this journal instead of asking the daemon")
    _json(history)

    drill = command("drill", _drill, "make the running daemon treat this moment as a disruption")
    _status_path(drill)

    doctor = command("doctor", _doctor, "look for what keeps the clock from being right, and say what to do")
    _daemon_options(doctor, "device", "sock", "shm", "chronyd", "fallback", "status")
    doctor.add_argument("--root", metavar="DIR", default="/", help=SUPPRESS)
    _json(doctor)

    validate = command("validate", _validate, "load a configuration and say what is wrong with it")
    validate.add_argument("file", metavar="FILE")

    simulate = command("simulate", _simulate, "play the hypervisor on a file")
    simulate.add_argument("path", metavar="PATH")
    simulate.add_argument("--offset", metavar="S", type=float, default=0.0, help="true time - system clock [0]")
    simulate.add_argument("--frequency", metavar="PPM", type=float, default=0.0, help="how fast that grows [0]")
    simulate.add_argument("--time-type", metavar="TYPE", default="tai", help="its time: utc, tai or monotonic [tai]")
    simulate.add_argument("--status", metavar="NAME", default="synchronized", help="clock status [synchronized]")
    simulate.add_argument("--leap", metavar="NAME", default="none", help="leap indicator [none]")
    simulate.add_argument("--tai-offset", metavar="N", type=int, default=-37, help="UTC - TAI in seconds [-37]")
    simulate.add_argument("--maxerror", metavar="NS", type=_whole(0), default=10_000, help="the page's bound [10000]")
    simulate.add_argument("--esterror", metavar="NS", type=_whole(0), default=1_000, help="its estimate [1000]")
    simulate.add_argument("--update", metavar="S", type=_seconds, default=1.0, help="between updates [1]")
    simulate.add_argument("--no-time", action="store_true", help="a page that tells of disruptions only")

    demo = command("demo", _demo, "show it at work with a simulated page and a private chronyd")
    demo.add_argument("--chronyd-binary", metavar="FILE", help="the chronyd to run [found in PATH or sbin]")
    return parser


def _daemon_options(parser: Parser, *names: str) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help=f"TOML; the command line wins [{options.CONFIG_PATH}, if it is there]"
    )
    for option in (options.BY_NAME[name] for name in names):
        default = f" [{option.default}]" if option.default is not None else ""
        parser.add_argument(
            f"--{option.name}",
            metavar=option.metavar,
            action="append" if option.repeatable else "store",
            help=(option.help + default).replace("%", "%%"),
        )


def _device(parser: Parser) -> None:
    parser.add_argument(
        "--device",
        metavar="PATH",
        default=options.DEVICE_PATH,
        help=f"the device, or a file that holds a page [{options.DEVICE_PATH}]",
    )


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
        value = getattr(parsed, option.attribute, None)
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


def _doctor(parsed: Namespace) -> int:
    from .doctor import as_text, diagnose
    from .system import System

    if parsed.root != "/" and parsed.config is None:
        inside = f"{parsed.root}{options.CONFIG_PATH}"
        parsed.config = inside if os.path.exists(inside) else os.devnull
    config_error = ""
    try:
        settings = _settings(parsed)
    except ConfigError as error:
        config_error = str(error)
        parsed.config = os.devnull
        settings = _settings(parsed)
    diagnosis = diagnose(System(settings, parsed.root, config_error))
    print(json.dumps(diagnosis.fields()) if parsed.json else as_text(diagnosis, _in_colour()))
    return EX_OK if diagnosis.good else EX_NO


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
    print(json.dumps(status) if parsed.json else status_text(status, _in_colour()))
    return EX_OK


def _in_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _monitor(parsed: Namespace) -> int:
    try:
        from .monitor import monitor
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        raise Unavailable(f"{library} is not installed; pip install 'vmclock-refclock[monitor]'") from None
    return monitor(parsed.status, parsed.once)


def _check(parsed: Namespace) -> int:
    from .check import judge
    from .status import ask

    thresholds = [None if value is None else round(value * 1e9) for value in (parsed.warning, parsed.critical)]
    if None not in thresholds and parsed.warning > parsed.critical:
        raise UsageError("the warning threshold is above the critical one")
    code, text = judge(ask(parsed.status, "status", parsed.timeout), *thresholds)
    print(text)
    return code


def _metrics(parsed: Namespace) -> int:
    from .status import ask

    print(ask(parsed.status, "metrics"), end="")
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
            except UsageError:
                raise
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
