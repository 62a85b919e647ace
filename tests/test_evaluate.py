"""Evaluation: conventions for silence, protocols, resuming, estimates of other tools, and what is refused or named."""

import json
import queue
import shutil
import threading
import time

import numpy as np
import pytest
import soundfile

from msr_jax.audio.io import resample
from msr_jax.cli import main
from msr_jax.data.tracks import find_tracks, load_track
from msr_jax.errors import UserError
from msr_jax.evaluate import score
from msr_jax.evaluate.command import main as command
from msr_jax.evaluate.protocols import METRICS, PROTOCOLS, cut, estimate_stems, protocol_text, score_song
from msr_jax.evaluate.score import Plan, evaluate, evaluate_tracks, mixture_as_estimate
from msr_jax.evaluate.songs import load_references

STEMS = ["bass", "drums", "guitar", "piano"]
MUSDB = ["drums", "bass", "other", "vocals"]
RATE = 8000


def run(*argv):
    return main(["evaluate", *map(str, argv)])


def results_in(folder):
    text = (folder / "results.json").read_text()
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def noise(stems=2, channels=1, seconds=3, seed=0, rate=1000):
    return np.random.default_rng(seed).standard_normal((stems, channels, seconds * rate)).astype(np.float32)


def test_the_mixture_improves_nothing_and_conventions_differ_in_silence_alone(corpus):
    tracks = find_tracks(corpus / "test", STEMS)
    results = evaluate(mixture_as_estimate(STEMS), tracks, STEMS, RATE)
    for metric in ("si_sdri_active", "si_sdri_msdm"):
        assert all(abs(v) < 1e-6 for v in results["aggregate"][metric].values())
    # The second track has no guitar: its windows count in one convention and not in the other.
    active, msdm = (results["counts"][m] for m in ("si_sdri_active", "si_sdri_msdm"))
    assert active["guitar"] * 2 == msdm["guitar"] == msdm["bass"] == active["bass"]
    # The stem that is silent throughout does not take the others' SDR with it.
    assert results["counts"]["sdr"]["guitar"] * 2 == results["counts"]["sdr"]["bass"] == 26
    assert set(results["aggregate"]) == set(METRICS)


def test_estimates_at_60_db_score_so_in_every_measure(corpus):
    tracks = find_tracks(corpus / "test", STEMS)[:1]
    references = load_track(tracks[0], STEMS, RATE)
    hiss = np.random.default_rng(0).standard_normal(references.shape)
    near = references + 1e-3 * np.sqrt(np.square(references).mean(-1, keepdims=True)) * hiss
    aggregate = evaluate(lambda mixture, rate: dict(zip(STEMS, near, strict=True)), tracks, STEMS, RATE)["aggregate"]
    for metric in ("si_sdri_active", "sdr", "isr", "sir", "sar"):
        assert aggregate[metric]["average"] > 50, metric
    for metric in ("si_sdr", "snr"):
        assert aggregate[metric]["average"] == pytest.approx(60, abs=3), metric


def test_a_frame_is_kept_for_stems_that_sound_in_it():
    references = noise()
    references[0, :, 1000:2000] = 0
    scores = score_song(references + 0.1 * noise(seed=1), references, ["a", "b"], 1000)
    assert [len(scores["sdr"][s]) for s in "ab"] == [2, 3]
    museval = score_song(references + 0.1 * noise(seed=1), references, ["a", "b"], 1000, "museval")
    assert [len(museval["sdr"][s]) for s in "ab"] == [2, 2]
    np.testing.assert_allclose(museval["sdr"]["a"], scores["sdr"]["a"], atol=1e-3)


