"""A checkpoint is the state at its step, whole, and is not taken for one of another model."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from msr_jax.errors import UserError
from msr_jax.train import checkpoint
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.sharding import make_mesh, tree_sharding
from msr_jax.train.state import TrainState, init_state, make_train_steps

TX = optax.adam(0.1)
META = {"seed": 0, "config": {}}


def a_state(width=4, averages=True):
    return init_state({"w": jnp.arange(float(width))}, TX, 0.5 if averages else 0.0, averages)


def abstract(state):
    mesh = make_mesh({"data": -1, "fsdp": 1})
    shapes = jax.eval_shape(lambda: state)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, tree_sharding(mesh, shapes)
    )


def test_a_restored_state_is_the_one_saved_with_its_averages_and_optimiser(tmp_path):
    state = a_state().replace(step=jnp.asarray(7, jnp.int32), target_params={"w": jnp.full(4, 3.0)})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, META)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7 and checkpoints.meta() == {"format": 1, "step": 7, **META}
        restored = checkpoints.restore(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_training_on_while_a_checkpoint_is_written_does_not_change_it(tmp_path):
    size = 4_000_000  # takes long enough to write that the next steps overlap it
    steps = jax.jit(
        make_train_steps(lambda p, f, b, k: (jnp.square(p["w"] - b["x"].mean()).mean(), {}), TX, lambda s: 0.1, 0),
        donate_argnums=0,
    )
    state = init_state({"w": jnp.linspace(0, 1, size)}, TX, 0.0, False)
    batch = {"x": np.ones((1, 1, 1), np.float32)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state, _ = steps(state, {}, batch)
        at_save = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(state, META)
        for _ in range(10):
            state, _ = steps(state, {}, batch)
        jax.block_until_ready(state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored, at_save)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(a_state().replace(step=jnp.asarray(step, jnp.int32)), META)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]


def test_the_best_are_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        for step, score in ((1, 3.0), (2, 9.0), (3, float("nan")), (4, 5.0), (5, None)):
            checkpoints.save(a_state().replace(step=jnp.asarray(step, jnp.int32)), META, score)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "5"]
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:  # started again
        for step, score in ((6, 4.0), (7, None)):
            checkpoints.save(a_state().replace(step=jnp.asarray(step, jnp.int32)), META, score)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "7"]


def test_a_disk_that_fills_up_during_a_save_leaves_the_checkpoint_before_it_whole(tmp_path, caplog):
    """The limit on a file's size that the system keeps stands for the full disk: a write fails half-way."""
    state = init_state(
        {"w": jnp.asarray(np.random.default_rng(0).standard_normal(300_000), jnp.float32)}, TX, 0.0, False
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state.replace(step=jnp.asarray(1, jnp.int32)), META)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write a checkpoint to .*those before it are whole") as raised:
                checkpoints.save(state.replace(step=jnp.asarray(2, jnp.int32)), META)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(raised.value) and not any(record.exc_info for record in caplog.records)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored = checkpoints.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)


def test_a_bucket_without_what_opens_it_says_what_to_install(monkeypatch):
    def without(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket/run")), "mkdir", without)
    with pytest.raises(
        UserError, match=r"gs://bucket/run needs what opens such places: pip install 'msr_jax\[cloud\]'"
    ):
        Checkpoints("gs://bucket/run", keep=1)


def test_a_place_that_cannot_be_written_is_answered(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to"):
        Checkpoints(tmp_path / "file" / "run", keep=1)
    with pytest.raises(UserError, match=r"train\.checkpoints: nowhere://bucket/x names no store"):
        Checkpoints("nowhere://bucket/x", keep=1)


@pytest.mark.parametrize(
    "other",
    [
        a_state(width=5),
        a_state().replace(params={"v": jnp.zeros(4)}),
        a_state().replace(opt_state=optax.sgd(0.1, momentum=0.9).init({"w": jnp.zeros(4)})),
    ],
    ids=["shape", "names", "optimiser"],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_sentence(tmp_path, other: TrainState):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(a_state(), META)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(UserError, match="another model or optimiser") as raised:
            checkpoints.restore(abstract(other))
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(a_state(), META)
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(UserError, match="format 99"):
        checkpoints.meta()


@pytest.mark.parametrize("name", ["adamw", "prodigy", "muon"])
def test_the_state_of_every_optimiser_comes_back(tmp_path, name):
    from msr_jax.config import unet_base
    from msr_jax.train.optim import make_optimizer

    tx = make_optimizer({**unet_base().optim.to_dict(), "name": name, "clip_norm": 1.0}, lambda step: 0.1)
    params = {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    state = init_state(params, tx, 0.0, False)
    _, opt_state = tx.update(jax.tree.map(lambda p: 0.1 * p, params), state.opt_state, params)
    state = state.replace(step=jnp.asarray(1, jnp.int32), opt_state=opt_state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, META)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
