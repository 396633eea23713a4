"""Direct calls of andromeda._C: reading of tensors, refusals before any access to memory, threads."""

import ast
import collections
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import andromeda
from andromeda import _C


def attention_call(batch=2, seqlen_q=3, seqlen_k=5, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32):
    """All arguments of a correct attention_forward."""
    q = torch.randn(batch, seqlen_q, num_heads, head_dim).to(dtype)
    k, v = torch.randn(2, batch, seqlen_k, num_kv_heads, head_dim).to(dtype)
    return {
        "q": q,
        "k": k,
        "v": v,
        "alibi_slopes": None,
        "logit_bound": None,
        "key_start": None,
        "out": torch.full_like(q, math.nan),
        "softmax_lse": torch.full((batch, num_heads, seqlen_q), math.nan),
        "causal": False,
        "softmax_scale": 0.25,
        "num_threads": 1,
        "partials": None,
        "semaphores": None,
        "stream": 0,
    }


def attention_backward_call(**shape):
    call = attention_call(**shape)
    _C.attention_forward(**call)
    gradients = {f"d{name}": torch.full_like(call[name], math.nan) for name in ("q", "k", "v")}
    return call | {"dout": torch.randn_like(call["out"])} | gradients


def rotary_call(batch=2, seqlen_q=3, seqlen_k=5, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8):
    """All arguments of a correct qk_norm_rotary_forward."""
    q, k = torch.randn(batch, seqlen_q, num_heads, head_dim), torch.randn(batch, seqlen_k, num_kv_heads, head_dim)
    return {
        "q": q,
        "k": k,
        "q_scale": torch.randn(num_heads, head_dim),
        "k_scale": torch.randn(num_kv_heads, head_dim),
        "q_table": torch.randn(seqlen_q, rotary_dim),
        "k_table": torch.randn(seqlen_k, rotary_dim),
        "q_out": torch.full_like(q, math.nan),
        "k_out": torch.full_like(k, math.nan),
        "normalize": True,
        "num_threads": 1,
        "stream": 0,
    }


def rotary_backward_call(num_partials=3, **shape):
    call = rotary_call(**shape)
    q, k = call["q"], call["k"]
    del call["q_out"], call["k_out"]
    return call | {
        "dq_out": torch.randn_like(q),
        "dk_out": torch.randn_like(k),
        "dq": torch.full_like(q, math.nan),
        "dk": torch.full_like(k, math.nan),
        "dq_scale_partial": torch.full((num_partials, *q.shape[2:]), math.nan),
        "dk_scale_partial": torch.full((num_partials, *k.shape[2:]), math.nan),
    }


def token_shift_call(batch=2, seqlen=3, dim=16, shift=1):
    """All arguments of a correct token_shift_norm_forward."""
    x, residual = torch.randn(2, batch, seqlen, dim)
    return {
        "x": x,
        "residual": residual,
        "residual_scale": torch.randn(dim),
        "gamma": torch.randn(dim),
        "history": torch.randn(batch, shift, dim),
        "key_start": torch.zeros(batch, seqlen, dtype=torch.int32),
        "y": torch.full_like(x, math.nan),
        "shifted": torch.full_like(x, math.nan),
        "alpha": 1.5,
        "shift": shift,
        "position": 0,
        "num_threads": 1,
        "stream": 0,
    }


def token_shift_backward_call(num_partials=3, **shape):
    call = token_shift_call(**shape)
    x, dim = call["x"], call["gamma"].shape
    del call["y"], call["shifted"], call["history"]
    return call | {
        "dy": torch.randn_like(x),
        "dshifted": torch.randn_like(x),
        "dx": torch.full_like(x, math.nan),
        "dresidual": torch.full_like(x, math.nan),
        "dresidual_scale_partial": torch.full((num_partials, *dim), math.nan),
        "dgamma_partial": torch.full((num_partials, *dim), math.nan),
    }


