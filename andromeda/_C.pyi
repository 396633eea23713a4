# The compiled module. `andromeda.ops` calls it; its header files in csrc/include/andromeda explain the arguments.
# tests/test_bindings.py compares these signatures with the library's own.

from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    version: str
    build_type: str
    compiler: str
    flags: str
    instruction_sets: list[str]
    cuda_requested: str
    cuda_compiler: str | None
    ptxas: str | None
    cuda_flags: str | None
    cuda_architectures: list[str]
    max_attention_head_dim: int
    max_attention_seqlen: int
    min_softmax_scale: float
    max_rotary_head_dim: int
    max_rotary_seqlen: int
    max_rotary_step: int

class CudaVersions(TypedDict):
    runtime: str | None
    driver: str | None

class CudaStatus(TypedDict):
    device_error: str | None
    kernel_error: str | None
    lasting: bool

def build_info() -> BuildInfo: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def cuda_versions() -> CudaVersions: ...
def cuda_status(device: int) -> CudaStatus: ...
def capture_id(stream: int, device: int) -> int: ...
def permit_work_beside_captures(permitted: bool) -> bool: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    causal: bool,
    softmax_scale: float,
    num_threads: int,
    partials: Tensor | None,
    semaphores: Tensor | None,
    stream: int,
    num_splits: int = 0,
    num_keys: Tensor | None = None,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    causal: bool,
    softmax_scale: float,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    num_threads: int,
    partials: Tensor | None,
    semaphores: Tensor | None,
    stream: int,
) -> None: ...
def attention_is_usual(
    q: object,
    k: object,
    v: object,
    alibi_slopes: object,
    logit_bound: object,
    key_start: object,
    num_keys: object,
) -> bool: ...
def attention_forward_max_head_dim() -> int: ...
def attention_forward_workspace(
    *,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    num_splits: int = 0,
    has_num_keys: bool = False,
) -> tuple[int, int, int]: ...
def attention_backward_workspace(
    *, batch: int, seqlen_q: int, seqlen_k: int, num_heads: int, num_kv_heads: int, head_dim: int, causal: bool
) -> tuple[int, int]: ...
def qk_norm_rotary_forward(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    q_table: Tensor | None,
    k_table: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    normalize: bool,
    num_threads: int,
    stream: int,
    q_row: int = 0,
    k_row: int = 0,
    factors: Tensor | None = None,
    q_factor_row: int = 0,
    k_factor_row: int = 0,
    q_multiplier: float = 1.0,
    step: Tensor | None = None,
) -> None: ...
def qk_norm_rotary_backward(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    q_table: Tensor | None,
    k_table: Tensor | None,
    dq_out: Tensor,
    dk_out: Tensor,
    dq: Tensor,
    dk: Tensor,
    dq_scale_partial: Tensor | None,
    dk_scale_partial: Tensor | None,
    normalize: bool,
    num_threads: int,
    stream: int,
    q_row: int = 0,
    k_row: int = 0,
    factors: Tensor | None = None,
    q_factor_row: int = 0,
    k_factor_row: int = 0,
    q_multiplier: float = 1.0,
) -> None: ...
def qk_norm_rotary_is_usual(q: object, k: object, q_scale: object, k_scale: object, step: object) -> bool: ...
def qk_norm_rotary_backward_runs(*, q: Tensor, k: Tensor) -> int: ...
def token_shift_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    history: Tensor | None,
    key_start: Tensor | None,
    y: Tensor | None,
    shifted: Tensor | None,
    alpha: float,
    shift: int,
    position: int,
    num_threads: int,
    stream: int,
) -> None: ...
def token_shift_norm_backward(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    key_start: Tensor | None,
    dy: Tensor | None,
    dshifted: Tensor | None,
    dx: Tensor,
    dresidual: Tensor | None,
    dresidual_scale_partial: Tensor | None,
    dgamma_partial: Tensor | None,
    alpha: float,
    shift: int,
    position: int,
    num_threads: int,
    stream: int,
) -> None: ...
def token_shift_norm_is_usual(
    x: object,
    residual: object,
    residual_scale: object,
    gamma: object,
    history: object,
    key_start: object,
    shift: int,
) -> bool: ...
def token_shift_norm_backward_runs(*, x: Tensor) -> int: ...
