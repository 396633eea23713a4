"""The command `andromeda`: thin argument parsing over the public functions.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by
signal n (130 for Ctrl-C). Everything that loads transformers or datasets is imported by the command that needs it.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from andromeda import __version__, interrupts, threads
from andromeda.arguments import integer, not_empty, number
from andromeda.config import ModelConfig
from andromeda.files import check_output, check_output_folder, is_temporary, write_json
from andromeda.runs import (
    SIZES,
    UsageError,
    find_model,
    load_model,
    load_tokenizer,
    open_rows,
    pack,
    parameter_count,
    read_device,
    read_prompt,
    round_up,
    say,
    texts_of,
    tokenizer_of,
    training_device,
)

SEED = integer(0, 2**32 - 1)  # what every random generator takes


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: the words after `andromeda`; default: those of this process."""
    debug = os.environ.get("ANDROMEDA_DEBUG") == "1"
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
        arguments = _read_arguments(argv)
        debug = debug or arguments.debug
        _check_outputs(arguments)
        if arguments.command != "info" and (note := threads.note()):
            say(f"andromeda: {note}")
        if arguments.command in ("train", "quickstart"):
            interrupts.be_patient()
        code = arguments.run(arguments) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is an error here, not a complaint of Python at exit
        return code
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also panics of libraries in Rust, which are no Exception
        return _failed(error, debug)


def _of_stdout(error: BaseException) -> BaseException:
    """An error of printing in words, others as they are. All that this file itself writes is stdout."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return error
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    if frame.f_code.co_filename != __file__:
        return error
    _give_up_stdout()
    return OSError(f"cannot write to standard output: {error.strerror}")


def _give_up_stdout() -> None:
    """Point stdout elsewhere, so that Python does not complain at exit about what it could not write."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(error: BaseException, debug: bool) -> int:
    """Say in a line what ended the command; returns the exit code. With `debug` what is no interruption is raised."""
    if interrupt := _interrupt_behind(error):
        say("andromeda: interrupted")
        return interrupts.exit_code(interrupt)
    if isinstance(error, BrokenPipeError):
        _give_up_stdout()  # its reader has gone
        return 1
    error = _of_stdout(error)
    if debug:
        raise error
    say(f"andromeda: error: {_message(error)}")
    if isinstance(error, UsageError):
        return 2
    say("andromeda: --debug shows where this happened")
    return 1


def _interrupt_behind(error: BaseException) -> BaseException | None:
    """The interruption that an error followed from: libraries turn one into errors of their own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None and interrupts.seen() else seen


# Their messages are sentences; those of others, such as KeyError, say little without the name of the class.
_SAY_ENOUGH = (UsageError, OSError, ValueError, TypeError, RuntimeError, ImportError)


def _message(error: BaseException) -> str:
    """The text of an error: its further lines indented, and what it came up in if that is another error."""
    kind = type(error).__name__
    text = str(error).strip()
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        text = f"not enough memory{f' ({text})' if text else ''}; a smaller batch, row or model needs less"
    elif not text or not isinstance(error, _SAY_ENOUGH) or isinstance(error, RecursionError):
        text = f"{kind}: {text}" if text else kind
    first, *rest = text.splitlines()
    lines = [first, *(line if line.startswith(" ") or not line else f"    {line}" for line in rest)]
    before = error.__context__
    if before is not None and error.__cause__ is None and not error.__suppress_context__:
        lines.append(f"    (after {type(before).__name__}: {str(before).strip().partition(chr(10))[0]})")
    return "\n".join(lines)


def _read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see `andromeda {arguments.command} --help`)")
    arguments.rest = rest
    return arguments


_INPUTS = ("source", "data", "eval_data", "checkpoint", "start", "tokenizer", "prompt_file")
# Files and folders of models, rows and runs: figures must not take their names there.
_OURS = re.compile(
    r"model|checkpoint-\d+|.*\.(safetensors|arrow)|history\.jsonl|(train|quickstart|metadata|config|generation_config|"
    r"andromeda|andromeda_checkpoint|trainer_state|tokenizer|tokenizer_config|special_tokens_map)\.json"
)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse what could not be written, before any work. One place for the outputs of all commands."""
    folder, file = getattr(arguments, "out", None), getattr(arguments, "json", None)
    try:
        option = "--out"
        if folder is not None:
            check_output_folder(folder)
        option = "--json"
        if isinstance(file, str):  # `info --json` is a switch
            inside = folder is not None and os.path.realpath(os.path.dirname(file)) == os.path.realpath(folder)
            _check_figures(arguments, file, folder, inside)
            if not inside or os.path.isdir(folder):  # else the command will make the folder
                check_output(file)
    except OSError as error:
        raise UsageError(f"{option}: {error}") from error


