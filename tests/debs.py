"""Debian packages, unpacked beside the system: other versions of a program than the machine's, without installing them.

Everything happens under a private apt configuration in the cache directory
(``$VMCLOCK_TEST_CACHE``, else ``$XDG_CACHE_HOME/vmclock-refclock``, else ``~/.cache/vmclock-refclock``): the machine's
package lists, its dpkg database and its archive cache stay as they are, and no right of root is needed. The mirror is
the one from which the machine itself gets Debian (``$VMCLOCK_TEST_MIRROR`` names another).

    prefix = unpack(["chrony"], suite="trixie", with_depends=True)
    subprocess.run(program(prefix, "usr/sbin/chronyd") + ["--version"])

``python -m tests.debs`` fetches what the default tests need; ``python -m tests.debs SUITE PACKAGE…`` anything else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TIMEOUT_S = 300.0

# Packages named lib* that hold scripts, headers and the like rather than shared libraries.
_NO_LIBRARY = (
    "-dev",
    "-perl",
    "-bin",
    "-data",
    "-doc",
    "-common",
    "-stdlib",
    "-minimal",
    "-modules",
    "-runtime",
)


class Unobtainable(Exception):
    """A package cannot be had here: no apt, no Debian mirror, no network, or no such package. One line says why."""


def cache_dir() -> Path:
    """The directory that keeps lists, archives and unpacked prefixes from one run to the next; made if missing."""
    home = os.environ.get("VMCLOCK_TEST_CACHE")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vmclock-refclock")
    path = Path(home).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def unpack(
    packages: Sequence[str],
    prefix: Path | str | None = None,
    suite: str | None = None,
    *,
    with_depends: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """Unpack Debian packages into `prefix` and return it. What is there already is not fetched again.

    `packages` may hold ``name`` or ``name=version``. `prefix` is a directory, by default one in the cache, named after
    suite and first package. `suite` is ``bookworm``, ``trixie-backports``, ``sid`` …, by default the machine's own; a
    backports suite is preferred, and what it lacks comes from the suite that it extends. `with_depends` adds the shared
    libraries (the ``lib*`` packages of the closure of Depends), libc and its loader among them, so that `program` can
    run the result on a machine with another libc.

    The stamp ``PREFIX/.unpacked-*`` names each package with its version, and is written last. Several processes may
    call at once. Raises Unobtainable, also when `timeout_s` runs out.
    """
    packages = list(packages)
    suite = suite or _machine_suite()
    request = "\n".join([suite, "with libraries" if with_depends else "alone", *sorted(packages)])
    key = f"{packages[0].partition('=')[0]}-{hashlib.sha256(request.encode()).hexdigest()[:8]}"
    prefix = Path(prefix).absolute() if prefix else cache_dir() / "prefix" / f"{suite}-{key}"
    stamp = prefix / f".unpacked-{key}"
    if stamp.exists():
        return prefix
    deadline = time.monotonic() + timeout_s
    with _locked(cache_dir() / "lock", deadline):
        if stamp.exists():
            return prefix
        archives = _Apt(suite, deadline).fetch(packages, with_depends)
        prefix.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            _run(["dpkg", "-x", str(archive), str(prefix)], deadline)
        unfinished = stamp.with_suffix(".part")
        unfinished.write_text("".join(f"{archive.name}\n" for archive in archives))
        unfinished.rename(stamp)
    return prefix


def unpacked(prefix: Path | str) -> dict[str, str]:
    """What `unpack` put into a prefix, by the stamps: package name -> version."""
    found = {}
    for stamp in sorted(Path(prefix).glob(".unpacked-*")):
        for line in stamp.read_text().splitlines():
            name, version, _arch = line.split("_", 2)
            found[name] = version.replace("%3a", ":")
    return found


def program(prefix: Path | str, path: str) -> list[str]:
    """The command line that runs `path` (relative to the prefix) with the libraries that were unpacked with it.

    A prefix without a libc of its own gives the plain path: the machine's libraries serve.
    """
    prefix = Path(prefix)
    executable = prefix / path
    if not executable.exists():
        raise Unobtainable(f"{executable} is not in the unpacked packages")
    directories = library_dirs(prefix)
    for directory in directories:
        for loader in sorted(directory.glob("ld-linux*.so.*")):
            search = ":".join(map(str, directories))
            return [str(loader), "--library-path", search, "--argv0", str(executable), str(executable)]
    return [str(executable)]


def library_dirs(prefix: Path | str) -> list[Path]:
    """The directories below a prefix that hold its shared libraries."""
    triplet = f"{platform.machine()}-linux-gnu"
    candidates = [Path(prefix) / base / triplet for base in ("lib", "usr/lib")]
    return [directory for directory in candidates if directory.is_dir()]


def available(pattern: str, suite: str | None = None, *, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """Packages of a suite whose whole name matches a regular expression: name -> newest version."""
    deadline = time.monotonic() + timeout_s
    with _locked(cache_dir() / "lock", deadline):
        return _Apt(suite or _machine_suite(), deadline).available(pattern)


class _Apt:
    """apt with lists, cache and status of its own, for one suite."""

    def __init__(self, suite: str, deadline: float) -> None:
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise Unobtainable("this machine has no apt-get and dpkg")
        self.suite = suite
        self.deadline = deadline
        self.home = cache_dir() / "apt" / suite
        self.archives = self.home / "archives"
        for directory in ("state/lists/partial", "cache/archives/partial", "archives"):
            (self.home / directory).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        (self.home / "sources.list").write_text(self._sources())
        (self.home / "apt.conf").write_text(self._configuration())

    def _sources(self) -> str:
        mirror, keyring = _mirror()
        base = self.suite.removesuffix("-backports")
        suites = [base] if base == self.suite else [base, self.suite]
        return "".join(f"deb [target=Packages signed-by={keyring}] {mirror} {suite} main\n" for suite in suites)

    def _configuration(self) -> str:
        # The machine's own configuration is read first, since a proxy may be set there; its hooks must not run here.
        lines = [
            "#clear APT::Update::Pre-Invoke;",
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            f'Dir::Etc::sourcelist "{self.home}/sources.list";',
            'Dir::Etc::sourceparts "/nonexistent";',
            'Dir::Etc::preferences "/nonexistent";',
            'Dir::Etc::preferencesparts "/nonexistent";',
            f'Dir::State "{self.home}/state";',
            f'Dir::State::status "{self.home}/status";',
            f'Dir::Cache "{self.home}/cache";',
            f'APT::Default-Release "{self.suite}";',
            'APT::Install-Recommends "false";',
            'Acquire::Languages "none";',
            'Acquire::Retries "2";',
            'Acquire::http::Timeout "30";',
            'Acquire::https::Timeout "30";',
        ]
        if os.geteuid() == 0:
            lines.append('APT::Sandbox::User "root";')  # the usual _apt may not enter root's home
        return "\n".join(lines) + "\n"

    def fetch(self, packages: list[str], with_depends: bool) -> list[Path]:
        """Download packages (and their libraries); the archives' paths, in apt's order."""
        if not self._has_lists():
            self._update()
        try:
            return self._fetch(packages, with_depends)
        except Unobtainable:
            # Lists that are older than the mirror name files that are gone.
            self._update()
            return self._fetch(packages, with_depends)

    def _fetch(self, packages: list[str], with_depends: bool) -> list[Path]:
        if with_depends:
            named = {package.partition("=")[0] for package in packages}
            plan = self._apt("--simulate", "--yes", "install", *packages)
            planned = re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE)
            wanted = {name: version for name, version in planned if name in named or _is_library(name)}
        else:
            # "name=version" is itself a version of its own choice; the rest gets the newest.
            wanted = dict(package.split("=", 1) for package in packages if "=" in package)
            wanted |= self._newest([package for package in packages if "=" not in package])
        self._apt("download", *(f"{name}={version}" for name, version in wanted.items()))
        archives = []
        for name, version in wanted.items():
            escaped = version.replace(":", "%3a")
            archives += sorted(self.archives.glob(f"{name}_{escaped}_*.deb"))[:1]
        if len(archives) < len(packages):
            raise Unobtainable(f"{self.suite} has not all of {' '.join(packages)}")
        return archives

    def available(self, pattern: str) -> dict[str, str]:
        if not self._has_lists():
            self._update()
        names = self._apt("pkgnames", tool="apt-cache").split()
        return self._newest(sorted(name for name in names if re.fullmatch(pattern, name)))

    def _newest(self, names: list[str]) -> dict[str, str]:
        if not names:
            return {}
        policy = self._apt("policy", *names, tool="apt-cache")
        found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)", policy, re.MULTILINE)
        return {name: version for name, version in found if version != "(none)"}

    def _has_lists(self) -> bool:
        return any((self.home / "state/lists").glob("*_Packages*"))

    def _update(self) -> None:
        # Without the option apt-get reports a mirror that does not answer as a warning, and succeeds.
        self._apt("-o", "APT::Update::Error-Mode=any", "update")

    def _apt(self, *arguments: str, tool: str = "apt-get") -> str:
        configuration = str(self.home / "apt.conf")
        return _run([tool, "-c", configuration, "-q", *arguments], self.deadline, cwd=self.archives)


def _is_library(package: str) -> bool:
    return package.startswith("lib") and not package.endswith(_NO_LIBRARY)


def _mirror() -> tuple[str, str]:
    """The repository from which this machine gets Debian's main suite, and the keyring that signs it."""
    named = os.environ.get("VMCLOCK_TEST_MIRROR")
    if named:
        return named, KEYRING
    if shutil.which("apt-get") is None:
        raise Unobtainable("this machine has no apt-get")
    form = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)"
    for line in _run(["apt-get", "indextargets", "--format", form], time.monotonic() + 30).splitlines():
        uri, suite, component, signed_by = line.split("|")
        # bookworm-updates and the like have a hyphen; the security archive is another repository.
        if component == "main" and "-" not in suite and uri.rstrip("/").endswith("/debian"):
            return uri, signed_by if signed_by.startswith("/") else KEYRING
    raise Unobtainable("apt's sources on this machine name no Debian mirror; VMCLOCK_TEST_MIRROR can name one")


def _machine_suite() -> str:
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if not codename:
        raise Unobtainable("/etc/os-release names no VERSION_CODENAME: give a suite")
    return codename


def _run(command: list[str], deadline: float, cwd: Path | None = None) -> str:
    """Run to the end or to the deadline; standard output. Raises Unobtainable with the last error line."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(0.1, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        raise Unobtainable(f"{command[0]} {command[-1]}: no end within the time given") from None
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise Unobtainable(f"{command[0]} {command[-1]}: {complaints[0] if complaints else done.returncode}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    with open(path, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unobtainable(f"another process holds {path}") from None
                time.sleep(0.1)
        yield


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(unpack(sys.argv[2:], suite=sys.argv[1], with_depends=True))
    else:
        from tests import consumers

        raise SystemExit(consumers.fetch_all())
