"""What is done about a disruption, and when: chronyd, the system clock and the fallback are worked from here.

The order is the point.  From the moment at which the policy asks for it:

    begin      chronyd drops what it knows and says that it is not synchronised; without one, the kernel says it
    step       the clock is set, by the first sample of the new calibration
    frequency  chronyd is told the new host's frequency, once its own correction has ended with the reset
    settle     what is left of the offset is taken out; chronyd drops what it saw meanwhile; feeding begins again
    verify     some tens of milliseconds of samples show whether the frequency was right
    follow     chronyd is asked until it is synchronised again

A page without time goes from begin to follow, by way of the fallback where there is one.
Nothing here waits: each look at the page and each answer of chronyd's moves it on.
"""

from __future__ import annotations

from .chronyd import MAKESTEP, RESET_SOURCES, TRACKING, Chronyd, burst, dfreq
from .errors import RefclockError
from .phc import Phc
from .rate import SystemRate, frequency_ppm, slope_ppm
from .systemclock import ClockWatch, SystemClock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .chronyd import Command, Request
    from .options import Settings
    from .page import Page, Sample
    from .policy import Action, Policy, Record

MSEC = 1_000_000
NSEC_PER_SEC = 1_000_000_000

#: How often chronyd is asked whether it is synchronised: while a disruption lasts, and otherwise.
ASK_OPEN_NS = 20 * MSEC
ASK_NS = 2 * NSEC_PER_SEC
#: How often a fallback that has not shown its time scale yet is compared with the system clock.
LEARN_NS = 10 * NSEC_PER_SEC
#: How long the reaction waits for chronyd's answer to one command before it goes on without.
PATIENCE_NS = 100 * MSEC
#: The time between looks while there is something to be corrected, and while chronyd is to select us again.
CORRECTING_NS = 1 * MSEC
QUICK_NS = 10 * MSEC
QUICK_FOR_NS = 10 * NSEC_PER_SEC
#: The least frequency worth telling chronyd, and for how long and how far off it is verified.
LEAST_PPM = 0.02
VERIFY_NS = 50 * MSEC
VERIFY_FEWEST = 5
VERIFY_PPM = 0.2
#: `burst`: so many good samples, of so many tries, from each NTP source.
BURST = (4, 8)


