"""`msr doctor`: what this machine has, and what the commands would use of it."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXTRAS = {
    "media": (("av",), "m4a, AAC, WebM, WMA"),
    "torch": (("torch",), "export to PyTorch, benchmarks' peers"),
    "export": (("flatbuffers", "onnx"), "export to StableHLO and ONNX"),
    "web": (("fastapi", "uvicorn", "huggingface_hub"), "the server, and checkpoints by hf:"),
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


def _size(folder: Path) -> str:
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return f"{folder} ({len(files)} files, {sum(files) / 1e6:.0f} MB)"


def report() -> list[tuple[str, str]]:
    """Rows (what, how it is) of the machine, the precision, what is kept, and the codecs."""
    import jax
    import soundfile

    from msr_jax.machine import home
    from msr_jax.models.backbone import has_bfloat16_units

    devices = Counter(device.device_kind for device in jax.local_devices())
    compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home() / "compiled")
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
        ("compiled programs", _size(compiled)),
        ("plans", _size(home() / "plans")),
        ("models", _size(home() / "models")),
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
