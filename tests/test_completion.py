"""What shells complete is what the commands take."""

import subprocess
import sys
from pathlib import Path

import pytest

from msr_jax import completion
from msr_jax.cli import COMMANDS, main
from msr_jax.methods.stages import REFINEMENTS


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    from contextlib import redirect_stdout

    path = tmp_path_factory.mktemp("completion") / "msr.bash"
    with open(path, "w") as file, redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


def completed(script, *words):
    line = " ".join(f"'{word}'" for word in words)
    run = f'source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_msr; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=20)
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "song.wav").touch()
    assert set(COMMANDS) <= set(completed(script, "msr", ""))
    assert completed(script, "msr", "separate", "--ensemble") == ["--ensemble", "--ensemble-by"]
    assert completed(script, "msr", "separate", "--peak", "") == ["keep", "clip", "scale"]
    assert completed(script, "msr", "separate", "so") == ["song.wav"]
    assert "dicose" in completed(script, "msr", "export", "--format", "")
    assert completed(script, "msr", "completion", "") == ["bash", "zsh"]
    (tmp_path / "results").mkdir()
    for words in (("compare", "re"), ("bench", "separate", "--tracks", "re"), ("bench", "separate", "--against", "re")):
        assert completed(script, "msr", *words) == ["results"], words
    for words in (("serve", "--model", "re"), ("separate", "--ensemble", "bundled", "re")):
        assert completed(script, "msr", *words) == ["results"], words
    assert tuple(completed(script, "msr", "separate", "--refine", "")) == REFINEMENTS


def test_each_place_that_a_command_takes_is_completed_and_each_other_word_for_a_value_is_known_here():
    others = {None, "NAME", "URL", "SIZE", "PATTERN", "KIND:SHAPE", "HOST:PORT", "N", "K", "T", "HZ", "K/N", "STEPS"}
    others |= {"A,B", "T,T", "σ,σ", "R,R", "S,S", "K,K", "|".join(REFINEMENTS)}
    for module, _ in COMMANDS.values():
        parser = completion.own_parser() if module == completion.__name__ else completion.parser_of(module)
        for action in parser._actions:
            is_place = bool({*str(action.metavar).split("|")} & (completion.FILES | completion.FOLDERS))
            assert is_place or (action.metavar in others and action.type is not Path), (module, action.dest)


def test_zsh_completes_each_of_several_songs_and_runs_nothing_that_stands_for_a_value(capsys):
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    (songs,) = [line for line in said.splitlines() if "audio files (wav" in line]
    assert songs.strip().startswith('"*:audio') and songs.endswith(':_files"') and '"(*):' not in said
    (ensemble,) = [line for line in said.splitlines() if "--ensemble[" in line]
    assert ensemble.endswith(r':MODEL[\:WEIGHT]:_files"')
    assert r":KIND\:SHAPE:" in said


def test_zsh_gets_every_command_and_option(capsys):
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#compdef msr")
    for module, _ in COMMANDS.values():
        parser = completion.own_parser() if module == completion.__name__ else completion.parser_of(module)
        for action in parser._actions:
            assert all(name in said for name in action.option_strings[:1]) or action.help == "==SUPPRESS=="


def test_every_command_reads_its_arguments_where_python_leaves_out_docstrings():
    command = [sys.executable, "-OO", "-m", "msr_jax", "completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS), done.stderr
