"""What longer chunks and their overlap are worth: `python launch/study/chunks.py MODEL CORPUS 1:0.5 4:0.0625 …`.

SI-SDRi of every stem that sounds, over whole tracks, for each SEGMENTS:OVERLAP; and the segments computed for one of song.
"""

import argparse
import sys

import numpy as np

import msr_jax
from msr_jax.data.tracks import find_tracks, load_track, split_of
from msr_jax.errors import UserError
from msr_jax.methods.losses import SILENT
from msr_jax.metrics.si_sdr import si_sdr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="model folder, or working directory of a run")
    parser.add_argument("corpus")
    parser.add_argument("chunks", nargs="+", metavar="SEGMENTS:OVERLAP")
    parser.add_argument("--split", default="test")
    parser.add_argument("--refine", default="none")
    args = parser.parse_args()
    print("| segments | overlap | SI-SDRi, dB | stems | computed |\n|---|---|---|---|---|")
    for text in args.chunks:
        segments, _, overlap = text.partition(":")
        model = msr_jax.load(args.model, args.refine, segments=int(segments), overlap=float(overlap))
        gains: list[float] = []
        for track in find_tracks(split_of(args.corpus, args.split), model.stems):
            truth = load_track(track, model.stems, model.sample_rate)  # (stems, samples)
            mixture = truth.sum(0)
            separated = model.separate(mixture, model.sample_rate)
            estimate = np.stack([separated[stem] for stem in model.stems])
            gain = si_sdr(estimate, truth) - si_sdr(np.broadcast_to(mixture, truth.shape), truth)
            gains += list(gain[np.square(truth).mean(1) > SILENT * np.square(mixture).mean()])
        cells = (segments, overlap, f"{np.mean(gains):.2f}", str(len(gains)), f"{1 / (1 - float(overlap)):.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"chunks.py: {error}")
