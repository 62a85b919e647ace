"""A song through the official-size BS-RoFormer as a whole command, beside the PyPI package `BS-RoFormer` on PyTorch.

Random weights, the same for all: `msr separate` reads a model folder, the peer a state dict. Every run is a process of its own
on two cores of the CPU, which reads a stereo song and ends with the stems on disk. The peer goes through the song as the public
training code does, with segments of the same length and overlap: a minute is 10 of them here, and 13 there, which pads it first.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.bench.engines import THREADS, limit_threads
from msr_jax.bench.roformers import PEER, RATE, SHAPES, TINY_SAMPLES, make_peer, sizes_of
from msr_jax.bench.separate import Build, Run, make_song, run_build
from msr_jax.errors import UserError

SHAPE = "bs_384_8"
SECONDS = 60.0
PRECISIONS = ("float32", "bfloat16")
OVERLAPPING = 2  # segments that cover a sample
PEER_PROGRAM = "from msr_jax.bench.song import peer; peer()"


def peer() -> None:
    """The other program's process: a song to its stems on disk. Arguments: as `run_build` gives them, and then its own."""
    import soundfile
    import torch

    from msr_jax.separate.demix import Demix, demix

    song, out = Path(sys.argv[2]), Path(sys.argv[4])
    weights, segment, size = sys.argv[7:]
    torch.set_num_threads(THREADS)
    net = make_peer(sizes_of(SHAPE, size == "tiny"))
    net.load_state_dict(torch.load(weights, weights_only=True))
    audio, rate = soundfile.read(song, dtype="float32", always_2d=True)

    def separate(chunks: np.ndarray, _: int) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(chunks).mT).mT.numpy()

    (out / song.stem).mkdir(parents=True)
    for k, stem in enumerate(demix(separate, audio, int(segment), Demix(OVERLAPPING, batch_size=1))):
        soundfile.write(out / song.stem / f"stem{k}.wav", stem, rate, subtype="FLOAT")


def _write_model(folder: Path, segment: int, is_tiny: bool) -> None:
    """A model folder with random weights."""
    import jax

    from msr_jax.config import bsrf_base
    from msr_jax.models.backbone import make_backbone
    from msr_jax.weights.model_folder import save_model

    sizes = sizes_of(SHAPE, is_tiny)
    config = {**bsrf_base().to_dict(), "model": sizes, "segment": segment, "method": "deterministic"}
    config["stems"] = config["stems"][: sizes["num_stems"]]
    params = jax.tree.map(np.asarray, jax.jit(lambda: make_backbone(sizes).init(jax.random.key(0), False))())
    save_model(folder, config, {"deterministic": params})


def _export(model: Path, weights: Path) -> None:
    command = [sys.executable, "-m", "msr_jax.cli", "export", str(model), "--format", "msst", "-o", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the peer's weights cannot be written: {done.stderr.strip()[-400:]}")


def runs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Run]]:
    """(row, one run of it), in turns; byte code and compiled programs are there before the first."""
    model, weights = folder / "model", folder / "peer.pt"
    segment = TINY_SAMPLES if args.tiny else SHAPES[SHAPE].segment
    # Elsewhere: a process's peak begins with that of the one that starts it.
    maker = get_context("spawn").Process(target=_write_model, args=(model, segment, args.tiny))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise UserError("the model cannot be written; its message stands above")
    song = make_song(folder / "song.wav", args.seconds or (3 * TINY_SAMPLES / RATE if args.tiny else SECONDS), [])
    short = make_song(folder / "short.wav", 0.6 * segment / RATE, [])
    own = Build(sys.executable, Path(__file__).resolve().parents[2], folder / "home")
    overlap = ("--overlap", str(1 - 1 / OVERLAPPING))
    cases: dict[str, tuple[Build, tuple[str, ...]]] = {
        f"song_{p}": (own._replace(options=("--model", str(model), "--dtype", p, *overlap)), ()) for p in PRECISIONS
    }
    if not args.no_peer:
        _export(model, weights)
        options = (str(weights), str(segment), "tiny" if args.tiny else "official")
        cases[PEER] = (own._replace(options=options), (PEER_PROGRAM,))
    once = lambda build, program, song: run_build(build, [song], folder / "out", "none", folder / "byte_code", *program)
    for build, program in cases.values():
        once(build, program, short)
    for _ in range(args.repeats):
        for name, (build, program) in cases.items():
            yield name, once(build, program, song)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours in both precisions over the peer in float32, and the peer's own.

    Raises:
      UserError: the peer is wanted and not installed, or a process fails.
    """
    if not args.no_peer and not all(importlib.util.find_spec(name) for name in ("torch", "bs_roformer")):
        raise UserError("the peer is not installed: pip install 'msr_jax[torch]', or give --no-peer")
    limit_threads()
    os.environ["JAX_PLATFORMS"] = "cpu"
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as name:
        for case, took in runs(args, Path(name)):
            found.setdefault(case, []).append(took)
            print(f"{case:<32}{took.seconds:8.2f} s", flush=True)
    seconds = args.seconds or (3 * TINY_SAMPLES / RATE if args.tiny else SECONDS)
    peer_took = statistics.median(run.seconds for run in found[PEER]) if PEER in found else None
    return [_row(case, took, peer_took, seconds) for case, took in found.items()]


def _row(case: str, took: Sequence[Run], peer_took: float | None, seconds: float) -> dict[str, Any]:
    median = statistics.median(run.seconds for run in took)
    return {
        "name": case,
        "seconds": median,
        "speedup_over_peer": peer_took / median if peer_took and case != PEER else None,
        "cpu_seconds": statistics.median(run.cpu for run in took),
        "peak_memory_bytes": max(run.peak for run in took),
        "rtf": median / seconds,
        "first_stem_seconds": statistics.median(run.first_stem for run in took),
        "all_seconds": [run.seconds for run in took],
    }
