"""The models that a server offers, loaded when they are first used and kept."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS, SAMPLED, network_of
from msr_jax.separate.engine import Separator, load
from msr_jax.weights.model_folder import BUNDLED, load_model
from msr_jax.weights.registry import find_named

REST = "rest"  # what the stems leave of the song: with it they add up
DIAL = (1, 2, 4)  # refinement steps that are offered
BUNDLED_NAME = "bundled"


class Models:
    """Model folders, and public models by name."""

    def __init__(self, folders: list[str]):
        """Loads every model once.

        Raises:
          UserError: a folder is no model, or two have one name.
        """
        self.offers: dict[str, dict[str, Any]] = {}
        self._folders: dict[str, str] = {}
        self._own: dict[str, list[str]] = {}  # stems without the rest
        self._separators: dict[tuple[str, str, int | None], Separator] = {}
        self._lock = threading.Lock()
        for folder in folders or [str(BUNDLED)]:
            name = BUNDLED_NAME if folder == str(BUNDLED) else _name(folder)
            if name in self.offers:
                raise UserError(f"two models are named {name}; rename the folder of one")
            model = load_model(find_named(folder))
            held = [r for r in REFINEMENTS if network_of(model.config, r) in model.weights]
            self._folders[name], self._own[name] = folder, (stems := list(model.config["stems"]))
            self.offers[name] = {
                "name": name,
                "stems": stems if REST in stems else [*stems, REST],
                "sample_rate": model.config["sample_rate"],
                "channels": model.config["channels"],
                "refinements": held,
                "steps": list(DIAL) if set(SAMPLED) & set(held) else [],
            }

    def stems(self, name: str, refine: str, steps: int | None) -> list[str]:
        """Stems of a model; UserError where there is no such model or it cannot refine so."""
        if name not in self.offers:
            raise UserError(f"there is no model '{name}' here; there are {', '.join(self.offers)}")
        offer = self.offers[name]
        if refine not in offer["refinements"]:
            raise UserError(f"the model {name} cannot refine by '{refine}', only by {', '.join(offer['refinements'])}")
        if steps is not None and (refine not in SAMPLED or steps not in DIAL):
            raise UserError(f"steps must be one of {', '.join(map(str, DIAL))}, with refine consistency or diffusion")
        return offer["stems"]

    def separator(self, name: str, refine: str, steps: int | None) -> Separator:
        """The separator for these settings, made once; UserError where the model's folder is not what it was at the start."""
        key = (name, refine, steps)
        with self._lock:
            if key not in self._separators:
                residual = None if REST in self._own[name] else REST
                try:
                    self._separators[key] = load(find_named(self._folders[name]), refine, steps, residual=residual)
                except UserError as error:
                    # Of a folder that has changed since the start; its place is not for visitors.
                    print(f"msr serve: the model {name} cannot be loaded: {error}", flush=True)
                    raise UserError(f"the server cannot load its model {name} any more") from error
            return self._separators[key]

    def warm(self) -> None:
        """Compile what the first visitor would wait for: every model without refinement, on a chunk of a long stereo song."""
        for name in self.offers:
            separator = self.separator(name, "none", None)
            noise = np.random.default_rng(0).standard_normal((separator.segments * separator.segment, 2))
            separator.separate(0.1 * noise, separator.sample_rate)


def _name(folder: str) -> str:
    path = Path(folder).resolve()
    return path.parent.name if path.name == "model" else path.name
