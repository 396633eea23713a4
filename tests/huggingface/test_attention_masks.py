"""Masks, positions and documents in the forms of transformers become `key_start`."""

import pytest
import torch

from andromeda.huggingface import attention_masks as masks


def starts(visibility):
    return visibility.key_start.tolist()


def test_padding_hides_the_tokens_before_the_first_real_one():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    for form in (mask, mask.bool(), mask.float(), mask.int()):
        found = masks.read_mask(form, 4, 4, 0, check=True)
        assert starts(found) == [[2] * 4, [0] * 4, [1] * 4, [4] * 4]
        assert found.key_start.dtype == torch.int32 and found.padded_right and found.order is None


def test_a_mask_that_hides_nothing_is_no_mask():
    assert masks.read_mask(torch.ones(2, 5), 2, 5, 0, check=True) == (None, None, False)
    unchecked = masks.read_mask(torch.ones(2, 5), 2, 5, 0, check=False)
    assert starts(unchecked) == [[0] * 5] * 2


def test_padding_between_tokens_gives_an_order():
    found = masks.read_mask(torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 0]]), 2, 5, 0, check=True)
    assert found.order.tolist() == [[1, 2, 0, 3, 4], [4, 0, 1, 2, 3]]
    assert starts(found) == [[2] * 5, [1] * 5] and not found.padded_right


def test_a_mask_counts_the_tokens_of_the_cache():
    found = masks.read_mask(torch.tensor([[0, 1, 1, 1, 1]]), 1, 2, 3, check=True)
    assert starts(found) == [[1, 1]]
    with pytest.raises(ValueError, match=r"shape \(batch, cached tokens \+ seqlen\) = \(1, 5\), got \(1, 4\)"):
        masks.read_mask(torch.ones(1, 4), 1, 2, 3, check=True)
    with pytest.raises(ValueError, match="padding on the left of the first call where a cache is used"):
        masks.read_mask(torch.tensor([[1, 0, 1, 1, 1]]), 1, 2, 3, check=True)


def causal(key_start, n):
    """(batch, 1, n, n) bool: token t sees key_start[t] ... t."""
    key, query = torch.arange(n), torch.arange(n)[:, None]
    return ((key >= torch.tensor(key_start)[..., None]) & (key <= query))[:, None]


@pytest.mark.parametrize("past", [0, 2])
def test_a_causal_mask_with_padding_or_documents(past):
    wanted = [[0, 0, 2, 2, 2], [1, 1, 1, 1, 4]]
    full = causal(wanted, 5)
    full[1, 0, 0] = False  # padding sees nothing
    full[1, 0, :, 0] = False
    expected = [row[past:] for row in [[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]]]
    mask = full[:, :, past:]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for form in (mask, additive, torch.nn.functional.pad(mask, (0, 3))):  # a cache of fixed size has room for more
        assert starts(masks.read_mask(form, 2, 5 - past, past, check=True)) == expected
        assert starts(masks.read_mask(form, 2, 5 - past, past, check=False)) == expected


def test_a_causal_mask_alone_is_no_mask():
    assert masks.read_mask(causal([[0] * 4], 4), 3, 4, 0, check=True).key_start is None


@pytest.mark.parametrize(
    "change", [(2, 3, True), (3, 1, False), (2, 2, False)], ids=["sees the next", "hole", "not itself"]
)
def test_other_masks_are_refused(change):
    mask = causal([[0] * 4], 4)
    query, key, value = change
    mask[0, 0, query, key] = value
    with pytest.raises(ValueError, match=f"must be causal.*token {query} of batch entry 0"):
        masks.read_mask(mask, 1, 4, 0, check=True)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 1, seqlen"):
        masks.read_mask(mask.expand(1, 2, 4, 4), 1, 4, 0, check=True)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "positions, expected",
    [
        ([[0, 1, 0, 1, 2]], [0, 0, 2, 2, 2]),
        ([[5, 6, 5, 6, 7]], [0, 0, 2, 2, 2]),  # documents may begin anywhere
        ([[0, 1, 7, 8, 9]], [0, 0, 2, 2, 2]),
        ([[0, 0, 0, 1, 2]], [0, 1, 2, 2, 2]),  # generate gives padding the position 0 or 1
    ],
)
def test_a_document_begins_where_positions_do_not_go_on(positions, expected, check):
    assert masks.read_positions(torch.tensor(positions), 2, 5, 0, check=check).tolist() == [expected] * 2
    cached = masks.read_positions(torch.tensor(positions), 1, 5, 10, check=check)
    assert cached.tolist() == [[10 + start if start else 0 for start in expected]]


def test_consecutive_positions_say_nothing():
    assert masks.read_positions(torch.arange(3, 8), 2, 5, 3, check=True) is None
    assert masks.read_positions(torch.arange(3, 8), 2, 5, 3, check=False).tolist() == [[0] * 5] * 2


def test_documents_by_number_and_by_length():
    index = torch.tensor([[4, 4, 1, 1, 1, 9]], dtype=torch.int32)
    assert masks.read_documents(index, 1, 6, 0, check=True).tolist() == [[0, 0, 2, 2, 2, 5]]
    lengths = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    assert masks.read_lengths(lengths, 1, 6, check=False).tolist() == [[0, 0, 2, 2, 2, 5]]
    assert masks.read_lengths(torch.tensor([0, 6]), 1, 6, check=True) is None
    with pytest.raises(ValueError, match="cu_seq_lens_q must have shape"):
        masks.read_lengths(lengths, 2, 6, check=True)
    with pytest.raises(ValueError, match="must begin with 0 and end with seqlen, 9"):
        masks.read_lengths(lengths, 1, 9, check=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q must not decrease"):
        masks.read_lengths(torch.tensor([0, 4, 2, 6]), 1, 6, check=True)
    with pytest.raises(TypeError, match="cu_seq_lens_q must be a tensor of integers, got list"):
        masks.read_lengths([0, 2, 6], 1, 6, check=True)
    with pytest.raises(TypeError, match=r"seq_idx must be a tensor of integers, got torch\.float32"):
        masks.read_documents(index.float(), 1, 6, 0, check=True)


def test_both_limits_hold():
    one, other = torch.tensor([[0, 1, 1]], dtype=torch.int32), torch.tensor([[0, 0, 2]], dtype=torch.int32)
    assert masks.both(one, other).tolist() == [[0, 1, 2]]
    assert masks.both(None, other) is other and masks.both(one, None) is one and masks.both(None, None) is None