CALLS = {
    "attention_forward": (attention_call, ("out", "softmax_lse")),
    "attention_backward": (attention_backward_call, ("dq", "dk", "dv")),
    "qk_norm_rotary_forward": (rotary_call, ("q_out", "k_out")),
    "qk_norm_rotary_backward": (rotary_backward_call, ("dq", "dk", "dq_scale_partial", "dk_scale_partial")),
    "token_shift_norm_forward": (token_shift_call, ("y", "shifted")),
    "token_shift_norm_backward": (
        token_shift_backward_call,
        ("dx", "dresidual", "dresidual_scale_partial", "dgamma_partial"),
    ),
}
every_function = pytest.mark.parametrize("name", CALLS)


@every_function
def test_writes_all_of_its_outputs(name):
    make, outputs = CALLS[name]
    call = make()
    assert getattr(_C, name)(**call) is None
    for output in outputs:
        assert call[output].isfinite().all()


@pytest.mark.parametrize("name", [name for name in CALLS if "token_shift" not in name])
@pytest.mark.parametrize(
    "empty",
    [
        {"batch": 0},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
        {"seqlen_q": 0, "seqlen_k": 0},
        {"num_heads": 0},
        {"num_heads": 0, "num_kv_heads": 0},
        {"head_dim": 0, "rotary_dim": 0},
    ],
    ids=str,
)
def test_empty_tensors(name, empty):
    make, outputs = CALLS[name]
    if "rotary" not in name:
        empty = {key: size for key, size in empty.items() if key != "rotary_dim"}
    call = make(**empty)
    getattr(_C, name)(**call)
    for output in outputs:
        assert not call[output].isnan().any()


@pytest.mark.parametrize("name", [name for name in CALLS if "token_shift" in name])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen": 0}, {"shift": 0}], ids=str)
def test_empty_rows(name, empty):
    make, outputs = CALLS[name]
    call = make(**empty)
    getattr(_C, name)(**call)
    for output in outputs:
        assert not call[output].isnan().any()


@every_function
def test_arguments_have_names_and_an_order(name):
    """andromeda/ops passes them in the order of the stub, which is quicker: those without a default come first."""
    make, outputs = CALLS[name]
    call, function, declared = make(), getattr(_C, name), DECLARED[name].args
    required = [argument.arg for argument in declared.args[: len(declared.args) - len(declared.defaults)]]
    assert sorted(call) == sorted(required)
    by_position = call | {output: torch.full_like(call[output], math.nan) for output in outputs}
    function(**call)
    function(*map(by_position.get, required))
    for output in outputs:
        torch.testing.assert_close(by_position[output], call[output], rtol=0, atol=0)
    for argument in call:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(**{key: value for key, value in call.items() if key != argument})
    with pytest.raises(
        TypeError, match=r"incompatible function arguments(.|\n)*\((q: torch.Tensor, k|x: torch.Tensor, r)"
    ):
        function(**call, dropout=0.0)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (3, "<class 'int'>"),
        (None, "None"),
        ([[1.0]], "<class 'list'>"),
        (torch.zeros(2, 3, 4, 16).numpy(), "<class 'numpy.ndarray'>"),
    ],
    ids=["int", "none", "list", "numpy"],
)
def test_refuses_what_is_no_tensor(value, got):
    with pytest.raises(TypeError, match=f"expected a torch.Tensor, got {got}"):
        _C.attention_forward(**attention_call() | {"q": value})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"dtype float32, float16, bfloat16 or int32, got {dtype}"):
        _C.attention_forward(**attention_call() | {"v": torch.zeros(2, 5, 2, 16, dtype=dtype)})


def test_refuses_more_than_four_dimensions():
    with pytest.raises(TypeError, match=r"at most 4 dimensions, got torch.Size\(\[1, 1, 1, 1, 1\]\)"):
        _C.attention_forward(**attention_call() | {"k": torch.zeros(1, 1, 1, 1, 1)})


def test_refuses_tensors_without_memory():
    call = attention_call()
    with pytest.raises(TypeError, match="on a cpu or cuda device, got meta"):
        _C.attention_forward(**call | {"q": call["q"].to("meta")})
    freed = torch.zeros(2, 3, 4, 16)
    freed.untyped_storage().resize_(0)
    with pytest.raises((TypeError, RuntimeError), match=r"memory|storage"):
        _C.attention_forward(**call | {"q": freed})
    with pytest.raises(RuntimeError, match="storage"):
        _C.attention_forward(**call | {"q": call["q"].to_sparse()})


