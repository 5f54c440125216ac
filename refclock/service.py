"""The daemon: one loop, and the only module that knows both ends, the page and those it is for."""

from __future__ import annotations

import os
import signal
import time
from select import POLLIN, poll

from .clerk import Clerk
from .errors import PageInvalid, PageStalled, RefclockError, SampleWithheld
from .journal import Journal, LastSeen
from .log import Log
from .metrics import MetricsFile, render
from .page import Page, Sample, counter_period_ns
from .policy import Look, Policy
from .reaction import Reaction
from .samplelog import SampleLog
from .segment import Shm
from .sock import Sock
from .status import Client, Server
from .telling import Hooks, Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .options import Settings
    from .policy import Action, Record
    from .sink import Sink

NSEC_PER_SEC = 1_000_000_000

#: How often the path is looked at for another device in its place, and a device that is not there for its coming.
IDENTITY_NS = NSEC_PER_SEC
REOPEN_NS = NSEC_PER_SEC // 4
#: How long a disk is waited for, so that those who are told of a record find it in the journal; and at the end.
SETTLE_S = 0.02
PATIENCE_S = 5.0


class Service:
    """Reads the page, judges it, feeds the sinks, reacts to disruptions and tells about it, until told to end."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings], log: Log) -> None:
        """``reload`` gives the settings anew, for SIGHUP; it may raise RefclockError."""
        self._log = log
        self._reload = reload
        self._settings = settings
        self._page: Page | None = None
        self._samples = 0
        self._withheld: dict[str, int] = {}
        self._seen_by_kind = {"disruption": 0, "generation": 0, "drill": 0}
        self._last_recovery_ns: int | None = None
        self._last_sample: Sample | None = None
        self._started_ns = time.monotonic_ns()
        self._signals: list[int] = []
        self._changed = False
        self._next_sample_ns = 0
        self._next_open_ns = 0
        self._next_identity_ns = 0
        self._told = ("", "", False)
        self._news: list[Action] = []
        self._server = Server(settings.status)
        self._clerk = Clerk(log)
        self._journal = Journal(str(settings.journal), log, self._clerk.do)
        self._last_seen = LastSeen(settings.state_dir, settings.device, log, self._clerk.do)
        self._policy = Policy(
            max_error_ns=settings.max_error,
            has_chronyd=settings.chronyd is not None,
            remembered=self._last_seen.load(),
            counter_period_ns=counter_period_ns(),
            next_id=self._journal.next_id,
        )
        self._reaction = Reaction(settings, self._policy, log)
        self._sample_log = SampleLog(settings.log_samples, log)
        self._metrics = MetricsFile(settings.metrics, log, self._clerk.do)
        self._hooks = Hooks(settings.hook, log)
        self._supervisor = Supervisor()
        self._sinks: list[Sink] = _make_sinks(settings, log)

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, or for ``exit_after``; leaves the sinks invalid and the socket gone."""
        wakeup = self._catch_signals()
        started_ns = time.monotonic_ns()
        limit_ns = self._settings.exit_after
        self._log("info", f"watching {self._settings.device}")
        self._supervisor.ready()
        try:
            while not self._ending():
                now_ns = time.monotonic_ns()
                if limit_ns is not None and now_ns - started_ns >= limit_ns:
                    break
                self._look_and_act(now_ns)  # 1. look at the page, judge, feed, react
                self._tell()  # 2. say what has changed
                deadline_ns = self._deadline(started_ns, limit_ns)
                ready = self._wait(deadline_ns, wakeup)  # 3. wait for the page, for others, or for the time
                self._hear(ready)  # 4. signals, chronyd's answers, other programs' questions
        finally:
            self.close()

    def close(self) -> None:
        """Ends everything in the order in which nobody is misled: the sinks first."""
        self._supervisor.stopping()
        for sink in self._sinks:
            sink.close()
        self._tell_news()
        self._save_last_seen()
        self._reaction.close()
        self._sample_log.close()
        self._metrics.close()
        self._hooks.close()
        self._server.close()
        if self._page is not None:
            self._page.close()
        if not self._clerk.wait(PATIENCE_S):
            self._log("warning", f"a disk has not answered for {PATIENCE_S:g} s: what was to be written is lost")

    # ---- 1. Look and act -----------------------------------------------------------------------------

    def _look_and_act(self, now_ns: int) -> None:
        if self._page is None and now_ns >= self._next_open_ns:
            self._open(now_ns)
        if self._page is not None and (self._changed or now_ns >= self._next_sample_ns):
            for action in self._look(self._page, now_ns):
                self._act(action)
            self._next_sample_ns = now_ns + self._reaction.interval_ns(now_ns)
        for action in self._reaction.tick(time.monotonic_ns()):
            self._act(action)

    def _open(self, now_ns: int) -> None:
        self._next_open_ns = now_ns + REOPEN_NS
        try:
            self._page = Page(self._settings.device)
        except RefclockError as error:
            self._lose(str(error), "invalid" if isinstance(error, PageInvalid) else "")
            return
        self._next_identity_ns = now_ns + IDENTITY_NS
        self._next_sample_ns = now_ns
        self._log("info", _describe(self._page))
        self._reaction.opened(self._page)

    def _lose(self, reason: str, cause: str = "") -> None:
        if self._page is not None:
            self._page.close()
            self._page = None
        if cause:
            self._count_withheld(cause)
        for action in self._policy.lost(reason):
            self._act(action)

    def _look(self, page: Page, now_ns: int) -> list[Action]:
        if now_ns >= self._next_identity_ns:
            self._next_identity_ns = now_ns + IDENTITY_NS
            if not page.still_there():
                self._lose(f"{self._settings.device} was removed or replaced")
                self._next_open_ns = now_ns
                return []
        sample, cause, reason = None, "", ""
        try:
            sample = page.sample()
        except SampleWithheld as withheld:
            cause, reason = withheld.cause, withheld.reason
        except PageStalled as error:
            return self._policy.unreadable("stalled", str(error))
        except RefclockError as error:
            self._lose(str(error), "invalid")
            return []
        return self._policy.look(now_ns, time.time_ns(), Look(page.snapshot, sample, cause, reason))

    def _act(self, action: Action) -> None:
        verb, subject = action
        getattr(self, f"_act_{verb}")(subject)

    def _act_feed(self, sample: Sample) -> None:
        self._samples += 1
        self._last_sample = sample
        arrivals = [sink.put(sample) for sink in self._sinks]
        if any(arrivals):
            self._reaction.consumer_came(time.monotonic_ns())
        assert self._page is not None
        self._reaction.fed(sample, self._page)
        self._sample_log.write(sample)

    def _act_withhold(self, cause: str) -> None:
        self._count_withheld(cause)

    def _act_invalidate(self, _: None) -> None:
        for sink in self._sinks:
            sink.invalidate()

    def _act_react(self, record: Record) -> None:
        self._reaction.begin(record, time.monotonic_ns())
        self._count_seen(record)
        self._news.append(("react", record))

    def _act_correct(self, sample: Sample) -> None:
        self._count_withheld("disrupted")
        self._last_sample = sample
        assert self._page is not None
        self._reaction.correct(sample, self._page, time.monotonic_ns())

    def _act_closed(self, record: Record) -> None:
        if record.superseded_by is None and record.kind != "generation":
            self._reaction.closed(time.monotonic_ns())
            self._last_recovery_ns = record.recovered_after_ns
        self._news.append(("closed", record))

    def _act_generation(self, record: Record) -> None:
        self._count_seen(record)
        self._news.append(("generation", record))

    def _act_warning(self, word: str | None) -> None:
        self._news.append(("warning", word))

    def _count_withheld(self, cause: str) -> None:
        self._withheld[cause] = self._withheld.get(cause, 0) + 1

    def _count_seen(self, record: Record) -> None:
        self._seen_by_kind[record.kind] += 1

    # ---- 2. Tell -------------------------------------------------------------------------------------

    def _tell(self) -> None:
        policy = self._policy
        now_ns = time.monotonic_ns()
        self._supervisor.tick(now_ns, policy.state)
        if self._reaction.hurries(now_ns):
            return  # disks and hooks may be slow
        self._tell_news()
        self._hooks.reap()
        self._metrics.tick(now_ns, policy.state, self.status)
        # Reasons may contain figures that change all the time: a change of state is worth a line, and so is
        # another reason for having no clock.
        reason = policy.reason if policy.state in ("waiting", "unknown", "unsynchronised", "watching") else ""
        told = (policy.state, reason, policy.good)
        if told == self._told:
            return
        self._told = told
        self._log("info", _describe_state(policy))
        self._save_last_seen()
        for client in self._server.clients.values():
            if client.watching:
                client.answer(self.status())

    def _tell_news(self) -> None:
        for verb, subject in self._news:
            getattr(self, f"_tell_{verb}")(subject)
        self._news.clear()

    def _write(self, record: Record) -> None:
        self._journal.write(record)
        self._clerk.settle(SETTLE_S)

    def _tell_react(self, record: Record) -> None:
        self._write(record)
        self._log("warning", _describe_disruption(record))
        self._hooks.run("disrupted", record.fields())

    def _tell_closed(self, record: Record) -> None:
        self._write(record)
        self._save_last_seen()
        if record.superseded_by is not None:
            self._log("warning", f"{record.kind} {record.id} is superseded by {record.superseded_by}")
        elif record.kind != "generation":
            after_ms = (record.recovered_after_ns or 0) / 1e6
            self._log("notice", f"recovered from {record.kind} {record.id} after {after_ms:.1f} ms")
            self._hooks.run("recovered", record.fields())

    def _tell_generation(self, record: Record) -> None:
        self._log("notice", f"this guest is a copy: generation {record.generation_before} -> {record.generation_after}")
        self._hooks.run("generation", record.fields())

    def _tell_warning(self, word: str | None) -> None:
        if word is None:
            self._log("info", "the announced disruption is off, or over")
            return
        span = "an hour" if word == "imminent" else "a day"
        self._log("notice", f"the hypervisor announces a disruption of the clock within about {span}")
        self._hooks.run(word, self.status())

    def _save_last_seen(self) -> None:
        """Not while a disruption is open: a daemon that starts again must begin anew with it."""
        if self._policy.marker is not None and self._policy.open_record is None:
            self._last_seen.save(self._policy.marker, self._policy.generation)

    def status(self) -> dict[str, Any]:
        """The contract's status, and what else people and their monitoring want to know."""
        policy = self._policy
        sample = self._last_sample if policy.offset_ns is not None else None
        return {
            "state": policy.state,
            "reason": policy.reason,
            "good": policy.good,
            "kind": policy.kind,
            "device": self._settings.device,
            "clock_status": policy.clock_status,
            "offset_ns": policy.offset_ns,
            "maxerror_ns": policy.maxerror_ns,
            "esterror_ns": sample.esterror_ns if sample is not None else None,
            "uncertainty_ns": sample.uncertainty_ns if sample is not None else None,
            "max_error_ns": self._settings.max_error,
            "disruption_marker": policy.marker,
            "generation": policy.generation,
            "disruptions": policy.disruptions,
            "disruptions_by_kind": self._seen_by_kind,
            "last_disruption": policy.last.fields() if policy.last is not None else None,
            "last_recovery_ns": self._last_recovery_ns,
            "samples": self._samples,
            "withheld": self._withheld,
            "sinks": [sink.status() for sink in self._sinks],
            "chronyd": self._reaction.chronyd_status(),
            "warning": policy.warning,
            "uptime_ns": time.monotonic_ns() - self._started_ns,
        }

    # ---- 3. Wait -------------------------------------------------------------------------------------

    def _deadline(self, started_ns: int, limit_ns: int | None) -> int:
        deadlines = [self._next_sample_ns if self._page is not None else self._next_open_ns]
        if limit_ns is not None:
            deadlines.append(started_ns + limit_ns)
        others = (self._reaction.due_ns(), self._supervisor.due_ns(), self._metrics.due_ns())
        deadlines += [due_ns for due_ns in others if due_ns is not None]
        return min(deadlines)

    def _wait(self, deadline_ns: int, wakeup: int) -> list[int]:
        fds = [(wakeup, POLLIN), (self._server.fileno(), POLLIN)]
        fds += [(fd, client.events) for fd, client in self._server.clients.items()]
        fds += [(fd, POLLIN) for fd in self._reaction.filenos()]
        if self._page is not None:
            self._changed, ready = self._page.wait(deadline_ns, self._settings.watch, fds)
            return ready
        poller = poll()
        for fd, events in fds:
            poller.register(fd, events)
        timeout_ms = max(0, deadline_ns - time.monotonic_ns()) / 1e6
        return [fd for fd, _ in poller.poll(timeout_ms)]

    # ---- 4. Hear -------------------------------------------------------------------------------------

    def _hear(self, ready: list[int]) -> None:
        if not ready:
            return
        now_ns = time.monotonic_ns()
        if self._server.fileno() in ready:
            self._server.accept()
        for fd in ready:
            client = self._server.clients.get(fd)
            if client is not None:
                self._serve(client)
        if any(fd in ready for fd in self._reaction.filenos()):
            self._next_sample_ns = now_ns  # what chronyd answers, or a clock that was set, may call for a sample
        for action in self._reaction.hear(ready, now_ns):
            self._act(action)

    def _serve(self, client: Client) -> None:
        client.flush()
        for request in client.requests():
            answer = getattr(self, f"_answer_{request}", None)
            if answer is None:
                client.answer({"refused": f"the daemon does not know {request!r}; it is of another version"})
            else:
                answer(client)
        if client.done:
            self._server.drop(client)

    def _answer_status(self, client: Client) -> None:
        client.answer(self.status())

    def _answer_watch(self, client: Client) -> None:
        client.watching = True
        client.answer(self.status())

    def _answer_metrics(self, client: Client) -> None:
        client.answer(render(self.status()))

    def _answer_history(self, client: Client) -> None:
        client.answer(self._journal.records())

    def _answer_drill(self, client: Client) -> None:
        if client.user not in (0, os.geteuid()):
            client.answer({"refused": "no permission: a drill is for root or the daemon's own user"})
            return
        self._drill()
        client.answer(self.status())

    def _drill(self) -> None:
        self._log("notice", "drill: this moment is treated as a disruption")
        for action in self._policy.drill(time.monotonic_ns(), time.time_ns()):
            self._act(action)
        self._next_sample_ns = 0

    # ---- Signals -------------------------------------------------------------------------------------

    def _catch_signals(self) -> int:
        """Signals are noted and end the wait, by a byte in the pipe whose end this returns."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._wakeup = reader
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._signals.append(number))
        return reader

    def _ending(self) -> bool:
        while self._signals:
            number = self._signals.pop(0)
            try:
                os.read(self._wakeup, 64)
            except BlockingIOError:
                pass
            if number in (signal.SIGTERM, signal.SIGINT):
                self._log("info", f"ending on {signal.Signals(number).name}")
                return True
            if number == signal.SIGHUP:
                self._load_anew()
            else:
                self._drill()
        return False

    def _load_anew(self) -> None:
        """SIGHUP: the settings and the files, anew.  What is wrong with them leaves the old ones in force."""
        try:
            settings = self._reload()
            sinks = None
            if (settings.sock, settings.shm) != (self._settings.sock, self._settings.shm):
                sinks = _make_sinks(settings, self._log)
        except RefclockError as error:
            self._log("error", f"not reloaded: {error}")
            return
        fixed = [
            name
            for name in (
                "device",
                "status",
                "state_dir",
                "journal",
                "chronyd",
                "fallback",
                "on_disruption",
                "max_error",
                "exit_after",
            )
            if getattr(settings, name) != getattr(self._settings, name)
        ]
        if fixed:
            self._log("warning", f"changed, but in force only after a restart: {', '.join(fixed).replace('_', '-')}")
            for name in fixed:
                setattr(settings, name, getattr(self._settings, name))
        if sinks is not None:
            for sink in self._sinks:
                sink.close()
            self._sinks = sinks
        self._settings = self._reaction.settings = settings
        self._log.level = settings.log_level
        self._hooks.commands = settings.hook
        self._sample_log.reopen(settings.log_samples)
        self._metrics.reopen(settings.metrics)
        self._log("info", "settings and files are loaded anew")


def _make_sinks(settings: Settings, log: Log) -> list[Sink]:
    sinks: list[Sink] = [Sock(path, log) for path in settings.sock]
    return sinks + [Shm(unit, permissions, log) for unit, permissions in settings.shm]


def _describe(page: Page) -> str:
    what = "tells the time" if page.kind == "time" else "tells of disruptions only"
    return f"{page.path}: {'a device' if page.is_device else 'a plain file, so a simulation'} that {what}"


def _describe_disruption(record: Record) -> str:
    if record.kind == "drill":
        return f"drill {record.id}: the clock counts as disrupted"
    markers = f"marker {record.marker_before} -> {record.marker_after}"
    return f"disruption {record.id}: {markers}; the clock is not to be trusted"


def _describe_state(policy: Policy) -> str:
    text = policy.state + (f": {policy.reason}" if policy.reason else "")
    if policy.offset_ns is not None:
        text += f" (offset {policy.offset_ns / 1e3:+.3f} us"
        text += f", bound {policy.maxerror_ns / 1e3:.3f} us)" if policy.maxerror_ns is not None else ")"
    return text
