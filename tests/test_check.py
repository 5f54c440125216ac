"""`check`, the plugin for Nagios: what it makes of each status, its one line, and the command."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refclock import model
from refclock.check import CRITICAL, OK, UNKNOWN, WARNING, WORDS, judge, line
from tests.harness import RunningDaemon, Simulator, run
from tests.test_metrics import make_sink, make_status

MSEC = 1_000_000

#: 'label'=value[unit];[warning];[critical];[least];[most]
FIGURE = re.compile(r"(?P<label>\w+)=(?P<value>-?\d+(\.\d+)?)(?P<unit>s|c)(?P<rest>(;[-\d.]*){0,4})")


def judged(warning_ns: int | None = None, critical_ns: int | None = None, **values: Any) -> tuple[int, str]:
    code, text = judge(make_status(**values), warning_ns, critical_ns)
    assert text.startswith(f"VMCLOCK {WORDS[code]} - ")
    assert "\n" not in text and text.count("|") == 1
    return code, text


def figures(text: str) -> dict[str, tuple[float, str]]:
    """Label -> value and what follows it, by the guidelines' form."""
    found = {}
    for word in text.rpartition(" | ")[2].split(" "):
        match = FIGURE.fullmatch(word)
        assert match, word
        found[match["label"]] = (float(match["value"]), match["unit"] + match["rest"])
    return found


# ---- The judgement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "good", "code"),
    [
        ("waiting", False, CRITICAL),
        ("unknown", False, CRITICAL),
        ("disrupted", False, CRITICAL),
        ("unsynchronised", False, CRITICAL),
        ("adjusting", False, WARNING),
        ("holdover", True, WARNING),
        ("synchronised", True, OK),
        ("watching", True, OK),
        ("watching", False, CRITICAL),
    ],
)
def test_states(state: str, good: bool, code: int) -> None:
    found, text = judged(state=state, good=good, reason="some reason" if not good else "")
    assert found == code
    assert state in text
    assert good or "some reason" in text


