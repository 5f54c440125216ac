"""The whole judgement: what is believed, what is fed, when the clock is disrupted and when it is good again.

Pure: looks at the page and the time come in, actions come out.  No input or output, no clock of its own.
Times called ``now_ns`` are CLOCK_MONOTONIC's.

    waiting ─ a page ─► unknown ─ a sample ─► adjusting ◄─► synchronised ◄─► holdover
                           │                      ▲               │             │
                           └── status, bound ─► unsynchronised ◄──┴─────────────┘

From each of them a moved marker leads to ``disrupted``, which ends when the clock is good again by the same rules
and chronyd agrees.  A page without time is ``watching`` where one with time would be any of the last five.
"""

from __future__ import annotations

from .model import FREERUNNING, RECORD_KEYS, Snapshot, clock_status_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .page import Sample

NSEC_PER_SEC = 1_000_000_000

#: Time outside these years is no time: 2020-01-01 to 2200-01-01.
EARLIEST_NS = 1_577_836_800 * NSEC_PER_SEC
LATEST_NS = 7_258_118_400 * NSEC_PER_SEC
YEAR_NS = 31_556_952 * NSEC_PER_SEC

#: A pair less certain than this was disturbed while it was taken; the next one will be better.
MOST_UNCERTAINTY_NS = 10_000

#: How far a page's period may lie from the counter's own, which is measured against a clock that may be
#: slewed: chronyd's fastest slew is 8.3 %.
PERIOD_TOLERANCE = 0.2

#: A page that loses its time on a new host gets it back within moments, or it will not come back.
TIME_COMES_BACK_NS = 10 * NSEC_PER_SEC

#: How long the last good sample vouches for the clock while there is only nothing to feed.
VOUCHES_NS = 10 * NSEC_PER_SEC


class Record:
    """One line of the journal: what happened, what was done about it and when; times from its detection."""

    __slots__ = (
        "actions",
        "detected_at_ns",
        "detected_ns",
        "frequency_ppm",
        "generation_after",
        "generation_before",
        "id",
        "kind",
        "marker_after",
        "marker_before",
        "offset_ns",
        "recovered_after_ns",
        "superseded_by",
    )

    def __init__(
        self,
        id: int,
        kind: str,
        markers: tuple[int | None, int | None],
        generations: tuple[int | None, int | None],
        detected_ns: int,
        detected_at_ns: int,
    ) -> None:
        self.id = id
        self.kind = kind
        self.marker_before, self.marker_after = markers
        self.generation_before, self.generation_after = generations
        self.detected_ns = detected_ns
        self.detected_at_ns = detected_at_ns
        self.offset_ns: int | None = None
        self.frequency_ppm: float | None = None
        self.actions: list[dict[str, object]] = []
        self.recovered_after_ns: int | None = None
        self.superseded_by: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is not over: neither recovered from nor superseded."""
        return self.recovered_after_ns is None and self.superseded_by is None

    def note(self, now_ns: int, name: str, ok: bool, detail: str = "") -> None:
        """Writes down one action and how it went."""
        after_ns = now_ns - self.detected_ns
        self.actions.append({"name": name, "ok": ok, "after_ns": after_ns, "detail": detail})

    def fields(self) -> dict[str, object]:
        """The contract's keys."""
        fields: dict[str, object] = {name: getattr(self, name) for name in RECORD_KEYS}
        if self.superseded_by is not None:
            fields["superseded_by"] = self.superseded_by
        return fields


class Look:
    """What one look at the page brought: a snapshot, and a sample or why there is none."""

    __slots__ = ("cause", "reason", "sample", "snapshot")

    def __init__(self, snapshot: Snapshot, sample: Sample | None = None, cause: str = "", reason: str = "") -> None:
        self.snapshot = snapshot
        self.sample = sample
        self.cause = cause
        self.reason = reason


