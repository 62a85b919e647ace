"""Puts a trained model into the package: `python launch/study/bundle.py MODEL --scores "NAME=DIR" … --trained TEXT`.

Writes msr_jax/bundled: the deterministic and, if there is one, the consistency network in float16, and a model card with the averages of
the evaluations (`msr evaluate --out DIR`) that are named.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from msr_jax.errors import UserError
from msr_jax.evaluate.report import number
from msr_jax.weights.model_folder import (
    BUNDLED,
    DEFAULT_OVERLAP,
    DEFAULT_REFINE,
    DEFAULT_SEGMENTS,
    flatten,
    load_model,
    save_model,
)

LIMIT = 20_000_000  # bytes: what a package may weigh
# 0.02 to 0.05 dB below chunks of one segment that overlap by half (`chunks.py`), at two thirds of the computing.
CHUNKS = {DEFAULT_SEGMENTS: 2, DEFAULT_OVERLAP: 0.25}
CARD = Path(__file__).with_name("bundled_card.md")


def score_line(name: str, results: dict) -> str:
    """A row of the card's table."""
    improvement, sdr = results["aggregate"]["si_sdri_active"], results["aggregate"]["sdr"]["average"]
    cells = [number(improvement[stem]) for stem in [*results["settings"]["stems"], "average"]]
    return f"| {name} | " + " | ".join([*cells, number(sdr), number(results["rtf"])]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model folder, or working directory, of the consistency stage")
    parser.add_argument(
        "--refine", choices=("none", "consistency"), help="taken where none is named; default: the best it has"
    )
    parser.add_argument("--scores", action="append", default=[], metavar="NAME=DIR", help="an evaluation for the card")
    parser.add_argument("--trained", default="", metavar="TEXT", help="what was trained, and for how long")
    args = parser.parse_args()
    model = load_model(args.model)
    kept = {name: model.weights[name] for name in ("deterministic", "consistency") if name in model.weights}
    count = {name: sum(leaf.size for leaf in flatten(params).values()) for name, params in kept.items()}
    if 2 * sum(count.values()) > LIMIT:
        raise UserError(
            f"{sum(count.values())} parameters in float16 are more than {LIMIT} bytes; train a smaller model"
        )
    stems = model.config["stems"]
    named = (text.partition("=") for text in args.scores)
    rows = [score_line(name, json.loads((Path(folder) / "results.json").read_text())) for name, _, folder in named]
    head = [f"| SI-SDRi, dB | {' | '.join(stems)} | average | SDR | RTF |", "|---" * (len(stems) + 4) + "|"]
    card = CARD.read_text().format(
        networks=" and ".join(f"a {name} network ({size / 1e6:.1f} M parameters)" for name, size in count.items()),
        scores="\n".join([*head, *rows]),
        trained=args.trained,
    )
    config = {k: v for k, v in model.config.items() if k != DEFAULT_REFINE} | CHUNKS
    if args.refine:
        config[DEFAULT_REFINE] = args.refine
    save_model(BUNDLED, config, kept, np.float16)
    (BUNDLED / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in BUNDLED.iterdir())
    print(f"wrote {BUNDLED} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bundle.py: {error}")
