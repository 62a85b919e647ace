"""Inputs of the campaign: small files of every kind that a command reads, and what is done to them. All of it is a function
of a seed, and harmless: noise, tones, and bytes changed at random."""

import io
import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[2]
RATE = 8000
AUDIO = (
    ("WAV", "PCM_16", ".wav"), ("WAV", "PCM_24", ".wav"), ("WAV", "FLOAT", ".wav"), ("WAV", "ULAW", ".wav"),
    ("WAVEX", "PCM_16", ".wav"), ("RF64", "PCM_16", ".wav"), ("W64", "PCM_16", ".w64"), ("AIFF", "PCM_16", ".aiff"),
    ("AIFF", "FLOAT", ".aifc"), ("AU", "PCM_16", ".au"), ("CAF", "ALAC_16", ".caf"), ("CAF", "PCM_16", ".caf"),
    ("FLAC", "PCM_16", ".flac"), ("FLAC", "PCM_24", ".flac"), ("OGG", "VORBIS", ".ogg"), ("OGG", "OPUS", ".opus"),
    ("MP3", "MPEG_LAYER_III", ".mp3"),
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 8, 255, 2**15, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 0x7FFFEFFC, 0x80000000)
VALUES = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-12, 1e12, 2**31, 2**64, float("nan"), float("inf"), "", "441", "44.1k",
    "nan", "../up", "a/b", "ünïcode", "x" * 300, [], {}, [1, 2], ["a", "a"], [None], {"a": 1}, "drums", "NaN", "-", "~",
)  # fmt: skip
NAMES = (
    "song{}", "Song With Spaces{}", "ünïcode ♪{}", "SONG{}", "...{}", "-o{}", "a" * 200 + "{}", "new\nline{}", "tab\t{}",
    "'quote\"{}", "%s %d{}", "nul{}", "song.tar{}", ".hidden{}", "trailing {}", "\udcff\udcfe{}", "*[?]{}", "~{}", "$HOME{}",
)  # fmt: skip


def sound(rng: np.random.Generator, seconds: float = 0.4, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """(samples, channels): a tone and noise."""
    t = np.arange(int(seconds * rate))[:, None] / rate
    tone = 0.2 * np.sin(2 * np.pi * rng.uniform(60, 900) * t)
    return tone + 0.05 * rng.standard_normal((len(t), channels))


def audio_bytes(rng: np.random.Generator, ready: Sequence[Path] = ()) -> tuple[bytes, str]:
    """A whole audio file and its suffix: one of those that are ready, or of some format, rate and number of channels, perhaps with
    tags before and after."""
    if len(ready) and rng.random() < 0.35:
        path = ready[int(rng.integers(len(ready)))]
        return path.read_bytes(), path.name[path.name.index(".") :]
    kind, subtype, suffix = AUDIO[rng.integers(len(AUDIO))]
    channels = int(rng.choice([1, 2, 2, 6])) if kind not in ("MP3", "CAF") else int(rng.integers(1, 3))
    rate = int(rng.choice([8000, 16_000, 44_100, 48_000])) if subtype != "OPUS" else 48_000
    file = io.BytesIO()
    soundfile.write(file, sound(rng, rng.uniform(0.05, 0.5), channels, rate), rate, subtype, format=kind)
    data = file.getvalue()
    if rng.random() < 0.3:
        frames = b"TIT2" + struct.pack(">I", 6) + b"\0\0\0Title" + bytes(int(rng.integers(0, 4000)))
        size = len(frames)
        sizes = bytes((size >> shift) & 127 for shift in (21, 14, 7, 0))
        tag = b"ID3" + bytes([int(rng.integers(2, 5)), 0, int(rng.choice([0, 16, 64, 128]))]) + sizes + frames
        data = tag + data
    if rng.random() < 0.2:
        data += b"TAG" + bytes(rng.integers(0, 256, 125, np.uint8))
    return data, suffix


def mutations(rng: np.random.Generator, size: int) -> list[tuple[str, int, bytes]]:
    """What is done to a file of `size` bytes, one after the other: ("set" | "insert" | "delete" | "cut", place, bytes)."""
    found = []
    for _ in range(int(rng.integers(1, 6))):
        # Headers decide most, and they come first; ends come next.
        place = int(
            rng.choice(
                [rng.integers(0, min(size, 128) + 1), rng.integers(0, size + 1), max(0, size - rng.integers(0, 64))]
            )
        )
        number = int(rng.choice(NUMBERS)) + int(rng.integers(-2, 3))
        kind = str(rng.choice(["set", "set", "set", "insert", "delete", "cut"]))
        data = {
            "set": [
                bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8)),
                struct.pack("<I", number % 2**32),
                struct.pack(">I", number % 2**32),
                bytes(int(rng.integers(1, 64))),
                b"\xff" * int(rng.integers(1, 64)),
            ][rng.integers(5)],
            "insert": bytes(rng.integers(0, 256, int(rng.integers(1, 2000)), np.uint8)),
            "delete": bytes(int(rng.integers(1, 200))),
            "cut": b"",
        }[kind]
        found.append((kind, place, data))
    return found


