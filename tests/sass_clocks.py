"""The clocks that the loop over tiles of a Hopper kernel needs at least, counted in its machine code (SASS).

    cuobjdump --dump-sass FILE | python tests/sass_clocks.py

A product of tiles is issued by a warpgroup: four warps, one on each of the four sub-cores of a multiprocessor. The loop
over tiles is a loop that contains HGMMA and no other loop with HGMMA. Its clocks are those of one iteration of one
warpgroup, on the path through the loop with the most products and, among these, with the fewest instructions: a wait
that is over at once, no rare case.

    tensor   of the tensor cores, 4096 flop a clock: HGMMA.64xNx16 takes N / 2
    issue    of the scheduler of a sub-core: every instruction takes one, also if its guard is false
    mufu     of the unit for exponentials: 16 results a clock, so 8 for the 32 lanes of a warp
    shared   of shared memory, 128 bytes a clock: operands of HGMMA, once for the warpgroup; loads, stores and mbarriers
             of four warps, as if all lanes accessed different words and no two the same bank

What TMA writes to shared memory is not among them: the sizes of boxes are in tensor maps, not in machine code.
"""

import dataclasses
import functools
import itertools
import re
import sys

HGMMA = re.compile(r"HGMMA\.64x(\d+)x16\.F32")
WARPS = 4  # of a warpgroup
MUFU_CLOCKS = 8
SHARED_CLOCKS = 128  # bytes
# Bytes per lane of an instruction that accesses shared memory, by the first modifier that is listed, else by "".
LANE_BYTES = {
    "LDS": {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "": 4},
    "STS": {"U8": 1, "U16": 2, "64": 8, "128": 16, "": 4},
    "LDSM": {"4": 16, "2": 8, "": 4},  # 8 x 8 matrices, 128 bytes each
    "STSM": {"4": 16, "2": 8, "": 4},
    "ATOMS": {"": 4},
    "SYNCS": {"": 4},  # mbarriers: one word, which takes a clock
}
FINAL = {"EXIT", "RET", "BPT", "KILL"}  # without a guard, nothing follows
BRANCHES = {"BRA", "BRX", "JMP"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or ""
    opcode: str  # with modifiers
    operands: str

    @property
    def name(self):
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self):
        return self.opcode.split(".")[1:]

    @property
    def target(self):
        """The address to which a branch goes, or None."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name in BRANCHES else None
        return int(found.group(1), 16) if found else None

    @property
    def goes_on(self):
        """Whether the next instruction may follow."""
        if self.name in BRANCHES:  # the condition is the guard, or stands before the target
            return bool(self.guard) or "," in self.operands
        return self.name not in FINAL or bool(self.guard)


@dataclasses.dataclass(frozen=True)
class Clocks:
    tensor: float = 0
    issue: float = 0
    mufu: float = 0
    shared: float = 0

    def __add__(self, other):
        return Clocks(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def scaled(self, factor):
        return Clocks(*(factor * getattr(self, f.name) for f in dataclasses.fields(self)))

    def __str__(self):
        return ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in dataclasses.fields(self))


def parse(listing):
    """{symbol: [Instruction]} of the functions in what `cuobjdump --dump-sass` prints."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
    functions = {}
    for text in re.split(r"\n\s*Function : ", listing)[1:]:
        found = [Instruction(int(at, 16), guard, op, rest.strip()) for at, guard, op, rest in line.findall(text)]
        functions[text.split(None, 1)[0]] = found
    return functions


def clocks_of(instruction):
    """Of one warpgroup."""
    if product := HGMMA.match(instruction.opcode):
        columns = int(product.group(1))
        operands = instruction.operands.split(",")
        read = 2 * 16 * columns + (2 * 16 * 64 if operands[1].strip().startswith("gdesc") else 0)
        return Clocks(tensor=columns / 2, issue=1, shared=read / SHARED_CLOCKS)
    if instruction.name.endswith("GMMA"):
        raise ValueError(f"sass_clocks: the clocks of {instruction.opcode} are not known")
    shared = 0
    if widths := LANE_BYTES.get(instruction.name):
        width = next((widths[modifier] for modifier in instruction.modifiers if modifier in widths), widths[""])
        shared = WARPS * max(1, 32 * width / SHARED_CLOCKS)
    return Clocks(issue=1, mufu=MUFU_CLOCKS * (instruction.name == "MUFU"), shared=shared)


# ---- loops ----------------------------------------------------------------------------------------------------------


