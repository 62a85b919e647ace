"""The RoFormers that people use, on stereo audio, beside the PyPI package `BS-RoFormer` on PyTorch with the same sizes.

Random weights, one segment each; see `engines` for how it is measured. `msr bench bs_roformer` is the first of them on 3 s
of audio, and once on its segment of 11 s without the peer.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msr_jax.bench.builds import Build, has_module, older_build, own_build
from msr_jax.bench.engines import (
    OLDER,
    THREADS,
    Engine,
    limit_threads,
    matmul_rate,
    over_older,
    serve,
    take_rounds,
    take_turns,
)
from msr_jax.errors import UserError

RATE = 44_100
SECONDS = 3
TINY = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "num_stems": 2}
TINY_SAMPLES = 4410
PEER = "peer_float32"
WORKER = "msr_jax.bench.roformers"


class Shape(NamedTuple):
    """A public network: its family, what of its sizes is its own, and its segment in samples."""

    name: str
    own: dict[str, Any]
    segment: int


SHAPES = {
    # The official four stems.
    "bs_384_8": Shape("bs_roformer", {}, 485_100),
    # Six stems, as "SW".
    "bs_256_12_six": Shape(
        "bs_roformer",
        {"dim": 256, "depth": 12, "num_stems": 6, "stft_hop_length": 512, "mlp_expansion_factor": 4},
        588_800,
    ),
    # One stem, as Kim's vocals.
    "mel_384_6": Shape("mel_band_roformer", {"depth": 6, "num_stems": 1}, 352_800),
    # Four stems, "large".
    "mel_384_8_four": Shape(
        "mel_band_roformer",
        {"stft_n_fft": 4096, "stft_hop_length": 882, "stft_win_length": 4096, "skip_connection": True},
        661_500,
    ),
}


def sizes_of(shape: str, is_tiny: bool = False) -> dict[str, Any]:
    """The `model` section of one of `SHAPES`, without dropout."""
    from msr_jax.config import bsrf_base

    of_bands = ("freqs_per_bands",) if SHAPES[shape].name != "bs_roformer" else ()
    sizes = {k: v for k, v in bsrf_base().model.to_dict().items() if k not in of_bands}
    sizes |= {"name": SHAPES[shape].name, "attn_dropout": 0.0, "ff_dropout": 0.0, "remat": False}
    if of_bands:
        sizes |= {"num_bands": 12 if is_tiny else 60, "mlp_expansion_factor": 4}
    return {**sizes, **SHAPES[shape].own, **(TINY if is_tiny else {})}


def count_flops(sizes: Mapping[str, Any], samples: int) -> float:
    """Floating-point operations of the products of one pass of the separator on one segment; two for a product and sum."""
    from msr_jax.weights.roformer_names import published_network

    net = published_network(sizes, "deterministic")
    frames, bands = 1 + samples // net.stft_hop_length, len(net.band_widths)
    dim, width, hidden = net.dim, net.heads * net.dim_head, net.dim * net.mlp_expansion_factor
    tokens, values = frames * bands, 2 * net.channels * sum(net.band_widths)
    linears = tokens * (4 * dim * width + dim * net.heads + 8 * dim * dim)
    time, freq = net.time_transformer_depth, net.freq_transformer_depth
    attention = 2 * width * (time * bands * frames**2 + freq * frames * bands**2)
    inner = net.mask_linears - 1
    head = tokens * dim * hidden + (inner - 1) * tokens * hidden**2 + frames * hidden * 2 * values if inner else 0
    layers = net.depth * ((time + freq) * linears + attention)
    return 2.0 * (layers + frames * values * dim + net.num_stems * head)


def _jax_pass(
    sizes: Mapping[str, Any], precision: str, samples: int
) -> tuple[Callable[[], None], dict[str, Any], Callable[[], float]]:
    from msr_jax.machine import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from msr_jax.models.backbone import compute_dtype, make_backbone, stored
    from msr_jax.weights.model_folder import flatten, unflatten

    backbone = make_backbone(sizes, precision)
    leaves = flatten(jax.eval_shape(lambda: backbone.init(jax.random.key(0), False)))
    computed = compute_dtype(precision)
    # One array after another, so that the float32 originals do not count into the peak. Values do not matter here.
    rng = np.random.default_rng(0)
    random = lambda shape: rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2 if len(shape) > 1 else -1])
    drawn = {
        name: jnp.asarray(stored(name, random(leaf.shape), computed, backbone.looped)) for name, leaf in leaves.items()
    }
    params = unflatten(drawn)
    x = 0.1 * jax.random.normal(jax.random.key(1), (1, samples, 2))
    forward = jax.jit(lambda p, x: backbone.separate(p, x)[0]).lower(params, x).compile()
    computed_in = str(computed)
    about = {"parameters": sum(leaf.size for leaf in leaves.values()), "computed_in": computed_in}
    return lambda: jax.block_until_ready(forward(params, x)), about, matmul_rate(computed_in)


def make_peer(sizes: Mapping[str, Any]) -> Any:
    """The PyPI package's network of these sizes, in evaluation mode.

    It has no skip connections. A BS-RoFormer's mask estimators are made anew, for the package fixes their width.
    """
    import torch
    from bs_roformer import BSRoformer, MelBandRoformer
    from bs_roformer.bs_roformer import MaskEstimator

    same: tuple[str, ...] = ("dim", "depth", "stereo", "num_stems", "dim_head", "heads", "mask_estimator_depth")
    same += ("time_transformer_depth", "freq_transformer_depth")
    same += ("stft_n_fft", "stft_hop_length", "stft_win_length")
    fields = {name: sizes[name] for name in same}
    if sizes["name"] == "mel_band_roformer":
        more = {name: sizes[name] for name in ("linear_transformer_depth", "num_bands")}
        return MelBandRoformer(**fields, **more).eval()
    net = BSRoformer(**fields, freqs_per_bands=sizes["freqs_per_bands"])
    widths = tuple(2 * (2 if sizes["stereo"] else 1) * width for width in sizes["freqs_per_bands"])
    options = {"depth": sizes["mask_estimator_depth"], "mlp_expansion_factor": sizes["mlp_expansion_factor"]}
    heads = [MaskEstimator(dim=sizes["dim"], dim_inputs=widths, **options) for _ in range(sizes["num_stems"])]
    net.mask_estimators = torch.nn.ModuleList(heads)
    return net.eval()


def _torch_pass(sizes: Mapping[str, Any], precision: str, samples: int) -> tuple[Callable[[], None], dict, None]:
    import torch

    torch.set_num_threads(THREADS)
    net, x = make_peer(sizes), 0.1 * torch.randn(1, 2, samples)

    def forward() -> None:
        with torch.inference_mode():
            net(x)

    tables = {p.data_ptr(): p for p in net.parameters()}  # the rotary tables are shared
    return forward, {"parameters": sum(p.numel() for p in tables.values()), "computed_in": precision}, None


def worker(engine: str, shape: str, precision: str, samples: int, is_tiny: bool) -> None:
    """One engine's process."""
    limit_threads()
    forward, about, rate = (_jax_pass if engine == "jax" else _torch_pass)(sizes_of(shape, is_tiny), precision, samples)
    serve(forward, about, warm_up=1, rate=rate)


