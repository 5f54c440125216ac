"""refclock.reaction: a guest in simulated time, with an oscillator, a kernel clock and a chronyd of its own.

Nothing here reaches this machine's clock: the kernel is a fake behind SystemClock, and time is counted, not read.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from struct import unpack_from

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refclock import reaction as module
from refclock.chronyd import Command, Request, decode_float
from refclock.model import SYNCHRONIZED, UNKNOWN, Snapshot, encode
from refclock.options import Settings
from refclock.page import Sample
from refclock.phc import Phc
from refclock.policy import Look, Policy, Record
from refclock.reaction import PATIENCE_NS, QUICK_FOR_NS, Reaction
from refclock.systemclock import SystemClock

USEC = 1_000
MSEC = 1_000_000
SEC = 1_000_000_000
#: 2026-01-01.
NOW_NS = 1_767_225_600 * SEC

TICKS_PER_NS = 2.5
#: The old host's period, as its page says it.
PERIOD_NS = 1 / TICKS_PER_NS
#: The constant of this boot: what the kernel advances the clock by in a tick, without corrections.
UNCORRECTED_NS = PERIOD_NS * (1 + 37e-6)
KERNEL_TICK_NS = 4 * MSEC

WATCH_FD, CHRONYD_FD = 1000, 1001


class FakeWatch:
    """A ClockWatch whose clock is set by tests, and by steps of the fake kernel's clock."""

    def __init__(self) -> None:
        self.pending = False

    def fileno(self) -> int:
        return WATCH_FD

    def was_set(self) -> bool:
        was, self.pending = self.pending, False
        return was

    def close(self) -> None:
        pass


