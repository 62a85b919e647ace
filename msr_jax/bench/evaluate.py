"""BSSEval v4 and SI-SDRi of one song, beside museval: 4 minutes, stereo, 44.1 kHz, 4 stems.

Every engine is a process of its own (so that its peak memory is its own), on the same cores, one after the other. Ours
is run before and after the peer, so that a machine that changes its pace shows.
"""

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

from msr_jax.bench.engines import limit_threads, peak_memory
from msr_jax.errors import UserError

SONG = (4, 2, 44_100, 240)  # stems, channels, Hz, seconds
TINY = (2, 1, 2000, 9)


def worker(engine: str, repeats: int, is_tiny: bool) -> None:
    """Print seconds and CPU seconds of each run (the first one with compilation, not counted), and the peak memory in bytes."""
    limit_threads()
    from msr_jax.machine import keep_freed_memory

    keep_freed_memory()
    import numpy as np

    from msr_jax.metrics.bss_eval import bss_eval
    from msr_jax.metrics.si_sdr import score_windows

    stems, channels, rate, seconds = TINY if is_tiny else SONG
    rng = np.random.default_rng(0)
    references = np.empty((stems, channels, rate * seconds), np.float32)
    for row in references.reshape(stems * channels, -1):
        rng.standard_normal(dtype=np.float32, out=row)
        row *= 0.1
    estimates = references * np.float32(0.9)
    estimates += 0.2 * np.roll(references, 1, 0)
    score = {
        "jax": lambda n: bss_eval(estimates[..., :n], references[..., :n], rate),
        "museval": lambda n: bss_eval(estimates[..., :n], references[..., :n], rate, "museval"),
        "si_sdri": lambda n: score_windows(estimates[..., :n], references[..., :n], rate),
    }[engine]
    whole, part = references.shape[-1], rate * 8
    times = []
    for length in [part] + [whole] * repeats:
        started, used = time.perf_counter(), time.process_time()
        score(length)
        times += [time.perf_counter() - started, time.process_time() - used]
    print(*times, peak_memory())


def _run(engine: str, repeats: int, is_tiny: bool) -> tuple[list[tuple[float, float]], int]:
    command = [sys.executable, "-m", "msr_jax.bench.evaluate", engine, str(repeats), *(["--tiny"] if is_tiny else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the engine {engine} stopped; its message stands above")
    *times, peak = map(float, done.stdout.split())
    return list(zip(times[::2], times[1::2], strict=True)), int(peak)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: BSSEval over museval's own, SI-SDRi, and the peer; the peer, minutes of work, runs once.

    Raises:
      UserError: an engine fails.
    """
    found: dict[str, tuple[list[tuple[float, float]], int]] = {}
    first = _run("jax", args.repeats, args.tiny)
    found["si_sdri"] = _run("si_sdri", args.repeats, args.tiny)
    if not args.no_peer:
        found["peer_museval"] = _run("museval", 1, args.tiny)
        again = _run("jax", args.repeats, args.tiny)
        first = (first[0] + again[0][1:], max(first[1], again[1]))
    found = {"bss_eval": first, **found}
    medians = {name: statistics.median(t for t, _ in times[1:]) for name, (times, _) in found.items()}
    peer = medians.get("peer_museval")
    return [
        {
            "name": name,
            "seconds": medians[name],
            "speedup_over_peer": peer / medians[name] if peer and name == "bss_eval" else None,
            "peak_memory_bytes": peak,
            "cpu_seconds": statistics.median(
                used for _, used in times[1:]
            ),  # of all threads; a busy machine changes it less
            "first_seconds": times[0][0],
            "all_seconds": [t for t, _ in times[1:]],
        }
        for name, (times, peak) in found.items()
    ]


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), "--tiny" in sys.argv)
