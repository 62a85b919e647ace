"""The networks of a separator: batches that fit, devices that do not show, programs that are kept."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.errors import UserError
from msr_jax.separate.network import ABREAST, Network

WEIGHTS = {"gains": np.arange(1.0, 5.0, dtype=np.float32)}


def scaled(one_by_one):
    """Stems that are the mixture times 1, 2, 3 and 4, plus their place in the song."""

    def run(weights, mixture, place, seed):
        return mixture[:, None] * weights["gains"][:, None, None] + place[:, :1, None, None] + seed

    return run


def mixtures(count, samples=50):
    return np.random.default_rng(count).standard_normal((count, samples, 1)).astype(np.float32)


def places(count):
    return np.stack([np.arange(count), np.zeros(count, int)], 1)


def expected(x, seed=0):
    gains = WEIGHTS["gains"][:, None, None]
    return x[:, None] * gains + np.arange(len(x), dtype=np.float32)[:, None, None, None] + np.float32(seed)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 20])
def test_any_number_of_mixtures_goes_through_in_batches_of_one_size(count, batch_size):
    network = Network(scaled, WEIGHTS, 4, batch_size)
    x = mixtures(count)
    np.testing.assert_allclose(network(x, places(count), 3), expected(x, 3), rtol=1e-5, atol=1e-6)
    assert len(network._programs) == 1


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="msr_jax")
    logging.getLogger("msr_jax").propagate = True
    return lambda: " ".join(caplog.messages)


def test_a_batch_that_takes_more_than_its_memory_is_halved_and_that_is_said(told):
    size = 4 * 5000 * 4  # bytes of a mixture's four stems
    network = Network(scaled, WEIGHTS, 4, 32, memory=3 * size)
    x = mixtures(9, 5000)
    np.testing.assert_allclose(network(x, places(9), 0), expected(x), rtol=1e-5, atol=1e-6)
    assert network.batch_size == 8 and network.mixtures_at_once(5000, 1) == 2
    assert "32 stems at a time; going on with 16" in told() and "16 stems at a time; going on with 8" in told()


def test_on_an_accelerator_the_batch_is_what_memory_holds():
    size = 4 * 5000 * 4  # bytes of a mixture's four stems
    network = Network(scaled, WEIGHTS, 4, memory=10 * size)
    assert not network.is_growing and network.batch_size == 8  # on a CPU
    network.is_growing = True
    assert network.mixtures_at_once(5000, 1) == 8
    x = mixtures(11, 5000)
    np.testing.assert_allclose(network(x, places(11), 0), expected(x), rtol=1e-5, atol=1e-6)
    assert network.batch_size == 32 and network.mixtures_at_once(2500, 1) >= 8


def test_calls_that_run_abreast_on_a_cpu_are_as_many_as_memory_holds_and_give_the_same_bits(monkeypatch):
    network = Network(scaled, WEIGHTS, 4, 4)
    x = mixtures(11, 5000)
    at_a_time, most, lock = 0, 0, threading.Lock()
    network(x, places(11), 3)
    ((key, program),) = network._programs.items()

    def watched(*arguments):
        nonlocal at_a_time, most
        with lock:
            at_a_time += 1
            most = max(most, at_a_time)
        time.sleep(0.02)
        with lock:
            at_a_time -= 1
        return program(*arguments)

    watched.memory_analysis = program.memory_analysis
    network._programs[key] = watched
    abreast = network(x, places(11), 3)
    assert network.mixtures_at_once(5000, 1) == most == ABREAST
    monkeypatch.setattr("msr_jax.separate.network.ABREAST_BYTES", 1)
    most = 0
    np.testing.assert_array_equal(network(x, places(11), 3), abreast)
    assert network.mixtures_at_once(5000, 1) == most == 1


def test_a_device_that_runs_out_of_memory_gets_half_as_much_and_the_results_are_all_there(monkeypatch, told):
    compile_ = Network._compile

    def of_little_memory(self, batch_size, shape):
        program = compile_(self, batch_size, shape)

        def run(*arguments):
            if batch_size > 8:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
            return program(*arguments)

        run.memory_analysis = program.memory_analysis
        return run

    monkeypatch.setattr(Network, "_compile", of_little_memory)
    network, x = Network(scaled, WEIGHTS, 4, 32), mixtures(9)
    np.testing.assert_allclose(network(x, places(9), 0), expected(x), rtol=1e-5, atol=1e-6)
    assert network.batch_size == 8 and "memory does not hold 16 stems at a time" in told()


def test_where_one_example_is_too_much_that_is_a_sentence(monkeypatch):
    compile_ = Network._compile

    def of_no_memory(self, batch_size, shape):
        def run(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

        run.memory_analysis = compile_(self, batch_size, shape).memory_analysis
        return run

    monkeypatch.setattr(Network, "_compile", of_no_memory)
    with pytest.raises(UserError, match="memory does not hold a single stem of a chunk; take fewer --segments"):
        Network(scaled, WEIGHTS, 4, 8)(mixtures(2), places(2), 0)


def test_below_the_number_of_stems_they_are_taken_one_by_one():
    asked = []
    Network(lambda one_by_one: asked.append(one_by_one) or scaled(one_by_one), WEIGHTS, 4, 3)(mixtures(1), places(1), 0)
    assert asked == [True]


def test_a_kept_program_is_taken_without_tracing_and_a_damaged_one_is_made_again(monkeypatch, tmp_path):
    file = tmp_path / "separate-x.program"
    monkeypatch.setattr(Network, "_kept", lambda *_: file)
    traced = []
    # A number of its own, so that JAX's cache does not answer.
    own = lambda one_by_one: lambda *a: (traced.append(1), scaled(one_by_one)(*a) + float(len(str(tmp_path))))[1]
    x = mixtures(3)
    first = Network(own, WEIGHTS, 4)(x, places(3), 0)
    again = Network(own, WEIGHTS, 4)(x, places(3), 0)
    assert file.stat().st_size > 100 and traced == [1]
    np.testing.assert_array_equal(first, again)
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(Network(own, WEIGHTS, 4)(x, places(3), 0), first)
    assert traced == [1, 1]


@pytest.fixture
def own_cache(tmp_path):
    """JAX's own cache in a folder of the test's, which takes whatever is compiled."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path / "jax"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", None])
