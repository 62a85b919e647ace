"""The paper's tables hold what was measured, what was quoted, and the names of what could not be run."""

import json

from msr_jax.cli import main


def tables(*argv):
    return main(["tables", *map(str, argv)])


def test_rows_are_measured_quoted_or_named_as_missing(short_corpus, toy_model, tmp_path, capsys):
    argv = (
        "--slakh-model",
        toy_model,
        "--slakh-data",
        short_corpus,
        "--tracks",
        1,
        "--repeats",
        1,
        "--protocol",
        "song",
    )
    assert tables(*argv, "--out", tmp_path) == 0
    told = json.loads((tmp_path / "tables.json").read_text())
    measured = {row["system"]: row for row in told["measured"]["Slakh2100"]}
    assert list(measured) == ["Det.", "Det. + Diff.", "Det. + CD, T = 1", "Det. + CD, T = 2", "Det. + CD, T = 4"]
    assert all(row["seconds"] > 0 and row["tracks"] == 1 for row in measured.values())
    assert measured["Det. + Diff."]["parameters"] > 1.9 * measured["Det."]["parameters"]
    assert list(told["missing"]["Slakh2100"]) == ["Det. × 2"] and len(told["missing"]["MUSDB18-HQ"]) == 6
    assert all(row["segment_seconds"] == 2048 / 8000 for row in measured.values())
    kept = {k: told["settings"][k] for k in ("splits", "bss_backend", "repeats", "tracks")}
    assert kept == {"splits": ["test", None], "bss_backend": "jax", "repeats": 1, "tracks": 1}
    text = capsys.readouterr().out
    for expected in (
        "| Det. + Diff. | 22.75 | 11.65 | 18.90 | 12.60 | quoted: repository",
        "| ISDM | – | – | – | – | quoted: text",
        "| MSG | – | – | – | – | no figure in the text",
        "neither --musdb-model nor --musdb-data was given",
        "measured here, 1 tracks",
        "measured here, segments of 0.26 s",
        "- splits: ['test', None]",
        "| Slakh2100 | Demucs | 0.111 | – | 40 M | quoted",
    ):
        assert expected in text
    assert (tmp_path / "tables.md").read_text() in text


def test_bad_input_gets_one_sentence(corpus, toy_model, tmp_path, capsys):
    for argv, words in (
        (("--slakh-model", toy_model), "belong together"),
        (("--musdb-model", toy_model, "--musdb-data", corpus, "--tracks", 1, "--repeats", 1), "MUSDB18-HQ wants 2"),
        (("--repeats", 0), "at least 1"),
    ):
        assert tables(*argv, "--out", tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
