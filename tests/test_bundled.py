"""The model that comes with the package: small, described, taken where none is named, and able to separate."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

import msr_jax
from msr_jax.cli import main
from msr_jax.data.tracks import find_tracks, load_track
from msr_jax.errors import UserError
from msr_jax.metrics.si_sdr import si_sdr
from msr_jax.weights.model_folder import BUNDLED, load_model
from tests.conftest import launch_script


def test_it_is_small_and_has_a_card():
    files = list(BUNDLED.iterdir())
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {v.dtype for f in files if f.suffix == ".safetensors" for v in load_file(f).values()} == {
        np.dtype("float16")
    }
    assert msr_jax.load().refine == msr_jax.load("bundled").refine == "none"  # as its card says
    card = (BUNDLED / "README.md").read_text()
    assert all(f"**{word}" in card for word in ("Use", "Data", "Training", "Scores", "Limits", "Licence"))


def test_its_card_is_what_the_study_would_write_around_its_figures():
    template = (Path(__file__).resolve().parents[1] / "launch" / "study" / "bundled_card.md").read_text()
    card, at = (BUNDLED / "README.md").read_text(), 0
    for part in re.split(r"\{\w+\}", template):
        assert part.strip() in card[at:], part[:200]
        at = card.index(part.strip(), at)


@pytest.mark.parametrize("options", [[], pytest.param(["--refine", "consistency"], marks=pytest.mark.slow)])
def test_it_separates_a_piece_that_it_was_not_trained_on(tmp_path, options):
    pytest.importorskip("tinysoundfont", reason="pip install --no-deps tinysoundfont")
    render = pytest.importorskip("data_prep.render")
    arguments = ["--split", "test", "--tracks", "1", "--seconds", "8", "--seed", "3", "--workers", "1"]
    assert render.main([str(tmp_path / "corpus"), *arguments]) == 0
    stems = ["bass", "drums", "guitar", "piano"]
    (track,) = find_tracks(tmp_path / "corpus" / "test", stems)
    truth = load_track(track, stems, 44_100)  # (stems, samples)
    mixture = truth.sum(0)
    soundfile.write(tmp_path / "song.wav", mixture, 44_100, subtype="FLOAT")
    assert main(["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "stems"), *options]) == 0
    assert msr_jax.load().stems == stems
    estimates = [soundfile.read(tmp_path / "stems" / "song" / f"{stem}.wav")[0] for stem in stems]
    gains = [
        si_sdr(estimate, reference) - si_sdr(mixture, reference)
        for estimate, reference in zip(estimates, truth, strict=True)
        if np.abs(reference).max() > 1e-3
    ]
    assert len(gains) > 1 and np.mean(gains) > 3


def test_the_script_that_makes_it_keeps_two_networks_and_the_scores(tiny_model, tmp_path, monkeypatch):
    script = launch_script("study/bundle")
    monkeypatch.setattr(script, "BUNDLED", tmp_path / "bundled")
    stems = ["bass", "drums", "guitar", "piano"]
    aggregate = {"si_sdri_active": {**dict.fromkeys(stems, 5.0), "average": 6.25}, "sdr": {"average": 4.0}}
    results = {"settings": {"stems": stems}, "aggregate": aggregate, "rtf": 0.125}
    (tmp_path / "results.json").write_text(json.dumps(results))
    options = ["--refine", "consistency", "--scores", f"study={tmp_path}", "--trained", "An hour."]
    monkeypatch.setattr("sys.argv", ["bundle.py", str(tiny_model), *options])
    script.main()
    made = load_model(tmp_path / "bundled")
    assert set(made.weights) == {"deterministic", "consistency"} and made.config["default_refine"] == "consistency"
    assert {path.suffix for path in (tmp_path / "bundled").iterdir()} == {".json", ".md", ".safetensors"}
    card = (tmp_path / "bundled" / "README.md").read_text()
    assert "An hour." in card and "| study | 5.00 | 5.00 | 5.00 | 5.00 | 6.25 | 4.00 | 0.12 |" in card
    monkeypatch.setattr(script, "LIMIT", 1000)
    with pytest.raises(UserError, match="train a smaller model"):
        script.main()
