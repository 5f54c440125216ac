"""refclock.systemclock: what it refuses, on a fake kernel, and what it asks of one where nothing gets through.

The real class Kernel runs in a process whose clock_adjtime is ours and which has lost the right to set the clock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import refclock.systemclock as systemclock
from refclock.errors import NotPermitted, RefclockError
from refclock.systemclock import EARLIEST_NS, UNSYNCHRONISED_USEC, ClockWatch, SystemClock
from tests.harness import environment, never_set_the_clock

SEC = 1_000_000_000
NOW_NS = 1_767_225_600 * SEC

# linux/timex.h
ADJ_FREQUENCY, ADJ_MAXERROR, ADJ_ESTERROR, ADJ_STATUS = 0x0002, 0x0004, 0x0008, 0x0010
ADJ_SETOFFSET, ADJ_NANO, ADJ_TICK = 0x0100, 0x2000, 0x4000
STA_PLL, STA_UNSYNC, STA_NANO = 0x0001, 0x0040, 0x2000
CLOCK_REALTIME = 0


class FakeKernel:
    """The kernel's clock as far as SystemClock knows it."""

    def __init__(self, error: int = 0, forgets: bool = False) -> None:
        self.steps: list[int] = []
        self.flagged: list[int] = []
        self.rates: list[float] = []
        self._error = error
        self._forgets = forgets

    def _fail(self) -> None:
        if self._error:
            raise OSError(self._error, os.strerror(self._error))

    def rate(self) -> float:
        self._fail()
        return 1.0

    def set_rate(self, rate: float) -> None:
        self._fail()
        self.rates.append(rate)

    def is_unsynchronised(self) -> bool:
        return bool(self.flagged) and not self._forgets

    def step(self, offset_ns: int) -> None:
        self._fail()
        self.steps.append(offset_ns)

    def set_unsynchronised(self, error_usec: int) -> None:
        self._fail()
        self.flagged.append(error_usec)


# ---- On good grounds only ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset_ns", [20 * SEC, -20 * SEC, 1001, -1001, 3_000_000_000 * SEC])
def test_a_step(offset_ns: int) -> None:
    kernel = FakeKernel()
    SystemClock(kernel).step(True, offset_ns, NOW_NS, 1000)
    assert kernel.steps == [offset_ns]


def test_never_for_a_plain_file() -> None:
    kernel = FakeKernel()
    clock = SystemClock(kernel)
    with pytest.raises(RefclockError, match="simulation"):
        clock.step(False, 20 * SEC, NOW_NS, 0)
    with pytest.raises(RefclockError, match="simulation"):
        clock.flag_unsynchronised(False)
    with pytest.raises(RefclockError, match="simulation"):
        clock.set_rate(False, 1.0001)
    assert not kernel.steps and not kernel.flagged and not kernel.rates


@pytest.mark.parametrize(
    ("system_ns", "offset_ns", "allowed"),
    [
        (NOW_NS, EARLIEST_NS - NOW_NS, True),
        (NOW_NS, EARLIEST_NS - NOW_NS - 1, False),
        (0, EARLIEST_NS, True),
        (0, EARLIEST_NS - 1, False),
        (-5, 2 * SEC, False),
        (NOW_NS, -NOW_NS, False),
    ],
)
def test_never_to_before_2020(system_ns: int, offset_ns: int, allowed: bool) -> None:
    kernel = FakeKernel()
    if allowed:
        SystemClock(kernel).step(True, offset_ns, system_ns, 0)
    else:
        with pytest.raises(RefclockError, match="before 2020"):
            SystemClock(kernel).step(True, offset_ns, system_ns, 0)
    assert kernel.steps == [offset_ns] * allowed


@pytest.mark.parametrize("offset_ns", [0, 1, -1, 1000, -1000])
def test_never_within_the_bound(offset_ns: int) -> None:
    kernel = FakeKernel()
    with pytest.raises(RefclockError, match="within its bound"):
        SystemClock(kernel).step(True, offset_ns, NOW_NS, 1000)
    assert not kernel.steps


