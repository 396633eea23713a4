"""`andromeda train`: starts or resumes a run; a run remembers the options it was started with."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from andromeda import __version__
from andromeda.cli import interrupts
from andromeda.cli.arguments import DOC_MASK, SEED, integer, number
from andromeda.cli.console import UsageError, say, say_how_to_continue, show, show_evaluation
from andromeda.cli.loading import find_model, load_model, open_rows, tokenizer_of
from andromeda.cli.sizes import SIZES, model_arguments, parameter_count
from andromeda.config import ModelConfig
from andromeda.files import is_temporary, write_json

if TYPE_CHECKING:
    from andromeda import Andromeda
    from andromeda.data.packed import PackedDataset

DESCRIPTION = """\
Train a model on rows made by `build-dataset` (or on a text source, which is packed first).

Checkpoints go to DIR/checkpoint-N, the trained model to DIR/model, the figures of the run (step, loss, learning rate,
gradient norm, tokens/s, evaluations) to DIR/history.jsonl, one JSON object per line. However a run was interrupted,
`andromeda train --out DIR --resume` continues it exactly; the run remembers its options. Ctrl-C finishes the step,
saves and stops; a second Ctrl-C stops at once. A run that becomes unstable (a loss that is not finite) ends with an
error that names the step, and keeps its checkpoints.

