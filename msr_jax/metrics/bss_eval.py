"""SDR, ISR, SIR and SAR by BSSEval v4 (Vincent et al. 2006, Liutkus et al. 2018), the measures of `museval`, in JAX.

The distortion filters are least-squares fits of 512 taps on the whole signal; their normal equations are block Toeplitz
and come from correlations at 1023 lags alone. Scores need energies of projected frames only, never the frames
themselves, so they are summed in the frequency domain. Both passes transform the signal once, frame by frame, and hold a
few frames at a time. Everything is float64: band-limited music makes normal equations of a condition beyond 1e10.

Where even that is too little, as with references in floating point that have nothing above a low-pass, filters amplify
rounding until it explains whatever the estimate has there (here and in museval alike: a SIR of -37 dB beside a SDR of
2 dB on one track). Two more fits tell, with more on the diagonal: a frame's ISR, SIR or SAR on which they disagree is left
out; where they agree, and the first fit does not (two references alike, say, leave many filters), theirs is the figure.
SDR takes no projection and stays right.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from msr_jax.metrics.museval_backend import museval_bss_eval

TAPS = 512
GROUP = 4  # frames transformed at a time
# On the diagonal, of the energy of each signal: -120 and -110 dB. What 16-bit files can have in any direction is a thousand
# times as much and more, and the rounding of float32 and of the sums of products here a hundredth.
ROUNDING = (1e-12, 1e-11)
APART = 0.5  # dB by which two fits may differ
PERFECT = 100.0  # dB, beyond which they may differ as they like: all of it is rounding
BACKENDS = ("jax", "museval")
Array = jax.Array


class BssScores(NamedTuple):
    """(…, stems, frames) each, dB; infinite where nothing is distorted.

    NaN where a frame has no score for silence; in `isr`, `sir` and `sar` alone where the projection is singular to precision.
    """

    sdr: np.ndarray
    isr: np.ndarray
    sir: np.ndarray
    sar: np.ndarray


def bss_eval(
    estimates: np.ndarray,
    references: np.ndarray,
    sample_rate: int,
    backend: str = "jax",
    joint_silence: bool = True,
) -> BssScores:
    """BSSEval v4: distortion filters of 512 taps fitted once, frames of 1 s without overlap, the incomplete last left out.

    A signal shorter than 1 s is one frame.

    Args:
      estimates, references: (…, stems, channels, samples); leading axes are signals of their own, scored in one batch.
      sample_rate: Hz.
      backend: "jax", or "museval" for that package's own code.
      joint_silence: museval's rule: a frame in which any reference or estimate is silent (its channels add up to 0 at
        every sample) is NaN for all stems. False (not with museval): it is NaN only for the stems whose reference is
        exactly silent in it (0 in every channel).

    Raises:
      ValueError: with `joint_silence`, a reference or estimate is silent throughout; nothing is computed for any stem then.
    """
    if estimates.shape != references.shape or references.ndim < 3 or 0 in references.shape:
        raise ValueError(
            f"estimates {estimates.shape} and references {references.shape} must be (…, stems, channels, samples) alike"
        )
    if joint_silence:
        for name, audio in (("reference", references), ("estimate", estimates)):
            if not audio.sum(-2).any(-1).all():
                raise ValueError(f"every {name} must be non-silent for BSSEval; at least one is silent throughout")
    lead = references.shape[:-3]
    e, r = (x.reshape(-1, *x.shape[-3:]) for x in (estimates, references))
    if backend == "museval":
        if not joint_silence:
            raise ValueError("museval knows joint_silence only")
        given = np.stack([np.stack(museval_bss_eval(*pair, sample_rate)) for pair in zip(e, r, strict=True)], 1)
    else:
        given = None
    with jax.enable_x64(True), jax.default_device(_device()):
        scores = _scores(e, r, sample_rate, joint_silence, given)
    return BssScores(*(x.reshape(*lead, *x.shape[1:]) for x in scores))


def _device() -> Any:
    """The default device, or the host's CPU where that cannot transform in float64."""
    return jax.local_devices(backend="cpu")[0] if jax.default_backend() == "tpu" else None


