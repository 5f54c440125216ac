"""chronyd's command protocol over its Unix socket: requests go out at once, answers are gathered later.

For a single-threaded loop that polls file descriptors: nothing here blocks, and nothing here raises because
of what chronyd does or does not do.  Every request ends as a :class:`Request` whose ``ok`` and ``detail`` say
what came of it.  All times are nanoseconds of one clock of the caller's choice; only their differences count.

**Who may.**  chronyd accepts every command over this socket; the permissions of the socket and of its
directory decide who can reach it: root, or the user that chronyd runs as.

**Where answers go.**  chronyd answers to the client's own socket.  That must have a name in the file system
where chronyd's user may write: an abstract or nameless socket is never answered (4.3, 4.6.1 and 4.9 tried).
The first choice is chronyd's own directory itself: the AppArmor profiles of Debian 12 and 13 let chronyd
write there, and not in directories below it.

**Applied once.**  chronyd does not recognise a repeated request: `dfreq` sent three times with one sequence
number is applied three times.  A datagram on a Unix socket is not lost on the way, so only what may be
applied twice is sent again.  Of the rest, one that was handed over and never answered ends with "not known
whether it was applied".

**Normal from new samples.**  chronyd works off the requests of one socket in their order, and `reset sources`
drops every sample, those in a refclock's filter and an NTP answer still on its way included.  A `tracking`
that was sent after `reset sources` was answered, and is :attr:`Tracking.normal`, thus rests on samples taken
after the reset.  The reference time is no help in this: chronyd blurs it by up to a second.

Packets: chrony's protocol version 6 (chrony 3.0 and later), big-endian; layouts as in the Go package
ntp/chrony of facebook/time, lengths tried on chronyd 4.3, 4.6.1 and 4.9.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from struct import Struct, pack

from .errors import ConfigError, NotPermitted, RefclockError, Unavailable, from_os

DEFAULT_PATH = "/run/chrony/chronyd.sock"
PROTOCOL = 6

_PATH_BYTES = 107  # sun_path, less its terminating zero
_QUERY, _ANSWER = 1, 2
_QUERY_HEAD = Struct(">BBHHHIQ")  # version, type, 0, command, attempt, sequence, 0
_ANSWER_HEAD = Struct(">BBHHHH6xIQ")  # version, type, 0, command, reply, status, sequence, 0
_ATTEMPT_AND_SEQUENCE = Struct(">HI")  # at byte 6 of a request
_TRACKING = Struct(">I20xHHIII9I")
_TRACKING_BYTES = _ANSWER_HEAD.size + _TRACKING.size
_REPLY_NONE, _REPLY_TRACKING = 1, 5

# What chronyd's status says, by number.
_STATUS = (
    "success",
    "failed",
    "not authorised",
    "invalid, or not known to this version of chronyd",
    "no such source",
    "invalid time stamp",
    "not enabled",
    "bad subnet",
    "access allowed",
    "access denied",
    "no host access",
    "source already known",
    "too many sources",
    "no real-time clock",
    "bad real-time clock file",
    "inactive",
    "bad sample",
    "invalid address family",
    "bad protocol version",
    "bad request length",
)

# Where the own socket may lie when chronyd's directory cannot be written to.
_RUNTIME_DIRECTORY = "/run/vmclock-refclock"
_OWN_PREFIX = "vmclock-refclock."

# The errors by which a connected socket tells that the chronyd it was connected to is gone.
_GONE = (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE)
# Answers that are read in one go, so that no sender can hold up the loop.
_READS = 64
# Requests given up whose late answer would still be recognised.
_REMEMBERED = 16


# ---- Numbers ---------------------------------------------------------------------------------------------


def encode_float(value: float) -> int:
    """The nearest of chrony's 32-bit floats, as an unsigned integer; the outermost where that is too small.

    The upper 7 bits are a signed exponent, the lower 25 a signed coefficient; the value is coefficient times
    2^(exponent - 25).  Raises ValueError for a NaN and OverflowError for an infinity.
    """
    numerator, denominator = value.as_integer_ratio()
    # The denominator is a power of two, so that 2^(magnitude - 1) <= |value| < 2^magnitude.
    magnitude = numerator.bit_length() - denominator.bit_length() + 1
    exponent = max(magnitude + 1, -64)
    coefficient = round(value * 2.0 ** (25 - exponent))
    if coefficient == 0:
        return 0
    if coefficient == 1 << 24:
        coefficient, exponent = 1 << 23, exponent + 1
    if exponent > 63:
        coefficient, exponent = (1 << 24) - 1 if value > 0 else -1 << 24, 63
    return (exponent & 0x7F) << 25 | coefficient & 0x1FFFFFF


def decode_float(word: int) -> float:
    """The value of chrony's 32-bit float, exact."""
    exponent, coefficient = word >> 25, word & 0x1FFFFFF
    if exponent >= 1 << 6:
        exponent -= 1 << 7
    if coefficient >= 1 << 24:
        coefficient -= 1 << 25
    return coefficient * 2.0 ** (exponent - 25)


