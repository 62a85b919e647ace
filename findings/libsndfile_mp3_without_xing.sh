#!/usr/bin/env bash
# soundfile/libsndfile: an mp3 of varying bit rate without a Xing header ends early, without an error.
#
# versions: soundfile 0.13.1 with libsndfile 1.2.2, numpy 2.2.6
# date: 2026-11-29
# guess: read() goes on to the end of the file; `frames` may be an estimate.
# seen: `frames` is estimated from the size of the file and the first bit rate, and read() stops there. A file that begins loud
#   and goes on nearly silent loses most of its length; no exception, no warning. The same bytes with their Xing frame are whole.
# what helps: count the frames oneself, or present a file that is longer and stop after that many samples.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet soundfile==0.13.1 numpy==2.2.6
venv/bin/python - <<'PY'
import sys
import numpy as np
import soundfile

print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__, "numpy", np.__version__)
rate = 16_000
audio = np.random.default_rng(0).standard_normal((10 * rate, 1)) * 0.2
audio[2 * rate :] *= 1e-3
soundfile.write("told.mp3", audio, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
data = open("told.mp3", "rb").read()
assert b"Xing" in data[:200]
open("untold.mp3", "wb").write(data[data.index(data[:2], 4) :])  # from the second frame on
told, untold = (len(soundfile.read(name)[0]) for name in ("told.mp3", "untold.mp3"))
print(f"with the Xing frame {told} samples, without it {untold}, of {len(audio)}")
sys.exit(0 if told == len(audio) and untold < 0.9 * len(audio) else 1)
PY
