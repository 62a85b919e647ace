"""Which precision "bfloat16" comes to on a CPU is measured once and kept."""

import json

import jax
import pytest

from msr_jax.models import bfloat16


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder for compiled programs, and no answer from earlier in this process."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    bfloat16.bfloat16_is_faster.cache_clear()
    yield tmp_path
    bfloat16.bfloat16_is_faster.cache_clear()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("ratio", "is_faster"), [(2.0, True), (1.1, False), (0.5, False)])
def test_products_that_are_clearly_faster_decide_and_the_measurement_is_kept(programs, monkeypatch, ratio, is_faster):
    monkeypatch.setattr(bfloat16, "_product_seconds_ratio", lambda: ratio)
    assert bfloat16.bfloat16_is_faster() == is_faster
    assert list(json.loads((programs / "bfloat16.json").read_text()).values()) == [ratio]
    bfloat16.bfloat16_is_faster.cache_clear()
    monkeypatch.setattr(bfloat16, "_product_seconds_ratio", lambda: 1 / 0)  # is not asked again
    assert bfloat16.bfloat16_is_faster() == is_faster


def test_a_kept_file_that_is_broken_is_measured_and_written_anew(programs, monkeypatch):
    (programs / "bfloat16.json").write_text("[1, 2")
    monkeypatch.setattr(bfloat16, "_product_seconds_ratio", lambda: 3.0)
    assert bfloat16.bfloat16_is_faster()
    assert list(json.loads((programs / "bfloat16.json").read_text()).values()) == [3.0]


def test_the_measurement_compares_two_times(monkeypatch):
    monkeypatch.setattr(bfloat16, "PRODUCT", 16)
    assert 0.01 < bfloat16._product_seconds_ratio() < 100
