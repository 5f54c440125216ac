"""The daemon's status as metrics: in base units, under names that begin with ``vmclock_``.

The text is of the kind that every reader takes: Prometheus, node_exporter's textfile collector and promtool, as
well as readers of OpenMetrics.  Between the two formats it comes down to this (tried with promtool 2.42, 2.53, 3.5
and node_exporter 1.5, 1.9, 1.11):

- ``# EOF`` and ``# UNIT`` are OpenMetrics'; to the others they are comments.
- A counter's family is named with its ``_total``, as in Prometheus' format and in OpenMetrics 2.0.  OpenMetrics 1.0
  leaves the suffix out there, and then promtool and node_exporter take the samples for untyped ones without help.
- No types but ``counter`` and ``gauge``: ``info`` and ``stateset`` end a reader of Prometheus' format.
- No time stamps: node_exporter refuses the file.
"""

from __future__ import annotations

import os
import stat

from ._version import __version__
from .clerk import at_once
from .model import CLOCK_STATUSES, STATES, WITHHELD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .clerk import Do

    Samples = list[tuple[dict[str, str], float]]

NSEC_PER_SEC = 1_000_000_000

#: The longest time between two writings of the file, and the time from a change of state to a writing: the first
#: moments after a disruption are for the clock, and a state that goes to and fro costs no more than this often.
WRITE_NS = 5 * NSEC_PER_SEC
SETTLE_NS = NSEC_PER_SEC // 10


def render(status: dict[str, Any]) -> str:
    """The text for what :meth:`refclock.service.Service.status` gives.

    What is not known has no sample (no 0 in its place), but its HELP and TYPE are there all the same.
    """
    lines = []
    for name, kind, explanation, samples in _families(status):
        lines += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}"]
        if name.endswith("_seconds"):
            lines.append(f"# UNIT {name} seconds")
        lines += [f"{name}{_label_set(labels)} {value}" for labels, value in samples]
    return "\n".join([*lines, "# EOF", ""])


def _families(status: dict[str, Any]) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, type, help and samples of each metric."""
    sinks = _by_sink(status["sinks"])
    chronyd = status["chronyd"] or {}
    last = status["last_disruption"] or {}
    page = {name: "" if status[name] is None else str(status[name]) for name in ("disruption_marker", "generation")}

    yield "vmclock_build_info", "gauge", "The daemon's version.", [({"version": __version__}, 1)]
    yield "vmclock_uptime_seconds", "gauge", "How long the daemon has been running.", _seconds(status["uptime_ns"])
    yield (
        "vmclock_device_info",
        "gauge",
        "The page: where it is, whether it gives time or only a signal, its disruption marker and VM generation.",
        [({"device": status["device"], "kind": status["kind"] or "", **page}, 1)],
    )
    yield (
        "vmclock_page_status",
        "gauge",
        "What the hypervisor says of its own clock: 1 for the status that holds.",
        _one_of("status", status["clock_status"], CLOCK_STATUSES),
    )
    yield (
        "vmclock_state",
        "gauge",
        "The state of the system clock: 1 for the state that holds.",
        _one_of("state", status["state"], STATES),
    )
    yield "vmclock_good", "gauge", "Whether applications may rely on the system clock.", [({}, int(status["good"]))]
    yield (
        "vmclock_offset_seconds",
        "gauge",
        "Reference minus system clock: positive where the system clock is behind.",
        _seconds(status["offset_ns"]),
    )
    yield (
        "vmclock_error_bound_seconds",
        "gauge",
        "How far the offset may be wrong: the page's own maximum and estimate, and the pairing's half bracket.",
        [
            (labels | {"kind": kind}, value)
            for kind in ("maxerror", "esterror", "uncertainty")
            for labels, value in _seconds(status[f"{kind}_ns"])
        ],
    )
    yield (
        "vmclock_max_error_seconds",
        "gauge",
        "The widest error that counts as good (--max-error).",
        _seconds(status["max_error_ns"]),
    )
    yield (
        "vmclock_disruptions_total",
        "counter",
        "Disruptions seen since the daemon's start; of kind generation: the guest was copied, its clock is sound.",
        [({"kind": kind}, count) for kind, count in status["disruptions_by_kind"].items()],
    )
    yield (
        "vmclock_recovery_seconds",
        "gauge",
        "How long the clock was not good at the last disruption that is over.",
        _seconds(status["last_recovery_ns"]),
    )
    yield (
        "vmclock_last_disruption_timestamp_seconds",
        "gauge",
        "When the last disruption was seen, in UTC since 1970.",
        _seconds(last.get("detected_at_ns")),
    )
    yield (
        "vmclock_last_disruption_offset_seconds",
        "gauge",
        "How wrong the last disruption left the system clock: reference minus system clock.",
        _seconds(last.get("offset_ns")),
    )
    yield (
        "vmclock_disruption_announced",
        "gauge",
        "Whether the hypervisor announces a disruption: soon is within about a day, imminent within an hour.",
        [({"warning": word}, int(word == status["warning"])) for word in ("soon", "imminent")],
    )
    yield (
        "vmclock_sink_up",
        "gauge",
        "Whether the last sample arrived.",
        [({"sink": name}, int(sink["ok"])) for name, sink in sinks.items() if _tried(sink)],
    )
    yield (
        "vmclock_samples_total",
        "counter",
        "Samples that a sink took.",
        [({"sink": name}, sink["sent"]) for name, sink in sinks.items()],
    )
    yield (
        "vmclock_samples_dropped_total",
        "counter",
        "Samples that a sink did not take.",
        [({"sink": name}, sink["dropped"]) for name, sink in sinks.items()],
    )
    yield (
        "vmclock_withheld_total",
        "counter",
        "Looks at the page that brought no sample fit for the sinks.",
        [({"reason": cause}, status["withheld"].get(cause, 0)) for cause in _known_first(WITHHELD, status["withheld"])],
    )
    yield "vmclock_chronyd_up", "gauge", "Whether chronyd answers.", _flag(chronyd.get("ok"))
    yield (
        "vmclock_chronyd_synchronised",
        "gauge",
        "Whether chronyd follows a source, by samples since the last disruption.",
        _flag(chronyd.get("normal")),
    )


def _seconds(ns: int | None) -> Samples:
    return [] if ns is None else [({}, ns / NSEC_PER_SEC)]


def _flag(value: bool | None) -> Samples:
    return [] if value is None else [({}, int(value))]


def _one_of(label: str, value: str | None, words: tuple[str, ...]) -> Samples:
    """One series for each word, and one for a value that is none of them."""
    return [({label: word}, int(word == value)) for word in _known_first(words, [] if value is None else [value])]


def _known_first(words: tuple[str, ...], found: dict[str, int] | list[str]) -> list[str]:
    return [*words, *(word for word in found if word not in words)]


def _by_sink(sinks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sinks by their label: one that is configured twice must not become two series of the same labels."""
    return {f"{sink['type']}:{sink['name']}": sink for sink in sinks}


