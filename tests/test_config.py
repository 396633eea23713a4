"""Constructor arguments and their translation; reading of tokens and key_start (docs/model.md#1, #8, #13, #13.13)."""

import dataclasses
import inspect
import typing

import oracle
import pytest
import torch

from andromeda import Andromeda, Decoder
from andromeda.config import (
    DecoderConfig,
    DecoderOptions,
    ModelConfig,
    alibi_slopes,
    read_key_start,
    read_rows,
    read_tokens,
)

CPU = torch.device("cpu")
SIZES = ("num_tokens", "max_seq_len", "dim", "depth", "dim_head", "heads")
SWITCHES = (
    "use_abs_pos_emb",
    "alibi_pos_bias",
    "rotary_xpos",
    "attn_flash",
    "deepnorm",
    "attn_one_kv_head",
    "qk_norm",
    "attn_qk_norm",
    "attn_qk_norm_dim_scale",
)
DOCUMENTED = dict(
    num_tokens=50304, max_seq_len=8192, dim=2560, depth=32, dim_head=128, heads=24, use_abs_pos_emb=False,
    alibi_pos_bias=True, alibi_num_heads=12, rotary_xpos=True, attn_flash=True, deepnorm=True, shift_tokens=1,
    attn_one_kv_head=True, qk_norm=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
)  # fmt: skip


def config(**arguments) -> ModelConfig:
    return ModelConfig(**(oracle.SMALL | arguments))


# ---- the documented constructor


def test_constructor_is_the_documented_one():
    parameters = list(inspect.signature(Andromeda).parameters.values())
    assert [p.name for p in parameters] == [*DOCUMENTED, "embedding_provider"]
    assert {p.name: p.default for p in parameters[:-1]} == DOCUMENTED
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def test_config_has_the_defaults_of_the_constructor():
    assert dataclasses.asdict(ModelConfig()) == DOCUMENTED


def test_the_types_of_the_decoder_options():
    types = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}
    assert {"dim": int, "depth": int} | typing.get_type_hints(DecoderOptions) == types


def test_the_decoder_gets_all_its_arguments():
    changed = config(heads=3, alibi_num_heads=None, deepnorm=False, shift_tokens=2, qk_norm=False)
    arguments = changed.decoder_arguments()
    assert set(arguments) == set(DOCUMENTED) - {"num_tokens", "max_seq_len", "use_abs_pos_emb"}
    assert all(arguments[name] == getattr(changed, name) for name in arguments)


# ---- validation


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", (0, -1))
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=rf"^Andromeda: {name} must be at least 1, got {value}$"):
        Andromeda(**(oracle.SMALL | {name: value}))


@pytest.mark.parametrize("name", (*SIZES, "shift_tokens", "alibi_num_heads"))
@pytest.mark.parametrize("value", (2.0, "2", True, torch.tensor(2)), ids=("float", "str", "bool", "tensor"))
def test_sizes_are_ints(name, value):
    with pytest.raises(TypeError, match=rf"^Andromeda: {name} must be an int"):
        Andromeda(**(oracle.SMALL | {name: value}))


@pytest.mark.parametrize("name", (*SIZES, "shift_tokens"))
def test_only_alibi_num_heads_may_be_none(name):
    with pytest.raises(TypeError, match=rf"^Andromeda: {name} must be an int, got None"):
        Andromeda(**(oracle.SMALL | {name: None}))
    assert config(alibi_num_heads=None).alibi_slopes == alibi_slopes(2)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", (1, None, "True"), ids=("int", "none", "str"))
