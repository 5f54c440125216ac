"""The status socket: how other programs, the commands among them, talk to the running daemon.

A Unix stream socket.  The client sends one line: a word.  The daemon answers with one line of JSON, or, to
``watch``, with one at once and one more at every change of state.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from errno import EADDRINUSE, ECONNREFUSED, ENOENT

from .errors import NotPermitted, RefclockError, Unavailable, UsageError, from_os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LONGEST_REQUEST = 256
MOST_CLIENTS = 32
MOST_UNSENT = 1 << 20


class Client:
    """One connection to the daemon; ``watching`` once it asked to hear of every change."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._unsent = b""
        self.watching = False
        self.closing = False
        #: The peer's user, who may do more than look when it is root or the daemon's own.
        self.user = _user_of(connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def events(self) -> int:
        """What to poll() for.  An end that was seen is not looked for again: it would be there every time."""
        import select

        return (0 if self.closing else select.POLLIN) | (select.POLLOUT if self._unsent else 0)

    def requests(self) -> list[str]:
        """The lines that have arrived.  An end of the connection sets ``closing``."""
        try:
            received = self._connection.recv(LONGEST_REQUEST)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        self._received += received
        *lines, self._received = self._received.split(b"\n")
        if not received or len(self._received) > LONGEST_REQUEST:
            self.closing = True
        return [line.decode(errors="replace").strip() for line in lines]

    def answer(self, value: object) -> None:
        """Sends a line of JSON, as far as it goes without waiting."""
        self._unsent += json.dumps(value, separators=(",", ":")).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what is left.  A client that does not read its answers is let go."""
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > MOST_UNSENT:
                self._give_up()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        self._unsent = b""
        self.closing = True

    @property
    def done(self) -> bool:
        return self.closing and not self._unsent

    def close(self) -> None:
        self._connection.close()


class Server:
    """The daemon's end.  Makes the socket, or raises: Unavailable when another daemon answers there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.clients: dict[int, Client] = {}
        directory = os.path.dirname(path)
        try:
            if directory:
                os.makedirs(directory, mode=0o755, exist_ok=True)
            self._listener = _listen(path)
            os.chmod(path, 0o666)  # anyone may look; what a client may do goes by its user
            self._inode = os.stat(path).st_ino
        except OSError as error:
            raise from_os(error, f"cannot make the status socket {path}", "name another with --status") from None

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> None:
        """Takes in one new connection."""
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if len(self.clients) >= MOST_CLIENTS:
            connection.close()
            return
        self.clients[connection.fileno()] = Client(connection)

    def drop(self, client: Client) -> None:
        """Ends one connection."""
        self.clients.pop(client.fileno(), None)
        client.close()

    def close(self) -> None:
        """Ends all connections and removes the socket, unless another daemon has put its own there."""
        for client in list(self.clients.values()):
            self.drop(client)
        self._listener.close()
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except OSError:
            pass


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != EADDRINUSE or not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise
            if _answers(path):
                raise Unavailable(
                    f"a daemon answers on {path} already; stop it, or name another with --status"
                ) from None
            os.unlink(path)
            listener.bind(path)
        listener.listen(MOST_CLIENTS)
    except BaseException:
        listener.close()
        raise
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno not in (ECONNREFUSED, ENOENT)
        return True


def _user_of(connection: socket.socket) -> int:
    from struct import unpack

    _, user, _ = unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def ask(path: str, request: str, timeout_s: float = 5.0) -> Any:
    """The daemon's answer to one request, decoded.  Raises Unavailable, NotPermitted, or what it refused."""
    return next(answers(path, request, timeout_s))


def answers(path: str, request: str, timeout_s: float | None) -> Iterator[Any]:
    """The daemon's answers to ``watch``, one after the other; ``timeout_s`` is for each (None: no limit).

    Raises TimeoutError when one does not come in time, Unavailable when the daemon is not there or ends.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
            connection.sendall(request.encode() + b"\n")
        except TimeoutError:
            raise
        except OSError as error:
            if error.errno is None:
                raise UsageError(f"{path}: {error}; name the daemon's socket with --status") from None
            cure = "is the daemon running? (`vmclock-refclock run`, or name its socket with --status)"
            raise from_os(
                error, f"no daemon on {path}", cure if error.errno in (ENOENT, ECONNREFUSED) else ""
            ) from None
        with connection.makefile("rb") as lines:
            try:
                for line in lines:
                    yield _understood(line, request, path)
            except ConnectionError:
                pass
    raise Unavailable(f"the daemon on {path} ended")


def _understood(line: bytes, request: str, path: str) -> Any:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and set(answer) == {"refused"}:
        kind = NotPermitted if "permission" in str(answer["refused"]) else RefclockError
        raise kind(str(answer["refused"]))
    expected = {"history": list, "metrics": str}.get(request, dict)
    if not isinstance(answer, expected) or (expected is dict and not {"state", "good"} <= answer.keys()):
        raise Unavailable(f"what answers on {path} is not this program's daemon; name its socket with --status")
    return answer
