"""Crops, chunks and augmentations are those of the published code."""

import numpy as np
import pytest

from msr_jax.data.augment import seven_band_eq, tanh_distortion
from msr_jax.data.indexing import kept_chunks, musdb_segments, number_of_crops, released_crops
from tests.parity.fixtures import assert_close, find_fixtures, load


@pytest.mark.parametrize("path", find_fixtures("data_indexing"))
def test_data_indexing(path):
    arrays, meta = load(path)
    params = meta["params"]
    crop = params["crop_sample_length"]
    assert number_of_crops(arrays["crop.durations"], crop) == params["n_items"]
    found = released_crops(arrays["crop.durations"], crop, arrays["crop.item"], arrays["crop.shift"])
    assert (found.song == arrays["crop.song"]).all()
    assert (found.offset == arrays["crop.offset"]).all()
    kept = kept_chunks(arrays["chunks.stems"], params["chunk_size"], params["silence_threshold"])
    np.testing.assert_array_equal(kept, arrays["chunks.kept"])
    np.testing.assert_array_equal(musdb_segments(arrays["musdb.lengths"]), arrays["musdb.segments"])


@pytest.mark.parametrize("path", find_fixtures("augmentation"))
def test_augmentations(path):
    arrays, meta = load(path)
    audio = arrays["input"].T
    assert_close(seven_band_eq(audio, arrays["eq.center_gain_q"]).T, arrays["eq.output"], meta["tolerance"])
    assert_close(tanh_distortion(audio, float(arrays["tanh.amount"][0])).T, arrays["tanh.output"], meta["tolerance"])
