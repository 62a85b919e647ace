"""Fixtures of Mel-Band RoFormers: band layouts, networks, gradients and whole checkpoints."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.models.mask_roformer import complex_product
from msr_jax.models.mel_band_roformer import MelBandRoformer, mel_bands
from msr_jax.parity.checks import TOLERANCE, Arrays, Check, relative_error
from msr_jax.parity.separators import (
    activations,
    check_gradients,
    compare_mid,
    last,
    params_of,
    separate,
    state_of,
)
from msr_jax.weights.lightning import read_checkpoint

FIRST = "band_split.to_features.0.0.gamma"  # of every state dict, after a prefix


def _network(config: Mapping[str, Any]) -> MelBandRoformer:
    return MelBandRoformer(**{k: v for k, v in config.items() if k in MelBandRoformer.__dataclass_fields__})


def _check_bands(arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    for layout in meta["layouts_of"]:
        bands = mel_bands(layout["sample_rate"], layout["stft_n_fft"], layout["num_bands"])
        mono = np.concatenate([np.arange(first, first + width) for first, width in bands])
        tables = {
            "first_bin": np.array([first for first, _ in bands]),
            "num_freqs_per_band": np.array([width for _, width in bands]),
            "num_bands_per_freq": np.bincount(mono),
            "freq_indices_mono": mono,
            "freq_indices_stereo": (2 * mono[:, None] + np.arange(2)).reshape(-1),
        }
        for name, table in tables.items():
            key = f"{layout['index']}/{name}"
            yield Check(key, relative_error(table, arrays[key]), 0.0)


def _outputs(net: MelBandRoformer, stems: Any, expected: np.ndarray) -> float:
    """The error of stems beside those of the published program, over the largest of these."""
    found = np.asarray(last(stems))[..., : net.published_length(stems.shape[2])]
    found = found[:, 0] if net.num_stems == 1 else found
    scale = 1 / np.abs(expected).max()
    return relative_error(scale * found, scale * expected)


def _check_separator(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    net = _network(meta["config"])
    params = params_of(net, state_of(arrays), path.name)
    mixture = arrays["in/mixture"]
    if "in/target" in arrays:
        length = net.published_length(mixture.shape[-1])
        yield from check_gradients(net, params, arrays, meta["config"], length)
        return
    stems, features, sown = separate(net, params, mixture)
    yield Check("out/sources", _outputs(net, stems, arrays["out/sources"]), TOLERANCE)
    named = activations(features, sown)
    named |= {f"layer{i}_linear": h for i, h in enumerate(sown["linear"][0])} if net.linear_transformer_depth else {}
    named |= {f"mask_stem{s}": mask for s, mask in enumerate(sown["band_masks"][0])}
    masked = np.array(complex_product(features["stft"], sown["masks"][0]))  # (stems, batch, frames, bins, channels, 2)
    masked[:, :, :, 0] *= not net.zero_dc
    named["masked_stft"] = masked.transpose(1, 0, 4, 3, 2, 5)
    yield from compare_mid(arrays, named, meta.get("frames_stored_in_mid", "all"))


def _check_checkpoints(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    net, expected = _network(meta["config"]), {k.removeprefix("out/sources_"): v for k, v in arrays.items()}
    for file in [name for name in meta["files"] if name.endswith(".ckpt")]:
        state = read_checkpoint(path.with_name(file)).state_dict
        prefix = next(name for name in state if name.endswith(FIRST)).removesuffix(FIRST)
        own = {k.removeprefix(prefix): t.read() for k, t in state.items() if k.startswith(prefix)}
        stems, _, _ = separate(net, params_of(net, own, file), arrays["in/mixture"])
        kind = next((kind for kind in expected if file.endswith(f"_{kind}.ckpt")), "raw")
        yield Check(f"{file}: out/sources_{kind}", _outputs(net, stems, expected[kind]), TOLERANCE)


def check_mel_band_roformer(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    """Checks of one fixture of this family."""
    if "layouts_of" in meta:
        yield from _check_bands(arrays, meta)
    elif "files" in meta:
        yield from _check_checkpoints(path, arrays, meta)
    else:
        yield from _check_separator(path, arrays, meta)
