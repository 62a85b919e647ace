"""What the mean of two separators' estimates is worth: `python launch/study/mean.py MODEL OTHER CORPUS --split validation`.

SI-SDRi of every stem that sounds, over whole tracks, of each separator and of the mean of both: networks that were trained apart
err apart. Both must have the same stems and sample rate.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import msr_jax
from msr_jax.data.tracks import find_tracks, load_track, split_of
from msr_jax.errors import UserError
from msr_jax.methods.losses import SILENT
from msr_jax.metrics.si_sdr import si_sdr
from msr_jax.separate.engine import OVERLAP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs=2, metavar="MODEL", help="model folder, or working directory of a run")
    parser.add_argument("corpus")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--overlap", type=float, default=OVERLAP)
    args = parser.parse_args()
    first, other = (msr_jax.load(folder, refine="none", overlap=args.overlap) for folder in args.models)
    stems = first.stems
    if (other.stems, other.sample_rate) != (stems, first.sample_rate):
        raise UserError(f"{args.models[1]} has other stems or another sample rate than {args.models[0]}")
    gains: dict[str, list[np.ndarray]] = {}
    for track in find_tracks(split_of(args.corpus, args.split), stems):
        truth = load_track(track, stems, first.sample_rate)  # (stems, samples)
        mixture = truth.sum(0)
        separated = [model.separate(mixture, first.sample_rate) for model in (first, other)]
        one, two = (np.stack([estimate[stem] for stem in stems]) for estimate in separated)
        before = si_sdr(np.broadcast_to(mixture, truth.shape), truth)
        sounds = np.square(truth).mean(1) > SILENT * np.square(mixture).mean()
        for name, estimate in ((args.models[0], one), (args.models[1], two), ("mean of both", (one + two) / 2)):
            gain = np.where(sounds, si_sdr(estimate, truth) - before, np.nan)
            gains.setdefault(name, []).append(gain)
    print(f"| | {' | '.join(stems)} | average |\n" + "|---" * (len(stems) + 2) + "|")
    for name, values in gains.items():
        cells = [*np.nanmean(values, 0), np.nanmean(values)]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in cells) + " |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
