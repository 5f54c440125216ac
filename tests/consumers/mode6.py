"""ntpd's control protocol (NTP mode 6), which ntpq speaks: associations, variables, and configuration with a key."""

from __future__ import annotations

import hashlib
import re
import socket
import struct

READ_STATUS = 1
READ_VARIABLES = 2
CONFIGURE = 8

# leap, version and mode; response, error, more and operation; sequence, status, association, offset, count
_HEADER = struct.Struct(">BBHHHHH")
_VARIABLE = re.compile(r'(\w+)=("[^"]*"|[^,]*)')


class Mode6:
    """A client over a UDP socket that is in ntpd's network namespace. `key` is (identifier, SHA1 key)."""

    def __init__(self, sock: socket.socket, address: tuple[str, int], key: tuple[int, bytes] | None = None) -> None:
        self._sock = sock
        self._address = address
        self._key = key
        self._sequence = 0

    def associations(self) -> dict[int, int]:
        """The peers: association identifier -> peer status word."""
        data = self.request(READ_STATUS)
        return dict(struct.iter_unpack(">HH", data))

    def variables(self, association: int = 0) -> dict[str, str]:
        """The variables of a peer, or with 0 of the system, as text."""
        # NTPsec 1.2.2 spoils the lists of its clock filter with bytes of its stack.
        text = self.request(READ_VARIABLES, association).decode("ascii", "replace")
        return {name: value.strip().strip('"') for name, value in _VARIABLE.findall(text)}

    def configure(self, line: str) -> str:
        """Have a line of configuration carried out, as ``ntpq -c :config`` does; ntpd's comment on it."""
        data = line.encode() + b"\n"
        data += b" " * (-(_HEADER.size + len(data)) % 8)  # NTPsec 1.2.2 looks for the digest on a multiple of 8
        return self.request(CONFIGURE, data=data).rstrip(b"\0").decode().strip()

    def request(self, operation: int, association: int = 0, data: bytes = b"", timeout_s: float = 2.0) -> bytes:
        """The data of all fragments of an answer. Raises TimeoutError; RuntimeError when ntpd answers with an error."""
        self._sequence = self._sequence % 0xFFFF + 1
        packet = _HEADER.pack(2 << 3 | 6, operation, self._sequence, 0, association, 0, len(data)) + data
        packet += bytes(-len(packet) % 4)
        if operation == CONFIGURE and self._key is not None:
            identifier, key = self._key
            packet += struct.pack(">I", identifier) + hashlib.sha1(key + packet).digest()
        self._sock.settimeout(timeout_s)
        self._sock.sendto(packet, self._address)
        fragments: dict[int, bytes] = {}
        length = None
        while length is None or sum(map(len, fragments.values())) < length:
            answer = self._sock.recv(2048)
            if len(answer) < _HEADER.size:
                continue
            _first, flags, sequence, status, _association, offset, count = _HEADER.unpack_from(answer)
            if sequence != self._sequence or not flags & 0x80:
                continue
            if flags & 0x40:
                raise RuntimeError(f"ntpd refuses operation {operation}: error {status >> 8}")
            fragments[offset] = answer[_HEADER.size : _HEADER.size + count]
            if not flags & 0x20:
                length = offset + count
        return b"".join(fragments[offset] for offset in sorted(fragments))
