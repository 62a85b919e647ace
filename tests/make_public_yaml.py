"""Made `tests/fixtures/public_yaml.json`: what the reference classes answer for the public YAMLs' `model` sections, made small.

    PYTHONPATH=MSST python tests/make_public_yaml.py sections.txt tests/fixtures/public_yaml.json

MSST is a checkout of ZFTurbo/Music-Source-Separation-Training at ccc011a, `sections.txt` the list of the sections that were found in
101 public YAMLs; needs torch, einops, rotary-embedding-torch, beartype and librosa. Weights and mixture follow from the rules below, which
the test has too, so that the file holds no more than a few samples of each answer.
"""

import ast
import hashlib
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

SMALL = {"dim": 4, "depth": 2, "heads": 2, "dim_head": 4}
# Fields that change nothing in inference, or are at their default wherever they stand.
UNSEEN = (
    "attn_dropout",
    "ff_dropout",
    "flash_attn",
    "use_torch_checkpoint",
    "sage_attention",
    "match_input_audio_length",
)


def small(section):
    """The section with the sizes of `SMALL`; what it leaves out stays left out."""
    kept = {k: v for k, v in section.items() if not k.startswith("multi_stft") and k != "freqs_per_bands"}
    return {**kept, **SMALL}


def weights(shapes):
    """Tensors by a rule: from their names and shapes alone."""
    made = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("rotary_embed.freqs"):
            values = 10000.0 ** (-np.arange(shape[0]) / shape[0])
        elif name.endswith("gamma"):
            values = 1 + 0.2 * values
        elif len(shape) > 1:
            values = values / np.sqrt(shape[-1])
        made[name] = values.astype(np.float32)
    return made


def mixture(samples, channels=2):
    return (0.1 * np.random.default_rng(7).standard_normal((1, channels, samples))).astype(np.float32)


def digest(shapes):
    """Of names and shapes, in any order."""
    lines = sorted(f"{name} {list(map(int, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def samples_of(stems):
    """A few samples of stems (1, stems, channels, time)."""
    return np.asarray(stems)[0, :, :, 5::331][..., :12]


def read_sections(text):
    """(family, section, instruments, target, chunk, rate) of each section in the list, by its first YAML."""
    family, found = "", []
    for line in text.splitlines():
        if head := re.match(r"===== (bs|mel) ", line):
            family = head[1]
        elif line.startswith("-- "):
            found.append([family, json.loads(line[3:])])
        elif line.startswith("       (") and len(found[-1]) == 2:
            _, stems, target, chunk, other_chunk, *_, rate = ast.literal_eval(line.strip())
            found[-1] += [stems, target, chunk or other_chunk, rate]
    return found


def answer(family, fields):
    """Names and shapes, and a few samples, of the reference class."""
    import torch
    from models.bs_roformer.bs_roformer import BSRoformer
    from models.bs_roformer.mel_band_roformer import MelBandRoformer

    given = {k: v for k, v in fields.items() if k not in ("sage_attention", "use_shared_bias")}
    is_mel = "num_bands" in given
    net = (MelBandRoformer if is_mel else BSRoformer)(**{**given, "flash_attn": False}).eval()
    if fields.get("use_shared_bias"):  # as the programs for such weights do
        net.shared_qkv_bias = torch.nn.Parameter(torch.zeros(3 * fields["heads"] * fields["dim_head"]))
        net.shared_out_bias = torch.nn.Parameter(torch.zeros(fields["dim"]))
        for module in net.modules():
            if type(module).__name__ == "Attention":
                module.to_qkv.bias, module.to_out[0].bias = net.shared_qkv_bias, net.shared_out_bias
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    made = weights(shapes)
    if fields.get("use_shared_bias"):
        for name in made:
            top = {"to_qkv.bias": "shared_qkv_bias", "to_out.0.bias": "shared_out_bias"}
            made[name] = next((made[top[end]] for end in top if name.endswith(end)), made[name])
    net.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()}, strict=True)
    x = torch.from_numpy(mixture(8 * fields["stft_hop_length"]))
    with torch.inference_mode():
        stems = net(x).numpy()
    stems = stems if stems.ndim == 4 else stems[:, None]
    return {"keys": digest(shapes), "peak": float(np.abs(stems).max()), "samples": samples_of(stems).tolist()}


def main(sections, out):
    made, answers = [], {}
    for family, section, stems, target, chunk, rate in read_sections(Path(sections).read_text()):
        fields = small(section)
        entry = {"family": family, "fields": fields, "stems": stems, "target": target, "chunk": chunk, "rate": rate}
        if "time_conformer_depth" not in fields:
            defaults = {"mlp_expansion_factor": 4, "skip_connection": False, "linear_transformer_depth": 0}
            same = {k: v for k, v in {**defaults, **fields}.items() if k not in UNSEEN}
            key = json.dumps(same, sort_keys=True)
            answers[key] = answers.get(key) or answer(family, fields)
            entry["answer"] = list(answers).index(key)
        made.append(entry)
    rounded = json.loads(json.dumps(list(answers.values())), parse_float=lambda text: float(f"{float(text):.9g}"))
    Path(out).write_text(json.dumps({"sections": made, "answers": rounded}, indent=0) + "\n")
    print(len(made), "sections,", len(answers), "answers,", sum("answer" not in m for m in made), "other networks")


if __name__ == "__main__":
    main(*sys.argv[1:])
