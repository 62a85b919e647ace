"""What the rest of the package knows of a network: a backbone is a named tuple of functions over parameter trees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from msr_jax.errors import UserError

Array = jax.Array


class Backbone(NamedTuple):
    """Functions of one network family. Waveforms are (batch, time, channels) float32.

    init(key, timed, conditioned=timed) -> params: nested dict of float32 arrays. `timed` adds the noise-level input,
      `conditioned` what takes features in.
    separate(params, mixture, label, key=None) -> (estimate, features): the deterministic network. The estimate is
      (batch, stems, time, channels) where `stems_together`, and `label` is not used; else the stem that each example's
      label (batch, stems) names, of mixture's shape.
    condition(params, features) -> conditioning: what a refining network takes from the features; to be computed once for
      all noise levels and stems.
    refine(params, x, label, tau, conditioning, key=None) -> y of x's shape: a refining network. `tau` (batch,) is ln(σ)/4,
      or None in a network without noise level. Example i has row i mod rows of label (rows, stems). The
      conditioning is of batch/k mixtures, each for k examples one after another.
    length_multiple: samples that `time` must be a multiple of; min_length: the fewest samples.
    stems_together: whether one call of the deterministic network gives all stems.
    defer(params, features) -> conditioning: `condition` for a network in training, where to compute some of it within `refine`
      takes less memory; None where it does not.
    exact: names in the tree of parameters that compute in float32, whatever the network computes in.
    looped: how the paths of those parameters begin that are taken slice by slice; of bfloat16 ones it then takes the bits too, see
      `slices`.

    within(samples) -> Backbone: the same network for inference on segments longer than so many samples, in which softmax attention
      along time, in each layer, goes no farther than in those; None where there is none.

    `key` is of dropout, in training; None runs without.
    """

    init: Callable[..., Any]
    separate: Callable[..., tuple[Array, Any]]
    condition: Callable[[Any, Any], Any]
    refine: Callable[..., Array]
    length_multiple: int = 1
    min_length: int = 1
    stems_together: bool = False
    defer: Callable[[Any, Any], Any] | None = None
    exact: tuple[str, ...] = ()
    looped: tuple[str, ...] = ()
    within: Callable[[int], "Backbone"] | None = None

    def check_length(self, samples: int) -> None:
        """Raises UserError unless a segment of so many samples goes through the network."""
        if samples <= 0 or samples % self.length_multiple:
            raise UserError(
                f"a segment of {samples} samples does not fit this network: take a multiple of {self.length_multiple}"
            )
        if samples < self.min_length:
            raise UserError(f"a segment of {samples} samples is too short for this network: it takes {self.min_length}")


def read_fields(sizes: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """Sizes as a network's constructor takes them, lists as tuples; UserError for a field that is not among `known`."""
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise UserError(f"the model config has unknown fields: {', '.join(unknown)}")
    return {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in sizes.items()}