def test_an_estimate_that_says_nothing_counts_as_an_error_as_large_as_the_stem():
    references = noise()
    estimates = references.copy()
    estimates[0] = 0
    assert score_song(estimates, references, ["a", "b"], 1000)["sdr"]["a"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_references_that_were_resampled_score_as_16_bit_files_of_that_rate(tmp_path):
    at_corpus_rate, at_rate, stems = tmp_path / "track", tmp_path / "converted", STEMS[:2]
    for k, stem in enumerate(stems):
        x = 0.1 * np.random.default_rng(k).standard_normal((32_000, 1))
        for folder, audio, rate in ((at_corpus_rate, x, 8000), (at_rate, resample(x, 8000, 4000), 4000)):
            folder.mkdir(exist_ok=True)
            soundfile.write(folder / f"{stem}.wav", audio, rate, subtype="PCM_16")
    leak = noise(2, seconds=4, seed=5, rate=4000)
    scores = []
    for folder in (at_corpus_rate, at_rate):
        references = load_references(folder, stems, 4000, 1)
        scores.append(score_song(0.9 * references + 0.1 * references[::-1] + 0.01 * leak, references, stems, 4000))
    for metric in ("sdr", "isr", "sir", "sar"):
        for stem in stems:
            assert len(scores[0][metric][stem]) == 4
            np.testing.assert_allclose(scores[0][metric][stem], scores[1][metric][stem], atol=0.5)
    assert not any(scores[0]["singular_frames"].values())


def test_singular_frames_are_counted_in_a_note_and_enter_neither_sir_nor_sar(tmp_path):
    stems = STEMS[:2]
    for stem, audio in zip(stems, noise(2), strict=True):
        spectrum = np.fft.rfft(audio[0])
        spectrum[1000:] = 0  # of 1501
        tmp_path.joinpath("song").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "song" / f"{stem}.wav", 0.1 * np.fft.irfft(spectrum), 1000, subtype="FLOAT")
    separate = lambda mixture, rate: {
        s: 0.5 * mixture + 0.01 * x[0] for s, x in zip(stems, noise(2, seed=6), strict=True)
    }
    results = evaluate(separate, [tmp_path / "song"], stems, 1000)
    assert results["counts"]["sdr"] == dict.fromkeys(stems, 3)
    assert results["counts"]["sir"] == results["counts"]["sar"] == dict.fromkeys(stems, 0)
    assert results["aggregate"]["sir"]["average"] is None
    assert "singular to precision: bass 3 of 3, drums 3 of 3" in results["tracks"]["song"]["notes"][0]


def test_every_protocol_says_how_references_are_rounded_and_what_is_silence():
    for protocol in PROTOCOLS:
        for backend in ("jax", "museval"):
            assert "16 bits" in protocol_text(protocol, backend) and "singular" in protocol_text(protocol, backend)
            says_museval = "add up to 0" in protocol_text(protocol, backend)
            assert says_museval == (backend == "museval" or protocol == "paper")


def test_a_stem_in_antiphase_keeps_its_frames_but_by_museval_s_rule():
    references = noise(channels=2)
    references[0, 1] = -references[0, 0]
    estimates = references + 0.1 * noise(channels=2, seed=1)
    scores = score_song(estimates, references, ["a", "b"], 1000)
    assert [len(scores[metric]["a"]) for metric in ("sdr", "isr", "sir", "sar")] == [3] * 4
    assert score_song(estimates, references, ["a", "b"], 1000, "museval")["sdr"]["a"] == []


def test_protocols_cut_as_their_authors_did():
    mono, stereo = noise(stems=4, seconds=35), noise(stems=4, channels=2, seconds=25)
    mono[1:, :, 10_000:20_000] = 0  # one active stem only
    segment = 10_000
    assert cut(mono, "song", None) is mono
    assert (cut(mono, "msdm", segment) == mono[..., :30_000]).all()
    assert (cut(mono, "paper", segment) == np.concatenate([mono[..., :10_000], mono[..., 20_000:30_000]], -1)).all()
    padded = cut(stereo, "paper", segment)
    assert padded.shape[-1] == 30_000 and (padded[..., :25_000] == stereo).all() and not padded[..., 25_000:].any()


