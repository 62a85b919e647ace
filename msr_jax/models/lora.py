"""Low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) on any network's parameter tree.

Beside each matrix W (…, in, out) of attention and feed-forward stand two narrow ones, down (…, in, rank) and up (…, rank,
out); the network runs with W + down · up. They are a tree of their own, `params["lora"]`, and networks know nothing of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LORA = "lora"  # the adapters' place among the parameters
BLOCKS = ("attention", "feed_forward")
MATRICES = ("to_qkv", "to_q", "to_kv", "to_hidden", "to_out", "weight")


def _is_adapted(path: tuple[str, ...], leaf: Any) -> bool:
    in_block = any(part.startswith(BLOCKS) for part in path[:-1])
    return in_block and path[-1] in MATRICES and leaf.ndim > 1


def init_lora(key: jax.Array, params: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Adapters of every matrix in attention and feed-forward. `up` starts at zero: the network answers as without them."""

    def build(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in node.items():
            if isinstance(value, Mapping):
                if inner := build(value, (*path, name)):
                    made[name] = inner
            elif _is_adapted((*path, name), value):
                *leading, inputs, outputs = value.shape
                own = jax.random.fold_in(key, len(drawn))
                drawn.append(name)
                made[name] = {
                    "down": jax.random.uniform(own, (*leading, inputs, rank), minval=-1, maxval=1) / inputs**0.5,
                    "up": jnp.zeros((*leading, rank, outputs)),
                }
        return made

    drawn: list[str] = []
    return build(params, ())


def merge_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    """The network's own parameters, with its adapters added, if there are any, in float32."""

    def merge(node: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
        merged = dict(node)
        for name, own in lora.items():
            if isinstance(node[name], Mapping):
                merged[name] = merge(node[name], own)
            else:
                merged[name] = node[name] + jnp.matmul(own["down"], own["up"], precision="highest")
        return merged

    rest = {name: value for name, value in params.items() if name != LORA}
    return merge(rest, params[LORA]) if LORA in params else rest