@pytest.mark.parametrize(
    ("rate", "allowed"),
    [(1.0, True), (1.0009, True), (0.9991, True), (1.00101, False), (0.99, False), (0.0, False), (float("nan"), False)],
)
def test_never_to_a_rate_that_is_none(rate: float, allowed: bool) -> None:
    kernel = FakeKernel()
    if allowed:
        SystemClock(kernel).set_rate(True, rate)
    else:
        with pytest.raises(RefclockError, match="none of a counter's"):
            SystemClock(kernel).set_rate(True, rate)
    assert kernel.rates == [rate] * allowed


def test_without_the_right() -> None:
    clock = SystemClock(FakeKernel(errno.EPERM))
    with pytest.raises(NotPermitted, match="CAP_SYS_TIME") as refused:
        clock.step(True, SEC, NOW_NS, 0)
    assert refused.value.errno == errno.EPERM
    with pytest.raises(NotPermitted, match="CAP_SYS_TIME"):
        clock.flag_unsynchronised(True)
    with pytest.raises(NotPermitted, match="CAP_SYS_TIME"):
        clock.set_rate(True, 1.0001)
    assert clock.rate() is None, "a sandbox may forbid even to ask"


def test_the_flag_is_read_back() -> None:
    kernel = FakeKernel()
    SystemClock(kernel).flag_unsynchronised(True)
    assert kernel.flagged == [UNSYNCHRONISED_USEC]
    with pytest.raises(RefclockError, match="did not keep the flag"):
        SystemClock(FakeKernel(forgets=True)).flag_unsynchronised(True)


@pytest.mark.parametrize(("bolted", "expected"), [(False, "True"), (True, "False")])
def test_the_right_is_known_beforehand(bolted: bool, expected: str) -> None:
    if os.geteuid() != 0 or not SystemClock(FakeKernel()).may_set():
        pytest.skip("NOT TESTED: this process has no CAP_SYS_TIME to lose")
    program = "from refclock.systemclock import SystemClock; print(SystemClock(object()).may_set())"
    options = {"preexec_fn": never_set_the_clock} if bolted else {}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        **options,
    )
    assert done.stdout.strip() == expected


# ---- What the kernel is asked ------------------------------------------------------------------------------

PROGRAM = """
import ctypes, sys
assert ctypes.CDLL(None).pretends_clock() == 1, "the real kernel is not to be asked"
from refclock.errors import RefclockError
from refclock.systemclock import Kernel, SystemClock
kernel, clock = Kernel(), SystemClock()
try:
    print(eval(sys.argv[1]))
except (OSError, RefclockError) as error:
    print(type(error).__name__, error.errno, error)
"""


@pytest.fixture
def ask(native: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[str, list[list[int]]]]:
    """Evaluates an expression beside the pretended clock; what it printed, and what the kernel was asked."""
    library = native("pretend_clock", "-shared", "-fPIC")

    def run(expression: str, **pretended: int) -> tuple[str, list[list[int]]]:
        asked = tmp_path / "asked"
        with asked.open("wb") as file:
            extra = {f"PRETEND_{name.upper()}": str(value) for name, value in pretended.items()}
            fcntl.fcntl(file.fileno(), fcntl.F_SETFD, 0)
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, expression],
                env=environment() | {"LD_PRELOAD": str(library), "PRETEND_FD": str(file.fileno())} | extra,
                pass_fds=[file.fileno()],
                preexec_fn=never_set_the_clock,
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), [[int(word) for word in line.split()] for line in asked.read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    "offset_ns", [0, 1, -1, SEC - 1, SEC, -SEC, -SEC + 1, -SEC - 1, 20 * SEC + 5, -20 * SEC - 5, -(1 << 62)]
)
def test_the_kernel_gets_the_exact_offset(ask: Callable[..., tuple[str, list[list[int]]]], offset_ns: int) -> None:
    _, asked = ask(f"kernel.step({offset_ns})")
    [(clock, modes, seconds, nanoseconds, *_)] = asked
    assert (clock, modes) == (CLOCK_REALTIME, ADJ_SETOFFSET | ADJ_NANO)
    assert 0 <= nanoseconds < SEC and seconds * SEC + nanoseconds == offset_ns


