"""The clerk writes to disks, in a thread of its own, which lives as long as there is something to write.

A disk may make its writers wait, above all after a restore, when everything is read anew.  Whoever works on the clock
hands over what is to be written, and goes on.
"""

from __future__ import annotations

import _thread
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Do = Callable[..., None]


class Clerk:
    """Does what it is given, one after the other.  For one thread that gives."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self._log = log
        self._has_news = False
        self._at_rest = _thread.allocate_lock()  # held while it works
        self._lock = _thread.allocate_lock()  # of what follows
        self._works = False
        self._tasks: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()

    def do(self, task: Callable[..., None], *arguments: object) -> None:
        """Calls ``task`` soon.  What it shares with the caller it may only set."""
        self._has_news = True
        with self._lock:
            self._tasks.append((task, arguments))
            if self._works:
                return
            self._works = True
            self._at_rest.acquire()
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # no thread may be started here: better late than never
            self._work()

    def settle(self, timeout_s: float) -> None:
        """Waits, if something was given since the last time, until it is done; but no longer than that."""
        if self._has_news:
            self._has_news = False
            self.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Waits until everything is done; whether it is.  A disk that never answers is not waited for for ever."""
        done = self._at_rest.acquire(timeout=timeout_s)
        if done:
            self._at_rest.release()
        return done

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._tasks:
                    self._works = False
                    self._at_rest.release()
                    return
                task, arguments = self._tasks.popleft()
            try:
                task(*arguments)
            except Exception as error:  # the next one is to be done all the same
                self._log("error", f"not written: {error!r}; please report this")


def at_once(task: Callable[..., None], *arguments: object) -> None:
    """In place of :meth:`Clerk.do` where nobody has to be spared the waiting."""
    task(*arguments)