def test_switches_are_bools(name, value):
    with pytest.raises(TypeError, match=rf"^Andromeda: {name} must be True or False, got {value!r}$"):
        Andromeda(**(oracle.SMALL | {name: value}))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(shift_tokens=-1), "shift_tokens must be at least 0, got -1"),
        (dict(dim=3, shift_tokens=3), "dim must be at least shift_tokens .*4.*, got 3"),
        (dict(heads=2, alibi_num_heads=3), "alibi_num_heads must .*heads = 2, got 3"),
        (dict(alibi_num_heads=-1), "alibi_num_heads must .*got -1"),
        (dict(dim_head=10), "dim_head must be a multiple of 4 .*rotary_xpos.*, got 10"),
        (dict(dim_head=4), "dim_head must be .*at least 8.*, got 4"),
        (dict(dim_head=2, rotary_xpos=False), "dim_head must be greater than 2 .*got 2"),
    ],
    ids=("shift", "narrow", "alibi", "negative_alibi", "odd_rotary", "small_rotary", "qk_norm"),
)
def test_impossible_combinations(arguments, match):
    with pytest.raises(ValueError, match=f"^Andromeda: {match}$"):
        Andromeda(**(oracle.SMALL | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(alibi_num_heads=99, alibi_pos_bias=False),  # ignored then (docs/model.md#13.5)
        dict(alibi_num_heads=2, heads=2),
        dict(dim=4, shift_tokens=3),
        dict(dim_head=10, rotary_xpos=False),
        dict(dim_head=1, rotary_xpos=False, qk_norm=False),
        dict(dim_head=2, rotary_xpos=False, attn_qk_norm=False),
        dict(dim_head=3, rotary_xpos=False),
        dict(dim_head=8),
        dict(num_tokens=1, max_seq_len=1, dim=1, shift_tokens=0),
    ],
    ids=str,
)
def test_possible_combinations(arguments):
    model = Andromeda(**(oracle.SMALL | arguments)).double()
    assert model([0, 0, 0]).isfinite().all()
    if model.config.num_tokens > 1:
        model([0, 1, 2], return_loss=True).backward()


@pytest.mark.parametrize("call", (Andromeda, Decoder), ids=("Andromeda", "Decoder"))
def test_misspelt_keywords(call):
    with pytest.raises(TypeError, match="alibi_heads"):
        call(dim=24, depth=1, alibi_heads=2)


def test_the_decoder_names_itself():
    with pytest.raises(ValueError, match=r"^Decoder: heads must be at least 1, got 0$"):
        Decoder(dim=24, depth=1, heads=0)


# ---- translation


def test_alibi_slopes_of_the_specification():
    assert alibi_slopes(1) == (2.0**-8,)
    assert alibi_slopes(2) == (2.0**-4, 2.0**-8)
    assert alibi_slopes(3) == (2.0**-4, 2.0**-8, 2.0**-2)
    assert alibi_slopes(12) == tuple(2.0**-e for e in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5))