@every_function
def test_every_tensor_is_checked_for_shape_and_dtype(name):
    make, _ = CALLS[name]
    call = make()
    if "attention" in name:
        call |= {
            "alibi_slopes": torch.zeros(4),
            "logit_bound": torch.zeros(4),
            "key_start": torch.zeros(2, 3, dtype=torch.int32),
        }
    for argument, value in call.items():
        if not isinstance(value, torch.Tensor):
            continue
        longer = value.new_zeros(*value.shape[:-1], value.shape[-1] + 1)
        with pytest.raises(ValueError, match=rf"^{name}: .* must .*, got "):
            getattr(_C, name)(**call | {argument: longer})
        other = torch.float16 if value.dtype != torch.float16 else torch.float32
        with pytest.raises(TypeError, match=rf"^{name}: \w+ must be \w+, got \w+$"):
            getattr(_C, name)(**call | {argument: value.to(other)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: {"k": call["k"][:, :, 0]}, r"k must have 4 dimensions, got shape \(2, 5, 16\)"),
        (lambda call: {"out": call["out"][:1]}, r"out must have shape \(2, 3, 4, 16\), got \(1, 3, 4, 16\)"),
        (lambda call: {"q": call["q"].mT.contiguous().mT}, r"q must be dense in its last dimension, got stride 4"),
        (lambda call: {"alibi_slopes": torch.zeros(8)[::2]}, r"alibi_slopes must be contiguous, got strides \(2,\)"),
        (lambda call: {"softmax_lse": torch.zeros(2, 3, 4).mT}, r"softmax_lse must be contiguous"),
        (lambda call: {"num_threads": 0}, r"num_threads must be at least 1, got 0"),
        (
            lambda call: dict.fromkeys(("k", "v"), torch.zeros(2, 5, 3, 16)),
            r"q.shape\[2\] \(num_heads\) must be a multiple of k.shape\[2\] \(num_kv_heads\), got 4 and 3",
        ),
    ],
    ids=["dimensions", "batch", "strides", "sliced-slopes", "transposed-lse", "threads", "heads"],
)
def test_attention_refuses(change, message):
    call = attention_call()
    with pytest.raises(ValueError, match=f"^attention_forward: {message}"):
        _C.attention_forward(**call | change(call))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_table": None}, "q_table and k_table must both be given or both be None, got one of them"),
        (
            dict.fromkeys(("q_table", "k_table"), torch.zeros(3, 18)),
            r"rotary_dim\) must be even and at most head_dim=16",
        ),
        (dict.fromkeys(("q_table", "k_table"), torch.zeros(3, 7)), r"rotary_dim\) must be even and .*, got 7"),
        (
            {"dk_scale_partial": torch.zeros(2, 2, 16)},
            r"dk_scale_partial must have shape \(3, 2, 16\), got \(2, 2, 16\)",
        ),
        ({"dq_scale_partial": torch.zeros(0, 4, 16)}, "dq_scale_partial must have at least one partial sum"),
        ({"num_threads": -1}, "num_threads must be at least 1, got -1"),
        ({"q_row": 1}, "q_table must have rows 1 to 3, got 3 rows"),
        ({"k_row": -1}, "k_table must have rows -1 to 3, got 5 rows"),
        ({"factors": torch.ones(9, 4), "k_factor_row": 3}, "factors must have rows 3 to -1, got 9 rows"),
        ({"factors": torch.ones(9, 4), "q_factor_row": 7}, "factors must have rows 7 to 9, got 9 rows"),
        ({"factors": torch.ones(9, 8)}, r"factors must have shape \(9, 4\), got \(9, 8\)"),
        ({"factors": torch.ones(9, 4), "k_factor_row": 4}, "factors must be None on the CPU"),
    ],
    ids=[
        "one-table",
        "wide-table",
        "odd-table",
        "partials",
        "no-partials",
        "threads",
        "rows-after",
        "rows-before",
        "factors-before",
        "factors-after",
        "wide-factors",
        "factors-on-cpu",
    ],
)
def test_qk_norm_rotary_refuses(change, message):
    with pytest.raises(ValueError, match=f"^qk_norm_rotary(_backward)?: .*{message}"):
        _C.qk_norm_rotary_backward(**rotary_backward_call() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 16)}, r"x must have 3 dimensions, got shape \(2, 3, 4, 16\)"),
        ({"residual": torch.zeros(2, 16, 3).mT}, r"residual must be dense in its last dimension, got stride 3"),
        ({"key_start": torch.zeros(3, 2, dtype=torch.int32).T}, r"key_start must be contiguous, got strides \(1, 2\)"),
        ({"shift": 16}, r"shift must be at least 0 and less than dim=16, got 16"),
        ({"shift": -1}, r"shift must be at least 0 and less than dim=16, got -1"),
        ({"residual": None}, r"residual and dresidual must both be given or both be None, got one of them"),
        ({"dgamma_partial": torch.zeros(2, 16)}, r"dgamma_partial must have shape \(3, 16\), got \(2, 16\)"),
        (
            {"dresidual_scale_partial": torch.zeros(0, 16)},
            r"dresidual_scale_partial must have at least one partial sum",
        ),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ],
    ids=[
        "dimensions",
        "strides",
        "key-start",
        "shift",
        "negative-shift",
        "one-residual",
        "partials",
        "none",
        "threads",
    ],
)
def test_token_shift_norm_refuses(change, message):
    with pytest.raises(ValueError, match=f"^token_shift_norm_backward: {message}"):
        _C.token_shift_norm_backward(**token_shift_backward_call() | change)


