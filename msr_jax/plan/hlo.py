"""What a compiled program sends between devices, read from its text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
         "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
_OP = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective: its result's shapes, the devices of a group, and how often a run of the program does it."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result_bytes: int
    group: int
    times: int

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
    """The collectives of a compiled program's text (`compiled.as_text()`) on so many devices; loops count every turn."""
    bodies = dict(_computations(text))
    entry = next(name for name, (lines, is_entry) in bodies.items() if is_entry)
    return list(_walk(bodies, entry, 1, devices))


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
    for line in bodies.get(name, ([], False))[0]:
        found = _OP.search(line)
        if found:
            yield _collective(found[1], found[2], found[3], times, devices)
            continue
        turns = re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', line) if " while(" in line else None
        listed = re.search(r"branch_computations=\{([^}]*)\}", line)
        called = _CALLED.findall(line) + (re.findall(r"[\w.\-]+", listed[1]) if listed else [])
        for other in called:
            yield from _walk(bodies, other, times * (int(turns[1]) if turns else 1), devices)


def _collective(result: str, kind: str, rest: str, times: int, devices: int) -> Collective:
    shapes = [
        (BYTES.get(dtype, 4), tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(result)
    ]
    if kind == "all-gather" and "-start(" in rest:  # asynchronous: the result names its operand too
        shapes = shapes[len(shapes) // 2 :]
    size = 0
    for width, shape in shapes:
        count = 1
        for length in shape:
            count *= length
        size += width * count
    return Collective(kind, tuple(shape for _, shape in shapes), size, _group(rest, devices), times)


def _group(rest: str, devices: int) -> int:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else devices
