"""Memory and network traffic of a compiled program, counted from its HLO text.

Loops count once for each iteration, where the compiler's own `cost_analysis` counts their body once.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move no data: they name, group or await the results of other instructions.
_FREE = (
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all partition-id replica-id"
).split()
_INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"([a-z]+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Traffic(NamedTuple):
    """The memory and network traffic of one device in one run of a program.

    Attributes:
      accessed: bytes read from and written to main memory.
      collectives: kind -> (number of runs, bytes of their results).
    """

    accessed: float
    collectives: dict[str, tuple[int, int]]


class _Instruction(NamedTuple):
    name: str
    root: bool
    shape: str
    opcode: str
    operands: list[str]
    rest: str

    def called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=(%[\w.\-]+)", self.rest)
        return found[1] if found else ""


_Computation = dict[str, _Instruction]


def count_traffic(text: str) -> Traffic:
    """Counts the traffic of a program from the text that `compiled.as_text()` returns.

    Each instruction reads its operands and writes its result once. Operands of a fusion that are only sliced, or
    updated by a slice, count by the slice. Arrays in on-chip memory (memory spaces other than the default) are free.
    A loop whose number of iterations cannot be read counts once, a conditional by its false (first) branch.
    """
    computations, entry = _parse(text)
    accessed = 0.0
    collectives: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    open_: list[tuple[str, int]] = [(entry, 1)]
    while open_:
        name, times = open_.pop()
        computation = computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode == "while":
                turns = times * _iterations(instruction, computations)
                open_ += [(instruction.called("body"), turns), (instruction.called("condition"), turns)]
            elif opcode == "call":
                open_.append((instruction.called("to_apply"), times))
            elif opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = branches[1].split(", ") if branches else [instruction.called("false_computation")]
                open_.append((names[0], times))
            if opcode in _FREE or opcode.endswith("-done"):
                continue
            accessed += times * _accessed(instruction, computation, computations)
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                sizes = _sizes(instruction.shape, everywhere=True)
                # The start of an asynchronous collective returns its operands too.
                size = max(sizes, default=0) if opcode.endswith("-start") else sum(sizes)
                count, total = collectives[kind]
                collectives[kind] = count + times, total + times * size
    return Traffic(accessed, dict(collectives))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif found := _INSTRUCTION.match(line):
            rest = line[found.end() :]
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            opcode, _, rest = rest.partition("(")
            end = _closing("(" + rest) - 1
            operands = re.findall(r"%[\w.\-]+", rest[: end - 1])
            # A constant has its value, and a parameter its number, in the place of operands.
            rest = rest if opcode in ("constant", "parameter") else rest[end:]
            current[found[2]] = _Instruction(found[2], bool(found[1]), shape, opcode, operands, rest)
    return computations, entry


def _closing(text: str) -> int:
    """Returns the index after the bracket that closes the one at the start."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _sizes(shape: str, everywhere: bool = False) -> list[int]:
    """Returns the bytes of each array of a (tuple) shape, on-chip arrays only if `everywhere`."""
    sizes = []
    for kind, dims, layout in _SHAPE.findall(shape):
        digits = re.search(r"\d+$", kind)
        bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
        if everywhere or "S(" not in layout:
            sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sizes


def _iterations(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    if known := re.search(r'known_trip_count[":{ n]+(\d+)', loop.rest):
        return int(known[1])
    condition = computations[loop.called("condition")]
    for instruction in condition.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            limit = condition.get(instruction.operands[1])
            if limit is not None and limit.opcode == "constant":
                return int(limit.rest.split(")")[0])
    return 1


def _accessed(
    instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> float:
    size = lambda name, where: sum(_sizes(where[name].shape)) if name in where else 0
    opcode, written = instruction.opcode, sum(_sizes(instruction.shape))
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * written
    if opcode == "dynamic-update-slice":
        return 2.0 * size(instruction.operands[1], computation)
    if opcode.endswith("-start"):
        written = max(_sizes(instruction.shape), default=0)
    read: dict[int, float] = {
        i: float(size(name, computation)) for i, name in enumerate(instruction.operands)
    }
    inner = computations.get(instruction.called("calls")) if opcode == "fusion" else None
    if inner:
        for parameter in inner.values():
            if parameter.opcode == "parameter":
                number = int(parameter.rest.split(")")[0])
                read[number] = min(read[number], _used(parameter, inner))
        root = next(i for i in inner.values() if i.root)
        roots = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for each in roots:
            update = each
            while update.opcode == "bitcast" and update.operands[0] in inner:
                update = inner[update.operands[0]]
            if update.opcode == "dynamic-update-slice":
                written -= sum(_sizes(each.shape)) - size(update.operands[1], inner)
    return float(max(written, 0) + sum(read.values()))


def _used(value: _Instruction, inner: _Computation) -> float:
    """Returns the bytes of a fusion's parameter that are read: all of them, unless it is only sliced."""
    used = 0.0
    for user in inner.values():
        if value.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            used += _used(user, inner)
        elif user.opcode in ("dynamic-slice", "gather", "slice"):
            used += sum(_sizes(user.shape, everywhere=True))
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # It is written in place.
        else:
            return math.inf
    return used
