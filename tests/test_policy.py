"""refclock.policy: every cell (state x event) by a table, and random histories that must keep the invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from refclock import model
from refclock.model import DISRUPTION_IMMINENT, DISRUPTION_SOON, VM_GEN_COUNTER_PRESENT, Snapshot
from refclock.page import Sample
from refclock.policy import MOST_UNCERTAINTY_NS, TIME_COMES_BACK_NS, VOUCHES_NS, Action, Look, Policy, Record

SEC = 1_000_000_000
MSEC = 1_000_000
MAX_ERROR_NS = MSEC
#: 2026-01-01.
NOW_NS = 1_767_225_600 * SEC


class World:
    """A policy, the page that it looks at, and the time."""

    def __init__(self, **options: object) -> None:
        self.policy = Policy(**{"max_error_ns": MAX_ERROR_NS, "has_chronyd": True} | options)  # type: ignore[arg-type]
        self.now_ns = 1000 * SEC
        self.marker = 7
        self.generation: int | None = 3
        self.flags = 0
        self.snapshot = self._update()

    def _update(self, **fields: int) -> Snapshot:
        flags = self.flags | (VM_GEN_COUNTER_PRESENT if self.generation is not None else 0)
        page = {"size": 4096, "clock_status": model.SYNCHRONIZED, "counter_period_frac_sec": 1 << 36}
        page |= {"disruption_marker": self.marker, "vm_generation_counter": self.generation or 0, "flags": flags}
        self.snapshot = Snapshot(model.encode(page | fields))
        return self.snapshot

    def sample(
        self,
        offset_ns: int = 1000,
        maxerror_ns: int | None = 10_000,
        *,
        clock_status: str = "synchronized",
        uncertainty_ns: int = 20,
        reference_ns: int | None = None,
        update: bool = True,
    ) -> list[Action]:
        self.now_ns += MSEC
        if reference_ns is None:
            reference_ns = NOW_NS + self.now_ns
        sample = Sample(
            system_ns=reference_ns - offset_ns,
            reference_ns=reference_ns,
            uncertainty_ns=uncertainty_ns,
            maxerror_ns=maxerror_ns,
            clock_status=clock_status,
            disruption_marker=self.marker,
            counter=self.now_ns,
        )
        snapshot = self._update() if update else self.snapshot
        return self.policy.look(self.now_ns, sample.system_ns, Look(snapshot, sample))

    def nothing(self, cause: str) -> list[Action]:
        self.now_ns += MSEC
        fields = {"signal": {"clock_status": 0, "counter_period_frac_sec": 0}, "status": {"clock_status": 0}}
        snapshot = self._update(**fields.get(cause, {}))
        return self.policy.look(self.now_ns, NOW_NS + self.now_ns, Look(snapshot, None, cause, f"because of {cause}"))

    def signal_for_good(self) -> list[Action]:
        actions = self.nothing("signal")
        self.now_ns += TIME_COMES_BACK_NS
        return actions + self.nothing("signal")

    def stalled(self) -> list[Action]:
        return self.policy.unreadable("stalled", "being written for ever")

    def lost(self) -> list[Action]:
        return self.policy.lost("removed")

    def chronyd(self, normal: bool | None) -> list[Action]:
        self.now_ns += MSEC
        return self.policy.chronyd_says(self.now_ns, normal)

    def drill(self) -> list[Action]:
        return self.policy.drill(self.now_ns, NOW_NS + self.now_ns)

    def disrupt(self) -> None:
        self.marker += 1


def verbs(actions: list[Action]) -> list[str]:
    return [verb for verb, _ in actions]


# ---- The table -------------------------------------------------------------------------------------------

FAR_NS = 2 * MAX_ERROR_NS


def new_marker(then: Callable[[World], list[Action]]) -> Callable[[World], list[Action]]:
    def event(world: World) -> list[Action]:
        world.disrupt()
        return then(world)

    return event


def new_generation(world: World) -> list[Action]:
    assert world.generation is not None
    world.generation += 1
    return world.sample()


#: Everything that can happen, one look or answer each.
EVENTS: dict[str, Callable[[World], list[Action]]] = {
    "good": lambda world: world.sample(),
    "freerunning": lambda world: world.sample(clock_status="freerunning"),
    "far-off": lambda world: world.sample(FAR_NS),
    "wide": lambda world: world.sample(maxerror_ns=MAX_ERROR_NS + 1),
    "boundless": lambda world: world.sample(maxerror_ns=None, clock_status="freerunning"),
    "odd-year": lambda world: world.sample(reference_ns=5 * SEC),
    "uncertain": lambda world: world.sample(uncertainty_ns=MOST_UNCERTAINTY_NS + 1),
    "leap": lambda world: world.nothing("leap"),
    "status": lambda world: world.nothing("status"),
    "signal": lambda world: world.nothing("signal"),
    "signal-10s": World.signal_for_good,
    "stalled": World.stalled,
    "lost": World.lost,
    "marker": new_marker(lambda world: world.sample()),
    "marker+status": new_marker(lambda world: world.nothing("status")),
    "marker+signal": new_marker(lambda world: world.nothing("signal")),
    "marker+leap": new_marker(lambda world: world.nothing("leap")),
    "generation": new_generation,
    "normal": lambda world: world.chronyd(True),
    "not-normal": lambda world: world.chronyd(False),
    "no-answer": lambda world: world.chronyd(None),
    "drill": World.drill,
}


def unknown(world: World) -> None:
    world.nothing("leap")


def unsynchronised(world: World) -> None:
    world.nothing("status")


def pending(world: World) -> None:
    """Disrupted, a good sample seen, the clock not set yet."""
    world.sample()
    EVENTS["marker"](world)


def following(world: World) -> None:
    """Disrupted, the clock set and samples fed again; chronyd not there yet."""
    pending(world)
    world.policy.corrected()
    world.sample()


#: How to come into each situation. chronyd is Normal before each of them.
SITUATIONS: dict[str, Callable[[World], object]] = {
    "fresh": lambda world: None,
    "waiting": lambda world: (world.sample(), world.lost()),
    "unknown": unknown,
    "unsynced": unsynchronised,
    "adjusting": lambda world: world.sample(FAR_NS),
    "holdover": lambda world: world.sample(clock_status="freerunning"),
    "synced": lambda world: world.sample(),
    "watching": lambda world: world.nothing("signal"),
    "pending": pending,
    "follows": following,
    "blank": lambda world: (world.sample(), EVENTS["marker+status"](world)),
    "gone": lambda world: (pending(world), world.lost()),
    "signal": lambda world: (world.nothing("signal"), EVENTS["marker+signal"](world)),
}

#: The state that each situation is in.
IN_STATE = {
    "fresh": "waiting",
    "waiting": "waiting",
    "unknown": "unknown",
    "unsynced": "unsynchronised",
    "adjusting": "adjusting",
    "holdover": "holdover",
    "synced": "synchronised",
    "watching": "watching",
    "pending": "disrupted",
    "follows": "disrupted",
    "blank": "disrupted",
    "gone": "waiting",
    "signal": "disrupted",
}

#: Each cell: the state afterwards, and the actions by their first letter, in order.
#: W waiting, ? unknown, D disrupted, U unsynchronised, A adjusting, H holdover, S synchronised, V watching;
#: f feed, w withhold, i invalidate, r react, c correct, x closed, g generation.
TABLE = """
              fresh waiting unknown unsynced adjusting holdover synced watching pending follows blank  gone   signal
