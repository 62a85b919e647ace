"""`msr separate` as a whole, with the bundled model, beside an older build of this package.

Every run is a process of its own: what a user waits for, from the command to the stems on disk. The builds take turns. Each has a
folder of its own for what it keeps; byte code is kept, as installers leave it. A long stereo song runs with all of that there, once
more with `--one-mask`, a short one the first time (nothing kept) and the second.

With `--tracks`, songs are made of their mixtures, and the tracks are separated by both builds and scored.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msr_jax.bench.builds import Build, environment_of, older_build, own_build
from msr_jax.bench.engines import OLDER, peak_memory
from msr_jax.errors import UserError

RATE = 44_100  # Hz of the songs
LONG, SHORT = 180.0, 13.0  # seconds
TINY = 3.0  # seconds of both
REFINED = ("none", "consistency")
MAIN = "import sys; from msr_jax.cli import main; sys.exit(main())"  # of a build
OWN, ONE_MASK = "", "_one_mask"  # what a row's name ends with


class Run(NamedTuple):
    """One process: seconds, those until the first stem was there, CPU seconds, and bytes at the peak."""

    seconds: float
    first_stem: float
    cpu: float
    peak: int


def run_build(build: Build, songs: Sequence[Path], out: Path, refine: str, byte_code: Path, program: str = MAIN) -> Run:
    """Separate songs in a new process into a new folder `out`. Raises UserError if it fails.

    Args:
      program: Python that takes the arguments of `msr`.
    """
    shutil.rmtree(out, ignore_errors=True)
    environment = environment_of(build, ("PYTHONDONTWRITEBYTECODE",)) | {"PYTHONPYCACHEPREFIX": str(byte_code)}
    # Not `-m`: that would put the folder that one is in before the sources.
    command = [build.python, "-c", program, "separate"]
    command += [*map(str, songs), "-o", str(out), "--refine", refine, *build.options]
    first = None
    with tempfile.TemporaryFile() as told:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=out.parent, stdout=told, stderr=told)
        while True:
            number, status, used = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter() - started
            if first is None and any(not path.parent.name.startswith(".") for path in out.glob("*/[!.]*.wav")):
                first = now
            if number:
                break
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or first is None:
            told.seek(0)
            text = told.read().decode(errors="replace").strip()
            where = f"the build in {build.sources or build.python}"
            raise UserError(f"{where} ended with exit code {process.returncode}: {text[-400:]}")
    return Run(now, first, used.ru_utime + used.ru_stime, peak_memory(used))


def make_song(path: Path, seconds: float, tracks: Sequence[np.ndarray]) -> Path:
    """Write a stereo song of so many seconds: mixtures (samples, channels) one after another, or noise where there are none."""
    import soundfile

    samples = round(seconds * RATE)
    if tracks:
        left, right = (np.concatenate([track[:, c % track.shape[1]] for track in tracks]) for c in range(2))
        right = 0.8 * right + 0.2 * np.roll(right, RATE // 100)  # no network takes two channels for one
        song = np.resize(np.stack([left, right], 1), (samples, 2))
    else:
        song = 0.1 * np.random.default_rng(0).standard_normal((samples, 2), np.float32)
    soundfile.write(path, song, RATE, subtype="PCM_16")
    return path


def _flops_per_second_of_song(refine: str) -> float:
    """Operations of the products that the bundled model's segments take, each once, for a second of a stereo song."""
    import jax

    from msr_jax.methods.stages import make_refiner
    from msr_jax.models.backbone import make_backbone
    from msr_jax.plan.flops import count_flops
    from msr_jax.weights.model_folder import BUNDLED, load_model

    model = load_model(BUNDLED)
    config = model.config
    refiner = make_refiner(config, make_backbone(config["model"]), refine)
    mixture = jax.ShapeDtypeStruct((1, config["segment"], config["channels"]), np.float32)
    flops = count_flops(jax.make_jaxpr(refiner)(model.weights, mixture, jax.random.key(0)), "cpu")
    return flops * 2 / config["channels"] * config["sample_rate"] / config["segment"]


