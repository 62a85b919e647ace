"""Configs: recipes by path and by name, every field's kind and range, and the printed table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msr_jax.cli import main
from msr_jax.config import bsrf_base, unet_base
from msr_jax.config_fields import FIELDS, KINDS, MODEL_FIELDS, check_config, check_field, fields_of, leaves, tables
from msr_jax.config_files import find_config, read_config
from msr_jax.configs import melrf_det
from msr_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
README = (ROOT / "configs" / "README.md").read_text()

# A value of another kind, and one that is out of every range.
WRONG = {
    "int": ("441", 24.0, None, True, -7),
    "float": ("0.1", None, True, float("nan"), float("inf"), -7.0),
    "bool": ("false", 0, None),
    "text": (3, None, ["mse"]),
    "names": ("bass", [], ["bass", "../b"], ["a", "A"], [""], ["a", 1], [".."], ["a/b"], ["a\\b"]),
    "texts": ("band_split", (1,)),
    "ints": (3, ("1",), (1.5,), (-7,)),
    "bools": (True, (0, 1)),
    "floats": (0.5, ("1",), (-7.0,)),
    "low, high": ((1.0,), (2.0, 1.0), "12"),
}
ANY_NUMBER = {"diffusion.p_mean", "model.pass_mixture", "model.mask_scale"}


def test_every_kind_of_the_table_is_used():
    assert {f.kind for f in FIELDS} | {f.kind for rows in MODEL_FIELDS.values() for f in rows} == set(KINDS)
    assert set(WRONG) == set(KINDS)
    assert all(f.meaning or f.name in ("attention_heads", "heads") for rows in MODEL_FIELDS.values() for f in rows)


@pytest.mark.parametrize("base", [unet_base, bsrf_base])
def test_every_field_has_a_row_and_refuses_what_is_no_value_of_it(base):
    config = base().to_dict()
    model, found = config["model"]["name"], leaves(config)
    assert set(fields_of(model)) == set(found) - {"model.name"}
    check_config(config)
    for name, field in fields_of(model).items():
        for value in WRONG[field.kind]:
            if value in (-7, -7.0) and name in ANY_NUMBER:
                continue
            with pytest.raises(UserError, match=f"^x.yaml: {re.escape(name)} must be "):
                check_field(name, value, "x.yaml: ", model=model)


def test_values_come_back_as_the_networks_take_them():
    assert check_field("model.freqs_per_bands", [1, 2], "") == (1, 2)
    assert check_field("optim.lr", 1, "") == 1
    with pytest.raises(
        UserError,
        match=r"^--config x: audio.chunk_size must be a whole number, at least 1, not null$",
    ):
        check_field("segment", None, "--config x: ", "audio.chunk_size")


def test_fields_that_contradict_each_other_are_refused():
    for change, words in (
        ({"channels": 2}, "channels is 2, and the network of config.model takes 1"),
        ({"stems": ("a", "b")}, "the network of config.model takes 4"),
        ({"sede": 1}, "config.sede is no setting"),
        ({"model": 3}, "config.model must be a section"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            check_config({**unet_base().to_dict(), **change})
    low = unet_base().to_dict()
    low["consistency"]["sampler"]["sigma_max"] = 1e-5
    with pytest.raises(
        UserError, match=r"consistency\.sigma_min \(0\.0001\) must be at most consistency\.sampler\.sigma_max"
    ):
        check_config(low)
    mel = melrf_det.get_config().to_dict() | {"sample_rate": 22_050}
    with pytest.raises(
        UserError, match=r"sample_rate is 22050, and model\.sample_rate, at which bands are laid out, 44100"
    ):
        check_config(mel)
    uneven = unet_base().to_dict()
    uneven["train"].update(steps=5, steps_per_dispatch=2)
    with pytest.raises(UserError, match=r"^x\.yaml: train\.steps \(5\) must be a positive multiple"):
        check_config(uneven, "x.yaml: ")
    check_config({**unet_base().to_dict(), "own": {"anything": object()}})
    check_config({"later": 1, "model": {"name": "unet1d"}}, is_whole=False)
    check_config({"model": {"name": "mine", "size": "?"}})


def test_what_a_compiled_step_counts_ends_before_32_bits_and_all_it_takes_before_64():
    counted = (
        "segment",
        "optim.accumulate",
        "optim.warmup_steps",
        "optim.decay_steps",
        "data.batch",
        "data.crop",
        "model.channels",
    )
    for name in counted:
        with pytest.raises(UserError, match=f"config.{name} must be at least [01] and below 2147483648"):
            read_config("unet_det", [f"--config.{name}=2147483648"])
        assert read_config("unet_det", [f"--config.{name}=1048576"])
    with pytest.raises(
        UserError, match=r"data.batch × data.crop × channels is \d+ samples a step, more than any machine"
    ):
        read_config("unet_det", ["--config.data.batch=2147483647", "--config.data.crop=2147483647"])


@pytest.mark.parametrize("setting", ["seed=-1", "data.workers=-1", "data.gain_db=(3.0,1.0)", "stems=('a','../b')"])
def test_a_wrong_override_is_one_sentence(setting, capsys):
    assert main(["train", "--config", "unet_det_small", f"--config.{setting}", "--workdir", "nowhere"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"config.{setting.split('=')[0]} must be" in message
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.preload=maybe", 'config.data.preload must be true or false, not "maybe"'),
        ("seed=1e3", 'config.seed must be a whole number, at least 0 and below 4294967296, not "1e3"'),
        (
            "optim.accumulate=1000000000000",
            "config.optim.accumulate must be at least 1 and below 2147483648, not 1000000000000",
        ),
        ("optim.lr=fast", 'config.optim.lr must be a number, at least 0, not "fast"'),
        ("data.gain_db=(1,", 'config.data.gain_db must be two numbers, the lower one first, not "(1,"'),
        ("own.loud=maybe", "config.own.loud cannot be 'maybe'; it is to be of the kind of True"),
    ],
)
def test_an_override_that_cannot_be_read_is_answered_in_the_table_s_words(setting, words, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from msr_jax.configs import unet_det_small\n\ndef get_config():\n    config = unet_det_small.get_config()\n"
        "    config.own = {'loud': True}\n    return config\n"
    )
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        read_config(str(config), [f"--config.{setting}"])


def test_of_a_setting_that_is_given_twice_the_last_one_counts_also_of_lists():
    twice = (
        "model.multipliers=(1,1)",
        "model.multipliers=(1,2,2,2)",
        "optim.freeze=('a*',)",
        "optim.freeze=()",
        "seed=1",
        "seed=2",
    )
    config = read_config("unet_det_small", [f"--config.{setting}" for setting in twice])
    assert config["model"]["multipliers"] == (1, 2, 2, 2) and config["optim"]["freeze"] == () and config["seed"] == 2


def test_recipes_are_found_by_name_and_a_file_goes_before_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in RECIPES:
        assert find_config(name) == find_config(f"configs/{name}.py")
    assert read_config("bsrf_diffusion_small", [])["method"] == "diffusion"
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "unet_det.py"
    own.write_text(
        "from msr_jax.configs import unet_det\n\ndef get_config():\n    config = unet_det.get_config()\n    config.seed = 9\n    return config\n"
    )
    assert read_config("configs/unet_det.py", [])["seed"] == 9
    with pytest.raises(UserError, match=r"--config unet_dett is not there.*unet_det"):
        find_config("unet_dett")


def test_the_printed_table_is_that_of_the_readme(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help-config"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.strip() == tables()
    assert README.endswith(f"\n\n{tables()}\n"), (
        "run: msr train --help-config, and put it at the end of configs/README.md"
    )


def test_every_recipe_is_in_the_readme_and_official_ones_fit_eight_devices():
    patterns = [re.escape(word).replace(r"\*", ".*") for word in re.findall(r"`(\w[\w*]*)\.py`", README)]
    assert all(any(re.fullmatch(p, name) for p in patterns) for name in RECIPES)
    rows = re.findall(r"^\| (`.*?`) \| [^|]* \| (`--config.*|as it stands) \|$", README, re.M)
    told = {name: words for names, words in rows for name in re.findall(r"`(\w+)`", names)}
    official = [name for name in RECIPES if re.fullmatch(r"(unet|bsrf|melrf)_(det|diffusion|consistency|det_x2)", name)]
    assert sorted(told) == sorted(official)
    for name, words in told.items():
        for way in re.findall(r"`([^`]+)`", words) or [""]:
            assert read_config(name, way.split())["data"]["batch"] % 8 == 0


def test_a_config_imports_neither_jax_nor_the_networks():
    code = (
        "import sys; from msr_jax.config_files import read_config; read_config('bundled_diffusion', []);"
        "print([m for m in sys.modules if m == 'jax' or m.startswith('msr_jax.models')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(out.stdout.replace("'", '"')) == []
