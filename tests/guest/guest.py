"""A real guest: booted, paused, saved, restored and migrated as a hypervisor does it, and measured.

    with Guest() as guest:
        guest.publish(guest.host_line())
        guest.load_driver()
        guest.sample_clock()
        guest.chronyd("refclock PHC /dev/ptp0 poll -2 tai")
        guest.wait_normal()
        event = guest.migrate(lost_s=0.1, frequency_ppm=20)
        print(guest.watch(event))

Everything in it runs as root and sets, steps and slews the guest's own clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.guest import acpi, build, counter, page, truth
from tests.guest.cpio import Archive
from tests.guest.machine import Machine, MachineError, empty_disk
from tests.guest.page import NANOSECONDS, Line, Page

MEMORY_MB = 384
BOOT_TIMEOUT_S = 60.0
AGENT_TIMEOUT_S = 30.0
RING = "/run/samples"
KERNEL_OPTIONS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on cryptomgr.notests 8250.nr_uarts=1"
)


class GuestError(Exception):
    """The guest's agent did not answer in time, or could not do what it was asked."""


class Done(NamedTuple):
    """A command that ended; `exit_code` is negative for a signal."""

    exit_code: int
    stdout: str
    stderr: str


class Event(NamedTuple):
    """A disruption: the page's sequence number from which on the line is the truth."""

    sequence: int
    line: Line