def _scores(builds: dict[str, Build], tracks: Sequence[Path], stems: Sequence[str], folder: Path) -> dict[str, Any]:
    """Mean SI-SDRi in dB and the number of stems that it is the mean of, by build and refinement."""
    import soundfile

    from msr_jax.evaluate.songs import format_of, load_estimates, load_references
    from msr_jax.metrics.si_sdr import score_windows

    found: dict[str, list[float]] = {}
    references, songs = {}, []
    for track in tracks:
        rate, channels, _ = format_of([track], stems)
        name = f"{track.parent.name}-{track.name}"
        references[name] = (load_references(track, stems, rate, channels), rate)
        songs.append(folder / f"{name}.wav")
        soundfile.write(songs[-1], references[name][0].sum(0).T, rate, subtype="FLOAT")
    for ending, build in builds.items():
        for refine in REFINED:
            out = folder / f"scored{ending}"
            run_build(build, songs, out, refine, folder / "byte_code")
            for name, (reference, rate) in references.items():
                estimates, _ = load_estimates(out / name, stems, reference, rate)
                scores = score_windows(estimates, reference, rate)
                sounding = [j for j in range(len(stems)) if not scores.silent[:, j].all()] if len(scores.start) else []
                means = [float(scores.si_sdri[~scores.silent[:, j], j].mean()) for j in sounding]
                found.setdefault(refine + ending, []).extend(means)
    return {key: (statistics.mean(values), len(values)) for key, values in found.items() if values}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours over the older build, and the older build's own.

    Raises:
      UserError: `--against` names no build, a build fails, or `--tracks` holds no tracks of the bundled model's stems.
    """
    from msr_jax.bench.engines import matmul_rate
    from msr_jax.data.tracks import find_tracks
    from msr_jax.evaluate.songs import format_of, load_references
    from msr_jax.weights.model_folder import BUNDLED, load_model

    long = args.seconds or (TINY if args.tiny else LONG)
    short = TINY if args.tiny else SHORT
    stems = load_model(BUNDLED).config["stems"]
    tracks = [track for folder in args.tracks or [] for track in find_tracks(folder, stems)]
    mixtures = []
    for track in tracks:
        channels = format_of([track], stems)[1]
        mixtures.append(load_references(track, stems, RATE, channels).sum(0).T)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = own_build(folder)
        builds = {OWN: own, ONE_MASK: own._replace(options=("--one-mask",))}
        if args.against:
            builds[OLDER] = older_build(args.against, folder)
        songs = {seconds: make_song(folder / f"song_{seconds:g}.wav", seconds, mixtures) for seconds in (long, short)}
        cases = {
            f"none_{long:g}s": ("none", long),
            f"consistency_{long:g}s": ("consistency", long),
            f"first_run_{short:g}s": ("none", short),
            f"second_run_{short:g}s": ("none", short),
        }
        once = lambda build, refine, seconds: run_build(
            build, [songs[seconds]], folder / "out", refine, folder / "byte_code"
        )
        for build in builds.values():  # byte code, and compiled programs where a build keeps them
            for refine in REFINED:
                once(build, refine, long)
        endings = {case: [e for e in builds if "run" not in case or e != ONE_MASK] for case in cases}
        measure = matmul_rate("float32", 256 if args.tiny else 2048)
        runs: dict[str, list[Run]] = {}
        rates: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for case, (refine, seconds) in cases.items():
                for ending in endings[case]:
                    build = builds[ending]
                    if case.startswith("first"):
                        build = build._replace(home=folder / f"empty{ending}")
                        shutil.rmtree(build.home, ignore_errors=True)
                    if case.startswith("second"):
                        build = build._replace(home=folder / f"empty{ending}")
                    runs.setdefault(case + ending, []).append(once(build, refine, seconds))
                    rates.setdefault(case + ending, []).append(measure())
                    print(f"{case + ending:<32}{runs[case + ending][-1].seconds:8.2f} s", flush=True)
        scores = _scores(builds, tracks, stems, folder) if tracks else {}
    flops = {refine: _flops_per_second_of_song(refine) for refine in REFINED}
    median = lambda name, field: statistics.median(getattr(run, field) for run in runs[name])
    rows = []
    for case, (refine, seconds) in cases.items():
        for ending in endings[case]:
            key = case + ending
            took, older = median(key, "seconds"), case + OLDER
            score = scores.get(refine + ending) if seconds == long and "run" not in case else None
            rate = statistics.median(rates[key])
            rows.append(
                {
                    "name": key,
                    "seconds": took,
                    "speedup_over_peer": median(older, "seconds") / took if ending != OLDER and older in runs else None,
                    "cpu_seconds": median(key, "cpu"),
                    "cpu_speedup_over_peer": median(older, "cpu") / median(key, "cpu")
                    if ending != OLDER and older in runs
                    else None,
                    "peak_memory_bytes": max(run.peak for run in runs[key]),
                    "rtf": took / seconds,
                    "first_stem_seconds": median(key, "first_stem"),
                    "matmul_rate": rate,
                    "share_of_matmul_rate": flops[refine] * seconds / took / rate,
                    "si_sdri": score[0] if score else None,
                    "scored_stems": score[1] if score else None,
                    "all_seconds": [run.seconds for run in runs[key]],
                }
            )
    return rows
