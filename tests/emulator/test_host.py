"""The host side of the emulator: memory, the strict CUDA runtime, records of launches; qk_norm_rotary as a whole."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_qk_norm_rotary as operation
import torch
from numerics import nan_filled

import emulator
from andromeda.ops import _select
from andromeda.ops.attention import attention
from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from emulator import DEVICES, Device, EmulatedExtension, Emulator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry fill(.param .u64 fill_0, .param .u32 fill_1, .param .f32 fill_2, .param .align 4 .b8 fill_3[8])
{
  .reg .b64 %rd<4>;
  .reg .b32 %r<4>;
  .reg .f32 %f<4>;
  .reg .pred %p<2>;
  ld.param.u64 %rd1, [fill_0];
  ld.param.u32 %r1, [fill_1];
  ld.param.f32 %f1, [fill_2];
  ld.param.f32 %f2, [fill_3+4];
  mov.u32 %r2, %tid.x;
  setp.ge.u32 %p1, %r2, %r1;
  @%p1 bra done;
  cvta.to.global.u64 %rd2, %rd1;
  mul.wide.u32 %rd3, %r2, 4;
  add.s64 %rd2, %rd2, %rd3;
  add.f32 %f3, %f1, %f2;
  st.global.f32 [%rd2], %f3;
done:
  ret;
}
"""

BANKS_PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry banks(.param .u32 banks_0)
{
  .shared .align 128 .b8 tile[8192];
  .reg .b16 %h<2>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<2>;
  .reg .pred %p<2>;
  ld.param.u32 %r7, [banks_0];
  mov.u32 %r8, %tid.x;
  setp.lt.u32 %p1, %r8, 8;
  mov.u32 %r1, tile;
  mad.lo.u32 %r1, %r8, %r7, %r1;
  mov.b32 %r2, 0;
  mov.b32 %r6, 0;
  mov.b16 %h1, 0;
  mov.b64 %rd1, 0;
  INSTRUCTION
  ret;
}
"""


@pytest.fixture
def emu():
    return Emulator()


@pytest.fixture
def subject(emu):
    """launch(**changes) runs the subject's kernel on 300 values and returns the error of the runtime."""
    source = emu.tensor(torch.arange(300.0), name="in")
    out = emu.empty((300,), torch.float32, name="out")

    def launch(**changes):
        arguments = {"out": out.data_ptr(), "input": source.data_ptr(), "count": 300, "grid": (2,), "factor": 2.0}
        with emu:
            return emu._host.subject.launch(**arguments | changes)

    launch.out, launch.source = out, source
    return launch


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
def test_a_copy_keeps_values_strides_and_alignment(emu, dtype):
    storage = torch.arange(2 * 20 * 5 * 77).to(dtype).reshape(2, 20, 5, 77)
    for view in (storage, storage[:, 2:19, 1:4, 5:69], storage.transpose(1, 2), storage[:1].expand(3, -1, -1, -1)):
        copy = emu.tensor(view, name="x")
        assert copy.shape == view.shape and copy.stride() == view.stride() and copy.dtype == dtype
        assert copy.data_ptr() % 256 == view.storage_offset() * dtype.itemsize % 256
        assert torch.equal(copy.cpu(), view) and copy.cpu().stride() == view.stride()
        assert not copy.is_cpu and copy.is_cuda and copy.get_device() == 0 and str(copy.device) == "cuda:0"


def test_new_memory_is_nan(emu):
    for dtype in DTYPES:
        assert emu.empty((3, 5), dtype, name="x").cpu().isnan().all()
    assert (emu.empty((3,), torch.int32, name="x").cpu() == -1).all()
    assert emu.empty((2, 3), torch.float32, name="x", strides=(1, 2)).stride() == (1, 2)
    assert emu.empty((0, 3), torch.float32, name="x").data_ptr() == 0


def test_sparse_memory_takes_room_where_it_is_touched(emu):
    far = emu.sparse((3, 2**33), torch.bfloat16, name="far")
    far.memory[2, -1] = 7
    assert far.memory[2, -1] == 7 and far.memory[1, 12345] == 0
    assert far.data_ptr() % 256 == 0


def test_memory_lives_as_long_as_a_tensor_that_shows_it(emu):
    x = emu.tensor(torch.arange(4.0), name="x")
    address, shown = x.data_ptr(), x.memory
    del x
    assert emu._host.subject.pointer_attributes(address) == (True, 0)
    del shown
    assert emu._host.subject.pointer_attributes(address) == (False, -2)


# ---- the runtime ----------------------------------------------------------------------------------------------------