class FakeKernel:
    """The kernel's clock; what is done to it is written into the guest's history."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.refuses = 0

    def rate(self) -> float:
        return self._guest.word

    def set_rate(self, rate: float) -> None:
        self._refuse()
        self._guest.note("rate", rate)
        self._guest.set_word(rate, self._guest.now_ns)

    def is_unsynchronised(self) -> bool:
        return any(what == "flag" for _, what, _ in self._guest.history)

    def _refuse(self) -> None:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))

    def step(self, offset_ns: int) -> None:
        self._refuse()
        self._guest.note("step", offset_ns)
        self._guest.step(offset_ns)

    def set_unsynchronised(self, error_usec: int) -> None:
        self._refuse()
        self._guest.note("flag", error_usec)


class FakeClock(SystemClock):
    """The real SystemClock over the fake kernel."""

    def __init__(self, kernel: FakeKernel, may_set: bool) -> None:
        super().__init__(kernel)
        self._may_set = may_set

    def may_set(self) -> bool:
        return self._may_set


class FakeTracking:
    def __init__(self, normal: bool, frequency_ppm: float) -> None:
        self.normal = normal
        self.frequency_ppm = frequency_ppm

    def fields(self) -> dict[str, int | float]:
        return {}


class FakeChronyd:
    """chronyd and the way to it, with the verbs of refclock.chronyd.Chronyd.

    ``mood``: ``well``, ``absent`` (no socket), ``stopped`` (takes requests, answers none), ``forbidden`` (permission
    refused), ``full`` (does not even take requests).  ``full_for``: so many requests find no room.  ``refuses``: the
    commands that it refuses, and why.
    """

    LATENCY_NS = 200 * USEC
    GIVES_UP_NS = 3_750 * MSEC

    def __init__(self, guest: Guest, path: str) -> None:
        self.guest = guest
        self.path = path
        self.error = ""
        self.mood = "well"
        self.full_for = 0
        self.refuses: dict[str, str] = {}
        self.latency_ns = self.LATENCY_NS
        self.base = PERIOD_NS / UNCORRECTED_NS
        self.samples = 0
        self.samples_wanted = 3
        self.ntp_after_ns: int | None = None
        self.ignores_bursts = 0
        self.ntp_at_ns: int | None = None
        self.left_ns = 0
        self.normal = True
        self.answers: list[tuple[int, Request]] = []
        self.finished: list[Request] = []
        self.pending: list[Request] = []
        self.asked = 0
        self.connections = 1

    def fileno(self) -> int:
        return CHRONYD_FD

    def send(self, command: Command, now_ns: int) -> Request:
        request = Request(command, 0, now_ns, 250 * MSEC)
        self.asked += 1
        self.guest.note("ask" if command.text == "tracking" else "send", command.text)
        mood = self.mood
        if self.full_for:
            self.full_for, mood = self.full_for - 1, "full"
        if mood in ("well", "stopped"):
            request.delivered = True
            self.pending.append(request)
            if mood == "well":
                self.answers.append((now_ns + self.latency_ns, request))
        else:
            permanent = mood == "forbidden"
            detail = {"absent": "its socket is not there", "full": "it does not read", "forbidden": "may not write"}
            request.detail = self.error = detail[mood]
            if permanent or not command.repeatable:
                self._finish(request, False, now_ns)
            else:
                self.pending.append(request)
        return request

    def _finish(self, request: Request, ok: bool, now_ns: int) -> None:
        request.ok, request.finished_ns = ok, now_ns
        self.finished.append(request)

    def receive(self, now_ns: int) -> list[Request]:
        due = [entry for entry in self.answers if entry[0] <= now_ns]
        for entry in due:
            self.answers.remove(entry)
            at_ns, request = entry
            if request not in self.pending:
                continue  # given up meanwhile
            self.pending.remove(request)
            text = request.command.text
            refusal = self.refuses.get(text.split()[0])
            self.error = ""
            if refusal is not None:
                request.detail = f"chronyd refused: {refusal}"
            else:
                self._obey(request, text, at_ns)
            self._finish(request, refusal is None, now_ns)
        return self._collect()

    def _obey(self, request: Request, text: str, now_ns: int) -> None:
        if text == "tracking":
            ntp = self.ntp_at_ns is not None and now_ns >= self.ntp_at_ns
            normal = self.normal or self.samples >= self.samples_wanted or ntp
            request.tracking = FakeTracking(normal, (self.base - 1) * 1e6)  # type: ignore[assignment]
            return
        self.guest.note(text.split()[0], ppm_of(request.command) if text.startswith("dfreq") else None)
        if text == "reset sources":
            self.normal, self.samples, self.ntp_at_ns = False, 0, None
            self.guest.set_word(self.base, now_ns)  # its slew ends
        elif text.startswith("dfreq"):
            self.base *= 1 - ppm_of(request.command) * 1e-6
            self.guest.set_word(self.base, now_ns)
        elif text.startswith("burst") and self.ignores_bursts:
            self.ignores_bursts -= 1
        elif text.startswith("burst") and self.ntp_after_ns is not None:
            self.ntp_at_ns = now_ns + self.ntp_after_ns
        elif text == "makestep":
            self.guest.step(self.guest.error_ns())

    def hurry(self, now_ns: int) -> None:
        for request in self.pending:
            if not request.delivered and self.mood == "well":
                request.delivered, request.detail = True, ""
                self.answers.append((now_ns + self.latency_ns, request))

    def tick(self, now_ns: int) -> list[Request]:
        for request in list(self.pending):
            if not request.delivered and self.mood == "well" and now_ns >= request.deadline_ns:
                request.delivered, request.detail = True, ""
                self.answers.append((now_ns + self.latency_ns, request))
            elif not request.delivered and now_ns >= request.deadline_ns:
                request.deadline_ns += 250 * MSEC
            if now_ns >= request.sent_ns + self.GIVES_UP_NS:
                self.pending.remove(request)
                request.detail = request.detail or f"no answer in {self.GIVES_UP_NS / 1e9:.1f} s"
                self.error = request.detail
                self._finish(request, False, now_ns)
        return self._collect()

    def next_deadline_ns(self) -> int | None:
        if self.finished:
            return self.finished[0].finished_ns
        return min((self._due_ns(request) for request in self.pending), default=None)

    def _due_ns(self, request: Request) -> int:
        give_up_ns = request.sent_ns + self.GIVES_UP_NS
        return give_up_ns if request.delivered else min(give_up_ns, request.deadline_ns)

    def _collect(self) -> list[Request]:
        finished, self.finished = self.finished, []
        return finished

    def close(self) -> None:
        pass


def ppm_of(command: Command) -> float:
    return decode_float(unpack_from(">I", command.packet, 20)[0])


class FakePage:
    """What Reaction knows of a page."""

    def __init__(self, is_device: bool) -> None:
        self.is_device = is_device
        self.period_ns = PERIOD_NS


class Guest:
    """The page, the counter, the clock, the daemon's policy and reaction, and the loop that drives them."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        is_device: bool = True,
        may_set: bool = True,
        chronyd: bool = True,
        kind: str = "time",
        mood: str = "well",
        fallback: FakePhc | None = None,
        seed: int = 1,
        **options: object,
    ) -> None:
        self.now_ns = 100 * SEC
        self.history: list[tuple[int, str, object]] = []
        self.logged: list[str] = []
        self.random = random.Random(seed)
        self.noise_ns = 2.0
        # The clock: a line through the counter; its slope is the word that the kernel runs by now.
        self.word = self._running = PERIOD_NS / UNCORRECTED_NS
        self._word_at_ns = 0
        self._line = (self.counter(), NOW_NS, 0.0)
        self.kernel = FakeKernel(self)
        self.watch = FakeWatch()
        # The page.
        self.kind, self.status, self.marker, self.bound_ns = kind, SYNCHRONIZED, 1, 100
        self.page = FakePage(is_device)
        self._truth = (self.counter(), NOW_NS, PERIOD_NS)
        self._publish()
        # The daemon.
        monkeypatch.setattr(module, "ClockWatch", lambda: self.watch)
        monkeypatch.setattr(module, "Chronyd", lambda path: FakeChronyd(self, path))
        monkeypatch.setattr(module, "Phc", lambda path: fallback)
        if fallback is not None:
            fallback.guest = self
        given = {"chronyd": "/run/chronyd.sock" if chronyd else None, "fallback": "/dev/ptp7" if fallback else None}
        self.settings = Settings(given | {name.replace("_", "-"): value for name, value in options.items()})
        self.policy = Policy(max_error_ns=self.settings.max_error, has_chronyd=chronyd)
        self.reaction = Reaction(self.settings, self.policy, self._log, FakeClock(self.kernel, may_set))
        self.records: list[Record] = []
        self.closed: list[Record] = []
        self.fed: list[Sample] = []
        self.reaction.opened(self.page)  # type: ignore[arg-type]
        if chronyd:
            self.chronyd.mood = mood

    def _log(self, level: str, text: str) -> None:
        self.logged.append(text)

    @property
    def chronyd(self) -> FakeChronyd:
        assert isinstance(self.reaction._chronyd, FakeChronyd)
        return self.reaction._chronyd

    # -- The clock

    def note(self, what: str, value: object = None) -> None:
        self.history.append((self.now_ns, what, value))

    def counter(self) -> int:
        return (1 << 40) + round(self.now_ns * TICKS_PER_NS)

    def _exact_ns(self) -> tuple[int, float]:
        """The clock, as whole nanoseconds and a rest: exact over any time."""
        self._apply_word()
        counter, system_ns, rest_ns = self._line
        elapsed_ns = (self.counter() - counter) * UNCORRECTED_NS * self._running + rest_ns
        return system_ns + int(elapsed_ns // 1), elapsed_ns % 1

    def system_ns(self, noise_ns: float = 0.0) -> int:
        system_ns, rest_ns = self._exact_ns()
        return system_ns + round(rest_ns + self.random.gauss(0, noise_ns))

    def _apply_word(self) -> None:
        if self._running == self.word or self.now_ns < self._word_at_ns:
            return
        later_ns, self.now_ns = self.now_ns, self._word_at_ns
        counter, system_ns, rest_ns = self._line
        elapsed_ns = (self.counter() - counter) * UNCORRECTED_NS * self._running + rest_ns
        self._line = (self.counter(), system_ns + int(elapsed_ns // 1), elapsed_ns % 1)
        self._running = self.word
        self.now_ns = later_ns

    def set_word(self, word: float, now_ns: int) -> None:
        """As adjtimex does: in force at once (Linux 4.19 and later)."""
        self._exact_ns()
        self.word = word
        self._word_at_ns = self.now_ns

    def step(self, offset_ns: int) -> None:
        system_ns, rest_ns = self._exact_ns()
        self._line = (self.counter(), system_ns + offset_ns, rest_ns)
        self.watch.pending = True

    def utc_ns(self) -> int:
        counter, utc_ns, period_ns = self._truth
        return utc_ns + round((self.counter() - counter) * period_ns)

    def error_ns(self) -> int:
        """True time - system clock."""
        return self.utc_ns() - self.system_ns()

    def slope_ppm(self) -> float:
        """How fast the error grows once the kernel does what it was told."""
        return (self._truth[2] / (UNCORRECTED_NS * self.word) - 1) * 1e6

    # -- The page

    def _publish(self) -> None:
        fields = {"size": 4096, "disruption_marker": self.marker, "clock_status": self.status}
        self.snapshot = Snapshot(encode(fields))

    def publish(self, kind: str = "time", status: int = SYNCHRONIZED) -> None:
        self.kind, self.status = kind, status
        self._publish()

    def disrupt(
        self, lost_ns: int = 20 * SEC, ppm: float = 0.0, kind: str | None = None, status: int = SYNCHRONIZED
    ) -> None:
        """A new host: the clock has lost so much, and the counter runs so much slower than on the old one."""
        self._truth = (self.counter(), self.utc_ns() + lost_ns, PERIOD_NS * (1 + ppm * 1e-6))
        self.page.period_ns = self._truth[2]
        self.marker += 1
        self.publish(kind or self.kind, status)

    def _look(self) -> Look:
        if self.kind == "signal":
            return Look(self.snapshot, None, "signal", "no time")
        if self.status != SYNCHRONIZED:
            return Look(self.snapshot, None, "status", "unknown")
        sample = Sample(
            system_ns=self.system_ns(self.noise_ns),
            reference_ns=self.utc_ns(),
            uncertainty_ns=15,
            maxerror_ns=self.bound_ns,
            disruption_marker=self.marker,
            counter=self.counter(),
        )
        return Look(self.snapshot, sample)

    # -- The loop

    def run(self, for_ns: int, until: Callable[[], object] = lambda: False) -> None:
        """Lets the daemon work until `until` (checked after each round) or for so long."""
        end_ns = self.now_ns + for_ns
        while self.now_ns < end_ns:
            self.now_ns += 50 * USEC
            self._act(self.policy.look(self.now_ns, self.system_ns(), self._look()))
            next_look_ns = self.now_ns + self.reaction.interval_ns(self.now_ns)
            self._act(self.reaction.tick(self.now_ns))
            if until():
                return
            due_ns = [end_ns, next_look_ns]
            if self.reaction.due_ns() is not None:
                due_ns.append(self.reaction.due_ns() or 0)
            if self.reaction._chronyd is not None:
                due_ns += [at_ns for at_ns, _ in self.chronyd.answers]
            if not self.watch.pending:
                self.now_ns = max(self.now_ns, min(due_ns))
            ready = [WATCH_FD] if self.watch.pending else []
            if self.reaction._chronyd is not None and any(at_ns <= self.now_ns for at_ns, _ in self.chronyd.answers):
                ready.append(CHRONYD_FD)
            self._act(self.reaction.hear(ready, self.now_ns))

    def _act(self, actions: list[tuple[str, object]]) -> None:
        for verb, subject in actions:
            if verb == "react":
                assert isinstance(subject, Record)
                self.records.append(subject)
                self.reaction.begin(subject, self.now_ns)
            elif verb == "correct":
                assert isinstance(subject, Sample)
                self.reaction.correct(subject, self.page, self.now_ns)  # type: ignore[arg-type]
            elif verb == "feed":
                assert isinstance(subject, Sample)
                self.note("feed", subject.offset_ns)
                self.fed.append(subject)
                self.reaction.fed(subject, self.page)  # type: ignore[arg-type]
                if self.reaction._chronyd is not None:
                    self.chronyd.samples += 1
            elif verb == "closed":
                assert isinstance(subject, Record)
                self.closed.append(subject)
                if subject.superseded_by is None and subject.kind != "generation":
                    self.reaction.closed(self.now_ns)

    def recover(self, for_ns: int = 60 * SEC) -> Record:
        """Runs until the last record is closed; that."""
        self.run(for_ns, lambda: self.records and self.records[-1] in self.closed)
        assert self.records and self.records[-1] in self.closed, self.records and self.records[-1].fields()
        return self.records[-1]

    def done(self, since_ns: int = 0) -> list[str]:
        """What has happened to clock and chronyd, in order, without the looks and the feeding."""
        silent = ("ask", "send", "feed", "rate")
        return [what for at_ns, what, _ in self.history if at_ns >= since_ns and what not in silent]

    def values(self, what: str) -> list[object]:
        return [value for _, name, value in self.history if name == what]


def outcome(record: Record) -> list[tuple[str, bool]]:
    return [(str(action["name"]), bool(action["ok"])) for action in record.actions]


def detail(record: Record, name: str) -> str:
    return next(str(action["detail"]) for action in record.actions if action["name"] == name)


class FakePhc(Phc):
    """The real Phc over a clock that is true time, plus what its time scale adds."""

    def __init__(self, ahead_ns: int = 0) -> None:  # the real one would open a device
        self.path = "/dev/ptp7"
        self.utc_offset_ns = None
        self.ahead_ns = ahead_ns
        self.refuses = 0
        self.guest: Guest

    def compare(self) -> tuple[int, int, int]:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        return self.guest.error_ns() + self.ahead_ns, self.guest.system_ns(), 300

    def close(self) -> None:
        pass


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Guest]]:
    yield lambda **options: Guest(monkeypatch, **options)


# ---- The whole reaction --------------------------------------------------------------------------------------


def test_the_simulated_guest_keeps_time(guest: Callable[..., Guest]) -> None:
    quiet = guest()
    quiet.run(20 * SEC)
    assert abs(quiet.error_ns()) < 50 and quiet.policy.state == "synchronised"
    assert quiet.done() == [] and len(quiet.fed) == pytest.approx(400, rel=0.05)
    assert quiet.reaction._rate.uncorrected_ns() == pytest.approx(UNCORRECTED_NS, rel=1e-8)


@pytest.mark.parametrize("ppm", [20.0, -70.0, 100.0, 0.0])
@pytest.mark.parametrize("lost_ns", [20 * SEC, MSEC, -5 * SEC])
def test_a_migration(guest: Callable[..., Guest], lost_ns: int, ppm: float) -> None:
    moved = guest()
    moved.run(5 * SEC)
    begun_ns = moved.now_ns
    moved.disrupt(lost_ns, ppm)
    record = moved.recover()
    # What is left is taken out before the frequency is verified and, where that leaves something, after.
    steps = ["reset", "dfreq"] if ppm else ["reset"]
    assert [name for name, _ in itertools.groupby(moved.done())] in (
        ["step", *steps, "step", "reset"],
        ["step", "reset"],
        ["step", *steps, "reset"],
    )
    told = ["frequency", "reset-sources", "dfreq"] if ppm else ["dfreq", "reset-sources"]
    expected = ["invalidate", "step", *told, "verify", "reset-sources"]
    assert [done for done in outcome(record) if done[0] != "step-rest"] == [(name, True) for name in expected]
    assert [action["after_ns"] for action in record.actions] == sorted(
        int(action["after_ns"]) for action in record.actions
    )  # type: ignore[call-overload]
    # The first step comes with the first look, by the exact offset; what it leaves is what the slope did meanwhile.
    first_at_ns, _, first_ns = next(entry for entry in moved.history if entry[1] == "step")
    assert first_at_ns - begun_ns < 200 * USEC and first_ns == pytest.approx(lost_ns, abs=60)
    assert all(abs(rest_ns) < 1500 for rest_ns in moved.values("step")[1:])  # type: ignore[arg-type]
    assert record.offset_ns == first_ns
    # dfreq is minus the slope of reference - system: a slower counter makes the reference gain.
    assert moved.values("dfreq") == [pytest.approx(-ppm, abs=0.1)] * bool(ppm)
    assert record.frequency_ppm == pytest.approx(ppm, abs=0.1)
    assert abs(moved.error_ns()) < 100 and abs(moved.slope_ppm()) < 0.1
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 150 * MSEC
    assert moved.policy.state == "synchronised"


def test_the_clock_is_right_from_the_first_millisecond_on(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    begun_ns = moved.now_ns
    moved.disrupt(20 * SEC, 100.0)
    worst_ns = 0
    while moved.now_ns < begun_ns + SEC:
        moved.run(MSEC)
        worst_ns = max(worst_ns, abs(moved.error_ns()))
    assert worst_ns < 1500, "100 ppm for as long as a tick of the kernel's and an answer of chronyd's take"


def test_nothing_is_fed_until_the_clock_is_right(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    fed = len(moved.fed)
    moved.disrupt(20 * SEC, 50.0)
    moved.recover()
    last_reset_ns = max(at_ns for at_ns, what, _ in moved.history if what == "reset")
    asked_ns = max(at_ns for at_ns, what, value in moved.history if (what, value) == ("send", "reset sources"))
    fed_ns = [at_ns for at_ns, what, _ in moved.history if what == "feed"][fed:]
    assert min(fed_ns) >= asked_ns and last_reset_ns - asked_ns <= FakeChronyd.LATENCY_NS
    assert all(abs(sample.offset_ns) < 200 for sample in moved.fed[fed:])


@pytest.mark.parametrize("slew_ppm", [0.0, 500.0, -83_000.0])
@pytest.mark.parametrize("base_ppm", [-250.0, 0.0])
def test_chronyd_was_slewing(guest: Callable[..., Guest], slew_ppm: float, base_ppm: float) -> None:
    """Its slew ends with the reset; what is left to correct is the new host's frequency alone."""
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.base *= 1 + base_ppm * 1e-6
    moved.set_word(moved.chronyd.base * (1 + slew_ppm * 1e-6), moved.now_ns)
    moved.run(20 * MSEC)
    moved.disrupt(3 * SEC, 40.0)
    record = moved.recover()
    assert sum(moved.values("dfreq")) == pytest.approx(-40 + base_ppm, abs=0.2)  # type: ignore[arg-type]
    assert record.frequency_ppm == pytest.approx(40 - base_ppm, abs=0.2)
    assert abs(moved.slope_ppm()) < 0.1 and abs(moved.error_ns()) < 100
    assert moved.done().count("reset") == 2 and moved.done().count("step") in (1, 2)


def test_the_frequency_is_right_with_the_step(guest: Callable[..., Guest]) -> None:
    """The kernel gets it at once, and chronyd has it behind the reset: neither waits for an answer."""
    moved = guest()
    moved.run(5 * SEC)
    begun_ns = moved.now_ns
    moved.disrupt(20 * SEC, 80.0)
    moved.run(SEC, lambda: moved.values("rate"))
    assert moved.now_ns - begun_ns < 100 * USEC and abs(moved.slope_ppm()) < 0.1
    sent = [value for at_ns, what, value in moved.history if what == "send" and at_ns >= begun_ns]
    assert [str(text).split()[0] for text in sent] == ["reset", "dfreq"] and moved.done() == ["step"]
    moved.recover()
    assert moved.values("rate") == [pytest.approx(moved.word, abs=1e-9)], "chronyd says the same"


@pytest.mark.parametrize("ahead_ppm", [3.0, -0.5])
def test_chronyd_went_by_another_frequency_than_it_had_said(guest: Callable[..., Guest], ahead_ppm: float) -> None:
    """It is asked every other second; between, it may learn."""
    moved = guest()
    moved.run(5 * SEC)
    moved.reaction._next_ask_ns = moved.now_ns + SEC
    moved.chronyd.base *= 1 + ahead_ppm * 1e-6
    moved.set_word(moved.chronyd.base, moved.now_ns)
    moved.run(20 * MSEC)
    moved.disrupt(20 * SEC, 40.0)
    record = moved.recover()
    assert moved.values("dfreq") == [pytest.approx(-40, abs=0.1), pytest.approx(ahead_ppm, abs=0.1)]
    assert record.frequency_ppm == pytest.approx(40 - ahead_ppm, abs=0.1)
    assert abs(moved.slope_ppm()) < 0.1 and abs(moved.error_ns()) < 100


def test_what_chronyd_goes_by_is_not_known(guest: Callable[..., Guest]) -> None:
    """It was never asked, or has not answered since the last dfreq: its reset shows it."""
    moved = guest()
    moved.run(5 * SEC)
    moved.reaction._base_rate = None
    moved.set_word(moved.word * (1 + 500e-6), moved.now_ns)  # it slews
    moved.disrupt(20 * SEC, 40.0)
    moved.run(SEC, lambda: moved.values("step"))
    assert not [text for text in moved.values("send") if str(text).startswith("dfreq")]
    record = moved.recover()
    assert moved.done()[:3] == ["step", "reset", "dfreq"] and record.frequency_ppm == pytest.approx(40, abs=0.1)
    assert moved.values("dfreq") == [pytest.approx(-40, abs=0.1)] and abs(moved.slope_ppm()) < 0.1


def test_an_unknown_rate_is_measured(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(100 * MSEC)
    assert moved.reaction._rate.uncorrected_ns() is None
    moved.disrupt(20 * SEC, -70.0)
    record = moved.recover()
    assert moved.done() == ["step", "reset", "dfreq", "step", "reset"]
    assert [name for name, _ in outcome(record)] == [
        "invalidate",
        "step",
        "reset-sources",
        "verify",
        "frequency",
        "dfreq",
        "step-rest",
        "reset-sources",
    ]
    assert moved.values("dfreq") == [pytest.approx(70, abs=0.5)]
    assert record.frequency_ppm == pytest.approx(-70, abs=0.5)
    assert abs(moved.error_ns()) < 200 and abs(moved.slope_ppm()) < 0.5


def test_a_wrong_constant_is_found_out(guest: Callable[..., Guest]) -> None:
    """As in the first seconds of a boot, or after another clock source was chosen."""
    moved = guest()
    moved.run(5 * SEC)
    moved.reaction._rate._rates = [UNCORRECTED_NS * (1 + 12e-6)] * 63
    moved.disrupt(20 * SEC, 30.0)
    record = moved.recover()
    assert [what for what in moved.done() if what != "step"] == ["reset", "dfreq", "dfreq", "reset"]
    assert moved.done()[0] == "step" and moved.done()[-2:] == ["step", "reset"]
    assert record.frequency_ppm == pytest.approx(30, abs=0.3)
    assert abs(moved.slope_ppm()) < 0.3 and abs(moved.error_ns()) < 200


def test_noise_is_no_slope(guest: Callable[..., Guest]) -> None:
    """A slope is not believed beyond what the noise allows: chronyd will know better."""
    moved = guest()
    moved.run(5 * SEC)
    moved.noise_ns = 300.0
    moved.disrupt(20 * SEC, 30.0)
    moved.recover()
    assert moved.values("dfreq") == [pytest.approx(-30, abs=0.1)]


def test_the_frequency_is_changed_by_another_meanwhile(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 30.0)
    moved.run(SEC, lambda: len(moved.reaction._points) > 3)
    moved.set_word(moved.word * (1 + 200e-6), moved.now_ns)
    record = moved.recover()
    assert ("verify", False) in outcome(record) and moved.values("dfreq") == [pytest.approx(-30, abs=0.1)]


def test_the_clock_is_set_by_another_meanwhile(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 30.0)
    moved.run(SEC, lambda: len(moved.reaction._points) > 3)
    moved.step(3 * MSEC)
    record = moved.recover()
    assert ("verify", True) in outcome(record) and moved.values("dfreq") == [pytest.approx(-30, abs=0.1)]
    assert abs(moved.error_ns()) < 200, "the rest is what is left, whoever left it"
    assert any("set by another" in text for text in moved.logged)


def test_our_own_steps_are_no_news(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC)
    moved.recover()
    assert not any("set by another" in text for text in moved.logged)


def test_a_step_by_another_at_any_time(guest: Callable[..., Guest]) -> None:
    """It is not fought: logged, compared anew at once, and left to chronyd."""
    stepped = guest()
    stepped.run(5 * SEC)
    fed = len(stepped.fed)
    stepped.step(-7 * MSEC)
    stepped.run(MSEC)
    assert [text for text in stepped.logged if "set by another" in text] == stepped.logged[-1:]
    assert stepped.policy.state == "adjusting" and len(stepped.fed) > fed
    stepped.run(5 * SEC)
    assert stepped.done() == [] and stepped.reaction._rate.uncorrected_ns() == pytest.approx(UNCORRECTED_NS, rel=1e-8)


# ---- Little or nothing to correct ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost_ns", "options", "why"),
    [
        (600, {}, "below the threshold"),
        (50_000, {"step_threshold": 100_000}, "below the threshold"),
        (0, {"step_threshold": 0}, "within the bound"),
        (70, {"step_threshold": 0}, "within the bound"),
    ],
)
def test_small_offsets_are_left_to_chronyd(
    guest: Callable[..., Guest], lost_ns: int, options: dict[str, object], why: str
) -> None:
    moved = guest(**options)
    moved.run(5 * SEC)
    moved.disrupt(lost_ns, 20.0)
    record = moved.recover()
    assert moved.values("step") == [] and moved.done() == ["reset", "dfreq", "reset"]
    assert why in detail(record, "step") and ("step", True) in outcome(record)


def test_a_wide_bound_justifies_no_step(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.bound_ns = 400_000
    moved.run(5 * SEC)
    moved.disrupt(300_000)
    record = moved.recover()
    assert moved.values("step") == [] and "within the bound of 400015 ns" in detail(record, "step")


def test_a_clock_that_says_1970(guest: Callable[..., Guest]) -> None:
    """The clock may be anywhere; what counts is where the step lands."""
    moved = guest()
    moved.step(-NOW_NS)
    moved.run(5 * SEC)
    moved.disrupt(0)
    moved.recover()
    assert moved.values("step")[0] == pytest.approx(NOW_NS, abs=100) and abs(moved.error_ns()) < 100


def test_a_drill_on_a_good_clock(guest: Callable[..., Guest]) -> None:
    drilled = guest()
    drilled.run(5 * SEC)
    drilled._act(drilled.policy.drill(drilled.now_ns, NOW_NS))
    record = drilled.recover()
    assert drilled.done() == ["reset", "reset"] and record.kind == "drill"
    assert ("dfreq", True) in outcome(record) and "nothing to correct" in detail(record, "dfreq")


# ---- One disruption after the other ----------------------------------------------------------------------------


@pytest.mark.parametrize("after_ns", [0, 100 * USEC, 300 * USEC, 2 * MSEC, 12 * MSEC, 25 * MSEC, 40 * MSEC])
def test_a_second_disruption_at_every_stage(guest: Callable[..., Guest], after_ns: int) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 20.0)
    if after_ns:
        moved.run(after_ns)
    second_ns = moved.now_ns
    moved.disrupt(-3 * SEC, -60.0)
    record = moved.recover()
    if after_ns:
        first = moved.records[0]
        assert first.superseded_by == record.id and first.recovered_after_ns is None and first in moved.closed
        told = len(first.actions)
        moved.run(SEC)
        assert len(first.actions) == told, "what comes later is not this record's"
        assert [name for name, _ in outcome(first)].count("reset-sources") >= 1
    done = moved.done(second_ns + 1)
    assert done.count("step") in (1, 2) and done.count("reset") in (2, 3)
    assert abs(moved.error_ns()) < 200 and abs(moved.slope_ppm()) < 0.3
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 200 * MSEC


def test_a_hundred_in_a_row(guest: Callable[..., Guest]) -> None:
    moved = guest(seed=9)
    moved.run(5 * SEC)
    for number in range(100):
        moved.disrupt(moved.random.randrange(-SEC, SEC), moved.random.uniform(-100, 100))
        moved.run(moved.random.randrange(1, 300) * MSEC)
        if number % 10 == 9:
            moved.recover()
            assert abs(moved.slope_ppm()) < 0.3 and abs(moved.error_ns()) < 200
    moved.recover()
    assert len(moved.records) == len(moved.closed) == 100
    assert not moved.reaction._names or all(record is None for record, _ in moved.reaction._names.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lost_ns=st.integers(-100 * SEC, 100 * SEC),
    ppm=st.floats(-200, 200),
    latency_ns=st.sampled_from([70 * USEC, 3 * MSEC, 30 * MSEC, 90 * MSEC, 150 * MSEC, 300 * MSEC]),
    known=st.booleans(),
    base_known=st.booleans(),
    late_ns=st.sampled_from([0, 2 * SEC]),
)
def test_any_migration(
    monkeypatch: pytest.MonkeyPatch,
    lost_ns: int,
    ppm: float,
    latency_ns: int,
    known: bool,
    base_known: bool,
    late_ns: int,
) -> None:
    moved = Guest(monkeypatch)
    moved.run(5 * SEC if known else 60 * MSEC)
    moved.chronyd.latency_ns = latency_ns
    if not base_known:
        moved.reaction._base_rate = None
    moved.disrupt(lost_ns, ppm, status=UNKNOWN if late_ns else SYNCHRONIZED)
    if late_ns:
        moved.run(late_ns)
        assert moved.done() == ["reset"], "there is nothing to go by yet"
        moved.publish()
    record = moved.recover()
    done = moved.done()
    assert done.count("reset") == 2 and done.count("step") <= 2 and done.count("dfreq") <= 2
    if latency_ns < PATIENCE_NS:
        assert done[-1] == "reset", "nothing changes the clock after the second"
        assert abs(moved.slope_ppm()) < 0.6
    elif known:
        moved.run(5 * SEC)
        assert abs(moved.slope_ppm()) < 2.1, "what was owed is told"
    if done.count("step"):
        assert abs(moved.error_ns()) < (1200 if latency_ns < PATIENCE_NS else 300 * USEC)
    else:
        found_ns = lost_ns + ppm * 1e-6 * late_ns
        assert abs(found_ns) < 2 * USEC and ("step", True) in outcome(record)


# ---- Without the right, without a device -----------------------------------------------------------------------


@pytest.mark.parametrize(("options", "announced"), [({"on_disruption": "flag"}, 0), ({"may_set": False}, 1)])
@pytest.mark.parametrize("chronyd", [True, False])
def test_flagging_only(guest: Callable[..., Guest], options: dict[str, object], announced: int, chronyd: bool) -> None:
    moved = guest(chronyd=chronyd, **options)
    assert len([text for text in moved.logged if "CAP_SYS_TIME" in text]) == announced
    moved.run(SEC)
    moved.disrupt(20 * SEC, 50.0)
    moved.run(SEC)
    [record] = moved.records
    # chronyd makes the kernel say so itself; it is still to set the clock, so the record stays open.
    assert moved.done() == (["reset"] if chronyd else ["flag"])
    assert ("step", False) in outcome(record) and "only flagged" in detail(record, "step")
    assert moved.policy.state == "disrupted" and moved.fed[-1].offset_ns == pytest.approx(20 * SEC, abs=MSEC)
    moved.step(moved.error_ns())
    assert moved.recover() is record


def test_the_kernel_refuses_after_all(guest: Callable[..., Guest]) -> None:
    """Root in a container: CAP_SYS_TIME, and yet EPERM."""
    moved = guest()
    moved.run(5 * SEC)
    moved.kernel.refuses = errno.EPERM
    moved.disrupt(20 * SEC, 50.0)
    moved.run(SEC)
    [record] = moved.records
    assert moved.done() == ["reset", "dfreq", "reset"], "the rest is done"
    assert ("step", False) in outcome(record) and "CAP_SYS_TIME" in detail(record, "step")
    assert not [name for name, _ in outcome(record) if name == "step-rest"]
    assert ("frequency", False) in outcome(record) and "CAP_SYS_TIME" in detail(record, "frequency")
    assert moved.values("dfreq") == [pytest.approx(-50, abs=0.1)]
    assert len(moved.fed) > 100, "chronyd gets what it needs to do it itself"


@pytest.mark.parametrize("on_disruption", ["step", "flag"])
@pytest.mark.parametrize("may_set", [True, False])
@pytest.mark.parametrize("mood", ["well", "absent", "stopped", "forbidden", None])
@pytest.mark.parametrize("kind", ["time", "signal"])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_plain_file_never_touches_the_clock(
    guest: Callable[..., Guest], on_disruption: str, may_set: bool, mood: str | None, kind: str, fallback: bool
) -> None:
    simulated = guest(
        is_device=False,
        on_disruption=on_disruption,
        may_set=may_set,
        kind=kind,
        chronyd=mood is not None,
        mood=mood or "well",
        fallback=FakePhc() if fallback else None,
        step_threshold=0,
    )
    simulated.run(SEC)
    if fallback:
        simulated.reaction._fallback.learn()  # type: ignore[union-attr]
    for lost_ns in (20 * SEC, -3 * MSEC):
        simulated.disrupt(lost_ns, 60.0)
        simulated.run(6 * SEC)
    assert not any(simulated.values(what) for what in ("step", "flag", "rate"))
    assert simulated.error_ns() != 0 and len(simulated.records) == 2


def test_a_simulation_goes_by_the_period_before(guest: Callable[..., Guest]) -> None:
    """A private chronyd (-x) follows the page by itself; the kernel's own clock has no part in it."""
    simulated = guest(is_device=False)
    simulated.run(SEC)
    simulated.disrupt(0, 25.0)
    simulated.run(SEC)
    assert simulated.done() == ["reset", "dfreq", "reset"]
    simulated.disrupt(0, 25.0)
    simulated.run(MSEC)  # before anything is fed
    simulated.disrupt(0, -10.0)
    simulated.run(SEC)
    assert simulated.values("dfreq") == [pytest.approx(-25, abs=0.01), pytest.approx(35, abs=0.01)]


@pytest.mark.parametrize("after_ns", [100 * USEC, 300 * USEC])
def test_a_simulation_that_is_disrupted_twice(guest: Callable[..., Guest], after_ns: int) -> None:
    simulated = guest(is_device=False)
    simulated.run(SEC)
    simulated.disrupt(0, 25.0)
    simulated.run(after_ns)
    simulated.disrupt(0, -10.0)
    simulated.run(SEC)
    assert sum(simulated.values("dfreq")) == pytest.approx(10, abs=0.01)  # type: ignore[arg-type]


def test_a_simulation_that_was_disrupted_before_the_start(guest: Callable[..., Guest]) -> None:
    simulated = guest(is_device=False)
    simulated.policy.marker = 0
    simulated.run(SEC)
    [record] = simulated.records
    assert simulated.done() == ["reset", "reset"]
    assert ("dfreq", False) in outcome(record) and "not known" in detail(record, "dfreq")


# ---- A chronyd that does not play along ------------------------------------------------------------------------


def test_no_chronyd_is_configured(guest: Callable[..., Guest]) -> None:
    moved = guest(chronyd=False)
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 50.0)
    record = moved.recover()
    assert moved.done()[:2] == ["flag", "step"] and set(moved.done()[2:]) <= {"step"}
    assert all(abs(rest_ns) < 1000 for rest_ns in moved.values("step")[1:])  # type: ignore[arg-type]
    assert [done for done in outcome(record) if done[0] != "step-rest"] == [
        ("invalidate", True),
        ("reset-sources", False),
        ("flag", True),
        ("step", True),
        ("dfreq", False),
        ("frequency", True),
        ("verify", True),
        ("reset-sources", False),
    ]
    assert "no chronyd is configured" in detail(record, "dfreq")
    assert record.frequency_ppm == pytest.approx(50, abs=0.1)
    assert abs(moved.slope_ppm()) < 0.1 and abs(moved.error_ns()) < 100, "the kernel needs nobody for it"
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 50 * MSEC


def test_no_chronyd_and_an_unknown_rate(guest: Callable[..., Guest]) -> None:
    moved = guest(chronyd=False)
    moved.run(100 * MSEC)
    moved.disrupt(20 * SEC, -70.0)
    record = moved.recover()
    assert record.frequency_ppm == pytest.approx(-70, abs=0.5) and abs(moved.slope_ppm()) < 0.5


@pytest.mark.parametrize("mood", ["absent", "forbidden", "full"])
def test_chronyd_cannot_be_reached(guest: Callable[..., Guest], mood: str) -> None:
    moved = guest(mood=mood)
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 50.0)
    record = moved.recover()
    assert moved.done()[:2] == ["flag", "step"] and set(moved.done()[2:]) <= {"step"}
    assert ("flag", True) in outcome(record) and ("step", True) in outcome(record)
    assert ("frequency", True) in outcome(record) and abs(moved.slope_ppm()) < 0.1
    resets = [action for action in record.actions if action["name"] == "reset-sources"]
    assert len(resets) == 2 and not any(action["ok"] for action in resets)
    reasons = {"absent": "not there", "forbidden": "may not write", "full": "does not read"}
    assert all(reasons[mood] in str(action["detail"]) for action in resets), "the record says why, closed or not"
    assert "left alone" in detail(record, "dfreq")
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 50 * MSEC
    assert moved.policy.state == "synchronised"
    told = len(record.actions)
    moved.run(10 * SEC)
    assert len(record.actions) == told, "a closed record is closed"


def test_chronyd_is_stopped(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.mood = "stopped"
    moved.disrupt(20 * SEC, 50.0)
    moved.run(300 * MSEC)
    assert moved.done()[0] == "step" and set(moved.done()) == {"step"}, "it is not waited for"
    assert abs(moved.slope_ppm()) < 0.1 and abs(moved.error_ns()) < 200
    assert moved.now_ns - moved.history[-1][0] < SEC and len(moved.fed) > 0
    assert moved.policy.state == "disrupted"
    record = moved.recover()
    assert "no answer in 3.8 s" in detail(record, "reset-sources")
    assert ("flag", True) in outcome(record), "it did not tell the kernel, so we do"
    told = [text for text in moved.values("send") if str(text).startswith("dfreq")]
    assert len(told) == 1, "it lies behind the reset; a second one would be on top of it"
    assert record.recovered_after_ns is not None and 3 * SEC < record.recovered_after_ns < 5 * SEC


def test_chronyd_goes_on_after_a_while(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.latency_ns = 800 * MSEC
    moved.disrupt(20 * SEC, 50.0)
    moved.run(600 * MSEC)
    assert abs(moved.error_ns()) < 60 * USEC
    moved.chronyd.latency_ns = FakeChronyd.LATENCY_NS
    record = moved.recover()
    assert outcome(record)[-2:] == [("dfreq", True), ("reset-sources", True)]
    assert moved.values("dfreq") == [pytest.approx(-50, abs=0.1)] and abs(moved.slope_ppm()) < 0.1


def test_chronyd_does_not_know_how_to_reset(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.refuses["reset"] = "invalid"
    moved.disrupt(20 * SEC, 50.0)
    record = moved.recover()
    assert moved.done() == ["step", "dfreq", "flag", "flag"], "the frequency is right for it all the same"
    assert abs(moved.slope_ppm()) < 0.1 and "refused: invalid" in detail(record, "reset-sources")


def test_chronyd_refuses_dfreq(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.refuses["dfreq"] = "failed"
    moved.disrupt(20 * SEC, 50.0)
    record = moved.recover()
    assert moved.done() == ["step", "reset", "step", "reset"]
    assert ("dfreq", False) in outcome(record) and ("verify", False) in outcome(record)


def test_dfreq_is_never_given_twice(guest: Callable[..., Guest]) -> None:
    """One that was not answered may have been applied: nothing is measured on top of it."""
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 50.0)
    moved.run(SEC, lambda: any(str(value).startswith("dfreq") for value in moved.values("send")))
    moved.chronyd.mood = "stopped"
    moved.chronyd.answers.clear()
    record = moved.recover()
    assert len([value for value in moved.values("send") if str(value).startswith("dfreq")]) == 1
    assert ("verify", False) in outcome(record)


def test_chronyd_dies_between_two_requests(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 50.0)
    moved.run(20 * MSEC)
    moved.chronyd.mood = "absent"
    record = moved.recover()
    assert abs(moved.error_ns()) < 1500
    told = [("frequency", True), ("reset-sources", True), ("dfreq", True), ("verify", True)]
    assert [done for done in outcome(record) if done[0] != "step-rest"][2:6] == told
    assert outcome(record)[-1] == ("reset-sources", False)


def chronyd_restarts(moved: Guest, drift_ppm: float, for_ns: int = 3 * SEC) -> None:
    """It is gone, comes back with another frequency, by its drift file say, and takes samples again."""
    moved.chronyd.mood = "absent"
    moved.run(for_ns)
    moved.chronyd.mood = "well"
    new_chronyd(moved, drift_ppm)
    moved.reaction.consumer_came(moved.now_ns)


def new_chronyd(moved: Guest, drift_ppm: float) -> None:
    moved.chronyd.connections += 1
    moved.chronyd.base *= 1 + drift_ppm * 1e-6
    moved.set_word(moved.chronyd.base, moved.now_ns)


def test_a_chronyd_that_was_gone_for_a_moment(guest: Callable[..., Guest]) -> None:
    """So short that no sample was lost: it shows when it is asked."""
    moved = guest()
    moved.run(5 * SEC)
    new_chronyd(moved, 30.0)
    moved.run(3 * SEC)
    assert moved.values("dfreq") == [pytest.approx(30, abs=0.1)] and abs(moved.slope_ppm()) < 0.1


@pytest.mark.parametrize("drift_ppm", [30.0, -2.5, 1.5, 0.0])
def test_a_chronyd_that_comes_is_told_the_frequency(guest: Callable[..., Guest], drift_ppm: float) -> None:
    moved = guest()
    moved.run(5 * SEC)
    chronyd_restarts(moved, drift_ppm)
    moved.run(5 * MSEC)
    wrong = abs(drift_ppm) > 2.0
    assert moved.values("dfreq") == [pytest.approx(drift_ppm, abs=0.1)] * wrong
    assert [text for text in moved.logged if "goes by a frequency" in text] == moved.logged[-1:] * wrong
    moved.run(5 * SEC)
    assert len(moved.values("dfreq")) == wrong and moved.values("step") == []


@pytest.mark.parametrize("status", [SYNCHRONIZED, UNKNOWN])
def test_an_old_host_s_frequency_is_told_to_nobody(guest: Callable[..., Guest], status: int) -> None:
    """The new host's page gives no time, or is not vouched for; chronyd has learnt the frequency elsewhere."""
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 40.0, kind="signal" if status == SYNCHRONIZED else "time", status=status)
    moved.run(15 * SEC)
    moved.step(moved.error_ns())
    moved.chronyd.normal = True
    moved.chronyd.base = moved._truth[2] / UNCORRECTED_NS
    moved.set_word(moved.chronyd.base, moved.now_ns)
    moved.run(5 * SEC)
    moved.chronyd.connections += 1
    moved.run(10 * SEC)
    assert moved.values("dfreq") == [] and abs(moved.slope_ppm()) < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_a_chronyd_is_told_nothing_by_a_young_constant(guest: Callable[..., Guest], seed: int) -> None:
    moved = guest(seed=seed)
    moved.noise_ns = 200.0
    for _ in range(10):
        moved.run(300 * MSEC)
        moved.chronyd.connections += 1
        moved.reaction.consumer_came(moved.now_ns)
    moved.run(10 * SEC)
    assert moved.values("dfreq") == []


def test_a_constant_that_was_found_wrong_is_forgotten(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.reaction._rate._rates = [UNCORRECTED_NS * (1 + 12e-6)] * 63
    moved.disrupt(20 * SEC, 30.0)
    moved.recover()
    assert abs(moved.slope_ppm()) < 0.3
    moved.chronyd.connections += 1
    moved.disrupt(-5 * SEC, 0.0)
    moved.recover()
    moved.run(5 * SEC)
    assert abs(moved.slope_ppm()) < 0.3


def test_a_chronyd_that_does_not_steer_the_kernel(guest: Callable[..., Guest]) -> None:
    """With -x its frequency is on top of the kernel's, which somebody else keeps right."""
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.base = 1.0
    moved.chronyd.connections += 1
    moved.run(5 * SEC)
    assert moved.values("dfreq") == []


def test_a_late_answer_is_made_good(guest: Callable[..., Guest]) -> None:
    """chronyd was slewing, nobody knew by what it went, and it answered when it was waited for no longer."""
    moved = guest()
    moved.run(5 * SEC)
    moved.reaction._base_rate = None
    moved.set_word(moved.word * (1 + 500e-6), moved.now_ns)
    moved.chronyd.latency_ns = 300 * MSEC
    moved.disrupt(20 * SEC, 40.0)
    record = moved.recover()
    assert record.frequency_ppm is None, "a slew is no frequency"
    moved.chronyd.latency_ns = FakeChronyd.LATENCY_NS
    moved.run(5 * SEC)
    assert sum(moved.values("dfreq")) == pytest.approx(-40, abs=0.2)  # type: ignore[arg-type]
    assert abs(moved.slope_ppm()) < 0.1


def test_a_refused_frequency_is_counted_once(guest: Callable[..., Guest]) -> None:
    moved = guest(chronyd=False)
    moved.run(5 * SEC)
    moved.kernel.refuses = errno.EPERM
    moved.disrupt(20 * SEC, 50.0)
    moved.run(SEC)
    [record] = moved.records
    assert record.frequency_ppm == pytest.approx(50, abs=0.3)


def test_a_chronyd_that_comes_just_before_a_disruption(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    chronyd_restarts(moved, 30.0)
    moved.disrupt(20 * SEC, 50.0)
    moved.recover()
    assert sum(moved.values("dfreq")) == pytest.approx(-20, abs=0.2)  # type: ignore[arg-type]
    assert abs(moved.slope_ppm()) < 0.1 and not [text for text in moved.logged if "goes by a frequency" in text]


def test_a_chronyd_that_comes_after_a_disruption(guest: Callable[..., Guest]) -> None:
    """What it was to be told then is told now; the clock is right already, so only the frequency is left."""
    moved = guest()
    moved.run(5 * SEC)
    old = moved.chronyd.base
    moved.chronyd.mood = "absent"
    moved.disrupt(20 * SEC, 50.0)
    moved.recover()
    assert abs(moved.slope_ppm()) < 0.1
    moved.chronyd.base = old
    chronyd_restarts(moved, 0.0, SEC)
    moved.run(5 * MSEC)
    assert moved.values("dfreq") == [pytest.approx(-50, abs=0.1)]
    assert abs(moved.slope_ppm()) < 0.1 and abs(moved.error_ns()) < 200


@pytest.mark.parametrize("options", [{"on_disruption": "flag"}, {"may_set": False}, {"is_device": False}])
def test_a_chronyd_that_comes_is_left_alone(guest: Callable[..., Guest], options: dict[str, object]) -> None:
    moved = guest(**options)
    moved.run(5 * SEC)
    chronyd_restarts(moved, 30.0)
    moved.run(SEC)
    assert moved.values("dfreq") == []


def test_a_consumer_that_comes_without_chronyd(guest: Callable[..., Guest]) -> None:
    moved = guest(chronyd=False)
    moved.run(SEC)
    moved.reaction.consumer_came(moved.now_ns)
    moved.run(SEC)
    assert moved.done() == []


def test_what_chronyd_said_before_the_reset_does_not_count(guest: Callable[..., Guest]) -> None:
    """Its queue is full when the reset is to go out, and it is still Normal by the samples from before."""
    moved = guest(kind="signal")
    moved.run(2 * SEC)
    moved.chronyd.full_for = 2  # reset and burst
    moved.disrupt(20 * SEC)
    moved.run(200 * MSEC)
    assert moved.policy.state == "disrupted", "nothing that it says yet is of after the reset"
    assert moved.done() == ["flag"]
    moved.run(SEC)
    assert "reset" in moved.done() and moved.policy.state == "disrupted"
    moved.chronyd.normal = True
    record = moved.recover()
    assert ("reset-sources", True) in outcome(record) and moved.done()[-1] == "makestep"


def test_recovered_only_by_samples_after_the_last_reset(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.samples_wanted = 40
    moved.disrupt(20 * SEC, 50.0)
    moved.recover()
    last_reset_ns = max(at_ns for at_ns, what, _ in moved.history if what == "reset")
    fed_since = [at_ns for at_ns, what, _ in moved.history if what == "feed" and at_ns > last_reset_ns]
    assert len(fed_since) >= 39
    # In quick succession until then, and closed soon after.
    assert moved.now_ns - fed_since[38] < 50 * MSEC


def test_asking_calms_down(guest: Callable[..., Guest]) -> None:
    """A chronyd that will not follow us is not asked for ever as if it were about to."""
    moved = guest()
    moved.run(5 * SEC)
    moved.chronyd.samples_wanted = 1 << 60
    moved.disrupt(20 * SEC)
    moved.run(QUICK_FOR_NS + SEC)
    asked, fed = moved.chronyd.asked, len(moved.fed)
    moved.run(60 * SEC)
    assert moved.chronyd.asked - asked <= 31
    assert len(moved.fed) - fed == pytest.approx(1200, rel=0.1)
    moved.chronyd.normal = True
    moved.run(3 * SEC)
    assert moved.records[0] in moved.closed


def test_waiting_for_a_page_is_not_done_in_a_hurry(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 50.0, status=UNKNOWN)
    moved.run(20 * MSEC)
    assert not moved.reaction.hurries(moved.now_ns) and moved.reaction.interval_ns(moved.now_ns) >= 10 * MSEC
    moved.run(QUICK_FOR_NS)
    assert moved.reaction.interval_ns(moved.now_ns) == moved.settings.interval
    moved.publish()
    moved.run(SEC, lambda: moved.values("step"))
    assert moved.reaction.hurries(moved.now_ns)
    assert moved.reaction.interval_ns(moved.now_ns) > 10 * MSEC, "the processor is chronyd's until it answers"
    moved.run(SEC, lambda: moved.values("dfreq"))
    assert moved.reaction.hurries(moved.now_ns) and moved.reaction.interval_ns(moved.now_ns) <= MSEC
    moved.publish(status=UNKNOWN)  # and away again
    moved.run(PATIENCE_NS + 10 * MSEC)
    assert not moved.reaction.hurries(moved.now_ns)
    moved.publish()
    moved.recover()
    assert abs(moved.error_ns()) < 200 and moved.done().count("reset") == 2


def test_the_settings_may_change(guest: Callable[..., Guest]) -> None:
    changed = guest()
    changed.run(SEC)
    changed.reaction.settings = Settings({"interval": 5 * SEC, "step-threshold": 5 * SEC})
    assert changed.reaction.interval_ns(changed.now_ns) == 5 * SEC
    changed.disrupt(SEC)
    changed.run(SEC)
    assert "below the threshold" in detail(changed.records[0], "step")


# ---- Pages without time ----------------------------------------------------------------------------------------


def test_burst_and_makestep(guest: Callable[..., Guest]) -> None:
    restored = guest(kind="signal")
    restored.chronyd.ntp_after_ns = 4 * SEC
    restored.run(2 * SEC)
    assert restored.policy.state == "watching" and restored.policy.good
    restored.disrupt(20 * SEC)
    restored.run(2 * SEC)
    assert restored.policy.state == "disrupted" and not restored.policy.good
    record = restored.recover()
    assert restored.done() == ["reset", "burst", "makestep"]
    assert outcome(record) == [(name, True) for name in ("invalidate", "reset-sources", "burst", "makestep")]
    assert abs(restored.error_ns()) < 100 and restored.values("step") == []
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 4_200 * MSEC
    assert restored.policy.state == "watching" and restored.policy.good and record.offset_ns is None


@pytest.mark.parametrize(("ignored", "within_s"), [(1, 12), (2, 22), (3, 42)])
@pytest.mark.parametrize("fallback", [False, True])
def test_a_burst_that_is_ignored(guest: Callable[..., Guest], ignored: int, within_s: int, fallback: bool) -> None:
    """chronyd does so while one is under way, from a disruption just before, say."""
    restored = guest(kind="signal", fallback=FakePhc() if fallback else None)
    restored.chronyd.ntp_after_ns = 4 * SEC
    restored.chronyd.ignores_bursts = ignored
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    restored.run(within_s * SEC)
    assert restored.policy.good and abs(restored.error_ns()) < 1000
    assert restored.done().count("burst") == ignored + 1
    restored.run(300 * SEC)
    assert restored.done().count("burst") == ignored + 1, "nobody is asked for what is there"


def test_bursts_become_rare(guest: Callable[..., Guest]) -> None:
    """A server that does not answer is not to be bothered for ever."""
    restored = guest(kind="signal")
    restored.chronyd.ignores_bursts = 1 << 60
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    restored.run(3600 * SEC)
    assert 8 <= restored.done().count("burst") <= 11


@pytest.mark.parametrize("refused", ["burst", "makestep"])
def test_what_chronyd_refuses_holds_up_nothing(guest: Callable[..., Guest], refused: str) -> None:
    restored = guest(kind="signal")
    restored.chronyd.ntp_after_ns = 4 * SEC
    restored.chronyd.refuses[refused] = "no such source"
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    restored.run(5 * SEC)
    restored.chronyd.normal = True  # by sources of another kind
    record = restored.recover()
    assert (refused, False) in outcome(record) and "no such source" in detail(record, refused)
    assert (({"burst", "makestep"} - {refused}).pop(), True) in outcome(record)


@pytest.mark.parametrize("mood", ["absent", "stopped", "forbidden"])
def test_nobody_knows_the_time(guest: Callable[..., Guest], mood: str) -> None:
    """No time in the page, no fallback, no answer from chronyd: it does not count as good by itself."""
    restored = guest(kind="signal")
    restored.run(2 * SEC)
    restored.chronyd.mood = mood
    restored.disrupt(20 * SEC)
    restored.run(60 * SEC)
    assert restored.policy.state == "disrupted" and restored.done() == ["flag"]
    restored.chronyd.mood = "well"
    restored.run(6 * SEC)
    restored.chronyd.normal = True
    restored.recover()


def test_a_fallback_steps(guest: Callable[..., Guest]) -> None:
    phc = FakePhc()
    restored = guest(kind="signal", fallback=phc)
    restored.run(2 * SEC)
    assert phc.utc_offset_ns == 0
    begun_ns = restored.now_ns
    restored.disrupt(20 * SEC)
    record = restored.recover()
    assert restored.done()[:2] == ["step", "reset"] and restored.done() == ["step", "reset", "reset", "burst"]
    assert restored.history[-1][0] - begun_ns < 5 * MSEC
    assert outcome(record) == [
        ("invalidate", True),
        ("fallback", True),
        ("step", True),
        ("reset-sources", True),
        ("reset-sources", True),
        ("burst", True),
    ]
    assert record.offset_ns == pytest.approx(20 * SEC, abs=1000) and abs(restored.error_ns()) < 1000
    assert restored.policy.state == "watching"


@pytest.mark.parametrize("tai_ahead_s", [36, 37, 38])
def test_a_fallback_that_says_tai(guest: Callable[..., Guest], tai_ahead_s: int) -> None:
    phc = FakePhc(tai_ahead_s * SEC)
    restored = guest(kind="signal", fallback=phc)
    restored.run(2 * SEC)
    assert phc.utc_offset_ns == -tai_ahead_s * SEC
    assert restored.logged[-1] == f"fallback /dev/ptp7: says TAI, {tai_ahead_s} s ahead"
    restored.disrupt(-5 * SEC)
    restored.recover()
    assert abs(restored.error_ns()) < 1000


@pytest.mark.parametrize("ahead_ns", [5 * SEC, -37 * SEC, 400 * MSEC, 37 * SEC + 200 * MSEC, 3600 * SEC])
def test_a_fallback_that_says_neither(guest: Callable[..., Guest], ahead_ns: int) -> None:
    restored = guest(kind="signal", fallback=FakePhc(ahead_ns))
    restored.chronyd.ntp_after_ns = 2 * SEC
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    record = restored.recover()
    assert "fallback /dev/ptp7: says neither UTC nor TAI" in restored.logged
    assert ("fallback", False) in outcome(record) and "UTC or TAI is not known" in detail(record, "fallback")
    assert restored.done() == ["reset", "burst", "makestep"] and restored.values("step") == []


def test_a_fallback_is_learnt_from_a_good_clock_only(guest: Callable[..., Guest]) -> None:
    phc = FakePhc()
    restored = guest(kind="signal", fallback=phc)
    restored.chronyd.normal = False
    restored.step(-37 * SEC)  # it would look like TAI
    restored.run(30 * SEC)
    assert phc.utc_offset_ns is None
    restored.step(37 * SEC)
    restored.chronyd.normal = True
    restored.run(15 * SEC)
    assert phc.utc_offset_ns == 0


def test_a_fallback_that_fails(guest: Callable[..., Guest]) -> None:
    phc = FakePhc()
    restored = guest(kind="signal", fallback=phc)
    restored.chronyd.ntp_after_ns = 2 * SEC
    restored.run(2 * SEC)
    phc.refuses = errno.ENODEV
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    record = restored.recover()
    assert "No such device" in detail(record, "fallback") and restored.done() == ["reset", "burst", "makestep"]
    restored.run(60 * SEC)
    assert [text for text in restored.logged if "ptp7" in text] == [
        "fallback /dev/ptp7: says UTC",
        "fallback /dev/ptp7: No such device",
    ], "once"
    phc.refuses = 0
    restored.run(60 * SEC)
    assert restored.logged[-1] == "fallback /dev/ptp7: says UTC"


def test_a_fallback_that_may_not_step(guest: Callable[..., Guest]) -> None:
    restored = guest(kind="signal", fallback=FakePhc())
    restored.chronyd.ntp_after_ns = 2 * SEC
    restored.run(2 * SEC)
    restored.kernel.refuses = errno.EPERM
    restored.disrupt(20 * SEC)
    restored.run(2 * SEC)
    assert restored.policy.state == "disrupted", "nothing was set right"
    record = restored.recover()
    assert ("step", False) in outcome(record) and restored.done() == ["reset", "burst", "makestep"]


def test_a_fallback_that_finds_the_clock_right(guest: Callable[..., Guest]) -> None:
    restored = guest(kind="signal", fallback=FakePhc())
    restored.run(2 * SEC)
    restored.disrupt(0)
    record = restored.recover()
    assert ("step", True) in outcome(record) and restored.values("step") == []
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 10 * MSEC


def test_a_fallback_and_no_chronyd(guest: Callable[..., Guest]) -> None:
    restored = guest(kind="signal", fallback=FakePhc(), chronyd=False)
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    record = restored.recover()
    assert restored.done() == ["flag", "step"] and abs(restored.error_ns()) < 1000
    assert ("burst", False) in outcome(record)


def test_a_fallback_is_for_stepping(guest: Callable[..., Guest]) -> None:
    restored = guest(kind="signal", fallback=FakePhc(), on_disruption="flag")
    restored.chronyd.ntp_after_ns = 2 * SEC
    restored.run(2 * SEC)
    restored.disrupt(20 * SEC)
    restored.recover()
    assert restored.values("step") == []


@pytest.mark.parametrize("with_fallback", [False, True])
def test_a_new_host_that_publishes_late(guest: Callable[..., Guest], with_fallback: bool) -> None:
    """A page that loses its time and gets it back: then it is gone by, exactly, with frequency and all."""
    moved = guest(fallback=FakePhc() if with_fallback else None)
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 40.0, kind="signal")
    moved.run(2 * SEC)
    assert moved.policy.state == "disrupted"
    assert moved.done() == (["step", "reset", "reset", "burst"] if with_fallback else ["reset", "burst"])
    moved.publish()
    record = moved.recover()
    assert moved.values("dfreq") == [pytest.approx(-40, abs=0.1)]
    assert moved.done().count("step") == 1 + with_fallback and moved.done()[-1] == "reset"
    assert abs(moved.error_ns()) < 200 and abs(moved.slope_ppm()) < 0.2
    assert [name for name, _ in outcome(record)].count("step") == 1


def test_a_new_host_that_never_publishes(guest: Callable[..., Guest]) -> None:
    moved = guest()
    moved.chronyd.ntp_after_ns = 4 * SEC
    moved.run(5 * SEC)
    moved.disrupt(20 * SEC, 40.0, kind="signal")
    record = moved.recover()
    assert moved.done() == ["reset", "burst", "makestep"] and moved.policy.state == "watching"
    assert record.recovered_after_ns is not None and record.recovered_after_ns < 12 * SEC
    fed = len(moved.fed)
    moved.publish()
    moved.run(SEC)
    assert len(moved.fed) > fed and moved.done() == ["reset", "burst", "makestep"]
