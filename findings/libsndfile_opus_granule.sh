#!/usr/bin/env bash
# soundfile (libsndfile): an Ogg Opus stream that begins at a later sample is read late, unless one seeks to 0 first.
#
# versions: soundfile 0.14.0 (libsndfile 1.2.2), numpy 2.4.6
# date: 2026-11-30
# guess: a file that has just been opened is at its first sample; `seek(0)` changes nothing.
# seen: where the first page of sound counts its samples from another place than 0, as in streams that were copied out of WebM or
#   cut out of a broadcast, what `read()` gives begins so many samples late and lacks as many at the end. After `seek(0)` all are
#   there; `soundfile.read` does that by itself, so that two ways to read one file differ.
# what helps: `seek(0)` after opening.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet soundfile==0.14.0 numpy==2.4.6
cat > late.py <<'PY'
import sys

import numpy as np
import soundfile

print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
rate, by = 48_000, 312
audio = 0.3 * np.random.default_rng(0).standard_normal((rate, 1)).cumsum(0) / 30
soundfile.write("a.opus", audio, rate, format="OGG", subtype="OPUS")


def checksum(page):
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc.to_bytes(4, "little")


data, at, pages = bytearray(open("a.opus", "rb").read()), 0, 0
while at < len(data):
    lengths = data[at + 27 : at + 27 + data[at + 26]]
    end = at + 27 + len(lengths) + sum(lengths)
    if pages > 1:  # the first two are headers
        position = int.from_bytes(data[at + 6 : at + 14], "little") + by
        data[at + 6 : at + 14] = position.to_bytes(8, "little")
    data[at + 22 : at + 26] = bytes(4)
    data[at + 22 : at + 26] = checksum(data[at:end])
    at, pages = end, pages + 1
open("b.opus", "wb").write(data)

whole = soundfile.read("a.opus")[0]
with soundfile.SoundFile("b.opus") as file:
    late = file.read()
    file.seek(0)
    again = file.read()
matches = [shift for shift in range(2000) if np.abs(late[shift : shift + 20_000] - whole[:20_000]).max() < 1e-2]
print(f"as opened: {len(late)} samples, the first of the song at {matches}")
print("after seek(0): the song's" if np.array_equal(again, whole) else "after seek(0): others")
sys.exit(not (matches == [by] and np.array_equal(again, whole)))
PY
venv/bin/python late.py
