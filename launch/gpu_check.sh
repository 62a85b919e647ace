#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and `pip install 'msr_jax[cuda]'`: a few steps of every stage, their memory beside the plan's:
#   bash launch/gpu_check.sh OUT [TARGET]          TARGET of `msr plan` for one device, h200:1 by default
# Plans are made first, by compiling, and kept in OUT; make them beforehand on a machine without a GPU, and the rest takes minutes.
# It has not run on a GPU yet.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash launch/gpu_check.sh OUT [TARGET]}
target=${2:-h200:1}
mkdir -p "$out"
for config in {unet,bsrf}_{det,det_x2,diffusion,consistency}; do
  options=(--config "configs/$config.py")
  [ -e "$out/$config.plan.json" ] ||
    msr plan "${options[@]}" --target "$target" --config.data.batch=2 --json "$out/$config.plan.json"
done
if [ -z "$(python -c 'import jax; print(*(d for d in jax.devices() if d.platform == "gpu"))' 2>/dev/null)" ]; then
  echo "no GPU here; the plans are in $out" >&2
  exit 2
fi
for config in {unet,bsrf}_{det,det_x2,diffusion,consistency}; do
  XLA_PYTHON_CLIENT_PREALLOCATE=false msr bench train --config "configs/$config.py" --batch 2 --repeats 5 --json "$out/$config.step.json"
done
python - "$out" <<'PYTHON'
import json, pathlib, sys

print("| program | planned, GB | on the chip at the peak, GB | s a step |\n|---|---|---|---|")
for step in sorted(pathlib.Path(sys.argv[1]).glob("*.step.json")):
    plan = json.loads(step.with_name(step.name.replace(".step.", ".plan.")).read_text())
    row = json.loads(step.read_text())["rows"][0]
    name = step.name.split(".")[0]
    print(f"| {name} | {plan['needs'] / 1e9:.2f} | {row['peak_memory_bytes'] / 1e9:.2f} | {row['seconds']:.3f} |")
PYTHON
