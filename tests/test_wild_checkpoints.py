"""Checkpoints as they are found: odd tensors beside the network, other wrappers, files that are something else."""

import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.weights.lightning import check_real, plain, read_checkpoint
from msr_jax.weights.yaml_config import find_section, read_yaml
from tests.torch_files import Data, Made, Named, write_torch

BANDS = "band_split.to_features.0.1.weight"
NETWORK = {BANDS: np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
U_NET = {"to_mapping.0.weight": np.ones(3, np.float32)}


def rebuilt(name, array, *more):
    return Made(f"torch._utils.{name}", Data(array), 0, array.shape, (1,) * array.ndim, False, {}, *more)


def read(tmp_path, content, is_old=False):
    write_torch(tmp_path / "w.ckpt", content, is_old)
    return read_checkpoint(tmp_path / "w.ckpt")


def assert_network(state, network=NETWORK):
    assert set(state) == set(network)
    for name, tensor in network.items():
        np.testing.assert_array_equal(state[name].read(), tensor)


def refused(tmp_path, capsys, words):
    """`msr import` of the file w.ckpt (or another path) says this in one sentence."""
    path = tmp_path / "w.ckpt" if tmp_path.is_dir() else tmp_path
    assert main(["import", str(path), "-o", str(path.parent / "m")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (path.parent / "m").exists(), message


ODD = {
    "complex": np.ones(3, np.complex64),
    "float8": rebuilt("_rebuild_tensor_v3", np.ones(3, np.uint8), Named("torch.float8_e4m3fn"), None),
    "quantised": rebuilt("_rebuild_qtensor", np.ones(3, np.uint8)),
    "negative": rebuilt("_rebuild_tensor_v2", np.ones(3, np.float32), {"neg": True}),
}


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_tensor_beside_the_network_stops_nothing(kind, is_old, tmp_path):
    checkpoint = read(tmp_path, {"buffer": ODD[kind], "state_dict": NETWORK}, is_old)
    assert_network(checkpoint.state_dict)
    with pytest.raises(UserError, match="are not read"):
        checkpoint.content["buffer"].read()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("complex", "holds b as ComplexFloat"),
        ("float8", "take the file that was not quantised"),
        ("negative", "holds b as a neg view"),
    ],
)
def test_an_odd_tensor_of_the_network_is_named(kind, words, tmp_path):
    with pytest.raises(UserError, match=words):
        check_real(read(tmp_path, {**NETWORK, "b": ODD[kind]}).state_dict, "w.ckpt")


def test_empty_metadata_of_a_tensor_changes_nothing(tmp_path):
    tensor = rebuilt("_rebuild_tensor_v2", np.arange(3, dtype=np.float32), {})
    assert_network(read(tmp_path, {BANDS: tensor}).state_dict, {BANDS: np.arange(3)})


@pytest.mark.parametrize(
    "name", ["module", "params_ema", "model_ema", "ema_state_dict", "net", "generator", "anything"]
)
def test_a_network_is_found_under_any_name(name, tmp_path):
    checkpoint = read(tmp_path, {"epoch": 3, name: NETWORK, "critic": {"w": np.ones(2, np.float32)}})
    assert_network(checkpoint.state_dict)
    assert set(checkpoint.content) == {"epoch", "critic"}


@pytest.mark.parametrize("kind", ["bare", "wrapped", "in a list"])
def test_dicts_of_a_class_of_their_own_hold_tensors_too(kind, tmp_path):
    made = Made("program.Weights", items=NETWORK)
    content = {"bare": made, "wrapped": {"state_dict": made}, "in a list": [made, {"epoch": 1}]}[kind]
    assert_network(read(tmp_path, content).state_dict)


def test_of_several_networks_under_unknown_names_none_is_guessed(tmp_path, capsys):
    write_torch(tmp_path / "w.ckpt", {"params": NETWORK, "params_ema": NETWORK})
    refused(tmp_path, capsys, "params and params_ema both hold a network, and nothing tells which is wanted")
    write_torch(tmp_path / "w.ckpt", {"a": {"x": np.ones(2, np.float32)}, "c": {"y": np.ones(2, np.float32)}})
    refused(tmp_path, capsys, "a and c both hold tensors, but none those of a network here")


def test_an_average_beside_a_u_net_is_left_out(tmp_path):
    assert "ema_net" in read(tmp_path, {"net": U_NET, "ema_net": U_NET}).content


@pytest.mark.parametrize("kind", ["torch.nn.parameter.Parameter", "program.Special"])
def test_attributes_of_a_tensor_are_dropped_but_not_a_class_of_its_own(kind, tmp_path, capsys):
    inner = rebuilt("_rebuild_tensor_v2", NETWORK[BANDS])
    parameter = Made("torch._utils._rebuild_parameter_with_state", NETWORK["b"], True, {}, {"tag": 1})
    with_state = Named("torch._utils._rebuild_tensor_v2"), Named(kind), (*inner.args[:3], (3, 1), False, {}), {"tag": 1}
    content = {"state_dict": {BANDS: Made("torch._tensor._rebuild_from_type_v2", *with_state), "b": parameter}}
    if kind.startswith("torch"):
        assert_network(read(tmp_path, content).state_dict)
    else:
        write_torch(tmp_path / "w.ckpt", content)
        refused(tmp_path, capsys, f"the state_dict entry {BANDS} is no tensor")


def test_a_module_beside_other_objects_is_the_one_that_is_named(tmp_path, capsys):
    module = Made("program.Net", state={"_modules": {}, "_parameters": {}})
    write_torch(tmp_path / "w.ckpt", {"date": Made("datetime.datetime", b"x"), "model": module})
    refused(tmp_path, capsys, "an object of the class program.Net instead")


def test_a_big_endian_zip_is_refused(tmp_path, capsys):
    write_torch(tmp_path / "w.ckpt", NETWORK)
    with zipfile.ZipFile(tmp_path / "w.ckpt", "a") as archive:
        archive.writestr("archive/byteorder", "big")
    refused(tmp_path, capsys, "was written on a big-endian machine")


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b'<?xml version="1.0"?><Error/>', "but XML"),
        (b'{"a":  {"error": "denied"}}', "but JSON"),
        (b"", "empty"),
        (bytes(100), "all zeros"),
        (b"\x1f\x8b\x08\x00", "gzip"),
    ],
)
def test_what_is_no_file_of_weights_is_told_whatever_its_name_ends_in(content, words, ending, tmp_path, capsys):
    (tmp_path / f"w.{ending}").write_bytes(content)
    refused(tmp_path / f"w.{ending}", capsys, words)