def changed(data: bytes, done: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A file after `mutations`."""
    for kind, place, more in done:
        if kind == "set":
            data = data[:place] + more + data[place + len(more) :]
        elif kind == "insert":
            data = data[:place] + more + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + len(more) :]
        else:
            data = data[:place]
    return data


def named(rng: np.random.Generator, suffix: str) -> bytes:
    """A file name, as bytes, that a file system takes; suffixes in some case, or of another format now and then."""
    if rng.random() < 0.1:
        suffix = str(rng.choice([".wav", ".flac", ".mp3", ".ogg", ".raw", "", ".txt"]))
    suffix = suffix.upper() if rng.random() < 0.2 else suffix
    return os.fsencode(str(rng.choice(NAMES)).format(suffix))


def odd_values(rng: np.random.Generator, told: Any, count: int) -> Any:
    """Nested maps and lists with some leaves replaced by other values, left out or doubled under another name."""
    told = json.loads(json.dumps(told))
    for _ in range(count):
        at = told
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[int(rng.integers(len(keys)))]
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            draw = rng.random()
            if draw < 0.15:
                del at[key]
            elif draw < 0.2 and isinstance(at, dict):
                at[f"{key}_"] = at[key]
            else:
                at[key] = VALUES[int(rng.integers(len(VALUES)))]
            break
    return told


def text_of(rng: np.random.Generator, told: Any) -> bytes:
    """A map as YAML or JSON, with bytes changed now and then."""
    text = (yaml.safe_dump(told) if rng.random() < 0.5 else json.dumps(told, indent=1)).encode()
    return changed(text, mutations(rng, len(text))[:1]) if rng.random() < 0.3 else text


def damaged(rng: np.random.Generator, path: Path) -> None:
    """Change a file in place, or empty it, or put a folder or a broken link there."""
    draw = rng.random()
    if draw < 0.85:
        data = path.read_bytes()
        path.write_bytes(changed(data, mutations(rng, len(data))))
        return
    path.unlink()
    if draw < 0.9:
        path.mkdir()
    elif draw < 0.95:
        path.symlink_to("nowhere")
    else:
        path.touch()


def tiny_model(folder: Path) -> Path:
    """A model folder that compiles in a second: all four networks of one small U-Net, random weights."""
    import jax

    from msr_jax.config import unet_base
    from msr_jax.models.backbone import make_backbone
    from msr_jax.weights.model_folder import save_model
    from tests.conftest import TINY_SIZES

    config = unet_base()
    config.model.update(TINY_SIZES)
    config.segment, config.sample_rate = 2048, RATE
    backbone = make_backbone(config.model.to_dict())
    names = ("deterministic", "diffusion", "consistency", "target")
    weights = {n: backbone.init(jax.random.key(k), n != "deterministic") for k, n in enumerate(names)}
    save_model(folder, config.to_dict(), jax.device_get(weights))
    return folder


def media(folder: Path) -> Path:
    """A file of every format that libsndfile does not know, and one of each that has a place for tags, with tags and a cover."""
    from tests import test_media, test_tags

    folder.mkdir()
    short = test_media.tone(seconds=0.2)
    for name in test_media.KINDS:
        test_media.encode(folder / name, [short])
    test_media.encode(folder / "a.stem.mp4", [short] * 5, ("mp4", "aac"))
    for name, tag in test_tags.SONGS.items():
        if not (folder / name).exists():
            soundfile.write(folder / name, short, 44_100)
        tag(folder / name)
    return folder


def checkpoints(folder: Path) -> Path:
    """The tests' checkpoints, named after their families, and two of them as safetensors."""
    from safetensors.numpy import save_file

    from msr_jax.weights.lightning import read_checkpoint

    folder.mkdir()
    families = {"unet": "unet", "bs_roformer": "bsrf", "mel_band_roformer": "melrf"}
    for place, family in families.items():
        for path in sorted((ROOT / "tests" / "fixtures" / place).glob("**/*.ckpt")):
            shutil.copy(path, folder / f"{family}-{path.name}")
            if path.stem.endswith("_raw"):
                tensors = {name: tensor.read() for name, tensor in read_checkpoint(path).state_dict.items()}
                save_file(
                    {n: np.ascontiguousarray(t) for n, t in tensors.items()},
                    folder / f"{family}-{path.stem}.safetensors",
                )
    return folder


def corpus(folder: Path, rng: np.random.Generator, splits: Sequence[str] = ("train", "validation", "test")) -> Path:
    """Two tracks in each split: one with a file per stem, one as Slakh2100 is distributed."""
    stems = {"bass": 33, "drums": 128, "guitar": 25, "piano": 0}
    for split in splits:
        plain, numbered = folder / split / "Track00000", folder / split / "Track00001"
        (numbered / "stems").mkdir(parents=True)
        plain.mkdir()
        described = {}
        for k, (stem, program) in enumerate(stems.items()):
            soundfile.write(plain / f"{stem}.wav", sound(rng, 1.5, 1), RATE, subtype="PCM_16")
            soundfile.write(numbered / "stems" / f"S{k:02d}.flac", sound(rng, 1.5, 1), RATE)
            described[f"S{k:02d}"] = {"program_num": program, "is_drum": program == 128, "audio_rendered": True}
        (numbered / "metadata.yaml").write_text(yaml.safe_dump({"UUID": "x", "stems": described}))
    return folder


def copied(source: Path, place: Path) -> Path:
    return Path(shutil.copytree(source, place))
