"""What is done about a disruption, and when: chronyd, the system clock and the fallback are worked from here.

The order is the point.  From the moment at which the policy asks for it:

    begin      chronyd drops what it knows and says that it is not synchronised; without one, the kernel says it
    step       the clock is set, by the first sample of the new calibration
    frequency  the kernel is given the new host's frequency, and chronyd is told: in the same breath, where it is known
               what chronyd goes by; else once its own correction has ended with the reset
    rest       what the old frequency has made of the time since the step is taken out, and what chronyd had learnt of
               it since it was last asked
    verify     some tens of milliseconds of samples show whether that was right, or measure what was not known
    settle     what is left of the offset is taken out; chronyd drops what it saw meanwhile; feeding begins again
    follow     chronyd is asked until it is synchronised again

A page without time stays at step, should it get its time back; meanwhile the fallback sets the clock, or chronyd does.
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

    from .chronyd import Command, Request, Tracking
    from .options import Settings
    from .page import Page, Sample
    from .policy import Action, Policy, Record

MSEC = 1_000_000
NSEC_PER_SEC = 1_000_000_000

#: How often chronyd is asked whether it is synchronised: while it is to select us again, and otherwise.
ASK_QUICK_NS = 20 * MSEC
ASK_NS = 2 * NSEC_PER_SEC
#: How often a fallback is compared with the system clock, until its time scale is known and from then on.
LEARN_FIRST_NS = NSEC_PER_SEC
LEARN_NS = 10 * NSEC_PER_SEC
#: How long the reaction waits for chronyd's answer to one command before it goes on without.
PATIENCE_NS = 100 * MSEC
#: The time between looks while the clock is being corrected, and while chronyd is to select us again.
CORRECTING_NS = 1 * MSEC
QUICK_NS = 10 * MSEC
QUICK_FOR_NS = 10 * NSEC_PER_SEC
#: The least frequency worth telling chronyd, computed and measured; the least that a measurement must find to be
#: believed against what was computed; how long that is verified, or measured.
LEAST_PPM = 0.02
LEAST_MEASURED_PPM = 0.2
LEAST_WRONG_PPM = 1.0
VERIFY_NS = 20 * MSEC
MEASURE_NS = 50 * MSEC
FEWEST_POINTS = 5
#: The least worth telling a chronyd outside a disruption: it learns less than that by itself in no time.
LEAST_OWED_PPM = 2.0
#: `burst`: so many good samples, of so many tries, from each NTP source.  chronyd ignores it where one is under way
#: already, so that it is given again after a while, and then ever more seldom.
BURST = (4, 8)
BURST_AGAIN_NS = 5 * NSEC_PER_SEC


class Reaction:
    """Carries out the reaction to one disruption at a time, and keeps the knowledge that it will need for the next."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        log: Callable[[str, str], None],
        clock: SystemClock | None = None,
    ) -> None:
        #: To be replaced when they are loaded anew.
        self.settings = settings
        self._policy = policy
        self._log = log
        self._clock = clock if clock is not None else SystemClock()
        self._clock_watch = ClockWatch()
        self._chronyd = Chronyd(settings.chronyd) if settings.chronyd is not None else None
        self._fallback: Phc | None = None
        self._rate = SystemRate()
        self._period_before_ns: float | None = None
        self._is_device = False
        # The reaction under way.
        self._record: Record | None = None
        self._stage = "follow"
        self._stepped = False
        self._bursting = False
        self._next_burst_ns: int | None = None
        self._burst_pause_ns = BURST_AGAIN_NS
        self._points: list[tuple[int, int]] = []
        self._points_rate: float | None = None
        self._applied_ppm = 0.0
        self._correcting_until_ns = 0
        self._quick_until_ns = 0
        # What is asked of chronyd: by whom and under which name, and the last of each kind.
        self._names: dict[Request, tuple[Record | None, str]] = {}
        self._awaited: Request | None = None
        self._reset: Request | None = None
        #: The rate to which chronyd sets the kernel while it slews nothing, by its last word; None: not known.
        self._base_rate: float | None = None
        #: Whether chronyd may go by another frequency than the page's, and is yet to be told: one that is new starts
        #: with its drift file's.
        self._is_owed = False
        self._connection = 0
        self._last_by_fallback: Request | None = None
        self._tracking: Request | None = None
        self._last_tracking: Tracking | None = None
        self._next_ask_ns = 0
        self._next_learn_ns = 0
        self._told_chronyd: str | None = ""
        self._told_fallback: str | None = None
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
        self._policy.corrects = self.settings.on_disruption == "step"
        if self._policy.corrects and self._is_device and not self._clock.may_set():
            self._policy.corrects = False
            self._log(
                "warning",
                "no CAP_SYS_TIME: a disrupted clock will be flagged, not stepped (grant it, or choose flag)",
            )

    def begin(self, record: Record, now_ns: int) -> None:
        """A disruption was seen; the sinks are invalid already."""
        self._leave_record(now_ns)
        self._record = record
        self._stage = "step" if self._policy.corrects else "follow"
        self._stepped = False
        self._awaited = None
        self._applied_ppm = 0.0
        self._next_burst_ns = None
        self._points.clear()
        self._quick_until_ns = now_ns + QUICK_FOR_NS
        self._rate.interrupt()
        record.note(now_ns, "invalidate", True)
        self._reset_sources(record, now_ns)
        if self._reset is None or not self._reset.delivered:
            self._flag(record, now_ns)
        if not self._policy.corrects:
            record.note(
                now_ns, "step", False, "the clock is only flagged: on-disruption is flag, or CAP_SYS_TIME is missing"
            )
        if self._policy.kind == "signal":
            self._begin_without_time(record, now_ns)

    def correct(self, sample: Sample, page: Page, now_ns: int) -> None:
        """A sample of the new calibration, from which nothing may be fed until the clock is corrected."""
        if self._record is None:
            self._policy.corrected()
            return
        self._correcting_until_ns = now_ns + PATIENCE_NS
        if now_ns >= self._waits_until_ns():
            self._stage = getattr(self, f"_do_{self._stage}")(self._record, sample, page, now_ns)

    def fed(self, sample: Sample, page: Page) -> None:
        """A sample that the sinks got."""
        self._period_before_ns = page.period_ns
        if self._is_device and self._policy.corrects:
            self._rate.add(sample.counter, sample.system_ns, self._clock.rate())

    def consumer_came(self, now_ns: int) -> None:
        """Somebody takes samples who did not before: a chronyd that has just started, perhaps."""
        if self._chronyd is not None:
            self._next_ask_ns = now_ns
            self._chronyd.hurry(now_ns)

    def closed(self, now_ns: int) -> None:
        """The record is closed: nothing is in a hurry any more."""
        self._leave_record(now_ns)
        self._stage = "follow"
        self._quick_until_ns = 0

    def hurries(self, now_ns: int) -> bool:
        """Whether the clock is worked on at this moment: what can wait for milliseconds must."""
        return now_ns < self._correcting_until_ns and not self._points

    def interval_ns(self, now_ns: int) -> int:
        """The time to the next look that the reaction wants."""
        interval_ns = self.settings.interval
        if now_ns < self._correcting_until_ns:
            # What chronyd answers calls for a look by itself; until then the processor is chronyd's.
            waiting_ns = self._waits_until_ns()
            return min(interval_ns, max(CORRECTING_NS, waiting_ns - now_ns))
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
            self._points.clear()
            self._log("notice", "the system clock was set by another program; it is compared anew at once")
        if self._chronyd is not None and self._chronyd.fileno() in ready:
            for request in self._chronyd.receive(now_ns):
                actions += self._finished(request, now_ns)
        return actions

    def tick(self, now_ns: int) -> list[Action]:
        """What is due by the time alone."""
        actions: list[Action] = []
        if self._chronyd is not None:
            if self._may_ask() and now_ns >= self._next_ask_ns:
                self._ask(now_ns)
            if self._next_burst_ns is not None and now_ns >= self._next_burst_ns:
                self._burst(self._record, now_ns)
            deadline_ns = self._chronyd.next_deadline_ns()
            if deadline_ns is not None and now_ns >= deadline_ns:
                for request in self._chronyd.tick(now_ns):
                    actions += self._finished(request, now_ns)
        if self._fallback is not None and now_ns >= self._next_learn_ns:
            self._learn(self._fallback)
            known = self._fallback.utc_offset_ns is not None
            self._next_learn_ns = now_ns + (LEARN_NS if known else LEARN_FIRST_NS)
        return actions

    def due_ns(self) -> int | None:
        """When :meth:`tick` is due, or None."""
        due = [self._next_learn_ns] if self._fallback is not None else []
        if self._chronyd is not None:
            deadline_ns = self._chronyd.next_deadline_ns()
            if deadline_ns is not None:
                due.append(deadline_ns)
            if self._may_ask():
                due.append(self._next_ask_ns)
            if self._next_burst_ns is not None:
                due.append(self._next_burst_ns)
        return min(due, default=None)

    def chronyd_status(self) -> dict[str, object] | None:
        """The contract's view of chronyd; None without one."""
        if self._chronyd is None:
            return None
        tracking = self._last_tracking
        return {
            "ok": not self._chronyd.error,
            "error": self._chronyd.error or None,
            "normal": self._policy.chronyd_normal,
            "tracking": tracking.fields() if tracking is not None else None,
        }

    def close(self) -> None:
        if self._chronyd is not None:
            self._chronyd.close()
        if self._fallback is not None:
            self._fallback.close()
        self._clock_watch.close()

    # ---- The stages: each returns the next ---------------------------------------------------------------

    def _do_step(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        if not self._stepped:  # by the fallback, while the page had no time
            bound_ns = (sample.maxerror_ns or 0) + sample.uncertainty_ns
            self._step(record, sample.offset_ns, sample.system_ns, bound_ns, now_ns)
        self._awaited = self._reset
        if self._hears() and self._base_rate is None:
            return "frequency"
        return self._do_frequency(record, sample, page, now_ns)

    def _do_frequency(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        rate = self._base_rate if self._hears() and self._base_rate is not None else self._clock.rate()
        ppm = self._compute_ppm(page.period_ns, rate)
        self._period_before_ns = page.period_ns
        self._points.clear()
        if ppm is not None:
            # A chronyd that has not answered may be slewing, and what the kernel runs at is no frequency then.
            if not self._hears() or self._may_tell():
                record.frequency_ppm = ppm
            self._correct_frequency(record, ppm, rate, now_ns)
        elif not self._is_device:
            record.note(now_ns, "dfreq", False, "the period before is not known: the frequency is left to chronyd")
        return "rest" if self._is_device else "settle"

    def _do_rest(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        """What the old frequency has made of the time since the step is not left to stand while it is verified."""
        if record.frequency_ppm is not None and self._knows_rate():
            self._step_rest(record, sample, now_ns)
            rate = self._clock.rate()
            left_ppm = self._compute_ppm(page.period_ns, rate)
            if self._hears() and left_ppm is not None and abs(left_ppm) >= LEAST_PPM:
                # chronyd went by another rate than it had said last.
                record.frequency_ppm = self._applied_ppm + left_ppm
                self._correct_frequency(record, left_ppm, rate, now_ns)
        return "verify"

    def _do_verify(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        if not self._knows_rate():
            record.note(now_ns, "verify", False, "it is not known whether chronyd has changed the frequency")
            return "settle"
        rate = self._clock.rate()
        if not self._points:
            self._points_rate = rate
        if rate != self._points_rate:
            record.note(now_ns, "verify", False, "chronyd has changed the frequency meanwhile")
            return "settle"
        self._points.append((sample.system_ns, sample.offset_ns))
        span_ns = VERIFY_NS if record.frequency_ppm is not None else MEASURE_NS
        if sample.system_ns - self._points[0][0] < span_ns or len(self._points) < FEWEST_POINTS:
            return "verify"
        ppm, error_ppm = slope_ppm(self._points)
        record.note(now_ns, "verify", True, f"{ppm:+.3f} ppm, give or take {error_ppm:.3f}")
        least_ppm = LEAST_MEASURED_PPM if record.frequency_ppm is None else LEAST_WRONG_PPM
        if abs(ppm) > max(least_ppm, 4 * error_ppm):
            if record.frequency_ppm is not None:
                self._rate = SystemRate()  # its constant was wrong
            record.frequency_ppm = self._applied_ppm + ppm
            self._correct_frequency(record, ppm, rate, now_ns)
        return "settle"

    def _do_settle(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        self._step_rest(record, sample, now_ns)
        self._is_owed = self._is_owed or not (self._hears() and self._knows_rate())
        self._reset_sources(record, now_ns)
        self._bursting = False
        self._correcting_until_ns = 0
        self._quick_until_ns = now_ns + QUICK_FOR_NS
        self._policy.corrected()
        return "follow"

    def _do_follow(self, record: Record, sample: Sample, page: Page, now_ns: int) -> str:
        self._policy.corrected()
        return "follow"

    # ---- The system clock --------------------------------------------------------------------------------

    def _step_rest(self, record: Record, sample: Sample, now_ns: int) -> None:
        if self._stepped and abs(sample.offset_ns) > sample.uncertainty_ns:
            self._step(record, sample.offset_ns, sample.system_ns, sample.uncertainty_ns, now_ns, rest=True)

    def _step(
        self, record: Record, offset_ns: int, system_ns: int, bound_ns: int, now_ns: int, rest: bool = False
    ) -> bool:
        """Whether the clock is right now, or was as good as that.

        One that was stepped is to be right to the nanosecond: ``rest`` is the second step that sees to it.
        """
        name = "step-rest" if rest else "step"
        if not rest and abs(offset_ns) < self.settings.step_threshold:
            record.note(now_ns, name, True, f"{offset_ns} ns is below the threshold: left to chronyd")
            return True
        if abs(offset_ns) <= bound_ns:
            record.note(now_ns, name, True, f"{offset_ns} ns is within the bound of {bound_ns} ns: left to chronyd")
            return True
        try:
            self._clock.step(self._is_device, offset_ns, system_ns, bound_ns)
        except RefclockError as error:
            record.note(now_ns, name, False, str(error))
            return False
        self._stepped = True
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

    def _compute_ppm(self, period_ns: float, rate: float | None) -> float | None:
        """d(reference - system)/dt by the page's period and the boot's constant rate; None: not known yet.

        ``rate`` is what the kernel runs at.  A simulation has no part in it: a private chronyd (-x) keeps its
        corrections to itself, and followed the period before.
        """
        actual_ns = self._period_before_ns
        if self._is_device:
            uncorrected_ns = self._rate.uncorrected_ns()
            actual_ns = None if rate is None or uncorrected_ns is None else uncorrected_ns * rate
        return None if actual_ns is None else frequency_ppm(period_ns, actual_ns)

    def _correct_frequency(self, record: Record, ppm: float, rate: float | None, now_ns: int) -> None:
        """The clock is to run by ``ppm`` faster than at ``rate``, and chronyd is to know it.

        chronyd would set the kernel by itself.  To do it first is for the time until then, and for the case
        that there is no chronyd.
        """
        if abs(ppm) < LEAST_PPM:
            record.note(now_ns, "dfreq", True, f"{ppm:+.3f} ppm is nothing to correct")
            return
        is_applied = self._may_tell()
        if is_applied:
            self._awaited = self._command(record, "dfreq", dfreq(-ppm), now_ns)
            self._base_rate = self._tracking = None  # what was said before is of before
        else:
            why = "no chronyd is configured" if self._reset is None else "chronyd did not reset its sources"
            record.note(now_ns, "dfreq", False, f"{why}: its frequency is left alone")
        if self._is_device and rate is not None:
            try:
                self._clock.set_rate(self._is_device, rate * (1 + ppm * 1e-6))
            except RefclockError as error:
                record.note(now_ns, "frequency", False, str(error))
            else:
                is_applied = True
                record.note(now_ns, "frequency", True, f"{ppm:+.3f} ppm")
        self._applied_ppm += ppm * is_applied

    def _settle_debt(self, base_rate: float, now_ns: int) -> None:
        """Outside a disruption: chronyd goes by ``base_rate``, and is told if the page knows better.

        Only by samples that are believed at this moment, and by a constant that has seen some seconds: there is
        nothing here that would verify it.  Not where the kernel is right all the same: chronyd then has no part in
        it (-x).
        """
        if not self._is_device or not self._policy.corrects or self._policy.offset_ns is None:
            return
        if self._period_before_ns is None or not self._rate.is_settled:
            return
        self._is_owed = False
        rates = (base_rate, self._clock.rate())
        ppm, kernel_ppm = (self._compute_ppm(self._period_before_ns, rate) for rate in rates)
        if ppm is not None and kernel_ppm is not None and min(abs(ppm), abs(kernel_ppm)) > LEAST_OWED_PPM:
            self._log("notice", f"chronyd goes by a frequency that is {ppm:+.3f} ppm off; it is told the page's")
            self._command(None, "dfreq", dfreq(-ppm), now_ns)
            self._base_rate = None

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

    def _hears(self) -> bool:
        """Whether chronyd has been handed the reset of its sources, and did not refuse."""
        return self._reset is not None and self._reset.delivered and self._reset.ok is not False

    def _may_tell(self) -> bool:
        """Whether chronyd hears, and it is known what it goes by: by its word, or since it slews no longer."""
        is_reset = self._reset is not None and self._reset.ok is True
        return self._hears() and (is_reset or self._base_rate is not None)

    def _knows_rate(self) -> bool:
        """Whether the kernel runs at the rate that it says: there is no chronyd that may yet change it."""
        return not self._hears() or (self._awaited is not None and self._awaited.ok is True)

    def _waits_until_ns(self) -> int:
        """Until when the next stage waits for an answer; 0 where there is none to wait for.

        What chronyd then has told the kernel is in force: a frequency that is set is applied at once (Linux 4.19).
        """
        awaited = self._awaited
        if awaited is None or awaited.ok is not None or not awaited.delivered:
            return 0
        return awaited.sent_ns + PATIENCE_NS

    def _burst(self, record: Record | None, now_ns: int) -> Request | None:
        request = self._command(record, "burst", burst(*BURST), now_ns)
        self._next_burst_ns = None if request is None else now_ns + self._burst_pause_ns
        self._burst_pause_ns *= 2
        return request

    def _may_ask(self) -> bool:
        """A tracking that overtakes a reset would speak of the samples from before it."""
        return self._tracking is None and (self._reset is None or self._reset.ok is not None)

    def _ask(self, now_ns: int) -> None:
        self._tracking = self._command(None, "tracking", TRACKING, now_ns)
        self._next_ask_ns = now_ns + (ASK_QUICK_NS if now_ns < self._quick_until_ns else ASK_NS)

    def _finished(self, request: Request, now_ns: int) -> list[Action]:
        record, name = self._names.pop(request, (None, ""))
        if record is not None:
            record.note(now_ns, name, bool(request.ok), request.detail)
        if request is self._tracking:
            self._tracking = None
            self._last_tracking = tracking = request.tracking
            self._base_rate = None if tracking is None else 1 + tracking.frequency_ppm * 1e-6
            if self._chronyd is not None and self._chronyd.connections != self._connection:
                self._connection = self._chronyd.connections
                self._is_owed = True
            if self._is_owed and self._record is None and self._base_rate is not None:
                self._settle_debt(self._base_rate, now_ns)
            return self._chronyd_says(tracking.normal if tracking is not None else None, now_ns)
        if request is self._reset and request.ok is False and self._policy.chronyd_normal is False:
            # Handed over, and then refused or never answered: it is as good as absent.
            if record is not None:
                self._flag(record, now_ns)
            return self._chronyd_says(None, now_ns)
        if name == "burst" and not request.ok:
            self._next_burst_ns = None  # it has no NTP source
        if record is None:
            return []
        if request is self._last_by_fallback:
            self._policy.corrected_by_fallback()
        if name == "makestep":
            return self._policy.chronyd_says(now_ns, True)
        return []

    def _chronyd_says(self, normal: bool | None, now_ns: int) -> list[Action]:
        assert self._chronyd is not None
        error = self._chronyd.error or None
        if error != self._told_chronyd:
            self._told_chronyd = error
            self._log("warning" if error else "info", f"chronyd: {error or f'answers on {self._chronyd.path}'}")
        if normal:
            self._next_burst_ns = None
        if normal and self._bursting and self._record is not None:
            # It has a source again: now a step is one of what its samples say.
            self._bursting = False
            self._command(self._record, "makestep", MAKESTEP, now_ns)
            return []
        return self._policy.chronyd_says(now_ns, normal)

    def _leave_record(self, now_ns: int) -> None:
        """The record ends as it stands: what chronyd has not answered by now is written down as that."""
        for request, (record, name) in self._names.items():
            if record is not None:
                record.note(now_ns, name, False, request.detail or "no answer yet")
                self._names[request] = (None, "")
        self._record = None
        self._bursting = False
        self._correcting_until_ns = 0

    # ---- Pages without time ------------------------------------------------------------------------------

    def _begin_without_time(self, record: Record, now_ns: int) -> None:
        """The page cannot say how wrong the clock is: the fallback can, or chronyd's other sources will."""
        self._burst_pause_ns = BURST_AGAIN_NS
        fallback = self._fallback if self._policy.corrects else None
        if fallback is not None and self._step_by_fallback(record, fallback, now_ns):
            self._reset_sources(record, now_ns)
            self._last_by_fallback = self._burst(record, now_ns)
            if self._last_by_fallback is None:
                self._policy.corrected_by_fallback()
        else:
            self._bursting = self._burst(record, now_ns) is not None

    def _step_by_fallback(self, record: Record, fallback: Phc, now_ns: int) -> bool:
        """Whether the clock is right by the fallback."""
        try:
            offset = fallback.offset()
        except OSError as error:
            record.note(now_ns, "fallback", False, f"{fallback.path}: {error.strerror}")
            return False
        if offset is None:
            record.note(now_ns, "fallback", False, f"whether {fallback.path} says UTC or TAI is not known")
            return False
        record.offset_ns, system_ns, half_ns = offset
        record.note(now_ns, "fallback", True, fallback.path)
        return self._step(record, record.offset_ns, system_ns, half_ns, now_ns)

    def _learn(self, fallback: Phc) -> None:
        """Whether the fallback says UTC or TAI shows while the clock is good."""
        if not self._policy.good:
            return
        error, says = None, ""
        try:
            says = fallback.learn()
        except OSError as failure:
            error = failure.strerror
        if (error or says) != self._told_fallback:
            self._told_fallback = error or says
            self._log("warning" if error else "info", f"fallback {fallback.path}: {error or f'says {says}'}")
