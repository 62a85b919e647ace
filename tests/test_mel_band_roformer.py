"""The Mel-Band RoFormer: its bands, sizes, scale and silence, and its published names both ways."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msr_jax
from msr_jax.cli import main
from msr_jax.config import bsrf_base, unet_base
from msr_jax.configs import melrf_consistency_small, melrf_det_small, melrf_diffusion_small
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.models.mel_band_roformer import MelBandRoformer, mel_bands
from msr_jax.parity.separators import params_of
from msr_jax.train.loop import train
from msr_jax.weights.export_cli import pypi_tensors
from msr_jax.weights.model_folder import Model, load_model, parameter_shapes, save_model
from msr_jax.weights.roformer_names import (
    is_numbered_by_pypi,
    published_network,
    published_shapes,
    renumber,
    stack_tensors,
    unstack_tensors,
)
from tests.parity.fixtures import SHIPPED
from tests.test_backbones import SEGMENT, Songs

TINY = {
    "name": "mel_band_roformer",
    "dim": 8,
    "depth": 1,
    "stereo": True,
    "num_stems": 2,
    "time_transformer_depth": 1,
    "freq_transformer_depth": 1,
    "num_bands": 6,
    "dim_head": 4,
    "heads": 2,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "stft_n_fft": 64,
    "stft_hop_length": 16,
    "stft_win_length": 64,
    "zero_dc": False,  # which the PyPI package does not know
}
FULL = {
    "keys_melrf_kim": {"num_stems": 1},
    "keys_melrf_aname_large": {"num_stems": 4, "depth": 8, "stft_n_fft": 4096, "stft_win_length": 4096},
}


def model_config(model):
    return {
        **bsrf_base().to_dict(),
        "model": model,
        "stems": [f"stem_{k}" for k in range(model["num_stems"])],
        "sample_rate": 44_100,
        "channels": 2 if model["stereo"] else 1,
        "segment": 1600,
    }


@pytest.fixture(scope="module")
def published():
    """A published state dict of the tiny network: (names, random tensors)."""
    net, shapes = published_network(TINY, "deterministic"), parameter_shapes(make_backbone(TINY), "deterministic")
    rng = np.random.default_rng(0)
    return {k: 0.5 * rng.standard_normal(s, np.float32) for k, s in published_shapes(net, shapes).items()}


@pytest.mark.parametrize("layout", [(44_100, 2048, 60), (44_100, 4096, 60), (48_000, 1024, 60), (16_000, 64, 26)])
def test_bands_cover_every_bin_once_or_twice_and_every_second_one_tiles_them(layout):
    bands = mel_bands(*layout)
    held = np.zeros(layout[1] // 2 + 1, int)
    for first, width in bands:
        held[first : first + width] += 1
    assert len(bands) == layout[2] and set(held) == {1, 2}
    assert all(sum(a) == b[0] for a, b in zip(bands, bands[2:], strict=False))


def test_layouts_that_leave_a_band_or_a_bin_out_are_refused():
    with pytest.raises(UserError, match="holds no bin; take fewer bands"):
        mel_bands(44_100, 256, 60)
    with pytest.raises(UserError, match="whole numbers"):
        make_backbone({**TINY, "num_bands": 0})
    with pytest.raises(UserError, match="unknown fields: freqs_per_bands"):
        make_backbone({**TINY, "freqs_per_bands": (1, 32)})


@pytest.mark.parametrize("num_bands", [1, 2, 3, 6])
def test_masks_that_agree_in_their_bands_are_the_masks_of_the_bins(num_bands):
    net = MelBandRoformer(stereo=True, num_bands=num_bands, stft_n_fft=64)
    bins = np.random.default_rng(0).standard_normal((3, 33 * 4)).astype(np.float32)
    bands = net._to_bands(bins)
    assert bands.shape == (3, 4 * sum(net.band_widths))
    np.testing.assert_array_equal(net._to_bins(bands), bins)


@pytest.mark.parametrize("keys", FULL)
def test_every_tensor_of_the_public_shapes_has_its_place(keys):
    told = json.loads((SHIPPED / "mel_band_roformer" / f"{keys}.json").read_text())["state_dict"]
    blocks = {"time_transformer_depth": 1, "freq_transformer_depth": 1, "mask_estimator_depth": 2}
    model = {"name": "mel_band_roformer", "dim": 384, "depth": 6, "stereo": True, **blocks, **FULL[keys]}
    net, shapes = published_network(model, "deterministic"), parameter_shapes(make_backbone(model), "deterministic")
    assert published_shapes(net, shapes) == {name: tuple(tensor["shape"]) for name, tensor in told.items()}


def test_stems_are_as_long_as_the_mixture_and_scale_with_it(published):
    backbone = make_backbone(TINY)
    params = params_of(published_network(TINY, "deterministic"), published, "here")
    separate = jax.jit(lambda x: backbone.separate(params, x)[0])
    x = 0.1 * jax.random.normal(jax.random.key(0), (2, 403, 2))
    stems = separate(x)
    assert stems.shape == (2, 2, 403, 2)
    np.testing.assert_allclose(separate(1e-5 * x) * 1e5, stems, atol=1e-6)
    assert not np.any(separate(jnp.zeros_like(x)))


def test_both_numberings_are_read_and_an_export_gives_the_tensors_back_bit_for_bit(published, tmp_path, capsys):
    net, counted = published_network(TINY, "deterministic"), renumber(published, 1)
    assert is_numbered_by_pypi(counted) and not is_numbered_by_pypi(published)
    assert "layers.0.1.norm.gamma" in counted and "layers.0.0.norm.gamma" not in counted
    params = params_of(net, counted, "here")
    save_model(tmp_path / "model", model_config(TINY), {"deterministic": params})
    assert (
        main(["export", str(tmp_path / "model"), "--format", "safetensors", "-o", str(tmp_path / "w.safetensors")]) == 0
    )
    from safetensors.numpy import load_file

    back = load_file(tmp_path / "w.safetensors")
    assert back.keys() == published.keys()
    assert all(np.array_equal(back[k], published[k]) for k in back)


@pytest.mark.parametrize(
    "change",
    [
        {"linear_transformer_depth": 1, "skip_connection": True},
        {"mask_estimator_depth": 3, "time_transformer_depth": 2},
    ],
)
def test_stacking_and_unstacking_are_inverse_for_refiners_too(change):
    model = {**TINY, **change}
    backbone = make_backbone(model)
    for network in ("det_x2", "diffusion"):
        net, shapes = published_network(model, network), parameter_shapes(backbone, network)
        rng = np.random.default_rng(0)
        tensors = {k: rng.standard_normal(s, np.float32) for k, s in published_shapes(net, shapes).items()}
        back = unstack_tensors(net, stack_tensors(net, tensors, shapes))
        assert all((back[k] == tensors[k]).all() for k in tensors)


def test_a_setting_that_the_pypi_package_lacks_is_named(published):
    params = params_of(published_network(TINY, "deterministic"), published, "here")
    for change, words in (
        ({"skip_connection": True}, "no skip_connection"),
        ({"attention_bias": True}, "no attention_bias"),
        ({"mlp_expansion_factor": 2}, "no mlp_exp"),
    ):
        with pytest.raises(UserError, match=words):
            pypi_tensors(Model(model_config({**TINY, **change}), {"deterministic": params}))
    with pytest.raises(UserError, match="RoFormers alone"):
        pypi_tensors(Model(unet_base().to_dict(), {}))


@pytest.mark.torch
@pytest.mark.parametrize("change", [{}, {"linear_transformer_depth": 1, "num_stems": 1}])
def test_the_pypi_package_loads_an_export_strictly_and_answers_alike(change, tmp_path):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("bs_roformer")
    model = {**TINY, "depth": 2, **change}
    fields = {k: v for k, v in model.items() if k not in ("name", "zero_dc")}
    net = peer.MelBandRoformer(**{"linear_transformer_depth": 0, **fields}).eval()
    module = published_network(model, "deterministic")
    params = params_of(module, {k: v.numpy() for k, v in net.state_dict().items()}, "the package")
    save_model(tmp_path / "model", model_config({"linear_transformer_depth": 0, **model}), {"deterministic": params})
    out = tmp_path / "w.pt"
    assert main(["export", str(tmp_path / "model"), "--format", "pypi", "-o", str(out)]) == 0
    x = 0.1 * np.random.default_rng(0).standard_normal((1, 2, 16 * 40)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x)).numpy()
        net.load_state_dict(torch.load(out, weights_only=True), strict=True)
        np.testing.assert_array_equal(net(torch.from_numpy(x)).numpy(), expected)
    stored = load_model(tmp_path / "model")
    stems, _ = make_backbone(stored.config["model"]).separate(stored.weights["deterministic"], x.swapaxes(1, 2))
    found = np.asarray(stems).swapaxes(-1, -2).reshape(expected.shape)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_refinement_is_trained_on_it_stage_by_stage_goes_on_after_a_stop_and_separates(tmp_path, capsys):
    recipes = {
        "deterministic": melrf_det_small,
        "diffusion": melrf_diffusion_small,
        "consistency": melrf_consistency_small,
    }
    before = {"diffusion": "deterministic", "consistency": "diffusion"}
    data = grain.MapDataset.range(1000).map(Songs())
    steps = {"steps_per_dispatch": 10, "log_every": 10, "validate_every": 100, "checkpoint_every": 100}
    plain = {k: 0.0 if isinstance(v, float) else v for k, v in unet_base().data.augment.items()}
    for method, recipe in recipes.items():
        config = recipe.get_config()
        config.model.update({k: v for k, v in TINY.items() if k != "num_stems"})
        config.model.update({"num_bands": 3, "remat": False})
        config.data.augment.update(plain)
        config.segment = config.data.crop = SEGMENT
        config.data.batch = 2
        config.consistency.num_levels = 3
        config.optim.update({"name": "adam", "lr": 0.02, "schedule": "constant", "warmup_steps": 0})
        config.train.update({**steps, "steps": 40 if method == "deterministic" else 10})
        if method in before:
            config.init_from[before[method]] = str(tmp_path / before[method])
            config.model.stft_adapter_hidden = 3  # of a refiner: the separator's folder says another, and has none
        train(config.to_dict(), tmp_path / method, data)
    capsys.readouterr()
    again = {**config.to_dict(), "train": {**config.train.to_dict(), "steps": 20}}
    assert int(train(again, tmp_path / "consistency", data).step) == 20
    assert "resumed from step 10" in capsys.readouterr().out
    logged = [json.loads(line) for line in (tmp_path / "deterministic" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0] - 0.5  # dB
    mixture = 0.3 * np.random.default_rng(0).standard_normal((1500, 2)).astype(np.float32)
    separator = msr_jax.load(tmp_path / "consistency", refine="consistency")
    stems = separator.separate(mixture, 44_100)
    assert list(stems) == list(config.stems)
    assert all(s.shape == mixture.shape and np.isfinite(s).all() and s.any() for s in stems.values())