# ---- Commands --------------------------------------------------------------------------------------------


class Command:
    """A command with its arguments, ready to be sent.  ``text`` is what one would type into chronyc.

    ``length`` is that of the longest answer: chronyd refuses a shorter request, or drops it without a word.
    """

    __slots__ = ("code", "packet", "repeatable", "reply", "text")

    def __init__(
        self,
        text: str,
        code: int,
        arguments: bytes = b"",
        *,
        length: int = _ANSWER_HEAD.size,
        reply: int = _REPLY_NONE,
        repeatable: bool = False,
    ) -> None:
        self.text = text
        self.code = code
        self.packet = (_QUERY_HEAD.pack(PROTOCOL, _QUERY, 0, code, 0, 0, 0) + arguments).ljust(length, b"\0")
        self.reply = reply
        self.repeatable = repeatable

    def __repr__(self) -> str:
        return f"<Command {self.text}>"


#: Drop all samples of all sources, cancel a slew, be unsynchronised (leap 3 to NTP clients).  From chronyd
#: 4.0 on.  With the directive `local`, NTP clients are told leap 0 all the same.
RESET_SOURCES = Command("reset sources", 66, repeatable=True)

#: Ask for a :class:`Tracking`.
TRACKING = Command("tracking", 33, length=_TRACKING_BYTES, reply=_REPLY_TRACKING, repeatable=True)

#: Step by what is left of the present correction.  Fails without one, and under `chronyd -x`.
MAKESTEP = Command("makestep", 43)


def dfreq(ppm: float) -> Command:
    """Change the clock's frequency at once.

    ``ppm`` is how much faster the system clock runs than chronyd believes: minus the slope of reference -
    system.  Raises ValueError or OverflowError for what is no finite number.
    """
    return Command(f"dfreq {ppm:.6f}", 31, pack(">I", encode_float(ppm)))


def modify_makestep(limit: int, threshold_s: float) -> Command:
    """Let chronyd step, not slew, a correction above ``threshold_s`` in its next ``limit`` clock updates."""
    return Command(f"makestep {threshold_s:g} {limit}", 50, pack(">iI", limit, encode_float(threshold_s)))


def burst(good: int, total: int) -> Command:
    """Measure all NTP sources quickly: up to ``total`` requests each, until ``good`` samples have come.

    "no such source" is the answer where chronyd has no NTP source.
    """
    # The zeros are mask and address, both of unspecified family: every source.
    return Command(f"burst {good}/{total}", 3, pack(">40xii", good, total))


# ---- What comes back -------------------------------------------------------------------------------------


