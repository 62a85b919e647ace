"""Cases of the campaign: case k of a kind makes its input from a seed, and says what runs on it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from launch.fuzzing import inputs
from launch.fuzzing.children import Work
from msr_jax.audio.io import AudioWriter, audio_info, read_blocks
from msr_jax.audio.tags import read_tags, stem_tags
from msr_jax.cli import main as msr
from msr_jax.errors import UserError

MEL_YAML = inputs.ROOT / "tests" / "fixtures" / "mel_band_roformer" / "melrf_ckpt_micro.yaml"
YAML = {
    "audio": {"chunk_size": 131584, "dim_f": 1024, "hop_length": 512, "n_fft": 2048, "num_channels": 2, "sample_rate": 44100},
    "model": {
        "dim": 16, "depth": 2, "stereo": True, "num_stems": 4, "time_transformer_depth": 1, "freq_transformer_depth": 1,
        "linear_transformer_depth": 0, "freqs_per_bands": [2, 2, 4, 8], "dim_head": 8, "heads": 2, "attn_dropout": 0.1,
        "ff_dropout": 0.1, "flash_attn": True, "dim_freqs_in": 17, "stft_n_fft": 32, "stft_hop_length": 8,
        "stft_win_length": 32, "stft_normalized": False, "mask_estimator_depth": 2,
    },
    "training": {"instruments": ["drums", "bass", "other", "vocals"], "target_instrument": None, "batch_size": 4},
    "inference": {"batch_size": 1, "num_overlap": 2},
}  # fmt: skip


class Case(NamedTuple):
    """`work` runs in the case's folder, which has `in/`; what it may write lies below `out/`.

    `spoiled` is the file that was changed byte by byte: (its path, its bytes before, what was done); `largest` is the size of
    file that a full disk would take; `twice` runs two at a time.
    """

    work: Work
    told: str
    spoiled: tuple[Path, bytes, list] | None = None
    largest: int = 0
    twice: bool = False


def _command(*argv: Any) -> Work:
    return lambda: msr([str(a) for a in argv])


def _reading(function: Callable[[], Any]) -> int:
    try:
        function()
    except UserError as error:
        print(error)
        return 2
    return 0


def _spoil(rng: np.random.Generator, path: Path, data: bytes) -> tuple[Path, bytes, list]:
    done = inputs.mutations(rng, len(data))
    path.write_bytes(inputs.changed(data, done))
    return path, data, done


def _song(rng: np.random.Generator, folder: Path, ready: Sequence[Path] = ()) -> tuple[Path, bytes, list]:
    data, suffix = inputs.audio_bytes(rng, ready)
    return _spoil(rng, folder / os.fsdecode(inputs.named(rng, suffix)), data)


def audio(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A song is read to its end."""
    spoiled = _song(rng, folder / "in", base["media"])

    def read() -> None:
        count = sum(len(block) for block in read_blocks(spoiled[0], 4096))
        if (frames := audio_info(spoiled[0]).frames) is not None and count != frames:
            raise UserError(f"it promises {frames} samples, and has {count}")

    return Case(lambda: _reading(read), f"read {spoiled[0].name!r}", spoiled)


