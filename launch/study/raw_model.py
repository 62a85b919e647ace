"""The model of a run with its last parameters instead of their average: `python launch/study/raw_model.py RUN OUT`."""

import json
import sys
from pathlib import Path

import jax

from msr_jax.models.backbone import make_backbone
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.sharding import gather, make_mesh
from msr_jax.train.stage import load_frozen, make_stage
from msr_jax.weights.model_folder import save_model


def main(run: Path, out: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    backbone, frozen = make_backbone(config["model"], config["compute_dtype"]), load_frozen(config)
    mesh = make_mesh(config["mesh"])
    with jax.set_mesh(mesh):
        stage = make_stage(config, backbone, frozen, mesh)
        with Checkpoints(run / "checkpoints", config["train"]["keep"]) as checkpoints:
            state = checkpoints.restore(stage.abstract)
    save_model(out, config, {**frozen, config["method"]: gather(state.params)})
    print(f"wrote {out}: step {int(state.step)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
