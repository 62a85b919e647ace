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


@pytest.mark.parametrize(
    "shape,expected",
    [
        ((8, 384, 1536), P(None, None, ("fsdp", "fsdp_inner"))),  # 1536 takes all 256
        ((8, 192, 384), P(None, "fsdp_inner", "fsdp")),  # 384 takes 128 of them, 192 the 2 that are left
        ((257, 640), P(None, "fsdp")),
    ],
)
def test_a_wide_fsdp_splits_along_two_axes_where_one_does_not_divide(shape, expected):
    mesh = AbstractMesh((1, 128, 2), (*AXES, "fsdp_inner"), (AxisType.Auto,) * 3)
    assert parameter_sharding(mesh, jax.ShapeDtypeStruct(shape, "float32")).spec == expected