class Reaction:
    """Carries out the reaction to one disruption at a time, and keeps the knowledge that it will need for the next."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        log: Callable[[str, str], None],
        clock: SystemClock | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._log = log
        self._clock = clock if clock is not None else SystemClock()
        self._clock_watch = ClockWatch()
        self._chronyd = Chronyd(settings.chronyd) if settings.chronyd is not None else None
        self._fallback: Phc | None = None
        self._rate = SystemRate()
        self._period_before_ns: float | None = None
        self._is_device = False
        self._record: Record | None = None
        self._stage = ""
        self._names: dict[Request, tuple[Record | None, str]] = {}
        self._awaited: Request | None = None
        self._reset: Request | None = None
        self._tracking: Request | None = None
        self._next_ask_ns = 0
        self._next_learn_ns = 0
        self._justified = False
        self._verified: list[tuple[int, int]] = []
        self._verify_rate = 0.0
        self._quick_until_ns = 0
        self._told_chronyd: str | None = ""
        if settings.fallback is not None:
            try:
                self._fallback = Phc(settings.fallback)
            except RefclockError as error:
                log("warning", str(error))

    # ---- What the service tells us ----------------------------------------------------------------------

    def opened(self, page: Page) -> None:
        """A page is there: it decides what may be done to the clock."""
        self._is_device = page.is_device
        self._rate.interrupt()
        self._policy.corrects = self._settings.on_disruption == "step"
        if self._policy.corrects and self._is_device and not self._clock.may_set():
            self._policy.corrects = False
            self._log(
                "warning",
                "no CAP_SYS_TIME: a disrupted clock will be flagged, not stepped (grant it, or choose flag)",
            )

    def begin(self, record: Record, now_ns: int) -> None:
        """A disruption was seen; the sinks are invalid already."""
        self._record = record
        self._stage = "step" if self._policy.corrects else "follow"
        self._quick_until_ns = now_ns + QUICK_FOR_NS
        self._rate.interrupt()
        self._reset_sources(record, now_ns)
        record.note(now_ns, "invalidate", True)
        if not self._policy.corrects:
            record.note(
                now_ns, "step", False, "the clock is only flagged: on-disruption is flag, or CAP_SYS_TIME is missing"
            )
        if self._reset is None or not self._reset.delivered:
            self._flag(record, now_ns)
        if self._policy.kind == "signal":
            self._begin_without_time(record, now_ns)

    def correct(self, sample: Sample, page: Page, now_ns: int) -> None:
        """A sample of the new calibration, from which nothing may be fed until the clock is corrected."""
        record = self._record
        if record is None or self._stage not in ("step", "frequency", "settle"):
            self._policy.corrected()
            return
        if self._waits_for_chronyd(now_ns):
            return
        if self._stage == "step":
            bound_ns = (sample.maxerror_ns or 0) + sample.uncertainty_ns
            self._justified = self._step(record, sample.offset_ns, sample.system_ns, bound_ns, now_ns)
            self._awaited = self._reset
            self._stage = "frequency"
        elif self._stage == "frequency":
            self._tell_frequency(record, page, now_ns)
            self._stage = "settle"
        else:
            if self._justified and abs(sample.offset_ns) > sample.uncertainty_ns:
                self._step(record, sample.offset_ns, sample.system_ns, sample.uncertainty_ns, now_ns, rest=True)
            self._reset_sources(record, now_ns)
            self._verified = []
            self._stage = "verify" if self._is_device else "follow"
            self._policy.corrected()

    def fed(self, sample: Sample, page: Page, now_ns: int) -> None:
        """A sample that the sinks got."""
        self._period_before_ns = page.period_ns
        if not self._is_device:
            return
        rate = self._clock.rate()
        self._rate.add(sample.counter, sample.system_ns, rate)
        if self._stage == "verify" and self._record is not None:
            self._verify(self._record, sample, rate, now_ns)

    def closed(self) -> None:
        """The record is closed: nothing is in a hurry any more."""
        self._record = None
        self._stage = ""
        self._quick_until_ns = 0

    def interval_ns(self, now_ns: int) -> int:
        """The time to the next look that the reaction wants."""
        interval_ns = self._settings.interval
        if self._policy.uncorrected and self._policy.kind == "time":
            return min(interval_ns, CORRECTING_NS)
        if now_ns < self._quick_until_ns:
            return min(interval_ns, QUICK_NS)
        return interval_ns

    def filenos(self) -> list[int]:
        """The descriptors to poll for input."""
        fds = [self._clock_watch.fileno()]
        if self._chronyd is not None and self._chronyd.fileno() >= 0:
            fds.append(self._chronyd.fileno())
        return fds

    def hear(self, ready: list[int], now_ns: int) -> list[Action]:
        """Takes in what came on these descriptors."""
        actions: list[Action] = []
        if self._clock_watch.fileno() in ready and self._clock_watch.was_set():
            self._rate.interrupt()
            self._log("notice", "the system clock was set by another program; it is compared anew at once")
        if self._chronyd is not None and self._chronyd.fileno() in ready:
            for request in self._chronyd.receive(now_ns):
                actions += self._finished(request, now_ns)
        return actions

    def tick(self, now_ns: int) -> list[Action]:
        """What is due by the time alone."""
        actions: list[Action] = []
        if self._chronyd is not None:
            if now_ns >= self._next_ask_ns and self._tracking is None:
                self._ask(now_ns)
            deadline_ns = self._chronyd.next_deadline_ns()
            if deadline_ns is not None and now_ns >= deadline_ns:
                for request in self._chronyd.tick(now_ns):
                    actions += self._finished(request, now_ns)
        if self._fallback is not None and now_ns >= self._next_learn_ns:
            self._next_learn_ns = now_ns + LEARN_NS
            self._learn(self._fallback)
        return actions

    def due_ns(self) -> int | None:
        """When :meth:`tick` is due, or None."""
        if self._chronyd is None:
            return None if self._fallback is None else self._next_learn_ns
        due_ns = self._chronyd.next_deadline_ns()
        if self._tracking is None:
            return self._next_ask_ns if due_ns is None else min(due_ns, self._next_ask_ns)
        return due_ns

    def chronyd_status(self) -> dict[str, object] | None:
        """The contract's view of chronyd; None without one."""
        if self._chronyd is None:
            return None
        return {
            "ok": not self._chronyd.error,
            "error": self._chronyd.error or None,
            "normal": self._policy.chronyd_normal,
        }

    def close(self) -> None:
        if self._chronyd is not None:
            self._chronyd.close()
        if self._fallback is not None:
            self._fallback.close()
        self._clock_watch.close()

    # ---- chronyd -----------------------------------------------------------------------------------------

    def _command(self, record: Record | None, name: str, command: Command, now_ns: int) -> Request | None:
        if self._chronyd is None:
            if record is not None:
                record.note(now_ns, name, False, "no chronyd is configured")
            return None
        request = self._chronyd.send(command, now_ns)
        self._names[request] = (record, name)
        return request

    def _reset_sources(self, record: Record, now_ns: int) -> None:
        self._reset = self._command(record, "reset-sources", RESET_SOURCES, now_ns)
        # What a tracking that was asked for before says is of before.
        self._tracking = None
        self._next_ask_ns = now_ns
        if self._reset is not None:
            self._policy.chronyd_normal = False if self._reset.delivered else None

    def _ask(self, now_ns: int) -> None:
        self._tracking = self._command(None, "tracking", TRACKING, now_ns)
        self._next_ask_ns = now_ns + (ASK_OPEN_NS if self._record is not None else ASK_NS)

    def _finished(self, request: Request, now_ns: int) -> list[Action]:
        record, name = self._names.pop(request, (None, ""))
        if record is not None:
            record.note(now_ns, name, bool(request.ok), request.detail)
        if request is self._tracking:
            self._tracking = None
            return self._chronyd_says(request.tracking.normal if request.tracking is not None else None, now_ns)
        if name == "makestep":
            return self._policy.chronyd_says(now_ns, True)
        return []

    def _chronyd_says(self, normal: bool | None, now_ns: int) -> list[Action]:
        assert self._chronyd is not None
        error = self._chronyd.error or None
        if error != self._told_chronyd:
            self._told_chronyd = error
            self._log("warning" if error else "info", f"chronyd: {error or f'answers on {self._chronyd.path}'}")
        if normal and self._stage == "burst" and self._record is not None:
            # It has a source again: now a step is one of what its samples say.
            self._stage = "follow"
            self._command(self._record, "makestep", MAKESTEP, now_ns)
            return []
        return self._policy.chronyd_says(now_ns, normal)

    def _waits_for_chronyd(self, now_ns: int) -> bool:
        awaited = self._awaited
        return (
            awaited is not None and awaited.ok is None and awaited.delivered and now_ns - awaited.sent_ns < PATIENCE_NS
        )

    # ---- The system clock --------------------------------------------------------------------------------

    def _step(
        self, record: Record, offset_ns: int, system_ns: int, bound_ns: int, now_ns: int, rest: bool = False
    ) -> bool:
        """Whether the clock was wrong by more than its bound, and so is to be right to the nanosecond from now on."""
        name = "step-rest" if rest else "step"
        if not rest and abs(offset_ns) < self._settings.step_threshold:
            record.note(now_ns, name, True, f"{offset_ns} ns is below the threshold: left to chronyd")
            return False
        try:
            self._clock.step(self._is_device, offset_ns, system_ns, bound_ns)
        except RefclockError as error:
            record.note(now_ns, name, False, str(error))
            return False
        self._clock_watch.was_set()  # that was us
        self._rate.interrupt()
        record.note(now_ns, name, True, f"{offset_ns:+d} ns")
        return True

    def _flag(self, record: Record, now_ns: int) -> None:
        try:
            self._clock.flag_unsynchronised(self._is_device)
        except RefclockError as error:
            record.note(now_ns, "flag", False, str(error))
        else:
            record.note(now_ns, "flag", True, "STA_UNSYNC")

    def _tell_frequency(self, record: Record, page: Page, now_ns: int) -> None:
        """The correction from the page's new period: by the boot's constant rate, or else by the period before.

        A simulation has no part in the kernel's frequency: a private chronyd (-x) keeps its corrections to itself,
        and followed the period before.
        """
        uncorrected_ns = self._rate.uncorrected_ns() if self._is_device else None
        actual_ns = self._period_before_ns if uncorrected_ns is None else uncorrected_ns * self._clock.rate()
        if actual_ns is None:
            record.note(now_ns, "dfreq", False, "the rate before is not known: it will be measured")
            return
        ppm = frequency_ppm(page.period_ns, actual_ns)
        record.frequency_ppm = ppm
        if abs(ppm) < LEAST_PPM:
            record.note(now_ns, "dfreq", True, f"{ppm:+.3f} ppm is nothing to correct")
            return
        self._awaited = self._command(record, "dfreq", dfreq(-ppm), now_ns)

    def _verify(self, record: Record, sample: Sample, rate: float, now_ns: int) -> None:
        """Once some tens of milliseconds of one kernel frequency are seen: is there a slope left?"""
        if not self._verified:
            self._verify_rate = rate
        self._verified.append((sample.system_ns, sample.offset_ns))
        elapsed_ns = sample.system_ns - self._verified[0][0]
        if rate != self._verify_rate:
            self._stage = "follow"  # chronyd has taken over
        elif elapsed_ns >= VERIFY_NS and len(self._verified) >= VERIFY_FEWEST:
            self._stage = "follow"
            ppm = slope_ppm(self._verified)
            if abs(ppm) > max(VERIFY_PPM, 4e6 * sample.uncertainty_ns / elapsed_ns):
                record.frequency_ppm = (record.frequency_ppm or 0.0) + ppm
                self._awaited = self._command(record, "dfreq", dfreq(-ppm), now_ns)
                self._stage = "settle"
                self._policy.correct_again()

    def _learn(self, fallback: Phc) -> None:
        """Whether the fallback says UTC or TAI shows while the clock is good."""
        if not self._policy.good:
            return
        try:
            fallback.learn()
        except OSError as error:
            self._log("warning", f"fallback {fallback.path}: {error.strerror}")

    def _begin_without_time(self, record: Record, now_ns: int) -> None:
        """The page cannot say how wrong the clock is: the fallback can, or chronyd's other sources will."""
        if (
            self._fallback is not None
            and self._policy.corrects
            and self._step_by_fallback(record, self._fallback, now_ns)
        ):
            self._reset_sources(record, now_ns)
            self._policy.corrected_by_fallback()
            return
        self._stage = "burst"
        self._command(record, "burst", burst(*BURST), now_ns)

    def _step_by_fallback(self, record: Record, fallback: Phc, now_ns: int) -> bool:
        try:
            offset = fallback.offset()
            if offset is None:
                record.note(now_ns, "fallback", False, f"whether {fallback.path} says UTC or TAI is not known")
                return False
            offset_ns, system_ns, half_ns = offset
            record.offset_ns = offset_ns
            self._step(record, offset_ns, system_ns, half_ns, now_ns)
        except OSError as error:
            record.note(now_ns, "fallback", False, f"{fallback.path}: {error.strerror}")
            return False
        record.note(now_ns, "fallback", True, fallback.path)
        return True
