#!/usr/bin/env bash
# soundfile (libsndfile): floats written as 16- or 24-bit WAV, AIFF, CAF are rounded down, those written as FLAC to the nearest.
#
# versions: soundfile 0.14.0 (libsndfile 1.2.2), numpy 2.4.6
# date: 2026-12-01
# guess: a float becomes the nearest integer, the same one in every container without loss.
# seen: WAV, AIFF and CAF have half a step of DC below what was given, in every file, and twice the error's RMS (6 dB); FLAC has
#   neither. One array written as .wav and as .flac differs in half its samples. Dither made for a rounding writer is off by the
#   same. Integers that were read and are written back are exact, so a test of the round trip sees nothing.
# what helps: round oneself and write int16, or int32 shifted up.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet soundfile==0.14.0 numpy==2.4.6
venv/bin/python - <<'PY'
import sys
import numpy as np
import soundfile

print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__, "numpy", np.__version__)
audio, ok, read = np.random.default_rng(0).uniform(-0.9, 0.9, 100_000), True, {}
for bits in (16, 24):
    for kind in ("WAV", "AIFF", "CAF", "FLAC"):
        soundfile.write(f"a.{kind}", audio, 44_100, f"PCM_{bits}", format=kind)
        read[kind] = soundfile.read(f"a.{kind}")[0]
        error = (read[kind] - audio) * 2 ** (bits - 1)
        mean, rms = error.mean(), np.sqrt((error**2).mean())
        print(f"{kind} of {bits} bits: mean error {mean:+.3f} steps, RMS {rms:.3f}")
        ok &= abs(mean - (0 if kind == "FLAC" else -0.5)) < 0.02 and abs(rms - (0.289 if kind == "FLAC" else 0.577)) < 0.02
    differ = (read["WAV"] != read["FLAC"]).mean()
    print(f"WAV and FLAC of {bits} bits differ in {differ:.0%} of the samples")
    ok &= 0.45 < differ < 0.55
sys.exit(0 if ok else 1)
PY
