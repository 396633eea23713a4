"""`andromeda eval`: measures how well a model predicts a text."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from andromeda.cli.arguments import DOC_MASK, add_model_options, integer
from andromeda.cli.console import UsageError, say, show, show_evaluation
from andromeda.cli.loading import find_model, load_model, open_rows, read_device, tokenizer_of
from andromeda.files import whole_file, write_json

if TYPE_CHECKING:
    from andromeda.training import DocumentLikelihood

DESCRIPTION = """\
Measure how well a model predicts a text: loss (nats per token), perplexity, and bits per byte, which
compares models with different tokenizers.

  andromeda eval run/model heldout.txt
  andromeda eval run/model rows --json figures.json
  andromeda eval run/model heldout.jsonl --exact

With --exact, whole documents are evaluated in windows as lm-eval's rolling log-likelihood does: every token is
predicted once, end tokens are not, and the first token of a document is predicted from the BOS token (the end token
of a tokenizer that has none). --json then also lists the likelihood of each document."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    parser.add_argument("data", metavar="ROWS", help="folder of build-dataset, or a text source (see there)")
    parser.add_argument(
        "--seq-len",
        type=integer(1),
        metavar="N",
        help="length of rows, when ROWS is a text source, or of windows, with --exact (default: the model's window)",
    )
    parser.add_argument(
        "--doc-mask",
        action=argparse.BooleanOptionalAction,
        help=f"{DOC_MASK} (default: yes)",
    )
    parser.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="rows per forward pass")
    parser.add_argument("--max-rows", type=integer(1), metavar="N", help="use the first N rows only")
    parser.add_argument("--exact", action="store_true", help="whole documents of a text source instead of packed rows")
    parser.add_argument(
        "--stride",
        type=integer(1),
        metavar="N",
        help="with --exact: tokens that each further window predicts; fewer give more context and take longer "
        "(default: a whole window, as lm-eval)",
    )
    parser.add_argument(
        "--max-documents", type=integer(1), metavar="N", help="with --exact: use the first N documents only"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
    _check_options(arguments)
    return _run_exact(arguments) if arguments.exact else _run_rows(arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that the chosen way of evaluating would ignore."""
    from andromeda.data.cache import METADATA_FILE

    if not arguments.exact:
        for option in ("stride", "max_documents"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')} needs --exact, which evaluates whole documents")
        if arguments.seq_len == 1:
            raise UsageError("--seq-len must be at least 2 for rows, got 1")
        return
    if arguments.max_rows is not None:
        raise UsageError("--max-rows must be left out with --exact, which has no rows; --max-documents limits it")
    if arguments.doc_mask is not None:
        raise UsageError("--doc-mask must be left out with --exact: no window reaches beyond its document")
    if (Path(arguments.data) / METADATA_FILE).is_file():
        raise UsageError(
            f"--exact needs whole documents, got the packed rows in {arguments.data}: name the text that they were "
            "packed from, or leave --exact out"
        )


def _run_rows(arguments: argparse.Namespace) -> int:
    from andromeda.training import evaluate

    device = read_device(arguments.device)
    folder = find_model(arguments.checkpoint)
    tokenizer = tokenizer_of(folder, arguments.tokenizer)
    model = load_model(folder, device, arguments.dtype, finite=True)
    seq_len = model.config.max_position_embeddings if arguments.seq_len is None else arguments.seq_len
    doc_mask = True if arguments.doc_mask is None else arguments.doc_mask
    rows = open_rows(arguments.data, tokenizer=tokenizer, seq_len=seq_len, doc_mask=doc_mask)
    evaluation = evaluate(
        model,
        rows,
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        max_rows=arguments.max_rows,
        progress=True,
    )
    show_evaluation(evaluation)
    if arguments.json:
        write_json(
            Path(arguments.json), {"model": str(folder), "data": arguments.data, **dataclasses.asdict(evaluation)}
        )
    return 0


def _run_exact(arguments: argparse.Namespace) -> int:
    from andromeda.data.sources import open_source
    from andromeda.training import evaluate_documents

    device = read_device(arguments.device)
    folder = find_model(arguments.checkpoint)
    tokenizer = tokenizer_of(folder, arguments.tokenizer)
    source = open_source(arguments.data)
    model = load_model(folder, device, arguments.dtype, finite=True)
    with _figures(arguments.json) as (on_document, finish):
        evaluation = evaluate_documents(
            model,
            source,
            tokenizer=tokenizer,
            window=arguments.seq_len,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            max_documents=arguments.max_documents,
            on_document=on_document,
            progress=True,
        )
        finish({"model": str(folder), "data": arguments.data, **dataclasses.asdict(evaluation)})
    show_evaluation(evaluation)
    show(f"documents      {evaluation.documents:,} with {evaluation.bytes:,} bytes of text")
    show(f"windows        {evaluation.windows:,} of {evaluation.window:,} tokens, stride {evaluation.stride:,}")
    if count := evaluation.empty_documents:
        more = f" and {count - 3:,} more" if count > 3 else ""
        show(f"empty          {count:,} without a token: {', '.join(evaluation.empty[:3])}{more}")
    say(
        "andromeda: these figures differ from those without --exact, where end tokens are predicted too, rows begin "
        "without context, and the last tokens that fill no row are left out"
    )
    return 0


@contextlib.contextmanager
def _figures(
    path: str | None,
) -> Iterator[tuple[Callable[[DocumentLikelihood], None] | None, Callable[[dict[str, Any]], None]]]:
    """Functions that write the likelihood of each document, and then the figures, to one JSON file.

    The documents are written as they come; the file appears when the block ends without an error.
    """
    if path is None:
        yield None, lambda figures: None
        return
    with whole_file(path) as file:
        file.write(b'{\n  "per_document": [')
        between = b"\n    "

        def on_document(document: DocumentLikelihood) -> None:
            nonlocal between
            entry = {**dataclasses.asdict(document), "bits_per_byte": document.bits_per_byte}
            file.write(between + json.dumps(entry).encode())
            between = b",\n    "

        def finish(figures: dict[str, Any]) -> None:
            file.write(b"\n  ],\n" + json.dumps(figures, indent=2).encode()[2:] + b"\n")

        yield on_document, finish