def _check_figures(arguments: argparse.Namespace, file: str, folder: str | None, inside: bool) -> None:
    """Refuse to write figures over something else that the command reads or writes."""
    given = [path for name in _INPUTS if (path := getattr(arguments, name, None)) and os.path.isfile(path)]
    if os.path.isfile(file) and any(os.path.samefile(file, path) for path in given):
        raise UsageError(f"--json: {file} is what the command reads; choose another file")
    if folder is not None and os.path.realpath(file) == os.path.realpath(folder):
        raise UsageError(f"--json: {file} is the folder that --out names; choose another file")
    if (inside or os.path.exists(file)) and _OURS.fullmatch(os.path.basename(os.path.realpath(file))):
        raise UsageError(f"--json: {file} is a file of a model, of rows or of a run; choose another name")


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register("type", None, not_empty)  # of options without a type: the names of files and other things

    def error(self, message):
        self.exit(2, f"andromeda: error: {message}\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of descriptions, and ends an option's help with its default unless there is none."""

    def _get_help_string(self, action):
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):  # 0 is a default
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (also ANDROMEDA_DEBUG=1)")
    parser = _Parser(
        prog="andromeda",
        description="Train and run Andromeda language models.",
        epilog="`andromeda COMMAND --help` explains a command. Start with `andromeda quickstart`: it needs no network.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"andromeda {__version__}")
    parser.register("type", None, str)  # of the words of a command, which its own parser reads
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, run, summary, description, passes_on=False):
        sub = commands.add_parser(
            name,
            help=summary,
            description=description,
            parents=[common],
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, passes_on=passes_on)
        return sub

    info = command("info", _info, "versions, devices, and which kernels run here", _INFO)
    info.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    _quickstart_options(
        command("quickstart", _quickstart, "train a small model on this machine's Python library", _QUICK)
    )
    _build_options(command("build-dataset", _build_dataset, "tokenise and pack text into rows", _BUILD))
    _train_options(command("train", _train, "train a model on packed rows", _TRAIN, passes_on=True))
    _generate_options(command("generate", _generate, "continue a prompt", _GENERATE))
    _eval_options(command("eval", _evaluate, "loss, perplexity and bits per byte on a text", _EVAL))
    return parser


# ---- info

_INFO = """\
Say what is installed, how the extension was built, which devices there are, and for each operation
which backend would run and why the others would not."""


def _info(arguments) -> int:
    from andromeda.info import gather_info, info_table

    facts = gather_info()
    print(json.dumps(facts, indent=2) if arguments.json else info_table(facts))
    return 0


# ---- build-dataset

_BUILD = """\
Tokenise text, pack it into rows of equal length without padding, and write them to a folder that
`train` and `eval` read. The tokenizer is saved inside it, so those commands need not be told.

SOURCE is a text, json, jsonl, csv, parquet or arrow file, a folder of them, a pipe (- is standard input), or the name
of a data set on the hub. gzip, bzip2, xz and zstd are unpacked on the way.

  andromeda build-dataset corpus.txt --train-tokenizer 8192 --seq-len 1024 --out rows
  andromeda build-dataset corpus.jsonl --tokenizer EleutherAI/gpt-neox-20b --out rows
  zcat stories.gz | andromeda build-dataset - --train-tokenizer 8192 --document-separator '<|endoftext|>' --out rows"""


def _build_options(parser):
    parser.add_argument("source", metavar="SOURCE", help="file, folder or hub name")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="NAME", help="hub name, folder or tokenizer.json")
    which.add_argument(
        "--train-tokenizer", type=integer(1), metavar="N", help="train a byte-level BPE of N tokens on SOURCE"
    )
    parser.add_argument("--seq-len", type=integer(1), default=1024, metavar="N", help="tokens per row")
    parser.add_argument(
        "--num-cpu", type=integer(1, 1024), metavar="N", help="processes that tokenise (default: one with all cores)"
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="column with the text (default: `text`, or the only one that may be it)"
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="of a folder, read only the files that match (may be repeated)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="of a folder, leave out files and folders that match (may be repeated)",
    )
    parser.add_argument("--document-separator", metavar="TEXT", help="what stands between documents in text files")
    parser.add_argument(
        "--format",
        choices=("text", "json", "jsonl", "csv", "tsv", "parquet", "arrow"),
        help="how to read SOURCE (default: by the suffixes of the names, else by the content)",
    )
    parser.add_argument("--split", metavar="NAME", help="split of a hub data set (default: train)")
    parser.add_argument(
        "--packing", choices=("stream", "bfd"), default="stream", help="bfd keeps documents whole and pads"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="what to do with text that is not UTF-8",
    )
    parser.add_argument("--hub-repo", metavar="REPO", help="also upload the rows to this data set repository")