def compare(shape: str, args: argparse.Namespace, samples: int, with_peer: bool = True) -> list[dict[str, Any]]:
    """Rows of one shape: ours in both precisions over the peer in float32, and the peer's own.

    Raises:
      UserError: the peer is wanted and not installed, `--against` names no build with this shape, or an engine fails.
    """
    rest = [str(samples), *(["--tiny"] if args.tiny else [])]
    own = {f"{shape}_{p}": Engine(WORKER, ["jax", shape, p, *rest]) for p in ("float32", "bfloat16")}
    engines = dict(own)
    if with_peer and not args.no_peer:
        if not all(importlib.util.find_spec(name) for name in ("torch", "bs_roformer")):
            raise UserError("the peer is not installed: pip install 'msr_jax[torch]', or give --no-peer")
        engines[f"{shape}_{PEER}"] = Engine(WORKER, ["torch", shape, "float32", *rest])
    with tempfile.TemporaryDirectory() as folder:
        if args.against:
            older, this = older_build(args.against, Path(folder)), own_build(Path(folder))
            engines |= {name: engine._replace(build=this) for name, engine in own.items()}
            engines |= {name + OLDER: _of_older(engine, older) for name, engine in own.items()}
            timings = take_rounds(engines, args.repeats)
        else:
            timings = take_turns(engines, args.repeats if with_peer else 1)
    return _rows(timings, sizes_of(shape, args.tiny), samples)


def _of_older(engine: Engine, build: Build) -> Engine:
    """The older build's engine. Builds from before this benchmark have the BS-RoFormer's alone, which knows one shape."""
    if has_module(build, WORKER):
        return engine._replace(build=build)
    kind, shape, *rest = engine.arguments
    if shape != "bs_384_8":
        raise UserError(
            f"the build that --against names has no benchmark of {shape}; `msr bench bs_roformer` compares with it"
        )
    return Engine("msr_jax.bench.bs_roformer", [kind, *rest], build)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, shape by shape; UserError as of `compare`."""
    rows = []
    for shape in SHAPES:
        samples = round(args.seconds * RATE) if args.seconds else SHAPES[shape].segment
        rows += compare(shape, args, TINY_SAMPLES if args.tiny else samples)
    return rows


def _rows(timings: Mapping[str, Any], sizes: Mapping[str, Any], samples: int) -> list[dict[str, Any]]:
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    peer = next((name for name in timings if name.endswith(PEER)), None)
    flops = count_flops(sizes, samples)
    rows = []
    for name, timing in timings.items():
        rate = statistics.median(timing.rates) or None
        shares = [flops / took / rate for took, rate in zip(timing.seconds, timing.rates, strict=True) if rate]
        rows.append(
            {
                "name": name,
                "seconds": medians[name],
                "speedup_over_peer": medians[peer] / medians[name] if peer and name != peer else None,
                "peak_memory_bytes": timing.peak,
                "speedup_over_older": over_older(timings, name),
                "rtf": medians[name] / (samples / RATE),
                "flops": flops,
                "computed_in": timing.about.get("computed_in"),  # the first builds did not say
                "matmul_rate": rate,
                "share_of_matmul_rate": statistics.median(shares) if shares else None,
                "parameters": timing.about["parameters"],
                "all_seconds": timing.seconds,
            }
        )
    return rows


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), "--tiny" in sys.argv)
