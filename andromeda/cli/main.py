"""The command `andromeda`: reads its arguments, runs the chosen command, and explains every error.

Results go to stdout, progress and messages to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage, 128 + n ended by
signal n (130 for Ctrl-C). Each command imports transformers and datasets itself, if it needs them.
"""

import argparse
import io
import os
import re
import sys
from typing import Any, NoReturn

from andromeda import __version__
from andromeda.cli import data, evaluate, generate, info, interrupts, quickstart, serve, threads, train
from andromeda.cli.arguments import not_empty
from andromeda.cli.console import UsageError, give_up_stdout, say, writing_results
from andromeda.files import check_output, check_output_folder


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: its arguments; default: those of this process."""
    debug = os.environ.get("ANDROMEDA_DEBUG") == "1"
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a sample may hold characters that the terminal cannot show
        arguments = _read_arguments(argv)
        debug = debug or arguments.debug
        _check_outputs(arguments)
        if arguments.command != "info" and (note := threads.note()):
            say(f"andromeda: {note}")
        if arguments.command in ("train", "quickstart"):
            interrupts.be_patient()
        code: int = arguments.run(arguments)
        if sys.stdout is not None:
            with writing_results():  # a failure here is an error of the command; at exit Python would report it
                sys.stdout.flush()
        return code
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also panics of Rust libraries, which are not an Exception
        return _report(error, debug)


def _read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see `andromeda {arguments.command} --help`)")
    arguments.rest = rest
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
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
    parser.register("type", None, str)  # the parser of a command reads and checks the words after its name
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module, summary in (
        ("info", info, "versions, devices, and which kernels run here"),
        ("quickstart", quickstart, "train a small model on this machine's Python library"),
        ("build-dataset", data, "tokenise and pack text into rows"),
        ("train", train, "train a model on packed rows"),
        ("generate", generate, "continue a prompt"),
        ("eval", evaluate, "loss, perplexity and bits per byte on a text"),
        ("serve", serve, "answer the requests of OpenAI's clients"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            parents=[common],
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=module.run, passes_on=module is train)
        module.add_options(command)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, not_empty)  # options without a type are names, for example of files

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"andromeda: error: {message}\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of descriptions, and adds an option's default to its help unless there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):  # 0 is a default
            return action.help
        return super()._get_help_string(action)


_INPUTS = ("source", "data", "eval_data", "checkpoint", "start", "tokenizer", "prompt_file")
# Files and folders of models, rows and runs: --json must not replace them.
_OURS = re.compile(
    r"model|checkpoint-\d+|.*\.(safetensors|arrow)|README\.md|modeling_andromeda\.py|history\.jsonl|(train|quickstart|"
    r"metadata|config|generation_config|andromeda|andromeda_checkpoint|trainer_state|tokenizer|tokenizer_config|"
    r"special_tokens_map)\.json"
)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, outputs that cannot be written. All commands use this function."""
    folder, file = getattr(arguments, "out", None), getattr(arguments, "json", None)
    try:
        option = "--out"
        if folder is not None:
            check_output_folder(folder)
        option = "--json"
        if isinstance(file, str):  # `info --json` is a switch
            inside = folder is not None and os.path.realpath(os.path.dirname(file)) == os.path.realpath(folder)
            _check_figures(arguments, file, folder, inside)
            if folder is None or not inside or os.path.isdir(folder):  # else the command makes the folder
                check_output(file)
    except OSError as error:
        raise UsageError(f"{option}: {error}") from error


def _check_figures(arguments: argparse.Namespace, file: str, folder: str | None, inside: bool) -> None:
    """Refuse to replace another file that the command reads or writes by the figures."""
    given = [path for name in _INPUTS if (path := getattr(arguments, name, None)) and os.path.isfile(path)]
    if os.path.isfile(file) and any(os.path.samefile(file, path) for path in given):
        raise UsageError(f"--json: {file} is what the command reads; choose another file")
    if folder is not None and os.path.realpath(file) == os.path.realpath(folder):
        raise UsageError(f"--json: {file} is the folder that --out names; choose another file")
    if (inside or os.path.exists(file)) and _OURS.fullmatch(os.path.basename(os.path.realpath(file))):
        raise UsageError(f"--json: {file} is a file of a model, of rows or of a run; choose another name")


def _report(error: BaseException, debug: bool) -> int:
    """Report in one line why the command ended; returns the exit code. With `debug`, an error is raised instead."""
    if interrupt := _interrupt_behind(error):
        say("andromeda: interrupted")
        return interrupts.exit_code(interrupt)
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone
        give_up_stdout()
        return 1
    if debug:
        raise error
    say(f"andromeda: error: {_message(error)}")
    if isinstance(error, UsageError):
        return 2
    say("andromeda: --debug shows where this happened")
    return 1


def _interrupt_behind(error: BaseException) -> BaseException | None:
    """The interruption that caused an error, if any: libraries turn interruptions into errors of their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None and interrupts.seen() else cause


# The messages of these errors are sentences; others, such as KeyError, say little without the name of the class.
_SAY_ENOUGH = (UsageError, OSError, ValueError, TypeError, RuntimeError, ImportError)


def _message(error: BaseException) -> str:
    """The text of an error, with further lines indented, and the error that was being handled when it occurred."""
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
