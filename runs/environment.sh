# Sourced by the scripts in this folder: from here on every command is shown as it runs, in the
# project's folder, and in an environment: .venv, unless one is active already.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PS4='$ '
set -x
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python3 -m venv .venv
    { set +x; } 2>/dev/null; . .venv/bin/activate; set -x
fi
