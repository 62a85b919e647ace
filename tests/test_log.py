"""The log of a run that was stopped and resumed is the log of one that was not."""

import json

import numpy as np

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
