"""Music source separation in JAX, refined by diffusion and by consistency distillation.

stems = msr_jax.load("model").separate(audio, sample_rate)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msr_jax.separate.engine import load
    from msr_jax.separate.ensemble import load_ensemble

__all__ = ["load", "load_ensemble"]


def __getattr__(name: str):
    # JAX is imported on use: `msr --help` and Grain's worker processes do without.
    if name == "load":
        from msr_jax.separate.engine import load

        return load
    if name == "load_ensemble":
        from msr_jax.separate.ensemble import load_ensemble

        return load_ensemble
    raise AttributeError(f"module 'msr_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
