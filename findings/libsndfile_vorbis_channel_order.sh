#!/usr/bin/env bash
# soundfile/libsndfile: channels of an Ogg Vorbis file of 5.1 come in Vorbis's order, with the centre second.
#
# versions: soundfile 0.13.1 with libsndfile 1.2.2, av 15.1.0, numpy 2.2.6
# date: 2026-11-29
# guess: as from WAV and FLAC: front left, front right, centre, low frequencies, back left, back right.
# seen: front left, centre, front right, back left, back right, low frequencies, on reading as on writing. A program that goes
#   from .ogg to .wav by soundfile.read and soundfile.write swaps speakers. FFmpeg reorders: its second channel is the third here.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet soundfile==0.13.1 av==15.1.0 numpy==2.2.6
venv/bin/python - <<'PY'
import sys
import av
import numpy as np
import soundfile

print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__, "av", av.__version__)
rate = 48_000
t = np.arange(rate) / rate
tones = [50 * k for k in (6, 9, 12, 15, 18, 1)]  # the last is low: Vorbis leaves little else in that channel
soundfile.write("six.ogg", np.stack([0.1 * np.sin(2 * np.pi * f * t) for f in tones], 1), rate, format="OGG")
heard = lambda x: [int(np.abs(np.fft.rfft(c[:rate])).argmax()) for c in x]
by_soundfile = heard(soundfile.read("six.ogg")[0].T)
with av.open("six.ogg") as container:
    frames = list(container.decode(audio=0))
names = [channel.name for channel in frames[0].layout.channels]
by_ffmpeg = heard(np.concatenate([frame.to_ndarray() for frame in frames], 1))
print("soundfile:", by_soundfile)
print("FFmpeg:   ", by_ffmpeg, names)
order = [by_ffmpeg.index(f) for f in by_soundfile]
print("soundfile's channels are FFmpeg's", [names[k] for k in order])
sys.exit(0 if order == [0, 2, 1, 4, 5, 3] else 1)
PY
