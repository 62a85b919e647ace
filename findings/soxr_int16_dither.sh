#!/usr/bin/env bash
# soxr: int16 in and out is dithered: silence becomes noise, equal channels differ, and from a rate to itself samples change.
#
# versions: soxr 0.5.0.post1, numpy 2.4.6
# date: 2026-12-01
# guess: int16 is resampled and rounded; silence stays 0, left and right that are alike stay alike, a rate to itself changes nothing.
# seen: a quarter of the samples of digital silence are 1 or -1. A mono song in two channels is no longer mono. Resampled from
#   44,100 to 44,100 Hz a quarter of the samples are changed. The error's RMS is 0.5 steps, where rounding has 0.29. int32 and floats have no
#   dither. So a test for silent stems or for equal channels after resampling int16 finds none.
# what helps: resample floats, round after.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet soxr==0.5.0.post1 numpy==2.4.6
venv/bin/python - <<'PY'
import sys
import numpy as np
import soxr

print("soxr", soxr.__version__, "libsoxr", soxr.__libsoxr_version__, "numpy", np.__version__)
tone = (3000 * np.random.default_rng(0).standard_normal(44_100)).astype(np.int16)
silence = np.zeros_like(tone)
both = soxr.resample(np.stack([tone, tone], 1), 44_100, 48_000)
exact = soxr.resample(tone.astype(float), 44_100, 48_000)
rms = np.sqrt(((soxr.resample(tone, 44_100, 48_000) - exact) ** 2).mean())
shares = {
    "of silence not 0": (soxr.resample(silence, 44_100, 48_000) != 0).mean(),
    "of equal channels unequal": (both[:, 0] != both[:, 1]).mean(),
    "changed from 44,100 to 44,100 Hz": (soxr.resample(tone, 44_100, 44_100) != tone).mean(),
}
for name, share in shares.items():
    print(f"{share:.0%} {name}")
print(f"error's RMS {rms:.3f} steps")
others = [soxr.resample(silence.astype(t), 44_100, 48_000).any() for t in (np.int32, np.float32)]
print("noise in silence of int32 and float32:", *others)
sys.exit(0 if min(shares.values()) > 0.1 and rms > 0.4 and not any(others) else 1)
PY