def test_numbers_on_the_device_are_those_of_a_gpu():
    """On a CPU the caller cuts the keys, and adds the step to the rows of the tables."""
    number = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^attention_forward: num_keys must be None on the CPU, .*, got a tensor"):
        _C.attention_forward(**attention_call(), num_keys=number)
    with pytest.raises(ValueError, match=r"^qk_norm_rotary_forward: step must be None on the CPU, .*, got a tensor"):
        _C.qk_norm_rotary_forward(**rotary_call(), step=number)


def test_runs_are_those_of_a_gpu():
    with pytest.raises(ValueError, match=r"^token_shift_norm_backward_runs: x must be on a CUDA device, got cpu"):
        _C.token_shift_norm_backward_runs(x=torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match=r"^token_shift_norm_backward_runs: x must have 3 dimensions"):
        _C.token_shift_norm_backward_runs(x=torch.zeros(1, 16))
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"^qk_norm_rotary_backward_runs: q must be on a CUDA device, got cpu"):
        _C.qk_norm_rotary_backward_runs(q=q, k=q)
    with pytest.raises(ValueError, match=r"^qk_norm_rotary_backward_runs: k must have 4 dimensions"):
        _C.qk_norm_rotary_backward_runs(q=q, k=q[0])


def test_a_dimension_beyond_int_is_refused():
    wide = torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    call = attention_call(batch=1, seqlen_q=1, num_heads=1, num_kv_heads=1, head_dim=1)
    with pytest.raises(ValueError, match=r"k must have fewer than 2\^31 elements in dimension 1, got 2147483648"):
        _C.attention_forward(**call | {"k": wide, "v": wide})


def test_tables_may_have_more_rows():
    call, other = rotary_call(), rotary_call()
    other |= {name: call[name] for name in ("q", "k", "q_scale", "k_scale")}
    for name in ("q", "k"):
        other[f"{name}_table"] = torch.cat((torch.full((2, 8), math.nan), call[f"{name}_table"]))
        other[f"{name}_row"] = 2
    _C.qk_norm_rotary_forward(**call)
    _C.qk_norm_rotary_forward(**other)
    assert torch.equal(call["q_out"], other["q_out"]) and torch.equal(call["k_out"], other["k_out"])


def test_cuda_versions_need_no_device():
    versions, compiler = _C.cuda_versions(), _C.build_info()["cuda_compiler"]
    assert versions.keys() == {"runtime", "driver"}
    if compiler is None:
        assert versions == {"runtime": None, "driver": None}
    else:
        assert compiler.startswith(f"nvcc {versions['runtime']}.")
    assert versions["driver"] is None or re.fullmatch(r"\d+\.\d", versions["driver"])


def test_cuda_status_is_an_answer_not_an_error():
    for device in (0, 1000):
        status = _C.cuda_status(device)
        assert status.keys() == {"device_error", "kernel_error", "lasting"}
    assert status["device_error"]  # there is no device 1000
    if _C.build_info()["cuda_compiler"] and not torch.cuda.is_available():
        assert re.fullmatch(r"cudaError\w+, .+", _C.cuda_status(0)["device_error"])


