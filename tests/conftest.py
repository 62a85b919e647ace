"""Shared fixtures; also what must be set before JAX and absl are first used."""

import copy
import importlib.util
import os
from pathlib import Path

from tests.xla_flags import known_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the time: code that runs for a moment need not be the fastest, and without the fusion emitters
# compiling takes two thirds of it (where XLA still can without). One thread for each of the tests' processes: there are as
# many as cores. And they compile many a program twice, so they keep them; removed by hand if at all.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS") or " ".join(
    known_flags(
        [
            "--xla_backend_optimization_level=0",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_multi_thread_eigen=false",
        ]
    )
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags

# Files that take longest go first: processes share whole files, and a long one at the end would run alone.
LONGEST = (
    "train",
    "multiprocess",
    "readme",
    "backbones",
    "bs_roformer",
    "method",
    "unet1d",
    "sweep",
    "bench",
    "evaluate",
)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


TINY_SIZES = {
    "channels": 16,
    "patch_factor": 8,
    "multipliers": (1, 2),
    "factors": (2,),
    "num_blocks": (1,),
    "attentions": (True,),
    "attention_heads": 2,
    "attention_features": 8,
    "resnet_groups": 4,
}
TINY_SEGMENT = 2048
TINY_RATE = 8000  # Hz: of the tiny model and of the corpora


def launch_script(name):
    """The module of a script in `launch/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_config():
    """A released-recipe config of a U-Net that trains in seconds: plain nested dicts, safe to change."""
    from msr_jax.config import unet_base

    config = unet_base()
    config.model.update(TINY_SIZES)
    config.segment = config.data.crop = TINY_SEGMENT
    config.compute_dtype = "float32"
    config.data.batch = 8
    config.consistency.num_levels = 4
    config.train.update(
        {"steps": 12, "steps_per_dispatch": 2, "log_every": 4, "validate_every": 12, "checkpoint_every": 4}
    )
    return config.to_dict()


@pytest.fixture
def bfloat16_units(monkeypatch):
    """Has "bfloat16" compute in it whatever the processor."""
    from msr_jax.models import backbone

    monkeypatch.setattr(backbone, "has_bfloat16_units", lambda: True)


@pytest.fixture
def tiny_backbone(tiny_config):
    from msr_jax.models.backbone import make_backbone

    return make_backbone(tiny_config["model"])


def random_model(folder, sizes):
    """Write a model folder with all four networks of a backbone, random weights; returns it."""
    from msr_jax.config import unet_base
    from msr_jax.models.backbone import make_backbone
    from msr_jax.weights.model_folder import save_model

    config = unet_base().to_dict()
    config["model"].update(sizes)
    config["segment"], config["sample_rate"] = TINY_SEGMENT, TINY_RATE
    backbone = make_backbone(config["model"])
    names = ("deterministic", "diffusion", "consistency", "target")
    weights = {n: backbone.init(jax.random.key(k), n != "deterministic") for k, n in enumerate(names)}
    save_model(folder, config, jax.device_get(weights))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model folder with all four networks of a U-Net, random weights."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", TINY_SIZES)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory):
    """As `tiny_model`, of a backbone that compiles in a moment; for what surrounds a network, in the tests' own process."""
    from tests.toy import MODEL

    return random_model(tmp_path_factory.mktemp("models") / "toy", MODEL)


@pytest.fixture(scope="session")
def separator(tiny_model):
    """The separator of `tiny_model`, without refinement."""
    import msr_jax

    return msr_jax.load(tiny_model, "none")


@pytest.fixture
def make_copier(separator):
    """Makes a separator whose network returns the mixture times 1, 2, 3 and 4, with other settings."""

    def make(**settings):
        made = copy.copy(separator)
        vars(made).update(settings)
        made._run_chunks = lambda chunks, first: chunks[:, None] * np.arange(1, 5, dtype=np.float32)[:, None, None]
        return made

    return make


def make_corpus(root, splits=("train", "validation", "test"), tracks=2, seconds=13.0, rate=TINY_RATE):
    """Write tracks of tones and noise, one file per stem; the second track of each split has no guitar."""
    import soundfile

    t = np.arange(int(seconds * rate)) / rate
    for s, split in enumerate(splits):
        for k in range(tracks):
            rng = np.random.default_rng([s, k])
            sounds = {
                "bass": 0.2 * np.sin(2 * np.pi * (60 + 5 * k) * t),
                "drums": 0.1 * rng.standard_normal(len(t)) * (np.sin(2 * np.pi * 2 * t) > 0.7),
                "guitar": 0.15 * np.sign(np.sin(2 * np.pi * (300 + 40 * k) * t)),
                "piano": 0.15 * np.sin(2 * np.pi * (700 + 90 * k) * t) * (1 + np.sin(2 * np.pi * t)) / 2,
            }
            folder = root / split / f"Track{k:05d}"
            folder.mkdir(parents=True)
            for stem, audio in sounds.items():
                if not (stem == "guitar" and k == 1):
                    soundfile.write(folder / f"{stem}.wav", audio, rate, subtype="PCM_16")
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus with three splits in the layout of one file per stem."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def short_corpus(tmp_path_factory):
    """As `corpus`, of 5 s; for what runs a model over it."""
    return make_corpus(tmp_path_factory.mktemp("short_corpus"), ("validation", "test"), seconds=5.0)


@pytest.fixture(scope="session")
def records(corpus, tmp_path_factory):
    """Training records made from the corpus by the command a user would run."""
    from data_prep.slakh2100 import main

    out = tmp_path_factory.mktemp("prepared") / "records"
    assert main([str(corpus), str(out), "--crop", str(4 * TINY_SEGMENT)]) == 0
    return out
