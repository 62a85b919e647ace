"""Which network a state dict holds, told by the names of its tensors; and which it is where it is none of ours."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from msr_jax.errors import UserError
from msr_jax.weights.torch_names import EXTRACTOR, PREFIXES

BAND_SPLIT = "band_split.to_features.0.1.weight"  # in every RoFormer, under the prefix of its network
U_NET = "to_mapping.0.weight"


class Foreign(NamedTuple):
    """A network that is none of ours: what it is, a pattern in the names of its tensors, and fields of its YAML alone."""

    what: str
    tensors: str
    fields: tuple[str, ...] = ()


# In this order: a conformer may have hyper-connections, and not the other way round.
FOREIGN = (
    Foreign(
        "a BS-RoFormer HyperACE (a segmentation network inside of its mask heads)",
        r"mask_estimators\.\d+\.segm(ent)?\.",
    ),
    Foreign("a RoFormer whose mask heads hold transformers (large v2)", r"mask_estimators\.\d+\.layers\."),
    Foreign("a PolarFormer (polar position embeddings)", r"\bpope_embed\.", ("use_pope",)),
    Foreign(
        "a Mamba2 network (state-space layers instead of attention)",
        r"\.A_log$|\bmamba|\.mixer\.",
        ("mamba_type", "d_state"),
    ),
    Foreign(
        "a conformer (convolutions inside of its transformers)",
        r"\blayers\.\d+\.\d+\.layers\.\d+\.(conv|ff1|ff2)\.",
        ("time_conformer_depth", "freq_conformer_depth"),
    ),
    Foreign(
        "a RoFormer with windowed sink attention (WSA)",
        r"(^|\.)\w*(wsa|sink)\w*(\.|$)",
        ("wsa", "use_wsa", "num_sinks"),
    ),
    Foreign("a RoFormer with hyper-connections", r"\.branch\.|\bhyper_conn", ("num_residual_streams",)),
    Foreign("a RoFormer with value residuals", r"\.to_value_residual_mix\.", ("use_value_residual_learning",)),
    Foreign("an Apollo (restoration of coded audio)", r"\bnet\.\d+\.(band_net|seq_net)\."),
    Foreign("an SCNet", r"\b(SDlayer|separation_net)\."),
    Foreign("an MDX23C (TFC-TDF network)", r"\btfc_tdf\.|\bbottleneck_block\.blocks\.", ("num_subbands", "num_scales")),
    Foreign("an HT Demucs", r"\bcrosstransformer\.|\bchannel_upsampler\b"),
    Foreign("a Demucs", r"\b(encoder|tencoder|decoder)\.\d+\.conv(_tr)?\.|\btencoder\."),
    Foreign("a BandIt", r"\bnorm_fc_modules\.|\btf_model\."),
    Foreign("a Swin or segmentation network", r"\bupernet\b|\bunet_model\.|\bswin"),
)
STANDARD = (None, False, 0)  # values with which such a field of a YAML asks for nothing
SINGLE = {"num_residual_streams": (*STANDARD, 1)}


def clean_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without what a wrapper puts into its names: `_orig_mod.` anywhere, and whole prefixes such as
    `module.` or `model.` before its network, if it has a single one; then also without what lies beside that, see `beside`.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    prefix = _single_prefix(state)
    if prefix is None:
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def beside(state: Mapping[str, Any]) -> list[str]:
    """Names of a state dict that `clean_names` leaves out: counters, buffers of a loss, and so on."""
    names = [name.replace("_orig_mod.", "") for name in state]
    prefix = _single_prefix(names) or ""
    return [name for name in names if not name.startswith(prefix)]


def _single_prefix(names: Iterable[str]) -> str | None:
    prefixes = networks_among(names)
    return prefixes[0] if len(prefixes) == 1 else None


def networks_among(names: Iterable[str]) -> list[str]:
    """Prefixes of the networks among names: RoFormers, or the paper's U-Nets if there are none, beside which averages ("ema…") do
    not count: its program reads none.
    """
    names = list(names)
    found = {
        last: [name.removesuffix(last) for name in names if name.endswith(last)] for last in (BAND_SPLIT, U_NET)
    }  # a RoFormer that refines has the latter too
    u_nets = [prefix for prefix in found[U_NET] if not prefix.startswith("ema")]
    return found[BAND_SPLIT] or u_nets or found[U_NET]


def prefixes_of(state: Mapping[str, Any], arch: str) -> dict[str, str]:
    """The prefix of each network in a state dict (as of `clean_names`): `PREFIXES`, or none where there is a separator alone."""
    is_bare = arch.endswith("_det") and (BAND_SPLIT in state or U_NET in state)
    return {"deterministic": ""} if is_bare else PREFIXES[arch]


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """UserError that names the network, and which names told so, if these are those of one that is none of ours."""
    names = list(names)
    for network in FOREIGN:
        told = [name for name in names if re.search(network.tensors, name)]
        if told:
            more = f" and {len(told) - 1} more" if len(told) > 1 else ""
            raise UserError(
                f"{where} holds {network.what}, as {told[0]}{more} tells; this package has no such network: it reads"
                " BS-RoFormers, Mel-Band RoFormers and the paper's U-Nets"
            )


def refuse_foreign_fields(fields: Mapping[str, Any], where: str) -> None:
    """UserError that names the network, if the `model` section of a YAML is that of one that is none of ours."""
    for network in FOREIGN:
        told = [name for name in network.fields if fields.get(name) not in SINGLE.get(name, STANDARD)]
        if told:
            raise UserError(
                f"{where} is the config of {network.what}, as {told[0]} = {fields[told[0]]} tells; this package has no such"
                " network: it reads BS-RoFormers, Mel-Band RoFormers and the paper's U-Nets"
            )


def family_of(names: Iterable[str]) -> str:
    """`melrf` or `bsrf`: only in the former each transformer ends in a norm of its own."""
    # `layers` once: the norm of a transformer, not of a block inside of one.
    is_norm = lambda name: re.search(r"\blayers\.\d+\.\d+\.norm\.gamma$", name) and name.count("layers.") == 1
    return "melrf" if any(map(is_norm, names)) else "bsrf"


def detect_arch(names: Iterable[str], where: str) -> str:
    """The kind of checkpoint, a key of `PREFIXES`, from the names of all of its tensors (as of `clean_names`).

    Raises:
      UserError: another network, by name where it is a known one.
    """
    names = list(names)
    refuse_foreign(names, where)
    is_roformer, networks = any(name.endswith(BAND_SPLIT) for name in names), networks_among(names)
    if not networks:
        shown = ", ".join(sorted(names)[:3])
        raise UserError(
            f"{where} holds no network that this package has: its tensors are {shown}, …, and neither {BAND_SPLIT}"
            f" (RoFormers) nor {U_NET} (the paper's U-Nets) is among them"
        )
    family = family_of(names) if is_roformer else "unet"
    if any(prefix.startswith("net.model.unet.") for prefix in networks):
        return f"{family}_consistency"
    if any(prefix.startswith(EXTRACTOR) for prefix in networks):
        return f"{family}_diffusion"
    if len(networks) > 1:
        shown = " and ".join(f"{prefix}…" for prefix in networks[:2])
        raise UserError(
            f"{where} holds {len(networks)} networks, among them {shown}, and nothing tells which is wanted; save the"
            " state_dict of one of them and import that"
        )
    return f"{family}_det"
