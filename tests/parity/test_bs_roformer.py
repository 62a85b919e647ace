"""The BS-RoFormer's networks, losses, chunked inference and checkpoints give what the published implementation gave."""

import pytest

from tests.parity.fixtures import parity_folders
from tests.parity.test_unet import assert_within_tolerance

KINDS = ("bsrf_det", "bsrf_diff", "bsrf_cd", "loss_det", "loss_diff", "demix", "ckpt_micro")


def fixtures():
    """By name, for here a description's `kind` is prose."""
    found = {}
    for folder in parity_folders():
        for described in sorted(folder.glob("bs_roformer/*.json")):
            if described.stem.startswith(KINDS) and described.with_suffix(".safetensors").exists():
                found.setdefault(described.stem, described.with_suffix(".safetensors"))
    return [pytest.param(path, id=name) for name, path in found.items()]


@pytest.mark.parametrize("path", fixtures())
def test_networks_losses_demix_and_checkpoints(path):
    assert_within_tolerance(path)
