#!/usr/bin/env bash
# All tests but the long ones, from nothing: environment, packages, pytest. About four minutes on two
# CPU cores. The long ones: bash runs/test.sh -m slow, ten minutes more.
set -euo pipefail
cd "$(dirname "$0")/.."
PS4='$ '
set -x
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python3 -m venv .venv
    { set +x; } 2>/dev/null; . .venv/bin/activate; set -x
fi
pip install -q -r requirements-dev.txt
python -m pytest -q "$@"
