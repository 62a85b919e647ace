"""Table of a mixture, its deterministic model and the refinements on held-out tracks: MODEL CORPUS TABLE [T].

With at most T steps of consistency (default 4). Called by demo.sh and small_bsrf.sh. Figures that are there already are
printed again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from msr_jax.data.tracks import find_tracks
from msr_jax.evaluate.report import number
from msr_jax.evaluate.score import evaluate, mixture_as_estimate
from msr_jax.files import write_whole
from msr_jax.methods.stages import network_of
from msr_jax.separate.engine import Separator
from msr_jax.weights.model_folder import load_model

ROWS = (
    ("Det.", "none", None),
    ("Det.+Diff.", "diffusion", None),
    ("Det.+CD T = 1", "consistency", 1),
    ("Det.+CD T = 2", "consistency", 2),
    ("Det.+CD T = 4", "consistency", 4),
)


def measure(model: Path, corpus: Path, most: int) -> dict[str, Any]:
    networks = load_model(model)
    known = [row for row in ROWS if network_of(networks.config, row[1]) in networks.weights]
    rows = [row for row in known if (row[2] or 1) <= most]
    separators = {name: Separator(networks, refine, steps) for name, refine, steps in rows}
    first = separators["Det."]
    stems, rate, channels = first.stems, first.sample_rate, first.config["channels"]
    separate = {"Mixture": mixture_as_estimate(stems), **{name: s.separate for name, s in separators.items()}}
    return {name: evaluate(f, find_tracks(corpus, stems), stems, rate, channels) for name, f in separate.items()}


def main(model: Path, corpus: Path, table: Path, most: int = 4) -> None:
    if not table.exists():
        write_whole(table, json.dumps(measure(model, corpus, most), indent=1) + "\n")
    results = json.loads(table.read_text())
    first = results["Mixture"]
    stems = list(first["counts"]["sdr"])
    count = len(first["tracks"])
    print(f"\nSI-SDRi of active stems and SDR (dB), {count} tracks not trained on")
    print(f"{'':<15}" + "".join(f"{s:>9}" for s in [*stems, "average"]) + f"{'SDR':>9}{'RTF':>8}")
    for name, result in results.items():
        scores, sdr = result["aggregate"]["si_sdri_active"], result["aggregate"]["sdr"]["average"]
        values = [scores[s] for s in [*stems, "average"]]
        cells = "".join(f"{number(v):>9}" for v in [*values, sdr])
        print(f"{name:<15}{cells}{number(result['rtf']):>8}")
    print(f"\nall figures: {table}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
