"""Output of the commands: results to stdout, messages to stderr."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from andromeda.training import Evaluation, TrainResult


class UsageError(Exception):
    """The command line asks for something impossible: exit code 2."""


def say(text: str = "") -> None:
    """Print a message to stderr."""
    if sys.stderr is not None:  # print would use stdout instead
        print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a line of the result to stdout."""
    with writing_results():
        print(text)


@contextlib.contextmanager
def writing_results() -> Iterator[None]:
    """Give errors of writing to stdout a message that names stdout."""
    try:
        yield
    except BrokenPipeError:  # the reader has gone: `main` ends without a message
        raise
    except OSError as error:
        give_up_stdout()
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def give_up_stdout() -> None:
    """Discard the rest of the output, so that Python does not fail at exit to write its buffer."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_evaluation(evaluation: "Evaluation") -> None:
    """Print the results of an evaluation."""
    bits = evaluation.bits_per_byte
    show(f"loss           {evaluation.loss:.4f} nats per token, over {evaluation.tokens:,} tokens")
    show(f"perplexity     {evaluation.perplexity:,.2f}")
    show(f"bits per byte  {'unknown (the tokenizer is not byte-level)' if bits is None else f'{bits:.4f}'}")


def say_how_to_continue(result: "TrainResult", command: str) -> int:
    """Print the `command` that continues a training run that a signal stopped. Returns the exit code."""
    assert result.interrupted is not None
    say(f"andromeda: stopped by {result.interrupted} after step {result.steps}; this continues exactly:\n    {command}")
    return 128 + signal.Signals[result.interrupted]
