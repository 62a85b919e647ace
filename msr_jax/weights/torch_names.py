"""Names and layouts of the published PyTorch checkpoints, and of ours: one mechanical rule both ways.

A number in an original name joins the word before it ("blocks.1.block1" -> "blocks_1/block1"); leaf names are kept.
Only the order of axes differs: they have channels first, we have them last.
"""

import re
from collections.abc import Mapping

import numpy as np

EXTRACTOR = "pre_trained_mixture_feature_extractor_model.model.unet."
_DET = {"deterministic": "model.unet."}
_DIFFUSION = {"deterministic": EXTRACTOR, "diffusion": "model.unet."}
_CONSISTENCY = {
    "deterministic": EXTRACTOR,
    "consistency": "net.model.unet.",
    "diffusion": "teacher_model.model.unet.",
    "target": "target_model.model.unet.",
}
# For each kind of checkpoint: the prefix that each of our networks is read from.
PREFIXES = {
    "unet_det": _DET,
    "unet_diffusion": _DIFFUSION,
    "unet_consistency": _CONSISTENCY,
    "bsrf_det": _DET,
    "bsrf_diffusion": _DIFFUSION,
    "bsrf_consistency": _CONSISTENCY,
    "melrf_det": _DET,
    "melrf_diffusion": _DIFFUSION,
    "melrf_consistency": _CONSISTENCY,
}
# Networks that stand twice in a checkpoint, (copy, original); the copy is ignored on import and written on export.
_TWICE = {"model.diffusion.net.": "model.unet."}
_TWICE_IN_EACH = {
    f"{who}.{copy}": f"{who}.{original}"
    for who in ("net", "target_model", "teacher_model")
    for copy, original in _TWICE.items()
}
DUPLICATES = {
    "unet_diffusion": _TWICE,
    "bsrf_diffusion": _TWICE,
    "bsrf_consistency": _TWICE_IN_EACH,
    "melrf_diffusion": _TWICE,
    "melrf_consistency": _TWICE_IN_EACH,
}


def to_path(name: str) -> str:
    """Original name -> our path: "to_mapping.0.weight" -> "to_mapping_0/weight"."""
    return re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")


def to_name(path: str) -> str:
    """The inverse of `to_path`."""
    return re.sub(r"_(\d+)(?=[/_]|$)", r".\1", path).replace("/", ".")


def _axes(name: str, ndim: int) -> tuple[int, ...]:
    if name.endswith("upsample.weight"):  # transposed convolution: (in, out, k)
        return (2, 0, 1)
    return tuple(reversed(range(ndim)))  # convolution (out, in, k), linear (out, in)


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State dict of one U-Net, prefix removed -> flat dict of our paths and layouts."""
    params = {}
    for name, tensor in tensors.items():
        tensor = tensor.reshape(-1) if name.endswith(".g") else tensor.transpose(_axes(name, tensor.ndim))
        params[to_path(name)] = np.ascontiguousarray(tensor)
    return params


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    tensors = {}
    for path, tensor in params.items():
        name = to_name(path)
        if "feed_forward" in name and name.endswith(".g"):  # the norms over the channel axis of (batch, channel, time)
            tensor = tensor.reshape(1, -1, 1)
        elif not name.endswith(".g"):
            tensor = tensor.transpose(np.argsort(_axes(name, tensor.ndim)))
        tensors[name] = np.ascontiguousarray(tensor)
    return tensors
