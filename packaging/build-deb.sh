#!/usr/bin/env bash
# Builds the Debian package, and lints it where lintian is installed:
#
#   packaging/build-deb.sh [DIRECTORY]        the results go there [build/deb]
#
# Needs dpkg-dev, debhelper, dh-apparmor, dh-python, pybuild-plugin-pyproject, python3-dev and a compiler. Where
# Debian's own Cython or setuptools is too old (Debian 12), newer ones come from PyPI for the time of the build.
set -euo pipefail
cd "$(dirname "$0")/.."
# Debian's Python, not one that somebody has put before it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

mkdir -p "${1:-build/deb}"
out=$(cd "${1:-build/deb}" && pwd)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' refclock/_version.py)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/vmclock-refclock-$version

mkdir "$tree"
tar -c --exclude=__pycache__ --exclude='*.so' --exclude='refclock/*.c' \
	[A-Z]*[A-Za-z] docs examples packaging pyproject.toml refclock setup.py shm | tar -x -C "$tree"
tar -C "$work" -czf "$work/vmclock-refclock_$version.orig.tar.gz" "vmclock-refclock-$version"
cp -r packaging/debian "$tree/debian"
changelog=$(dpkg-parsechangelog -l "$tree/debian/changelog" -S Version)
[[ ${changelog%-*} == "$version" ]] || { echo "packaging/debian/changelog is of $changelog, not of $version" >&2; exit 1; }

dependencies=()
if ! python3 -c 'from importlib.metadata import version as v
import sys; sys.exit(int(v("cython").split(".")[0]) < 3 or int(v("setuptools").split(".")[0]) < 77)' 2>/dev/null; then
	python3 -m pip install --quiet --disable-pip-version-check --no-compile --target "$work/tools" \
		'cython>=3.0,<4' 'setuptools>=77' 'packaging>=24.2'
	export PYTHONPATH=$work/tools
	dependencies=(-d)
fi

cd "$tree"
dpkg-buildpackage --no-sign "${dependencies[@]}"
cp "$work"/*.deb "$work"/*.dsc "$work"/*.changes "$work"/*.buildinfo "$work"/*.tar.* "$out"
if command -v lintian >/dev/null; then
	lintian --tag-display-limit 0 --fail-on error,warning "$work"/*.changes
fi
ls "$out"/*.deb
