"""The emulated driver of Triton: what a launch of CPU tensors passes, checks and copies back."""

import pytest
import torch

from emulator import Device, Emulator, triton_driver

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

COLUMNS = 100


@triton.jit
def scale_kernel(out, x, addend, rows, columns, stride, factor, kBlock: tl.constexpr):
    """out = factor * x + addend, row by row; addend may be None."""
    row = tl.program_id(0)
    column = tl.arange(0, kBlock)
    inside = column < columns
    values = tl.load(x + row * stride + column, mask=inside, other=0.0) * factor
    if addend is not None:
        values += tl.load(addend + row * columns + column, mask=inside, other=0.0)
    tl.store(out + row * columns + column, values, mask=inside)


@triton.jit
def walk_kernel(first, second, table, count, choose, kBlock: tl.constexpr):
    """Stores through an address that a loop advances, and through one of two that a condition selects."""
    i = tl.arange(0, kBlock)
    target = first + i
    for _ in range(count):
        tl.store(target, tl.load(table + i))
        target += kBlock
    if choose > 0:
        tl.store(second + i, tl.load(table + i))


@triton.jit
def large_kernel(out, x, kBlock: tl.constexpr):
    """Needs shared memory for a product of kBlock x kBlock."""
    i = tl.arange(0, kBlock)
    tile = tl.load(x + i[:, None] * kBlock + i[None, :])
    tl.store(out + i[:, None] * kBlock + i[None, :], tl.dot(tile, tl.trans(tile)))


@pytest.fixture
def gpu():
    with triton_driver.active(Emulator()) as emulator:
        yield emulator


def scale(out, x, addend=None, factor=0.5, columns=COLUMNS):
    return scale_kernel[(x.shape[0],)](
        out, x, addend, x.shape[0], columns, x.stride(0), factor, kBlock=128, num_warps=2, enable_fp_fusion=True
    )


def test_a_launch_writes_its_result(gpu):
    x = torch.randn(3, COLUMNS)
    out = torch.full_like(x, torch.nan)
    scale(out, x)
    assert torch.equal(out, 0.5 * x)
    scale(out, x, out)  # one tensor, given twice, is one place in memory
    assert torch.equal(out, x)
    launch = gpu.launches[-1]
    assert launch.kernel == "scale_kernel" and launch.grid == (3, 1, 1) and launch.block == (64, 1, 1)
    assert len(gpu.launches) == 2 and launch.counters


