"""What a compiler says of a program: its memory, its communication, its forms. Kept on disk, as compiling takes minutes."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from msr_jax.errors import UserError
from msr_jax.files import write_whole
from msr_jax.machine import home
from msr_jax.plan.hlo import collectives, forms
from msr_jax.plan.program import Program
from msr_jax.plan.target import Target, tracing

# For simulated CPU devices the program's machine code need not be quick. Memory and communication stay the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FORMAT = 3  # of what is kept; another one is compiled anew
UNITS = "KMGTPE"  # as XLA shortens bytes, by powers of 1024


def cache_folder() -> Path:
    """Where results are kept: `plans` in `MSR_HOME`, or in the user's cache folder."""
    return home() / "plans"


def compile_program(program: Program, target: Target) -> dict[str, Any]:
    """Compile a program for a target, or take the result from disk where the same program was compiled by the same compiler.

    Returns:
      {"compiler", "key": of program and compiler, "seconds", "refused": "" or the compiler's own words, and where it was not
      refused "arguments", "outputs", "aliased", "work_space", "code" in bytes per device, "cost": {"flops", "bytes"} or None,
      "collectives": a list, "forms"}. A program that the compiler refuses for want of memory has "needs" and "has", in bytes.
    """
    with tracing(target), jax.set_mesh(program.mesh):
        lowered = program.traced.lower()
    key = _key(lowered.as_text(), target)
    try:
        kept: dict[str, Any] = json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
        return kept
    except (OSError, ValueError, UserError):  # UserError: there is no home directory
        pass
    start = time.perf_counter()
    facts: dict[str, Any] = {"compiler": target.compiler, "key": key, "refused": ""}
    try:
        with jax.set_mesh(program.mesh), nullcontext() if target.platform == "cpu" else _not_kept_by_jax():
            compiled = lowered.compile(compiler_options=QUICK if target.platform == "cpu" else None)
    except jax.errors.JaxRuntimeError as error:
        facts.update(_refusal(str(error)))
    else:
        facts.update(_facts(compiled, program.mesh.size))
    facts["seconds"] = time.perf_counter() - start
    try:
        write_whole(cache_folder() / f"{key}.json", json.dumps(facts) + "\n")
    except UserError:  # a full or read-only disk, or no home directory: the plan is made all the same
        pass
    return facts


@contextmanager
def _not_kept_by_jax() -> Iterator[None]:
    """What is compiled within stays out of JAX's own cache, which cannot read again what is for chips that are not there.

    JAX decides once in a process whether it has a cache, unless that is reset.
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _key(text: str, target: Target) -> str:
    of = [str(FORMAT), target.name.lower(), target.compiler, jax.__version__, text]
    return hashlib.sha256("\n".join(of).encode()).hexdigest()[:32]


def _facts(compiled: Any, devices: int) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = _cost(compiled)
    return {
        "arguments": int(memory.argument_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes),
        "aliased": int(memory.alias_size_in_bytes),
        "work_space": int(memory.temp_size_in_bytes),
        "code": int(memory.generated_code_size_in_bytes),
        "cost": cost,
        "collectives": [c._asdict() | {"sent_bytes": c.sent_bytes} for c in collectives(text, devices)],
        "forms": forms(text),
    }


def _cost(compiled: Any) -> dict[str, float] | None:
    """The compiler's own count, where it makes one. (Not its seconds: what it cannot judge counts -1 there.)"""
    try:
        cost = compiled.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if not cost or cost.get("flops", -1) <= 0 or cost.get("bytes accessed", -1) <= 0:
        return None
    return {"flops": float(cost["flops"]), "bytes": float(cost["bytes accessed"])}


def _refusal(message: str) -> dict[str, Any]:
    first = next((line for line in message.splitlines() if line.strip()), "no reason given")
    found: dict[str, Any] = {"refused": first[:400]}
    size = rf"([\d.]+)([{UNITS}])"
    sizes = re.search(f"Used {size} of {size} hbm", message) or re.search(
        rf"{size}i?B?\)? exceeds available HBM \({size}", message
    )
    if sizes:
        found["needs"], found["has"] = (
            round(float(number) * 1024 ** (UNITS.index(unit) + 1))
            for number, unit in (sizes.group(1, 2), sizes.group(3, 4))
        )
    return found