def test_the_flag_and_the_errors(ask: Callable[..., tuple[str, list[list[int]]]]) -> None:
    answer, asked = ask("clock.flag_unsynchronised(True), kernel.is_unsynchronised()")
    assert answer == "(None, True)"
    assert [modes for _, modes, *_ in asked] == [0, ADJ_STATUS | ADJ_MAXERROR | ADJ_ESTERROR, 0, 0]
    maxerror, esterror, status = asked[1][4:7]
    assert maxerror == esterror == UNSYNCHRONISED_USEC
    assert status == STA_PLL | STA_NANO | STA_UNSYNC, "what else is set there stays"


def test_a_kernel_that_forgets_the_flag(ask: Callable[..., tuple[str, list[list[int]]]]) -> None:
    answer, _ = ask("clock.flag_unsynchronised(True)", forgets=1)
    assert answer.startswith("RefclockError None the kernel did not keep the flag")


@pytest.mark.parametrize(
    ("tick", "freq", "rate"),
    [
        (10000, 0, 1.0),
        (10000, 65536 * 100, 1 + 100e-6),
        (10000, -65536 * 250, 1 - 250e-6),
        (9990, 6554, 0.999 + 0.1e-6),
    ],
)
def test_the_rate(ask: Callable[..., tuple[str, list[list[int]]]], tick: int, freq: int, rate: float) -> None:
    answer, asked = ask("kernel.rate()", tick=tick, freq=freq)
    assert float(answer) == pytest.approx(rate, abs=1e-11)
    assert [modes for _, modes, *_ in asked] == [0]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1.0, (10000, 0)),
        (1 + 100e-6, (10000, 65536 * 100)),
        (1 - 500e-6, (10000, -65536 * 500)),
        (1 + 530e-6, (10005, 65536 * 30)),
        (1 - 83_000e-6, (9170, 0)),
    ],
)
@pytest.mark.parametrize("tick", [10000, 10001, 9170])
def test_setting_the_rate(
    ask: Callable[..., tuple[str, list[list[int]]]], tick: int, rate: float, expected: tuple[int, int]
) -> None:
    """By freq alone where it reaches; in one call, since chronyd may set the tick between two."""
    answer, asked = ask(f"(kernel.set_rate({rate!r}), kernel.rate())[1]", tick=tick, freq=77)
    assert float(answer) == pytest.approx(rate, abs=1e-11)
    assert [entry[1] for entry in asked] == [ADJ_FREQUENCY | ADJ_TICK, 0]
    assert tuple(asked[1][-2:]) == expected


def test_a_kernel_that_refuses(ask: Callable[..., tuple[str, list[list[int]]]]) -> None:
    for call in (
        f"clock.step(True, {SEC}, {NOW_NS}, 0)",
        "clock.flag_unsynchronised(True)",
        "clock.set_rate(True, 1.0001)",
    ):
        answer, _ = ask(call, errno=errno.EPERM)
        assert answer.startswith(f"NotPermitted {errno.EPERM} cannot") and "CAP_SYS_TIME" in answer
    assert ask(f"clock.step(True, {SEC}, {NOW_NS}, 0)", errno=errno.EINVAL)[0].startswith(
        f"RefclockError {errno.EINVAL}"
    )
    assert ask("clock.rate()", errno=errno.EPERM, mute=1)[0] == "None"


def test_looking_changes_nothing() -> None:
    """The one thing asked of the real kernel in this process: modes 0."""
    assert SystemClock().rate() == pytest.approx(1.0, abs=0.2)
    assert SystemClock().is_unsynchronised() in (True, False)


def test_nothing_else_can_set_the_clock() -> None:
    """One module, one call; searched for in the whole package's source."""
    package = Path(systemclock.__file__).parent
    words = ("clock_settime", "settimeofday", "adjtimex(", "ntp_adjtime", "clock_adjtime", "stime(")
    found = {
        path.name
        for path in [*package.glob("*.py"), *package.glob("*.pyx"), *package.glob("*.h")]
        for word in words
        if word in path.read_text()
        and not all(
            word in line and line.lstrip().startswith(("#", '"'))
            for line in path.read_text().splitlines()
            if word in line
        )
    }
    assert found <= {"systemclock.pyx"}


# ---- The watch ---------------------------------------------------------------------------------------------


def test_a_clock_that_nobody_sets() -> None:
    watch = ClockWatch()
    assert watch.fileno() >= 0 and not watch.was_set() and not watch.was_set()
    watch.close()
    watch.close()
    assert watch.fileno() == -1
