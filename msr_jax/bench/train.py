"""A training step of the official U-Net or of another stage: time, utilisation and memory on the device at hand.

Utilisation is the compiled step's own FLOP count over its time, as a share of two rates: the chip's data sheet, and a large
bfloat16 matrix product measured in the same run. `--config FILE.py` takes another config, `--batch` another batch; networks
that it builds on are drawn where its `init_from` names none.
"""

import argparse
import statistics
import time
from typing import Any

from msr_jax.bench.engines import matmul_rate, peak_memory
from msr_jax.bench.unet import TINY

BATCH = 50


def _config(args: argparse.Namespace) -> dict[str, Any]:
    from msr_jax.config import unet_base
    from msr_jax.config_files import read_config

    config = read_config(args.config, []) if args.config else unet_base().to_dict()
    config["data"]["batch"] = args.batch or (2 if args.tiny else BATCH)
    config["train"]["steps_per_dispatch"] = 1
    config["optim"]["accumulate"] = 1
    if args.tiny and config["model"]["name"] == "unet1d":
        config["model"].update({k: tuple(v) if isinstance(v, list) else v for k, v in TINY.items()})
        config["segment"] = config["data"]["crop"] = 2048
    return config


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: seconds of a step, median of `args.repeats` after two that warm up.

    Raises:
      UserError: a config that does not fit the devices.
    """
    import jax
    import numpy as np

    from msr_jax.models.backbone import make_backbone
    from msr_jax.plan.chips import peak_flops
    from msr_jax.plan.flops import count_flops
    from msr_jax.train.sharding import make_mesh, put, stacked_batch_sharding
    from msr_jax.train.stage import BUILDS_ON, as_inputs, load_frozen, make_stage, place_frozen
    from msr_jax.weights.model_folder import inputs_of

    config = _config(args)
    mesh = make_mesh(config["mesh"])
    backbone = make_backbone(config["model"], config["compute_dtype"])
    source, networks = BUILDS_ON.get(config["method"], ("deterministic", ()))
    if config["init_from"][source]:
        frozen = load_frozen(config)
    else:  # time and memory of a step do not depend on the weights that it builds on
        drawn = {name: backbone.init(jax.random.key(k), *inputs_of(name)) for k, name in enumerate(networks)}
        frozen = jax.device_get(drawn)
    stage = make_stage(config, backbone, frozen, mesh)
    inputs = as_inputs(place_frozen(config, frozen, mesh))
    lead, stems = (1, 1, config["data"]["batch"]), len(config["stems"])
    rng = np.random.default_rng(0)
    host = {
        "stems": 0.1 * rng.standard_normal((*lead, stems, config["data"]["crop"], config["channels"]), np.float32),
        "label": np.broadcast_to(np.eye(stems, dtype=np.float32)[:1], (*lead, stems)),
    }
    batches = put(host, {name: stacked_batch_sharding(mesh) for name in host})
    state = stage.start()
    with jax.set_mesh(mesh):
        traced = stage.steps.trace(state, inputs, batches)
        program = traced.lower().compile()
    every = []
    for _ in range(args.repeats + 2):
        began = time.perf_counter()
        state, metrics = program(state, inputs, batches)
        np.asarray(metrics["loss"])
        every.append(time.perf_counter() - began)
    seconds, flops = statistics.median(every[2:]), count_flops(traced.jaxpr) / mesh.size
    measured = matmul_rate("bfloat16", 256 if args.tiny else 8192)()
    device = jax.devices()[0]
    sheet = peak_flops(device.device_kind)
    memory = device.memory_stats() or {}
    row = {
        "name": f"train_{config['method']}_{config['compute_dtype']}",
        "seconds": seconds,
        "speedup_over_peer": None,
        "peak_memory_bytes": memory.get("peak_bytes_in_use") or peak_memory(),
        "device": device.device_kind,
        "devices": mesh.size,
        "batch": config["data"]["batch"],
        "flops_per_device": flops,
        "matmul_flops_per_second": measured,
        "utilisation_of_matmul": flops / seconds / measured,
        "mfu": flops / seconds / sheet if sheet else None,
        "all_seconds": every[2:],
    }
    share = f", {row['mfu']:.1%} of the data sheet" if sheet else ""
    print(
        f"{mesh.size} × {device.device_kind}: {flops:.4g} FLOPs per device in {seconds:.3f} s = "
        f"{row['utilisation_of_matmul']:.1%} of the measured matrix product ({measured / 1e12:.1f} TFLOP/s){share}"
    )
    return [row]
