"""What a run does around its steps: stopping, going on, what it writes and what it refuses."""

import json
import os
import shutil
import signal

import grain
import jax
import numpy as np
import pytest
from absl import flags

from data_prep.writer import make_manifest, write_records
from msr_jax.errors import UserError
from msr_jax.methods.stages import make_refiner
from msr_jax.models.backbone import make_backbone
from msr_jax.train.batches import dispatches
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.loop import _SkipCount, train
from msr_jax.train.sharding import make_mesh
from msr_jax.train.stage import load_frozen, load_start, make_stage
from msr_jax.train.workdir import Workdir
from msr_jax.weights.model_folder import load_model, save_model
from tests import toy


class Noise(grain.transforms.Map):
    """Element k: a batch of noise that depends on k alone, NaN where it is `spoiled`.

    `kill_at`: SIGTERM to this process when that one is made.
    """

    def __init__(self, batch, kill_at=None, spoiled=()):
        self.batch, self.kill_at, self.spoiled = batch, kill_at, spoiled

    def map(self, k):
        if k == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        stems = np.random.default_rng(int(k)).standard_normal((self.batch, 4, toy.SEGMENT, 1)).astype(np.float32)
        label = np.eye(4, dtype=np.float32)[np.arange(self.batch) % 4]
        return {"stems": stems * (np.nan if k in self.spoiled else 1), "label": label}


def noise(batch=2, kill_at=None):
    return grain.MapDataset.range(1000).map(Noise(batch, kill_at))


@pytest.fixture
def small():
    """Settings of a run of the toy backbone on `noise()` that takes a second."""
    config = toy.get_config().to_dict()
    config["data"]["batch"] = 2
    config["ema_rate"] = 0.5
    config["train"].update(steps=40, steps_per_dispatch=2, log_every=2, checkpoint_every=40, validate_every=40)
    return config


def test_sigterm_saves_and_the_next_start_goes_on_from_there(small, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(small, tmp_path / "stopped", noise(kill_at=7))
    assert 0 < int(stopped.step) < 40 and signal.getsignal(signal.SIGTERM) == before
    assert f"stopped by SIGTERM after step {int(stopped.step)}" in capsys.readouterr().out
    ended = train(small, tmp_path / "stopped", noise())
    assert f"resumed from step {int(stopped.step)} in" in capsys.readouterr().out
    straight = train(small, tmp_path / "straight", noise())
    jax.tree.map(np.testing.assert_array_equal, ended, straight)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "straight")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 40

    # The model has the averaged parameters, where the config keeps an average.
    saved = load_model(tmp_path / "straight").weights["deterministic"]
    jax.tree.map(np.testing.assert_array_equal, saved, straight.ema_params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (saved, straight.params)), strict=True))

    train({**small, "data": {**small["data"], "batch": 2 * small["data"]["batch"]}}, tmp_path / "straight", noise())
    then = 40 * small["data"]["batch"]
    assert f"the data go on at example {2 * then} of their order, not at {then}" in capsys.readouterr().out

    # A finished run started again has nothing to do but to give its model a sampler's new settings; one of another network
    # keeps what is there.
    sampler = {**small["diffusion"]["sampler"], "sigma_max": 0.5}
    again = train({**small, "diffusion": {**small["diffusion"], "sampler": sampler}}, tmp_path / "straight", noise())
    said = capsys.readouterr().out
    assert int(again.step) == 40 and "resumed from step 40" in said
    assert "settings changed since then: diffusion.sampler.sigma_max (0.01 before, 0.5 now)" in said
    renewed = load_model(tmp_path / "straight")
    assert renewed.config["diffusion"]["sampler"] == sampler
    jax.tree.map(np.testing.assert_array_equal, renewed.weights["deterministic"], saved)
    kept = (tmp_path / "straight" / "config.json").read_text()
    for change, words in (
        ({"seed": 1}, "config.seed = 0, not 1"),
        ({"model": {**small["model"], "width": 32}}, "config.model.width = 64, not 32"),
    ):
        with pytest.raises(UserError, match=words):
            train({**small, **change}, tmp_path / "straight", noise())
    assert (tmp_path / "straight" / "config.json").read_text() == kept