@pytest.mark.parametrize(
    "offset, stride, variant", [(0, 112, (True, True)), (1, 112, (False, True)), (4, 101, (True, False))]
)
def test_the_jit_specialises_addresses_and_integers(gpu, offset, stride, variant):
    x = torch.randn(offset + 3 * stride)[offset:].as_strided((3, COLUMNS), (stride, 1))
    out = torch.empty(3, COLUMNS)
    program = scale(out, x)
    assert torch.equal(out, 0.5 * x)
    divisible = {path for path, attributes in program.src.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert ((1,) in divisible, (5,) in divisible) == variant


def test_integers_of_one_and_none_are_constants(gpu):
    x = torch.randn(1, 1)
    out = torch.empty(1, 1)
    program = scale(out, x, columns=1)
    assert torch.equal(out, 0.5 * x)
    constant = {name for name, kind in program.src.signature.items() if kind == "constexpr"}
    assert constant == {"addend", "rows", "columns", "stride", "kBlock"}


def test_kernels_are_compiled_once_for_each_device(gpu):
    scale_kernel.device_caches.clear()
    x, out = torch.randn(2, COLUMNS), torch.empty(2, COLUMNS)
    for device in ("A100", "H200", "A100"):
        gpu.settings.device = device
        targets = {scale(out, x).metadata.target.arch for _ in range(2)}
        assert targets == {90 if device == "H200" else 80}
    assert [len(caches[0]) for caches in scale_kernel.device_caches.values()] == [1, 1]


def test_memory_ends_with_the_tensor(gpu):
    x, out = torch.randn(2, COLUMNS), torch.empty(2, COLUMNS)
    with pytest.raises(AssertionError, match="past the end of x"):
        scale(out, x, columns=COLUMNS + 1)
    assert {report.kind for report in gpu.reports} == {"out-of-bounds"}


def test_gaps_may_not_be_written(gpu):
    x = torch.randn(2, COLUMNS + 1)[:, :COLUMNS]
    memory = torch.zeros(2, COLUMNS + 1)
    with pytest.raises(AssertionError, match="scale_kernel: out was written between its elements"):
        scale_kernel[(1,)](memory[:, :COLUMNS], x, None, 2, COLUMNS + 1, 0, 0.5, kBlock=128, enable_fp_fusion=True)


def test_a_written_argument_is_known_from_the_program(gpu):
    program = scale(torch.empty(1, 4), torch.randn(1, 4), columns=4)
    assert triton_driver.written_parameters(program.asm["ptx"], "scale_kernel")[1] == {0}
    first, second, table = torch.zeros(64), torch.zeros(16), torch.randn(16)
    program = walk_kernel[(1,)](first, second, table, 4, 7, kBlock=16, enable_fp_fusion=True)
    assert triton_driver.written_parameters(program.asm["ptx"], "walk_kernel")[1] == {0, 1}
    assert torch.equal(first.view(4, 16), table.expand(4, 16)) and torch.equal(second, table)


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1,
	.param .u32 k_param_2
)
.reqntid 32
{
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [k_param_1];
	.loc	1 98 20, function_name $L__info_string0, inlined_at 1 250 71 // comment; with a semicolon
	ld.param.b32 	%r1, [k_param_2];
	mad.wide.s32 	%rd2, %r1, 4, %rd1;
	ld.param.b64 	%rd3, [k_param_0];
	// begin inline asm
	@%p1 ld.global.b64 { %rd4 }, [ %rd3 + 0 ];
	// end inline asm
	.loc	1 99 20, function_name $L__info_string0, inlined_at 1 250 71
	@%p1 st.global.b64 [ %rd2 + 8 ], { %rd4 };
	st.shared.b64 	[%r1+4096], %rd4;
	ret;
}
"""


def test_written_arguments_are_read_from_any_spelling():
    assert triton_driver.written_parameters(PTX, "k") == (3, {1})


def test_shared_memory_is_limited_as_on_the_device(gpu):
    x = torch.randn(128, 128).half()
    out = torch.empty(128, 128)
    run = lambda: large_kernel[(1,)](out, x, kBlock=128, num_warps=8, enable_fp_fusion=True)  # noqa: E731
    run()
    torch.testing.assert_close(out, x.float() @ x.float().T, rtol=1e-5, atol=1e-3)
    gpu.settings.device = Device(8, 0, 10, 16, 16, 2048, 16)
    for _ in range(2):
        with pytest.raises(
            triton.runtime.errors.OutOfResources, match=r"shared memory, Required: .*, Hardware limit: 16384"
        ):
            run()
    assert len(gpu.launches) == 1


def test_empty_grids_are_not_launched_and_large_ones_refused(gpu):
    x, out = torch.randn(2, COLUMNS), torch.zeros(2, COLUMNS)
    arguments = (out, x, None, 2, COLUMNS, COLUMNS, 0.5)
    scale_kernel[(0,)](*arguments, kBlock=128, enable_fp_fusion=True)
    with pytest.raises(RuntimeError, match="invalid argument: a grid of 1 x 65536 x 1"):
        scale_kernel[(1, 65536)](*arguments, kBlock=128, enable_fp_fusion=True)
    assert gpu.launches == [] and not out.any()


def test_the_driver_before_is_back_afterwards():
    before = dict(vars(triton.runtime.driver))
    with triton_driver.active(Emulator()):
        assert isinstance(triton.runtime.driver.active, triton_driver.EmulatedDriver)
    assert vars(triton.runtime.driver) == before


def test_the_fixture_runs_the_backend_on_cpu_tensors(emulated_triton):
    from andromeda.ops import _select

    x = torch.randn(2, 3)
    assert _select.common_reasons("triton", (torch.float32,), x=x) == []
    assert _select.common_reasons("triton", (torch.bfloat16,), x=x) == ["dtype float32 (built for bfloat16)"]
    assert "tensors on cpu" in _select.common_reasons("cpu", (torch.float32,), x=x)
