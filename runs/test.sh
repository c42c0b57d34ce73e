#!/usr/bin/env bash
# All tests but the long ones, from nothing: environment, packages, pytest. About four minutes on two
# CPU cores. The long ones take ten minutes more: bash runs/test.sh -m slow
set -euo pipefail
. "$(dirname "$0")/environment.sh"
pip install -q -r requirements-dev.txt
python -m pytest -q "$@"
