"""Runs what a benchmark compares: every engine is a process of its own, so that its peak memory is its own.

The engines take turns, so that a noisy machine slows all alike; medians are compared.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msr_jax.bench.builds import Build, environment_of
from msr_jax.errors import UserError

THREADS = 2
ROUNDS = 2  # in which builds that are compared are started anew
OLDER = "_older"  # what the name of an older build's row ends with


class Timing(NamedTuple):
    """What one engine showed: seconds of every pass, peak memory in bytes, what it said of itself, and rates of the machine."""

    seconds: list[float]
    peak: int
    about: dict[str, Any]
    rates: list[float]


class Engine(NamedTuple):
    """A process that answers as `serve`: `python -m module ARGUMENTS`, of this build or of `build`."""

    module: str
    arguments: Sequence[str]
    build: Build | None = None


def limit_threads() -> None:
    """Keep this process on `THREADS` cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def peak_memory(usage: resource.struct_rusage | None = None) -> int:
    """The largest resident memory in bytes: of this process, or of what `usage` is of."""
    most = (usage or resource.getrusage(resource.RUSAGE_SELF)).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes


def matmul_rate(precision: str, size: int = 2048) -> Callable[[], float]:
    """Measures operations per second of a product of `size` rows and columns in this precision, the best of five."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision))
    multiply = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32)).lower(x).compile()

    def measure() -> float:
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(multiply(x))
            best = min(best, time.perf_counter() - started)
        return 2.0 * size**3 / best

    measure()
    return measure


def serve(
    forward: Callable[[], None],
    about: Mapping[str, Any],
    warm_up: int = 2,
    rate: Callable[[], float] | None = None,
) -> None:
    """In an engine's process: warm up, print `about`, then answer each line of input with the seconds of one pass.

    Args:
      rate: measures what the machine can do. It runs right before and after each pass, and the higher figure counts: such
        a machine is half as fast again at one moment as at another.
    """
    for _ in range(warm_up):
        forward()
    print(json.dumps(dict(about)), flush=True)
    for _ in sys.stdin:
        before = rate() if rate else 0.0
        started = time.perf_counter()
        forward()
        seconds = time.perf_counter() - started
        best = max(before, rate() if rate else 0.0)
        print(seconds, peak_memory(), best, flush=True)


def _start(engine: Engine) -> Any:  # a Popen with pipes
    command = [engine.build.python if engine.build else sys.executable, "-m", engine.module, *engine.arguments]
    more: dict[str, Any] = {}
    if engine.build:  # `-m` looks into the folder that one is in before anything else
        more = {"env": environment_of(engine.build), "cwd": engine.build.sources or engine.build.home.parent}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def take_turns(engines: Mapping[str, Engine], repeats: int) -> dict[str, Timing]:
    """Start each engine and time `repeats` passes of each, in turns.

    Raises:
      UserError: an engine stopped.
    """
    workers: dict[str, Any] = {}

    def answer(name: str) -> str:
        line = workers[name].stdout.readline()
        if not line:
            raise UserError(f"the engine {name} stopped; its message stands above")
        return line

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    peaks = {}
    try:
        about = {}
        for name, engine in engines.items():  # one after the other: compilation would slow the others' warming up
            workers[name] = _start(engine)
            about[name] = json.loads(answer(name))
        for _ in range(repeats):
            for name, process in workers.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                took, peak, *rate = answer(name).split()
                seconds[name].append(float(took))
                rates[name].append(float(rate[0]) if rate else 0.0)  # the first builds did not measure any
                peaks[name] = int(peak)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return {name: Timing(seconds[name], peaks[name], about[name], rates[name]) for name in workers}


def take_rounds(engines: Mapping[str, Engine], repeats: int, rounds: int = ROUNDS) -> dict[str, Timing]:
    """`take_turns` with new processes in every round, started in the other order in every second; `repeats` in all or a few more.

    For builds that are nearly alike: of two processes of one build, one can be a third slower for as long as it lives.
    """
    found: dict[str, Timing] = {}
    for k in range(rounds):
        names = list(engines)[:: -1 if k % 2 else 1]
        for name, new in take_turns({name: engines[name] for name in names}, -(-repeats // rounds)).items():
            old = found.get(name, Timing([], 0, {}, []))
            found[name] = Timing(old.seconds + new.seconds, max(old.peak, new.peak), new.about, old.rates + new.rates)
    return {name: found[name] for name in engines}


def over_older(timings: Mapping[str, Timing], name: str) -> float | None:
    """How many times as fast as the older build's engine of that name, where there is one."""
    older = timings.get(name + OLDER)
    return statistics.median(older.seconds) / statistics.median(timings[name].seconds) if older else None