def test_a_damaged_or_missing_kept_program_is_repaired_by_the_next_start_and_used_by_the_one_after(
    damage, own_cache, monkeypatch, tmp_path
):
    file, traced, x = tmp_path / "separate-x.program", [], mixtures(3)
    monkeypatch.setattr(Network, "_kept", lambda *_: file)
    own = lambda one_by_one: lambda *a: (traced.append(1), scaled(one_by_one)(*a))[1]
    start = lambda: Network(own, WEIGHTS, 4)(x, places(3), 0)
    first = start()
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    np.testing.assert_array_equal(start(), first)
    assert len(traced) == 2
    np.testing.assert_array_equal(start(), first)
    assert len(traced) == 2  # the second start's program was kept, and runs


def test_a_model_whose_networks_are_those_of_another_is_kept_too(own_cache, monkeypatch, tmp_path):
    for _ in range(2):  # JAX would know the second model's program from the first one's
        file = tmp_path / f"separate-{os.urandom(28).hex()}.program"
        monkeypatch.setattr(Network, "_kept", lambda *_, file=file: file)
        Network(scaled, WEIGHTS, 4)(mixtures(3), places(3), 0)
        assert file.exists()


def test_a_kept_program_that_fails_is_forgotten_and_made_again(monkeypatch, tmp_path):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("NOT_FOUND: Function fusion.1 not found")

    file, x = tmp_path / "separate-x.program", mixtures(3)
    file.write_bytes(b"kept")
    monkeypatch.setattr(Network, "_kept", lambda *_: file)
    broken.memory_analysis = lambda: None
    found = [broken, None]
    monkeypatch.setattr("msr_jax.separate.network._read", lambda *_: found.pop(0))
    monkeypatch.setattr("msr_jax.separate.network._write", lambda *_: None)
    network = Network(scaled, WEIGHTS, 4, 8)
    np.testing.assert_allclose(network(x, places(3), 0), expected(x), rtol=1e-5, atol=1e-6)
    assert not file.exists() and not found


def test_kept_programs_are_told_apart_by_what_they_are_made_from(monkeypatch):
    name = lambda batch_size=8, samples=50, **settings: Network(
        scaled, WEIGHTS, 4, batch_size, settings=settings or {"refine": "none"}
    )._kept(batch_size, (samples, 1))
    assert name() == name() and name().parent == Path(jax.config.jax_compilation_cache_dir)
    assert len({name(), name(4), name(samples=60), name(refine="consistency")}) == 4
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    others = {name()}
    monkeypatch.setattr("msr_jax.separate.network._sources", lambda: "other")
    assert len({name(), *others}) == 2
    assert Network(scaled, WEIGHTS, 4)._kept(8, (50, 1)) is None


DEVICES = """
import jax, numpy as np
from msr_jax.config import bsrf_base
from msr_jax.models.backbone import make_backbone
from msr_jax.separate.engine import Separator
from msr_jax.weights.model_folder import Model

config = bsrf_base()
config.model.update(dim=8, depth=1, heads=1, dim_head=8, stft_n_fft=128, stft_win_length=128, stft_hop_length=32)
config.model.update(time_transformer_depth=1, freq_transformer_depth=1, freqs_per_bands=(1, 16, 16, 16, 16))
config.update(segment=512, sample_rate=8000)
config = config.to_dict()
weights = {"deterministic": make_backbone(config["model"]).init(jax.random.key(0), False)}
song = np.random.default_rng(0).standard_normal((9000, 2)).astype(np.float32)
make = lambda size: Separator(Model(config, jax.device_get(weights)), "none", batch_size=size)

assert len(jax.local_devices()) == 8
with jax.default_device(jax.devices()[3]):
    one = make(8)
    alone = one.separate(song, 8000)
assert one.network.devices == [jax.devices()[3]]
spread = make(8)
assert spread.network.mixtures_at_once(512, 2) == 16
for stem, audio in spread.separate(song, 8000).items():
    np.testing.assert_array_equal(audio, alone[stem])
"""


def test_eight_devices_give_what_one_does_to_the_bit():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run = subprocess.run([sys.executable, "-c", DEVICES], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]


def test_threads_share_a_network():
    from concurrent.futures import ThreadPoolExecutor

    network, x = Network(scaled, WEIGHTS, 4, 8), mixtures(5)
    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(lambda seed: network(x, places(5), seed), [1] * 8):
            np.testing.assert_allclose(done, expected(x, 1), rtol=1e-5, atol=1e-6)
    assert len(network._programs) == 1 and jnp.float32 == jnp.result_type(network.weights["gains"])