def _build_dataset(arguments) -> int:
    from andromeda import AndromedaTokenizer
    from andromeda.data.sources import open_source

    target = Path(arguments.out)
    if target.exists():
        raise UsageError(f"--out must be a new folder, got {target}, which exists; remove it or choose another")
    source = open_source(
        arguments.source,
        arguments.split,
        text_column=arguments.text_column,
        errors=arguments.errors,
        include=arguments.include,
        exclude=arguments.exclude,
        separator=arguments.document_separator,
        format=arguments.format,
    )
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        source.keep()  # the packing reads it again
        texts = texts_of(source, errors=arguments.errors)
        tokenizer = AndromedaTokenizer.train(texts, arguments.train_tokenizer, progress=sys.stderr.isatty())
    rows = pack(
        source,
        target,
        tokenizer,
        seq_len=arguments.seq_len,
        num_cpu=arguments.num_cpu,
        hf_account_repo=arguments.hub_repo,
        packing=arguments.packing,
        errors=arguments.errors,
    )
    print(f"rows         {len(rows):,} of {rows.seq_len:,} tokens in {target}")
    formats = ", ".join(f"{count:,} {name}" for name, count in rows.metadata["formats"].items())
    if formats:
        print(f"formats      {formats}")
    if rows.metadata["text_column"] is not None:
        print(f"text column  {rows.metadata['text_column']}")
    for name, value in rows.statistics.items():
        if value and name != "rows":
            print(f"{name.replace('_', ' '):12} {value:,}")
    for line in rows.metadata["skipped"]:
        print(f"left out     {line}")
    for line in rows.metadata["notes"]:
        print(f"note         {line}")
    print(f"vocabulary   {rows.vocab_size:,} ids (tokenizer in {target / 'tokenizer'})")
    return 0


# ---- train

