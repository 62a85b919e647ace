#!/usr/bin/env bash
# Compiles every official program for every chip by the vendors' own compilers, which need no chip, and writes one table:
#   bash launch/compile_check.sh OUT [--programs unet_det …] [--targets h200:1 …] [--limit MINUTES] [--each MINUTES]
# OUT/table.json and OUT/table.md; started again it goes on where it stopped, and compiles anew what has changed. Hours on two
# cores, minutes for one program. Exit code 1 if a program that launch/compile_table.json has as fitting does not compile or
# fit, or takes over 1.05 times its work space. The compilers (4.8 GB) are installed in an environment of its own.
MSR_VENV=${MSR_VENV:-$(cd "$(dirname "$0")/.." && pwd)/.venv-compile}
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
python -c 'import libtpu, jax_plugins.xla_cuda13' 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check "jax[cuda13,tpu]==$(python -c 'import jax; print(jax.__version__)')" \
    -c requirements.lock
exec python launch/compile_check.py "$@"
