"""The deterministic BS-RoFormer on stereo audio, beside the PyPI package `BS-RoFormer` on PyTorch with the same sizes.

See `engines` for how it is measured. Besides 3 s of audio, the official segment of 11 s is run once, without the peer.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from msr_jax.bench.engines import THREADS, limit_threads, serve, take_turns
from msr_jax.errors import UserError

RATE = 44_100
SECONDS, SEGMENT_SECONDS = 3, 11
TINY = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "num_stems": 2}
TINY_SAMPLES = 4410
MATMUL = 2048  # rows and columns of the product that the machine's rate is measured by
PEER = "peer_float32"


def _sizes(is_tiny: bool) -> dict[str, Any]:
    from msr_jax.config import bsrf_base

    sizes = {**bsrf_base().model.to_dict(), "attn_dropout": 0.0, "ff_dropout": 0.0, "remat": False}
    return {**sizes, **TINY} if is_tiny else sizes


def count_flops(sizes: Mapping[str, Any], samples: int) -> float:
    """Floating-point operations of the products of one pass of the separator on one segment; two for a product and sum."""
    frames, bands = 1 + samples // sizes["stft_hop_length"], len(sizes["freqs_per_bands"])
    dim, width, hidden = sizes["dim"], sizes["heads"] * sizes["dim_head"], sizes["dim"] * sizes["mlp_expansion_factor"]
    tokens, values = frames * bands, 2 * (2 if sizes["stereo"] else 1) * sum(sizes["freqs_per_bands"])
    linears = tokens * (4 * dim * width + dim * sizes["heads"] + 8 * dim * dim)
    time, freq = sizes["time_transformer_depth"], sizes["freq_transformer_depth"]
    attention = 2 * width * (time * bands * frames**2 + freq * frames * bands**2)
    inner = sizes["mask_estimator_depth"] - 1
    head = tokens * dim * hidden + (inner - 1) * tokens * hidden**2 + frames * hidden * 2 * values if inner else 0
    layers = sizes["depth"] * ((time + freq) * linears + attention)
    return 2.0 * (layers + frames * values * dim + sizes["num_stems"] * head)


def _matmul_rate(precision: str) -> Callable[[], float]:
    """Measures operations per second of a large product in this precision, the best of five."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.dtype(precision))
    multiply = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32)).lower(x).compile()

    def measure() -> float:
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(multiply(x))
            best = min(best, time.perf_counter() - started)
        return 2.0 * MATMUL**3 / best

    measure()
    return measure


def _jax_pass(
    precision: str, is_tiny: bool, samples: int
) -> tuple[Callable[[], None], dict[str, Any], Callable[[], float]]:
    from msr_jax.runtime import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from msr_jax.models.backbone import cast_params, compute_dtype, make_backbone

    sizes = _sizes(is_tiny)
    backbone = make_backbone(sizes, precision)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: backbone.init(jax.random.key(0), False)))
    # One array after another, so that the float32 originals do not count into the peak. Values do not matter here.
    rng = np.random.default_rng(0)
    random = lambda shape: rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2 if len(shape) > 1 else -1])
    params = jax.tree.unflatten(
        tree, [cast_params(jnp.asarray(random(leaf.shape), jnp.float32), precision) for leaf in leaves]
    )
    x = 0.1 * jax.random.normal(jax.random.key(1), (1, samples, 2))
    forward = jax.jit(lambda p, x: backbone.separate(p, x)[0]).lower(params, x).compile()
    about = {"parameters": sum(leaf.size for leaf in leaves)}
    return lambda: jax.block_until_ready(forward(params, x)), about, _matmul_rate(str(compute_dtype(precision)))