def test_optional_tensors():
    call = rotary_call()
    _C.qk_norm_rotary_forward(**call | dict.fromkeys(("q_scale", "k_scale", "q_table", "k_table")))
    norms = torch.linalg.vector_norm(call["q_out"], dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))

    call, biased = attention_call(), attention_call()
    biased |= {name: call[name] for name in ("q", "k", "v")} | {"alibi_slopes": torch.zeros(4)}
    _C.attention_forward(**call)
    _C.attention_forward(**biased)
    torch.testing.assert_close(call["out"], biased["out"])


def test_strides_are_read():
    call, strided = attention_call(), attention_call()
    _C.attention_forward(**call)
    for name in ("q", "k", "v"):
        batch, seqlen, heads, head_dim = call[name].shape
        padded = torch.full((seqlen + 1, batch, heads + 2, head_dim + 3), math.nan)
        strided[name] = padded[1:, :, 1:-1, :-3].transpose(0, 1).copy_(call[name])
    _C.attention_forward(**strided)
    assert torch.equal(call["out"], strided["out"])


def test_a_parameter_and_a_subclass_are_tensors():
    call = attention_call()
    call["q"] = torch.nn.Parameter(call["q"])
    call["k"] = call["k"].as_subclass(type("Named", (torch.Tensor,), {}))
    _C.attention_forward(**call)
    assert call["out"].isfinite().all()


def test_calls_leave_no_references():
    """A tensor held by the extension would be a memory leak."""
    call = attention_call()
    before = [sys.getrefcount(value) for value in call.values() if isinstance(value, torch.Tensor)]
    for _ in range(10):
        _C.attention_forward(**call)
        with pytest.raises(ValueError, match="num_threads"):
            _C.attention_forward(**call | {"num_threads": 0})
    assert [sys.getrefcount(value) for value in call.values() if isinstance(value, torch.Tensor)] == before


def test_the_gil_is_released():
    """While one thread is inside the kernel, another one can run Python code: it is never blocked for long."""
    call = attention_call(batch=1, seqlen_q=4096, seqlen_k=4096, num_heads=8, num_kv_heads=1, head_dim=64)
    duration = []

    def run():
        start = time.perf_counter()
        _C.attention_forward(**call)
        duration.append(time.perf_counter() - start)

    worker = threading.Thread(target=run)
    last, longest_pause = time.perf_counter(), 0.0
    worker.start()
    while not duration:
        now = time.perf_counter()
        last, longest_pause = now, max(longest_pause, now - last)
    worker.join()
    longest_pause = max(longest_pause, time.perf_counter() - last)
    assert longest_pause < 0.5 * duration[0]


def test_two_threads_at_once():
    calls = [attention_call(seqlen_q=65, seqlen_k=129) for _ in range(4)]
    expected = []
    for call in calls:
        _C.attention_forward(**call)
        expected.append(call["out"].clone())
        call["out"].fill_(math.nan)

    def run(call):
        for _ in range(20):
            _C.attention_forward(**call)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call, out in zip(calls, expected, strict=True):
        assert torch.equal(call["out"], out)


# ---- the two ways to read a tensor ----------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """Read through its attributes: a subclass need not have its own memory."""


@pytest.mark.parametrize("name", CALLS)
def test_tensors_read_by_attributes_give_the_same_bits(name):
    make, written = CALLS[name]
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    other = {
        key: value.as_subclass(Subclass) if isinstance(value, torch.Tensor) else value for key, value in make().items()
    }
    getattr(_C, name)(**plain)
    getattr(_C, name)(**other)
    for result in written:
        assert torch.equal(plain[result], other[result].as_subclass(torch.Tensor)), result


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, Subclass], ids=lambda kind: kind.__name__)
def test_what_cannot_be_read_is_named_however_it_is_read(kind):
    def of_kind(tensor):
        return (
            torch.nn.Parameter(tensor, requires_grad=False) if kind is torch.nn.Parameter else tensor.as_subclass(kind)
        )

    call = attention_call()
    for wrong, message in (
        (torch.zeros(2, 3, dtype=torch.int64), "of dtype float32, float16, bfloat16 or int32, got torch.int64"),
        (torch.zeros(1, 1, 1, 1, 1), "of at most 4 dimensions"),
        (torch.empty(2, 3, device="meta"), "on a cpu or cuda device, got meta"),
    ):
        with pytest.raises(TypeError, match=message):
            _C.attention_forward(**call | {"q": of_kind(wrong)})