#: What the policy asks for: a word, and what the word is about.
#:   feed SAMPLE        the sinks get it
#:   withhold CAUSE     they do not, and it is counted
#:   invalidate None    what they got before is no longer true
#:   react RECORD       a disruption: begin the reaction
#:   correct SAMPLE     set the clock by it (again and again until `corrected`); it is not to be fed
#:   closed RECORD      the record is complete
#:   generation RECORD  the guest is a copy; its clock is sound
#:   warning WORD       a disruption was announced (None: no longer)
Action = tuple[str, object]


class Policy:
    """The state of the system clock, as far as the page lets us know it.

    ``max_error_ns`` is the widest error that counts as good.  ``corrects`` tells whether the reaction sets the
    clock before anything is fed again (else it only flags it).  ``has_chronyd`` tells whether there is to be a
    chronyd; whether it answers is another matter.  ``remembered`` are the marker and generation last seen, from
    before a restart.  ``counter_period_ns`` is the counter's own period as measured, for a check of the page's.
    """

    def __init__(
        self,
        *,
        max_error_ns: int,
        corrects: bool = True,
        has_chronyd: bool = False,
        remembered: tuple[int | None, int | None] = (None, None),
        counter_period_ns: float | None = None,
        next_id: int = 1,
    ) -> None:
        self.state = "waiting"
        self.reason = "no device yet"
        self.kind: str | None = None
        self.marker, self.generation = remembered
        self.clock_status: str | None = None
        self.offset_ns: int | None = None
        self.maxerror_ns: int | None = None
        self.warning: str | None = None
        self.disruptions = 0
        self.last: Record | None = None
        #: Whether chronyd, by samples since the last reset, is synchronised; None: it does not answer.
        self.chronyd_normal: bool | None = None
        self.corrects = corrects
        self._max_error_ns = max_error_ns
        self._has_chronyd = has_chronyd
        self._counter_period_ns = counter_period_ns
        self._next_id = next_id
        self._snapshot: Snapshot | None = None
        self._implausible: str | None = None
        self._open: Record | None = None
        self._uncorrected = False
        self._by_fallback = False
        self._fed = False
        self._lost_time_ns: int | None = None
        self._believed_ns = 0
        self._judged = ("waiting", self.reason)

    # ---- What comes in -------------------------------------------------------------------------------

    def lost(self, reason: str) -> list[Action]:
        """There is no page to look at.  What was last seen of it is kept: it may come back disrupted."""
        self._snapshot = None
        self.clock_status = self.offset_ns = self.maxerror_ns = None
        self._judge("waiting", reason)
        return self._stop_feeding()

    def unreadable(self, cause: str, reason: str) -> list[Action]:
        """The page is there but no consistent copy of it can be had."""
        self.offset_ns = self.maxerror_ns = None
        self._judge("unsynchronised" if self._snapshot else "unknown", reason)
        return [*self._stop_feeding(), ("withhold", cause)]

    def look(self, now_ns: int, system_ns: int, look: Look) -> list[Action]:
        """One look at the page; ``system_ns`` is the system clock, for a record where there is no better."""
        updated = look.snapshot is not self._snapshot
        if updated:
            self._adopt(now_ns, look)
        sample = look.sample
        cause, reason = look.cause, look.reason
        if sample is not None:
            cause, reason = self._doubt(sample)
            if not cause:
                system_ns = sample.reference_ns
        actions = self._compare(now_ns, system_ns, look.snapshot) if updated else []
        if self.kind == "signal" and not self._may_get_time_back(now_ns):
            self.offset_ns = self.maxerror_ns = None
            self._judge("watching", "" if self._chronyd_is_normal else "chronyd is not known to be synchronised")
            actions += self._stop_feeding()
        elif sample is None or cause:
            actions += self._without(now_ns, cause, reason)
        else:
            self._believe(now_ns, sample)
            self._fed = not self._uncorrected
            actions.append(("feed" if self._fed else "correct", sample))
        return actions + self._try_to_close(now_ns)

    def chronyd_says(self, now_ns: int, normal: bool | None) -> list[Action]:
        """What chronyd reports since its last reset: synchronised or not; None when it does not answer."""
        self.chronyd_normal = normal
        return self._try_to_close(now_ns)

    def corrected(self) -> None:
        """The reaction has set the clock, or found that it cannot: what comes now is fed again."""
        self._uncorrected = False

    def corrected_by_fallback(self) -> None:
        """The clock was set by another source of time, where the page has none: chronyd need not be waited for."""
        self._by_fallback = True

    def drill(self, now_ns: int, system_ns: int) -> list[Action]:
        """This moment is to be treated as a disruption."""
        actions = self._disrupted(
            "drill", (self.marker, self.marker), (self.generation, self.generation), now_ns, system_ns
        )
        return [*actions, *self._try_to_close(now_ns)]

    # ---- What it comes to ----------------------------------------------------------------------------

    @property
    def good(self) -> bool:
        """Whether an application may rely on the clock: what `wait` waits for."""
        if self.state == "watching":
            return self._chronyd_is_normal
        return self.state in ("synchronised", "holdover")

    @property
    def _chronyd_is_normal(self) -> bool:
        """What a page without time has to go by.  Where there is to be no chronyd, nobody can say more."""
        return self.chronyd_normal is True or not self._has_chronyd

    @property
    def open_record(self) -> Record | None:
        """The disruption that is not over yet."""
        return self._open

    def _adopt(self, now_ns: int, look: Look) -> None:
        """Takes in an update of the page."""
        self._snapshot = look.snapshot
        kind_before, self.kind = self.kind, "signal" if look.cause == "signal" else "time"
        if (kind_before, self.kind) == ("time", "signal"):
            self._lost_time_ns = now_ns
        self.clock_status = clock_status_name(look.snapshot.status)
        self._implausible = self._doubt_period(look.snapshot)

    def _compare(self, now_ns: int, at_ns: int, snapshot: Snapshot) -> list[Action]:
        """Compares an update of the page with what was last seen."""
        markers = (self.marker, snapshot.disruption_marker)
        generations = (self.generation, snapshot.generation)
        self.marker, self.generation = markers[1], generations[1] if generations[1] is not None else generations[0]
        actions: list[Action] = []
        if markers[0] is not None and markers[0] != markers[1]:
            actions += self._disrupted("disruption", markers, generations, now_ns, at_ns)
        elif None not in generations and generations[0] != generations[1]:
            record = self._record("generation", markers, generations, now_ns, at_ns)
            record.recovered_after_ns = 0
            actions += [("generation", record), ("closed", record)]
        if snapshot.warning != self.warning:
            self.warning = snapshot.warning
            actions.append(("warning", self.warning))
        return actions

    def _disrupted(
        self,
        kind: str,
        markers: tuple[int | None, int | None],
        generations: tuple[int | None, int | None],
        now_ns: int,
        at_ns: int,
    ) -> list[Action]:
        superseded = self._open
        self._open = self._record(kind, markers, generations, now_ns, at_ns)
        self.disruptions += kind == "disruption"
        self._uncorrected = self.corrects
        self._by_fallback = False
        self._fed = False
        self.offset_ns = self.maxerror_ns = None
        if self.chronyd_normal is not None:
            self.chronyd_normal = False
        if self.state != "waiting":
            self._judge("unknown", "no sample since the disruption")
        actions: list[Action] = [("invalidate", None), ("react", self._open)]
        if superseded is not None:
            superseded.superseded_by = self._open.id
            actions.append(("closed", superseded))
        return actions

    def _record(
        self,
        kind: str,
        markers: tuple[int | None, int | None],
        generations: tuple[int | None, int | None],
        now_ns: int,
        at_ns: int,
    ) -> Record:
        record = Record(self._next_id, kind, markers, generations, now_ns, at_ns)
        self._next_id += 1
        if kind != "generation":
            self.last = record
        return record

    def _may_get_time_back(self, now_ns: int) -> bool:
        """Whether a page without time had some a moment ago: a new host that has not published its own yet."""
        return self._lost_time_ns is not None and now_ns - self._lost_time_ns < TIME_COMES_BACK_NS

    def _doubt(self, sample: Sample) -> tuple[str, str]:
        """Why a sample is not believed, or a pair of empty words."""
        if self._implausible is not None:
            return "implausible", self._implausible
        if not EARLIEST_NS <= sample.reference_ns < LATEST_NS:
            return "implausible", f"the page's time is in the year {1970 + sample.reference_ns // YEAR_NS}"
        if sample.uncertainty_ns > MOST_UNCERTAINTY_NS:
            return "uncertain", f"the pair is not certain to {MOST_UNCERTAINTY_NS} ns: it was disturbed"
        bound_ns = sample.maxerror_ns
        if bound_ns is not None and bound_ns > self._max_error_ns:
            return "bound", f"the page's bound is wider than --max-error, {self._max_error_ns / 1e9:g} s"
        if bound_ns is None and sample.clock_status == clock_status_name(FREERUNNING):
            return "bound", "the page is freerunning and gives no bound"
        return "", ""

    def _doubt_period(self, snapshot: Snapshot) -> str | None:
        if self.kind == "signal" or self._counter_period_ns is None or snapshot.counter_period_frac_sec is None:
            return None
        period_ns = snapshot.counter_period_frac_sec * 1e9 * 2.0 ** -(64 + (snapshot.counter_period_shift or 0))
        if abs(period_ns / self._counter_period_ns - 1) < PERIOD_TOLERANCE:
            return None
        return f"the page's counter period is {period_ns:.6g} ns, the counter's own {self._counter_period_ns:.6g} ns"

    def _without(self, now_ns: int, cause: str, reason: str) -> list[Action]:
        """A look that brought no sample to believe."""
        passing = cause in ("leap", "uncertain")
        if passing and self.offset_ns is not None and now_ns - self._believed_ns < VOUCHES_NS:
            return [("withhold", cause)]  # the clock is as good as it was; there is only nothing to feed just now
        self.offset_ns = self.maxerror_ns = None
        self._judge("unknown" if passing else "unsynchronised", reason)
        return [*self._stop_feeding(), ("withhold", cause)]

    def _believe(self, now_ns: int, sample: Sample) -> None:
        self._believed_ns = now_ns
        self.offset_ns, self.maxerror_ns = sample.offset_ns, sample.maxerror_ns
        if self._open is not None and self._open.offset_ns is None:
            self._open.offset_ns = sample.offset_ns
        total_ns = abs(sample.offset_ns) + (sample.maxerror_ns or 0)
        if total_ns > self._max_error_ns:
            self._judge("adjusting", f"the clock is off by {sample.offset_ns / 1e9:.6f} s")
        elif sample.clock_status == clock_status_name(FREERUNNING):
            self._judge("holdover", "the hypervisor's clock is freerunning, within bounds")
        else:
            self._judge("synchronised", "")

    def _judge(self, state: str, reason: str) -> None:
        """Sets the state that the rules give, which an open disruption covers; the device's absence not."""
        self._judged = (state, reason)
        if self._open is not None and state != "waiting":
            self.state = "disrupted"
            self.reason = reason or "waiting for chronyd"
        else:
            self.state, self.reason = state, reason

    def _stop_feeding(self) -> list[Action]:
        if not self._fed:
            return []
        self._fed = False
        return [("invalidate", None)]

    def _try_to_close(self, now_ns: int) -> list[Action]:
        record = self._open
        if record is None:
            return []
        if self._judged[0] == "watching":
            over = self._by_fallback or self._chronyd_is_normal
        else:
            over = self._judged[0] in ("synchronised", "holdover") and self._fed and self.chronyd_normal is not False
        if not over:
            return []
        self._open = None
        self._uncorrected = False
        record.recovered_after_ns = now_ns - record.detected_ns
        self.state, self.reason = self._judged
        return [("closed", record)]