def _tried(sink: dict[str, Any]) -> bool:
    """Whether it is known how a sink does: not so where there has been nothing to send."""
    return sink["ok"] or sink["error"] is not None


def _label_set(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    # A path may hold bytes that are no text; one of them would cost all the metrics of the host.
    value = value.encode(errors="replace").decode()
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsFile:
    """The metrics in a file (None: nowhere), for node_exporter's textfile collector; its name must end in ``.prom``.

    Written after every change of state, and every few seconds so that its age tells of a daemon that hangs; put in the
    place of the old one, so that nobody reads half of it; removed at the end, so that nobody reads what is no longer
    so.  A disk that refuses is said once.
    """

    def __init__(self, path: str | None, log: Callable[[str, str], None], do: Do = at_once) -> None:
        self._path = path
        self._log = log
        self._do = do
        self._state = ""
        self._due_ns = 0
        self._is_busy = False
        self._written = False
        self._said: str | None = None

    def tick(self, now_ns: int, state: str, status: Callable[[], dict[str, Any]]) -> None:
        """Once each time round the loop; ``status`` is called only where there is something to write."""
        if self._path is None:
            return
        if state != self._state:
            self._state = state
            self._due_ns = min(self._due_ns, now_ns + SETTLE_NS)
        if now_ns < self._due_ns:
            return
        if self._is_busy:  # a disk that stalls
            self._due_ns = now_ns + SETTLE_NS
            return
        self._due_ns = now_ns + WRITE_NS
        self._is_busy = True
        self._do(self._write, self._path, render(status()).encode())

    def _write(self, path: str, text: bytes) -> None:
        error = None
        try:
            _replace(path, text)
            self._written = True
        except OSError as problem:
            error = problem.strerror or str(problem)
        self._is_busy = False
        if error != self._said:
            self._said = error
            what = f"not written: {error}; they are tried again" if error else "written again"
            self._log("warning" if error else "info", f"metrics {path}: {what}")

    def due_ns(self) -> int | None:
        """When :meth:`tick` is due, or None."""
        return None if self._path is None else self._due_ns

    def reopen(self, path: str | None) -> None:
        """Goes on in the file of that name, at once."""
        if path != self._path:
            self.close()
        self._path = path
        self._due_ns = 0
        self._said = None

    def close(self) -> None:
        """Removes the file."""
        if self._path is not None:
            self._do(self._remove, self._path)

    def _remove(self, path: str) -> None:
        if self._written:
            try:
                os.unlink(path)
            except OSError:
                pass
        self._written = False


def _replace(path: str, text: bytes) -> None:
    """Puts a file with this text, which everybody may read, in the place of ``path``."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(None, "there is something that is not a plain file")
    except FileNotFoundError:
        pass
    new = f"{path}.new"
    try:
        os.unlink(new)
    except FileNotFoundError:
        pass
    # Its directory may be open to others: what they put there in its place is not written to.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
        os.rename(new, path)
    except OSError:
        os.unlink(new)
        raise
