"""What shells complete is what the commands take."""

import subprocess

import pytest

from msr_jax import completion
from msr_jax.cli import COMMANDS, main


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


def test_zsh_gets_every_command_and_option(capsys):
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#compdef msr")
    for module, _ in COMMANDS.values():
        parser = completion.own_parser() if module == completion.__name__ else completion.parser_of(module)
        for action in parser._actions:
            assert all(name in said for name in action.option_strings[:1]) or action.help == "==SUPPRESS=="