Options that are not listed here go to transformers' TrainingArguments, so `torchrun --nproc-per-node 8 -m andromeda
train ... --fsdp` shards the model over eight devices.

  andromeda train rows --out run --size small --steps 2000
  andromeda train --out run --resume"""

_MODEL_HELP = {
    "dim": "width of the model",
    "depth": "number of blocks",
    "dim_head": "width of an attention head",
    "heads": "number of query heads",
    "alibi_num_heads": "heads with an ALiBi bias",
    "shift_tokens": "token shift, 0 for none (default: 1)",
    "num_tokens": "rows of the embedding (default: the tokenizer's, rounded up to a multiple of 128)",
    "max_seq_len": "window of generation (default: the row length)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.usage = "andromeda train [ROWS] --out DIR [--steps N | --resume] [options]"
    parser.add_argument("data", nargs="?", metavar="ROWS", help="folder of build-dataset, or a text source (see there)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
    parser.add_argument(
        "--eval-data", metavar="ROWS", help="rows to evaluate on, at the end and every --eval-every steps"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="default: the one saved in ROWS")
    parser.add_argument(
        "--seq-len", type=integer(1), metavar="N", help="row length, when ROWS is a text source (default: 1024)"
    )
    parser.add_argument("--doc-mask", action=argparse.BooleanOptionalAction, help=DOC_MASK + " (default: yes)")
    parser.add_argument("--from", dest="start", metavar="CHECKPOINT", help="start from the weights of a saved model")
    parser.add_argument("--json", metavar="FILE", help="also write the final figures to a file")

    training = parser.add_argument_group("training")
    for flag, kind, metavar, text in (
        ("--steps", integer(1), "N", "optimiser steps (required unless --resume)"),
        ("--batch-size", integer(1), "N", "rows per device and forward pass (default: 8)"),
        ("--gradient-accumulation", integer(1), "N", "forward passes per step (default: 1)"),
        ("--learning-rate", number(0, above=True), "X", "peak of the cosine schedule (default: 3e-4)"),
        ("--warmup-steps", integer(0), "N", "linear warm-up (default: one step in 25)"),
        ("--weight-decay", number(0), "X", "on matrices only (default: 0.1)"),
        ("--max-grad-norm", number(0), "X", "gradient clipping (default: 1.0)"),
        ("--seed", SEED, "N", "weights and order of the rows (default: 0)"),
        ("--log-every", integer(1), "N", "steps between figures (default: 10)"),
        ("--save-every", integer(0), "N", "steps between checkpoints (default: 500)"),
        ("--eval-every", integer(0), "N", "steps between evaluations on --eval-data (default: at the end)"),
        ("--sample-every", integer(0), "N", "steps between sample texts (default: none)"),
        ("--sample-prompt", str, "TEXT", "prompt of the sample texts"),
        ("--keep", integer(1), "N", "checkpoints to keep (default: 2)"),
        ("--num-workers", integer(0, 1024), "N", "processes that load rows (default: 0)"),
    ):
        training.add_argument(flag, type=kind, metavar=metavar, help=text)
    training.add_argument("--device", choices=("cpu",), help="cpu, even where there is a GPU")
    training.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on a GPU that has it)"
    )

    model = parser.add_argument_group("model", "Sizes and switches of `andromeda.Andromeda`.")
    model.add_argument(
        "--size",
        choices=SIZES,
        help="sizes to start from: 0.7, 72, 577 and 2200 million parameters without the vocabulary (default: small)",
    )
    for field in dataclasses.fields(ModelConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            model.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"(default: {field.default})")
        else:
            least = 0 if field.name in ("shift_tokens", "alibi_num_heads") else 1
            model.add_argument(flag, type=integer(least), metavar="N", help=_MODEL_HELP[field.name])


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
    folder = Path(arguments.out)
    again = f"andromeda train --out {shlex.quote(str(folder))} --resume"
    try:
        return _train(folder, arguments, again)
    except KeyboardInterrupt as error:
        if not (folder / _OPTIONS_FILE).is_file():
            raise
        say(f"andromeda: interrupted; this continues from the last checkpoint:\n    {again}")
        return interrupts.exit_code(error)


def _train(folder: Path, arguments: argparse.Namespace, again: str) -> int:
    from andromeda.training import TrainSettings, check_hub, sealed, train

    first = int(os.environ.get("RANK", "0")) == 0  # only the first of several processes (torchrun) prints and writes
    options = _options_of_run(arguments, folder, first)
    names = {field.name for field in dataclasses.fields(TrainSettings)} & {*options}
    try:
        settings = TrainSettings(output_dir=str(folder), **{name: options[name] for name in names})
        settings.training_arguments()
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if first:
        check_hub(settings)

    start = find_model(options["start"]) if "start" in options else None
    tokenizer = tokenizer_of(start or Path(options["data"]), options.get("tokenizer"))

    def open_packed(source: str) -> PackedDataset:
        seq_len, doc_mask = options.get("seq_len", 1024), options.get("doc_mask", True)
        return open_rows(source, tokenizer=tokenizer, seq_len=seq_len, doc_mask=doc_mask, verify=False)  # `train` does

    rows = open_packed(options["data"])
    held_out = open_packed(options["eval_data"]) if "eval_data" in options else None
    model = _new_model(options, rows, settings.seed) if start is None else load_model(start, "cpu", None)
    if first:
        say(f"training {parameter_count(model):,} parameters on {len(rows):,} rows of {rows.seq_len:,} tokens")
    # A run that did not reach its first checkpoint starts over, which gives the same result.
    resume = arguments.resume and any(folder.glob("checkpoint-*"))

    def remember() -> None:
        # Called after all checks, so that the file does not record options that fail them.
        stored = dict(options)
        if "trainer" in options:  # a token is a secret
            stored["trainer"] = {name: value for name, value in options["trainer"].items() if name != "hub_token"}
        write_json(folder / _OPTIONS_FILE, sealed({"andromeda": __version__, "options": stored}))

    result = train(
        model,
        rows,
        settings,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        resume=resume,
        evaluate_at_end="WORLD_SIZE" not in os.environ,
        on_start=None if resume and (folder / _OPTIONS_FILE).is_file() else remember,
    )
    if not first:
        return 0
    if result.interrupted:
        return say_how_to_continue(result, again)
    figures = {"training": dataclasses.asdict(result)}
    del figures["training"]["history"]
    evaluation = figures["training"].pop("evaluation")
    show(f"steps        {result.steps:,}" + (f", loss {result.loss:.4f}" if result.loss is not None else ""))
    if result.seconds:
        show(f"speed        {result.tokens_per_second:,.0f} tokens/s over {result.tokens:,} tokens")
    if result.mfu is not None:
        show(f"MFU          {100 * result.mfu:.1f} %")
    show(f"model        {folder / 'model'}")
    if result.evaluation is not None:
        figures["evaluation"] = evaluation
        show_evaluation(result.evaluation)
    if arguments.json:
        write_json(Path(arguments.json), figures)
    return 0


def _new_model(options: dict[str, Any], rows: PackedDataset, seed: int) -> Andromeda:
    import torch

    from andromeda import Andromeda

    arguments = model_arguments(options.get("size", "small"), rows.vocab_size, rows.seq_len)
    given = {field.name: options[field.name] for field in dataclasses.fields(ModelConfig) if field.name in options}
    torch.manual_seed(seed)
    return Andromeda(**arguments | given)


_OPTIONS_FILE = "train.json"
_NOT_OPTIONS = ("command", "run", "passes_on", "debug", "out", "resume", "json", "rest")
# --resume may change only these options.
_FREE_ON_RESUME = ("log_every", "save_every", "eval_every", "sample_every", "sample_prompt", "keep", "num_workers")


def _options_of_run(arguments: argparse.Namespace, folder: Path, first: bool) -> dict[str, Any]:
    """The options of the run: the given ones and, with --resume, those with which it was started."""
    given = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS and value is not None}
    for name in ("data", "eval_data", "tokenizer", "start"):
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())  # a run may be resumed from another folder
    if arguments.rest:
        given["trainer"] = _trainer_options(arguments.rest)
    missing = [flag for flag, name in (("ROWS", "data"), ("--steps", "steps")) if name not in given]
    record = folder / _OPTIONS_FILE
    if not arguments.resume:
        if first and (obstacle := _obstacle_to_a_new_run(folder)):
            raise UsageError(f"--out must be a new or empty folder, got {folder}, which {obstacle}, or choose another")
        if missing:
            raise UsageError(f"train needs {' and '.join(missing)} (or --resume)")
        return given
    if not record.is_file():
        # The run may have been killed before it wrote the file; then all options must be given again.
        if missing or not folder.is_dir():
            raise UsageError(
                f"--resume needs the folder of a run in --out, got {folder}, which has no {_OPTIONS_FILE}; give ROWS "
                "and all options again if a run was begun there"
            )
        return given
    from andromeda.training import of_hub, read_sealed

    try:
        stored: dict[str, Any] = read_sealed(record, ("options",))["options"]
    except ValueError as error:
        raise UsageError(f"{error}; remove it and give ROWS and all options again with --resume") from error
    if "trainer" in given:  # where the model is pushed may change
        kept = {name: value for name, value in stored.get("trainer", {}).items() if of_hub(name)}
        if not all(map(of_hub, given["trainer"])):
            given["trainer"] = kept | given["trainer"]
        else:
            given["trainer"] = stored["trainer"] = stored.get("trainer", {}) | given["trainer"]
    # Before the first checkpoint nothing depends on the options, so they may be corrected.
    begun = any(folder.glob("checkpoint-*"))
    changed = [name for name, value in given.items() if stored.get(name) != value and name not in _FREE_ON_RESUME]
    if changed and begun:
        lines = [f"\n    {name}: was {stored.get(name)!r}, is {given[name]!r}" for name in changed]
        raise UsageError(f"--resume continues a run as it was started, these options differ:{''.join(lines)}")
    return stored | given


def _obstacle_to_a_new_run(folder: Path) -> str | None:
    """Why a new run must not use `folder`, and the remedy; None if it may, also after a start that failed."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return None
    from andromeda.training import LEFT_BY_A_START

    names = {name for name in names if name not in (_OPTIONS_FILE, *LEFT_BY_A_START) and not is_temporary(name)}
    if any(re.fullmatch(r"checkpoint-\d+|model", name) for name in names):
        return "holds a run; continue it with --resume"
    return "is not empty; remove what is in it" if names else None


def _trainer_options(words: list[str]) -> dict[str, Any]:
    """The values of the options in `words`; transformers declares and parses them."""
    from transformers import HfArgumentParser, TrainingArguments

    declared: Any = TrainingArguments  # the parser's own annotation admits no class

    def error(message: str) -> NoReturn:
        raise UsageError(f"{message}; write --option=value (a word on its own may have been taken for ROWS)")

    parser = HfArgumentParser(declared, add_help=False, allow_abbrev=False)
    parser.error = error  # type: ignore[method-assign]  # theirs prints all their options
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)} (see `andromeda train --help`)")
    return vars(options)
