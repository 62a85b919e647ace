"""Metrics and their aggregates give what the published evaluation gave."""

import numpy as np
import pytest

from msr_jax.metrics.aggregate import Item, released_aggregates
from msr_jax.metrics.bss_eval import BACKENDS, bss_eval
from msr_jax.metrics.si_sdr import score_windows
from msr_jax.metrics.silent_frames import silent_frame_scores
from tests.parity.fixtures import assert_close, find_fixtures, load


def channels_second(x):
    """(stems, time, channels) -> (stems, channels, time)."""
    return np.asarray(x).swapaxes(1, 2)


def close_in_db(actual, expected, tolerance):
    """As the fixtures ask: 10 times the tolerance beyond ±60 dB, where the ε of the formula decides."""
    expected = np.asarray(expected, np.float64)
    allowed = tolerance["atol"] * np.where(np.abs(expected) > 60, 10, 1)
    assert (np.abs(np.asarray(actual) - expected) <= allowed).all(), (actual, expected)


@pytest.mark.parametrize("path", find_fixtures("si_sdri"))
def test_si_sdri(path):
    arrays, meta = load(path)
    if "fulltrack" in meta["params"]:
        reference, estimate = arrays["fulltrack.reference"][:, None], arrays["fulltrack.estimate"][:, None]
        reference = reference[..., : estimate.shape[-1]]
        scores = score_windows(estimate, reference, meta["params"]["fulltrack"]["sample_rate"])
        assert (scores.start == arrays["fulltrack.start_sample"]).all()
        assert_close(scores.si_sdri, arrays["fulltrack.si_sdri"], meta["tolerance"])
        assert_close(scores.si_sdri.mean(0), arrays["fulltrack.mean_per_stem"], meta["tolerance"])
        return
    for index, case in enumerate(meta["params"]["cases"]):
        reference = channels_second(arrays[f"case{index}.reference"])
        scores = score_windows(channels_second(arrays[f"case{index}.estimate"]), reference, case["sample_rate"])
        assert len(scores.start) == case["n_windows_kept"]
        kept = {"msdm": np.ones_like(scores.silent), "nonsilent": ~scores.silent}
        for style, mask in kept.items():
            means = []
            for j, stem in enumerate(meta["params"]["stems"]):
                values = scores.si_sdri[mask[:, j], j]
                close_in_db(values, arrays[f"case{index}.{style}.si_sdri.{stem}"], meta["tolerance"])
                means.append(values.mean() if len(values) else np.nan)
            expected = arrays[f"case{index}.{style}.aggregate"]  # a stem without values is NaN, and 0 in the average
            assert (np.isnan(expected[:-1]) == np.isnan(means)).all()
            close_in_db(np.nan_to_num(means), np.nan_to_num(expected[:-1]), meta["tolerance"])
            close_in_db(np.nan_to_num(means).mean(), expected[-1], meta["tolerance"])
        for j, stem in enumerate(meta["params"]["stems"]):
            silent = scores.silent[:, j]
            for name, values in (
                ("sdr", scores.sdr[:, j]),
                ("si_sdr", scores.si_sdr[~silent, j]),
                ("si_snr", scores.si_snr[~silent, j]),
                ("output_rms_silent", scores.output_rms[silent, j]),
            ):
                close_in_db(values, arrays[f"case{index}.{name}.{stem}"], meta["tolerance"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", find_fixtures("bsseval_v4"))
def test_bsseval(path, backend):
    arrays, meta = load(path)
    reference, estimate = (channels_second(arrays[f"{n}_int16"] / 32768) for n in ("reference", "estimate"))
    rate = meta["params"]["sample_rate"]
    if meta["params"]["error"]:
        with pytest.raises(ValueError, match="non-silent"):
            bss_eval(estimate, reference, rate, backend)
    else:
        for name, values in bss_eval(estimate, reference, rate, backend)._asdict().items():
            assert_close(values, arrays[name.upper()], meta["tolerance"])  # NaN where the fixture has NaN
            assert_close(np.nanmedian(values, 1), arrays[f"{name.upper()}_median_over_frames"], meta["tolerance"])
    for j, (sir, sar) in enumerate(silent_frame_scores(estimate, reference, rate)):
        assert_close(sir, arrays.get(f"silent_frames.SIR.stem{j}", np.zeros(0)), meta["tolerance"])
        assert_close(sar, arrays.get(f"silent_frames.SAR.stem{j}", np.zeros(0)), meta["tolerance"])


@pytest.mark.parametrize("path", find_fixtures("metric_aggregation"))
def test_aggregates_of_the_released_evaluation(path):
    arrays, meta = load(path)
    p = meta["params"]
    items = [
        Item(track, channels_second(arrays[f"item{k}.reference"]), channels_second(arrays[f"item{k}.estimate"]))
        for k, track in enumerate(p["track_of_item"])
    ]
    found = released_aggregates(items, p["stems"], p["sample_rate"], include_silent=False)
    expected = dict(zip(p["keys"], arrays["aggregate_values"], strict=True))
    assert not set(expected) - set(found)
    for key, value in expected.items():
        assert abs(found[key] - value) <= meta["tolerance"]["atol"], (key, found[key], value)
