"""The command line: what `msr separate` writes, and one sentence with exit code 2 for what cannot be done."""

import errno
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from safetensors.numpy import load_file, save_file

from msr_jax import cli
from msr_jax.audio.io import read_blocks
from msr_jax.cli import COMMANDS, main
from msr_jax.errors import UserError
from msr_jax.files import HOST
from msr_jax.machine import home, keep_compiled_programs
from msr_jax.separate import songs
from tests.conftest import TINY_RATE

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "launch" / "study" / "STUDY.md"
RATE = TINY_RATE
STEMS = ("bass", "drums", "guitar", "piano")


def song(path, samples=5000, channels=1, rate=RATE, **options):
    audio = 0.1 * np.random.default_rng(0).standard_normal((samples, channels)).astype(np.float32)
    soundfile.write(path, audio, rate, **options)
    return path


def separate(paths, out, model, *options):
    return main(["separate", *map(str, paths), "-o", str(out), "--model", str(model), *map(str, options)])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_version_is_that_of_the_project_in_every_file_that_names_it(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"msr_jax {version}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_source_distribution_has_what_the_readme_points_to_and_no_half_of_the_tests(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("msr_jax", "data_prep", "configs", "launch", "findings"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "tests").mkdir()
    (tmp_path / "src" / "tests" / "test_a.py").touch()
    shutil.copy(ROOT / "tests" / "README.md", tmp_path / "src" / "tests")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "src")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "src", check=True, capture_output=True, timeout=120)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= {
        "CHANGELOG.md",
        "CITATION.cff",
        "requirements.lock",
        "requirements-newest.lock",
        "configs/README.md",
    }
    assert names >= {"msr_jax/EXTENDING.md", "data_prep/README.md", "msr_jax/bundled/config.json"}
    links = {link for link in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()) if "://" not in link}
    links |= {f"launch/study/{picture}" for picture in re.findall(r"\]\(([^)]+\.svg)\)", STUDY.read_text())}
    assert links <= names and len(links) > 10
    assert "msr_jax/configs/unet_det.py" in names and not any(name.startswith("tests/test_") for name in names)


def test_a_place_whose_name_is_too_long_or_that_one_may_not_look_into_is_a_sentence(tmp_path, capsys, monkeypatch):
    name = song(tmp_path / "a.wav")
    for option in ("-o", "--model", "--manifest", "--list"):
        assert main(["separate", str(name), "-o", str(tmp_path / "out"), option, str(tmp_path / ("n" * 5000))]) == 2
        told = capsys.readouterr().err
        assert told.startswith("msr separate: ") and "File name too long" in told and told.count("\n") == 1
    locked = lambda argv: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", "locked/x"))
    monkeypatch.setattr(cli, "_command", locked)
    assert main(["separate"]) == 2
    assert capsys.readouterr().err == "msr separate: locked/x cannot be used: Permission denied; name another place\n"


def test_what_memory_does_not_hold_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_command", lambda argv: np.empty(2**55))
    assert main(["train"]) == 2
    assert re.fullmatch(
        r"msr train: this machine has not the memory for that \(Unable to allocate .*\n", capsys.readouterr().err
    )


