# Sourced by examples/demo.sh and tests/run.sh: the tools that a build needs, and the project's own .venv.
# shellcheck shell=bash

say() { printf '== %s\n' "$*" >&2; }

# need COMMAND-OR-FILE PACKAGE: remembers the Debian package of what is not there.
missing=()
need() {
	if [[ $1 == */* ]]; then [[ -e $1 ]]; else PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; fi || missing+=("$2")
}

need_python() {
	need python3 python3
	need cc gcc
	need /usr/include/stdlib.h libc6-dev
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
	[[ -e $(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h ]] || missing+=(python3-dev)
}

# install_missing: as root on Debian installs them, else names them and ends.
install_missing() {
	((${#missing[@]})) || return 0
	if ((EUID == 0)) && command -v apt-get >/dev/null; then
		say "installing ${missing[*]}"
		apt-get update -qq >&2
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
	else
		say "please install: ${missing[*]}   (Debian: apt install ${missing[*]})"
		exit 69
	fi
}

# build_into_venv EXTRAS: makes .venv and builds the package into it.
build_into_venv() {
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "Python 3.11 or later is needed"; exit 69; }
	[[ -x .venv/bin/python ]] || { say "making .venv"; python3 -m venv .venv; }
	say "building"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable ".$1"
}
