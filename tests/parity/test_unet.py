"""The U-Net's networks and blocks give what the published implementation gave."""

import pytest

from msr_jax.parity.check import check_fixture
from tests.parity.fixtures import find_fixtures

QUICK = [p for prefix in ("unet_blocks", "unet_det", "unet_diff", "unet_cd") for p in find_fixtures(prefix)]


def assert_within_tolerance(path):
    checks = check_fixture(path)
    above = [(name, error, tolerance) for name, error, tolerance in checks if error > tolerance]
    assert checks and not above, above


@pytest.mark.parametrize("path", QUICK)
def test_networks_and_blocks(path):
    assert_within_tolerance(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", find_fixtures("unet_fullsize"))
def test_the_full_size_networks(path):
    assert_within_tolerance(path)
