"""The arguments of a model's constructor and of its calls (tokens, `key_start`): each is checked once, here.

`DecoderConfig` and `ModelConfig` also translate the constructor's arguments into those of the operations (`heads` into
`num_kv_heads`, flags into scales and slopes), so that no other file derives them again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, TypedDict

import torch

Tokens: TypeAlias = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
"""Token ids: an int64 tensor (seqlen,) or (batch, seqlen), a list of ints, or a list of lists of ints."""


class EmbeddingProvider(Protocol):
    """An object that makes the embedding module of a model (docs/model.md#2)."""

    def get_embedding(self, num_tokens: int, dim: int) -> torch.nn.Module:
        """A new module that maps int64 (batch, n) to (batch, n, dim)."""


class DecoderOptions(TypedDict, total=False):
    """The keyword arguments of `andromeda.model.Decoder` besides `dim` and `depth`, which `DecoderConfig` describes."""

    dim_head: int
    heads: int
    alibi_pos_bias: bool
    alibi_num_heads: int | None
    rotary_xpos: bool
    attn_flash: bool
    deepnorm: bool
    shift_tokens: int
    attn_one_kv_head: bool
    qk_norm: bool
    attn_qk_norm: bool
    attn_qk_norm_dim_scale: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The arguments of `andromeda.model.Decoder` (docs/model.md#1); the defaults are those of `Andromeda`.

    Attributes:
        dim: width of the model.
        depth: number of blocks, each one attention and one feed-forward sub-layer.
        dim_head: width of an attention head; with `rotary_xpos` a multiple of 4 and at least 8, with QK norm above 2.
        heads: number of query heads; heads * dim_head need not equal dim.
        alibi_pos_bias: ALiBi on the first `alibi_num_heads` heads (None: on all, 0: on none).
        rotary_xpos: rotary xPos on the first half of the channels of each head.
        attn_flash: use the fused kernels where they can run; False uses plain torch, which gives the same result, and
            gradients that can be differentiated again.
        deepnorm: post-norm with scaled residuals; False is pre-norm with a final norm.
        shift_tokens: delay in tokens of the last of shift_tokens + 1 channel segments; 0 is off.
        attn_one_kv_head: one key/value head for all query heads; False gives each its own.
        qk_norm, attn_qk_norm: normalise queries and keys if both are True.
        attn_qk_norm_dim_scale: learned scale per channel after that normalisation; False is a fixed score scale of 10.

    Raises:
        TypeError, ValueError: an argument is wrong; names it and its value.
    """

    owner: ClassVar[str] = "Decoder"

    dim: int = 2560
    depth: int = 32
    dim_head: int = 128
    heads: int = 24
    alibi_pos_bias: bool = True
    alibi_num_heads: int | None = 12
    rotary_xpos: bool = True
    attn_flash: bool = True
    deepnorm: bool = True
    shift_tokens: int = 1
    attn_one_kv_head: bool = True
    qk_norm: bool = True
    attn_qk_norm: bool = True
    attn_qk_norm_dim_scale: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name), field.type)
        for field in dataclasses.fields(self):
            if field.type is int:
                smallest = 0 if field.name == "shift_tokens" else 1
                self._require(field.name, f"be at least {smallest}", getattr(self, field.name) >= smallest)
        enough = self.shift_tokens + 1
        self._require("dim", f"be at least shift_tokens + 1 = {enough}, a channel per segment", self.dim >= enough)
        if self.alibi_pos_bias and self.alibi_num_heads is not None:
            fits = 0 <= self.alibi_num_heads <= self.heads
            self._require("alibi_num_heads", f"be None or between 0 and heads = {self.heads}", fits)
        if self.rotary_xpos:
            divisible = self.dim_head % 4 == 0 and self.dim_head >= 8
            self._require("dim_head", "be a multiple of 4 and at least 8 with rotary_xpos=True", divisible)
        if self.norm_on:
            self._require("dim_head", "be greater than 2 with QK normalisation on", self.dim_head > 2)

    def _check_type(self, name: str, value: object, kind: Any) -> None:
        """Raise if the value has the wrong type. kind: bool, int or int | None, as `dataclasses` reports it."""
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{self.owner}: {name} must be True or False, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, kind):
            choice = "an int" if kind is int else "an int or None"
            raise TypeError(f"{self.owner}: {name} must be {choice}, got {value!r} ({type(value).__name__})")

    def _require(self, name: str, requirement: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{self.owner}: {name} must {requirement}, got {getattr(self, name)}")

    @property
    def norm_on(self) -> bool:
        """Whether queries and keys are normalised (docs/model.md#13.1)."""
        return self.qk_norm and self.attn_qk_norm

    @property
    def learned_scales(self) -> bool:
        """Whether a normalised query or key is multiplied by a learned vector (docs/model.md#5.2)."""
        return self.norm_on and self.attn_qk_norm_dim_scale

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return 1 if self.attn_one_kv_head else self.heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated; 0 without `rotary_xpos`."""
        return self.dim_head // 2 if self.rotary_xpos else 0

    @property
    def backend(self) -> Literal["reference"] | None:
        """The argument `backend` of the operations."""
        return None if self.attn_flash else "reference"

    @property
    def softmax_scale(self) -> float:
        """tau of docs/model.md#5.2."""
        return 10.0 if self.norm_on and not self.learned_scales else self.dim_head**-0.5

    @property
    def alpha(self) -> float:
        """Residual multiplier of DeepNorm (docs/model.md#7)."""
        return (2 * self.depth) ** 0.25

    @property
    def beta(self) -> float:
        """Initialisation gain of DeepNorm (docs/model.md#7)."""
        return (8 * self.depth) ** -0.25

    @functools.cached_property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        """A slope per head, 0 for a head without a bias (docs/model.md#5.4); None when no head has one."""
        biased = self.heads if self.alibi_num_heads is None else self.alibi_num_heads
        if not self.alibi_pos_bias or biased == 0:
            return None
        return alibi_slopes(biased) + (0.0,) * (self.heads - biased)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """Every argument of `andromeda.Andromeda` except `embedding_provider`, which is an object and not a setting.

    Attributes:
        num_tokens: size of the vocabulary.
        max_seq_len: window of generation, and number of rows of the absolute position table.
        use_abs_pos_emb: add a learned vector per position to the token embedding.
    """

    owner: ClassVar[str] = "Andromeda"

    num_tokens: int = 50304
    max_seq_len: int = 8192
    use_abs_pos_emb: bool = False

    def decoder_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the `Decoder` inside."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderConfig)}


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes m_a of docs/model.md#5.4 for a model of `num_heads` heads."""
    power = 2 ** (num_heads.bit_length() - 1)  # A_2: largest power of two <= num_heads
    slopes = [2.0 ** (-8 * (a + 1) / power) for a in range(power)]
    slopes += [2.0 ** (-4 * (2 * a + 1) / power) for a in range(num_heads - power)]
    return tuple(slopes)


def read_tokens(
    owner: str,
    tokens: Tokens,
    num_tokens: int,
    device: torch.device,
    *,
    ignore_index: int | None = None,
    have_values: Callable[[torch.Tensor], bool] | None = None,
) -> torch.Tensor:
    """Token ids in any form that `forward` takes, as an int64 tensor (batch, seqlen) on `device`.

    Args:
        owner: the class that error messages name.
        tokens: list of ints, list of equally long lists, or int64 tensor (seqlen,) or (batch, seqlen).
        num_tokens: ids must be smaller. Only lists and CPU tensors are checked: reading values back would stall a GPU.
        ignore_index: an id that is allowed in addition.
        have_values: whether the values of a tensor may be read: a traced or fake one has none. None: they may.

    Raises:
        TypeError: the tokens have another form, such as floats, bools or another dtype.
        ValueError: an empty sequence, rows of different lengths, an id outside the vocabulary.
    """
    if isinstance(tokens, list | tuple):
        rows = read_rows(owner, tokens)
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1:
            raise ValueError(f"{owner}: rows of tokens must have one length, got {lengths}")
        tokens = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{owner}: tokens must be a list of ints or an int64 tensor, got {type(tokens).__name__}")
    if tokens.is_nested:
        raise TypeError(
            f"{owner}: tokens must have one length for all rows, got a nested tensor; pad them, or pack them into one "
            "row, tokens.values()[None], with key_start at the start of each document"
        )
    if tokens.dtype != torch.int64:
        raise TypeError(f"{owner}: tokens.dtype must be int64, got {str(tokens.dtype).removeprefix('torch.')}")
    if tokens.ndim not in (1, 2):
        raise ValueError(f"{owner}: tokens must have shape (seqlen,) or (batch, seqlen), got {tuple(tokens.shape)}")
    if tokens.shape[-1] == 0:
        raise ValueError(f"{owner}: tokens must hold at least one token, got shape {tuple(tokens.shape)}")
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if tokens.device.type == "cpu" and (have_values is None or have_values(tokens)):
        _check_range(owner, tokens, num_tokens, ignore_index)
    return tokens.to(device)


def read_rows(owner: str, tokens: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of a list of ints (one row) or of a list of lists of ints, of any lengths >= 1."""
    rows: Sequence[object] = tokens if len(tokens) > 0 and isinstance(tokens[0], list | tuple) else [tokens]
    result = []
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise TypeError(f"{owner}: tokens must be all ints or all lists of ints, got {row!r} as row {index}")
        if len(row) == 0:
            raise ValueError(f"{owner}: tokens must hold at least one token, got an empty row {index}")
        for position, token in enumerate(row):
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"{owner}: tokens must be ints, got {token!r} at row {index}, position {position}")
            if not -(2**63) <= token < 2**63:
                raise ValueError(f"{owner}: token {token} at row {index}, position {position} does not fit into int64")
        result.append(list(row))
    return result


def _check_range(owner: str, tokens: torch.Tensor, num_tokens: int, ignore_index: int | None) -> None:
    if tokens.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(tokens))
    if low >= 0 and high < num_tokens:
        return
    outside = (tokens < 0) | (tokens >= num_tokens)
    allowed = f"at least 0 and below the vocabulary size {num_tokens}"
    if ignore_index is not None:
        outside &= tokens != ignore_index
        allowed += f", or {ignore_index}"
    if outside.any():
        row, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{owner}: token ids must be {allowed}, got {tokens[row, position].item()} at row {row}, "
            f"position {position}"
        )


class CheckedKeyStart(NamedTuple):
    """A tensor that `read_key_start` returned: the inner module that receives it need not check it again."""

    tensor: torch.Tensor


KeyStart: TypeAlias = torch.Tensor | CheckedKeyStart | None
"""The argument `key_start` of a module: an integer tensor (batch, seqlen), or one that an outer module has checked."""


def checked(key_start: torch.Tensor | None) -> CheckedKeyStart | None:
    """The result of `read_key_start`, in the form in which an outer module passes it to an inner one."""
    return None if key_start is None else CheckedKeyStart(key_start)


def read_key_start(
    owner: str, key_start: KeyStart, batch: int, seqlen: int, device: torch.device
) -> torch.Tensor | None:
    """`key_start` as int32 (batch, seqlen) on `device`; None stays None. owner: the class that error messages name."""
    if key_start is None:
        return None
    if isinstance(key_start, CheckedKeyStart):
        return key_start.tensor
    if not isinstance(key_start, torch.Tensor) or key_start.dtype not in (torch.int32, torch.int64):
        found = key_start.dtype if isinstance(key_start, torch.Tensor) else type(key_start).__name__
        raise TypeError(f"{owner}: key_start must be an int32 or int64 tensor, got {found}")
    if tuple(key_start.shape) != (batch, seqlen):
        raise ValueError(
            f"{owner}: key_start must have shape (batch, seqlen) = {(batch, seqlen)}, got {tuple(key_start.shape)}"
        )
    return key_start.to(device=device, dtype=torch.int32)
