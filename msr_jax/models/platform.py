"""The kind of processor that networks are traced for: the same sums, in the form that suits a CPU or an accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_PLATFORM: ContextVar[str] = ContextVar("platform", default="")


def platform() -> str:
    """ "cpu", "gpu" or "tpu": JAX's default backend, unless `traced_for` says otherwise."""
    return _PLATFORM.get() or jax.default_backend()


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Functions traced within take the forms of that platform: to plan on a laptop what an accelerator will run."""
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)
