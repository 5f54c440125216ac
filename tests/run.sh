#!/usr/bin/env bash
# Sets everything up and runs the tests. The default tier takes about a quarter of an hour.
#
#   tests/run.sh            all but the slow tier and the guest
#   tests/run.sh --slow     the slow tier too: a thousand disruptions, 10^9 sequence reads, mutations, packages
#   tests/run.sh --guest    the guest too: Linux, ptp_vmclock, chronyd and systemd in QEMU; a quarter of an hour more
#   tests/run.sh --bench    no tests but the benchmarks: their figures, on a machine that should be idle
#
# All other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/prepare.sh

tier="not slow and not guest"
slow=0 guest=0 bench=0 arguments=()
for argument; do
	case $argument in
	--slow) slow=1 ;;
	--guest) guest=1 ;;
	--bench) bench=1 ;;
	*) arguments+=("$argument") ;;
	esac
done
case $slow$guest in
10) tier="not guest" ;;
01) tier="not slow" ;;
11) tier="" ;;
esac

need_python
need chronyd chrony
install_missing
build_into_venv "[test,monitor]"

if ((bench)); then
	for script in tests/bench_*.py; do
		say "$script"
		.venv/bin/python -m "tests.$(basename "$script" .py)"
	done
	exit
fi

say "checking the source"
.venv/bin/python -m ruff check --quiet .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/python -m mypy

say "fetching the consumers: chronyd, ntpd, ntpd-rs, ntpshmmon"
.venv/bin/python -m tests.debs || true # what cannot be had is skipped aloud, and fails the run if it must be there

if ((guest)); then
	say "fetching the guest: QEMU, a kernel, Debian's chrony and systemd"
	.venv/bin/python -m tests.guest.build || say "THE GUEST IS NOT TESTED: see the line above, and the skipped tests"
fi

say "testing${tier:+ ($tier)}"
export VMCLOCK_REQUIRE_CONSUMERS=1
exec .venv/bin/python -m pytest -m "$tier" ${arguments[@]+"${arguments[@]}"}