@pytest.mark.parametrize("num_heads", range(1, 34))
def test_alibi_slopes(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes == pytest.approx(oracle.alibi_slopes(num_heads), rel=1e-15)
    assert len(set(slopes)) == num_heads


def test_slopes_of_some_heads():
    assert config(heads=4, alibi_num_heads=3).alibi_slopes == (*alibi_slopes(3), 0.0)
    assert config(heads=4, alibi_num_heads=None).alibi_slopes == alibi_slopes(4)
    assert config(alibi_num_heads=0).alibi_slopes is None
    assert config(alibi_pos_bias=False).alibi_slopes is None


@pytest.mark.parametrize("qk_norm", (True, False))
@pytest.mark.parametrize("attn_qk_norm", (True, False))
@pytest.mark.parametrize("scales", (True, False))
def test_normalisation_needs_both_switches(qk_norm, attn_qk_norm, scales):
    made = config(qk_norm=qk_norm, attn_qk_norm=attn_qk_norm, attn_qk_norm_dim_scale=scales, dim_head=16)
    assert made.norm_on == (qk_norm and attn_qk_norm)
    assert made.learned_scales == (qk_norm and attn_qk_norm and scales)
    assert made.softmax_scale == (10 if made.norm_on and not scales else 0.25)


def test_derived_sizes():
    assert config(heads=3).num_kv_heads == 1
    assert config(heads=3, attn_one_kv_head=False).num_kv_heads == 3
    assert config(dim_head=12).rotary_dim == 6
    assert config(rotary_xpos=False).rotary_dim == 0
    assert (config(depth=2).alpha, config(depth=2).beta) == (2**0.5, 0.5)
    assert (ModelConfig().alpha, ModelConfig().beta) == (pytest.approx(8**0.5), 0.25)


# ---- tokens


@pytest.mark.parametrize("kind", (list, tuple), ids=("list", "tuple"))
def test_tokens_in_every_form(kind):
    expected = torch.tensor([[3, 0, 22]])
    for form in (kind((3, 0, 22)), kind((kind((3, 0, 22)),)), expected, expected[0], expected.t()[:, 0]):
        read = read_tokens("Andromeda", form, 23, CPU)
        assert read.dtype == torch.int64 and torch.equal(read, expected)


WRONG_TOKENS = {
    "empty": ([], ValueError, "at least one token"),
    "empty_row": ([[]], ValueError, "at least one token.*empty row 0"),
    "second_row_empty": ([[1], []], ValueError, "at least one token.*empty row 1"),
    "ragged": ([[1, 2], [3]], ValueError, r"one length, got \[2, 1\]"),
    "list_then_int": ([[1], 2], TypeError, "got 2 as row 1"),
    "int_then_list": ([1, [2]], TypeError, r"must be ints, got \[2\] at row 0, position 1"),
    "deep": ([[[1]]], TypeError, r"must be ints, got \[1\]"),
    "too_large": ([[1, 2], [4, 23]], ValueError, "vocabulary size 23, got 23 at row 1, position 1"),
    "negative": ([1, -1], ValueError, "at least 0 .* got -1 at row 0, position 1"),
    "ignored_label": ([1, -100], ValueError, "got -100"),
    "huge": ([1, 2**70], ValueError, f"{2**70} at row 0, position 1 does not fit"),
    "float": ([1.0, 2], TypeError, "must be ints, got 1.0"),
    "bool": ([0, True], TypeError, "must be ints, got True at row 0, position 1"),
    "none": (None, TypeError, "NoneType"),
    "text": ("abc", TypeError, "str"),
    "text_in_list": (["a"], TypeError, "must be ints, got 'a'"),
    "int": (3, TypeError, "int"),
    "float_tensor": (torch.zeros(1, 3), TypeError, "int64, got float32"),
    "int32_tensor": (torch.zeros(1, 3, dtype=torch.int32), TypeError, "int64, got int32"),
    "bool_tensor": (torch.zeros(1, 3, dtype=torch.bool), TypeError, "int64, got bool"),
    "scalar_tensor": (torch.tensor(3), ValueError, r"shape .* got \(\)"),
    "cube": (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"shape .* got \(1, 2, 3\)"),
    "no_columns": (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"at least one token, got shape \(2, 0\)"),
    "tensor_too_large": (torch.tensor([[0, 1], [99, 0]]), ValueError, "got 99 at row 1, position 0"),
    "tensor_negative": (torch.tensor([0, -7]), ValueError, "got -7 at row 0, position 1"),
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "error", "match"), WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_wrong_tokens(tokens, error, match):
    with pytest.raises(error, match=f"^Andromeda: .*{match}"):
        read_tokens("Andromeda", tokens, 23, CPU)


def test_the_ignored_label_is_allowed_where_it_means_something():
    labels = torch.tensor([[1, -100, 22]])
    assert torch.equal(read_tokens("Andromeda", labels, 23, CPU, ignore_index=-100), labels)
    for wrong in (-1, -99, -101, 23):
        with pytest.raises(ValueError, match=f"23, or -100, got {wrong} at row 0, position 1"):
            read_tokens("Andromeda", [1, wrong], 23, CPU, ignore_index=-100)


def test_no_rows():
    """An empty batch is a batch."""
    tokens = torch.zeros(0, 3, dtype=torch.int64)
    assert read_tokens("Andromeda", tokens, 23, CPU).shape == (0, 3)


def test_rows_of_any_length():
    assert read_rows("generate", [[1, 2], (3,)]) == [[1, 2], [3]]
    assert read_rows("generate", (1, 2)) == [[1, 2]]


# ---- key_start


def test_key_start():
    assert read_key_start("Andromeda", None, 1, 2, CPU) is None
    for dtype in (torch.int32, torch.int64):
        read = read_key_start("Andromeda", torch.tensor([[0, 1]], dtype=dtype), 1, 2, CPU)
        assert read.dtype == torch.int32 and read.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("key_start", "error", "match"),
    [
        ([[0, 1]], TypeError, "int32 or int64 tensor, got list"),
        (torch.zeros(1, 2), TypeError, "int32 or int64 tensor, got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.int32), ValueError, r"\(1, 2\), got \(1, 3\)"),
        (torch.zeros(2, dtype=torch.int32), ValueError, r"\(1, 2\), got \(2,\)"),
    ],
    ids=("list", "float", "length", "flat"),
)
def test_wrong_key_start(key_start, error, match):
    with pytest.raises(error, match=f"^Andromeda: key_start must .*{match}"):
        read_key_start("Andromeda", key_start, 1, 2, CPU)
