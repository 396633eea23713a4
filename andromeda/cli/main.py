"""The command `andromeda`: its words, its errors, and the choice of the command that does the work.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by
signal n (130 for Ctrl-C). Everything that loads transformers or datasets is imported by the command that needs it.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import traceback

from andromeda import __version__
from andromeda.cli import data, evaluate, generate, info, interrupts, quickstart, threads, train
from andromeda.cli.arguments import not_empty
from andromeda.cli.console import UsageError, say
from andromeda.files import check_output, check_output_folder


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
    if os.path.dirname(frame.f_code.co_filename) != os.path.dirname(__file__):
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

    for name, module, summary in (
        ("info", info, "versions, devices, and which kernels run here"),
        ("quickstart", quickstart, "train a small model on this machine's Python library"),
        ("build-dataset", data, "tokenise and pack text into rows"),
        ("train", train, "train a model on packed rows"),
        ("generate", generate, "continue a prompt"),
        ("eval", evaluate, "loss, perplexity and bits per byte on a text"),
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
