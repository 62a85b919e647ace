"""Masks on the spectrum from transformers over time and over bands; separator and refiner in one definition.

What the networks of this family share. They differ in how bins become bands and masks become bins (`bs_roformer`,
`mel_band_roformer`). The refiner is the separator with a noise level and a stem as inputs (FiLM in every block), one mask
head at work, and the separator's features added through adapters (paper, section on BS-RoFormer). Parameters that repeat
are stacked: layers along a first axis that one `lax.scan` runs over, bands of one width along another.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from msr_jax.audio.stft import istft, stft
from msr_jax.devices import platform
from msr_jax.errors import UserError
from msr_jax.models.adapters import adapt, adapt_tokens, add_per_mixture, embed, init_adapters, init_embedding, relay
from msr_jax.models.initial import draw_marked, linear_params, uniform_fan
from msr_jax.models.interface import Backbone, read_fields
from msr_jax.models.products import product
from msr_jax.models.roformer import Film, Sizes, rms_norm, transformer
from msr_jax.models.slices import is_narrow, map_slices, scan_slices, unpack

Array = jax.Array
Params = Mapping[str, Any]
AXES = ("linear", "time", "freq")  # in the order that a layer runs them
# Parameters with a first axis that a loop runs over.
LOOPED = ("layers/", "mask_estimators/", "adapters/time/", "adapters/freq/")
# Widest mask head whose bands and stems a CPU computes all at once: as fast as one by one up to here, and compiled in two
# thirds of the time. Wider ones take up to a third longer and hold everything at once.
NARROW = 256
INNER = {"timed", "conditioned", "reach", "dtype", "parent", "name"}  # fields of the module that are no sizes


class MaskRoformer(nn.Module):
    """Fields under their published names, with the defaults that a published config relies on where it names none.

    `timed` adds the noise level and the stem, `conditioned` the adapters. `remat` computes what lies inside of
    transformers and mask heads again in the backward pass. `zero_init_output` starts the masks at zero (off as published).
    `pass_mixture` starts the adapter of the spectrum as a relay of so many times the mixture's, instead of zero (as published):
    the masks of a refiner then meet the mixture from the first step on, not only what the separator left of it. `mask_scale`
    multiplies what a refiner's masks give (1 as published), so that they keep their size where `pass_mixture` is large.
    `attention_bias` gives the projections of attention biases, as a few public weights have them. `reach`: frames attend to those at
    most so far away (but for linear attention); 0 is to all.
    """

    dim: int = 384
    depth: int = 8
    stereo: bool = False
    num_stems: int = 1
    time_transformer_depth: int = 2
    freq_transformer_depth: int = 2
    linear_transformer_depth: int = 0
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
    attention_bias: bool = False
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    stft_adapter_hidden: int = 128
    remat: bool = False
    zero_init_output: bool = False
    pass_mixture: float = 0.0
    mask_scale: float = 1.0
    timed: bool = False
    conditioned: bool = False
    reach: int = 0
    dtype: Any = jnp.float32

    has_output_norms: ClassVar[bool] = False  # one after each transformer, on the residual stream; else one at the end

    @property
    def band_widths(self) -> tuple[int, ...]:
        """Bins of each band, low to high."""
        raise NotImplementedError

    @property
    def mask_linears(self) -> int:
        """Linear layers of a mask head."""
        raise NotImplementedError

    def _to_bands(self, bins: Array) -> Array:
        """(tokens, values of all bins) -> (tokens, values of all bands, one band after another)."""
        raise NotImplementedError

    def _to_bins(self, bands: Array) -> Array:
        """(…, values of all bands) -> (…, values of all bins), for masks."""
        raise NotImplementedError

    def setup(self):
        self.band_split = self.param("band_split", self._init_band_split)
        self.layers = self.param("layers", self._init_layers)
        if not self.has_output_norms:
            self.final_norm = self.param("final_norm", nn.initializers.ones, (self.dim,))
        self.mask_estimators = self.param("mask_estimators", self._init_masks)
        if self.timed:
            self.embedding = self.param("conditioning", init_embedding, self.dim, self.num_stems)
        if self.conditioned:
            sizes = (self.dim, self.depth, self.channels, self.stft_adapter_hidden)
            self.adapters = self.param("adapters", lambda key: init_adapters(*sizes))

    @property
    def channels(self) -> int:
        return 2 if self.stereo else 1

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(bins of a band, bands) of each run of bands of one width, low to high: their parameters are stacked."""
        return [(width, len(list(run))) for width, run in groupby(self.band_widths)]

    @property
    def _value_groups(self) -> list[tuple[int, int]]:
        """(values per frame of a band, bands) of each run."""
        return [(2 * self.channels * width, count) for width, count in self.groups]

    @property
    def _is_fixed(self) -> bool:
        """Whether no gradient is wanted: parameters are stored in bfloat16 for inference alone."""
        return is_narrow(self.band_split["group_0"]["to_features"])

    @property
    def _hidden(self) -> int:
        """Features within a mask head."""
        return self.dim * self.mlp_expansion_factor

    @property
    def _goes_one_by_one(self) -> bool:
        return platform() == "cpu" and self._hidden > NARROW

    def _over(self, function: Callable) -> Callable:
        """Map over first axes: all at once, but one by one for wide heads on a CPU, which does batches of products badly."""
        if self._goes_one_by_one:
            return lambda args: map_slices(function, args, self._is_fixed)
        # JAX maps no NumPy arrays over functions with a gradient of their own, such as products, while it traces.
        return lambda args: jax.vmap(function)(jax.tree.map(jnp.asarray, unpack(args)))

    def _init_band_split(self, key: Array) -> dict[str, Any]:
        return {
            f"group_{g}": {"norm": jnp.ones((count, size)), **linear_params("to_features", (count,), size, self.dim)}
            for g, (size, count) in enumerate(self._value_groups)
        }

    def _init_layers(self, key: Array) -> dict[str, Any]:
        leading, width = (self.depth,), self.heads * self.dim_head
        bare = lambda name, i, o: {name: uniform_fan(i)(key, (*leading, i, o))}
        film = lambda: linear_params("to_scale_shift", leading, 4 * self.dim, 2 * self.dim) if self.timed else {}
        frequencies = 10000.0 ** (-np.arange(0, self.dim_head, 2) / self.dim_head)
        layers: dict[str, Any] = {}
        for axis in AXES:
            blocks = getattr(self, f"{axis}_transformer_depth")
            for j in range(blocks):
                attention = {"norm": jnp.ones((*leading, self.dim)), **bare("to_qkv", self.dim, 3 * width)}
                if axis == "linear":
                    attention["temperature"] = jnp.ones((*leading, 1, 1, self.heads))
                else:
                    attention |= linear_params("to_gates", leading, self.dim, self.heads)
                    attention["freqs"] = jnp.tile(jnp.asarray(frequencies, jnp.float32), (self.depth, 1))
                    if self.attention_bias:
                        attention["to_qkv_bias"] = jnp.zeros((*leading, 3 * width))
                        attention["to_out_bias"] = jnp.zeros((*leading, self.dim))
                feed = {"norm": jnp.ones((*leading, self.dim))}
                feed |= linear_params("to_hidden", leading, self.dim, 4 * self.dim)
                feed |= linear_params("to_out", leading, 4 * self.dim, self.dim)
                layers[f"{axis}_{j}"] = {
                    "attention": attention | bare("to_out", width, self.dim) | film(),
                    "feed_forward": feed | film(),
                }
            if blocks and self.has_output_norms:
                layers[f"{axis}_norm"] = jnp.ones((*leading, self.dim))
        return layers

    def _init_masks(self, key: Array) -> dict[str, Any]:
        linears, hidden = self.mask_linears, self._hidden
        return {
            f"group_{g}": {
                name: value
                for k in range(linears)
                for name, value in linear_params(
                    f"linear_{k}",
                    (self.num_stems, count),
                    hidden if k else self.dim,
                    2 * size if k == linears - 1 else hidden,
                    is_zero=self.zero_init_output and k == linears - 1,
                ).items()
            }
            for g, (size, count) in enumerate(self._value_groups)
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
        flat = self._to_bands(spectrum.reshape(batch * frames, -1))
        bands, start = [], 0
        for g, (size, count) in enumerate(self._value_groups):
            p = self.band_split[f"group_{g}"]
            x = flat[:, start : start + count * size].reshape(batch * frames, count, size)
            x = rms_norm(x, p["norm"]).swapaxes(0, 1)
            linear = self._over(lambda a: product(a[0], a[1], self.dtype) + a[2])
            bands.append(linear((x, p["to_features"], p["to_features_bias"])))
            start += count * size
        return jnp.concatenate(bands).swapaxes(0, 1).reshape(batch, frames, len(self.band_widths), self.dim)

    def _mask_and_invert(
        self, h: Array, heads: Params, spectrum: Array, samples: int, factor: float = 1.0, keep: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """What the mask heads make of a spectrum (batch, frames, bins, channels, 2): one waveform a row.

        Args:
          h: (batch, frames, bands, dim); heads: parameters with a first axis (rows). Both h and the spectrum may have that
            first axis too: then each row of them meets its own head.
          factor: on what the masks give.

        Returns:
          (rows, batch, time, channels) and, if `keep`, "band_masks" (rows, batch, frames, values of all bands) and "masks"
          (rows, batch, frames, bins, channels, 2).
        """
        own = h.ndim == 5
        batch, frames = h.shape[-4:-2]
        by_band = jnp.moveaxis(h.astype(self.dtype), -2, 1 if own else 0)
        by_band = by_band.reshape(*h.shape[: h.ndim - 4], -1, batch * frames, self.dim)

        def band(a: tuple[Params, Array]) -> Array:
            p, x = a
            for k in range(self.mask_linears):
                x = product(jnp.tanh(x) if k else x, p[f"linear_{k}"], self.dtype) + p[f"linear_{k}_bias"]
            value, gate = jnp.split(x, 2, axis=-1)
            return value * jax.nn.sigmoid(gate)

        def row(a: tuple[Params, tuple[Array, Array] | None]) -> tuple[Array, dict[str, Array]]:
            p, given = a
            x, z = given or (by_band, spectrum)
            parts, start = [], 0
            for g, (_, count) in enumerate(self._value_groups):
                y = self._over(band)((p[f"group_{g}"], x[start : start + count]))  # (bands, tokens, values)
                parts.append(y.swapaxes(0, 1).reshape(batch, frames, -1))
                start += count
            flat = jnp.concatenate(parts, axis=-1)
            masks = self._to_bins(flat).reshape(batch, frames, -1, self.channels, 2)
            wave = self._waveform(factor * complex_product(z, masks), samples)
            return wave, {"band_masks": flat, "masks": masks} if keep else {}

        # Where memory counts, one stem after another: what lies inside of the heads is wider than anything in the layers.
        is_saving = self.remat and (self._goes_one_by_one or platform() != "cpu")
        over_rows = (lambda args: lax.map(jax.checkpoint(row), args)) if is_saving else self._over(row)
        return over_rows((heads, (by_band, spectrum) if own else None))

    def _run_layers(
        self, h: Array, injected: Params | None, condition: Array | None, key: Array | None, keep: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The stack on h (batch, frames, bands, dim): what comes out, and the output of every transformer if `keep`.

        `injected`: by axis, what is added after each layer's transformer, or (adapters, features) that it is made of there.
        """
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
            reach = self.reach if axis == "time" else 0
            h = transformer(blocks, h, [films(block) for block in own], sizes._replace(reach=reach), key)
            return rms_norm(h, p[f"{axis}_norm"]) if self.has_output_norms else h

        def add(h: Array, injection: Array | tuple[Params, Array] | None) -> Array:
            if injection is None:
                return h
            if isinstance(injection, tuple):  # nothing but the features is kept for the gradient
                return add_per_mixture(h, jax.checkpoint(partial(adapt_tokens, dtype=self.dtype))(*injection))
            return add_per_mixture(h, injection)

        def layer(carry: tuple[Array, Any], item: tuple) -> tuple[tuple, dict]:
            (h, total), (p, inject, key) = carry, item
            keys = dict.fromkeys(AXES) if key is None else dict(zip(AXES, jax.random.split(key, 3), strict=True))
            kept = {}
            if self.linear_transformer_depth:
                tokens = h.reshape(len(h), 1, -1, h.shape[-1])
                h = run("linear", p, tokens, keys["linear"]).reshape(h.shape)
                kept["linear"] = h
            if self.skip_connection:
                h = h + total
            # Kept with frames before bands, like the rest: an accelerator would turn the stack of all layers round.
            time = run("time", p, h.swapaxes(1, 2), keys["time"]).swapaxes(1, 2)
            h = add(time, inject and inject["time"])
            freq = run("freq", p, h, keys["freq"])
            h = add(freq, inject and inject["freq"])
            kept |= {"time": time.astype(self.dtype), "freq": freq.astype(self.dtype)}
            return (h, total + h if self.skip_connection else None), kept if keep else {}

        keys = None if key is None else jax.random.split(key, self.depth)
        start = (h, jnp.zeros_like(h) if self.skip_connection else None)
        (h, _), kept = scan_slices(layer, start, (self.layers, injected, keys), self._is_fixed)
        return (h if self.has_output_norms else rms_norm(h, self.final_norm)), kept

    def separate(self, mixture: Array, key: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """The deterministic network.

        Args:
          mixture: (batch, time, channels), more than n_fft/2 samples.
          key: of dropout; None runs without.

        Returns:
          (batch, stems, time, channels) float32, and what the refiner is conditioned on: "stft" (batch, frames, bins,
          channels, 2), "band_split" (batch, frames, bands, dim), and for every layer "time" and "freq" (layers, batch,
          frames, bands, dim).
        """
        spectrum = self._spectrum(mixture)
        bands = self._split_bands(spectrum)
        h, kept = self._run_layers(bands, None, None, key, keep=True)
        watched = self.is_mutable_collection("intermediates")
        stems, masks = self._mask_and_invert(h, self.mask_estimators, spectrum, mixture.shape[1], keep=watched)
        for name, value in {"final_norm": h, "linear": kept.pop("linear", None), **masks}.items():
            self.sow("intermediates", name, value)
        return stems.swapaxes(0, 1), {"stft": spectrum, "band_split": bands.astype(self.dtype), **kept}

    def condition(self, features: Mapping[str, Array]) -> dict[str, Array]:
        """Adapters on the separator's features: what is added in the refiner, for any noise level and stem. Same shapes."""
        return adapt(self.adapters, features, self.dtype, self.remat)

    def defer(self, features: Mapping[str, Array]) -> dict[str, Any]:
        """`condition` for a network in training: the layers' adapters run with their layer, and once more for the gradient.

        Of a stack as large as all that is kept of the layers, neither what the adapters give nor its gradient is held.
        """
        return adapt(self.adapters, features, self.dtype, self.remat, deferred=("time", "freq"))

    def refine(
        self,
        x: Array,
        label: Array,
        tau: Array | None,
        conditioning: Mapping[str, Any],
        key: Array | None = None,
    ) -> Array:
        """One evaluation of the refining network.

        Args:
          x: (batch, time, channels); as many examples, one after another, for each mixture of the conditioning.
          label: (rows, stems) one-hot; example i has row i mod rows.
          tau: (batch,) noise-level input ln(σ)/4; None in a network without.
          conditioning: of `condition` or of `defer`.
          key: of dropout; None runs without.

        Returns:
          (batch, time, channels) float32.
        """
        batch, samples = x.shape[:2]
        spectrum = add_per_mixture(self._spectrum(x), conditioning["stft"])
        h = add_per_mixture(self._split_bands(spectrum), conditioning["band_split"])
        inject = {axis: conditioning[axis] for axis in ("time", "freq")}
        watched = self.is_mutable_collection("intermediates")
        modulation, embedded = embed(self.embedding, tau, label) if self.timed and tau is not None else (None, {})
        h, kept = self._run_layers(h, inject, modulation, key, keep=watched)
        normed, rows = h, len(label)
        heads = jax.tree.map(lambda p: p[label.argmax(-1)], self.mask_estimators)
        by_row = lambda x: x.reshape(batch // rows, rows, *x.shape[1:]).swapaxes(0, 1)
        back = lambda x: x.swapaxes(0, 1).reshape(batch, *x.shape[2:])  # to (batch // rows, rows, …)
        stems, masks = self._mask_and_invert(by_row(h), heads, by_row(spectrum), samples, self.mask_scale, keep=watched)
        masks = {**masks, "masks": back(masks["masks"])} if masks else {}
        for name, value in {"final_norm": normed, **masks, **embedded, **kept}.items():
            self.sow("intermediates", name, value)
        return back(stems)


def complex_product(x: Array, y: Array) -> Array:
    """x · y for complex numbers as a last axis (real, imaginary)."""
    real = x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1]
    return jnp.stack([real, x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]], axis=-1)


def read_network(kind: type[MaskRoformer], sizes: Mapping[str, Any], dtype: jnp.dtype) -> MaskRoformer:
    """The module of these sizes; UserError for fields that are unknown, or sizes that no network of the family can have."""
    net = kind(**read_fields(sizes, set(kind.__dataclass_fields__) - INNER), dtype=dtype)
    if not net.stft_hop_length < net.stft_win_length <= net.stft_n_fft or net.dim_head % 2 or net.stft_n_fft % 2:
        raise UserError(
            f"stft_hop_length ({net.stft_hop_length}) < stft_win_length ({net.stft_win_length}) ≤ stft_n_fft "
            f"({net.stft_n_fft}) must hold, and stft_n_fft and dim_head ({net.dim_head}) must be even"
        )
    if net.time_transformer_depth < 1 or (net.has_output_norms and net.freq_transformer_depth < 1):
        raise UserError("time_transformer_depth and freq_transformer_depth must be at least 1")
    return net


def as_backbone(net: MaskRoformer) -> Backbone:
    """The functions of a network of the family."""

    def within(samples: int) -> Backbone:
        return as_backbone(net.clone(reach=samples // net.stft_hop_length))

    def of_kind(timed: bool, conditioned: bool) -> MaskRoformer:
        return net.clone(timed=timed, conditioned=conditioned)

    def init(key: Array, timed: bool, conditioned: bool | None = None) -> Any:
        kind = of_kind(timed, timed if conditioned is None else conditioned)
        params = draw_marked(key, kind.init(key, method=lambda module: module.band_split)["params"])
        if "adapters" not in params or not net.pass_mixture:
            return params
        stft = relay(params["adapters"]["stft"], net.pass_mixture)
        return {**params, "adapters": {**params["adapters"], "stft": stft}}

    def separate(params: Any, mixture: Array, label: Array | None = None, key: Array | None = None):
        return net.apply({"params": params}, mixture, key, method="separate")

    def condition(params: Any, features: Any) -> Any:
        return of_kind("conditioning" in params, True).apply({"params": params}, features, method="condition")

    def defer(params: Any, features: Any) -> Any:
        return of_kind("conditioning" in params, True).apply({"params": params}, features, method="defer")

    def refine(params: Any, x: Array, label: Array, tau: Array | None, conditioning: Any, key: Array | None = None):
        kind = of_kind("conditioning" in params, True)
        return kind.apply({"params": params}, x, label, tau, conditioning, key, method="refine")

    return Backbone(
        init, separate, condition, refine, min_length=net.stft_n_fft // 2 + 1, stems_together=True, defer=defer,
        exact=("conditioning", "to_scale_shift"), looped=LOOPED, within=within,
    )  # fmt: skip