def _scores(
    estimates: np.ndarray,
    references: np.ndarray,
    sample_rate: int,
    joint_silence: bool,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """(tracks, stems, channels, samples) twice -> (4, tracks, stems, frames) dB; `given` ones without those of singular frames."""
    tracks, stems, channels, samples = references.shape
    frame = min(sample_rate, samples)
    # References and estimates as (tracks, stems · channels, samples) each.
    r, e = (x.reshape(tracks, stems * channels, samples) for x in (references, estimates))
    correlation = _correlations(r, e, -(-TAPS // frame) * frame)

    def ratios(filters: Array, own: Array) -> np.ndarray:
        spectra = (_spectrum(x, next_fast_len(frame + TAPS - 1, real=True)) for x in (filters, own))
        energies = _map_groups(partial(_energies, *spectra, joint_silence), r, e, frame, samples // frame)
        s, d, spatial, own_projection, interference, projection, artifacts, r_sounds, e_sounds = np.moveaxis(
            energies, -1, 0
        )
        kept = (r_sounds * e_sounds > 0).all(-1, keepdims=True) if joint_silence else r_sounds > 0
        pairs = ((s, d), (s, spatial), (own_projection, interference), (projection, artifacts))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = [10 * np.log10(num / den) for num, den in pairs]
        return np.where(kept, found, np.nan).swapaxes(2, 3)

    *filters, smallest = _fit(correlation, stems, 0.0)
    # Whether more on the diagonal could change a projection at all; a matrix that is not definite (NaN) is near it too.
    is_close = ~(np.asarray(smallest) > 100 * ROUNDING[0])[:, None, None]
    if given is not None and not is_close.any():
        return given
    found = ratios(*filters) if given is None else given
    if is_close.any():
        firm, firmer = (ratios(*_fit(correlation, stems, rounding)[:2]) for rounding in ROUNDING)
        apart = lambda x: _apart(x, firm) & is_close
        singular = apart(firmer)
        if given is None:
            found = np.where(apart(found), firm, found)
        else:  # its code knows no other fit
            singular |= apart(given)
        singular[2:] = singular[2:].any(0)  # SIR and SAR are of one projection
        found = np.where(singular, np.nan, found)
    return found


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two ratios in dB differ."""
    with np.errstate(invalid="ignore"):  # infinite in both
        return np.abs(np.minimum(a, PERFECT) - np.minimum(b, PERFECT)) > APART


def _groups(r: np.ndarray, e: np.ndarray, block: int, count: int, margin: int) -> Iterator[Array]:
    """Runs of at most GROUP blocks of all signals, (tracks, 2 · stems · channels, blocks · block + margin), zeros beyond the end."""
    group = -(-count // -(-count // GROUP))  # groups of one size
    for start in range(0, count * block, group * block):
        cut = slice(start, start + group * block + margin)
        both = np.concatenate([r[..., cut], e[..., cut]], 1)
        yield jnp.asarray(np.pad(both, ((0, 0), (0, 0), (0, group * block + margin - both.shape[-1]))))


def _map_groups(fn: Callable[..., Array], r: np.ndarray, e: np.ndarray, frame: int, count: int) -> np.ndarray:
    """fn(group, frame) -> (tracks, frames, …) over all groups, joined: (tracks, count, …)."""
    return np.concatenate([np.asarray(fn(group, frame)) for group in _groups(r, e, frame, count, 0)], 1)[:, :count]


def _correlations(r: np.ndarray, e: np.ndarray, block: int) -> Array:
    """Of references with themselves and with estimates: (tracks, from, from and to, TAPS)."""
    tracks, signals, samples = r.shape
    sizes = (next_fast_len(block + TAPS - 1, real=True), next_fast_len(2 * TAPS - 2, real=True))
    sums = tuple(jnp.zeros((tracks, signals, 2 * signals, n // 2 + 1), complex) for n in sizes)
    for group in _groups(r, e, block, -(-samples // block), TAPS - 1):
        sums = _add_products(sums, group, block, sizes)
    return _correlation(sums, sizes)


def _fit(correlation: Array, stems: int, rounding: float) -> tuple[Array, Array, Array]:
    """Filters that project each estimate on all references, and on its own stem's; `rounding` as in `_solve`.

    Returns:
      (tracks, stems · channels to, stems · channels from, TAPS), (tracks, stems, channels to, channels from, TAPS), and the
      smallest eigenvalue (tracks,) of the first fit as `_solve` gives it (that of the second is not smaller).
    """
    signals = correlation.shape[1]
    channels = signals // stems
    filters, own, smallest = [], [], []
    for c in correlation:
        auto, cross = c[:, :signals], c[:, signals:]
        found, least = _solve(auto, cross, rounding)
        filters.append(found)
        smallest.append(least)
        blocks = [slice(k, k + channels) for k in range(0, signals, channels)]
        own.append(jnp.stack([_solve(auto[b, b], cross[b, b], rounding)[0] for b in blocks]))
    return jnp.stack(filters), jnp.stack(own), jnp.stack(smallest)


_spectrum = jax.jit(jnp.fft.rfft, static_argnums=1)


def _products(x: Array, y: Array) -> Array:
    """Cross spectra summed over blocks: (tracks, i, blocks, f), (tracks, j, blocks, f) -> (tracks, i, j, f)."""
    return (x[:, :, None].conj() * y[:, None]).sum(3)


@partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _add_products(sums: tuple[Array, Array], group: Array, block: int, sizes: tuple[int, int]) -> tuple[Array, Array]:
    """Add a group's cross spectra: inside of blocks, and across their borders (the lags reach over them)."""
    x = group.astype(jnp.float64)
    tracks, both, length = x.shape
    count, signals, lags = length // block, both // 2, TAPS - 1
    blocks = x[..., : count * block].reshape(tracks, both, count, block)
    heads = jnp.stack([x[..., k * block : k * block + lags] for k in range(1, count + 1)], 2)
    tails = blocks[:, :signals, :, -lags:]
    inside = jnp.fft.rfft(blocks, sizes[0])
    after = jnp.fft.rfft(jnp.pad(heads, ((0, 0), (0, 0), (0, 0), (lags, 0))), sizes[1])
    return (
        sums[0] + _products(inside[:, :signals], inside),
        sums[1] + _products(jnp.fft.rfft(tails, sizes[1]), after),
    )


@partial(jax.jit, static_argnums=1)
def _correlation(sums: tuple[Array, Array], sizes: tuple[int, int]) -> Array:
    """Σ_n x_i[n] y_j[n + lag] for lags from 0 to TAPS - 1, from the summed cross spectra."""
    lags: Any = (jnp.fft.irfft(s, n)[..., :TAPS] for s, n in zip(sums, sizes, strict=True))
    return sum(lags)


@jax.jit
def _normal_matrix(auto: Array) -> Array:
    """Inner products of all delayed references: (i, j, lag ≥ 0) -> (i · TAPS, j · TAPS), museval's ε on the diagonal."""
    count = auto.shape[0]
    lags = jnp.concatenate([auto.swapaxes(0, 1)[..., :0:-1], auto], -1)  # from -(TAPS - 1) to TAPS - 1
    i, a, j, b = jnp.ix_(jnp.arange(count), jnp.arange(TAPS), jnp.arange(count), jnp.arange(TAPS))
    matrix = lags[i, j, a - b + TAPS - 1].reshape(count * TAPS, count * TAPS)
    return matrix + jnp.finfo(jnp.float64).eps * jnp.eye(count * TAPS)


@jax.jit
def _cholesky_solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """The solution, and about the smallest eigenvalue of the matrix scaled to a diagonal of 1: four inverse iterations."""
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    scale = jnp.sqrt(jnp.diag(matrix))
    x = jax.random.normal(jax.random.key(0), scale.shape, matrix.dtype)
    for _ in range(4):
        x = scale * jax.scipy.linalg.cho_solve(factor, scale * x / jnp.linalg.norm(x))
    return jax.scipy.linalg.cho_solve(factor, right), 1 / jnp.linalg.norm(x)


def _solve(auto: Array, cross: Array, rounding: float) -> tuple[Array, Array]:
    """Least-squares filters: auto (i, i, TAPS), cross (i, j, TAPS) -> (j, i, TAPS), and the smallest eigenvalue.

    `rounding` times itself is added to the diagonal. Where rounding has cost the matrix its definiteness (two references
    alike, say), what rounding can be is added too: that changes the filters in directions alone in which the references
    have nothing to project on. The eigenvalue, of the matrix scaled to a diagonal of 1, is NaN then.
    """
    i, j = cross.shape[:2]
    matrix, right = _normal_matrix(auto), cross.swapaxes(1, 2).reshape(i * TAPS, j)
    if rounding:
        matrix += rounding * jnp.diag(jnp.diag(matrix))
    found, smallest = _cholesky_solve(matrix, right)
    if not jnp.isfinite(found).all():
        lost = jnp.finfo(jnp.float64).eps * jnp.trace(matrix)
        found = _cholesky_solve(matrix + lost * jnp.eye(i * TAPS), right)[0]
    return found.reshape(i, TAPS, j).transpose(2, 0, 1), smallest


@partial(jax.jit, static_argnums=(2, 4))
def _energies(filters: Array, own: Array, joint_silence: bool, group: Array, frame: int) -> Array:
    """Energies of the parts of every frame, all channels together.

    Args:
      filters, own: spectra of what `_fit` gives.
      joint_silence: channels that add up to 0 are silence too.
      group: (tracks, 2 · stems · channels, frames · frame).

    Returns:
      (tracks, frames, stems, 9): reference; estimate - reference; own projection - reference; own projection;
      interference (projection - own projection); projection; artifacts (estimate - projection); and whether reference
      and estimate sound (1 or 0).
    """
    tracks, stems, channels = own.shape[:3]
    count = group.shape[-1] // frame
    x = group.astype(jnp.float64).reshape(tracks, 2, stems * channels, count, frame)
    size = next_fast_len(frame + TAPS - 1, real=True)
    spectra = jnp.fft.rfft(x, size)
    by_stem = lambda y: y.reshape(tracks, stems, channels, *y.shape[2:])
    r, e = by_stem(spectra[:, 0]), by_stem(spectra[:, 1])
    # Sums over inputs written out: XLA makes one vectorised loop of them, and a slow product of small matrices otherwise.
    # Kept apart from their energies, and those from the sums over bins: XLA would compute all anew inside a slow loop.
    apart = jax.lax.optimization_barrier
    projection = apart(by_stem(sum(filters[:, :, i, None] * spectra[:, 0, i, None] for i in range(stems * channels))))
    projection_own = sum(own[:, :, :, i, None] * r[:, :, i, None] for i in range(channels))
    # Parseval: every bin but the first (and the last, of an even size) stands for two.
    weight = jnp.full(spectra.shape[-1], 2.0 / size).at[0].set(1.0 / size)
    weight = weight.at[-1].set(weight[-1] / 2) if size % 2 == 0 else weight
    energy = lambda y: (apart(jnp.square(y.real) + jnp.square(y.imag)) @ weight).sum(2)
    in_time = lambda y: jnp.square(by_stem(y)).sum((2, 4))
    heard = lambda y: y.sum(2) != 0 if joint_silence else (y != 0).any(2)
    sounds = lambda y: heard(by_stem(y)).any(-1).astype(jnp.float64)
    parts = [
        in_time(x[:, 0]),
        in_time(x[:, 1] - x[:, 0]),
        energy(projection_own - r),
        energy(projection_own),
        energy(projection - projection_own),
        energy(projection),
        energy(e - projection),
        sounds(x[:, 0]),
        sounds(x[:, 1]),
    ]
    return jnp.stack(parts, -1).swapaxes(1, 2)
