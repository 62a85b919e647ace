"""What a compiled program sends between devices, and which forms it computes in, read from its text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
         "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
_OP = re.compile(rf"%([\w.\-]+) = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)")
_CHANNEL = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(.*channel_id=(\d+)")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
# Products and convolutions, as each vendor's compiler spells them: what a transfer can hide behind.
_PRODUCT = re.compile(
    r" (?:dot|convolution)\(|custom_call_target=\"(?:__cublas|__cudnn|__triton|tpu_custom_call)|gemm_fusion|kind=kOutput"
    r"|calls=%?(?:gemm|async_collective_fusion)"
)
FORMS = {
    "fused attention (cuDNN)": r'custom_call_target="__cudnn\$fmha',
    "convolutions (cuDNN)": r'custom_call_target="__cudnn\$conv',
    "products (cuBLAS)": r'custom_call_target="__cublas',
    "products (Triton)": r'"kind":"__triton(?:_nested)?_gemm',
    "kernels (Pallas)": r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)',
    "products and convolutions": r" (?:dot|convolution)\(",
    "transforms (FFT)": r" fft\(",
}


class Collective(NamedTuple):
    """One collective: its result's shapes, the devices of a group, and how often a run of the program does it.

    `hidden`: it runs beside products, which is told of asynchronous ones.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result_bytes: int
    group: int
    times: int
    hidden: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in all, by the usual ring."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,  # the result is 1/n of what went in
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }
        return self.times * self.result_bytes * share[self.kind]


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program's text (`compiled.as_text()`) on so many devices.

    Loops count every turn, and what is started and awaited counts once: `-start` and `-done`, a computation that
    `async-start` calls, and a TPU's transfer that several fusions share.
    """
    bodies = dict(_computations(text))
    entry = next(name for name, (lines, is_entry) in bodies.items() if is_entry)
    return list(_walk(bodies, entry, 1, devices))


def forms(text: str) -> dict[str, int]:
    """How many operations of the text are of the forms that matter; those in a loop's body count once, absent ones not."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in FORMS.items()}
    return {name: count for name, count in counts.items() if count}


def _computations(text: str) -> Iterator[tuple[str, tuple[list[str], bool]]]:
    name, is_entry, lines = None, False, list[str]()
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{\s*$", line) if not line.startswith(" ") else None
        if head:
            name, is_entry, lines = head[2], bool(head[1]), []
        elif line.startswith("}") and name:
            yield name, (lines, is_entry)
            name = None
        elif name:
            lines.append(line)


def _walk(bodies: dict[str, tuple[list[str], bool]], name: str, times: int, devices: int) -> Iterator[Collective]:
    lines = bodies.get(name, ([], False))[0]
    started = set[tuple[str, str]]()  # (kind, channel) of a TPU's transfers that fusions of this computation share
    for at, line in enumerate(lines):
        found = _OP.search(line)
        if found:
            yield _collective(found, lines[at + 1 :], times, devices)
            continue
        if " async-done(" in line or " async-update(" in line:
            continue
        turns = _turns(line, bodies) if " while(" in line else 1
        listed = re.search(r"branch_computations=\{([^}]*)\}", line)
        called = _CALLED.findall(line) + (re.findall(r"[\w.\-]+", listed[1]) if listed else [])
        for other in called:
            inner = list(_walk(bodies, other, times * turns, devices))
            if inner and " fusion(" in line:
                inner = _of_fusion(inner, line, lines[at + 1 :], bodies[other][0], started)
            yield from inner


def _turns(line: str, bodies: dict[str, tuple[list[str], bool]]) -> int:
    """How often a loop turns: the compiler's count; where it gives none (a TPU's), the constant that its condition compares with,
    as JAX's loops count from 0; 1 where neither is found.
    """
    said = re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', line)
    if said:
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(bodies.get(condition[1], ([], False))[0]) if condition else ""
    root = re.search(r"ROOT .* compare\([^)]*%([\w.\-]+)\), direction=LT", text)
    limit = re.search(rf"%{re.escape(root[1])} = s32\[\]\S* constant\((\d+)\)", text) if root else None
    return int(limit[1]) if limit else 1


def _of_fusion(
    inner: list[Collective], line: str, after: list[str], body: list[str], started: set[tuple[str, str]]
) -> list[Collective]:
    """The collectives of a TPU's fusion: a sum of which each device keeps its part is a reduce-scatter, and a transfer that
    one fusion starts, others compute beside and a last one awaits is in all their bodies, and counts where it starts.
    """
    text = "\n".join(body)
    if len(inner) == 1 and inner[0].kind == "all-reduce" and " dynamic-slice(" in text:
        size, shapes = _sizes(line.split(" = ", 1)[1].split(" fusion(")[0])
        return [inner[0]._replace(kind="reduce-scatter", shapes=shapes, result_bytes=size)]
    is_asynchronous = "AsyncCollective" in text or "calls=%async_collective" in line
    here = {(found[1], found[2]) for found in map(_CHANNEL.search, body) if found}
    if not is_asynchronous or len(inner) != 1:
        return inner
    if here & started:
        return []
    started |= here
    done = next((k for k, text in enumerate(after) if "-done" in text.split(" = ")[0]), len(after))
    return [inner[0]._replace(hidden=any(_PRODUCT.search(text) for text in [line, *after[:done]]))]


def _collective(found: re.Match[str], after: list[str], times: int, devices: int) -> Collective:
    name, result, kind, is_started, rest = found[1], found[2], found[3], bool(found[4]), found[5]
    hidden = False
    if is_started:
        result = _result_of_start(result, kind)
        done = next((k for k, line in enumerate(after) if f"%{name})" in line or f"%{name}," in line), len(after))
        hidden = any(_PRODUCT.search(line) for line in after[:done])
    size, shapes = _sizes(result)
    return Collective(kind, shapes, size, _group(rest, devices), times, hidden)


def _result_of_start(result: str, kind: str) -> str:
    """Of a `-start`'s type: (operands, results, contexts…), either a tuple where there are several; of an all-reduce, the
    results alone.
    """
    if not result.startswith("("):
        return result
    parts = _parts(result)
    is_flat_sum = kind == "all-reduce" and not parts[0].startswith("(")
    return result if is_flat_sum or len(parts) < 2 else parts[1]


def _parts(of_tuple: str) -> list[str]:
    """The elements of "(a, (b, c), d)", as text."""
    parts, depth, start = list[str](), 0, 1
    text = re.sub(r"/\*.*?\*/", "", of_tuple).strip()
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (depth == 0 and character == ")"):
            parts.append(text[start:at].strip())
            start = at + 1
    return parts


def _sizes(result: str) -> tuple[int, tuple[tuple[int, ...], ...]]:
    size, shapes = 0, []
    for dtype, dims in _SHAPE.findall(result):
        shape = tuple(int(d) for d in dims.split(",") if d)
        count = 1
        for length in shape:
            count *= length
        size += BYTES.get(dtype, 4) * count
        shapes.append(shape)
    return size, tuple(shapes)


def _group(rest: str, devices: int) -> int:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if axes:  # named axes of a mesh, or parts of them: 'name':(before)size
        lengths = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        group = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2]):
            group *= int(part) if part else lengths[name]
        return group
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else devices