class Counted:
    """A tensor for the bindings that counts how often each attribute is read."""

    def __init__(self, tensor):
        self.tensor, self.reads = tensor, collections.Counter()

    def __getattr__(self, name):
        self.reads[name] += 1
        return getattr(self.tensor, name)


def test_each_attribute_is_read_once():
    call = {key: Counted(v) if isinstance(v, torch.Tensor) else v for key, v in attention_call().items()}
    _C.attention_forward(**call)
    for key, counted in call.items():
        if isinstance(counted, Counted):
            assert counted.reads == dict.fromkeys(("data_ptr", "dtype", "is_cpu", "shape", "stride"), 1), key


# ---- the quick look at a whole call ---------------------------------------------------------------------------------


def usual_attention(batch=2, seqlen_q=3, seqlen_k=5, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32):
    return {
        "q": torch.zeros(batch, seqlen_q, num_heads, head_dim, dtype=dtype),
        "k": torch.zeros(batch, seqlen_k, num_kv_heads, head_dim, dtype=dtype),
        "v": torch.zeros(batch, seqlen_k, num_kv_heads, head_dim, dtype=dtype),
        "alibi_slopes": torch.zeros(num_heads),
        "logit_bound": torch.zeros(num_heads),
        "key_start": torch.zeros(1, 1, dtype=torch.int32).expand(batch, seqlen_q),
        "num_keys": torch.zeros(1, dtype=torch.int32),
    }


def usual_rotary():
    return {
        "q": torch.zeros(2, 3, 4, 16),
        "k": torch.zeros(2, 5, 1, 16),
        "q_scale": torch.zeros(4, 16),
        "k_scale": torch.zeros(1, 16),
        "step": torch.zeros(1, dtype=torch.int32),
    }


def usual_token_shift():
    return {
        "x": torch.zeros(2, 3, 16),
        "residual": torch.zeros(2, 3, 16),
        "residual_scale": torch.zeros(16),
        "gamma": torch.zeros(16),
        "history": torch.zeros(2, 1, 16),
        "key_start": torch.zeros(2, 3, dtype=torch.int32),
        "shift": 1,
    }


USUAL = {"attention": usual_attention, "qk_norm_rotary": usual_rotary, "token_shift_norm": usual_token_shift}
REQUIRED = {"q", "k", "v", "x", "shift"}


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_call_is_recognised(name):
    is_usual, call = getattr(_C, f"{name}_is_usual"), USUAL[name]()
    assert is_usual(**call)
    assert is_usual(**{key: value if key in REQUIRED else None for key, value in call.items()})
    parameters = {
        key: torch.nn.Parameter(value) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in call.items()
    }
    assert is_usual(**parameters)
    for key, value in call.items():
        if isinstance(value, torch.Tensor):
            for other in (
                value.new_zeros(*value.shape[:-1], value.shape[-1] + 1),  # another size
                value.new_zeros(*value.shape, 2)[..., 0].unsqueeze(0),  # more dimensions
                value.to(torch.float16),  # another dtype than the other tensors, and than a constant must have
                value.to("meta"),
                value.as_subclass(Subclass),
                value.tolist(),
            ):
                assert not is_usual(**call | {key: other}), key
        if key in REQUIRED:
            assert not is_usual(**call | {key: None}) if key != "shift" else True
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            gaps = value.new_zeros(*value.shape, 2)[..., 0]
            assert gaps.shape == value.shape and not is_usual(**call | {key: gaps}), key


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 1},  # of such rows no stride says whether torch negates them when it reads them
        {"head_dim": 0},
        {"num_kv_heads": 3},
        {"num_kv_heads": 0},
        {"dtype": torch.float64},
        {"dtype": torch.int32},
    ],
    ids=str,
)
def test_unusual_calls_of_attention(shape):
    assert not _C.attention_is_usual(**usual_attention(**shape))