_TRAIN = """\
Train a model on rows made by `build-dataset` (or on a text source, packed on the way).

Checkpoints go to DIR/checkpoint-N, the trained model to DIR/model, the figures of the run (step, loss, learning rate,
gradient norm, tokens/s, evaluations) to DIR/history.jsonl, one JSON object per line. A run that was interrupted, in
whatever way, continues exactly with `andromeda train --out DIR --resume`; it remembers its options. Ctrl-C finishes the
step, saves and stops; a second Ctrl-C stops at once. A run that becomes unstable (a loss that is not finite) ends with
an error that names the step, and keeps its checkpoints.

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
_DOC_MASK = "keep attention from looking beyond the start of a document"


def _train_options(parser):
    parser.usage = "andromeda train [ROWS] --out DIR [--steps N | --resume] [options]"
    parser.add_argument("data", nargs="?", metavar="ROWS", help="folder of build-dataset, or a text source as there")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
    parser.add_argument(
        "--eval-data", metavar="ROWS", help="rows to evaluate on, at the end and every --eval-every steps"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="default: the one inside ROWS")
    parser.add_argument(
        "--seq-len", type=integer(1), metavar="N", help="row length, when ROWS is a text source (default: 1024)"
    )
    parser.add_argument("--doc-mask", action=argparse.BooleanOptionalAction, help=_DOC_MASK + " (default: yes)")
    parser.add_argument("--from", dest="start", metavar="CHECKPOINT", help="start from the weights of a saved model")
    parser.add_argument("--json", metavar="FILE", help="also write the figures of the end to a file")

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
        ("--sample-prompt", str, "TEXT", "what the sample texts continue"),
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


def _train(arguments) -> int:
    folder = Path(arguments.out)
    again = f"andromeda train --out {shlex.quote(str(folder))} --resume"
    try:
        return _train_in(folder, arguments, again)
    except KeyboardInterrupt as error:
        if not (folder / _OPTIONS_FILE).is_file():
            raise
        say(f"andromeda: interrupted; this continues from the last checkpoint:\n    {again}")
        return interrupts.exit_code(error)


def _train_in(folder: Path, arguments, again: str) -> int:
    from andromeda.training import TrainSettings, evaluate, sealed, train

    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun started, one writes and speaks
    options = _train_choices(arguments, folder, first)
    try:
        settings = TrainSettings(
            output_dir=str(folder),
            **{name: options[name] for name in _settings_names() if name in options},
        )
        settings.training_arguments()
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error

    start = find_model(options["start"]) if "start" in options else None
    tokenizer = tokenizer_of(start or Path(options["data"]), options.get("tokenizer"))
    packing = {"seq_len": options.get("seq_len", 1024), "doc_mask": options.get("doc_mask", True)}
    packing["verify"] = False  # `train` does it
    rows = open_rows(options["data"], tokenizer=tokenizer, **packing)
    held_out = open_rows(options["eval_data"], tokenizer=tokenizer, **packing) if "eval_data" in options else None
    model = _new_model(options, rows, settings.seed) if start is None else load_model(start, "cpu", None)
    if first:
        say(f"training {parameter_count(model):,} parameters on {len(rows):,} rows of {rows.seq_len:,} tokens")
    # A run that did not come to its first checkpoint begins anew, which is just as exact.
    resume = arguments.resume and any(folder.glob("checkpoint-*"))

    def remember():
        # After all checks: options that fail them must not stand in the way of the corrected ones.
        write_json(folder / _OPTIONS_FILE, sealed({"andromeda": __version__, "options": options}))

    result = train(
        model,
        rows,
        settings,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        resume=resume,
        on_start=None if resume and (folder / _OPTIONS_FILE).is_file() else remember,
    )
    if not first:
        return 0
    if result.interrupted:
        return _interrupted(result, again)
    figures = {"training": {name: value for name, value in dataclasses.asdict(result).items() if name != "history"}}
    print(f"steps        {result.steps:,}" + (f", loss {result.loss:.4f}" if result.loss is not None else ""))
    if result.seconds:
        print(f"speed        {result.tokens_per_second:,.0f} tokens/s over {result.tokens:,} tokens")
    if result.mfu is not None:
        print(f"MFU          {100 * result.mfu:.1f} %")
    print(f"model        {folder / 'model'}")
    if held_out is not None and "WORLD_SIZE" not in os.environ:
        evaluation = evaluate(model, held_out, tokenizer=tokenizer, batch_size=settings.batch_size, progress=True)
        figures["evaluation"] = dataclasses.asdict(evaluation)
        _print_evaluation(evaluation)
    if arguments.json:
        write_json(Path(arguments.json), figures)
    return 0


_OPTIONS_FILE = "train.json"
_NOT_OPTIONS = ("command", "run", "passes_on", "debug", "out", "resume", "json", "rest")
# What a resumed run may do otherwise; everything else has to stay.
_FREE_ON_RESUME = ("log_every", "save_every", "eval_every", "sample_every", "sample_prompt", "keep", "num_workers")


def _train_choices(arguments, folder: Path, first: bool) -> dict:
    """The options of the run: those given, and on --resume those it was started with."""
    given = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS and value is not None}
    for name in ("data", "eval_data", "tokenizer", "start"):
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())  # a run may be resumed from another folder
    if arguments.rest:
        given["trainer"] = _trainer_options(arguments.rest)
    missing = [flag for flag, name in (("ROWS", "data"), ("--steps", "steps")) if name not in given]
    record = folder / _OPTIONS_FILE
    if not arguments.resume:
        if first and (held := _what_holds(folder)):
            raise UsageError(f"--out must be a new or empty folder, got {folder}, which {held}, or choose another")
        if missing:
            raise UsageError(f"train needs {' and '.join(missing)} (or --resume)")
        return given
    if not record.is_file():
        # The run may have been killed before it could write the file: then all options are to be given again.
        if missing or not folder.is_dir():
            raise UsageError(
                f"--resume needs the folder of a run in --out, got {folder}, which has no {_OPTIONS_FILE}; give ROWS "
                "and all options again if a run was begun there"
            )
        return given
    from andromeda.training import read_sealed

    try:
        stored = read_sealed(record, ("options",))["options"]
    except ValueError as error:
        raise UsageError(f"{error}; remove it and give ROWS and all options again with --resume") from error
    # Before its first checkpoint nothing depends on the options: they may be corrected.
    begun = any(folder.glob("checkpoint-*"))
    changed = [name for name, value in given.items() if stored.get(name) != value and name not in _FREE_ON_RESUME]
    if changed and begun:
        lines = [f"\n    {name}: was {stored.get(name)!r}, is {given[name]!r}" for name in changed]
        raise UsageError(f"--resume continues a run as it was started, these options differ:{''.join(lines)}")
    return stored | given


def _what_holds(folder: Path) -> str | None:
    """What is in the way of a new run in `folder`, and the remedy; None if there is nothing but a start that failed."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return None
    from andromeda.training import LEFT_BY_A_START

    names = {name for name in names if name not in (_OPTIONS_FILE, *LEFT_BY_A_START) and not is_temporary(name)}
    if any(re.fullmatch(r"checkpoint-\d+|model", name) for name in names):
        return "holds a run; continue it with --resume"
    return "is not empty; remove what is in it" if names else None


