"""A consistency model blended with what its diffusion stage began with: `python launch/study/blend.py DIFFUSION RUN OUT --share 0.5`.

DIFFUSION and RUN are working directories of the two stages. SHARE of the parameters' way from that beginning is kept. Between a
trained network and its fine-tuned version lie networks that keep more of what the first could do with other data
(Wortsman et al., "Robust fine-tuning of zero-shot models", 2022); one of them costs what any other does.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from msr_jax.errors import UserError
from msr_jax.methods.stages import network_of
from msr_jax.models.backbone import make_backbone
from msr_jax.train.sharding import gather, make_mesh
from msr_jax.train.stage import load_frozen, load_start, make_stage
from msr_jax.weights.model_folder import load_model, save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("diffusion", type=Path, metavar="DIFFUSION")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        raise UserError(f"--share must lie between 0 and 1, not {args.share:g}")
    model, teacher = load_model(args.run), load_model(args.diffusion)
    config = json.loads((args.diffusion / "config.json").read_text())
    if config.get("method") != "diffusion" or "diffusion" not in model.weights or "consistency" not in model.weights:
        raise UserError(
            f"{args.diffusion} must be the --workdir of a diffusion stage, and {args.run} that of consistency on it"
        )
    same = jax.tree.map(np.array_equal, model.weights["diffusion"], teacher.weights["diffusion"])
    if not all(jax.tree.leaves(same)):
        raise UserError(f"{args.run} was not distilled from {args.diffusion}; name the run that its init_from names")
    mesh = make_mesh(config["mesh"])
    with jax.set_mesh(mesh):
        stage = make_stage(config, make_backbone(config["model"]), load_frozen(config), mesh, load_start(config))
        start = gather(stage.start().params)
    name = network_of(model.config, "consistency")  # the one that is sampled with
    blended = jax.tree.map(lambda a, b: a + args.share * (b - a), start, model.weights[name])
    save_model(args.out, model.config, {"deterministic": model.weights["deterministic"], name: blended})
    print(f"wrote {args.out}: {args.share:g} of the way to {args.run}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"blend.py: {error}")
