#!/usr/bin/env bash
# Sets up .venv if needed, checks style and runs the tests; arguments go to pytest.
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
python -m pytest "$@"
