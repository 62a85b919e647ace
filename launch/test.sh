#!/usr/bin/env bash
# Sets up .venv if needed, checks style and types, and runs the tests; arguments go to pytest.
# With --newest first: on Python 3.13 with the newest of everything that pyproject.toml allows, in .venv-newest.
if [ "${1:-}" = --newest ]; then
  shift
  MSR_VENV=${MSR_VENV:-.venv-newest}
  [[ $MSR_VENV == /* ]] || MSR_VENV=$(cd "$(dirname "$0")/.." && pwd)/$MSR_VENV
  MSR_PYTHON=${MSR_PYTHON:-python3.13} MSR_LOCK=requirements-newest.lock
fi
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r launch/test.lock
ruff check .
ruff format --check .
# Types as the libraries for the oldest Python describe theirs, newer releases do it otherwise; beside the tests, on one core.
types=
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  mypy &
  types=$!
fi
# Compilation, which is most of the time, uses one core; files are shared among processes.
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
[ -z "$types" ] || wait "$types"
