"""Rows of a data set: stacking into batches, checks before training, and a fingerprint that identifies them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from andromeda.training.messages import say

IGNORED_LABEL = -100  # label of a token that is not predicted

Row: TypeAlias = Mapping[str, torch.Tensor]


class Rows(Protocol):
    """A data set: dicts of tensors `input_ids`, `labels` and, optionally, `key_start`, all of one length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Stack rows, dicts of tensors of equal shape, into one dict of batches."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check_rows(name: str, dataset: Rows, verify: bool) -> None:
    """Refuse a data set that is unfit for training or evaluation. name: of the argument, for messages.

    verify: ask the data set, where it supports this, whether its files have changed since they were written.

    Raises:
        ValueError: a file has changed; a row lacks a column or is too short; no row has a token to predict.
    """
    if verify and callable(check := getattr(dataset, "verify", None)) and check() is False:
        say(f"train: {name} is of an older version and has no checksums: damage would not be noticed")
    for index in range(len(dataset)):  # usually the first row has a token to predict
        row = dataset[index]
        if missing := [column for column in ("input_ids", "labels") if column not in row]:
            raise ValueError(f"train: {name} must have rows with {', '.join(missing)}, got {', '.join(row)}")
        labels = row["labels"]
        if len(labels) < 2:
            raise ValueError(f"train: {name} must have rows of at least 2 tokens, got {len(labels)} in row {index}")
        if (labels[1:] != IGNORED_LABEL).any():
            return
    raise ValueError(
        f"train: {name} must have a token to predict, got {len(dataset)} rows with the label {IGNORED_LABEL} (ignored) "
        "at every position that has a token before it"
    )


def fingerprint(dataset: Rows) -> dict[str, int | str]:
    """Values that distinguish a data set from others.

    Its length, a hash of its first, middle and last row, and a checksum of all rows where the data set knows one
    (`content_checksum`, as `PackedDataset` does), or else a hash of up to 32 rows spread over it.
    """
    last = len(dataset) - 1
    content = getattr(dataset, "content_checksum", None)
    if content is None:
        content = _hash_of_rows(dataset, sorted({last * part // 31 for part in range(32)}))
    return {"rows": len(dataset), "sha256": _hash_of_rows(dataset, (0, len(dataset) // 2, last)), "content": content}


def _hash_of_rows(dataset: Rows, indices: Iterable[int]) -> str:
    digest = hashlib.sha256()
    for index in indices:
        for name, value in sorted(dataset[index].items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()