class Tracking:
    """chronyd's view of the system clock, in this project's signs: offset = reference - system.

    ``correction_ns`` is what is still to be slewed, positive where the system clock is behind;
    ``last_offset_ns`` is what the last update found; ``frequency_ppm`` is positive where the uncorrected
    system clock runs slow, ``residual_ppm`` what the source would add to it.  ``reference_time_ns`` (UTC) is
    blurred: up to a second too early.
    """

    __slots__ = (
        "correction_ns",
        "frequency_ppm",
        "last_offset_ns",
        "leap",
        "reference_id",
        "reference_time_ns",
        "residual_ppm",
        "rms_offset_ns",
        "root_delay_ns",
        "root_dispersion_ns",
        "skew_ppm",
        "stratum",
        "update_interval_ns",
    )

    #: The reference id of a chronyd that serves its own clock by the directive `local` (127.127.1.1).
    LOCAL = 0x7F7F0101
    #: The leap status of a chronyd that is not synchronised.
    NOT_SYNCHRONISED = 3

    def __init__(self, data: bytes) -> None:
        """From a whole answer to `tracking`; raises struct.error where it is too short."""
        fields: tuple[int, ...] = _TRACKING.unpack_from(data, _ANSWER_HEAD.size)
        self.reference_id, self.stratum, self.leap, high, low, nanoseconds, *words = fields
        # The largest positive number stands for a chronyd whose time has 32 bits.
        seconds = low if high == 0x7FFFFFFF else high << 32 | low
        self.reference_time_ns = seconds * 1_000_000_000 + nanoseconds
        numbers = [decode_float(word) for word in words]
        # chronyd itself gives what is left to correct in our sign, all else the other way round.
        self.correction_ns = round(numbers[0] * 1e9)
        self.last_offset_ns = round(-numbers[1] * 1e9)
        self.rms_offset_ns = round(numbers[2] * 1e9)
        self.frequency_ppm = -numbers[3]
        self.residual_ppm = -numbers[4]
        self.skew_ppm = numbers[5]
        self.root_delay_ns = round(numbers[6] * 1e9)
        self.root_dispersion_ns = round(numbers[7] * 1e9)
        self.update_interval_ns = round(numbers[8] * 1e9)

    @property
    def normal(self) -> bool:
        """Whether chronyd follows a source; its own clock, by the directive `local`, is none."""
        return self.leap < self.NOT_SYNCHRONISED and self.reference_id != self.LOCAL

    def fields(self) -> dict[str, int | float]:
        """The same by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class Request:
    """A command on its way, and what came of it.

    ``ok`` is None until that is known, then whether chronyd did it; ``detail`` says in words why not, or what
    is in the way so far.  ``sent_ns`` is the first try, ``finished_ns`` the end.  ``tracking`` is there after
    a successful `tracking`.  ``late``: answered after it had been given up, and so reported a second time.
    """

    __slots__ = (
        "attempt",
        "command",
        "deadline_ns",
        "delivered",
        "detail",
        "finished_ns",
        "late",
        "ok",
        "sent_ns",
        "sequence",
        "tracking",
    )

    def __init__(self, command: Command, sequence: int, now_ns: int, timeout_ns: int) -> None:
        self.command = command
        self.sequence = sequence
        self.attempt = 1
        self.sent_ns = now_ns
        self.deadline_ns = now_ns + timeout_ns
        self.finished_ns: int | None = None
        self.delivered = False
        self.ok: bool | None = None
        self.detail = ""
        self.late = False
        self.tracking: Tracking | None = None

    def __repr__(self) -> str:
        state = "pending" if self.ok is None else "ok" if self.ok else "failed"
        return f"<Request {self.command.text}: {state}{', ' + self.detail if self.detail else ''}>"


# ---- The connection --------------------------------------------------------------------------------------


class Chronyd:
    """The client.  It connects when it has something to send, and stays connected.

    Each request is reported once, by :meth:`receive` or :meth:`tick`, and once more should its answer come
    late.  Keep at most one `tracking` under way: a chronyd that does not read may have room for no more than ten.

    ``error`` says in words why chronyd could not be talked to the last time, and is empty when it could.
    ``connections`` counts: another one is another chronyd, or may be.
    """

    def __init__(self, path: str = DEFAULT_PATH, *, timeout_ns: int = 250_000_000, attempts: int = 4) -> None:
        """The first attempt is given ``timeout_ns``, each one after it twice as long as the one before."""
        self.path = os.path.abspath(path)  # chronyd must find the own socket, whatever its working directory
        self.error = "not asked yet"
        self.connections = 0
        self._timeout_ns = timeout_ns
        self._attempts = attempts
        self._socket: socket.socket | None = None
        self._own = ""
        self._names: tuple[object, object] = (None, None)  # the files of chronyd's socket and our own
        self._sequence = int.from_bytes(os.urandom(4), "big")
        self._pending: dict[int, Request] = {}
        self._given_up: dict[int, Request] = {}
        self._finished: list[Request] = []

    def fileno(self) -> int:
        """What to poll for input, or -1 while not connected.  It changes: ask again after every call."""
        return -1 if self._socket is None else self._socket.fileno()

    def send(self, command: Command, now_ns: int) -> Request:
        """Hand a command to chronyd without waiting for the answer: one system call when connected.

        Never raises.  What cannot be handed over now is tried again by :meth:`tick` if the command is
        repeatable and chronyd may yet come; else it has failed (``ok`` is False on return), and is reported
        by the next :meth:`receive` or :meth:`tick`.
        """
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        request = Request(command, self._sequence, now_ns, self._timeout_ns)
        self._pending[request.sequence] = request
        self._transmit(request, now_ns)
        return request

    def receive(self, now_ns: int) -> list[Request]:
        """Take in the answers that have come; the requests that are finished."""
        for _ in range(_READS):
            if self._socket is None:
                break
            try:
                answer = self._socket.recv(2048)
            except BlockingIOError:
                break
            except OSError as error:
                self._disconnect(now_ns, str(error))
                break
            self._accept(answer, now_ns)
        return self._collect()

    def tick(self, now_ns: int) -> list[Request]:
        """Send again, or give up, what is overdue; the requests that are finished."""
        for sequence in list(self._pending):
            request = self._pending.get(sequence)  # one that finds the connection lost ends others
            if request is None or request.deadline_ns > now_ns:
                continue
            if request.attempt >= self._attempts:
                self._give_up(request, now_ns)
                continue
            if self._socket is not None and self._names != (_identity(self.path), _identity(self._own)):
                self._disconnect(now_ns, "its socket, or ours, was removed")
            request.attempt += 1
            if request.command.repeatable:
                self._transmit(request, now_ns)
            request.deadline_ns = now_ns + (self._timeout_ns << (request.attempt - 1))
        return self._collect()

    def hurry(self, now_ns: int) -> None:
        """Try again, at once, to hand over what could not be: there may be a chronyd now."""
        for request in list(self._pending.values()):
            if not request.delivered:
                self._transmit(request, now_ns)

    def next_deadline_ns(self) -> int | None:
        """When :meth:`tick` is wanted next (at once, where something is to be reported), or None."""
        if self._finished:
            return self._finished[0].finished_ns
        return min((request.deadline_ns for request in self._pending.values()), default=None)

    def close(self) -> None:
        """Disconnect and remove the own socket.  What is under way is forgotten."""
        for requests in (self._pending, self._given_up, self._finished):
            requests.clear()
        self._drop_socket()

    # -- Requests

    def _transmit(self, request: Request, now_ns: int) -> None:
        packet = bytearray(request.command.packet)
        _ATTEMPT_AND_SEQUENCE.pack_into(packet, 6, request.attempt, request.sequence)
        try:
            if self._socket is None or not self._put(self._socket, packet):
                self._disconnect(now_ns, "it has gone")
                if not self._put(self._connect(), packet):
                    raise Unavailable(f"chronyd is gone from {self.path}; start it")
        except (OSError, RefclockError) as error:
            request.detail = self.error = str(error)
            if not (request.command.repeatable and isinstance(error, Unavailable)):
                self._finish(request, False, now_ns)
        else:
            request.delivered = True
            request.detail = ""

    def _put(self, connection: socket.socket, packet: bytearray) -> bool:
        """Whether the other side was still there to take the packet."""
        try:
            connection.send(packet)
        except BlockingIOError as error:
            raise Unavailable(f"chronyd does not read {self.path}; is it stopped?", error.errno) from None
        except OSError as error:
            if error.errno in _GONE:
                return False
            cure = "see the kernel's log for what forbids it"
            raise from_os(error, f"cannot write to chronyd's socket {self.path}", cure) from None
        return True

    def _accept(self, answer: bytes, now_ns: int) -> None:
        if len(answer) < _ANSWER_HEAD.size:
            self.error = f"chronyd sent a malformed answer of {len(answer)} bytes"
            return
        version, kind, _, code, reply, status, sequence, _ = _ANSWER_HEAD.unpack_from(answer)
        request = self._pending.get(sequence) or self._given_up.pop(sequence, None)
        if request is None:
            return  # the answer to one attempt of several
        tracking = reply == _REPLY_TRACKING
        request.detail = self.error = ""
        if version != PROTOCOL:
            self.error = f"chronyd speaks protocol version {version}, this program {PROTOCOL}"
        elif (
            (kind, code) != (_ANSWER, request.command.code)
            or (status == 0 and reply != request.command.reply)
            or (tracking and len(answer) < _TRACKING_BYTES)
        ):
            what = f"type {kind}, command {code}, reply {reply}, {len(answer)} bytes"
            self.error = f"chronyd sent a malformed answer to {request.command.text} ({what})"
        elif status != 0:
            request.detail = f"chronyd refused: {_STATUS[status] if status < len(_STATUS) else status}"
        elif tracking:
            request.tracking = Tracking(answer)
        request.detail = request.detail or self.error
        self._finish(request, not request.detail, now_ns)

    def _give_up(self, request: Request, now_ns: int) -> None:
        if not request.detail:
            waited = f"no answer in {(now_ns - request.sent_ns) / 1e9:.1f} s"
            cause = f"chronyd hangs, or may not write to {self._own}"
            request.detail = self.error = f"{waited}; {cause}{_doubt(request)}"
        self._finish(request, False, now_ns)
        self._given_up[request.sequence] = request
        if len(self._given_up) > _REMEMBERED:
            del self._given_up[next(iter(self._given_up))]

    def _finish(self, request: Request, ok: bool, now_ns: int) -> None:
        request.late = self._pending.pop(request.sequence, None) is None
        request.ok = ok
        request.finished_ns = now_ns
        self._finished.append(request)

    def _collect(self) -> list[Request]:
        finished, self._finished = self._finished, []
        return finished

    # -- The socket

    def _connect(self) -> socket.socket:
        """Connect to chronyd, and bind where its answer can come.  Raises RefclockError."""
        if len(os.fsencode(self.path)) > _PATH_BYTES:
            raise ConfigError(f"the path of chronyd's socket has more than {_PATH_BYTES} bytes: {self.path}")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            connection.setblocking(False)
            try:
                connection.connect(self.path)
            except OSError as error:
                raise self._refusal(error) from None
            self._own = _bind_near(connection, self.path)
        except BaseException:
            connection.close()
            raise
        self._names = (_identity(self.path), _identity(self._own))
        self._socket = connection
        self.connections += 1
        return connection

    def _refusal(self, error: OSError) -> RefclockError:
        cure = "start chronyd, or give --chronyd the path of its bindcmdaddress"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return Unavailable(f"chronyd's socket {self.path} is not there; {cure}", error.errno)
        if error.errno in (errno.EACCES, errno.EPERM):
            cure = "be root with CAP_DAC_OVERRIDE, or chronyd's user"
            return NotPermitted(f"may not write to chronyd's socket {self.path}; {cure}", error.errno)
        found = _look(self.path)
        if error.errno == errno.EPROTOTYPE or (found and not stat.S_ISSOCK(found.st_mode)):
            return ConfigError(f"{self.path} is not chronyd's socket; {cure}", error.errno)
        if error.errno == errno.ECONNREFUSED:
            return Unavailable(f"chronyd is gone from {self.path}; start it", error.errno)
        return from_os(error, f"cannot connect to chronyd's socket {self.path}", cure)

    def _disconnect(self, now_ns: int, why: str) -> None:
        """The chronyd that we were connected to will answer nothing more."""
        if self._socket is None:
            return
        for request in [request for request in self._pending.values() if request.delivered]:
            if request.command.repeatable:
                request.deadline_ns = now_ns
            else:
                request.detail = f"chronyd did not answer: {why}" + _doubt(request)
                self._finish(request, False, now_ns)
        self._drop_socket()

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            _unlink(self._own)


def _doubt(request: Request) -> str:
    return "" if request.command.repeatable else "; not known whether it was applied"


def _bind_near(connection: socket.socket, path: str) -> str:
    """Give a socket a name under which chronyd can answer, in the first directory that takes one."""
    temporary = os.path.abspath(os.environ.get("TMPDIR", "/tmp"))
    refusal = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in (os.path.dirname(path), _RUNTIME_DIRECTORY, temporary):
        own = os.path.join(directory, f"{_OWN_PREFIX}{os.urandom(4).hex()}.sock")
        _remove_stale(directory)
        # chronyd's user must be able to write to it. By the umask, since a chmod of a path in a directory
        # of somebody else's can be led astray. Nobody but chronyd can use it: it is connected to chronyd.
        umask = os.umask(0o111)
        try:
            connection.bind(own)
        except OSError as error:
            refusal = error
            continue
        finally:
            os.umask(umask)
        return own
    cure = f"allow this program to write to {os.path.dirname(path)}"
    raise from_os(refusal, "no directory for a socket that chronyd can answer to", cure)


def _remove_stale(directory: str) -> None:
    """Remove sockets that a program of ours left behind when it was killed: those that nobody holds."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        if not name.startswith(_OWN_PREFIX):
            continue
        path = os.path.join(directory, name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(path)
            except OSError as error:
                # A living one refuses too, but with EPERM: it is connected to another.
                found = _look(path)
                if error.errno == errno.ECONNREFUSED and found and stat.S_ISSOCK(found.st_mode):
                    _unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # gone with its directory, or not ours to remove


def _look(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _identity(path: str) -> tuple[int, int] | None:
    found = _look(path)
    return (found.st_dev, found.st_ino) if found else None
