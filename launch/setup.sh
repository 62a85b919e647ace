# shellcheck shell=bash
# Sourced by the other scripts: makes .venv from the lock if it is not there yet, and puts it on the PATH.
# MSR_VENV names another place for it, MSR_PYTHON another interpreter, MSR_LOCK another lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${MSR_VENV:-$PWD/.venv}
lock=${MSR_LOCK:-requirements.lock}

# shellcheck source=launch/python.sh
source launch/python.sh

stamp=$(cat "$lock" pyproject.toml | cksum)
if [ "$(cat "$venv/.msr-stamp" 2>/dev/null)" != "$stamp" ]; then
  python=$(find_python)
  echo "setting up $venv with $("$python" --version)"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # --no-compile: most modules are never imported, and compiling them all takes as long as the installation.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r "$lock"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  echo "$stamp" > "$venv/.msr-stamp"
fi
export PATH="$venv/bin:$PATH"
# Many images set it; then every start of Python compiles a thousand modules again, which takes seconds.
unset PYTHONDONTWRITEBYTECODE
