#!/usr/bin/env bash
# On each host of a TPU slice, by `tpu_pod.sh setup`: installs this repository for TPUs and buckets in .venv. The images of
# Ubuntu 22.04 have Python 3.10; there uv, by pip, brings a newer one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/python.sh
source launch/python.sh
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that was not made to its end
  if ! { python=$(find_python 2>/dev/null) && "$python" -m venv --clear .venv; }; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
  fi
fi
.venv/bin/python -m pip install --quiet '.[tpu,cloud]'