@pytest.mark.parametrize("name", ["w.SAFETENSORS", "w.ckpt", "w.safetensors"])
def test_the_content_tells_the_format_and_not_the_name(name, tmp_path):
    save_file(NETWORK, tmp_path / name)
    assert_network(read_checkpoint(tmp_path / name).state_dict)
    write_torch(tmp_path / name, NETWORK)
    assert_network(read_checkpoint(tmp_path / name).state_dict)


def test_a_part_of_weights_is_told_as_one(tmp_path, capsys):
    save_file(NETWORK, tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path / "model-00001-of-00002.safetensors", capsys, "is part 1 of the 2")


def test_a_config_that_contains_itself_ends_there(tmp_path):
    config = {"dim": 3}
    config["self"] = config
    node = Made("omegaconf.DictConfig", state={"_parent": None})
    value = Made("omegaconf.AnyNode", state={"_parent": node, "_val": 4})
    node.state |= {"_content": {"dim": value, "stft_hop_length": value}, "_metadata": Made("omegaconf.Metadata")}
    checkpoint = read(tmp_path, {"state_dict": NETWORK, "hyper_parameters": {"a": config, "b": node}})
    told = plain(checkpoint.content["hyper_parameters"])
    assert told == {"a": {"dim": 3, "self": None}, "b": {"dim": 4, "stft_hop_length": 4}}


def test_configs_too_deep_or_too_entwined_are_plain_at_once():
    deep, wide = [], [1]
    for _ in range(5000):
        deep = [deep]
    for _ in range(60):
        wide = [wide, wide]
    assert plain(deep) and plain(wide)


def test_arrays_in_a_config_are_nothing(tmp_path):
    array = Made("numpy.core.multiarray._reconstruct", 0, (0,), b"b", state=(1, (3,), None, False, b"123"))
    checkpoint = read(tmp_path, {"state_dict": NETWORK, "hyper_parameters": {"dim": array, "depth": 2}})
    assert plain(checkpoint.content["hyper_parameters"]) == {"dim": None, "depth": 2}


def test_aliases_of_a_yaml_are_searched_once(tmp_path):
    lines = ["a0: &a0 {k: 1}"]
    for n in range(1, 40):
        lines.append(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}")
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "self: &self {self: *self}"]))
    told = read_yaml(tmp_path / "c.yaml")
    assert find_section(told, "dim") == {} and find_section(told, "k") == {"k": 1}


def test_a_yaml_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("[" * 3000)
    with pytest.raises(UserError, match="nested too deep"):
        read_yaml(tmp_path / "c.yaml")