def test_a_launch_is_recorded(emu, subject):
    assert subject(grid=(2, 3, 4), block=(64, 2, 1), shared_bytes=512, stream=0x1234) == "cudaSuccess"
    (launch,) = emu.launches
    assert launch.kernel.startswith("emulator::scale_subject_kernel(float*, float const*, int, float, int)")
    assert launch.grid == (2, 3, 4) and launch.block == (64, 2, 1)
    assert launch.shared_bytes == 512 and launch.stream == 0x1234 and launch.error == "cudaSuccess"


@pytest.mark.parametrize("shared_bytes", [0, 2048], ids=["static", "dynamic"])
@pytest.mark.parametrize("cluster", [0, 1], ids=["brackets", "launch_kernel_ex"])
def test_a_kernel_runs(emu, subject, shared_bytes, cluster):
    assert subject(shared_bytes=shared_bytes, cluster=cluster) == "cudaSuccess"
    emu.assert_clean()
    assert torch.equal(subject.out.cpu(), 2 * subject.source.cpu())
    assert emu.launches[0].counters.barriers > 0


@pytest.mark.parametrize(
    ("instruction", "stride", "clocks"),
    [
        ("st.shared.b32 [%r1], %r2;", 4, 1),
        ("st.shared.b32 [%r1], %r2;", 0, 1),  # one word for all
        ("st.shared.b32 [%r1], %r2;", 8, 2),
        ("st.shared.b32 [%r1], %r2;", 128, 32),
        ("st.shared.b32 [%r1], %r2;", 132, 1),
        ("st.shared.b16 [%r1], %h1;", 2, 1),
        ("st.shared.v2.b32 [%r1], {%r2, %r2};", 8, 2),
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", 16, 4),
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", 128, 32),
        ("@%p1 ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", 16, 1),  # eight lanes
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];", 16, 4),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];", 128, 32),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];", 144, 4),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16, %r6; cp.async.wait_all;", 16, 4),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16, %r6; cp.async.wait_all;", 32, 8),
    ],
)
def test_bank_conflicts_are_counted(instruction, stride, clocks):
    emu = Emulator(check=False)  # reads memory that was never written
    emu.run_ptx(BANKS_PTX.replace("INSTRUCTION", instruction), "banks", 1, 32, (stride,))
    assert emu.launches[0].counters.shared_clocks == clocks


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"grid": (0,)}, "cudaErrorInvalidConfiguration: emulated: a grid of 0 x 1 x 1 blocks"),
        ({"grid": (1, 65536)}, "cudaErrorInvalidConfiguration: emulated: a grid of 1 x 65536 x 1 blocks"),
        ({"grid": (1, 1, 65536)}, "cudaErrorInvalidConfiguration: emulated: a grid of 1 x 1 x 65536 blocks"),
        ({"block": (0,)}, "cudaErrorInvalidConfiguration: emulated: blocks of 0 x 1 x 1 threads"),
        ({"block": (1025,)}, "cudaErrorInvalidConfiguration: emulated: blocks of 1025 x 1 x 1 threads"),
        ({"block": (1, 1, 65)}, "cudaErrorInvalidConfiguration: emulated: blocks of 1 x 1 x 65 threads"),
        ({"block": (257,)}, "cudaErrorInvalidValue: emulated: 257 threads, __launch_bounds__ promised at most 256"),
        ({"shared_bytes": 48 * 1024}, "cudaErrorInvalidValue: emulated: 49152 bytes of dynamic shared memory"),
        (
            {"allowed_shared_bytes": 50_000, "shared_bytes": 50_001},
            "cudaErrorInvalidValue: emulated: 50001 bytes of dynamic shared memory",
        ),
        ({"allowed_shared_bytes": 163 * 1024}, "cudaErrorInvalidValue: emulated: 166912 bytes of dynamic shared"),
        ({"cluster": 2}, "cudaErrorNotSupported: emulated: clusters of 2 x 1 x 1 blocks, which need compute"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_runtime_refuses(emu, subject, changes, error):
    assert subject(allowed_shared_bytes=0) == "cudaSuccess"
    assert subject(**changes).startswith(error)
    assert all(launch.error == error.partition(":")[0] for launch in emu.launches[1:])
    assert subject() == "cudaSuccess"  # an error is returned once


def test_clusters_are_launched(emu, subject):
    emu.settings.device = "H200"
    assert subject(grid=(4,), cluster=2) == "cudaSuccess"
    emu.assert_clean()
    assert emu.launches[0].cluster == (2, 1, 1)
    assert torch.equal(subject.out.cpu(), 2 * subject.source.cpu())
    assert subject(grid=(3,), cluster=2).startswith("cudaErrorInvalidConfiguration: emulated: clusters of 2 x 1 x 1")
    assert subject(grid=(16,), cluster=16).startswith("cudaErrorInvalidClusterSize: emulated: clusters of 16 x 1 x 1")
    assert emu.launches[-1].error == "cudaErrorInvalidClusterSize"
    assert subject(grid=(16,), cluster=16, large_cluster=True) == "cudaSuccess"
    with emu:
        assert emu._host.subject.clusters(4) == 132 * 8 // 4  # 2048 threads of a multiprocessor, 256 of a block
        with pytest.raises(RuntimeError, match="cudaErrorInvalidClusterSize"):
            emu._host.subject.clusters(0)


def test_kernels_that_start_early(emu, subject):
    assert subject(cluster=1, programmatic=True).startswith("cudaErrorNotSupported: emulated: programmatic stream")
    emu.reports.clear()
    emu.settings.device = "H200"
    assert subject(cluster=1, programmatic=True) == "cudaSuccess"
    assert emu.launches[-1].programmatic and emu.launches[0].error == "cudaErrorNotSupported"
    assert {report.kind for report in emu.reports} == {"grid-dependency"}


def test_an_error_is_given_once(emu, subject):
    with emu:
        assert subject(allowed_shared_bytes=2**20).startswith("cudaErrorInvalidValue")
        given = emu._host.subject.last_errors()
    assert given == ["cudaErrorInvalidValue", "cudaErrorInvalidValue", "cudaSuccess"]
    emu.assert_clean()


def test_an_error_that_is_left_to_the_next_call_is_reported(emu, subject):
    subject(allowed_shared_bytes=2**20)
    with pytest.raises(AssertionError, match=r"\[error-left\] cudaErrorInvalidValue: .* 1048576 bytes"):
        emu.assert_clean()
    assert subject() == "cudaSuccess"


@pytest.mark.parametrize("name", DEVICES)
def test_pretended_devices(emu, subject, name):
    emu.settings.device = name
    device = DEVICES[name]
    largest = device.shared_per_block * 1024 - 1024  # the subject has 1024 static bytes
    assert subject(allowed_shared_bytes=largest, shared_bytes=largest) == "cudaSuccess"
    assert subject(allowed_shared_bytes=largest + 1).startswith("cudaErrorInvalidValue")
    with emu:
        ask = emu._host.subject.device_attribute
        # cudaDevAttrComputeCapabilityMajor, ...Minor, MultiProcessorCount, MaxSharedMemoryPerBlockOptin
        assert [ask(number) for number in (75, 76, 16)] == [device.major, device.minor, device.multiprocessors]
        assert ask(97) == device.shared_per_block * 1024
        assert emu._host.subject.function_attributes() == (1024, 256, 10 * device.major + device.minor)
        with pytest.raises(RuntimeError, match="the emulator does not know device attribute 9999"):
            ask(9999)


def test_occupancy(emu):
    def blocks(device, threads, shared_bytes):
        emu.settings.device = device
        with emu:
            return emu._host.subject.blocks_per_multiprocessor(threads, shared_bytes)

    assert blocks("A100", 256, 0) == 8 and blocks("RTX 3090", 256, 0) == 6
    assert blocks("A100", 32, 0) == 32 and blocks("L4", 32, 0) == 24
    assert blocks("A100", 128, 38 * 1024) == 4  # 164 KiB / (38 + 1 static + 1 reserved)


def test_no_kernel_for_the_device(emu, subject):
    emu.settings.device = Device(7, 5, 40, 64, 64, 1024, 16)
    assert subject().startswith(
        "cudaErrorNoKernelImageForDevice: emulated: no PTX of _ZN8emulator20scale_subject_kernel"
    )
    assert emu.launches[-1].error == "cudaErrorNoKernelImageForDevice"


def test_a_pointer_of_another_device_is_reported(emu, subject):
    far = emu.tensor(torch.arange(300.0), name="far", device_index=1)
    assert emu._host.subject.pointer_attributes(far.data_ptr()) == (True, 1)
    assert subject(input=far.data_ptr()) == "cudaSuccess"
    with pytest.raises(AssertionError, match=r'"far" is on device 1, the kernel was launched on device 0'):
        emu.assert_clean()
    emu.settings.current_device = 1
    emu.reports.clear()
    subject(input=far.data_ptr())
    assert [report.kind for report in emu.reports] == ["device"] and '"out" is on device 0' in emu.reports[0].text


# ---- the first use of a device --------------------------------------------------------------------------------------


def test_the_driver_runs_the_runtimes_of_its_major_version(emu, subject):
    built = emu._host.runtime_version
    for version in (built, built // 1000 * 1000, built + 1000):
        emu.settings.driver_version = version
        assert subject() == "cudaSuccess"
    for version in (built // 1000 * 1000 - 10, 0):
        emu.settings.driver_version = version
        assert subject().startswith(
            f"cudaErrorInsufficientDriver: emulated: the driver runs CUDA {version}, the runtime"
        )
        assert emu.launches[-1].error == "cudaErrorInsufficientDriver"


def test_a_call_fails_as_told(emu, subject):
    emu.settings.failures = {"cudaLaunchKernel": "cudaErrorDevicesUnavailable"}
    assert subject() == "cudaErrorDevicesUnavailable: emulated: cudaLaunchKernel is to fail"
    emu.settings.failures = {"cudaLaunchKernel": "cudaErrorOfNobody"}
    with pytest.raises(ValueError, match="the emulator does not know the error cudaErrorOfNobody"):
        subject()


def test_versions_touch_no_device(emu):
    emu.settings.driver_version = 12040
    emu.settings.failures = {"cudaSetDevice": "cudaErrorNoDevice"}
    with emu:
        versions = emu.extension.cuda_versions()
        assert emu._host.contexts() == set()
    built = emu._host.runtime_version
    assert versions == {"runtime": f"{built // 1000}.{built % 1000 // 10}", "driver": "12.4"}
    emu.settings.driver_version = 0
    with emu:
        assert emu.extension.cuda_versions()["driver"] is None
    emu.assert_clean()


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(
    "failures", [{}, {"cudaFuncGetAttributes": "cudaErrorMemoryAllocation"}], ids=["works", "fails"]
)
def test_the_status_of_a_device_leaves_no_trace(emu, current, failures):
    """No launch, no error for the next call; the current device stays, and no other device is initialised."""
    emu.settings.current_device, emu.settings.failures, emu.settings.capture = current, failures, 1
    with emu:
        status = emu.extension.cuda_status(1)
        assert emu._host.contexts() == {1}
        assert emu._host.subject.current_device() == current
        assert emu._host.subject.last_errors() == ["cudaSuccess"] * 3
    emu.assert_clean()
    assert emu.launches == emu.calls == []
    assert (status["kernel_error"] or "").startswith("cudaErrorMemoryAllocation" if failures else "")
    assert status["device_error"] is None and status["lasting"] == (not failures)


def test_the_status_of_a_device_that_is_not_there(emu):
    with emu:
        assert emu.extension.cuda_status(2)["device_error"].startswith("cudaErrorInvalidDevice")
    emu.assert_clean()


@pytest.fixture
def first_use(emulated, monkeypatch):
    """Operations on CPU tensors query the simulated device 0, through the real `cuda_unavailable`."""
    monkeypatch.setattr(_select, "lasting_answers", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(_select, "cuda_unavailable", lambda device: cuda_unavailable(torch.device("cuda", 0)))
    return emulated


cuda_unavailable = _select.cuda_unavailable  # before a fixture replaces it
LASTING = [
    ("driver", "cudaErrorInsufficientDriver"),
    ("cudaSetDevice", "cudaErrorNoDevice"),
    ("cudaSetDevice", "cudaErrorSystemDriverMismatch"),
    ("cudaSetDevice", "cudaErrorCompatNotSupportedOnDevice"),
    ("cudaFuncGetAttributes", "cudaErrorNoKernelImageForDevice"),
    ("cudaFuncGetAttributes", "cudaErrorInvalidKernelImage"),
    ("cudaFuncGetAttributes", "cudaErrorUnsupportedPtxVersion"),
    ("cudaFuncGetAttributes", "cudaErrorInvalidPtx"),
    ("cudaFuncGetAttributes", "cudaErrorJitCompilerNotFound"),
    ("cudaFuncGetAttributes", "cudaErrorJitCompilationDisabled"),
]
PASSING = [
    ("cudaSetDevice", "cudaErrorInitializationError"),  # also of a forked child
    ("cudaSetDevice", "cudaErrorDevicesUnavailable"),
    ("cudaSetDevice", "cudaErrorSystemNotReady"),
    ("cudaSetDevice", "cudaErrorMemoryAllocation"),
    ("cudaFuncGetAttributes", "cudaErrorMemoryAllocation"),
]


@pytest.mark.parametrize(
    ("call", "error", "lasts"),
    [*((*case, True) for case in LASTING), *((*case, False) for case in PASSING)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_of_the_first_use_is_a_reason_and_a_fallback(first_use, call, error, lasts):
    q = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    expected = attention(q, q, q, backend="reference")
    first_use.settings.driver_version = 12040 if call == "driver" else None
    first_use.settings.failures = {} if call == "driver" else {call: error}

    assert torch.equal(attention(q, q, q), expected)
    reason = rf"cuda: {error}, emulated: .* \(built with CUDA \d+\.\d, the driver runs \d+\.\d\)"
    with pytest.raises(NotImplementedError, match=reason):
        attention(q, q, q, backend="cuda")
    with pytest.raises(NotImplementedError, match=reason):
        qk_norm_rotary(q, q, backend="cuda")
    assert first_use.launches == []

    first_use.settings.driver_version, first_use.settings.failures = None, {}
    attention(q, q, q)
    assert bool(first_use.launches) != lasts


def test_a_device_that_works_is_asked_once(first_use):
    q = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    attention(q, q, q)
    first_use.settings.failures = {"cudaSetDevice": "cudaErrorDevicesUnavailable"}
    attention(q, q, q)
    assert len(first_use.launches) == 2


# ---- graphs and memory ----------------------------------------------------------------------------------------------


def test_capture(emu, subject):
    runtime = emu._host.subject
    with emu:
        assert not runtime.is_capturing()
        assert runtime.synchronize() == runtime.malloc_and_free() == "cudaSuccess"
    assert emu.calls == ["cudaStreamSynchronize", "cudaMalloc", "cudaFree"]
    emu.settings.capture = 1
    with emu:
        assert runtime.is_capturing()
        unsupported = "cudaErrorStreamCaptureUnsupported: emulated: cudaStreamSynchronize during a capture"
        assert runtime.synchronize() == unsupported
        assert runtime.malloc_and_free().endswith("cudaMalloc during a capture")
    assert subject() == "cudaSuccess"


def test_a_thread_may_be_permitted_to_work_beside_captures(emu):
    """andromeda/ops/_persistent.py relies on it; the permission is this thread's."""
    runtime, extension = emu._host.subject, emu.extension
    with emu:
        assert extension.capture_id(0, 0) == 0
    emu.settings.capture = 5
    with emu:
        assert extension.capture_id(0, 0) == 5
        assert extension.permit_work_beside_captures(True) is False
        assert runtime.synchronize() == runtime.malloc_and_free() == "cudaSuccess"
        assert extension.permit_work_beside_captures(False) is True
        assert runtime.synchronize().endswith("during a capture")


def test_a_driver_that_is_too_old_forbids_no_memory(emu):
    emu.settings.driver_version, emu.settings.capture = 12040, 5
    with emu:
        assert emu.extension.permit_work_beside_captures(True) is True
        assert emu.extension.permit_work_beside_captures(False) is False


def test_a_launch_that_does_nothing(emu, subject):
    emu.settings.execute = False
    before = subject.out.cpu()
    assert subject() == "cudaSuccess"
    assert emu.launches == [] and torch.equal(subject.out.cpu().nan_to_num(), before.nan_to_num())


def test_memset_and_memcpy_keep_to_their_buffers(emu, subject):
    runtime, out, source = emu._host.subject, subject.out, subject.source
    with emu:
        assert runtime.memset(out.data_ptr(), 0, 1200) == "cudaSuccess"
        runtime.memcpy(out.data_ptr(), source.data_ptr(), 400)
    emu.assert_clean()
    assert torch.equal(out.cpu(), torch.cat((torch.arange(100.0), torch.zeros(200))))
    with emu:
        runtime.memset(out.data_ptr(), 255, 1201)
        runtime.memset(source.data_ptr(), 0, 4)
        runtime.memcpy(out.data_ptr(), source.data_ptr() + 4, 1200)
    assert [report.kind for report in emu.reports] == ["out-of-bounds", "read-only", "out-of-bounds"]
    assert out.cpu().isfinite().all() and source.cpu()[1] == 1


def test_tensor_maps_come_from_the_driver(emu):
    x = emu.empty((64, 32), torch.float32, name="x")
    encode = emu._host.subject.encode_tensor_map
    with emu:
        assert encode(x.data_ptr(), 32, 64) != 0
    assert emu.reports[0].kind == "tma" and "compute capability 9.0" in emu.reports[0].text
    emu.settings.device = "H200"
    with emu:
        assert encode(x.data_ptr(), 32, 64) == 0
        assert encode(x.data_ptr(), 31, 64) != 0  # rows that are no multiple of 16 bytes
    assert len(emu.reports) == 2


# ---- PTX of any origin ----------------------------------------------------------------------------------------------


def test_run_ptx(emu):
    out = emu.empty((40,), torch.float32, name="out")
    emu.run_ptx(KERNEL_PTX, "fill", 1, 64, (out, 33, 1.5, torch.tensor([0.0, 2.0]).numpy().tobytes()))
    emu.assert_clean()
    assert (out.cpu()[:33] == 3.5).all() and out.cpu()[33:].isnan().all()
    emu.run_ptx(KERNEL_PTX, "fill", (1, 1), (64, 1), (out, 41, 1.5, bytes(8)))
    with pytest.raises(AssertionError, match=r"\[out-of-bounds\] fill: "):
        emu.assert_clean()
    with pytest.raises(ValueError, match="no kernel full in this PTX, there is: fill"):
        emu.run_ptx(KERNEL_PTX, "full", 1, 64, ())
    with pytest.raises(ValueError, match="fill has 4 parameters, got 0 arguments"):
        emu.run_ptx(KERNEL_PTX, "fill", 1, 64, ())
    with pytest.raises(ValueError, match="an argument of 8 bytes, got 4"):
        emu.run_ptx(KERNEL_PTX, "fill", 1, 64, (out, 1, 1.0, bytes(4)))


def test_a_kernel_of_the_build_is_replaced(emu, subject):
    (text,) = (text for text in emu.ptx_texts() if "scale_subject_kernel" in text)
    assert text.count("bar.sync") == 1
    without_barrier = "\n".join(line for line in text.splitlines() if "bar.sync" not in line)
    entry = re.search(r"\.entry (\w*scale_subject_kernel\w*)", text).group(1)
    with emu.replaced(entry, without_barrier):
        subject()
    assert {report.kind for report in emu.reports} == {"race-raw"}
    emu.reports.clear()
    subject()
    emu.assert_clean()


# ---- without a compiler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_nvcc(monkeypatch, ci, outcome):
    monkeypatch.setattr(emulator, "unavailable", lambda: "emulator: no nvcc")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no nvcc"):
        Emulator()


def test_missing_programs_are_named(monkeypatch):
    monkeypatch.setenv("ANDROMEDA_CUDA", "0")
    assert "no nvcc" in emulator.build.unavailable.__wrapped__()
    monkeypatch.setenv("ANDROMEDA_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert "CUDACXX must name a CUDA compiler, got '/nowhere/nvcc'" in emulator.build.unavailable.__wrapped__()
    monkeypatch.setattr(emulator.build, "_tools", lambda: ("no-such-cmake", "no-such-ninja"))
    assert "not installed: no-such-cmake, no-such-ninja" in emulator.build.unavailable.__wrapped__()


def test_a_failed_build_shows_the_message_of_the_compiler(monkeypatch):
    announced = []
    monkeypatch.setattr(emulator.build, "announce", announced.append)
    lines = "print('[1/3] Building a'); print('[2/3] Building b'); print('error: y')"
    failure = emulator.build._run([sys.executable, "-c", f"{lines}; raise SystemExit(1)"])
    assert "failed:" in failure and failure.endswith("error: y\n") and len(announced) == 1
    assert emulator.build._run([sys.executable, "-c", "print('ninja: no work to do.')"]) is None
    assert len(announced) == 1


# ---- the binding of qk_norm_rotary on CPU tensors -------------------------------------------------------------------


def binding_call(**changes):
    q, k = torch.randn(2, 5, 3, 16), torch.randn(2, 7, 1, 16)
    nan = {"q_out": torch.full_like(q, math.nan), "k_out": torch.full_like(k, math.nan)}
    tables = dict.fromkeys(("q_scale", "k_scale", "q_table", "k_table"))
    return {"q": q, "k": k, **tables, **nan, "normalize": True, "num_threads": 1, "stream": 0} | changes


def test_results_are_copied_back(emu):
    call = binding_call()
    extension = EmulatedExtension(emu)
    assert extension.qk_norm_rotary_forward(**call) is None
    torch.testing.assert_close(call["q_out"], torch.nn.functional.normalize(call["q"], dim=-1))
    torch.testing.assert_close(call["k_out"], torch.nn.functional.normalize(call["k"], dim=-1))
    assert extension.build_info()["cuda_compiler"].startswith("nvcc")


def test_strided_results_leave_the_rest_alone(emu):
    storage = torch.full((2, 5, 4, 19), 7.0)
    call = binding_call(q_out=storage[:, :, :3, 1:17])
    EmulatedExtension(emu).qk_norm_rotary_forward(**call)
    torch.testing.assert_close(call["q_out"], torch.nn.functional.normalize(call["q"], dim=-1))
    assert (storage[:, :, 3] == 7).all() and (storage[..., 0] == 7).all() and (storage[..., 17:] == 7).all()


def test_the_rest_of_a_strided_result_is_watched(emu):
    """The function writes all elements of a tensor although it received only every second one."""
    target = torch.zeros(4, 2)[:, 0]
    copy = emu.tensor(target, name="out", writable=True)
    copy.memory[:] = 1
    emulator._copy_back(copy, target, "out")
    assert target.tolist() == [1, 1, 1, 1]
    copy._span()[1] = 1
    with pytest.raises(AssertionError, match="out was written between its elements"):
        emulator._copy_back(copy, target, "out")


def test_a_read_only_argument_is_read_only(emu, monkeypatch):
    monkeypatch.setattr(EmulatedExtension, "_WRITTEN_FORWARD", frozenset({"q_out"}))
    with pytest.raises(AssertionError, match=r"\[read-only\] .*k_out"):
        EmulatedExtension(emu).qk_norm_rotary_forward(**binding_call())


def test_an_error_names_kernel_shape_and_architectures(emu):
    emu.settings.device = Device(7, 5, 40, 64, 64, 1024, 16)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)^qk_norm_rotary_forward: cudaGetLastError\(\) returned cudaErrorNoKernelImageForDevice, emulated: "
        r"no PTX of .* for compute capability 7\.5, there is: 8\.0, for \d+ blocks of 128 threads and 0 bytes of "
        r"dynamic shared memory on device 0, of compute capability 7\.5 \(kernels are built for .*8\.0.*\)",
    ):
        EmulatedExtension(emu).qk_norm_rotary_forward(**binding_call())


def test_empty_tensors_launch_nothing(emu):
    q, k = torch.zeros(0, 5, 3, 16), torch.zeros(0, 7, 1, 16)
    EmulatedExtension(emu).qk_norm_rotary_forward(**binding_call(q=q, k=k, q_out=q.clone(), k_out=k.clone()))
    assert emu.launches == []


# ---- qk_norm_rotary from end to end, by its own tests ---------------------------------------------------------------


def tensors_for(case, dtype=torch.float32, seed=0):
    return case.tensors(dtype, seed=seed)


CASES = [case for case in operation.CASES if case.head_dim % 2 == 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=operation.name_of)
@pytest.mark.parametrize("case", CASES, ids=operation.name_of)
def test_qk_norm_rotary(emulated, case, dtype):
    with nan_filled():
        operation.test_forward("cuda", tensors_for, case, dtype)
        operation.test_backward("cuda", tensors_for, case, dtype)
    assert {launch.kernel.partition("<")[0].rpartition("::")[2] for launch in emulated.launches} == {
        "qk_norm_rotary_forward_kernel",
        "qk_norm_rotary_backward_kernel",
    }


@pytest.mark.parametrize(
    "emulated", [{"schedule": "reverse"}, {"schedule": "random", "seed": 7}], indirect=True, ids=str
)
def test_qk_norm_rotary_in_another_order(emulated):
    with nan_filled():
        operation.test_backward("cuda", tensors_for, operation.PLAIN, torch.bfloat16)


def sliced_tensors_for(case, dtype=torch.float32, seed=0):
    """The operands as slices of larger tensors of NaN, at an odd offset: their rows are not aligned."""
    tensors = case.tensors(dtype, seed=seed)
    for index in range(2):
        batch, seqlen, heads, head_dim = tensors[index].shape
        surrounding = torch.full((batch, seqlen + 3, heads + 2, head_dim + 13), math.nan, dtype=dtype)
        view = surrounding[:, 2:-1, 1:-1, 5:-8].copy_(tensors[index])
        tensors = (*tensors[:index], view, *tensors[index + 1 :])
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=operation.name_of)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("model", "cached", "head_dim_2")], ids=operation.name_of
)
def test_qk_norm_rotary_strided(emulated, case, dtype):
    with nan_filled():
        operation.test_forward("cuda", sliced_tensors_for, case, dtype)
        operation.test_backward("cuda", sliced_tensors_for, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=operation.name_of)
@pytest.mark.parametrize("case", operation.STEP_CASES, ids=operation.name_of)
def test_qk_norm_rotary_step(emulated, case, dtype):
    with nan_filled():
        operation.test_step("cuda", tensors_for, case, dtype)
        if case.name == "tokens":
            operation.test_step("cuda", sliced_tensors_for, case, dtype)


def law_name(value):
    return value.__name__.removeprefix("test_") if callable(value) else str(value)


LAWS = [
    (operation.test_norm_has_a_floor,),
    (operation.test_a_bad_number_stays_in_its_row, math.nan),
    (operation.test_a_bad_number_stays_in_its_row, math.inf),
    (operation.test_a_row_without_gradient_adds_nothing, True, math.nan),
    (operation.test_a_row_without_gradient_adds_nothing, True, -math.inf),
    (operation.test_a_row_without_gradient_adds_nothing, False, math.inf),
    (operation.test_multiplying_by_a_power_of_two_is_exact, torch.bfloat16, True),
    (operation.test_multiplying_by_a_power_of_two_is_exact, torch.float32, False),
    (operation.test_multiplied_queries_fit_float16,),
    (operation.test_strided_gradients,),
    (operation.test_scores_do_not_depend_on_the_first_position, torch.bfloat16),
    (operation.test_positive_factors_vanish_under_the_norm,),
    (operation.test_gradient_under_the_norm_is_orthogonal,),
    (operation.test_batch_entries_and_heads_are_independent,),
    (operation.test_no_new_queries,),
    (operation.test_two_runs_agree,),
    (operation.test_opcheck, True),
    (operation.test_opcheck, False),
    (operation.test_func_grad,),
    (operation.test_only_requested_tensors_get_a_gradient,),
    (operation.test_scales_may_have_the_dtype_of_the_model,),
]


@pytest.mark.parametrize(("law", "arguments"), [(law, rest) for law, *rest in LAWS], ids=law_name)
def test_laws_of_qk_norm_rotary(emulated, law, arguments):
    law("cuda", tensors_for, *arguments)


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16)], ids=str)
def test_qk_norm_rotary_of_nothing(emulated, shape):
    operation.test_empty("cuda", "cpu", shape)
    # Without tokens the gradients of the scales must still be written, as zeros. Without heads there are none.
    assert len(emulated.launches) == (0 if shape[2] == 0 else 1)


