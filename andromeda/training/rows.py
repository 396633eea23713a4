"""Rows of a dataset: stacked into batches, checked before the training, and fingerprinted for a continuation."""

import hashlib

import torch

from andromeda.training.messages import say

IGNORED_LABEL = -100  # label of a token that is not predicted


def collate(rows: list) -> dict:
    """Stack rows, dicts of tensors of equal shape, into one dict of batches."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fingerprint(dataset) -> dict:
    """Enough of a dataset to notice that it is another one.

    Its length, a hash of its first, middle and last row, and the checksum of all its rows where the dataset knows one
    (`content_checksum`, as `PackedDataset` does), or else a hash of up to 32 rows spread over it.
    """
    last = len(dataset) - 1
    content = getattr(dataset, "content_checksum", None)
    if content is None:
        content = _hash_of_rows(dataset, sorted({last * part // 31 for part in range(32)}))
    return {"rows": len(dataset), "sha256": _hash_of_rows(dataset, (0, len(dataset) // 2, last)), "content": content}


def _hash_of_rows(dataset, indices) -> str:
    digest = hashlib.sha256()
    for index in indices:
        for name, value in sorted(dataset[index].items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def check_rows(name: str, dataset, verify: bool):
    """ValueError if rows are not as they were written, where the dataset can tell, or nothing in them is predicted."""
    if verify and callable(check := getattr(dataset, "verify", None)) and check() is False:
        say(f"train: {name} is of an older version and has no checksums: damage would not be noticed")
    for index in range(len(dataset)):  # as a rule the first one
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
