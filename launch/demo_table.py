"""Table of a mixture, its deterministic model and the refinements on held-out tracks. Called by demo.sh and small_bsrf.sh.

Figures that are there already are printed again.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import msr_jax
from msr_jax.data.tracks import find_tracks
from msr_jax.infer.evaluate import evaluate, mixture_as_estimate

ROWS = (
    ("Det.", "none", None),
    ("Det.+Diff.", "diffusion", None),
    ("Det.+CD T = 1", "consistency", 1),
    ("Det.+CD T = 2", "consistency", 2),
    ("Det.+CD T = 4", "consistency", 4),
)


def measure(model: Path, corpus: Path) -> dict[str, Any]:
    separators = {name: msr_jax.load(model, refine, steps) for name, refine, steps in ROWS}
    first = separators["Det."]
    stems, rate, channels = first.stems, first.sample_rate, first.config["channels"]
    separate = {"Mixture": mixture_as_estimate(stems), **{name: s.separate for name, s in separators.items()}}
    return {name: evaluate(f, find_tracks(corpus, stems), stems, rate, channels) for name, f in separate.items()}


def main(out: Path) -> None:
    model, table = out / "consistency", out / "table.json"
    if not table.exists():
        results = measure(model, out / "corpus" / "test")
        beside = out / ".table.json.tmp"
        beside.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(beside, table)
    results = json.loads(table.read_text())
    first = results["Mixture"]
    stems = list(first["counts"]["sdr"])
    count = len(first["tracks"])
    print(f"\nSI-SDRi of active stems and SDR (dB), {count} tracks not trained on")
    print(f"{'':<15}" + "".join(f"{s:>9}" for s in [*stems, "average"]) + f"{'SDR':>9}{'RTF':>8}")
    for name, result in results.items():
        scores, sdr = result["aggregate"]["si_sdri_active"], result["aggregate"]["sdr"]["average"]
        values = [scores[s] for s in [*stems, "average"]]
        cells = "".join(f"{round(v, 2) + 0.0:9.2f}" if v is not None else f"{'–':>9}" for v in values)
        print(f"{name:<15}{cells}{sdr:9.2f}{result['rtf']:8.2f}")
    song = f"stems of {out}/song.flac: {out}/stems/song/   " if (out / "song.flac").exists() else ""
    print(f"\n{song}model: {model}/model   all figures: {table}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