def test_two_threads_share_an_emulator(emulated):
    emulated.settings.check = False
    operation.test_two_callers_at_once("cuda", tensors_for)


@pytest.mark.parametrize("name", DEVICES)
def test_qk_norm_rotary_on_every_device(emulated, name):
    emulated.settings.device = name
    with nan_filled():
        operation.test_forward("cuda", tensors_for, operation.PLAIN, torch.bfloat16)


def test_stream_and_grid_of_an_operation(emulated, monkeypatch):
    monkeypatch.setattr(_select, "current_stream", lambda device: 0x1234)
    q, k = torch.randn(2, 17, 3, 64), torch.randn(2, 17, 1, 64)
    qk_norm_rotary(q, k, backend="cuda")
    (launch,) = emulated.launches
    assert launch.stream == 0x1234 and launch.block == (128, 1, 1) and launch.grid[0] > 1 and launch.shared_bytes == 0
    assert emulated.calls == []


@pytest.mark.parametrize("current", [0, 1])
def test_a_call_runs_on_the_device_of_its_tensors(emu, current):
    """Whichever device is the current one, and it stays that."""
    emu.settings.current_device = current
    for device_index in (0, 1):
        given = {
            name: emu.tensor(value, name=name, writable=name.endswith("out"), device_index=device_index)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in binding_call().items()
        }
        with emu:
            emu.extension.qk_norm_rotary_forward(**given)
            assert emu._host.subject.current_device() == current
        emu.assert_clean()
    assert len(emu.launches) == 2


