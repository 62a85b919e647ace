#!/usr/bin/env bash
# rotary-embedding-torch: the first call's dtype rounds the positions, and its angles are kept for all later calls.
#
# versions: rotary-embedding-torch 0.9.1, torch 2.13.0 on a CPU
# date: 2026-12-01
# guess: angles are computed in float32 (the method switches autocast off for that), and queries of bfloat16 are rotated to
#   what float32 gives, within their rounding.
# seen: positions are counted in the dtype of the queries. In bfloat16 those above 256 come in twos, above 512 in fours, above
#   1024 in eights, which share one rotation: 803 and 804 cannot be told apart. The table is then kept: float32 queries after a
#   bfloat16 call are rotated by the same wrong angles, and bfloat16 queries after a float32 call of that length are right.
# who meets it: BS-RoFormer and Mel-Band RoFormer of PyPI under autocast to bfloat16, for segments of more than 256 frames.
#   float16 counts right up to 2048.
# what helps: one call in float32 with the longest length before all others, or queries turned to float32 for the rotation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 rotary-embedding-torch==0.9.1 numpy==2.4.6
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import torch
from rotary_embedding_torch import RotaryEmbedding

print("rotary-embedding-torch", version("rotary-embedding-torch"), "torch", torch.__version__)
torch.manual_seed(0)
length = 1100
queries = torch.randn(1, 1, length, 64)
right = RotaryEmbedding(dim=64).rotate_queries_or_keys(queries)
error = lambda out: float((out.float() - right)[:, :, 800:].abs().max())

first = RotaryEmbedding(dim=64)
in_bfloat16 = error(first.rotate_queries_or_keys(queries.bfloat16()))
float32_after = error(first.rotate_queries_or_keys(queries))
other = RotaryEmbedding(dim=64)
other.rotate_queries_or_keys(queries)
bfloat16_after = error(other.rotate_queries_or_keys(queries.bfloat16()))
with torch.autocast("cpu", torch.bfloat16):
    to_q = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.eye_(to_q.weight)
    autocast = error(RotaryEmbedding(dim=64).rotate_queries_or_keys(to_q(queries)).detach())
same = RotaryEmbedding(dim=64).rotate_queries_or_keys(torch.ones(1, 1, length, 64, dtype=torch.bfloat16))[0, 0]
print("largest errors from position 800 on, of values up to", round(float(queries.abs().max()), 1))
print(f"bfloat16 first {in_bfloat16:.3f}, under autocast {autocast:.3f}, float32 after it {float32_after:.3f}, "
      f"bfloat16 after float32 {bfloat16_after:.3f}")
print("different rotations among the last 100 positions:", len(torch.unique(same[-100:], dim=0)))
wrong = min(in_bfloat16, autocast, float32_after) > 1
sys.exit(0 if wrong and bfloat16_after < 0.05 and len(torch.unique(same[-100:], dim=0)) < 20 else 1)
PY
