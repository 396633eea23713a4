"""What commands say: messages, errors of usage, figures."""

import signal
import sys


class UsageError(Exception):
    """The command line asks for something that makes no sense here: exit code 2."""


def say(text: str = ""):
    """A message, to stderr: stdout is for results."""
    if sys.stderr is not None:  # print would take stdout
        print(text, file=sys.stderr, flush=True)


def stopped(result, command: str) -> int:
    """Say how to go on after a signal ended the training."""
    say(f"andromeda: stopped by {result.interrupted} after step {result.steps}; this continues exactly:\n    {command}")
    return 128 + signal.Signals[result.interrupted]


def print_evaluation(evaluation):
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