def test_a_device_that_cannot_be_used_is_named(emu):
    emu.settings.failures = {"cudaSetDevice": "cudaErrorDevicesUnavailable"}
    far = {
        name: emu.tensor(value, name=name, device_index=1) if isinstance(value, torch.Tensor) else value
        for name, value in binding_call().items()
    }
    with emu, pytest.raises(RuntimeError, match=r"^device_guard: cudaSetDevice\(device\) returned cudaErrorDevicesUn"):
        emu.extension.qk_norm_rotary_forward(**far)
    assert emu.launches == []


def test_the_fixture_has_one_backend_besides_the_reference(emulated):
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    able = [name for name in _select.BACKENDS if not operation.unsupported(name, q, k)]
    assert able == ["cuda", "reference"]


# ---- time on the host -----------------------------------------------------------------------------------------------


def test_host_time_runs_every_call():
    """Every call of the command reaches its launch; the times are not tested here."""
    command = [sys.executable, "-m", "emulator.host_time", "--runs", "1", "--calls", "4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert result.returncode == 0, result.stderr
    assert {line.partition(",")[0] for line in result.stdout.splitlines()} >= {"attention", "qk_norm_rotary"}
    assert result.stdout.startswith("launch alone ")


def test_a_dtype_without_kernels_is_refused_with_a_remedy_that_exists(emulated):
    """The launcher itself refuses it: Python chooses another backend before."""
    q, k = torch.randn(1, 3, 2, 64), torch.randn(1, 3, 1, 64)
    given = {"q": q, "k": k, "v": k, "out": torch.empty_like(q), "softmax_lse": torch.empty(1, 2, 3)}
    constants = dict.fromkeys(("alibi_slopes", "logit_bound", "key_start", "partials", "semaphores"))
    options = {"causal": True, "softmax_scale": 1.0, "num_threads": 1, "stream": 0}
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16 on CUDA") as refusal:
        _select.extension.attention_forward(**given, **constants, **options)
    (remedy,) = re.findall(r'backend="(\w+)"', str(refusal.value))
    assert remedy in _select.BACKENDS
    attention(q, k, k, causal=True, backend=remedy)