def rendered(folder, seed=0, extra=()):
    """Records of three tracks of noise for the toy, two to train on."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(seed)
    make = lambda names: [(n, rng.integers(-9999, 9999, (4, 3 * toy.SEGMENT, 1), np.int16)) for n in names]
    tracks = {"train": make(["one", "two", *extra]), "validation": make(["three"])}
    write_records(folder, tracks, make_manifest(toy.get_config().stems, 8000, 1, toy.SEGMENT, 0.0))


def test_records_made_anew_between_a_stop_and_a_resume_are_refused_unless_they_are_accepted(small, tmp_path, capsys):
    folder = tmp_path / "records"
    rendered(folder)
    small["sample_rate"] = 8000
    small["data"].update(train=str(folder), validation=str(folder))
    longer = {**small, "train": {**small["train"], "steps": 4}}
    small["train"].update(steps=2)
    train(small, tmp_path / "run")
    rendered(folder)  # the same again, and at another place, is the same data
    folder.rename(tmp_path / "moved")
    small["data"].update(train=str(tmp_path / "moved"), validation=str(tmp_path / "moved"))
    assert int(train(small, tmp_path / "run").step) == 2
    rendered(tmp_path / "moved", seed=1, extra=["four"])
    with pytest.raises(
        UserError, match=r"1 new \(four\), 2 changed \(one, two\); tracks of validation: 1 changed.*--accept-new-data"
    ):
        train(longer, tmp_path / "run")
    assert int(train(longer, tmp_path / "run", accept_new_data=True).step) == 4
    assert "the data changed since then: tracks of train: 1 new (four)" in capsys.readouterr().out
    assert int(train(longer, tmp_path / "run").step) == 4  # the newest checkpoint has the new data


@pytest.mark.parametrize("start,per,expected", [(0, 4, [4, 8, 10]), (6, 4, [8, 10]), (9, 1, [10]), (10, 4, [])])
def test_dispatches_go_on_at_any_step_and_end_at_the_last(tiny_config, start, per, expected):
    tiny_config["train"].update(steps=10, steps_per_dispatch=per)
    mesh = make_mesh({"data": -1, "fsdp": 1})
    found = list(dispatches(noise(), start, tiny_config, mesh))
    assert [step for step, _ in found] == expected
    elements = [x for _, batches in found for x in np.asarray(batches["stems"])[:, 0]]
    for k, element in enumerate(elements):
        np.testing.assert_array_equal(element, noise()[start + k]["stems"])


def test_a_warm_start_takes_over_what_the_networks_share(small):
    small["method"] = "diffusion"
    mesh = make_mesh({"data": -1, "fsdp": 1})
    backbone = make_backbone(small["model"])
    frozen = {"deterministic": backbone.init(jax.random.key(5), False)}
    cold = make_stage(small, backbone, frozen, mesh).abstract.params
    small["init_from"]["warm_start"] = True
    warm = make_stage(small, backbone, frozen, mesh).start().params
    assert jax.tree.map(np.shape, warm) == jax.tree.map(lambda a: a.shape, cold)
    jax.tree.map(np.testing.assert_array_equal, {k: warm[k] for k in frozen["deterministic"]}, frozen["deterministic"])


def test_a_warm_start_takes_another_separator_if_one_is_named(small, tmp_path):
    backbone, mesh = make_backbone(small["model"]), make_mesh({"data": -1, "fsdp": 1})
    frozen, other = (backbone.init(jax.random.key(k), False) for k in (5, 6))
    save_model(tmp_path / "other", small, {"deterministic": other})
    small["method"] = "diffusion"
    small["init_from"]["start"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="is for a warm start"):
        load_start(small)
    small["init_from"]["warm_start"] = True
    params = make_stage(small, backbone, {"deterministic": frozen}, mesh, load_start(small)).start().params
    jax.tree.map(np.testing.assert_array_equal, {k: params[k] for k in other}, other)
    small["stems"] = [*small["stems"][:-1], "flute"]
    with pytest.raises(UserError, match="both must have the same"):
        load_start(small)


def test_a_refinement_does_not_go_on_upon_another_separator(small, tmp_path):
    backbone = make_backbone(small["model"])
    for k in (5, 6):
        save_model(tmp_path / f"det{k}", small, {"deterministic": backbone.init(jax.random.key(k), False)})
    shutil.copytree(tmp_path / "det5", tmp_path / "det")
    config = {
        **small,
        "method": "diffusion",
        "init_from": {**small["init_from"], "deterministic": str(tmp_path / "det")},
    }
    train(config, tmp_path / "run", noise())
    longer = {**config, "train": {**config["train"], "steps": config["train"]["steps"] + 2}}
    shutil.rmtree(tmp_path / "det")
    shutil.copytree(tmp_path / "det6", tmp_path / "det")
    with pytest.raises(UserError, match=r"were made on another deterministic network than .*det has now; give back"):
        train(longer, tmp_path / "run", noise())
    shutil.rmtree(tmp_path / "det")
    shutil.copytree(tmp_path / "det5", tmp_path / "det")
    assert int(train(longer, tmp_path / "run", noise()).step) == longer["train"]["steps"]


def test_settings_that_mean_nothing_for_a_run_are_refused(small, tmp_path):
    for section, change, words in (
        ("init_from", {"diffusion": str(tmp_path)}, r"init_from\.diffusion is not read by deterministic"),
        ("train", {"keep_best": 1}, r"keep_best goes by the scores of validation: set config\.data\.validation"),
    ):
        with pytest.raises(UserError, match=words):
            train({**small, section: {**small[section], **change}}, tmp_path / "run", noise())
    often = {**small["train"], "keep_best": 1, "checkpoint_every": 4, "validate_every": 6}
    with pytest.raises(UserError, match=r"checkpoint_every \(4\) a multiple of config\.train\.validate_every \(6\)"):
        train({**small, "data": {**small["data"], "validation": "x"}, "train": often}, tmp_path / "run", noise())


def test_an_average_that_is_wanted_later_is_no_damage(small, tmp_path):
    small["ema_rate"] = 0.0
    train(small, tmp_path / "run", noise())
    with pytest.raises(
        UserError, match=r"were made with config\.ema_rate = 0\.0, not 0\.9, and do not fit; use another"
    ):
        train({**small, "ema_rate": 0.9}, tmp_path / "run", noise())


def test_a_finished_run_with_fewer_steps_writes_its_model(small, tmp_path):
    train(small, tmp_path / "run", noise())
    shutil.rmtree(tmp_path / "run" / "model")
    train({**small, "train": {**small["train"], "steps": small["train"]["steps"] // 2}}, tmp_path / "run", noise())
    assert (tmp_path / "run" / "model" / "deterministic.safetensors").is_file()


def test_the_deterministic_stage_goes_on_from_a_model_if_one_is_named(small, tmp_path):
    train(small, tmp_path / "first", noise())
    first = load_model(tmp_path / "first").weights["deterministic"]
    small["seed"] += 1
    small["init_from"]["deterministic"] = str(tmp_path / "first")
    mesh = make_mesh({"data": -1, "fsdp": 1})
    start = make_stage(small, make_backbone(small["model"]), load_frozen(small), mesh).start().params
    jax.tree.map(np.testing.assert_array_equal, start, first)
    train(small, tmp_path / "second", noise())
    second = load_model(tmp_path / "second").weights
    assert list(second) == ["deterministic"]
    assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])


def test_a_stage_must_fit_what_it_starts_from(tiny_config, tiny_model, tmp_path):
    tiny_config.update(method="consistency")
    tiny_config["model"]["attentions"] = (False,)
    tiny_config["init_from"]["diffusion"] = str(tiny_model)
    with pytest.raises(UserError, match=r"config\.model\.attentions is \[False\], but \[True\] in"):
        train(json.loads(json.dumps(tiny_config)), tmp_path / "run", noise())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["diffusion", "consistency"])
def test_a_teacher_is_computed_as_it_was_trained(tiny_config, tiny_model, tmp_path, section):
    teacher = load_model(tiny_model).config
    shared = ("model", "stems", "sample_rate", "channels", "input_level", "diffusion", "consistency")
    tiny_config.update({name: json.loads(json.dumps(teacher[name])) for name in shared} | {"method": "consistency"})
    tiny_config["init_from"]["diffusion"] = str(tiny_model)
    tiny_config[section]["sigma_data"] = 0.77
    with pytest.raises(
        UserError, match=rf"config\.{section}\.sigma_data is 0\.77, but the teacher in .* was trained with"
    ):
        train(json.loads(json.dumps(tiny_config)), tmp_path / "run", noise())


def test_a_workdir_that_cannot_be_made_is_answered(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir"):
        train(small, tmp_path / "file" / "run", noise())


def test_the_only_model_which_a_killed_run_had_set_aside_is_put_back(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / ".model.99999999.old")
    shutil.copytree(tiny_model, tmp_path / ".model.1.half")
    Workdir(tmp_path).release()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "model"]
    assert load_model(tmp_path / "model").weights


def test_a_workdir_that_another_run_holds_is_refused_and_nothing_in_it_touched(small, tmp_path):
    train({**small, "train": {**small["train"], "steps": 4}}, tmp_path / "run", noise())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    holder = Workdir(tmp_path / "run")
    with pytest.raises(
        UserError, match=rf"is held by a run \(process {os.getpid()} on .*\); wait for it or use another"
    ):
        train(small, tmp_path / "run", noise())
    holder.release()
    assert {p: p.stat().st_mtime_ns for p in before if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
    assert int(train(small, tmp_path / "run", noise()).step) == 40


def test_skipped_steps_change_nothing_and_the_count_survives_a_resume(small, tmp_path, capsys):
    small["train"].update(steps=8, checkpoint_every=4, max_skipped=10)
    bad = {2, 5, 7}
    state = train(small, tmp_path / "run", grain.MapDataset.range(1000).map(Noise(2, spoiled=bad)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] - 1 for row in rows if row["skipped"]] == sorted(bad)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])).all()
    assert "skipped 1" in capsys.readouterr().out
    with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:
        assert checkpoints.meta()["skipped"] == {"total": 3, "in_a_row": 1}
    small["train"].update(steps=30, max_skipped=3)
    with pytest.raises(UserError, match=r"the loss of step 11 is nan.*4 steps in a row \(6 in all\)"):
        train(small, tmp_path / "run", grain.MapDataset.range(1000).map(Noise(2, spoiled=range(8, 40))))


def test_a_stop_in_the_middle_of_skipped_steps_loses_none_before_them(small, tmp_path):
    spoiled = range(6, 1000)
    stopped = train(small, tmp_path / "run", grain.MapDataset.range(1000).map(Noise(2, kill_at=9, spoiled=spoiled)))
    assert 6 < int(stopped.step) < 40
    with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:
        assert checkpoints.latest_step() == int(stopped.step)


def test_the_rate_that_is_told_is_the_one_that_was_taken(small, tmp_path):
    small["optim"].update(name="adam", b1=0.0, b2=0.0, lr=1e-2, final_lr=0.0, schedule="linear")
    small["train"].update(steps=8, steps_per_dispatch=1, log_every=1, checkpoint_every=8, validate_every=8)
    runs = {}
    for name, spoiled in (("whole", ()), ("skipped", {1, 2})):
        train(small, tmp_path / name, grain.MapDataset.range(1000).map(Noise(2, spoiled=spoiled)))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        runs[name] = [row["lr"] for row in rows if not row["skipped"]]
    assert runs["skipped"] == runs["whole"][:6]


def test_accumulated_micro_batches_are_elements_one_after_the_other(small):
    small["optim"]["accumulate"] = 3
    small["train"].update(steps=4)
    mesh = make_mesh({"data": -1, "fsdp": 1})
    found = list(dispatches(noise(), 2, small, mesh))
    assert [step for step, _ in found] == [4] and found[0][1]["stems"].shape[:3] == (2, 3, 2)
    parts = np.asarray(found[0][1]["stems"]).reshape(6, 2, 4, -1, 1)
    for k, part in enumerate(parts):
        np.testing.assert_array_equal(part, noise()[6 + k]["stems"])


def test_the_profile_is_a_trace_of_steps(small, tmp_path, capsys):
    small["train"].update(steps=8)
    train(small, tmp_path / "run", noise(), profile_steps=2)
    assert list((tmp_path / "run" / "profile").rglob("*.trace.json.gz"))
    assert capsys.readouterr().out.count("profile in") == 1


@pytest.mark.multiprocess
def test_worker_processes_give_the_same_batches_in_a_program_that_parsed_no_flags(tiny_config):
    tiny_config["train"].update(steps=5, steps_per_dispatch=2)
    tiny_config["data"]["workers"] = 2
    mesh = make_mesh({"data": -1, "fsdp": 1})
    flags.FLAGS.unparse_flags()
    try:
        found = list(dispatches(noise(), 1, tiny_config, mesh))
    finally:
        flags.FLAGS.mark_as_parsed()
    elements = [x for _, batches in found for x in np.asarray(batches["stems"])[:, 0]]
    assert len(elements) == 4
    for k, element in enumerate(elements, 1):
        np.testing.assert_array_equal(element, noise()[k]["stems"])


def skips(*steps):
    """Metrics of a dispatch: steps whose loss is given, with a gradient that is finite where the loss is."""
    loss = np.array(steps, float)
    return {"loss": loss, "grad_norm": loss, "skipped": ~np.isfinite(loss)}


def test_steps_without_a_finite_loss_are_counted_and_too_many_in_a_row_end_the_run_with_a_report():
    count = _SkipCount(limit=2)
    count.add(4, skips(1, np.nan, np.inf, 2))
    count.check()
    assert count.counts == {"total": 2, "in_a_row": 0}
    count.add(6, skips(np.nan, np.nan))
    count.check()
    resumed = _SkipCount(limit=2, **count.counts)
    resumed.add(8, skips(-np.inf, 1))
    words = r"the loss of step 7 is -inf, its gradient norm -inf, and 3 steps in a row \(5 in all\) were skipped"
    with pytest.raises(UserError, match=words):
        resumed.check()


def test_det_x2_trains_a_second_network_from_the_first_s_estimate_and_separates_with_it(small, records, tmp_path):
    small["train"].update(steps=8, checkpoint_every=8, validate_every=8, validation_windows=2)
    small["data"]["validation"] = str(records)
    train(small, tmp_path / "det", noise())
    small.update(method="det_x2")
    small["init_from"].update(deterministic=str(tmp_path / "det"), warm_start=True)
    train(small, tmp_path / "x2", noise())
    model = load_model(tmp_path / "x2")
    assert sorted(model.weights) == ["det_x2", "deterministic"]
    first, second = model.weights["deterministic"], model.weights["det_x2"]
    assert jax.tree.map(np.shape, second) == jax.tree.map(np.shape, first)  # no noise-level input
    jax.tree.map(np.testing.assert_array_equal, first, load_model(tmp_path / "det").weights["deterministic"])

    backbone = make_backbone(small["model"])
    mixture, labels = np.random.default_rng(0).standard_normal((1, toy.SEGMENT, 1)).astype(np.float32), np.eye(4)
    estimate, features = backbone.separate(first, mixture.repeat(4, 0), labels)
    expected = backbone.refine(second, estimate, labels, None, backbone.condition(second, features))
    refined = make_refiner(small, backbone, "det_x2")(model.weights, mixture, jax.random.key(0))
    np.testing.assert_allclose(refined[0], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(expected - estimate)).max() > 1e-3

    # At σ = σ_data: half of what goes in, and the network on it divided by √2 σ_data, times σ_data / √2. The folder knows.
    small["diffusion"].update(sigma_data=0.2, control_sigma=0.2)
    train(small, tmp_path / "x2_scaled", noise())
    model = load_model(tmp_path / "x2_scaled")
    second = model.weights["det_x2"]
    network = lambda x: backbone.refine(second, x, labels, None, backbone.condition(second, features))
    refined = make_refiner(model.config, backbone, "det_x2")(model.weights, mixture, jax.random.key(0))
    expected = estimate / 2 + 0.2 / 2**0.5 * network(estimate / (0.2 * 2**0.5))
    np.testing.assert_allclose(refined[0], expected, rtol=1e-5, atol=1e-6)
