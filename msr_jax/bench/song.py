"""A song through the official-size BS-RoFormer as a whole command, beside the PyPI package `BS-RoFormer` on PyTorch.

Random weights, the same for all: `msr separate` reads a model folder, the peer a state dict. Every run is a process of its own,
which reads a stereo song and ends with the stems on disk. The peer goes through the song as the public training code does:
segments of the same length and overlap, one at a time, faded over a tenth at both ends and divided by the sum of fades.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.bench.engines import THREADS, limit_threads
from msr_jax.bench.roformers import PEER, RATE, TINY_SAMPLES, make_peer, sizes_of
from msr_jax.bench.separate import Build, Run, make_song, run_build
from msr_jax.errors import UserError

SHAPE = "bs_384_8"
SECONDS = 60.0
FADE = 10  # of a segment, at each end
OWN = ("float32", "bfloat16")


def faded_sum(
    separate: Callable[[np.ndarray], np.ndarray], song: np.ndarray, segment: int, overlap: float
) -> np.ndarray:
    """(channels, samples) -> (stems, channels, samples): overlapping segments, faded, over the sum of their fades.

    Args:
      separate: (channels, segment) -> (stems, channels, segment).
    """
    step = max(1, round(segment * (1 - overlap)))
    samples, around = song.shape[1], segment - step
    padded = np.pad(song, ((0, 0), (around, around)), mode="reflect" if samples > around else "constant")
    fade = np.minimum(1, (1 + np.arange(segment)) / max(1, segment // FADE))
    fade = np.minimum(fade, fade[::-1]).astype(np.float32)
    total = weight = None
    for start in range(0, max(1, padded.shape[1] - around), step):
        part = padded[:, start : start + segment]
        stems = separate(np.pad(part, ((0, 0), (0, segment - part.shape[1]))))[..., : part.shape[1]]
        if total is None or weight is None:
            total = np.zeros((len(stems), *padded.shape), np.float32)
            weight = np.zeros(padded.shape[1], np.float32)
        total[..., start : start + segment] += fade[: part.shape[1]] * stems
        weight[start : start + segment] += fade[: part.shape[1]]
    assert total is not None and weight is not None
    return (total / weight)[..., around : around + samples]


def peer(weights: Path, song: Path, out: Path, segment: int, overlap: float, is_tiny: bool) -> None:
    """The other program's process, from the song to its stems on disk."""
    import soundfile
    import torch

    limit_threads()
    torch.set_num_threads(THREADS)
    net = make_peer(sizes_of(SHAPE, is_tiny))
    net.load_state_dict(torch.load(weights, weights_only=True))
    audio, rate = soundfile.read(song, dtype="float32", always_2d=True)

    def separate(part: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(part)[None])[0].numpy()

    (out / song.stem).mkdir(parents=True)
    for k, stem in enumerate(faded_sum(separate, audio.T, segment, overlap)):
        soundfile.write(out / song.stem / f"stem{k}.wav", stem.T, rate, subtype="FLOAT")


def _write_model(folder: Path, segment: int, is_tiny: bool) -> tuple[Path, float]:
    """A model folder with random weights, and the overlap that it is separated with."""
    import jax

    from msr_jax.config import bsrf_base
    from msr_jax.models.backbone import make_backbone
    from msr_jax.separate.engine import OVERLAP
    from msr_jax.weights.model_folder import save_model

    sizes = sizes_of(SHAPE, is_tiny)
    config = {**bsrf_base().to_dict(), "model": sizes, "segment": segment, "method": "deterministic"}
    config["stems"] = config["stems"][: sizes["num_stems"]]
    params = jax.tree.map(np.asarray, jax.jit(lambda: make_backbone(sizes).init(jax.random.key(0), False))())
    save_model(folder, config, {"deterministic": params})
    return folder, OVERLAP


def runs(args: argparse.Namespace, folder: Path, segment: int) -> Iterator[tuple[str, Run]]:
    """(row, one run of it), in turns; compiled programs are there before the first."""
    model, overlap = _write_model(folder / "model", segment, args.tiny)
    song = make_song(folder / "song.wav", args.seconds or (TINY_SAMPLES * 3 / RATE if args.tiny else SECONDS), [])
    own = Build(sys.executable, Path(__file__).resolve().parents[2], folder / "home")
    options = lambda dtype: ("--model", str(model), "--dtype", dtype, "--overlap", str(overlap))
    short = make_song(folder / "short.wav", 1.5 * segment / RATE, [])
    cases = {f"song_{dtype}": own._replace(options=options(dtype)) for dtype in OWN}
    for build in cases.values():
        run_build(build, [short], folder / "out", "none", folder / "byte_code")
    weights = folder / "peer.pt"
    if not args.no_peer:
        export = [sys.executable, "-m", "msr_jax.cli", "export", str(model), "--format", "msst", "-o", str(weights)]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    program = (
        f"import sys; from pathlib import Path; from msr_jax.bench.song import peer; peer(Path({str(weights)!r}), "
    )
    program += f"Path(sys.argv[2]), Path(sys.argv[4]), {segment}, {overlap}, {args.tiny})"
    for _ in range(args.repeats):
        for name, build in cases.items():
            yield name, run_build(build, [song], folder / "out", "none", folder / "byte_code")
        if not args.no_peer:
            yield PEER, run_build(own, [song], folder / "out", "none", folder / "byte_code", program)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours in both precisions over the peer in float32, and the peer's own.

    Raises:
      UserError: the peer is wanted and not installed, or a process fails.
    """
    if not args.no_peer and not all(importlib.util.find_spec(name) for name in ("torch", "bs_roformer")):
        raise UserError("the peer is not installed: pip install 'msr_jax[torch]', or give --no-peer")
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as name:
        for case, took in runs(args, Path(name), TINY_SAMPLES if args.tiny else bsrf_segment()):
            found.setdefault(case, []).append(took)
            print(f"{case:<32}{took.seconds:8.2f} s", flush=True)
    median = lambda case: statistics.median(run.seconds for run in found[case])
    return [_row(case, took, median(PEER) if PEER in found else None, args) for case, took in found.items()]


def bsrf_segment() -> int:
    """Samples of the official segment."""
    from msr_jax.bench.roformers import SHAPES

    return SHAPES[SHAPE].segment


def _row(case: str, took: Sequence[Run], peer_seconds: float | None, args: argparse.Namespace) -> dict[str, Any]:
    seconds = statistics.median(run.seconds for run in took)
    return {
        "name": case,
        "seconds": seconds,
        "speedup_over_peer": peer_seconds / seconds if peer_seconds and case != PEER else None,
        "cpu_seconds": statistics.median(run.cpu for run in took),
        "peak_memory_bytes": max(run.peak for run in took),
        "first_stem_seconds": statistics.median(run.first_stem for run in took),
        "all_seconds": [run.seconds for run in took],
    }