def test_every_state_is_judged_above() -> None:
    (mark,) = (mark for mark in test_states.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {state for state, _, _ in mark.args[1]} == set(model.STATES)


@pytest.mark.parametrize(
    ("offset_ns", "maxerror_ns", "code"),
    [
        (0, 10_000, OK),
        (990_000, 10_000, OK),
        (-990_000, 10_000, OK),
        (990_001, 10_000, WARNING),
        (-990_001, 10_000, WARNING),
        (0, MSEC + 1, WARNING),
        (9_990_000, 10_000, WARNING),
        (-9_990_001, 10_000, CRITICAL),
        (10 * MSEC, None, WARNING),
        (10 * MSEC + 1, None, CRITICAL),
        (None, None, OK),
    ],
)
def test_the_default_thresholds_follow_the_daemons_limit(
    offset_ns: int | None, maxerror_ns: int | None, code: int
) -> None:
    assert judged(offset_ns=offset_ns, maxerror_ns=maxerror_ns)[0] == code


@pytest.mark.parametrize(
    ("warning_ns", "critical_ns", "code"),
    [
        (None, None, OK),
        (100_000, None, WARNING),
        (10_000, None, CRITICAL),  # ten times the warning's
        (None, 100_000, CRITICAL),  # and then no warning above it
        (None, 200_001, OK),
        (100_000, 150_000, CRITICAL),
        (300_000, 400_000, OK),
        (0, 0, CRITICAL),
    ],
)
def test_given_thresholds(warning_ns: int | None, critical_ns: int | None, code: int) -> None:
    assert judged(warning_ns, critical_ns, offset_ns=190_001, maxerror_ns=10_000)[0] == code


def test_a_sink_that_fails_is_a_warning_and_one_that_had_nothing_to_send_is_none() -> None:
    code, text = judged(sinks=[make_sink("sock", "/run/s", error="No such file"), make_sink("shm", "2")])
    assert code == WARNING
    assert "sock /run/s: No such file" in text and "shm" not in text


@pytest.mark.parametrize(
    ("chronyd", "state", "code", "said"),
    [
        (None, "synchronised", OK, "synchronised"),
        ({"ok": True, "error": None, "normal": None}, "synchronised", OK, "synchronised"),
        ({"ok": True, "error": None, "normal": False}, "synchronised", WARNING, "chronyd: is not synchronised"),
        ({"ok": False, "error": "chronyd's socket is not there", "normal": None}, "watching", WARNING, "not there"),
    ],
)
def test_chronyd(chronyd: dict[str, Any] | None, state: str, code: int, said: str) -> None:
    found, text = judged(chronyd=chronyd, state=state)
    assert found == code and said in text


@pytest.mark.parametrize(("word", "span"), [("soon", "a day"), ("imminent", "an hour")])
def test_an_announced_disruption(word: str, span: str) -> None:
    code, text = judged(warning=word)
    assert code == WARNING and f"within about {span}" in text


def test_the_worst_comes_first() -> None:
    code, text = judged(warning="soon", state="unsynchronised", good=False, reason="the page says so", offset_ns=None)
    assert code == CRITICAL
    assert text.startswith("VMCLOCK CRITICAL - unsynchronised: the page says so; the hypervisor announces")


@given(st.text(), st.text())
def test_the_line_is_one_line_whatever_is_in_it(reason: str, error: str) -> None:
    judged(state="unknown", good=False, reason=reason, sinks=[make_sink("sock", "/a|b\n", error=error)])


def test_figures() -> None:
    _, text = judged(2 * MSEC, 5 * MSEC, offset_ns=-1_500, maxerror_ns=10_000)
    assert figures(text) == {
        "error": (0.0000115, "s;0.002000000;0.005000000;0"),
        "offset": (-0.0000015, "s"),
        "bound": (0.00001, "s;;;0"),
        "disruptions": (3, "c;;;0"),
        "samples": (42, "c;;;0"),
    }


@given(st.integers(-(10**19), 10**19), st.integers(0, 10**19))
def test_figures_have_no_exponent(offset_ns: int, maxerror_ns: int) -> None:
    _, text = judged(offset_ns=offset_ns, maxerror_ns=maxerror_ns)
    assert figures(text)["offset"][0] == pytest.approx(offset_ns / 1e9)


def test_what_is_not_known_has_no_figure() -> None:
    _, text = judged(state="watching", offset_ns=None, maxerror_ns=None)
    assert figures(text).keys() == {"disruptions", "samples"}
    assert line(UNKNOWN, "a | b\nc") == "VMCLOCK UNKNOWN - a / b c"


# ---- The command -------------------------------------------------------------------------------------------


def check(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and the line; nothing else may be said anywhere."""
    done = run("check", *arguments, timeout_s=20)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n")
    assert done.stdout.startswith(f"VMCLOCK {WORDS[done.returncode]} - ")
    return done.returncode, done.stdout


def test_a_day_in_the_life(simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]) -> None:
    simulator = simulate("--offset", "0.0001")
    running = daemon()
    running.wait_state("synchronised")
    status = ("--status", running.status_path)

    code, text = check(*status)
    assert code == OK
    assert figures(text.rstrip())["offset"][0] == pytest.approx(1e-4, abs=2e-5)
    assert check(*status, "-w", "0.00001")[0] == CRITICAL
    assert check(*status, "-w", "0.00001", "-c", "0.001")[0] == WARNING
    assert check(*status, "--warning", "1", "--critical", "2")[0] == OK

    simulator.do("status freerunning")
    running.wait_state("holdover")
    assert check(*status)[0] == WARNING
    simulator.do("status synchronized")
    simulator.do("flags +disruption-soon")
    running.wait_until(lambda status: status["warning"])
    code, text = check(*status)
    assert code == WARNING and "a day" in text
    simulator.do("flags -disruption-soon")
    simulator.do("status unreliable")
    running.wait_state("unsynchronised")
    assert check(*status)[0] == CRITICAL


def test_a_page_without_time(simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]) -> None:
    simulate("--no-time")
    running = daemon()
    running.wait_state("watching")
    assert check("--status", running.status_path)[0] == OK


def test_a_drill_that_is_not_over(simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]) -> None:
    simulator = simulate()
    running = daemon()
    running.wait_state("synchronised")
    simulator.do("status unknown")
    running.wait_state("unsynchronised")
    assert run("drill", "--status", running.status_path).returncode == 0
    code, text = check("--status", running.status_path)
    assert code == CRITICAL and "disrupted" in text


def test_no_device(daemon: Callable[..., RunningDaemon]) -> None:
    running = daemon()
    code, text = check("--status", running.status_path)
    assert code == CRITICAL and "waiting" in text


def test_no_daemon(short_path: Path) -> None:
    code, text = check("--status", short_path / "nobody")
    assert code == UNKNOWN and "is the daemon running?" in text


def test_a_daemon_that_is_stopped(daemon: Callable[..., RunningDaemon]) -> None:
    running = daemon()
    running.send_signal(signal.SIGSTOP)
    code, text = check("--status", running.status_path, "-t", "0.3")
    assert code == UNKNOWN and "does not answer" in text


@pytest.mark.parametrize(
    "arguments", [("-w", "much"), ("-w", "-1"), ("-w",), ("--nonsense",), ("more",), ("-w", "2", "-c", "1")]
)
def test_a_wrong_command_line_is_unknown_too(arguments: tuple[str, ...], short_path: Path) -> None:
    assert check("--status", short_path / "nobody", *arguments)[0] == UNKNOWN


def test_help_explains_the_defaults() -> None:
    done = run("check", "--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for said in ("the daemon's --max-error", "ten times the warning's", "CRITICAL", "holdover", "|offset| + bound"):
        assert said in text
