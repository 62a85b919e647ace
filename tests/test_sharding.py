"""Large parameters are split over `fsdp` by one rule, small ones are whole everywhere."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from msr_jax.train.sharding import AXES, parameter_sharding


def spec(shape, fsdp):
    mesh = AbstractMesh((2, fsdp), AXES, (AxisType.Auto, AxisType.Auto))
    return parameter_sharding(mesh, jax.ShapeDtypeStruct(shape, "float32")).spec


@pytest.mark.parametrize(
    "shape,fsdp,expected",
    [
        ((3, 256, 512), 4, P(None, None, "fsdp")),  # the largest axis
        ((3, 1024, 510), 4, P(None, "fsdp")),
        ((3, 511, 512), 8, P(None, None, "fsdp")),
        ((512, 513), 8, P("fsdp")),  # 513 does not divide
        ((257, 513), 8, P()),
        ((64,), 4, P()),  # too small to be worth it
        ((3, 256, 512), 1, P()),
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, fsdp, expected):
    assert spec(shape, fsdp) == expected
