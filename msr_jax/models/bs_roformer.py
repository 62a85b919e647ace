"""BS-RoFormer: masks on the spectrum from transformers over time and over bands; separator and refiner in one definition.

The refiner is the separator with a noise level and a stem as inputs (FiLM in every block), one mask head at work, and the
separator's features added through adapters (paper, section on BS-RoFormer). Parameters that repeat are stacked: layers
along a first axis that one `lax.scan` runs over, bands of one width along another.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from msr_jax.audio.stft import istft, stft
from msr_jax.errors import UserError
from msr_jax.models.initial import Initialiser, draw_marked, normal, uniform_fan
from msr_jax.models.interface import Backbone, read_fields
from msr_jax.models.layers import differentiated_as, product
from msr_jax.models.platform import platform
from msr_jax.models.roformer import Film, Sizes, gelu, rms_norm, transformer

Array = jax.Array
Params = Mapping[str, Any]
BANDS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)  # in bins; the published default
AXES = ("linear", "time", "freq")  # in the order that a layer runs them


def band_groups(freqs_per_bands: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of bands of one width, low to high: (width in bins, how many)."""
    return [(width, len(list(run))) for width, run in groupby(freqs_per_bands)]


def _linear(name: str, leading: tuple[int, ...], inputs: int, outputs: int, is_zero: bool = False) -> dict[str, Any]:
    """Weights and biases of linear layers, uniform by fan-in, as PyTorch has it."""
    return _weighted(name, (*leading, inputs, outputs), (*leading, outputs), inputs, is_zero)


def _conv(name: str, taps: int, inputs: int, outputs: int, is_zero: bool = False) -> dict[str, Any]:
    return _weighted(name, (taps, taps, inputs, outputs), (outputs,), taps**2 * inputs, is_zero)


def _weighted(name: str, weight: tuple[int, ...], bias: tuple[int, ...], fan: int, is_zero: bool) -> dict[str, Any]:
    init: Initialiser = nn.initializers.zeros if is_zero else uniform_fan(fan)
    return {name: init(None, weight), f"{name}_bias": init(None, bias)}


def _over(function: Callable) -> Callable:
    """Map over first axes: all at once on accelerators; one by one on a CPU, which does batches of products badly."""
    return (lambda args: lax.map(function, args)) if platform() == "cpu" else jax.vmap(function)