def make_peer(sizes: Mapping[str, Any]) -> Any:
    """The PyPI package's network of these sizes, in evaluation mode; its mask estimators are made anew, for it fixes their width."""
    import torch
    from bs_roformer.bs_roformer import BSRoformer, MaskEstimator

    same: tuple[str, ...] = (
        "dim",
        "depth",
        "stereo",
        "num_stems",
        "time_transformer_depth",
        "freq_transformer_depth",
        "dim_head",
        "heads",
    )
    same += ("freqs_per_bands", "stft_n_fft", "stft_hop_length", "stft_win_length", "mask_estimator_depth")
    net = BSRoformer(**{name: sizes[name] for name in same})
    widths = tuple(2 * (2 if sizes["stereo"] else 1) * width for width in sizes["freqs_per_bands"])
    options = {"depth": sizes["mask_estimator_depth"], "mlp_expansion_factor": sizes["mlp_expansion_factor"]}
    heads = [MaskEstimator(dim=sizes["dim"], dim_inputs=widths, **options) for _ in range(sizes["num_stems"])]
    net.mask_estimators = torch.nn.ModuleList(heads)
    return net.eval()


def _torch_pass(precision: str, is_tiny: bool, samples: int) -> tuple[Callable[[], None], dict[str, Any], None]:
    import torch

    torch.set_num_threads(THREADS)
    net, x = make_peer(_sizes(is_tiny)), 0.1 * torch.randn(1, 2, samples)

    def forward() -> None:
        with torch.inference_mode():
            net(x)

    tables = {p.data_ptr(): p for p in net.parameters()}  # the rotary tables are shared
    return forward, {"parameters": sum(p.numel() for p in tables.values())}, None


def worker(engine: str, precision: str, samples: int, is_tiny: bool) -> None:
    """One engine's process."""
    limit_threads()
    forward, about, rate = (_jax_pass if engine == "jax" else _torch_pass)(precision, is_tiny, samples)
    serve(forward, about, warm_up=1, rate=rate)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours in both precisions over the peer in float32, the peer's own, and ours on the long segment.

    Raises:
      UserError: the peer is wanted and not installed, or an engine fails.
    """
    sizes, extra = _sizes(args.tiny), ["--tiny"] if args.tiny else []
    samples = TINY_SAMPLES if args.tiny else SECONDS * RATE
    engines = {f"bs_roformer_{p}": ["jax", p, str(samples), *extra] for p in ("float32", "bfloat16")}
    if not args.no_peer:
        if not all(importlib.util.find_spec(name) for name in ("torch", "bs_roformer")):
            raise UserError("the peer is not installed: pip install 'msr_jax[torch]', or give --no-peer")
        engines[PEER] = ["torch", "float32", str(samples), *extra]
    rows = _rows(take_turns("msr_jax.bench.bs_roformer", engines, args.repeats), sizes, samples)
    if not args.tiny:
        long = SEGMENT_SECONDS * RATE
        for precision in ("float32", "bfloat16"):  # one after the other: both at once may not fit into memory
            engine = {f"bs_roformer_{precision}_{SEGMENT_SECONDS}s": ["jax", precision, str(long)]}
            rows += _rows(take_turns("msr_jax.bench.bs_roformer", engine, 1), sizes, long)
    return rows


def _rows(timings: Mapping[str, Any], sizes: Mapping[str, Any], samples: int) -> list[dict[str, Any]]:
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    flops = count_flops(sizes, samples)
    rows = []
    for name, timing in timings.items():
        rate = statistics.median(timing.rates) or None
        shares = [flops / took / rate for took, rate in zip(timing.seconds, timing.rates, strict=True) if rate]
        rows.append(
            {
                "name": name,
                "seconds": medians[name],
                "speedup_over_peer": medians[PEER] / medians[name] if PEER in medians and name != PEER else None,
                "peak_memory_bytes": timing.peak,
                "rtf": medians[name] / (samples / RATE),
                "flops": flops,
                "matmul_rate": rate,
                "share_of_matmul_rate": statistics.median(shares) if shares else None,
                "parameters": timing.about["parameters"],
                "all_seconds": timing.seconds,
            }
        )
    return rows


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), "--tiny" in sys.argv)