class Guest:
    """A virtual machine with a vmclock page, its own temporary directory, and its own clock to do with as one likes.

    `layers` are archives on top of the initramfs; `overlay` holds more files for it, by path in the guest: bytes, or
    a path on this machine. `tsc` is the kernel's option: with "" an in-process loadvm costs the guest its TSC. `audit`
    makes the kernel log what AppArmor denies. `notification` makes every restore raise the device's notification (set
    NOTIFICATION_PRESENT in the page before the driver is loaded). The logs in `directory` are kept after an error
    inside the with statement, or with `keep` set to true.
    """

    def __init__(
        self,
        *,
        layers: Sequence[Path] = (),
        overlay: Mapping[str, bytes | Path] | None = None,
        tsc: str = "reliable",
        audit: bool = False,
        notification: bool = False,
        cpus: int = 1,
        memory_mb: int = MEMORY_MB,
    ) -> None:
        image = build.image()
        self.truth = truth.Truth()
        self.keep = False
        self.directory = Path(tempfile.mkdtemp(prefix="vmclock-guest-"))
        self._image = image
        self._saved_at: dict[str, int] = {}
        self._stopped_at: int | None = None
        self._machine: Machine | None = None
        self._samples: list[truth.Sample] = []
        self._samples_read = 0
        try:
            self._pack([image.initramfs, *layers], overlay or {}, notification)
            (self.directory / "state.qcow2").write_bytes(empty_disk())
            self._arguments = [
                *("-machine", "q35,accel=tcg", "-cpu", "max", "-smp", str(cpus), "-m", str(memory_mb)),
                *("-kernel", str(image.kernel), "-initrd", str(self.directory / "initramfs")),
                *("-append", f"{KERNEL_OPTIONS} audit={audit:d} {f'tsc={tsc}' if tsc else ''}"),
                *("-device", "vmclock"),
                *(("-device", "vmgenid,guid=auto") if notification else ()),
                *("-drive", f"if=none,id=state,format=qcow2,cache=unsafe,file={self.directory}/state.qcow2"),
            ]
            self._machine = Machine(image.qemu, self._arguments, self.directory)
            self._answer(BOOT_TIMEOUT_S)
        except BaseException:
            self.keep = True
            self.close()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.keep = self.keep or kind is not None
        self.close()

    def close(self) -> None:
        """Ends QEMU; removes the directory, or with `keep` names it on standard error."""
        if self._machine:
            self._machine.kill()
        for bulky in ("initramfs", "state.qcow2"):
            (self.directory / bulky).unlink(missing_ok=True)
        if self.keep:
            print(f"the guest's logs: {self.directory}", file=sys.stderr)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    # Commands and files

    def run(
        self,
        *command: str,
        timeout_s: float = AGENT_TIMEOUT_S,
        check: bool = True,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """A command to its end. With `check`, an exit code other than 0 is an error that quotes what it said."""
        result, content = self._ask(
            timeout_s + AGENT_TIMEOUT_S,
            stdin,
            verb="run",
            command=command,
            timeout_s=timeout_s,
            environment=dict(environment or {}),
        )
        done = Done(result["exit_code"], content.decode(errors="replace"), result["stderr"])
        if done.exit_code is None or (check and done.exit_code != 0):
            end = f"no end within {timeout_s} s" if done.exit_code is None else f"exit code {done.exit_code}"
            raise GuestError(f"{' '.join(command)}: {end}: {(done.stdout + done.stderr)[-500:]}")
        return done

    def shell(self, script: str, **options: object) -> str:
        """A script for busybox's shell; its standard output."""
        return self.run("sh", "-ec", script, **options).stdout

    def python(self, program: str, *arguments: str, **options: object) -> str:
        """A program for the guest's Python; its standard output."""
        return self.run("python3", "-c", program, *arguments, **options).stdout

    def start(self, *command: str, environment: Mapping[str, str] | None = None, output: str = "") -> Background:
        """A command in the background; its output goes to the guest's file `output`."""
        output = output or f"/tmp/output-{time.monotonic_ns()}"
        environment = dict(environment or {})
        result, _ = self._ask(verb="start", command=command, output=output, environment=environment)
        return Background(self, result["pid"], output)

    def ask(self, path: str, line: str, timeout_s: float = 10.0) -> bytes:
        """The line that a program answers on its Unix socket. GuestError while there is none."""
        return self._ask(timeout_s + AGENT_TIMEOUT_S, verb="ask", path=path, line=line, timeout_s=timeout_s)[1]

    def read(self, path: str, offset: int = 0, length: int = -1) -> bytes:
        return self._ask(verb="read", path=path, offset=offset, length=length)[1]

    def write(self, path: str, content: bytes | str | Path, mode: int = 0o644) -> None:
        """A file in the guest, from bytes, from text, or from a file on this machine."""
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, str):
            content = content.encode()
        self._ask(AGENT_TIMEOUT_S, content, verb="write", path=path, mode=mode)

    def install_wheel(self, wheel: Path) -> None:
        """Installs a wheel that was built by this machine's Python, with its commands in /usr/local/bin."""
        self.write(f"/tmp/{wheel.name}", wheel)
        self.run("python3", "/agent/install_wheel.py", f"/tmp/{wheel.name}")

    def load_driver(self) -> None:
        """The vmclock driver. /dev/ptp0 appears only where the page gives time already."""
        self.run("insmod", build.MODULE)

    def chronyd(self, *configuration: str) -> Background:
        """A chronyd that disciplines the guest's clock, by these lines and those that every test needs."""
        self.configure_chronyd(*configuration)
        return self.start("chronyd", "-d", "-u", "root", output="/run/chronyd.log")

    def configure_chronyd(self, *configuration: str) -> None:
        lines = [
            *configuration,
            "leapseclist /etc/chrony/leap-seconds.list",
            "driftfile /var/lib/chrony/drift",
            *("allow 127.0.0.1", "bindaddress 127.0.0.1", "cmdport 0"),
        ]
        self.write("/etc/chrony/chrony.conf", "\n".join(lines) + "\n")

    def wait_normal(self, timeout_s: float = 60.0) -> None:
        """Until chronyd is synchronised."""
        tries, every = str(round(timeout_s / 0.1)), "0.1"
        self.run("chronyc", "waitsync", tries, "0", "0", every, timeout_s=timeout_s + 10)

    # The page

    def page(self) -> Page:
        return page.read(self._machine)

    def publish(self, line: Line | None = None, **fields: int) -> Event:
        """Publishes a page with a new sequence number, telling `line`, which is the truth from then on.

        Without a line the truth stays as it was (at first: this machine's clock). `fields` come last, and what nobody
        names stays as it is in the page.
        """
        new = self.page()
        if line:
            new = new.telling(line)
        else:
            line = self.truth.last if self.truth.lines else self.host_line()
        sequence = page.write(self._machine, dataclasses.replace(new, **fields))
        self.truth.declare(sequence, line)
        return Event(sequence, line)

    def declare(self, line: Line) -> Event:
        """Makes a line the truth for the page as it is now, without telling the guest."""
        sequence = self.page().seq_count
        self.truth.declare(sequence, line)
        return Event(sequence, line)

    def host_line(self) -> Line:
        """This machine's CLOCK_REALTIME as a line in the guest's counter, right to about a millisecond."""
        host_counter, utc_ns = counter.pair()
        guest_counter = self._stopped_at
        if guest_counter is None:
            guest_counter = host_counter + self._measure_offset()
        return Line.through(guest_counter, utc_ns, counter.frequency_hz())

    # Pauses, migrations, restores

    def stop(self) -> None:
        """Pauses the guest; its counter stands still, up to about a millisecond after the value that is noted here."""
        stopped_at = self._measure_offset() + counter.read()
        self._machine.command("stop")
        self._stopped_at = stopped_at

    def cont(self) -> None:
        self._stopped_at = None
        self._machine.command("cont")

    def migrate(self, lost_s: float = 0.0, frequency_ppm: float = 0.0, publish: bool = True, **fields: int) -> Event:
        """A live migration, as the guest sees it: stop, publish a new marker and a new line, go on (see `resume`)."""
        self.stop()
        fields.setdefault("disruption_marker", self.page().disruption_marker + 1)
        return self.resume(lost_s=lost_s, frequency_ppm=frequency_ppm, publish=publish, **fields)

    def save(self, name: str = "saved") -> None:
        """Saves the machine's state (savevm) and leaves the guest paused."""
        self.stop()
        self._machine.change_state(f"savevm {name}")
        self._saved_at[name] = self._stopped_at

    def restore(self, name: str = "saved", **resumption: Any) -> Event:
        """Restores a saved state in a new QEMU process, and lets the guest go on; `resumption` as in `resume`.

        The guest's counter goes on where it stood, so its clock falls behind by the time that it was stored.
        """
        self._machine.end()
        self._machine = Machine(self._image.qemu, [*self._arguments, "-S", "-loadvm", name], self.directory)
        self._stopped_at = self._saved_at[name]
        self._forget_samples()
        return self.resume(**resumption)

    def rewind(self, name: str = "saved", **resumption: Any) -> Event:
        """Restores a saved state in the same process (loadvm); `resumption` as in `resume`.

        The guest forgets what it did since, but its counter is not set back, so its clock is not behind.
        """
        if self._stopped_at is None:
            self.stop()
        self._machine.change_state(f"loadvm {name}")
        self._forget_samples()
        return self.resume(**resumption)

    def resume(
        self, *, lost_s: float | None = None, frequency_ppm: float = 0.0, publish: bool = True, **fields: int
    ) -> Event:
        """Lets a paused guest go on, on a new line: `lost_s` ahead of the old one and gaining `frequency_ppm` on it.

        By default true time has gone on by what this machine's clock says. With `publish`, the new host publishes
        the line before the guest's first instruction; without, the page's time is that of the old line. `fields` go
        into the page in both cases.
        """
        if self._stopped_at is None:
            raise GuestError("the guest is not paused")
        if lost_s is None:
            lost_s = (time.time_ns() - self.truth.last.ns(self._stopped_at)) / NANOSECONDS
        line = self.truth.last.moved(self._stopped_at, lost_s, frequency_ppm)
        if publish:
            event = self.publish(line, **fields)
        else:
            if fields:
                self.publish(**fields)
            event = self.declare(line)
        self.cont()
        return event

    # Measuring

    def sample_clock(
        self, interval_us: int = 1000, ntp_every: int = 5, capacity: int = 400_000, use_phc: bool = True
    ) -> None:
        """Starts the sampler: a look at the clock every `interval_us`, at chronyd every `ntp_every` looks.

        The last `capacity` samples are kept (72 bytes each). `use_phc` reads the PTP clock too, once it is there:
        exact to 1 ns, but it blocks for 100 ms where the page's sequence number stays odd.
        """
        self._forget_samples()
        command = ("sampler", RING, str(capacity), str(interval_us), str(ntp_every), str(int(use_phc)))
        self.write(RING, b"")
        self._sampler = self.start(*command)
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while not self._sampler_count()[1]:
            if time.monotonic() > deadline or not self._sampler.running():
                raise GuestError(f"the sampler does not sample: {self._sampler.said()}")

    def samples(self) -> list[truth.Sample]:
        """What the sampler has seen since its start, judged by the truth. After a restore: what the guest remembers.

        Asked often enough, it goes back further than the ring.
        """
        size = truth.RECORD.size
        capacity, count = self._sampler_count()
        index = max(self._samples_read, count - capacity * 15 // 16)  # the rest may be overwritten meanwhile
        while index < count:
            slot = index % capacity
            number = min(count - index, capacity - slot)
            records = self.read(RING, truth.HEADER.size + slot * size, number * size)
            self._samples += self.truth.samples(records)
            index += number
        self._samples_read = count
        return self._samples

    def reaction(self, event: Event) -> truth.Reaction:
        """The figures of a disruption, until now (or until the next)."""
        return truth.react(self.samples(), event.sequence, event.line)

    def watch(self, event: Event, quiet_s: float = 5.0, timeout_s: float = 60.0) -> truth.Reaction:
        """The figures of a disruption once the clock was right to 10 µs, and chronyd synchronised, for `quiet_s`.

        After `timeout_s` they are returned as they are: what is not reached yet is None.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            time.sleep(min(0.5, quiet_s))
            late = time.monotonic() > deadline
            try:
                found = self.reaction(event)
            except ValueError:
                if late:
                    raise
                continue  # the guest has not come round yet
            reached = (found.over_10us_until_s, found.normal_for_good_s)
            if late or (None not in reached and found.watched_s >= max(reached) + quiet_s):
                return found

    def _sampler_count(self) -> tuple[int, int]:
        """The ring's capacity, and how many records were written so far; zeros before the sampler is up."""
        header = self.read(RING, 0, truth.HEADER.size)
        return truth.HEADER.unpack(header)[1:] if header else (0, 0)

    def _forget_samples(self) -> None:
        """The ring is new, or again as it was when the machine was saved."""
        self._samples = []
        self._samples_read = 0

    # The agent

    def _measure_offset(self) -> int:
        """The guest's counter less the host's, rather too little than too much.

        For the driver takes a page whose counter_value lies ahead of the counter to be centuries away.
        """
        least = []
        for _ in range(5):
            guest_counter = self._ask(verb="clock")[0]["counter"]
            least.append(guest_counter - counter.read())
        return max(least)

    def _ask(
        self, answer_timeout_s: float = AGENT_TIMEOUT_S, content: bytes = b"", **request: object
    ) -> tuple[dict, bytes]:
        if self._stopped_at is not None:
            raise GuestError(f"{request['verb']}: the guest is paused")
        if content:
            request["size"] = len(content)
        encoded = json.dumps(request).encode()
        self._machine.agent.settimeout(AGENT_TIMEOUT_S)
        self._machine.agent.sendall(struct.pack("<I", len(encoded)) + encoded + content)
        return self._answer(answer_timeout_s)

    def _answer(self, timeout_s: float) -> tuple[dict, bytes]:
        deadline = time.monotonic() + timeout_s
        message = json.loads(self._receive(*struct.unpack("<I", self._receive(4, deadline)), deadline))
        content = self._receive(message.get("size", 0), deadline)
        if "error" in message:
            raise GuestError(message["error"])
        return message["ok"], content

    def _receive(self, size: int, deadline: float) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._machine.agent.settimeout(max(0.001, min(1.0, deadline - time.monotonic())))
            part = None
            with contextlib.suppress(TimeoutError):
                part = self._machine.agent.recv(min(size - len(content), 1 << 20))
            content += part or b""
            if part == b"" or self._machine.process.poll() is not None:
                raise MachineError(f"QEMU ended; the guest's last words: {self.console()[-500:]}")
            if part is None and time.monotonic() > deadline:
                raise GuestError(f"the agent did not answer in time; last words: {self.console()[-500:]}")
        return bytes(content)

    def console(self) -> str:
        """What the guest's kernel and the agent said on the serial console."""
        return (self.directory / "console.log").read_text(errors="replace")

    def _pack(self, archives: Sequence[Path], overlay: Mapping[str, bytes | Path], notification: bool) -> None:
        with open(self.directory / "initramfs", "wb") as packed:
            if notification:
                tables = Archive()
                tables.file("kernel/firmware/acpi/notify.aml", acpi.notifying_table())
                packed.write(tables.finish())  # the kernel looks for tables in the first archive only
            for archive in archives:
                packed.write(archive.read_bytes())
            if overlay:
                files = Archive()
                for path, content in overlay.items():
                    if isinstance(content, Path):
                        files.copy(content, path)
                    else:
                        files.file(path, content)
                packed.write(files.finish())


class Background:
    """A command that runs in the guest."""

    def __init__(self, guest: Guest, pid: int, output: str) -> None:
        self._guest = guest
        self.pid = pid
        self.output = output

    def said(self) -> str:
        return self._guest.read(self.output).decode(errors="replace")

    def wait(self, timeout_s: float = AGENT_TIMEOUT_S) -> int:
        """Its exit code (negative for a signal)."""
        patience_s = timeout_s + AGENT_TIMEOUT_S
        result, _ = self._guest._ask(patience_s, verb="wait", pid=self.pid, timeout_s=timeout_s)
        if result["exit_code"] is None:
            raise GuestError(f"process {self.pid} runs on after {timeout_s} s: {self.said()[-500:]}")
        return result["exit_code"]

    def running(self) -> bool:
        return self._guest._ask(verb="wait", pid=self.pid, timeout_s=0)[0]["exit_code"] is None

    def kill(self, signal: str = "SIGTERM") -> None:
        self._guest._ask(verb="kill", pid=self.pid, signal=signal)
