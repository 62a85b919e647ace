"""The demo's table: mixture, deterministic model and its refinements on the held-out tracks. Called by demo.sh."""

import json
import sys
from pathlib import Path

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


def main(out: Path) -> None:
    model = out / "consistency"
    separators = {name: msr_jax.load(model, refine, steps) for name, refine, steps in ROWS}
    stems = separators["Det."].stems
    tracks = find_tracks(out / "corpus" / "test", stems)
    separate = {"Mixture": mixture_as_estimate(stems), **{name: s.separate for name, s in separators.items()}}
    results = {name: evaluate(function, tracks, stems, 22_050) for name, function in separate.items()}
    (out / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"\nSI-SDRi of active stems (dB) and SDR (dB), {len(tracks)} tracks whose pieces and instruments were not trained on"
    )
    print(f"{'':<15}" + "".join(f"{s:>9}" for s in [*stems, "average"]) + f"{'SDR':>9}{'RTF':>8}")
    for name, result in results.items():
        scores, sdr = result["aggregate"]["si_sdri_active"], result["aggregate"]["sdr"]["average"]
        cells = "".join(f"{scores[s]:9.2f}" if scores[s] is not None else f"{'–':>9}" for s in [*stems, "average"])
        print(f"{name:<15}{cells}{sdr:9.2f}{result['rtf']:8.2f}")
    print(f"\nstems of {out}/song.flac: {out}/stems/song/   model: {model}/model   all figures: {out}/table.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
