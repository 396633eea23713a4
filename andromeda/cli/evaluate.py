"""`andromeda eval`: measures how well a model predicts a text."""

import argparse
import dataclasses
from pathlib import Path

from andromeda.cli.arguments import DOC_MASK, add_model_options, integer
from andromeda.cli.console import show_evaluation
from andromeda.cli.loading import find_model, load_model, open_rows, read_device, tokenizer_of
from andromeda.files import write_json

DESCRIPTION = """\
Measure how well a model predicts a text: loss (nats per token), perplexity, and bits per byte, which
compares models with different tokenizers.

  andromeda eval run/model heldout.txt
  andromeda eval run/model rows --json figures.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    parser.add_argument("data", metavar="ROWS", help="folder of build-dataset, or a text source (see there)")
    parser.add_argument(
        "--seq-len",
        type=integer(2),
        metavar="N",
        help="row length, when ROWS is a text source (default: the model's window)",
    )
    parser.add_argument("--doc-mask", action=argparse.BooleanOptionalAction, default=True, help=DOC_MASK)
    parser.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="rows per forward pass")
    parser.add_argument("--max-rows", type=integer(1), metavar="N", help="use the first N rows only")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
    from andromeda.training import evaluate

    device = read_device(arguments.device)
    folder = find_model(arguments.checkpoint)
    tokenizer = tokenizer_of(folder, arguments.tokenizer)
    model = load_model(folder, device, arguments.dtype, finite=True)
    seq_len = model.config.max_position_embeddings if arguments.seq_len is None else arguments.seq_len
    rows = open_rows(arguments.data, tokenizer=tokenizer, seq_len=seq_len, doc_mask=arguments.doc_mask)
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