def test_the_overview_names_every_command_and_a_wrong_one_is_refused(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert main(["unmix"]) == 2
    assert "no command 'unmix'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["models"], ["--version"], ["separate", "--help"]], ids=str)
def test_who_reads_the_output_may_leave_and_a_full_disk_is_a_sentence(command):
    msr = [sys.executable, "-m", "msr_jax.cli", *command]
    with subprocess.Popen(msr, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    with open("/dev/full", "w") as full:
        process = subprocess.run(msr, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr == f"msr {command[0]}: cannot write to standard output: No space left on device\n"


def test_ctrl_c_is_answered_though_a_full_disk_holds_what_was_printed():
    code = (
        "import os, signal\n"
        "from msr_jax.process import run_as_process\n"
        "from msr_jax.standard_output import outlive_readers\n"
        "outlive_readers()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_as_process('msr', lambda: (print('told'), os.kill(os.getpid(), signal.SIGINT), 0)[2])"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert (process.returncode, process.stderr) == (130, "msr: interrupted\n")


def test_a_batch_goes_on_when_its_reader_has_left(tiny_model, tmp_path):
    songs = [tmp_path / f"{k}.wav" for k in range(6)]
    for song in songs:
        soundfile.write(song, 0.1 * np.random.default_rng(0).standard_normal(3000), TINY_RATE)
    command = [sys.executable, "-m", "msr_jax.cli", "separate", *map(str, songs), "-o", str(tmp_path / "out")]
    command += ["--model", str(tiny_model), "--refine", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait() == 0, told
    assert len(list((tmp_path / "out").rglob("*.wav"))) == 24


def test_separation_imports_nothing_that_it_does_not_use():
    code = "import sys, msr_jax.separate.command; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "jax" in loaded
    assert not loaded & {"scipy", "librosa", "museval", "grain", "orbax", "optax", "tensorflow_datasets", "av", "torch"}


def test_the_doctor_names_devices_codecs_and_what_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MSR_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "1 × cpu (cpu)" in said and "FLAC" in said and f"{tmp_path}/models (0 files, 0 MB)" in said
    assert "extra media" in said and "jaxlib" in said


def test_the_doctor_counts_all_that_is_kept_whatever_folder_jax_was_told_and_names_what_may_go(
    capsys, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    places = ("compiled/jaxlib-0.1-old/a-cache", "compiled/jaxlib-now/b-cache", "downloads/.tiny.0123abcd.1.tmp/half")
    for place in map(home.joinpath, places):
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(2_000_000))
    monkeypatch.setenv("MSR_HOME", str(home))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled" / "jaxlib-now"))  # as the command sets it
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"{home}/compiled (2 files, 4 MB)" in said and f"{home}/downloads (1 files, 2 MB)" in said
    assert f"compiled, plans, models and downloads in {home}" in said and "JAX's own" not in said
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    assert main(["doctor"]) == 0
    assert f"{tmp_path}/own (0 files, 0 MB)" in capsys.readouterr().out


def test_the_doctor_misses_what_the_server_would(monkeypatch):
    from msr_jax.bench import doctor

    find = doctor.importlib.util.find_spec
    lacking = ("python_multipart", "prometheus_client")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    assert "python_multipart, prometheus_client" in dict(doctor.report())["extra web"]


def test_a_user_without_a_home_directory_is_told_what_that_means_for_each_command(
    tmp_path, monkeypatch, capsys, caplog
):
    for name in ("HOME", "MSR_HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(f"uid not found: {uid}")))
    without = "there is no home directory here; MSR_HOME names a place for what is kept"
    with caplog.at_level("INFO", "msr_jax"):
        keep_compiled_programs()
    assert caplog.messages == [f"compiled programs are not kept: {without}"]
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    name = str(song(tmp_path / "a.wav"))
    assert main(["separate", name, "-o", str(tmp_path / "out"), "--model", "mel-kim-vocals"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"msr separate: {without}"
    assert main(["models"]) == 0 and main(["models", "mel-kim-vocals"]) == 0 and main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name:<18} none: {without}\n" in said for name in ("compiled programs", "plans", "models"))


def test_a_folder_that_is_named_as_the_home_directory_is_shortened_is_not_taken_for_it(monkeypatch):
    monkeypatch.delenv("MSR_HOME", raising=False)
    monkeypatch.setattr(
        "platformdirs.user_cache_path", lambda name: Path("~/.cache") / name
    )  # as earlier releases say it
    with pytest.raises(UserError, match="no home directory"):
        home()


def test_stems_have_the_song_s_rate_channels_and_length(tiny_model, tmp_path, capsys):
    paths = [
        song(tmp_path / "söng [1].flac", 9000, 2, 44_100),
        song(tmp_path / "b.mp3", 20_000, 1, 16_000, format="MP3"),
    ]
    assert separate(paths, tmp_path / "out", tiny_model, "--refine", "consistency", "--steps", 2) == 0
    printed = capsys.readouterr().out
    assert "söng [1].flac: 4 stems" in printed and "(refinement: consistency, T = 2)" in printed
    for name, expected in (("söng [1]", (9000, 2, 44_100, "FLOAT")), ("b", (20_000, 1, 16_000, "FLOAT"))):
        for stem in STEMS:
            info = soundfile.info(tmp_path / "out" / name / f"{stem}.wav")
            assert (info.frames, info.channels, info.samplerate, info.subtype) == expected
    assert len(files(tmp_path / "out")) == 8


def test_flac_stems_are_what_wav_stems_are_to_24_bits(tiny_model, tmp_path):
    path = song(tmp_path / "a.wav")
    for kind in ("wav", "flac"):
        assert separate([path], tmp_path / "out", tiny_model, "--refine", "none", "--format", kind) == 0
    for stem in STEMS:
        wav, flac = (soundfile.read(tmp_path / "out" / "a" / f"{stem}.{kind}")[0] for kind in ("wav", "flac"))
        np.testing.assert_allclose(flac, np.clip(wav, -1, 1), atol=2**-22)


def test_bad_input_gets_one_sentence_and_leaves_nothing(tiny_model, tmp_path, capsys):
    good = song(tmp_path / "good.wav")
    (tmp_path / "text.wav").write_text("no audio here")
    (tmp_path / "empty.wav").touch()
    for name in ("cut.wav", "cut.flac"):
        data = song(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    samples = np.zeros(5000, np.float32)
    samples[4000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    (tmp_path / "again").mkdir()
    (tmp_path / "nothing").mkdir()
    shutil.copy(good, tmp_path / "again" / "good.wav")
    for network in ("broken", "poorer", "misshapen"):
        shutil.copytree(tiny_model, tmp_path / network)
    (tmp_path / "broken" / "deterministic.safetensors").write_bytes(b"nonsense")
    tensors = load_file(tiny_model / "deterministic.safetensors")
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "poorer" / "deterministic.safetensors")
    save_file({**tensors, name: np.zeros(3, np.float32)}, tmp_path / "misshapen" / "deterministic.safetensors")
    before, out = files(tmp_path), tmp_path / "out"
    for names, folder, model, options, words in (
        (["none.wav"], out, tiny_model, (), "does not exist"),
        (["nothing"], out, tiny_model, (), "holds no audio files"),
        (["empty.wav"], out, tiny_model, (), "is an empty file"),
        (["text.wav"], out, tiny_model, (), "text.wav cannot be read as audio"),
        (["cut.wav"], out, tiny_model, (), "cut.wav is cut off"),
        (["cut.flac"], out, tiny_model, (), "cut.flac is damaged or cut off"),
        (["nan.wav"], out, tiny_model, (), "NaN"),
        (["good.wav", "again/good.wav"], out, tiny_model, (), "two songs are named good"),
        (["good.wav"], good / "below", tiny_model, (), "cannot write"),
        (["good.wav"], good, tiny_model, (), "is a file"),
        (["good.wav"], out, tmp_path, (), "holds no config.json"),
        (["good.wav"], out, tmp_path / "broken", (), "cannot be read"),
        (["good.wav"], out, tmp_path / "poorer", (), f"lacks {name}"),
        (["good.wav"], out, tmp_path / "misshapen", (), name),
        (["good.wav"], out, tiny_model, ("--refine", "magic"), "--refine must be one of"),
        (["good.wav"], out, tiny_model, ("--steps", 0), "at least 1"),
        (["good.wav"], out, tiny_model, ("--refine", "none", "--steps", 2), "steps goes with"),
        (["good.wav"], out, tiny_model, ("--overlap", 0.9), "overlap must lie"),
    ):
        code = separate([tmp_path / name for name in names], folder, model, *options)
        said = capsys.readouterr().err.splitlines()
        message = [line for line in said if not line.startswith("compiling ")]  # which a busy machine tells of
        assert code == 2 and len(message) == 1 and words in message[0], said
        assert files(tmp_path) == before and not out.exists()


def test_bad_songs_do_not_end_a_batch_and_a_second_start_goes_on(tiny_model, tmp_path, capsys):
    good, other = song(tmp_path / "good.wav"), song(tmp_path / "other.wav")
    (tmp_path / "text.wav").write_text("no audio here")
    data = song(tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    out, options = tmp_path / "out", ("--refine", "none")
    batch = [good, tmp_path / "text.wav", tmp_path / "cut.flac", tmp_path / "none.wav", other]
    assert separate(batch, out, tiny_model, *options) == 1
    said = capsys.readouterr()
    assert "good.wav: 4 stems" in said.out and "other.wav: 4 stems" in said.out
    assert said.err.startswith("NOT separated: 3 of 5 songs\n") and said.err.count("\n") == 4
    assert all(
        word in said.err for word in ("text.wav cannot be read", "cut.flac is damaged", "none.wav does not exist")
    )
    assert files(out) == [f"{name}/{stem}.wav" for name in ("good", "other") for stem in STEMS]
    (out / "other" / "piano.wav").unlink()
    before = (out / "good" / "bass.wav").read_bytes()
    # A song of the same name from another folder does not replace stems unasked.
    (tmp_path / "again").mkdir()
    again = song(tmp_path / "again" / "good.wav", samples=3000)
    assert separate([again, other], out, tiny_model, *options) == 0
    said = capsys.readouterr().out
    assert f"good.wav: kept bass, drums, guitar, piano in {out / 'good'}; --overwrite replaces them" in said
    assert "other.wav: kept bass, drums, guitar in" in said and "other.wav: 1 stem in" in said
    assert (out / "good" / "bass.wav").read_bytes() == before and len(files(out)) == 8
    assert separate([again], out, tiny_model, "--overwrite", *options) == 0
    assert soundfile.info(out / "good" / "bass.wav").frames == 3000


def test_what_a_killed_run_left_is_cleared_by_the_next_into_that_folder(tiny_model, tmp_path):
    path, out = song(tmp_path / "a.wav"), tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / f".a.{HOST}.99999999.tmp").mkdir()
    for left in (out / f".a.{HOST}.99999999.tmp" / "bass.wav", out / "a" / f".bass.wav.{HOST}.99999999.tmp"):
        left.write_text("half")
    assert separate([path], out, tiny_model, "--refine", "none") == 0
    assert files(out) == [f"a/{stem}.wav" for stem in STEMS] and not (out / f".a.{HOST}.99999999.tmp").exists()


def test_stems_and_residual_add_up_to_the_song(tiny_model, tmp_path):
    path = song(tmp_path / "a.wav", 30_000, 2, 44_100, subtype="FLOAT")
    options = ("--refine", "none", "--residual", "other")
    assert separate([path], tmp_path / "out", tiny_model, *options) == 0
    stems = [soundfile.read(tmp_path / "out" / "a" / f"{stem}.wav")[0] for stem in (*STEMS, "other")]
    np.testing.assert_allclose(sum(stems), soundfile.read(path)[0], atol=1e-5)


def test_a_song_never_becomes_its_own_stem(tiny_model, tmp_path, capsys):
    (tmp_path / "bass").mkdir()
    path = song(tmp_path / "bass" / "bass.wav")
    before = path.read_bytes()
    assert separate([path], tmp_path, tiny_model) == 2
    assert "would replace a song" in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize("has_older_stems", [False, True])
def test_an_interrupted_run_leaves_what_was_there_before(tiny_model, tmp_path, monkeypatch, has_older_stems):
    path, out = song(tmp_path / "a.wav"), tmp_path / "out"
    if has_older_stems:
        (out / "a").mkdir(parents=True)
        (out / "a" / "bass.wav").write_text("older")
    written = []

    def one_block_and_ctrl_c(path, block):
        yield np.zeros((4000, 1), np.float32)
        written.extend(files(out))
        raise KeyboardInterrupt

    monkeypatch.setattr(songs, "read_blocks", one_block_and_ctrl_c)
    options = ("--refine", "none", "--overwrite")
    assert separate([path], out, tiny_model, *options) == 130
    assert len(written) == 4 + has_older_stems
    assert (
        (files(out) == ["a/bass.wav"] and (out / "a" / "bass.wav").read_text() == "older")
        if has_older_stems
        else not out.exists()
    )


def test_sigterm_ends_a_separation_without_leaving_halves(tiny_model, tmp_path, monkeypatch):
    path = song(tmp_path / "a.wav")
    before = signal.getsignal(signal.SIGTERM)

    def kill_on_the_way(source, block):
        for part in read_blocks(source, 1000):
            yield part
            assert len(files(tmp_path / "out")) == 4
            os.kill(os.getpid(), signal.SIGTERM)
            return  # its thread goes on: one more could come when no handler is there to take it

    monkeypatch.setattr(songs, "read_blocks", kill_on_the_way)
    with pytest.raises(SystemExit) as ended:
        separate([path], tmp_path / "out", tiny_model, "--refine", "none")
    assert ended.value.code == 128 + signal.SIGTERM and not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before
