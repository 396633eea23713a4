"""sass_clocks.py on small listings, in the form that cuobjdump prints."""

import io

import pytest
import sass_clocks
from sass_clocks import Clocks, clocks_of, highest_register, parse, tile_loops


def listing(*lines):
    """A function whose instructions are 16 bytes apart; "name:" gives the next one a name for branches."""
    names, instructions = {}, []
    for line in lines:
        if line.endswith(":"):
            names[line[:-1]] = f"{16 * len(instructions):#x}"
        else:
            instructions.append(line)
    text = '\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    for i, line in enumerate(instructions):
        for name, address in names.items():
            line = line.replace(f"<{name}>", address)
        text += f"        /*{16 * i:04x}*/         {line} ;        /* 0x000000000000 */\n"
        text += "                                           /* 0x000fe20000000000 */\n"
    return text


def instructions(*lines):
    return parse(listing(*lines))["kernel"]


REGISTERS = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12], R24"
SHARED = "HGMMA.64x128x16.F32 R24, gdesc[UR12], R24, gsb0"
TRANSPOSED = "HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0x28000], R2"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (REGISTERS, Clocks(tensor=64, issue=1, shared=32)),
        (SHARED, Clocks(tensor=64, issue=1, shared=48)),
        (TRANSPOSED, Clocks(tensor=32, issue=1, shared=16)),
        ("MUFU.EX2 R4, R4", Clocks(issue=1, mufu=8)),
        ("@!P2 FADD.FTZ R4, -R4, R5", Clocks(issue=1)),
        ("LDS R4, [R5+0x10]", Clocks(issue=1, shared=4)),
        ("LDS.U16 R4, [R5]", Clocks(issue=1, shared=4)),
        ("LDS.64 R4, [R6]", Clocks(issue=1, shared=8)),
        ("STS.128 [R6], R8", Clocks(issue=1, shared=16)),
        ("LDSM.16.MT88.4 R4, [R6]", Clocks(issue=1, shared=16)),
        ("STSM.16.M88.2 [R6], R8", Clocks(issue=1, shared=8)),
        ("@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9+0x28020], RZ", Clocks(issue=1, shared=4)),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", Clocks(issue=1)),
        ("UTMALDG.4D [UR8], [UR22]", Clocks(issue=1)),
    ],
)
def test_clocks_of_an_instruction(line, expected):
    (instruction,) = instructions(line)
    assert clocks_of(instruction) == expected


def test_an_unknown_product_is_an_error():
    for opcode in ("HGMMA.64x64x8.F32.TF32", "QGMMA.64x64x32.F32.E4M3.E4M3"):
        (instruction,) = instructions(f"{opcode} R24, gdesc[UR4], R24")
        with pytest.raises(ValueError, match=f"{opcode} are not known"):
            clocks_of(instruction)


def test_a_loop_that_waits():
    """A wait that fails goes to another loop, at the end of the function: the usual iteration does not."""
    (loop,) = tile_loops(
        instructions(
            "MOV R1, R2",
            "tile:",
            WAIT,
            "@!P0 BRA <again>",
            "ready:",
            REGISTERS,
            "MUFU.EX2 R4, R4",
            "@P1 BRA <tile>",
            "EXIT",
            "again:",
            WAIT,
            "@P0 BRA <ready>",
            "BRA <again>",
            "stop:",
            "BRA <stop>",
        )
    )
    assert loop.address == 0x10
    assert loop.clocks == Clocks(tensor=64, issue=5, mufu=8, shared=32 + 4)


def test_a_wait_in_place_counts_once():
    (loop,) = tile_loops(instructions("tile:", "again:", WAIT, "@!P0 BRA <again>", REGISTERS, "@P1 BRA <tile>", "EXIT"))
    assert loop.clocks.issue == 4


def test_loops_over_items_are_not_loops_over_tiles():
    """Two loops over tiles, of which the second applies a mask, in a loop over items."""
    loops = tile_loops(
        instructions(
            "item:",
            "LDS R4, [R5]",
            "masked:",
            REGISTERS,
            "ISETP.GE.AND P3, PT, R4, R5, PT",
            "FSEL R4, R4, R5, P3",
            "@P1 BRA <masked>",
            "tile:",
            REGISTERS,
            "BRA.U UP0, <tile>",
            "@P2 BRA <item>",
            "EXIT",
        )
    )
    assert [(loop.address, loop.clocks.issue) for loop in loops] == [(0x50, 2), (0x10, 4)]


def test_the_path_with_the_products_is_the_iteration():
    """A branch may skip instructions, but no product; one that leaves the loop is not followed."""
    (loop,) = tile_loops(
        instructions(
            "tile:",
            "@P3 BRA <end>",
            "@P0 BRA <skip>",
            "FMUL R4, R4, R5",
            "FMUL R6, R6, R5",
            "skip:",
            "@P4 BRA <few>",
            REGISTERS,
            "FADD R4, R4, R5",
            "BRA <join>",
            "few:",
            "NOP",
            "join:",
            SHARED,
            "@P1 BRA <tile>",
            "end:",
            "EXIT",
        )
    )
    assert loop.clocks == Clocks(tensor=128, issue=8, shared=80)


def test_a_kernel_without_products_has_no_loop_over_tiles():
    assert tile_loops(instructions("loop:", "MUFU.EX2 R4, R4", "@P0 BRA <loop>", "@P1 EXIT", "EXIT")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (REGISTERS, 156),  # R24 ... R87 and R152 ... R155
        (SHARED, 88),
        ("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT", 120),
        ("LDS.128 R4, [R9]", 10),
        ("LDG.E.128 R4, desc[UR4][R8.64]", 10),
        ("STG.E.64 desc[UR4][R2.64], R8", 10),
        ("CS2R R88, SRZ", 90),
        ("IMAD.WIDE.U32 R2, R3, R4, R6", 8),
        ("IMAD.WIDE R2, R9, 0x4, R6", 10),
        ("FADD R4, R4, -R12", 13),
        ("UMOV UR12, URZ", 0),
    ],
)
def test_highest_register(line, expected):
    assert highest_register(instructions(line)) == expected


def test_command(capsys, monkeypatch):
    text = listing("tile:", SHARED, "@P1 BRA <tile>", "EXIT") + listing("EXIT").replace("kernel", "other")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    sass_clocks.main()
    assert capsys.readouterr().out == "kernel: 88 registers\n    0x0000: tensor 64, issue 2, mufu 0, shared 48\n"
