"""Mel-Band RoFormers' bands, networks, gradients and checkpoints give what the published implementations gave."""

import pytest

from tests.parity.fixtures import parity_folders
from tests.parity.test_unet import assert_within_tolerance


def fixtures():
    found = {}
    for folder in parity_folders():
        for described in sorted(folder.glob("mel_band_roformer/melrf_*.json")):
            found.setdefault(described.stem, described.with_suffix(".safetensors"))
    return [pytest.param(path, id=name) for name, path in found.items()]


@pytest.mark.parametrize("path", fixtures())
def test_bands_networks_gradients_and_checkpoints(path):
    assert_within_tolerance(path)