class BSRoformer(nn.Module):
    """Fields under their published names, with the defaults that a published config relies on where it names none.

    `timed` adds the noise level and the stem, `conditioned` the adapters. `remat` computes what lies inside of
    transformers and mask heads again in the backward pass. `zero_init_output` starts the masks at zero (off as published).
    `pass_mixture` starts the adapter of the spectrum as a relay of so many times the mixture's, instead of zero (as published):
    the masks of a refiner then meet the mixture from the first step on, not only what the separator left of it. `mask_scale`
    multiplies what a refiner's masks give (1 as published), so that they keep their size where `pass_mixture` is large.
    """

    dim: int = 384
    depth: int = 8
    stereo: bool = False
    num_stems: int = 1
    time_transformer_depth: int = 2
    freq_transformer_depth: int = 2
    linear_transformer_depth: int = 0
    freqs_per_bands: Sequence[int] = BANDS
    dim_head: int = 64
    heads: int = 8
    stft_n_fft: int = 2048
    stft_hop_length: int = 512
    stft_win_length: int = 2048
    stft_normalized: bool = False
    zero_dc: bool = True
    mask_estimator_depth: int = 2
    mlp_expansion_factor: int = 4
    skip_connection: bool = False
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    stft_adapter_hidden: int = 128
    remat: bool = False
    zero_init_output: bool = False
    pass_mixture: float = 0.0
    mask_scale: float = 1.0
    timed: bool = False
    conditioned: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.band_split = self.param("band_split", self._init_band_split)
        self.layers = self.param("layers", self._init_layers)
        self.final_norm = self.param("final_norm", nn.initializers.ones, (self.dim,))
        self.mask_estimators = self.param("mask_estimators", self._init_masks)
        if self.timed:
            self.conditioning = self.param("conditioning", self._init_conditioning)
        if self.conditioned:
            self.adapters = self.param("adapters", self._init_adapters)

    @property
    def channels(self) -> int:
        return 2 if self.stereo else 1

    @property
    def _groups(self) -> list[tuple[int, int]]:
        """(values per frame of a band, bands) of each run of equal bands."""
        return [(2 * self.channels * width, count) for width, count in band_groups(self.freqs_per_bands)]

    def _init_band_split(self, key: Array) -> dict[str, Any]:
        return {
            f"group_{g}": {"norm": jnp.ones((count, size)), **_linear("to_features", (count,), size, self.dim)}
            for g, (size, count) in enumerate(self._groups)
        }

    def _init_layers(self, key: Array) -> dict[str, Any]:
        leading, width = (self.depth,), self.heads * self.dim_head
        bare = lambda name, i, o: {name: uniform_fan(i)(key, (*leading, i, o))}
        film = lambda: _linear("to_scale_shift", leading, 4 * self.dim, 2 * self.dim) if self.timed else {}
        frequencies = 10000.0 ** (-np.arange(0, self.dim_head, 2) / self.dim_head)
        layers = {}
        for axis in AXES:
            for j in range(getattr(self, f"{axis}_transformer_depth")):
                attention = {"norm": jnp.ones((*leading, self.dim)), **bare("to_qkv", self.dim, 3 * width)}
                if axis == "linear":
                    attention["temperature"] = jnp.ones((*leading, 1, 1, self.heads))
                else:
                    attention |= _linear("to_gates", leading, self.dim, self.heads)
                    attention["freqs"] = jnp.tile(jnp.asarray(frequencies, jnp.float32), (self.depth, 1))
                feed = {"norm": jnp.ones((*leading, self.dim))}
                feed |= _linear("to_hidden", leading, self.dim, 4 * self.dim)
                feed |= _linear("to_out", leading, 4 * self.dim, self.dim)
                layers[f"{axis}_{j}"] = {
                    "attention": attention | bare("to_out", width, self.dim) | film(),
                    "feed_forward": feed | film(),
                }
        return layers

    def _init_masks(self, key: Array) -> dict[str, Any]:
        depth, hidden = self.mask_estimator_depth, self.dim * self.mlp_expansion_factor
        return {
            f"group_{g}": {
                name: value
                for k in range(depth)
                for name, value in _linear(
                    f"linear_{k}",
                    (self.num_stems, count),
                    hidden if k else self.dim,
                    2 * size if k == depth - 1 else hidden,
                    is_zero=self.zero_init_output and k == depth - 1,
                ).items()
            }
            for g, (size, count) in enumerate(self._groups)
        }

    def _init_conditioning(self, key: Array) -> dict[str, Array]:
        wide = 4 * self.dim
        linears = _linear("to_time", (), self.dim, wide)
        linears |= _linear("to_mapping_0", (), wide, wide) | _linear("to_mapping_2", (), wide, wide)
        return {**linears, "stem_embedding": normal(key, (self.num_stems, wide))}

    def _init_adapters(self, key: Array) -> dict[str, Any]:
        hidden, image = self.stft_adapter_hidden, 2 * self.channels
        two = lambda leading: {
            **_linear("linear_0", leading, self.dim, self.dim),
            **_linear("linear_2", leading, self.dim, self.dim, is_zero=True),
        }
        return {
            "stft": {
                **_conv("conv_1", 3, image, hidden),
                **_conv("conv_3", 1, hidden, hidden),
                **_conv("conv_5", 1, hidden, hidden),
                **_conv("conv_7", 3, hidden, image, is_zero=True),
            },
            "band_split": two(()),
            "time": two((self.depth,)),
            "freq": two((self.depth,)),
        }

    def _spectrum(self, x: Array) -> Array:
        """(batch, time, channels) -> (batch, frames, bins, channels, 2)."""
        z = stft(x.swapaxes(1, 2), self.stft_n_fft, self.stft_hop_length, self.stft_win_length, self.stft_normalized)
        return z.transpose(0, 2, 3, 1, 4)

    def _waveform(self, spectrum: Array, samples: int) -> Array:
        """(batch, frames, bins, channels, 2) -> (batch, time, channels)."""
        if self.zero_dc:
            spectrum = spectrum.at[:, :, 0].set(0)
        sizes = (self.stft_n_fft, self.stft_hop_length, self.stft_win_length, samples, self.stft_normalized)
        return istft(spectrum.transpose(0, 3, 1, 2, 4), *sizes).swapaxes(1, 2)

    def _split_bands(self, spectrum: Array) -> Array:
        """(batch, frames, bins, channels, 2) -> (batch, frames, bands, dim)."""
        batch, frames = spectrum.shape[:2]
        flat = spectrum.reshape(batch * frames, -1)
        bands, start = [], 0
        for g, (size, count) in enumerate(self._groups):
            p = self.band_split[f"group_{g}"]
            x = flat[:, start : start + count * size].reshape(batch * frames, count, size)
            x = rms_norm(x, p["norm"]).swapaxes(0, 1)
            linear = _over(lambda a: product(a[0], a[1], self.dtype) + a[2])
            bands.append(linear((x, p["to_features"], p["to_features_bias"])))
            start += count * size
        return jnp.concatenate(bands).swapaxes(0, 1).reshape(batch, frames, len(self.freqs_per_bands), self.dim)

    def _masks(self, h: Array, heads: Params) -> Array:
        """h (batch, frames, bands, dim), heads with a first axis (rows) -> (rows, batch, frames, bins, channels, 2).

        h may have that first axis too: then each row of it meets its own head.
        """
        own = h.ndim == 5
        batch, frames = h.shape[-4:-2]
        by_band = jnp.moveaxis(h, -2, 1 if own else 0).reshape(*h.shape[: h.ndim - 4], -1, batch * frames, self.dim)
        depth = self.mask_estimator_depth

        def band(a: tuple[Params, Array]) -> Array:
            p, x = a
            for k in range(depth):
                x = product(jnp.tanh(x) if k else x, p[f"linear_{k}"], self.dtype) + p[f"linear_{k}_bias"]
            value, gate = jnp.split(x, 2, axis=-1)
            return value * jax.nn.sigmoid(gate)

        def row(a: tuple[Params, Array | None]) -> Array:
            p, x = a
            x = by_band if x is None else x
            masks, start = [], 0
            for g, (_, count) in enumerate(self._groups):
                y = _over(band)((p[f"group_{g}"], x[start : start + count]))  # (bands, tokens, values)
                masks.append(y.swapaxes(0, 1).reshape(batch, frames, -1))
                start += count
            return jnp.concatenate(masks, axis=-1)

        # Where memory counts, one stem after another: what lies inside of the heads is wider than anything in the layers.
        over_rows = (lambda args: lax.map(jax.checkpoint(row), args)) if self.remat else _over(row)
        flat = over_rows((heads, by_band if own else None))
        return flat.reshape(len(flat), batch, frames, -1, self.channels, 2)

    def _run_layers(
        self, h: Array, injected: Params | None, condition: Array | None, key: Array | None, keep: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The stack on h (batch, frames, bands, dim): what comes out, and the output of every transformer if `keep`."""
        sizes = Sizes(self.heads, self.dim_head, self.dtype, self.attn_dropout, self.ff_dropout, self.remat)

        def films(p: Params) -> tuple[Film, ...]:
            def film(block: Params) -> Film:
                assert condition is not None  # in a timed network
                wide = product(condition, block["to_scale_shift"], jnp.float32) + block["to_scale_shift_bias"]
                return tuple(jnp.split(wide[:, None, None], 2, axis=-1))

            return tuple(film(p[k]) if self.timed else None for k in ("attention", "feed_forward"))

        def run(axis: str, p: Params, h: Array, key: Array | None) -> Array:
            own = [p[f"{axis}_{j}"] for j in range(getattr(self, f"{axis}_transformer_depth"))]
            if not own:
                return h
            blocks = [(block["attention"], block["feed_forward"]) for block in own]
            return transformer(blocks, h, [films(block) for block in own], sizes, key)

        def add(h: Array, injection: Array | None) -> Array:
            return h if injection is None else add_per_mixture(h, injection)

        def layer(carry: tuple[Array, Any], item: tuple) -> tuple[tuple, dict]:
            (h, total), (p, inject, key) = carry, item
            keys = dict.fromkeys(AXES) if key is None else dict(zip(AXES, jax.random.split(key, 3), strict=True))
            if self.linear_transformer_depth:
                tokens = h.reshape(len(h), 1, -1, h.shape[-1])
                h = run("linear", p, tokens, keys["linear"]).reshape(h.shape)
            if self.skip_connection:
                h = h + total
            time = run("time", p, h.swapaxes(1, 2), keys["time"])
            h = add(time, inject and inject["time"]).swapaxes(1, 2)
            freq = run("freq", p, h, keys["freq"])
            h = add(freq, inject and inject["freq"])
            kept = {"time": time.astype(self.dtype), "freq": freq.astype(self.dtype)} if keep else {}
            return (h, total + h if self.skip_connection else None), kept

        keys = None if key is None else jax.random.split(key, self.depth)
        start = (h, jnp.zeros_like(h) if self.skip_connection else None)
        (h, _), kept = lax.scan(layer, start, (self.layers, injected, keys))
        return rms_norm(h, self.final_norm), kept

    def separate(self, mixture: Array, key: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """The deterministic network.

        Args:
          mixture: (batch, time, channels), more than n_fft/2 samples.
          key: of dropout; None runs without.

        Returns:
          (batch, stems, time, channels) float32, and what the refiner is conditioned on: "stft" (batch, frames, bins,
          channels, 2), "band_split" (batch, frames, bands, dim), and for every layer "time" (layers, batch, bands, frames,
          dim) and "freq" (layers, batch, frames, bands, dim).
        """
        spectrum = self._spectrum(mixture)
        bands = self._split_bands(spectrum)
        h, kept = self._run_layers(bands, None, None, key, keep=True)
        self.sow("intermediates", "final_norm", h)
        masks = self._masks(h, self.mask_estimators)
        self.sow("intermediates", "masks", masks)
        stems = jax.vmap(lambda mask: self._waveform(complex_product(spectrum, mask), mixture.shape[1]))(masks)
        return stems.swapaxes(0, 1), {"stft": spectrum, "band_split": bands.astype(self.dtype), **kept}

    def condition(self, features: Mapping[str, Array]) -> dict[str, Array]:
        """Adapters on the separator's features: what is added in the refiner, for any noise level and stem. Same shapes."""

        def two(p: Params, x: Array) -> Array:
            h = gelu(product(x, p["linear_0"], self.dtype) + p["linear_0_bias"])
            return (product(h, p["linear_2"], self.dtype) + p["linear_2_bias"]).astype(self.dtype)

        p = self.adapters
        stacked = lambda axis: lax.map(lambda a: two(*a), (p[axis], features[axis]))
        return {
            "stft": self._adapt_stft(p["stft"], features["stft"]),
            "band_split": two(p["band_split"], features["band_split"]),
            "time": stacked("time"),
            "freq": stacked("freq"),
        }

    def _adapt_stft(self, p: Params, spectrum: Array) -> Array:
        batch, frames, bins = spectrum.shape[:3]

        def direct(x: Array, weight: Array) -> Array:
            dimensions = ("NHWC", "HWIO", "NHWC")  # height is time here
            return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=dimensions)

        def products(x: Array, weight: Array) -> Array:
            wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifted = lambda i, j: wide[:, i : i + frames, j : j + bins]
            taps: Any = (product(shifted(i, j), weight[i, j], x.dtype) for i in range(3) for j in range(3))
            return sum(taps).astype(x.dtype)

        def conv(x: Array, name: str) -> Array:
            weight = p[name].astype(self.dtype)
            if weight.shape[0] == 1:
                return product(x, weight[0, 0], self.dtype) + p[f"{name}_bias"]
            form = differentiated_as(direct, products) if platform() == "cpu" else direct
            return form(x.astype(self.dtype), weight).astype(jnp.float32) + p[f"{name}_bias"]

        x = spectrum.reshape(batch, frames, bins, -1)
        for name in ("conv_1", "conv_3", "conv_5"):
            x = gelu(conv(x, name))
        return conv(x, "conv_7").reshape(spectrum.shape)

    def embed(self, tau: Array, label: Array) -> Array:
        """The vector (batch, 4·dim) that FiLM is made of, from the noise level (batch,) and the stem (rows, stems)."""
        p = self.conditioning
        half = self.dim // 2
        frequencies = 10000.0 ** (-np.arange(half, dtype=np.float32) / (half - 1))
        angles = tau[:, None] * frequencies
        linear = lambda x, name: product(x, p[name], jnp.float32) + p[f"{name}_bias"]
        time = gelu(linear(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), "to_time"))
        self.sow("intermediates", "time_emb", time)
        stem = p["stem_embedding"][label.argmax(-1)]
        mapped = time + jnp.tile(stem, (len(tau) // len(stem), 1))
        mapped = gelu(linear(gelu(linear(mapped, "to_mapping_0")), "to_mapping_2"))
        self.sow("intermediates", "mapping", mapped)
        return gelu(mapped)  # once more, as published

    def refine(
        self,
        x: Array,
        label: Array,
        tau: Array | None,
        conditioning: Mapping[str, Array],
        key: Array | None = None,
    ) -> Array:
        """One evaluation of the refining network.

        Args:
          x: (batch, time, channels); as many examples, one after another, for each mixture of the conditioning.
          label: (rows, stems) one-hot; example i has row i mod rows.
          tau: (batch,) noise-level input ln(σ)/4; None in a network without.
          conditioning: of `condition`.
          key: of dropout; None runs without.

        Returns:
          (batch, time, channels) float32.
        """
        batch, samples = x.shape[:2]
        spectrum = add_per_mixture(self._spectrum(x), conditioning["stft"])
        h = add_per_mixture(self._split_bands(spectrum), conditioning["band_split"])
        inject = {axis: conditioning[axis] for axis in ("time", "freq")}
        watched = self.is_mutable_collection("intermediates")
        condition = self.embed(tau, label) if self.timed and tau is not None else None
        h, kept = self._run_layers(h, inject, condition, key, keep=watched)
        normed, rows = h, len(label)
        heads = jax.tree.map(lambda p: p[label.argmax(-1)], self.mask_estimators)
        h = h.reshape(batch // rows, rows, *h.shape[1:]).swapaxes(0, 1)
        masks = self._masks(h, heads).swapaxes(0, 1).reshape(spectrum.shape)  # back to (batch // rows, rows, …)
        for name, value in {"final_norm": normed, "masks": masks, **kept}.items():
            self.sow("intermediates", name, value)
        return self._waveform(self.mask_scale * complex_product(spectrum, masks), samples)


def relay(adapter: Params, factor: float) -> dict[str, Array]:
    """The adapter of the spectrum with its first hidden channels set so that they give back `factor` times what comes in.

    GELU(z) - GELU(-z) is z, and GELU(z) for large z > 0 too: two channels for every one of the image carry it through.
    """
    image = adapter["conv_1"].shape[2]
    own, pair = 2 * image, jnp.concatenate([jnp.eye(image), -jnp.eye(image)], axis=1)  # pair (image, own)
    made = dict(adapter)
    made["conv_1"] = adapter["conv_1"].at[..., :own].set(0).at[1, 1, :, :own].set(pair)
    for name in ("conv_3", "conv_5"):
        made[name] = adapter[name].at[..., :own].set(0).at[0, 0, :own, :own].set(jnp.eye(own))
    for name in ("conv_1_bias", "conv_3_bias", "conv_5_bias"):
        made[name] = adapter[name].at[:own].set(0)
    made["conv_7"] = adapter["conv_7"].at[1, 1, :own].set(factor * pair.T)
    return made


def complex_product(x: Array, y: Array) -> Array:
    """x · y for complex numbers as a last axis (real, imaginary)."""
    real = x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1]
    return jnp.stack([real, x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]], axis=-1)


def add_per_mixture(x: Array, injection: Array) -> Array:
    """x + injection (mixtures, …), each mixture's added to all its examples, which are neighbours in x (batch, …)."""
    grouped = x.reshape(len(injection), -1, *x.shape[1:])
    return (grouped + injection[:, None].astype(x.dtype)).reshape(x.shape)


def make_bs_roformer(sizes: Mapping[str, Any], dtype: jnp.dtype) -> Backbone:
    """The BS-RoFormer as a backbone; UserError for sizes that are unknown or contradict each other."""
    inner = ("timed", "conditioned", "dtype", "parent", "name")
    net = BSRoformer(**read_fields(sizes, set(BSRoformer.__dataclass_fields__) - set(inner)), dtype=dtype)
    bins = net.stft_n_fft // 2 + 1
    if sum(net.freqs_per_bands) != bins:
        raise UserError(f"freqs_per_bands add up to {sum(net.freqs_per_bands)} bins, and stft_n_fft gives {bins}")
    if net.stft_win_length > net.stft_n_fft or net.stft_hop_length > net.stft_win_length or net.dim_head % 2:
        raise UserError(
            f"stft_hop_length ({net.stft_hop_length}) ≤ stft_win_length ({net.stft_win_length}) ≤ stft_n_fft "
            f"({net.stft_n_fft}) must hold, and dim_head ({net.dim_head}) must be even"
        )

    def of_kind(timed: bool, conditioned: bool) -> BSRoformer:
        return net.clone(timed=timed, conditioned=conditioned)

    def init(key: Array, timed: bool, conditioned: bool | None = None) -> Any:
        kind = of_kind(timed, timed if conditioned is None else conditioned)
        params = draw_marked(key, kind.init(key, method=lambda module: module.final_norm)["params"])
        if "adapters" not in params or not net.pass_mixture:
            return params
        stft = relay(params["adapters"]["stft"], net.pass_mixture)
        return {**params, "adapters": {**params["adapters"], "stft": stft}}

    def separate(params: Any, mixture: Array, label: Array | None = None, key: Array | None = None):
        return net.apply({"params": params}, mixture, key, method="separate")

    def condition(params: Any, features: Any) -> Any:
        return of_kind("conditioning" in params, True).apply({"params": params}, features, method="condition")

    def refine(params: Any, x: Array, label: Array, tau: Array | None, conditioning: Any, key: Array | None = None):
        kind = of_kind("conditioning" in params, True)
        return kind.apply({"params": params}, x, label, tau, conditioning, key, method="refine")

    return Backbone(init, separate, condition, refine, min_length=net.stft_n_fft // 2 + 1, stems_together=True)