def test_segments_are_separated_on_their_own():
    references, seen = noise(stems=2, channels=2), []

    def separate(mixture, rate):
        seen.append(mixture.shape)
        return {"a": mixture, "b": 2 * mixture}

    estimates = estimate_stems(separate, references, ["a", "b"], 1000, 1500)
    assert seen == [(1500, 2), (1500, 2)]
    np.testing.assert_allclose(estimates[1], 2 * references.sum(0), rtol=1e-6)


def test_the_paper_s_protocol_reports_under_the_released_names(corpus):
    tracks = find_tracks(corpus / "test", STEMS)
    results = evaluate(mixture_as_estimate(STEMS), tracks, STEMS, RATE, protocol="paper")
    released = results["released"]
    assert released["msdm_si_sdr_avg"] == pytest.approx(0, abs=1e-6)
    # The second track lacks a stem, and so all of its SDR.
    assert released["museval_sdr/bass/num_tracks"] == 1
    assert results["counts"]["sdr"] == dict.fromkeys(STEMS, 11)
    assert released["sdr_median_of_medians"] == pytest.approx(results["aggregate"]["sdr"]["average"], abs=1e-9)


def test_an_unknown_protocol_is_refused(corpus):
    with pytest.raises(UserError, match="protocol must be one of"):
        evaluate(mixture_as_estimate(STEMS), find_tracks(corpus / "test", STEMS), STEMS, RATE, protocol="best")


def test_a_model_is_evaluated_beside_its_deterministic_estimate_and_resumes(short_corpus, toy_model, tmp_path, capsys):
    argv = (
        "--data",
        short_corpus,
        "--model",
        toy_model,
        "--refine",
        "consistency",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    )
    assert run(*argv) == 0
    said = capsys.readouterr().out
    assert "taking the split test" in said and "| SDR (dB) |" in said
    first = results_in(tmp_path / "out")
    assert first["settings"]["refine"] == "consistency" and first["settings"]["protocol"] == "song" and first["rtf"] > 0
    assert first["settings"]["tracks"] == 2 and "museval" in first["settings"]["versions"]
    for metric in ("si_sdri_active", "si_sdri_msdm", "sdr"):
        assert list(first["aggregate"][metric]) == [*STEMS, "average"]
    assert set(first["deterministic"]["tracks"]) == set(first["tracks"])
    (tmp_path / "out" / "tracks" / "Track00001.json").unlink()
    kept = tmp_path / "out" / "tracks" / "Track00000.json"
    before = kept.stat().st_mtime_ns
    assert run(*argv) == 0
    assert "1 of 2 tracks were scored before" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before and results_in(tmp_path / "out")["aggregate"] == first["aggregate"]
    assert run(*argv[:-2], "--seed", 1, "--no-det", "--out", tmp_path / "out") == 0  # other settings: all anew
    assert "scored before" not in capsys.readouterr().out


def test_an_interrupted_evaluation_does_not_wait_for_the_tracks_in_work(short_corpus):
    tracks = find_tracks(short_corpus / "test", STEMS)
    in_work, may_end, is_let_go = threading.Event(), threading.Event(), queue.Queue()

    def estimate(folder, references):
        if folder == tracks[1]:
            in_work.set()
            is_let_go.put(may_end.wait(20))
        raise UserError("not needed here")

    def interrupt(folder):
        in_work.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_tracks(tracks, [estimate] * 2, Plan(STEMS, RATE), workers=2, progress=interrupt)
    may_end.set()
    assert is_let_go.get()


def test_the_time_of_a_track_is_that_of_its_separation_without_the_wait_for_a_device(short_corpus):
    def estimate(folder, references):
        time.sleep(1.5)
        return 0.5 * references, []

    tracks = find_tracks(short_corpus / "test", STEMS)
    scored, _, _ = evaluate_tracks(tracks * 2, [estimate], Plan(STEMS, RATE), workers=4)
    assert all(1.5 <= track["work_seconds"] < 2.9 for track in scored.values())