def _settings_names() -> set[str]:
    from andromeda.training import TrainSettings

    return {field.name for field in dataclasses.fields(TrainSettings)} - {"output_dir"}


def _trainer_options(words: list[str]) -> dict:
    """Options that are not ours, read as transformers reads them; only those that were given."""
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)} (see `andromeda train --help`)")
    return vars(options)


def _new_model(options: dict, rows, seed: int):
    import torch

    from andromeda import Andromeda

    sizes = {"num_tokens": round_up(rows.vocab_size, 128), "max_seq_len": rows.seq_len} | SIZES[
        options.get("size", "small")
    ]
    sizes |= {field.name: options[field.name] for field in dataclasses.fields(ModelConfig) if field.name in options}
    torch.manual_seed(seed)
    return Andromeda(**sizes)


def _interrupted(result, command: str) -> int:
    """Say how to go on after a signal ended the training."""
    say(f"andromeda: stopped by {result.interrupted} after step {result.steps}; this continues exactly:\n    {command}")
    return 128 + signal.Signals[result.interrupted]


# ---- generate

_GENERATE = """\
Continue a prompt with a trained model. The text appears as it is made.

  andromeda generate run/model --prompt "Once upon" --tokens 200
  andromeda generate run/model --prompt-file story.txt --temperature 0"""


def _generate_options(parser):
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", type=str, metavar="TEXT", help="what to continue")
    which.add_argument(
        "--prompt-file", metavar="FILE", help="file with what to continue, in UTF-8; - is standard input"
    )
    parser.add_argument("--tokens", type=integer(1), default=128, metavar="N", help="most tokens to generate")
    parser.add_argument("--temperature", type=number(0), default=0.8, metavar="X", help="0 takes the likeliest token")
    filters = parser.add_mutually_exclusive_group()
    filters.add_argument(
        "--top-k", type=integer(1), metavar="N", help="sample among the N likeliest tokens (default: a tenth)"
    )
    filters.add_argument("--top-p", type=number(0, 1), metavar="X", help="sample among the likeliest that add up to X")
    filters.add_argument(
        "--min-p", type=number(0, 1), metavar="X", help="drop tokens less than X times as likely as the best"
    )
    parser.add_argument("--seed", type=SEED, metavar="N", help="make the sample repeatable")
    parser.add_argument("--no-prompt", action="store_true", help="print the continuation only")
    _device_options(parser)


def _device_options(parser):
    parser.add_argument("--tokenizer", metavar="NAME", help="default: the one saved with the model")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")


def _generate(arguments) -> int:
    import torch

    device = read_device(arguments.device)
    folder = find_model(arguments.checkpoint)
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    tokenizer = tokenizer_of(folder, arguments.tokenizer)
    model = load_model(folder, device, arguments.dtype)
    ids = tokenizer.encode_prompt(prompt)
    eos = tokenizer.tokenizer.eos_token_id
    if not ids:
        if eos is None:
            raise UsageError("--prompt must not be empty: the tokenizer has no end-of-sequence token to begin with")
        ids = [eos]
    chosen = {name: getattr(arguments, name) for name in ("top_k", "top_p", "min_p")}
    filters = {name: value for name, value in chosen.items() if value is not None}
    name, value = next(iter(filters.items()), ("top_k", None))
    words = {"top_k": "k", "top_p": "thres", "min_p": "min_p"}
    generator = None
    if arguments.seed is not None:
        generator = torch.Generator(model.device).manual_seed(arguments.seed)
    writer = _TextWriter(tokenizer, ids, sys.stdout)
    if not arguments.no_prompt:
        writer.write(prompt)
    started = time.perf_counter()
    new = model.to_andromeda().generate(
        torch.tensor(ids, device=model.device),
        arguments.tokens,
        eos_token=eos,
        temperature=arguments.temperature,
        filter_logits_fn=name,
        filter_kwargs={} if value is None else {words[name]: value},
        generator=generator,
        on_token=lambda column: writer.add(column.tolist()),
    )
    writer.finish()
    seconds = time.perf_counter() - started
    say(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:,.1f} tokens/s on {model.device}")
    return 0