good          S:f   S:f     S:f     S:f      S:f       S:f      S:f    S:f      D:c     D:f     D:c    D:c    D:c
freerunning   H:f   H:f     H:f     H:f      H:f       H:f      H:f    H:f      D:c     D:f     D:c    D:c    D:c
far-off       A:f   A:f     A:f     A:f      A:f       A:f      A:f    A:f      D:c     D:f     D:c    D:c    D:c
wide          U:w   U:w     U:w     U:w      U:iw      U:iw     U:iw   U:w      D:w     D:iw    D:w    D:w    D:w
boundless     U:w   U:w     U:w     U:w      U:iw      U:iw     U:iw   U:w      D:w     D:iw    D:w    D:w    D:w
odd-year      U:w   U:w     U:w     U:w      U:iw      U:iw     U:iw   U:w      D:w     D:iw    D:w    D:w    D:w
uncertain     ?:w   ?:w     ?:w     ?:w      A:w       H:w      S:w    ?:w      D:w     D:w     D:w    D:w    D:w
leap          ?:w   ?:w     ?:w     ?:w      A:w       H:w      S:w    ?:w      D:w     D:w     D:w    D:w    D:w
status        U:w   U:w     U:w     U:w      U:iw      U:iw     U:iw   U:w      D:w     D:iw    D:w    D:w    D:w
signal        V:    U:w     U:w     U:w      U:iw      U:iw     U:iw   V:       D:w     D:iw    D:w    D:w    D:
signal-10s    V:    V:w     V:w     V:w      V:iw      V:iw     V:iw   V:       D:w     D:iw    D:w    D:w    D:
stalled       ?:w   ?:w     U:w     U:w      U:iw      U:iw     U:iw   U:w      D:w     D:iw    D:w    D:w    D:w
lost          W:    W:      W:      W:       W:i       W:i      W:i    W:       W:      W:i     W:     W:     W:
marker        S:f   D:irc   D:irc   D:irc    D:irc     D:irc    D:irc  D:irc    D:irxc  D:irxc  D:irxc D:irxc D:irxc
marker+status U:w   D:irw   D:irw   D:irw    D:irw     D:irw    D:irw  D:irw    D:irxw  D:irxw  D:irxw D:irxw D:irxw
marker+signal V:    D:irw   D:irw   D:irw    D:irw     D:irw    D:irw  D:ir     D:irxw  D:irxw  D:irxw D:irxw D:irx
marker+leap   ?:w   D:irw   D:irw   D:irw    D:irw     D:irw    D:irw  D:irw    D:irxw  D:irxw  D:irxw D:irxw D:irxw
generation    S:f   S:gxf   S:gxf   S:gxf    S:gxf     S:gxf    S:gxf  S:gxf    D:gxc   D:gxf   D:gxc  D:gxc  D:gxc
normal        W:    W:      ?:      U:       A:        H:       S:     V:       D:      S:x     D:     W:     V:x
not-normal    W:    W:      ?:      U:       A:        H:       S:     V:       D:      D:      D:     W:     D:
no-answer     W:    W:      ?:      U:       A:        H:       S:     V:       D:      S:x     D:     W:     D:
drill         W:ir  W:ir    D:ir    D:ir     D:ir      D:ir     D:ir   D:ir     D:irx   D:irx   D:irx  W:irx  D:irx
"""

LETTERS = {
    "W": "waiting",
    "?": "unknown",
    "D": "disrupted",
    "U": "unsynchronised",
    "A": "adjusting",
    "H": "holdover",
    "S": "synchronised",
    "V": "watching",
}
VERBS = {
    "f": "feed",
    "w": "withhold",
    "i": "invalidate",
    "r": "react",
    "c": "correct",
    "x": "closed",
    "g": "generation",
}


def cells() -> dict[tuple[str, str], tuple[str, list[str]]]:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for event, *row in rows:
        assert len(row) == len(header), f"{event}: {len(row)} cells for {len(header)} situations"
        for situation, cell in zip(header, row, strict=True):
            letter, _, actions = cell.partition(":")
            found[situation, event] = LETTERS[letter], [VERBS[action] for action in actions]
    return found


def test_the_table_has_every_cell_and_every_state() -> None:
    assert set(cells()) == {(situation, event) for situation in SITUATIONS for event in EVENTS}
    assert set(IN_STATE.values()) == set(model.STATES)
    assert {state for state, _ in cells().values()} == set(model.STATES)
    assert {action for _, actions in cells().values() for action in actions} == set(VERBS.values())


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_cell(situation: str, event: str) -> None:
    world = World()
    world.chronyd(True)
    SITUATIONS[situation](world)
    assert world.policy.state == IN_STATE[situation]
    actions = EVENTS[event](world)
    got = (
        world.policy.state,
        [verb for number, verb in enumerate(verbs(actions)) if event != "signal-10s" or number < 2],
    )
    assert got == cells()[situation, event]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_holds_in_every_cell(situation: str, event: str) -> None:
    world = World()
    world.chronyd(True)
    SITUATIONS[situation](world)
    before = world.policy.open_record
    actions = EVENTS[event](world)
    policy = world.policy
    if "react" in verbs(actions):
        assert verbs(actions)[:2] == ["invalidate", "react"], "nothing comes before these two"
        assert before is None or before.superseded_by == policy.open_record.id  # type: ignore[union-attr]
    assert policy.good == (
        policy.state in ("synchronised", "holdover", "watching") and policy.chronyd_normal is True
    ) or (policy.state in ("synchronised", "holdover"))
    if policy.good:
        assert policy.open_record is None
    if policy.open_record is not None:
        assert policy.state in ("disrupted", "waiting")
        assert policy.last is policy.open_record and policy.open_record.is_open


# ---- Details that the table does not show ------------------------------------------------------------------


def test_a_disruption_from_beginning_to_end() -> None:
    world = World()
    world.chronyd(True)
    world.sample()
    world.disrupt()
    world.generation = 4
    started_ns = world.now_ns + MSEC
    actions = world.sample(20 * SEC)
    record = world.policy.open_record
    assert record is not None and dict(actions)["react"] is record
    assert record.kind == "disruption"
    assert (record.marker_before, record.marker_after) == (7, 8)
    assert (record.generation_before, record.generation_after) == (3, 4)
    assert record.detected_ns == started_ns
    assert record.detected_at_ns == NOW_NS + started_ns, "the page's time, the clock being wrong"
    assert record.offset_ns == 20 * SEC
    assert world.policy.chronyd_normal is False, "what chronyd said is of before"
    assert verbs(world.chronyd(True)) == [], "not by chronyd alone: the clock is not set"
    world.chronyd(False)
    assert verbs(world.sample(500)) == ["correct"]
    world.policy.corrected()
    assert verbs(world.sample(5)) == ["feed"]
    assert world.policy.state == "disrupted" and world.policy.reason == "waiting for chronyd"
    assert world.chronyd(True) == [("closed", record)]
    assert record.recovered_after_ns == world.now_ns - started_ns
    assert record.superseded_by is None and not record.is_open
    assert world.policy.state == "synchronised" and world.policy.disruptions == 1
    assert record.offset_ns == 20 * SEC, "how wrong the clock was, not how right it is"


def test_the_keys_of_a_record() -> None:
    record = Record(5, "disruption", (1, 2), (None, None), 100, 1000)
    record.note(350, "step", True, "+5 ns")
    contract = ["id", "kind", "marker_before", "marker_after", "generation_before", "generation_after"]
    contract += ["detected_at_ns", "offset_ns", "frequency_ppm", "actions", "recovered_after_ns"]
    assert list(record.fields()) == contract
    assert record.fields()["actions"] == [{"name": "step", "ok": True, "after_ns": 250, "detail": "+5 ns"}]
    record.superseded_by = 6
    assert list(record.fields()) == [*contract, "superseded_by"]


def test_chronyd_is_normal_but_the_clock_is_not_good() -> None:
    world = World()
    world.chronyd(True)
    following(world)
    world.sample(FAR_NS)
    assert world.chronyd(True) == []
    assert world.policy.state == "disrupted" and "off by" in world.policy.reason
    assert verbs(world.sample()) == ["feed", "closed"]


def test_no_chronyd_to_wait_for() -> None:
    world = World(has_chronyd=False)
    pending(world)
    world.policy.corrected()
    assert verbs(world.sample()) == ["feed", "closed"]


def test_flagging_only() -> None:
    world = World(corrects=False)
    world.sample()
    world.disrupt()
    assert verbs(world.sample(FAR_NS)) == ["invalidate", "react", "feed"]
    world.chronyd(True)
    assert verbs(world.sample()) == ["feed", "closed"]


@pytest.mark.parametrize(
    ("has_chronyd", "normal", "good"),
    [(True, True, True), (True, False, False), (True, None, False), (False, None, True)],
)
def test_a_page_without_time_is_as_good_as_chronyd(has_chronyd: bool, normal: bool | None, good: bool) -> None:
    world = World(has_chronyd=has_chronyd)
    assert not world.policy.good
    world.nothing("signal")
    world.chronyd(normal)
    assert world.policy.state == "watching" and world.policy.good is good


def test_a_page_without_time_recovers_by_a_fallback() -> None:
    world = World()
    SITUATIONS["signal"](world)
    world.chronyd(False)
    assert verbs(world.nothing("signal")) == []
    world.policy.corrected_by_fallback()
    assert verbs(world.nothing("signal")) == ["closed"]
    world.disrupt()
    assert verbs(world.nothing("signal")) == ["invalidate", "react"], "what the fallback did was for the one before"


def test_a_new_host_that_publishes_late() -> None:
    world = World()
    world.chronyd(True)
    world.sample()
    world.disrupt()
    assert verbs(world.nothing("signal")) == ["invalidate", "react", "withhold"]
    world.chronyd(True)  # by other sources
    for _ in range(3):
        world.now_ns += 3 * SEC
        assert verbs(world.nothing("signal")) == ["withhold"]
    assert world.policy.state == "disrupted"
    assert verbs(world.nothing("status")) == ["withhold"]
    assert verbs(world.sample(20 * SEC)) == ["correct"]
    assert world.policy.last is not None and world.policy.last.offset_ns == 20 * SEC


def test_a_new_host_without_time() -> None:
    world = World()
    world.chronyd(True)
    world.sample()
    world.disrupt()
    world.nothing("signal")
    world.chronyd(True)
    world.now_ns += TIME_COMES_BACK_NS
    assert verbs(world.nothing("signal")) == ["closed"]
    assert world.policy.state == "watching"


def test_a_guest_that_slept_before_the_new_host_published() -> None:
    """However long CLOCK_MONOTONIC says it was: the page has lost its time only now."""
    world = World()
    world.chronyd(True)
    world.sample()
    world.disrupt()
    world.now_ns += 3600 * SEC
    assert verbs(world.nothing("signal")) == ["invalidate", "react", "withhold"]
    assert verbs(world.sample()) == ["correct"]


@pytest.mark.parametrize("cause", ["leap", "uncertain"])
def test_a_window_without_samples_keeps_the_state_for_a_while(cause: str) -> None:
    world = World()
    world.sample(300)
    last_ns = world.now_ns
    while world.now_ns + MSEC - last_ns < VOUCHES_NS:
        assert verbs(EVENTS[cause](world)) == ["withhold"]
        assert (world.policy.state, world.policy.offset_ns) == ("synchronised", 300)
        world.now_ns += SEC
    world.now_ns = last_ns + VOUCHES_NS
    assert verbs(EVENTS[cause](world)) == ["invalidate", "withhold"]
    assert (world.policy.state, world.policy.offset_ns) == ("unknown", None)
    assert verbs(world.sample()) == ["feed"]


def test_remembered_from_before_a_restart() -> None:
    same = World(remembered=(7, 3), next_id=12)
    assert verbs(same.sample()) == ["feed"]
    moved = World(remembered=(6, 3), next_id=12)
    assert verbs(moved.sample()) == ["invalidate", "react", "correct"]
    record = moved.policy.last
    assert record is not None and record.id == 12 and moved.policy.disruptions == 1
    assert (record.marker_before, record.marker_after) == (6, 7)
    copied = World(remembered=(7, 2))
    assert verbs(copied.sample()) == ["generation", "closed", "feed"]
    both = World(remembered=(6, 2))
    assert verbs(both.sample()) == ["invalidate", "react", "correct"]


def test_a_marker_that_goes_back_is_another_marker() -> None:
    world = World()
    world.sample()
    world.marker = 0
    assert verbs(world.sample()) == ["invalidate", "react", "correct"]


def test_the_generation_alone() -> None:
    world = World()
    world.sample()
    assert world.generation is not None
    world.generation += 1
    actions = world.sample()
    assert verbs(actions) == ["generation", "closed", "feed"]
    record = dict(actions)["generation"]
    assert isinstance(record, Record) and record.kind == "generation" and record.recovered_after_ns == 0
    assert (record.marker_before, record.marker_after) == (7, 7)
    assert world.policy.last is None and world.policy.disruptions == 0 and world.policy.state == "synchronised"
    world.generation = None
    assert verbs(world.sample()) == ["feed"], "a page that no longer has the counter"
    world.generation = 4
    assert verbs(world.sample()) == ["feed"], "and has it again"
    world.generation = 5
    assert verbs(world.sample()) == ["generation", "closed", "feed"]


def test_a_drill() -> None:
    world = World()
    world.chronyd(True)
    world.sample()
    actions = world.drill()
    assert verbs(actions) == ["invalidate", "react"]
    record = world.policy.open_record
    assert record is not None and record.kind == "drill"
    assert record.marker_before == record.marker_after == 7
    assert world.policy.disruptions == 0
    assert verbs(world.sample(update=False)) == ["correct"]
    world.policy.corrected()
    world.sample(update=False)
    assert verbs(world.chronyd(True)) == ["closed"]


def test_the_same_update_is_compared_once() -> None:
    world = World()
    world.sample()
    world.disrupt()
    assert verbs(world.sample()) == ["invalidate", "react", "correct"]
    assert verbs(world.sample(update=False)) == ["correct"]
    assert world.policy.disruptions == 1


def test_announcements() -> None:
    world = World()
    assert "warning" not in verbs(world.sample())
    seen = []
    for flags in (DISRUPTION_SOON, DISRUPTION_SOON, DISRUPTION_SOON | DISRUPTION_IMMINENT, DISRUPTION_IMMINENT, 0, 0):
        world.flags = flags
        seen += [subject for verb, subject in world.sample() if verb == "warning"]
        world.lost()
    assert seen == ["soon", "imminent", None]


@pytest.mark.parametrize(
    ("offset_ns", "maxerror_ns", "state"),
    [
        (0, MAX_ERROR_NS, "synchronised"),
        (-1, MAX_ERROR_NS, "adjusting"),
        (MAX_ERROR_NS, 0, "synchronised"),
        (-MAX_ERROR_NS, 0, "synchronised"),
        (MAX_ERROR_NS, 1, "adjusting"),
        (MAX_ERROR_NS, None, "synchronised"),
        (0, MAX_ERROR_NS + 1, "unsynchronised"),
    ],
)
def test_how_good_is_good(offset_ns: int, maxerror_ns: int | None, state: str) -> None:
    world = World()
    world.sample(offset_ns, maxerror_ns)
    assert world.policy.state == state


@pytest.mark.parametrize(
    ("factor", "state"),
    [(1.0, "synchronised"), (0.85, "synchronised"), (0.75, "unsynchronised"), (1.3, "unsynchronised")],
)
def test_a_period_that_is_not_the_counters(factor: float, state: str) -> None:
    period_ns = (1 << 36) * 1e9 * 2.0**-64
    world = World(counter_period_ns=period_ns * factor)
    world.sample()
    assert world.policy.state == state
    assert ("counter period" in world.policy.reason) == (state == "unsynchronised")


@pytest.mark.parametrize("reference_ns", [0, -5, 1_577_836_800 * SEC - 1, 7_258_118_400 * SEC, 1 << 63])
def test_a_year_that_cannot_be(reference_ns: int) -> None:
    world = World()
    world.sample()
    world.disrupt()
    assert verbs(world.sample(reference_ns=reference_ns)) == ["invalidate", "react", "withhold"]
    assert world.policy.last is not None
    if reference_ns != 1 << 63:
        assert world.policy.last.detected_at_ns == reference_ns - 1000, "the system clock's time, if no better"


def test_a_reason_that_lasts_is_one_reason() -> None:
    """It is logged when it changes: no figure in it may."""
    bad = World()
    for event in (
        lambda number: bad.sample(maxerror_ns=MAX_ERROR_NS + number),
        lambda number: bad.sample(uncertainty_ns=MOST_UNCERTAINTY_NS + number),
        lambda number: bad.sample(reference_ns=number * 60 * SEC),
    ):
        reasons = set()
        for number in range(1, 5):
            event(number)
            reasons.add(bad.policy.reason)
        assert len(reasons) == 1 and reasons != {""}


def test_why_a_page_without_time_is_not_good() -> None:
    world = World()
    world.nothing("signal")
    assert world.policy.reason == "chronyd is not known to be synchronised"
    world.chronyd(True)
    world.nothing("signal")
    assert world.policy.reason == ""


# ---- Random histories --------------------------------------------------------------------------------------


class History(RuleBasedStateMachine):
    """A page, a chronyd and a reaction that do anything at any time."""

    @initialize(
        corrects=st.booleans(),
        has_chronyd=st.booleans(),
        remembered=st.sampled_from([(None, None), (7, 3), (6, 3), (7, 2), (6, None)]),
    )
    def start(self, corrects: bool, has_chronyd: bool, remembered: tuple[int | None, int | None]) -> None:
        self.world = World(corrects=corrects, has_chronyd=has_chronyd, remembered=remembered)
        self.corrects, self.has_chronyd = corrects, has_chronyd
        self.seen = remembered
        self.opened: list[Record] = []
        self.closed: list[Record] = []
        self.generations = 0
        self.disruptions = 0
        self.may_be_fed = remembered[0] in (None, 7)
        self.trusted = False
        self.last: tuple[int, int] | None = None
        self.fed = False
        self.fallback = False
        self.sampled = False

    def take(self, actions: list[Action]) -> None:
        policy = self.world.policy
        for verb, subject in actions:
            if verb == "feed":
                assert isinstance(subject, Sample)
                assert subject.disruption_marker == self.world.marker == policy.marker
                assert self.may_be_fed, "fed before the clock was corrected"
                assert subject.uncertainty_ns <= MOST_UNCERTAINTY_NS
                assert (subject.maxerror_ns or 0) <= MAX_ERROR_NS
                self.fed = True
            elif verb == "correct":
                assert self.corrects and not self.may_be_fed
                assert isinstance(subject, Sample) and subject.disruption_marker == self.world.marker
            elif verb == "invalidate":
                self.fed = False
            elif verb == "react":
                assert not self.fed, "what was fed is still valid"
                assert isinstance(subject, Record)
                self.opened.append(subject)
                self.may_be_fed = not self.corrects
                self.fallback = False
            elif verb == "closed":
                assert isinstance(subject, Record) and not subject.is_open
                self.close(subject)
        if policy.state in ("waiting", "unsynchronised", "watching"):
            assert not self.fed

    def close(self, record: Record) -> None:
        if record.kind == "generation":
            return
        assert record in self.opened and record not in self.closed, "closed once"
        self.closed.append(record)
        assert (record.recovered_after_ns is None) == (record.superseded_by is not None)
        if record.superseded_by is not None:
            assert record.superseded_by == self.opened[-1].id > record.id
            return
        assert record is self.opened[-1]
        policy = self.world.policy
        self.may_be_fed = True
        if policy.state == "watching":
            assert self.fallback or policy.chronyd_normal is True or not self.has_chronyd
        else:
            assert policy.state in ("synchronised", "holdover") and self.fed
            assert policy.chronyd_normal is not False

    @rule(
        offset_ns=st.sampled_from([0, 1000, -999_000, 999_000, 2 * MSEC, -20 * SEC]),
        maxerror_ns=st.sampled_from([None, 0, 10_000, 990_000, MSEC, MSEC + 1]),
        clock_status=st.sampled_from(["synchronized", "freerunning"]),
        uncertainty_ns=st.sampled_from([15, MOST_UNCERTAINTY_NS, MOST_UNCERTAINTY_NS + 1]),
        disrupts=st.integers(0, 4).map(lambda number: number == 0),
        copies=st.integers(0, 4).map(lambda number: number == 0),
        update=st.booleans(),
        odd=st.integers(0, 9).map(lambda number: number == 0),
    )
    def a_sample(
        self,
        offset_ns: int,
        maxerror_ns: int | None,
        clock_status: str,
        uncertainty_ns: int,
        disrupts: bool,
        copies: bool,
        update: bool,
        odd: bool,
    ) -> None:
        self.change(disrupts, copies)
        actions = self.world.sample(
            offset_ns,
            maxerror_ns,
            clock_status=clock_status,
            uncertainty_ns=uncertainty_ns,
            reference_ns=5 * SEC if odd else None,
            update=update or disrupts or copies or not self.sampled,
        )
        believed = (
            not odd
            and uncertainty_ns <= MOST_UNCERTAINTY_NS
            and (maxerror_ns or 0) <= MAX_ERROR_NS
            and not (maxerror_ns is None and clock_status == "freerunning")
        )
        assert believed == bool({"feed", "correct"} & set(verbs(actions)))
        self.sampled = True
        if believed:
            self.last = abs(offset_ns), maxerror_ns or 0
        self.take(actions)

    @rule(
        cause=st.sampled_from(["status", "signal", "signal", "leap"]),
        disrupts=st.integers(0, 3).map(lambda number: number == 0),
        copies=st.integers(0, 4).map(lambda number: number == 0),
    )
    def no_sample(self, cause: str, disrupts: bool, copies: bool) -> None:
        self.change(disrupts, copies)
        self.sampled = False
        actions = self.world.nothing(cause)
        assert not {"feed", "correct"} & set(verbs(actions))
        self.take(actions)

    def change(self, disrupts: bool, copies: bool) -> None:
        world = self.world
        marker, _ = self.seen
        if disrupts:
            world.disrupt()
        if copies:
            world.generation = (world.generation or 0) + 1
        self.disruptions += marker is not None and marker != world.marker
        self.seen = world.marker, world.generation

    @rule()
    def stalled(self) -> None:
        self.take(self.world.stalled())

    @rule()
    def lost(self) -> None:
        self.sampled = False
        self.take(self.world.lost())

    @rule(seconds=st.sampled_from([1, 11]))
    def time_goes_by(self, seconds: int) -> None:
        self.world.now_ns += seconds * SEC

    @rule(normal=st.sampled_from([True, True, False, None]))
    def chronyd(self, normal: bool | None) -> None:
        if self.has_chronyd:
            self.take(self.world.chronyd(normal))

    @rule()
    def drill(self) -> None:
        self.take(self.world.drill())

    @precondition(lambda self: self.world.policy.open_record is not None)
    @rule()
    def corrected(self) -> None:
        self.world.policy.corrected()
        self.may_be_fed = True

    @precondition(lambda self: self.world.policy.open_record is not None and self.world.policy.kind == "signal")
    @rule()
    def corrected_by_fallback(self) -> None:
        self.world.policy.corrected_by_fallback()
        self.fallback = True

    @invariant()
    def good_is_good(self) -> None:
        policy = self.world.policy
        if policy.state in ("synchronised", "holdover"):
            assert self.last is not None and sum(self.last) <= MAX_ERROR_NS
            assert policy.offset_ns is not None and policy.open_record is None
            assert abs(policy.offset_ns) + (policy.maxerror_ns or 0) <= MAX_ERROR_NS
        if policy.good and policy.state == "watching":
            assert not self.has_chronyd or policy.chronyd_normal is True

    @invariant()
    def records_are_in_order(self) -> None:
        policy = self.world.policy
        ids = [record.id for record in self.opened]
        assert ids == sorted(set(ids))
        still_open = [record for record in self.opened if record not in self.closed]
        assert still_open == ([policy.open_record] if policy.open_record is not None else [])
        assert policy.disruptions == self.disruptions == sum(record.kind == "disruption" for record in self.opened)
        assert (policy.state == "disrupted") <= (policy.open_record is not None)
        if policy.open_record is not None:
            assert policy.state in ("disrupted", "waiting")


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