class Flow:
    """The basic blocks of a function and what follows them."""

    def __init__(self, instructions):
        self.instructions = instructions
        position = {instruction.address: i for i, instruction in enumerate(instructions)}
        starts = {0}
        for i, instruction in enumerate(instructions):
            if instruction.name in BRANCHES or not instruction.goes_on:
                starts.add(i + 1)
            if instruction.target is not None:
                starts.add(position[instruction.target])
        first = sorted(start for start in starts if start < len(instructions))
        self.blocks = [instructions[a:b] for a, b in zip(first, [*first[1:], len(instructions)], strict=True)]
        number = {start: block for block, start in enumerate(first)}
        self.next = []
        for block, content in enumerate(self.blocks):
            last = content[-1]
            after = [number[position[last.target]]] if last.target is not None else []
            if last.goes_on and block + 1 < len(first):
                after.append(block + 1)
            self.next.append(after)

    @functools.cached_property
    def dominators(self):
        """The blocks through which every path from the start to a block leads; of unreachable ones, none."""
        order, seen, stack = [], {0}, [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((after for after in rest if after not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.next[following])))
        before = {block: [] for block in order}
        for block in order:
            for after in self.next[block]:
                before[after].append(block)
        found, changed = {0: {0}}, True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                known = [found[previous] for previous in before[block] if previous in found]
                new = set.intersection(*known) | {block}
                if found.get(block) != new:
                    found[block], changed = new, True
        return found

    @functools.cached_property
    def back_edges(self):
        return {(block, head) for block, above in self.dominators.items() for head in self.next[block] if head in above}

    @functools.cached_property
    def loops(self):
        """{first block: all blocks} of every loop."""
        before = {}
        for block in self.dominators:
            for after in self.next[block]:
                before.setdefault(after, []).append(block)
        loops = {}
        for end, head in self.back_edges:
            body, stack = loops.setdefault(head, {head}), [end]
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += before[block]
        return loops

    def innermost(self, *opcodes):
        """{first block: all blocks} of the loops that contain each of these opcodes, with no such loop inside."""

        def contains(body):
            present = {instruction.name for block in body for instruction in self.blocks[block]}
            return present.issuperset(opcodes)

        found = {head: body for head, body in self.loops.items() if contains(body)}
        return {
            head: body
            for head, body in found.items()
            if not any(other < body for inner, other in found.items() if inner != head)
        }

    def path(self, head):
        """The instructions of an iteration on the path with the most products and then the fewest instructions."""
        body = self.loops[head]
        ends = {end for end, target in self.back_edges if target == head}

        @functools.cache
        def best(block):
            """(products, -instructions, blocks) from here to the end of the iteration, or None."""
            own = self.blocks[block]
            products, issued = sum(clocks_of(each).tensor for each in own), len(own)
            rest = [(0, 0, ())] if block in ends else []
            for after in self.next[block]:
                if after in body and (block, after) not in self.back_edges and (found := best(after)):
                    rest.append(found)
            if not rest:
                return None
            most, fewest, blocks = max(rest)
            return products + most, fewest - issued, (block, *blocks)

        return [instruction for block in best(head)[2] for instruction in self.blocks[block]]


@dataclasses.dataclass(frozen=True)
class Loop:
    address: int
    clocks: Clocks  # of an iteration of a warpgroup


def tile_loops(instructions):
    """The loops over tiles of a kernel, the one with the fewest instructions for its products first."""
    flow = Flow(instructions)
    loops = []
    for head in flow.innermost("HGMMA"):
        clocks = sum((clocks_of(instruction) for instruction in flow.path(head)), Clocks())
        loops.append(Loop(flow.blocks[head][0].address, clocks))
    return sorted(loops, key=lambda loop: (loop.clocks.issue / loop.clocks.tensor, loop.address))


def highest_register(instructions):
    """The number of registers up to the highest one that a kernel names. Of a kernel with setmaxnreg, the object code
    only says how many registers a thread has at its start."""
    names = itertools.chain.from_iterable(map(registers, instructions))
    return 1 + max((first + count - 1 for first, count in names), default=-1)


def registers(instruction):
    """(first, how many) of each register operand."""
    if product := HGMMA.match(instruction.opcode):
        sums, a, *rest = instruction.operands.split(",")
        groups = [(sums, int(product.group(1)) // 2), (a, 4), (",".join(rest), int(product.group(1)) // 2)]
    else:
        wide = {"64": 2, "128": 4}
        width = max((wide.get(modifier, 1) for modifier in instruction.modifiers), default=1)
        addresses = "".join(re.findall(r"\[[^]]*\]", instruction.operands))
        rest = re.sub(r"\[[^]]*\]", "", instruction.operands)
        groups = [(addresses, 2 if ".64" in addresses else 1), (rest, 2 if instruction.opcode == "CS2R" else width)]
        if "WIDE" in instruction.modifiers:  # a product of two registers, added to a pair
            first, *factors, last = rest.split(",")
            groups = [(first, 2), (",".join(factors), 1), (last, 2)]
    for text, count in groups:
        for number in re.findall(r"\bR(\d+)\b", text):
            yield int(number), count


def main():
    for symbol, instructions in parse("\n" + sys.stdin.read()).items():
        if loops := tile_loops(instructions):
            print(f"{symbol}: {highest_register(instructions)} registers")
            for loop in loops:
                print(f"    {loop.address:#06x}: {loop.clocks}")


if __name__ == "__main__":
    main()
