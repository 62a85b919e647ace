"""`msr doctor`: what this machine has, and what the commands would use of it."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from msr_jax.errors import UserError
from msr_jax.machine import home
from msr_jax.serve.command import NEEDED

EXTRAS = {
    "media": (("av",), "m4a, AAC, WebM, WMA"),
    "torch": (("torch",), "export to PyTorch, benchmarks' peers"),
    "export": (("flatbuffers", "onnx"), "export to StableHLO and ONNX"),
    "web": ((*NEEDED, "huggingface_hub"), "the server, and checkpoints by hf:"),
    "cloud": (("gcsfs", "s3fs"), "songs and lists in gs:// and s3://"),
    "beam": (("apache_beam",), "preparation and separation on a cluster"),
    "cuda": (("jax_cuda13_plugin",), "NVIDIA GPUs, and plans for them"),
    "tpu": (("libtpu",), "TPUs, and plans for them"),
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _kept() -> list[tuple[str, str]]:
    """What the package keeps, of all its releases, or why it keeps nothing; and JAX's own folder, if a user named one."""
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        place = home()
    except UserError as error:
        rows = [(name, f"none: {error}") for name in ("compiled programs", "plans", "models", "downloads")]
        return rows + ([("JAX's own folder", _size(Path(own)))] if own else [])
    if own and Path(own).is_relative_to(place / "compiled"):  # as `msr` tells JAX
        own = None
    return [
        ("compiled programs", _size(place / "compiled")),
        *([("JAX's own folder", _size(Path(own)))] if own else []),
        *((name, _size(place / name)) for name in ("plans", "models", "downloads")),
        ("may be deleted", f"compiled, plans, models and downloads in {place}: all are made or fetched again"),
    ]


def _size(folder: Path) -> str:
    sizes = []
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(OSError):  # gone meanwhile
            if path.is_file():
                sizes.append(path.stat().st_size)
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 1e6:.0f} MB)"


def report() -> list[tuple[str, str]]:
    """Rows (what, how it is) of the machine, the precision, what is kept, and the codecs."""
    import jax
    import soundfile

    from msr_jax.models.backbone import has_bfloat16_units

    devices = Counter(device.device_kind for device in jax.local_devices())
    has_units = has_bfloat16_units()
    codecs = [name for name in ("WAV", "FLAC", "OGG", "MP3", "AIFF") if name in soundfile.available_formats()]
    codecs += ["Opus"] if "OPUS" in soundfile.available_subtypes("OGG") else []
    packages = ("msr_jax", "jax", "jaxlib", "flax", "numpy", "soundfile", "soxr")
    rows = [
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in packages)),
        ("devices", ", ".join(f"{count} × {kind}" for kind, count in devices.items()) + f" ({jax.default_backend()})"),
        (
            "precision",
            f"float32; --dtype bfloat16 computes in {'bfloat16, measured to be' if has_units else 'float32, bfloat16 being no'} faster here",
        ),
        *_kept(),
        ("audio", f"libsndfile {soundfile.__libsndfile_version__.removeprefix('libsndfile-')}: {', '.join(codecs)}"),
        ("ffmpeg", shutil.which("ffmpeg") or "not installed"),
    ]
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        lacking = f"{', '.join(missing)} missing" if len(missing) < len(modules) else "missing"
        state = f"{lacking}: pip install 'msr_jax[{extra}]'" if missing else "installed"
        rows.append((f"extra {extra}", f"{state} ({purpose})"))
    return rows


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="msr doctor", description=__doc__).parse_args(argv)
    for name, text in report():
        print(f"{name:<18} {text}")
    return 0
