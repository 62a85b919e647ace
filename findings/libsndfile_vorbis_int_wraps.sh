#!/usr/bin/env bash
# soundfile (libsndfile): Ogg Vorbis and Opus read as integers wrap around where they are louder than full scale; MP3 is clipped.
#
# versions: soundfile 0.14.0 (libsndfile 1.2.2), numpy 2.4.6
# date: 2026-12-01
# guess: read(dtype="int16") clips, as soundfile switches libsndfile's clipping on, and as it does for MP3.
# seen: decoded peaks above 1, which any loud master has after lossy coding, come as values of the other sign: +1.1 as about -0.9.
#   No error. As int32 a part of them does. As float the same file is right, and so is the same music as MP3.
# what helps: read floats, clip, and convert oneself.
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
rate = 48_000
master = np.clip(1.5 * np.sin(2 * np.pi * 220 * np.arange(2 * rate) / rate), -0.99, 0.99)  # a limited one, within full scale
seen = {}
for kind, subtype in (("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")):
    soundfile.write("a", master, rate, subtype, format=kind)
    heard = soundfile.read("a")[0]
    for dtype, one in (("int16", 2.0**15), ("int32", 2.0**31)):
        whole = soundfile.read("a", dtype=dtype)[0] / one
        loud = np.abs(heard) > 1.001
        wrapped = (np.sign(whole) != np.sign(heard)) & loud
        seen[subtype, dtype] = int(wrapped.sum())
        print(f"{subtype} {dtype}: float peak {np.abs(heard).max():.3f}, {loud.sum()} samples above 1, {wrapped.sum()} of the other sign")
sys.exit(0 if all((n == 0) == (s == "MPEG_LAYER_III") for (s, _), n in seen.items()) else 1)
PY