def test_shards_share_the_work_and_the_last_call_collects(short_corpus, tmp_path, capsys):
    argv = ("--data", short_corpus, "--out", tmp_path / "out")
    for k in (1, 2):
        assert run(*argv, "--shard", f"{k}/2") == 0
        assert not (tmp_path / "out" / "results.json").exists()
    assert run(*argv) == 0
    assert "2 of 2 tracks were scored before" in capsys.readouterr().out
    assert len(results_in(tmp_path / "out")["tracks"]) == 2


def stereo_song(folder, stems=MUSDB, seconds=3, rate=RATE, channels=2, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for k, stem in enumerate(stems):
        x = 0.1 * np.random.default_rng([seed, k]).standard_normal((int(seconds * rate), channels))
        soundfile.write(folder / f"{stem}.wav", x, rate, subtype="FLOAT")


def test_folders_of_estimates_are_scored_and_every_fault_is_named(tmp_path, capsys):
    names = ("good", "short", "resampled", "cut", "nan", "poorer", "alone")
    for k, name in enumerate(names):
        stereo_song(tmp_path / "references" / name, seed=k)
        if name != "alone":
            stereo_song(tmp_path / "estimates" / name, seed=k)
    stereo_song(tmp_path / "estimates" / "stranger")
    made = tmp_path / "estimates"
    stereo_song(made / "short", ["vocals"], seconds=2.95)
    stereo_song(made / "resampled", ["vocals"], rate=16_000, channels=1)
    stereo_song(made / "cut", ["vocals"], seconds=2)
    broken = np.full((3 * RATE, 2), 0.1, np.float32)
    broken[5] = np.nan
    soundfile.write(made / "nan" / "bass.wav", broken, RATE, subtype="FLOAT")
    (made / "poorer" / "drums.wav").unlink()
    argv = ("--estimates", made, "--references", tmp_path / "references", "--out", tmp_path / "out")
    assert run(*argv) == 1
    results = results_in(tmp_path / "out")
    reasons = {p["track"]: p["reason"] for p in results["problems"]}
    assert set(reasons) == {"cut", "nan", "poorer", "alone", "stranger"}
    for name, words in (
        ("cut", "lasts 2.00 s, its reference 3.00 s"),
        ("nan", "NaN"),
        ("poorer", "lacks the estimates of drums"),
        ("alone", "no folder of estimates"),
        ("stranger", "without a reference"),
    ):
        assert words in reasons[name]
    assert set(results["tracks"]) == {"good", "short", "resampled"}
    assert results["tracks"]["good"]["notes"] == []
    assert "400 samples shorter" in results["tracks"]["short"]["notes"][0]
    assert ["channels" in n or "resampled" in n for n in results["tracks"]["resampled"]["notes"]] == [True, True]
    assert results["settings"]["channels"] == 2 and results["settings"]["stems"] == MUSDB
    assert min(results["tracks"]["good"]["si_sdr"]["bass"]) > 100
    for text in (capsys.readouterr().out, *((tmp_path / "out" / n).read_text() for n in ("results.md", "report.html"))):
        assert all(name in text for name in reasons)


def two_tools(folder, names=("song",)):
    """Arguments that score the estimates of tool A, and of tool B, into one place; both are poorer than the references."""
    for name in names:
        for seed, place in enumerate(("references", "A", "B")):
            stereo_song(folder / place / name, seconds=1, channels=1, seed=seed)
    common = ("--references", folder / "references", "--out", folder / "out")
    return [("--estimates", folder / tool, *common) for tool in "AB"]


def excerpt_in(folder, stem="bass"):
    return soundfile.read(folder / "out" / "excerpts" / "song" / f"{stem}.estimate.wav")[0]


def heard_in(folder):
    return (folder / "out" / "report.html").read_text().count('class="sound"')


def test_a_report_plays_the_estimates_that_it_scores(tmp_path):
    a, b = two_tools(tmp_path)
    assert run(*a) == 0 and heard_in(tmp_path) == 9
    assert run(*b, "--excerpts", 0) == 0 and heard_in(tmp_path) == 0
    assert run(*b) == 0 and heard_in(tmp_path) == 9
    made = soundfile.read(tmp_path / "B" / "song" / "bass.wav")[0]
    np.testing.assert_allclose(excerpt_in(tmp_path), made, atol=2**-15)


def test_an_excerpt_that_is_not_whole_is_made_anew(tmp_path, monkeypatch):
    a, _ = two_tools(tmp_path)
    whole, written = score.write_audio, []

    def killed(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, *rest)

    monkeypatch.setattr(score, "write_audio", killed)
    with pytest.raises(KeyboardInterrupt):
        command(list(map(str, a)))
    monkeypatch.undo()
    assert run(*a) == 0 and heard_in(tmp_path) == 9
    assert (
        run(*a, "--stems", "bass,drums") == 0 and heard_in(tmp_path) == 7
    )  # the mixture, and pairs of two stems and the rest
    assert run(*a) == 0 and heard_in(tmp_path) == 9


def test_what_cannot_be_written_ends_the_evaluation_and_is_no_problem_of_a_track(tmp_path, monkeypatch, capsys):
    a, _ = two_tools(tmp_path, ("song", "song 2"))

    def full(path, *rest):
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(score, "write_audio", full)
    assert run(*a, "--excerpts", 1) == 2
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "out" / "results.json").exists()