def tags(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """What a song says of itself is read, and written into a stem."""
    path = base["tagged"][int(rng.integers(len(base["tagged"])))]
    spoiled = _spoil(rng, folder / "in" / path.name, path.read_bytes())
    suffix = str(rng.choice(["wav", "flac", "mp3", "ogg", "opus"]))

    def write() -> None:
        told = stem_tags(read_tags(spoiled[0]), "drums", "song")
        with AudioWriter(f"out/drums.{suffix}", 48_000, 2, tags=told) as writer:
            writer.write(inputs.sound(np.random.default_rng(0), 0.05, 2, 48_000).astype(np.float32))

    return Case(lambda: _reading(write), f"tags into {suffix}", spoiled, int(rng.choice([0, 0, 0, 500])))


def stem_file(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A damaged file of several stems is read as a track."""
    from msr_jax.data.tracks import read_track

    spoiled = _spoil(rng, folder / "in" / "a.stem.mp4", base["stem_file"].read_bytes())
    stems = ("drums", "bass") if rng.random() < 0.8 else ("guitar",)
    return Case(lambda: _reading(lambda: read_track(spoiled[0], stems, 44_100, 2)), f"read a track of {stems}", spoiled)


def exchanged(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """Files that commands write for each other, changed in between: results, lists of songs, manifests of stems."""
    from msr_jax.separate.catalogue import find_tasks
    from msr_jax.separate.manifest import Manifest

    draw = rng.random()
    if draw < 0.5:
        results = json.loads(base["results"].read_text())
        (folder / "in" / "results.json").write_bytes(
            inputs.text_of(rng, inputs.odd_values(rng, results, int(rng.integers(1, 4))))
        )
        pair = ["in/results.json", base["results"]]
        return Case(_command("compare", *(pair if rng.random() < 0.5 else pair[::-1])), "compare odd results")
    row = {"path": "in/a.wav", "source": "in/a.wav", "error": None, "stems": {"drums": "out/a/drums.wav"}}
    rows = [inputs.odd_values(rng, row, int(rng.integers(0, 3))) for _ in range(3)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / "in" / str(rng.choice(["list.jsonl", "list.txt"]))
    spoiled = _spoil(rng, path, data)
    if draw < 0.75:
        return Case(lambda: _reading(lambda: find_tasks([], Path("out"), path)), "a list of songs", spoiled)
    return Case(lambda: _reading(lambda: Manifest(path)), "a manifest of stems", spoiled)


def separate(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """Songs are separated, with random options that go together."""
    spoiled = _song(rng, folder / "in", base["media"])
    songs = [spoiled[0] if not spoiled[0].name.startswith("-") else "in"]
    for _ in range(int(rng.integers(0, 3))):
        (folder / "in" / "more").mkdir(exist_ok=True)
        songs.append(_song(rng, folder / "in" / "more")[0])
    options: list[Any] = [
        "--model",
        base["model"],
        "--refine",
        str(rng.choice(["none", "none", "consistency", "diffusion"])),
    ]
    if options[-1] != "none" and rng.random() < 0.5:
        options += ["--steps", int(rng.integers(1, 3))]
    for flag, odds in (("--mixture-consistent", 0.3), ("--overwrite", 0.3), ("--json", 0.2), ("--no-tags", 0.2)):
        options += [flag] if rng.random() < odds else []
    if rng.random() < 0.4:
        options += ["--format", str(rng.choice(["wav", "flac", "mp3", "ogg", "opus"]))]
    if rng.random() < 0.2:
        options += ["--peak", str(rng.choice(["clip", "scale"]))]
    if rng.random() < 0.2:
        options += ["--manifest", "out/manifest.jsonl"]
    if rng.random() < 0.1:
        options += ["--stems", "bass,drums"]
    if rng.random() < 0.3:
        options += ["--overlap", str(rng.choice(["0", "0.1", "0.5", "0.7", "nan"]))]
    elif rng.random() < 0.3:
        options += ["--demix", "--num-overlap", int(rng.integers(1, 5))]
    if rng.random() < 0.2:
        options += ["--seed", int(rng.choice([0, 1, -1, 2**31, 2**40]))]
    largest = int(rng.choice([0, 0, 0, 1000, 20_000]))
    return Case(
        _command("separate", *songs, "-o", "out", *options), f"separate {options}", spoiled, largest, rng.random() < 0.1
    )


def evaluate(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A corpus with damaged files is scored."""
    place = inputs.copied(base["corpus"] / "test", folder / "in" / "test")
    files = sorted(p for p in place.rglob("*") if p.is_file())
    for _ in range(int(rng.integers(1, 4))):
        path = files[int(rng.integers(len(files)))]
        if path.is_file():
            inputs.damaged(rng, path)
    options = ["--excerpts", "0"] if rng.random() < 0.7 else []
    if rng.random() < 0.5:
        (folder / "in" / "made").mkdir()
        inputs.copied(base["corpus"] / "test" / "Track00000", folder / "in" / "made" / "Track00000")
        options += ["--estimates", "in/made"]
    twice, largest = rng.random() < 0.15, int(rng.choice([0, 0, 0, 0, 2000]))
    work = _command("evaluate", "--data", "in/test", "--out", "out", *options)
    return Case(work, f"evaluate {options}", largest=largest, twice=twice)


def metadata(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A corpus with damaged files and metadata is prepared, by one process."""
    from data_prep.slakh2100 import main

    place = inputs.copied(base["corpus"], folder / "in" / "corpus")
    tracks = sorted(place.glob("*/Track00001/metadata.yaml"))
    path = tracks[int(rng.integers(len(tracks)))]
    path.write_bytes(
        inputs.text_of(rng, inputs.odd_values(rng, yaml.safe_load(path.read_text()), int(rng.integers(1, 4))))
    )
    if rng.random() < 0.4:
        files = sorted(p for p in place.rglob("*.wav"))
        inputs.damaged(rng, files[int(rng.integers(len(files)))])
    largest = int(rng.choice([0, 0, 2000]))
    work = lambda: main(["in/corpus", "out/records", "--crop", "2048", "--workers", "1"])
    return Case(work, "prepare", None, largest, rng.random() < 0.05)


def records(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """Damaged records are checked and trained on."""
    place = inputs.copied(base["records"], folder / "in" / "records")
    manifest = place / "dataset_info.json"
    if rng.random() < 0.5:
        told = json.loads(manifest.read_text())
        manifest.write_bytes(inputs.text_of(rng, inputs.odd_values(rng, told, int(rng.integers(1, 4)))))
    else:
        files = sorted(place.iterdir())
        inputs.damaged(rng, files[int(rng.integers(len(files)))])
    if rng.random() < 0.7:
        from data_prep.verify import main

        return Case(lambda: main(["in/records"]), "verify records")
    work, largest = _command("train", *training("in/records", "out")), int(rng.choice([0, 0, 3000]))
    return Case(work, "train on records", largest=largest, twice=rng.random() < 0.3)


def checkpoint(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A damaged checkpoint, or a good one with an odd YAML, is imported."""
    source = base["checkpoints"][int(rng.integers(len(base["checkpoints"])))]
    family, kind = source.name.split("-")[0], str(rng.choice(["det", "diffusion", "consistency"]))
    data, path = source.read_bytes(), folder / "in" / source.name
    argv: list[Any] = ["import", path, "-o", "out/model"]
    if rng.random() < 0.6:
        argv += ["--arch", f"{family}_{kind}"]
    twice = rng.random() < 0.03
    if family != "unet" and rng.random() < 0.4:
        path.write_bytes(data)
        good = YAML if family == "bsrf" else _plain_yaml(MEL_YAML)
        text = inputs.text_of(rng, inputs.odd_values(rng, good, int(rng.integers(1, 4))))
        (folder / "in" / "config.yaml").write_bytes(text)
        return Case(_command(*argv, "--config", "in/config.yaml"), f"import {source.name} with a YAML", twice=twice)
    spoiled = _spoil(rng, path, data)
    return Case(_command(*argv), f"import {source.name}", spoiled, int(rng.choice([0, 0, 0, 5000])), twice)


def _plain_yaml(path: Path) -> Any:
    """A YAML file's content, tuples in it as lists."""
    from msr_jax.weights.yaml_config import read_yaml

    return json.loads(json.dumps(read_yaml(path)))


def model(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A damaged model folder is loaded, or exported from."""
    from msr_jax.separate.engine import load

    place = inputs.copied(base["model"], folder / "in" / "model")
    if rng.random() < 0.6:
        config = place / "config.json"
        config.write_bytes(
            inputs.text_of(rng, inputs.odd_values(rng, json.loads(config.read_text()), int(rng.integers(1, 4))))
        )
    else:
        files = sorted(place.glob("*.safetensors"))
        inputs.damaged(rng, files[int(rng.integers(len(files)))])
    if rng.random() < 0.3:
        largest = int(rng.choice([0, 0, 3000]))
        work = _command("export", "in/model", "--format", "safetensors", "-o", "out/model.safetensors")
        return Case(work, "export a model", largest=largest, twice=rng.random() < 0.05)
    refine = str(rng.choice(["none", "diffusion", "consistency"]))
    return Case(lambda: _reading(lambda: load("in/model", refine)), f"load a model, {refine}")


def config(rng: np.random.Generator, folder: Path, base: Mapping[str, Any]) -> Case:
    """A run is started with odd settings; what is fine in them comes to its first step."""
    settings = []
    for _ in range(int(rng.integers(1, 4))):
        name = base["settings"][int(rng.integers(len(base["settings"])))]
        value = inputs.VALUES[int(rng.integers(len(inputs.VALUES)))]
        if name == "train.checkpoints":  # a place of the user's choice, wherever it is
            continue
        settings.append(f"--config.{name}={value}")
    return Case(_command("train", *training(base["records"], "out"), *settings), f"train {settings}")


def training(records: Any, workdir: Any, steps: int = 4) -> Sequence[str]:
    """Options of a short run of the toy."""
    toy = inputs.ROOT / "tests" / "toy.py"
    more = {"data.train": records, "data.validation": records, "sample_rate": 22_050, "train.steps": steps, "data.workers": 0,
            "train.checkpoint_every": 2, "train.validate_every": 2, "data.batch": 4}  # fmt: skip
    return ["--config", str(toy), "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in more.items())]


# Kind, how many of a thousand cases are of it.
KINDS: dict[Callable[..., Case], int] = {
    audio: 570, tags: 170, checkpoint: 70, model: 50, exchanged: 50, stem_file: 30, metadata: 25, records: 15, separate: 9,
    config: 7, evaluate: 4,
}  # fmt: skip