@pytest.mark.parametrize("shape", [{"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"dtype": torch.bfloat16}], ids=str)
def test_other_usual_calls_of_attention(shape):
    assert _C.attention_is_usual(**usual_attention(**shape))


def test_numbers_that_torch_negates_when_it_reads_them_are_unusual():
    """The memory of such a tensor holds the opposite numbers."""
    negated = torch.zeros(2, 3, 4, 16, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert not _C.attention_is_usual(**usual_attention() | {"q": negated})
    one_head = usual_attention(num_heads=1, num_kv_heads=1)
    for slopes in (torch.zeros(1, dtype=torch.complex64), torch.zeros((), dtype=torch.complex64)[None]):
        assert not _C.attention_is_usual(**one_head | {"alibi_slopes": slopes.conj().imag})


def test_tensors_of_transforms_are_unusual():
    call, seen = usual_attention(), []

    def look(q):
        seen.append(q)
        assert type(q) is torch.Tensor and not _C.attention_is_usual(**call | {"q": q})
        return q.sum()

    torch.func.grad(look)(call["q"])
    torch.func.vmap(look)(call["q"][None])
    torch.func.functionalize(look)(call["q"])
    assert len(seen) == 3
    for dead in seen:  # it has left its transform
        assert not _C.attention_is_usual(**call | {"q": dead})


WITHOUT_TABLE = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None  # before torch 2.10 there is none
from andromeda import _C, attention

q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 2, 16)
look = lambda q, slopes=None: _C.attention_is_usual(q, k, k, slopes, None, None, None)
assert look(q) and look(torch.nn.Parameter(q)) and look(q, torch.zeros(4))
subclass = q.as_subclass(type("Other", (torch.Tensor,), {}))
for other in (q.double(), q.to("meta"), q.to_sparse(), q[None], 3, None, subclass):
    assert not look(other) and (other is None or not look(q, other))
seen = []
torch.func.vmap(lambda q: seen.append(look(q)) or q.sum())(q[None])
torch.func.grad(lambda q: seen.append(look(q)) or q.sum())(q)
assert seen == [False, False]
torch.testing.assert_close(attention(q, k, k), attention(q, k, k, backend="reference"))
"""


def test_a_torch_without_the_table_of_dlpack():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TABLE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# ---- the stub _C.pyi ------------------------------------------------------------------------------------------------

STUB = ast.parse((Path(andromeda.__file__).parent / "_C.pyi").read_text())
DECLARED = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
DICTS = {node.name: [field.target.id for field in node.body] for node in STUB.body if isinstance(node, ast.ClassDef)}
# The spellings of pybind11, which depend on its version, and those of the stub.
SPELLINGS = [
    (r"(typing\.)?Optional\[(.*)\]", r"\2 | None"),
    (r"torch\.Tensor", "Tensor"),
    (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
    (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
    ("|".join(DICTS), "dict"),
]


def spelling(node):
    text = ast.unparse(node)
    for pattern, replacement in SPELLINGS:
        text = re.sub(f"^(?:{pattern})$" if "Optional" in pattern else pattern, replacement, text)
    return text


def signature(function):
    """Positional and keyword-only arguments, each with its type and default, and the type of the result."""
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    pairs = [
        *zip(arguments.args, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    described = [(a.arg, spelling(a.annotation), d and ast.unparse(d)) for a, d in pairs]
    count = len(arguments.args)
    return described[:count], described[count:], spelling(function.returns)


def test_the_stub_declares_every_function():
    assert set(DECLARED) == {name for name in dir(_C) if not name.startswith("__")}


@pytest.mark.parametrize("name", DECLARED)
def test_the_stub_has_the_signatures_of_the_library(name):
    compiled = ast.parse(f"def {getattr(_C, name).__doc__.splitlines()[0]}: ...").body[0]
    assert signature(DECLARED[name]) == signature(compiled)


def test_the_stub_knows_the_keys_of_dicts():
    for name, found in (
        ("BuildInfo", _C.build_info()),
        ("CudaVersions", _C.cuda_versions()),
        ("CudaStatus", _C.cuda_status(1000)),
    ):
        assert DICTS[name] == list(found)