class _TextWriter:
    """Writes text as its tokens arrive: a character is written when all its bytes are there.

    Decoding all ids again and writing what is new keeps the spaces that a token has only beside others.
    """

    def __init__(self, tokenizer, context: list[int], stream):
        self.tokenizer = tokenizer
        self.stream = stream
        self.ids = context[-8:]
        self.text = tokenizer.decode(self.ids)

    def write(self, text: str):
        self.stream.write(text)
        self.stream.flush()

    def add(self, ids: list[int]):
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        # U+FFFD at the end is a character whose last bytes are still to come.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text[len(self.text) :])
            self.text = text

    def finish(self):
        self.write(self.tokenizer.decode(self.ids)[len(self.text) :] + "\n")


# ---- eval

_EVAL = """\
How well a model predicts a text: loss (nats per token), perplexity, and bits per byte, which compares
models with different tokenizers.

  andromeda eval run/model heldout.txt
  andromeda eval run/model rows --json figures.json"""


def _eval_options(parser):
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    parser.add_argument("data", metavar="ROWS", help="folder of build-dataset, or a text source as there")
    parser.add_argument(
        "--seq-len",
        type=integer(2),
        metavar="N",
        help="row length, when ROWS is a text source (default: the model's window)",
    )
    parser.add_argument("--doc-mask", action=argparse.BooleanOptionalAction, default=True, help=_DOC_MASK)
    parser.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="rows per forward pass")
    parser.add_argument("--max-rows", type=integer(1), metavar="N", help="look at the first N rows only")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    _device_options(parser)


def _evaluate(arguments) -> int:
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
    _print_evaluation(evaluation)
    if arguments.json:
        write_json(
            Path(arguments.json), {"model": str(folder), "data": arguments.data, **dataclasses.asdict(evaluation)}
        )
    return 0


def _print_evaluation(evaluation):
    for name, value in _evaluation_lines(evaluation):
        print(f"{name:14} {value}")


def _evaluation_lines(evaluation) -> list[tuple[str, str]]:
    bits = (
        "unknown (the tokenizer is not byte-level)"
        if evaluation.bits_per_byte is None
        else f"{evaluation.bits_per_byte:.4f}"
    )
    return [
        ("loss", f"{evaluation.loss:.4f} nats per token, over {evaluation.tokens:,} tokens"),
        ("perplexity", f"{evaluation.perplexity:,.2f}"),
        ("bits per byte", bits),
    ]


# ---- quickstart

_QUICK = """\
Everything once, on real text and without a network: train a tokenizer on the source of this machine's Python standard
library, pack it, train a small model, evaluate it on files it has not seen, save, reload, and let it write some Python.

An interrupted run continues when the same command is given again."""


def _quickstart_options(parser):
    parser.add_argument("--out", default="andromeda-quickstart", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--minutes", type=number(0, 1e6, above=True), default=1.5, metavar="X", help="time to train for"
    )
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="weights, order of the rows and sample")
    parser.add_argument("--force", action="store_true", help="replace what an earlier quickstart left in DIR")
    parser.add_argument("--device", metavar="NAME", help="cpu, even where there is a GPU, or cuda (default: a GPU)")


def _quickstart(arguments) -> int:
    from andromeda.quickstart import quickstart

    out = Path(arguments.out)
    device = training_device(arguments.device)
    options = {"minutes": arguments.minutes, "seed": arguments.seed, "device": device}
    words = [f"--{option} {value}" for option, value in options.items() if value is not None]
    again = f"andromeda quickstart --out {shlex.quote(str(out))} {' '.join(words)}"
    try:
        outcome = quickstart(out, force=arguments.force, **options)
    except KeyboardInterrupt as error:
        say(f"andromeda: interrupted; this continues:\n    {again}")
        return interrupts.exit_code(error)
    if isinstance(outcome, str):
        print(outcome)
        return 0
    return _interrupted(outcome, again)