def test_an_estimate_too_large_to_be_scored_is_a_problem_of_its_track(tmp_path):
    a, _ = two_tools(tmp_path, ("song", "huge"))
    path = tmp_path / "A" / "huge" / "bass.wav"
    soundfile.write(path, 1e18 * soundfile.read(path)[0], RATE, subtype="FLOAT")
    assert run(*a) == 1
    results = results_in(tmp_path / "out")
    assert list(results["tracks"]) == ["song"] and "scale them down" in results["problems"][0]["reason"]


def test_a_shard_names_the_tracks_that_it_cannot_score(tmp_path, capsys):
    a, _ = two_tools(tmp_path, ("song", "song 2"))
    (tmp_path / "A" / "song 2" / "bass.wav").unlink()
    assert [run(*a, "--shard", f"{k}/2") for k in (1, 2)] == [0, 1]
    assert "NOT scored: song 2: " in capsys.readouterr().out


def test_a_track_of_a_long_name_is_scored_heard_and_kept(tmp_path, capsys):
    a, _ = two_tools(tmp_path, ["x" * 250])
    assert run(*a) == 0 and list(results_in(tmp_path / "out")["tracks"]) == ["x" * 250]
    assert heard_in(tmp_path) == 9
    assert run(*a) == 0 and "1 of 1 tracks were scored before" in capsys.readouterr().out


def test_an_excerpt_may_have_any_rate_and_number_of_channels(tmp_path):
    audio = 0.1 * noise(stems=1, channels=9, seconds=1)
    score.write_excerpt(tmp_path, audio, audio, Plan(["bass"], 1_000_000, 9))
    assert soundfile.info(tmp_path / "bass.estimate.wav").channels == 9


