"""Counts what a compiled program moves from and to a device's memory, and its products, from the text of its optimised HLO.

Bytes: each operation reads its operands and writes its result once. Arrays in the chip's vector memory (`S(1)` in their layout) are free. A
fusion reads only the slices that it uses, and a dynamic update writes only its slice. Kernels (custom calls) count 0, in bytes and in
operations: what they do is not in the text.
"""

import math
import re
from typing import NamedTuple

_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "opt-barrier", "custom-call"}
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\w*\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """An instruction of a computation. `operands`: names; a parameter's number; a constant's value. `attributes`: the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(size for size, _ in _sizes(self.type))

    @property
    def stored(self) -> int:
        """Bytes of the result in the device's memory."""
        return sum(size for size, outside in _sizes(self.type) if outside)

    def called(self, role: str) -> str:
        """Name of the computation that it calls in this role; empty if there is none."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def branches(self) -> list[str]:
        """Names of the computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = listed[1].split(",") if listed else [self.called("true_computation"), self.called("false_computation")]
        return [name.strip().lstrip("%") for name in names]


Computation = dict[str, Instruction]


def _sizes(text: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it is outside of the vector memory."""
    found = []
    for kind, sizes, layout in _SHAPE.findall(text):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        for size in filter(None, sizes.split(",")):
            bits *= int(size)
        found.append((-(-bits // 8), not re.search(r"S\([1-9]", layout)))
    return found


def _end_of_bracket(text: str) -> int:
    """Index after the bracket that closes the one at the start."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return index + 1
    raise ValueError(f"unclosed bracket in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if match is None:
        return None
    end = _end_of_bracket(match[3]) if match[3].startswith("(") else match[3].index(" ")
    type, rest = match[3][:end], match[3][end:].strip()
    opcode = rest[: rest.index("(")]
    end = len(opcode) + _end_of_bracket(rest[len(opcode) :])
    within = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1 : end - 1])
    # Commas within brackets are those of operands' types.
    operands = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", within).split(",") if opcode != "constant" else [within]
    names = tuple(operand.split()[-1].lstrip("%") for operand in operands if operand.strip())
    return Instruction(match[2], type, opcode, names, rest[end:], bool(match[1]))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry computation.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = own = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            own = start[2]
            computations[own] = {}
            entry = own if start[1] else entry
        elif line.startswith("}"):
            own = ""
        elif own and (instruction := _instruction(line)):
            computations[own][instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation: it must be that of a compiled module")
    return computations, entry


class _Fusion:
    """What a fusion reads and writes."""

    def __init__(self, computations: dict[str, Computation], name: str) -> None:
        self._all, self._body = computations, computations[name]

    def parameter(self, number: int) -> Instruction:
        return next(one for one in self._body.values() if one.opcode == "parameter" and int(one.operands[0]) == number)

    def reads(self, one: Instruction) -> int:
        """Bytes of a value that the fusion uses."""
        total = 0
        for user in self._body.values():
            for position, operand in enumerate(() if user.opcode in ("parameter", "constant") else user.operands):
                if operand == one.name:
                    total += self._read_by(user, position, one.size)
        return min(total, one.size)

    def _read_by(self, user: Instruction, position: int, whole: int) -> int:
        if user.opcode == "bitcast" and not user.root:
            return self.reads(user)
        if position == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
            return user.size
        if position == 0 and user.opcode == "dynamic-update-slice":
            return 0
        if user.opcode == "fusion":
            within = _Fusion(self._all, user.called("calls"))
            return within.reads(within.parameter(position))
        return whole

    def written(self, result: Instruction) -> int:
        """Bytes of `result`, the fusion's, that are written to memory."""
        root = next(one for one in self._body.values() if one.root)
        if root.opcode != "tuple":
            updated = self._updated(root)
            return result.stored if updated is None or not result.stored else updated
        updates = (self._updated(self._body[name]) for name in root.operands)
        pairs = zip(updates, _sizes(result.type), strict=True)
        return sum(size if updated is None else updated for updated, (size, outside) in pairs if outside)

    def _updated(self, part: Instruction) -> int | None:
        """Bytes of the slice that a dynamic update writes; None for other operations."""
        if part.opcode == "bitcast":
            part = self._body[part.operands[0]]
        return self._body[part.operands[1]].size if part.opcode == "dynamic-update-slice" else None


def _moved(computations: dict[str, Computation], within: Computation, one: Instruction) -> int:
    """Bytes of one instruction, without those of loops and branches."""
    operands = [within[name] for name in one.operands if name in within]
    if one.opcode in _FREE or one.opcode in ("while", "conditional", "call"):
        return 0
    if one.opcode.endswith("-start"):
        return sum(operand.stored for operand in operands)
    if one.opcode.endswith("-done"):
        return one.stored
    if one.opcode == "fusion":
        fusion = _Fusion(computations, one.called("calls"))
        reads = (min(fusion.reads(fusion.parameter(number)), operand.stored) for number, operand in enumerate(operands))
        return sum(reads) + fusion.written(one)
    if one.opcode == "dynamic-slice":
        return 2 * one.stored
    if one.opcode == "dynamic-update-slice":
        return 2 * operands[1].size if one.stored else 0
    return sum(operand.stored for operand in operands) + one.stored


def bytes_by_depth(text: str) -> list[int]:
    """Bytes moved by the instructions outside of loops, by one turn of the loops among them, by one turn of the loops within, and so on.

    Of a conditional, the branch that moves most counts.
    """
    computations, entry = parse(text)

    def counted(name: str) -> list[int]:
        within, total = computations[name], [0]

        def add(more: list[int]) -> None:
            total.extend([0] * (len(more) - len(total)))
            for depth, size in enumerate(more):
                total[depth] += size

        for one in within.values():
            add([_moved(computations, within, one)])
            if one.opcode == "while":
                add([0, *counted(one.called("body"))])
            elif one.opcode == "conditional":
                add(max((counted(branch) for branch in one.branches), key=sum))
            elif one.opcode == "call":
                add(counted(one.called("to_apply")))
        return total

    return counted(entry)


def _shape(type: str) -> list[int]:
    match = _SHAPE.search(type)
    return [int(size) for size in match[2].split(",") if size] if match else []


def _product_operations(within: Computation, one: Instruction) -> int:
    """Floating point operations of a product of matrices."""
    if one.opcode == "dot":
        contracted, operand = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes), one.operands[0]
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    else:
        labels, operand = re.search(r"dim_labels=\w+_(\w+)->", one.attributes), one.operands[1]
        axes = [labels[1].index("i")] if labels else []
    sizes = _shape(within[operand].type)
    return 2 * math.prod(_shape(one.type)) * math.prod(sizes[axis] for axis in axes)


def _turns(condition: Computation) -> int:
    """Turns of a loop that counts up to a constant."""
    root = next(one for one in condition.values() if one.root)
    bounds = [condition[name].operands[0] for name in root.operands if name in condition and condition[name].opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(bounds) != 1:
        raise ValueError(f"the number of turns of a loop is not in the text: its condition ends with {root.opcode}{root.attributes[:60]}")
    return int(bounds[0])


def product_operations(text: str) -> int:
    """Floating point operations of all products of matrices of a program, whose loops count up to constants. Of a conditional, the branch
    with most counts.

    Raises:
      ValueError: the number of turns of a loop is not in the text.
    """
    computations, entry = parse(text)

    def counted(name: str) -> int:
        total = 0
        for one in computations[name].values():
            if one.opcode in ("convolution", "dot"):
                total += _product_operations(computations[name], one)
            elif one.opcode == "fusion":
                total += counted(one.called("calls"))
            elif one.opcode == "call":
                total += counted(one.called("to_apply"))
            elif one.opcode == "conditional":
                total += max(counted(branch) for branch in one.branches)
            elif one.opcode == "while" and (within := counted(one.called("body"))):
                total += _turns(computations[one.called("condition")]) * within
        return total

    return counted(entry)
