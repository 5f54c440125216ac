#!/usr/bin/env bash
# Sets everything up and shows the main job: a real chronyd following a vmclock page, and a migration.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/prepare.sh

need_python
need chronyd chrony
install_missing
build_into_venv ""
exec .venv/bin/vmclock-refclock demo "$@"
