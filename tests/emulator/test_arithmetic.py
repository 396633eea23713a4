"""Single instructions against Python's own arithmetic, on random values and the limits of each type."""

import math
import random
import struct

import pytest
import torch

from emulator import Emulator

PROGRAM = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry program(.param .u64 program_out, .param .u64 program_in)
{{
  .reg .b64 %out, %in, %d8, %a8, %b8, %c8;
  .reg .b32 %tid, %d4, %a4, %b4, %c4, %e4;
  .reg .b16 %d2, %a2, %b2, %c2;
  .reg .pred %p, %q;
  ld.param.u64 %out, [program_out];
  ld.param.u64 %in, [program_in];
  mov.u32 %tid, %tid.x;
  mad.wide.u32 %out, %tid, 8, %out;
  mad.wide.u32 %in, %tid, 24, %in;
  ld.global.u64 %a8, [%in];
  ld.global.u64 %b8, [%in+8];
  ld.global.u64 %c8, [%in+16];
  ld.global.u32 %a4, [%in];
  ld.global.u32 %b4, [%in+8];
  ld.global.u32 %c4, [%in+16];
  ld.global.u16 %a2, [%in];
  ld.global.u16 %b2, [%in+8];
  ld.global.u16 %c2, [%in+16];
  mov.u64 %d8, 0;
  {statement};
  st.global.{width} [%out], %d{bytes};
  ret;
}}
"""


def bits_of(kind, value):
    if kind in ("f16", "bf16"):
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        return torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16).item() & 0xFFFF
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")
    return value & (1 << int(kind[1:])) - 1


def value_of(kind, bits):
    if kind in ("f16", "bf16"):
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        return torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(dtype).item()
    if kind in ("f32", "f64"):
        return struct.unpack("<f" if kind == "f32" else "<d", bits.to_bytes(4 if kind == "f32" else 8, "little"))[0]
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def bytes_of(kind):
    return {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}.get(kind) or int(kind[1:]) // 8


def values(kind, rng):
    """Limits and random values of a type."""
    if kind in ("f16", "bf16", "f32", "f64"):
        ends = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1.5, 2.5, -2.5, 0.1, 65504.0, 3e-8]
        return [value_of(kind, bits_of(kind, v)) for v in ends + [rng.gauss(0, 4) for _ in range(19)]]
    width = int(kind[1:])
    ends = [0, 1, 2, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 7, 31, 32, 33, 255]
    return [value_of(kind, bits_of(kind, v)) for v in ends + [rng.getrandbits(width) for _ in range(21)]]


def check(statement, result, operands, reference, choices=None):
    rng = random.Random(statement)
    columns = [values(kind, rng) for kind in operands]
    for column in columns:
        rng.shuffle(column)
    for index, chosen in (choices or {}).items():
        columns[index] = [rng.choice(chosen) for _ in range(32)]
    given = torch.zeros(32, 3, dtype=torch.int64)
    for index, (kind, column) in enumerate(zip(operands, columns, strict=True)):
        for lane, value in enumerate(column):
            bits = bits_of(kind, value)
            given[lane, index] = bits - (bits >> 63 << 64)
    emu = Emulator()
    out = emu.empty((32,), torch.int64, name="out")
    size = bytes_of(result)
    text = PROGRAM.format(statement=statement, bytes=size, width=f"b{8 * size}")
    emu.run_ptx(text, "program", 1, 32, (out, emu.tensor(given, name="in")))
    emu.assert_clean()
    for lane, word in enumerate(out.cpu().tolist()):
        arguments = [column[lane] for column in columns]
        got = value_of(result, word & (1 << 8 * size) - 1)
        expected = value_of(result, bits_of(result, reference(*arguments)))
        same = got == expected or (got != got and expected != expected)
        assert same, f"{statement}: {arguments} gave {got}, expected {expected}"


def clamp(value, low, high):
    return max(low, min(high, value))


def bit_field(signed, width):
    def extract(a, position, length):
        position, length = position & 255, length & 255
        bits = a & (1 << width) - 1
        sign = bits >> min(position + length - 1, width - 1) & 1 if signed and length else 0
        field = [bits >> (position + i) & 1 if position + i < width else sign for i in range(min(length, width))]
        return sum(bit << i for i, bit in enumerate(field + [sign] * (width - len(field))))

    return extract


def insert(a, b, position, length):
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def permute(a, b, selector):
    source = (a | b << 32).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return result


def divide(a, b):
    """Towards zero."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = [
    ("add.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), lambda a, b: a + b),
    ("sub.u64 %d8, %a8, %b8", "u64", ("u64", "u64"), lambda a, b: a - b),
    ("add.s16 %d2, %a2, %b2", "s16", ("s16", "s16"), lambda a, b: a + b),
    ("mul.lo.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), lambda a, b: a * b),
    ("mul.lo.s64 %d8, %a8, %b8", "s64", ("s64", "s64"), lambda a, b: a * b),
    ("mul.hi.u32 %d4, %a4, %b4", "u32", ("u32", "u32"), lambda a, b: a * b >> 32),
    ("mul.hi.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), lambda a, b: a * b >> 32),
    ("mul.hi.u64 %d8, %a8, %b8", "u64", ("u64", "u64"), lambda a, b: a * b >> 64),
    ("mul.wide.s32 %d8, %a4, %b4", "s64", ("s32", "s32"), lambda a, b: a * b),
    ("mul.wide.u16 %d4, %a2, %b2", "u32", ("u16", "u16"), lambda a, b: a * b),
    ("mad.wide.u32 %d8, %a4, %b4, %c8", "u64", ("u32", "u32", "u64"), lambda a, b, c: a * b + c),
    ("mad.lo.s32 %d4, %a4, %b4, %c4", "s32", ("s32", "s32", "s32"), lambda a, b, c: a * b + c),
    ("mul24.lo.u32 %d4, %a4, %b4", "u32", ("u32", "u32"), lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("div.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), divide),
    ("rem.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), lambda a, b: a - divide(a, b) * b if b else a),
    ("div.u64 %d8, %a8, %b8", "u64", ("u64", "u64"), lambda a, b: a // b if b else -1),
    ("min.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), min),
    ("max.u32 %d4, %a4, %b4", "u32", ("u32", "u32"), max),
    ("max.relu.s32 %d4, %a4, %b4", "s32", ("s32", "s32"), lambda a, b: max(a, b, 0)),
    ("abs.s32 %d4, %a4", "s32", ("s32",), abs),
    ("neg.s64 %d8, %a8", "s64", ("s64",), lambda a: -a),
    ("not.b32 %d4, %a4", "u32", ("u32",), lambda a: ~a),
    ("xor.b64 %d8, %a8, %b8", "u64", ("u64", "u64"), lambda a, b: a ^ b),
    ("shl.b32 %d4, %a4, %b4", "u32", ("u32", "u32"), lambda a, b: a << min(b, 32)),
    ("shr.s32 %d4, %a4, %b4", "s32", ("s32", "u32"), lambda a, b: a >> min(b, 32)),
    ("shr.u64 %d8, %a8, %b4", "u64", ("u64", "u32"), lambda a, b: a >> min(b, 64)),
    ("shf.l.wrap.b32 %d4, %a4, %b4, %c4", "u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.clamp.b32 %d4, %a4, %b4, %c4", "u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32 %d4, %a4, %b4, %c4", "u32", ("u32",) * 3, bit_field(False, 32)),
    ("bfe.s32 %d4, %a4, %b4, %c4", "u32", ("s32", "u32", "u32"), bit_field(True, 32)),
    ("bfe.s64 %d8, %a8, %b4, %c4", "u64", ("s64", "u32", "u32"), bit_field(True, 64)),
    ("prmt.b32 %d4, %a4, %b4, %c4", "u32", ("u32",) * 3, permute),
    ("popc.b64 %d4, %a8", "u32", ("u64",), lambda a: a.bit_count()),
    ("clz.b32 %d4, %a4", "u32", ("u32",), lambda a: 32 - a.bit_length()),
    ("brev.b32 %d4, %a4", "u32", ("u32",), lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 %d4, %a4", "u32", ("u32",), lambda a: a.bit_length() - 1),
    ("bfind.s32 %d4, %a4", "u32", ("s32",), lambda a: (a if a >= 0 else ~a).bit_length() - 1),
    ("bfind.shiftamt.u32 %d4, %a4", "u32", ("u32",), lambda a: 32 - a.bit_length() if a else -1),
    ("lop3.b32 %d4, %a4, %b4, %c4, 0xca", "u32", ("u32",) * 3, lambda a, b, c: (a & b) | (~a & c)),
    ("lop3.b32 %d4, %a4, %b4, %c4, 0x96", "u32", ("u32",) * 3, lambda a, b, c: a ^ b ^ c),
    ("cvt.s64.s32 %d8, %a4", "s64", ("s32",), lambda a: a),
    ("cvt.u64.u32 %d8, %a4", "u64", ("u32",), lambda a: a),
    ("cvt.u32.u16 %d4, %a2", "u32", ("u16",), lambda a: a),
    ("cvt.s32.s16 %d4, %a2", "s32", ("s16",), lambda a: a),
    ("cvt.s32.s8 %d4, %a4", "s32", ("s32",), lambda a: value_of("s8", a & 0xFF)),
    ("cvt.sat.s8.s32 %d4, %a4", "s32", ("s32",), lambda a: clamp(a, -128, 127)),
    ("cvt.u16.u64 %d2, %a8", "u16", ("u64",), lambda a: a),
]


@pytest.mark.parametrize(("statement", "result", "operands", "reference"), INTEGER, ids=lambda v: str(v).split()[0])
def test_integers(statement, result, operands, reference):
    check(statement, result, operands, reference)


def test_insertion_of_bits():
    small = [*range(40), 255, 256]
    check("bfi.b32 %d4, %a4, %b4, %c4, 7", "u32", ("u32",) * 3, lambda a, b, c: insert(a, b, c, 7), choices={2: small})


def test_small_fields():
    small = list(range(70))
    for kind in "us":
        check(
            f"bfe.{kind}32 %d4, %a4, %b4, %c4",
            "u32",
            (f"{kind}32", "u32", "u32"),
            bit_field(kind == "s", 32),
            choices={1: small, 2: small},
        )


def maximum(a, b):
    return b if a != a else a if b != b else max(a, b)


def round_even(value, low, high):
    if value != value:
        return 0
    return high if value == math.inf else low if value == -math.inf else clamp(round(value), low, high)


def towards(value, low, high):
    return (
        0
        if value != value
        else high
        if value == math.inf
        else low
        if value == -math.inf
        else clamp(int(value), low, high)
    )


def quiet(function):
    """NaN where Python raises."""

    def safe(*arguments):
        try:
            return function(*arguments)
        except (ValueError, OverflowError, ZeroDivisionError):
            return float("nan")

    return safe


def float32(value):
    """To the nearest float32, beyond the largest to infinity."""
    return torch.tensor(value, dtype=torch.float64).float().item()


FLOAT = [
    ("add.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: float32(a + b)),
    ("sub.rn.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: float32(a - b)),
    ("mul.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: float32(a * b)),
    ("fma.rn.f32 %d4, %a4, %b4, %c4", "f32", ("f32",) * 3, lambda a, b, c: float32(a * b + c)),
    ("max.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), maximum),
    ("max.NaN.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: math.nan if a != a or b != b else max(a, b)),
    ("min.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: -maximum(-a, -b)),
    ("abs.f32 %d4, %a4", "f32", ("f32",), abs),
    ("neg.f32 %d4, %a4", "f32", ("f32",), lambda a: -a),
    ("copysign.f32 %d4, %a4, %b4", "f32", ("f32", "f32"), lambda a, b: math.copysign(b, a)),
    ("ex2.approx.ftz.f32 %d4, %a4", "f32", ("f32",), quiet(lambda a: math.inf if a > 2000 else float32(2.0**a))),
    ("sqrt.rn.f32 %d4, %a4", "f32", ("f32",), quiet(lambda a: float32(math.sqrt(a)))),
    ("add.rn.f64 %d8, %a8, %b8", "f64", ("f64", "f64"), lambda a, b: a + b),
    ("add.f16 %d2, %a2, %b2", "f16", ("f16", "f16"), lambda a, b: a + b),
    ("mul.bf16 %d2, %a2, %b2", "bf16", ("bf16", "bf16"), lambda a, b: a * b),
    ("fma.rn.bf16 %d2, %a2, %b2, %c2", "bf16", ("bf16",) * 3, lambda a, b, c: a * b + c),
    ("max.f16 %d2, %a2, %b2", "f16", ("f16", "f16"), maximum),
    ("cvt.rn.f16.f32 %d2, %a4", "f16", ("f32",), lambda a: a),
    ("cvt.rn.bf16.f32 %d2, %a4", "bf16", ("f32",), lambda a: a),
    ("cvt.f32.bf16 %d4, %a2", "f32", ("bf16",), lambda a: a),
    ("cvt.f32.f16 %d4, %a2", "f32", ("f16",), lambda a: a),
    ("cvt.rn.f32.f64 %d4, %a8", "f32", ("f64",), float32),
    ("cvt.f64.f32 %d8, %a4", "f64", ("f32",), lambda a: a),
    ("cvt.rn.f32.s32 %d4, %a4", "f32", ("s32",), lambda a: float32(float(a))),
    (
        "cvt.rn.f32.u64 %d4, %a8",
        "f32",
        ("u64",),
        lambda a: torch.tensor(a >> 1).float().item() * 2 if a >> 63 else float(torch.tensor(a).float()),
    ),
    ("cvt.rzi.s32.f32 %d4, %a4", "s32", ("f32",), lambda a: towards(a, -(2**31), 2**31 - 1)),
    ("cvt.rni.u32.f32 %d4, %a4", "u32", ("f32",), lambda a: round_even(a, 0, 2**32 - 1)),
    ("cvt.rmi.f32.f32 %d4, %a4", "f32", ("f32",), quiet(lambda a: float(math.floor(a)) if math.isfinite(a) else a)),
    ("cvt.sat.f32.f32 %d4, %a4", "f32", ("f32",), lambda a: 0.0 if a != a else clamp(a, 0.0, 1.0)),
]


@pytest.mark.parametrize(("statement", "result", "operands", "reference"), FLOAT, ids=lambda v: str(v).split()[0])
def test_floats(statement, result, operands, reference):
    check(statement, result, operands, reference)


def test_packed_halves():
    for name, kind in (("bf16x2", "bf16"), ("f16x2", "f16")):

        def both(a, b, kind=kind):
            return bits_of(kind, a) << 16 | bits_of(kind, b)

        check(
            f"cvt.rn.{name}.f32 %d4, %a4, %b4",
            "u32",
            ("f32", "f32"),
            both,
            choices={0: [1.0, -2.7, 3e-5], 1: [0.1, 7.7]},
        )
        check(
            f"add.{name} %d4, %a4, %b4",
            "u32",
            ("u32", "u32"),
            lambda a, b, kind=kind: sum(
                bits_of(kind, value_of(kind, a >> s & 0xFFFF) + value_of(kind, b >> s & 0xFFFF)) << s for s in (0, 16)
            ),
            choices={0: [0x3C003C00, 0x40403F80], 1: [0x3F803C00, 0xBC004000]},
        )


def in_halves(function, kind):
    """The function of 32-bit numbers that applies it to both halves."""

    def apply(a, b):
        halves = (function(value_of(kind, a >> s & 0xFFFF), value_of(kind, b >> s & 0xFFFF)) for s in (0, 16))
        low, high = (bits_of(kind, half) for half in halves)
        return high << 16 | low

    return apply


@pytest.mark.parametrize("kind", ["s16", "u16"])
@pytest.mark.parametrize(("opcode", "function"), [("add", lambda a, b: a + b), ("min", min), ("max", max)])
def test_packed_integers(opcode, function, kind):
    check(f"{opcode}.{kind}x2 %d4, %a4, %b4", "u32", ("u32", "u32"), in_halves(function, kind))


@pytest.mark.parametrize(("mode", "reference"), [("rm", math.floor), ("rp", math.ceil), ("rz", math.trunc)])
@pytest.mark.parametrize("sign", [1, -1])
def test_directed_rounding(mode, reference, sign):
    # Beyond 2 ** 24 float32 has the multiples of 2, and the sums are odd.
    check(
        f"add.{mode}.f32 %d4, %a4, %b4",
        "f32",
        ("f32", "f32"),
        lambda a, b: 2.0 * reference((a + b) / 2),
        choices={0: [sign * 2.0**24], 1: [sign * 1.0, sign * 3.0]},
    )


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a == a and b == b and a != b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: a != a or b != b or a == b,
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "gtu": lambda a, b: not a <= b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons_with_nan(comparison):
    reference = COMPARISONS[comparison]
    statement = f"setp.{comparison}.f32 %p, %a4, %b4; selp.u32 %d4, 1, 0, %p"
    check(statement, "u32", ("f32", "f32"), reference, choices={1: [math.nan, 1.0, 0.0, math.inf]})


@pytest.mark.parametrize("operation", ["add.f32", "sub.f32", "mul.f32", "fma.rn.f32"])
def test_nan_has_one_pattern_of_bits(operation):
    """Threads that write a NaN to the same place write equal values, whichever operands it came from."""
    third = ", %a4" if operation.startswith("fma") else ""
    choices = {0: [0x7FC00001, 0xFFC12345], 1: [0x3F800000, 0xFFC00000]}
    check(f"{operation} %d4, %a4, %b4{third}", "u32", ("u32", "u32"), lambda a, b: 0x7FFFFFFF, choices=choices)


@pytest.mark.parametrize("type", ["f16", "bf16"])
@pytest.mark.parametrize("comparison", ["lt", "neu"])
def test_comparisons_of_packed_numbers(comparison, type):
    """The first predicate belongs to the lower half."""
    reference = COMPARISONS[comparison]
    statement = (
        f"mov.b32 %d4, {{%a2, %b2}}; mov.b32 %e4, {{%b2, %b2}}; setp.{comparison}.{type}x2 %p|%q, %d4, %e4;"
        "selp.u32 %d4, 1, 0, %p; selp.u32 %e4, 2, 0, %q; or.b32 %d4, %d4, %e4"
    )
    choices = {1: [math.nan, 1.0, 0.0, math.inf]}
    check(statement, "u32", (type, type), lambda a, b: reference(a, b) | reference(b, b) << 1, choices=choices)


@pytest.mark.parametrize(
    ("operation", "combine"), [("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)]
)
def test_comparisons_with_a_second_predicate(operation, combine):
    statement = (
        f"setp.lt.s32 %q, %b4, 0; setp.gt.{operation}.s32 %p|%q, %a4, %b4, !%q; selp.u32 %d4, 1, 0, %p;"
        "selp.u32 %e4, 2, 0, %q; or.b32 %d4, %d4, %e4"
    )
    check(
        statement,
        "u32",
        ("s32", "s32"),
        lambda a, b: combine(a > b, b >= 0) | combine(not a > b, b >= 0) << 1,
    )
