"""The log of a run that was stopped and resumed is the log of one that was not."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from msr_jax.errors import UserError
from msr_jax.train.log import RunLog


def write(workdir, first, last, total=8):
    log = RunLog(workdir, first - 1, total, log_every=4)
    for step in range(first, last + 1):
        value = np.array([float(step)])
        log.steps(step, {"loss": value, "grad_norm": value, "lr": value}, examples_per_step=2)
        if step % 4 == 0:
            log.scores(step, {"validation_si_sdr": step / 2})
    log.close()


def test_lines_after_the_restored_step_and_a_line_cut_by_a_kill_are_dropped(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", 1, 8)
    write(tmp_path / "b", 1, 6)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    write(tmp_path / "b", 5, 8)  # resumed from step 4
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_intervals_are_printed_and_go_to_tensorboard_as_means(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 1, 8)
    printed = capsys.readouterr().out
    assert "step 4/8  loss 2.5" in printed and "examples/s" in printed and "4.00 dB" in printed
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(4, 2.5), (8, 6.5)]
    assert {"grad_norm", "lr", "examples_per_second", "validation_si_sdr"} <= set(events.Tags()["scalars"])


def test_what_is_not_finite_is_null_which_every_reader_of_json_knows(tmp_path):
    def refuse(word):
        raise AssertionError(word)

    log = RunLog(tmp_path, 0, 2, log_every=1)
    log.steps(1, {"loss": np.array([1.0, np.nan]), "grad_norm": np.array([1.0, np.inf]), "lr": np.ones(2)}, 2)
    log.scores(2, {"validation_si_sdr": -np.inf})
    log.close()
    rows = [json.loads(x, parse_constant=refuse) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == 1.0 and rows[1] == {"step": 2, "loss": None, "grad_norm": None, "lr": 1.0}
    assert rows[2] == {"step": 2, "validation_si_sdr": None}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def a_step(loss=1.0, skipped=0.0):
    return {name: np.array([v]) for name, v in (("loss", loss), ("grad_norm", 1.0), ("lr", 1.0), ("skipped", skipped))}


def test_a_step_s_time_is_split_and_related_to_the_device_s_peak(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("msr_jax.train.log.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, 0, 2, log_every=2)
    log.per_step(flops=3e12, peak_flops=12e12)
    for step in (1, 2):
        for part, seconds in (("input", 0.25), ("checkpoint", 2.0)):
            with log.timed(part):
                now[0] += seconds
        now[0] += 0.75
        log.steps(step, a_step(), examples_per_step=4)
    log.close()
    value = lambda name: events(tmp_path).Scalars(name)[0].value
    assert value("seconds_per_step/input") == 0.25 and value("seconds_per_step/compute") == 0.75
    assert value("seconds_per_step/checkpoint") == 2.0 and value("examples_per_second") == 4.0
    assert value("tflops_per_device") == 3.0 and value("mfu") == 0.25


def test_scores_are_on_the_disk_when_they_were_logged_and_a_resumed_run_replaces_those_after_its_checkpoint(tmp_path):
    values = lambda: [(e.step, e.value) for e in events(tmp_path).Scalars("validation_si_sdr")]
    log = RunLog(tmp_path, 0, 8, log_every=4)
    log.scores(4, {"validation_si_sdr": 1.0})
    assert values() == [(4, 1.0)]
    log.scores(8, {"validation_si_sdr": 2.0})
    # It is killed here, and goes on from step 4 within the same second: not closed, and two files of that second.
    log = RunLog(tmp_path, 4, 8, log_every=4)
    assert values() == [(4, 1.0)]
    log.scores(8, {"validation_si_sdr": 3.0})
    assert values() == [(4, 1.0), (8, 3.0)]


@pytest.mark.parametrize("call", ["flush", "write_event"])
def test_a_full_disk_is_told(tmp_path, monkeypatch, call):
    def full(*event):
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, 0, 8, log_every=1)
    monkeypatch.setattr(log.board.writer, call, full)
    for write in (
        lambda: log.scores(4, {"validation_si_sdr": 1.0}),
        lambda: log.sounds(4, {"bass": np.zeros(4000)}, 8000),
        lambda: log.steps(4, a_step(), 1),
    ):
        with pytest.raises(UserError, match="No space left"):
            write()
    log.close()


def test_skipped_steps_are_told_and_do_not_hide_the_others(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 2, log_every=2)
    log.steps(1, a_step(loss=np.nan, skipped=1.0), 1)
    log.steps(2, a_step(loss=3.0), 1)
    log.close()
    assert "loss 3 " in (said := capsys.readouterr().out) and "skipped 1" in said


def test_audio_and_its_spectrogram_go_to_tensorboard(tmp_path):
    log = RunLog(tmp_path, 0, 1, log_every=1)
    log.sounds(1, {"bass/estimate": 2 * np.sin(np.arange(4000) / 9)}, 8000)
    log.close()
    tags = events(tmp_path)
    assert tags.Tags()["audio"] == ["audio/bass/estimate"] and tags.Tags()["images"] == ["spectrogram/bass/estimate"]
    assert tags.Audio("audio/bass/estimate")[0].sample_rate == 8000
    assert tags.Images("spectrogram/bass/estimate")[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_process_that_keeps_no_log_writes_nothing(tmp_path, capsys):
    log = RunLog(None, 0, 1, log_every=1)
    log.steps(1, a_step(), 1)
    log.scores(1, {"validation_si_sdr": 1.0})
    log.sounds(1, {"mixture": np.zeros(10)}, 8000)
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_wandb_gets_the_same_scalars_and_is_asked_for_by_name(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    log = RunLog(tmp_path, 0, 1, 1, wandb_project="music", config={"seed": 0})
    log.steps(1, a_step(), 1)
    log.close()
    assert calls[0]["project"] == "music" and calls[0]["config"] == {"seed": 0} and calls[0]["resume"] == "allow"
    assert calls[1][0] == 1 and calls[1][1]["loss"] == 1.0 and calls[-1] == "end"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        RunLog(tmp_path, 0, 1, 1, wandb_project="music")
