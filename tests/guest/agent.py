"""The agent: does in the guest what guest.py asks for over a virtio-serial port.

A message is a JSON object, with its length before it in four bytes (little-endian), and after it, where it has
the key `size`, so many bytes of content. The agent greets with one message, then answers each request with one:
`{"ok": …}` with the result, or `{"error": "what went wrong"}`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import counter

PORT = "/dev/vport0p1"


class Channel:
    def __init__(self, path: str) -> None:
        self._port = os.open(path, os.O_RDWR)

    def send(self, message: dict, content: bytes | memoryview = b"") -> None:
        if content:
            message["size"] = len(content)
        encoded = json.dumps(message).encode()
        self._write(len(encoded).to_bytes(4, "little") + encoded)
        self._write(content)

    def receive(self) -> tuple[dict, bytes]:
        message = json.loads(self._read(int.from_bytes(self._read(4), "little")))
        return message, self._read(message.get("size", 0))

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._port, rest[: 1 << 15]) :]

    def _read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            part = os.read(self._port, min(size - len(content), 1 << 16))
            if not part:
                time.sleep(0.005)  # nobody on the host's side: the machine is being restored
            content += part
        return bytes(content)


def run(request: dict, content: bytes) -> tuple[dict, bytes]:
    """A command to its end: exit code and standard error in the message, standard output as content."""
    environment = {**os.environ, **request["environment"]}
    try:
        done = subprocess.run(
            request["command"],
            input=content,
            capture_output=True,
            timeout=request["timeout_s"],
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stderr or b"").decode(errors="replace")
        return {"exit_code": None, "stderr": said}, expired.stdout or b""
    return {"exit_code": done.returncode, "stderr": done.stderr.decode(errors="replace")}, done.stdout


_background: dict[int, subprocess.Popen] = {}


def start(request: dict, _content: bytes) -> tuple[dict, bytes]:
    """A command in the background, all its output in one file."""
    with open(request["output"], "wb") as output:
        process = subprocess.Popen(
            request["command"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **request["environment"]},
            start_new_session=True,
        )
    _background[process.pid] = process
    return {"pid": process.pid}, b""


def wait(request: dict, _content: bytes) -> tuple[dict, bytes]:
    """The end of a background command: its exit code, or null if it still runs after `timeout_s`."""
    try:
        return {"exit_code": _background[request["pid"]].wait(request["timeout_s"])}, b""
    except subprocess.TimeoutExpired:
        return {"exit_code": None}, b""


def kill(request: dict, _content: bytes) -> tuple[dict, bytes]:
    _background[request["pid"]].send_signal(getattr(signal, request["signal"]))
    return {}, b""


def read(request: dict, _content: bytes) -> tuple[dict, bytes]:
    """A file, or `length` bytes of it from `offset` on."""
    with open(request["path"], "rb") as file:
        file.seek(request["offset"])
        return {}, file.read(request["length"])


def write(request: dict, content: bytes) -> tuple[dict, bytes]:
    os.makedirs(os.path.dirname(request["path"]), exist_ok=True)
    with open(request["path"], "wb") as file:
        file.write(content)
    os.chmod(request["path"], request["mode"])
    return {}, b""


def ask(request: dict, _content: bytes) -> tuple[dict, bytes]:
    """One line to a program's Unix socket, and the line that it answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(request["timeout_s"])
        connection.connect(request["path"])
        connection.sendall(request["line"].encode() + b"\n")
        with connection.makefile("rb") as answers:
            return {}, answers.readline()


def clock(_request: dict, _content: bytes) -> tuple[dict, bytes]:
    """The guest's counter and CLOCK_REALTIME at the same moment."""
    value, system_ns = counter.pair(1)
    return {"counter": value, "system_ns": system_ns}, b""


VERBS = {verb.__name__: verb for verb in (run, start, wait, kill, read, write, ask, clock)}


def main() -> None:
    channel = Channel(PORT)
    channel.send({"ok": {"python": sys.version}})
    while True:
        request, content = channel.receive()
        try:
            result, content = VERBS[request["verb"]](request, content)
            channel.send({"ok": result}, content)
        except Exception as error:
            channel.send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
