#!/usr/bin/env bash
# soundfile/libsndfile: a WAV from a pipe whose data length is 0 has no samples; one of 0xFFFFFFFF is read to its end.
#
# versions: soundfile 0.13.1 with libsndfile 1.2.2, numpy 2.2.6
# date: 2026-11-29
# guess: both are lengths that a program which wrote into a pipe could not fill in, and both are read to the end of the file.
# seen: with 0 (mpg123 -w -; with 0 for the RIFF chunk too: flac -d -c of a stream of unknown length) the file opens with 0
#   frames, without an error. 0xFFFFFFFF (ffmpeg -f wav -) and 0x7FFFF000 (SoX) are read whole.
# what helps: write the true lengths into the header's bytes and hand libsndfile those by a file object.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet soundfile==0.13.1 numpy==2.2.6
venv/bin/python - <<'PY'
import sys
import numpy as np
import soundfile

print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__, "numpy", np.__version__)
soundfile.write("whole.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 8000, subtype="PCM_16")
whole, seen = open("whole.wav", "rb").read(), {}
assert whole[36:40] == b"data"
for riff, data in ((0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (36, 0), (0, 0)):
    header = whole[:4] + riff.to_bytes(4, "little") + whole[8:40] + data.to_bytes(4, "little")
    open("pipe.wav", "wb").write(header + whole[44:])
    seen[riff, data] = len(soundfile.read("pipe.wav")[0])
    print(f"RIFF {riff:#x}, data {data:#x}: {seen[riff, data]}")
sys.exit(0 if list(seen.values()) == [8000, 8000, 0, 0] else 1)
PY
