"""The deterministic U-Net's forward pass on one segment, beside `audio-diffusion-pytorch` on PyTorch.

See `engines` for how it is measured.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msr_jax.bench.builds import older_build, own_build
from msr_jax.bench.engines import OLDER, THREADS, Engine, limit_threads, over_older, serve, take_rounds, take_turns
from msr_jax.errors import UserError

SEGMENT = 262_144
TINY = {
    "channels": 16,
    "patch_factor": 8,
    "multipliers": [1, 2, 2],
    "factors": [2, 2],
    "num_blocks": [1, 1],
    "attentions": [False, True],
    "attention_heads": 2,
    "attention_features": 8,
    "resnet_groups": 4,
}
PEER = {"float32": "peer_float32", "bfloat16": "peer_bfloat16_autocast"}
OWN_FIELDS = ("name", "zero_init_output", "remat", "lora_rank")  # of a config's model that the peer has not


def _sizes(is_tiny: bool) -> tuple[dict[str, Any], int]:
    from msr_jax.config import unet_base

    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in unet_base().model.to_dict().items()}
    return (sizes | TINY, 2048) if is_tiny else (sizes, SEGMENT)


def _jax_pass(precision: str, is_tiny: bool) -> tuple[Callable[[], None], int]:
    from msr_jax.machine import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from msr_jax.models.backbone import cast_params, make_backbone

    sizes, samples = _sizes(is_tiny)
    backbone = make_backbone(sizes, precision)
    shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))
    leaves, tree = jax.tree.flatten(shapes)
    # One array after another, so that the float32 originals do not count into the peak. Values do not matter here.
    rng = np.random.default_rng(0)
    random = lambda shape: rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
    params = jax.tree.unflatten(tree, [cast_params(jnp.asarray(random(leaf.shape)), precision) for leaf in leaves])
    x, label = jax.random.normal(jax.random.key(1), (1, samples, 1)), jnp.eye(4)[:1]
    forward = jax.jit(lambda p, x, label: backbone.separate(p, x, label)[0]).lower(params, x, label).compile()
    return lambda: jax.block_until_ready(forward(params, x, label)), sum(leaf.size for leaf in leaves)


def _torch_pass(precision: str, is_tiny: bool) -> tuple[Callable[[], None], int]:
    import torch
    from audio_diffusion_pytorch import UNet1d

    torch.set_num_threads(THREADS)
    sizes, samples = _sizes(is_tiny)
    sizes = {k: v for k, v in sizes.items() if k not in OWN_FIELDS}
    fixed = {
        "patch_blocks": 1,
        "kernel_sizes_init": [1, 3, 7],
        "use_nearest_upsample": False,
        "use_context_time": False,
    }
    net = UNet1d(**sizes, **fixed, use_skip_scale=True, use_attention_bottleneck=True).eval()
    x, label = torch.randn(1, 1, samples), torch.eye(4)[:1]

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            net(x, features=label)

    return forward, sum(p.numel() for p in net.parameters())


def worker(engine: str, precision: str, is_tiny: bool) -> None:
    """One engine's process."""
    limit_threads()
    forward, count = (_jax_pass if engine == "jax" else _torch_pass)(precision, is_tiny)
    serve(forward, {"parameters": count})


def computed_in(engine: str, precision: str) -> str:
    """The precision that a row's products really have: a CPU without units for bfloat16 does our part in float32."""
    from msr_jax.models.backbone import compute_dtype

    return str(compute_dtype(precision)) if engine == "jax" else precision


def peer_has_bfloat16() -> bool:
    """Whether PyTorch computes in bfloat16 here at a pace worth waiting for: it uses AMX, and AVX-512 with bfloat16."""
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        features = set()
    return platform.machine() != "x86_64" or not features.isdisjoint(("amx_bf16", "avx512_bf16"))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours in both precisions over the peer's float32 and the peer's best, the peer's own and an older build's.

    Raises:
      UserError: the peer is wanted and not installed, `--against` names no build, or an engine fails.
    """
    engines = {"unet_float32": ("jax", "float32"), "unet_bfloat16": ("jax", "bfloat16")}
    if not args.no_peer:
        if not all(importlib.util.find_spec(name) for name in ("torch", "audio_diffusion_pytorch")):
            raise UserError("the peer is not installed: pip install 'msr_jax[torch]', or give --no-peer")
        engines |= {name: ("torch", precision) for precision, name in PEER.items()}
        if not peer_has_bfloat16():
            engines.pop(PEER["bfloat16"])
            print(f"{PEER['bfloat16']} is left out: without units for it, a pass takes minutes", flush=True)
    extra = ["--tiny"] if args.tiny else []
    started = {name: Engine("msr_jax.bench.unet", [*what, *extra]) for name, what in engines.items()}
    with tempfile.TemporaryDirectory() as folder:
        if args.against:
            own = {name: engine for name, engine in started.items() if engines[name][0] == "jax"}
            older, this = older_build(args.against, Path(folder)), own_build(Path(folder))
            started |= {name: engine._replace(build=this) for name, engine in own.items()}
            started |= {name + OLDER: engine._replace(build=older) for name, engine in own.items()}
        timings = (take_rounds if args.against else take_turns)(started, args.repeats)
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    peer = [medians[name] for name in PEER.values() if name in medians]
    over = {"unet_float32": peer[0], "unet_bfloat16": min(peer)} if peer else {}
    return [
        {
            "name": name,
            "seconds": medians[name],
            "speedup_over_peer": over[name] / medians[name] if name in over else None,
            "speedup_over_older": over_older(timings, name),
            "peak_memory_bytes": timing.peak,
            "parameters": timing.about["parameters"],
            "computed_in": computed_in(*engines[name.removesuffix(OLDER)]),
            "all_seconds": timing.seconds,
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], "--tiny" in sys.argv)