def test_one_odd_reference_is_named_and_changes_no_other_score(tmp_path, capsys):
    for k in range(3):
        for place in ("references", "estimates"):
            stereo_song(tmp_path / place / f"song {k}", seed=k)
    argv = ("--estimates", tmp_path / "estimates", "--references", tmp_path / "references", "--out", tmp_path / "out")
    stereo_song(tmp_path / "references" / "song 0", ["drums"], channels=1)
    assert run(*argv) == 0
    assert (
        f"scoring at {RATE} Hz in 2 channels, as most references are; not so: song 0/drums.wav"
        in capsys.readouterr().out
    )
    results = results_in(tmp_path / "out")
    assert results["settings"]["channels"] == 2 and results["tracks"]["song 1"]["notes"] == []
    (tmp_path / "references" / "song 0" / "drums.wav").write_bytes(b"")
    assert run(*argv) == 1
    results = results_in(tmp_path / "out")
    assert [p["track"] for p in results["problems"]] == ["song 0"] and set(results["tracks"]) == {"song 1", "song 2"}


def test_a_silent_estimate_is_no_singular_projection(tmp_path):
    for place in ("references", "estimates"):
        stereo_song(tmp_path / place / "song")
    soundfile.write(tmp_path / "estimates" / "song" / "drums.wav", np.zeros((3 * RATE, 2)), RATE, subtype="FLOAT")
    argv = ("--estimates", tmp_path / "estimates", "--references", tmp_path / "references", "--out", tmp_path / "out")
    assert run(*argv) == 0
    track = results_in(tmp_path / "out")["tracks"]["song"]
    assert track["singular_frames"]["drums"] == 0 and not any("singular" in note for note in track["notes"])


def test_tracks_of_a_model_that_cannot_be_read_are_named_too(short_corpus, tmp_path):
    shutil.copytree(short_corpus / "test", tmp_path / "data")
    path = tmp_path / "data" / "Track00001" / "bass.wav"
    path.write_bytes(path.read_bytes()[:1000])
    assert run("--data", tmp_path / "data", "--out", tmp_path / "out") == 1
    results = results_in(tmp_path / "out")
    assert [p["track"] for p in results["problems"]] == ["Track00001"] and list(results["tracks"]) == ["Track00000"]


def test_bad_input_gets_one_sentence(corpus, toy_model, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for argv, words in (
        (("--data", tmp_path / "none", "--out", out), "is no folder"),
        (("--data", tmp_path / "empty", "--out", out), "neither the stems of"),
        (("--data", tmp_path / "empty", "--stems", "bass", "--out", out), "holds no tracks"),
        (("--data", corpus, "--out", tmp_path / "file" / "out"), "cannot write to --out"),
        (("--data", corpus, "--shard", "3/2", "--out", out), "--shard must be K/N"),
        (("--data", corpus, "--workers", 0, "--out", out), "--workers must be at least 1"),
        (("--data", corpus, "--excerpts", -1, "--out", out), "--excerpts must be at least 0"),
        (("--data", corpus, "--model", tmp_path / "empty", "--out", out), "config.json"),
        (("--data", corpus, "--model", toy_model, "--estimates", corpus, "--out", out), "exclude each other"),
        (("--data", corpus, "--refine", "none", "--out", out), "name its folder by --model"),
        (("--data", corpus, "--seed", 0, "--no-det", "--out", out), "--seed, --no-det would change nothing"),
        (("--data", corpus, "--mixture-consistent", "--out", out), "--mixture-consistent would change nothing"),
        (("--data", corpus, "--model", toy_model, "--stems", "bass", "--out", out), "--stems would change nothing"),
        (("--data", corpus, "--model", toy_model, "--sample-rate", RATE, "--out", out), "--sample-rate would change"),
        (("--data", corpus, "--estimates", corpus, "--dtype", "float32", "--out", out), "name its folder by --model"),
        (("--data", corpus, "--estimates", tmp_path / "none", "--out", out), "is no folder"),
        (("--data", corpus, "--estimates", tmp_path / "empty", "--out", out), "has the name of a reference track"),
        (("--data", tmp_path / "empty", "--estimates", corpus, "--out", out), "neither the stems of"),
        (("--data", corpus, "--estimates", corpus, "--protocol", "paper", "--out", out), "--protocol song"),
    ):
        assert run(*argv) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
        assert not out.exists()
