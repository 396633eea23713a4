"""`andromeda generate`: continues a prompt and writes the text while it is generated."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, TextIO

from andromeda.cli.arguments import SEED, add_model_options, integer, number
from andromeda.cli.console import UsageError, say, writing_results
from andromeda.cli.loading import find_model, load_model, read_device, read_prompt, tokenizer_of

if TYPE_CHECKING:
    from andromeda import AndromedaTokenizer

DESCRIPTION = """\
Continue a prompt with a trained model. The text appears while it is generated.

  andromeda generate run/model --prompt "Once upon" --tokens 200
  andromeda generate run/model --prompt-file story.txt --temperature 0"""

_FILTERS = {"top_k": "k", "top_p": "thres", "min_p": "min_p"}  # filters of `generate`, and the argument of each


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", type=str, metavar="TEXT", help="the text to continue")
    which.add_argument(
        "--prompt-file", metavar="FILE", help="file with the text to continue, in UTF-8; - is standard input"
    )
    parser.add_argument(
        "--tokens", type=integer(1), default=128, metavar="N", help="maximum number of tokens to generate"
    )
    parser.add_argument("--temperature", type=number(0), default=0.8, metavar="X", help="0 takes the likeliest token")
    filters = parser.add_mutually_exclusive_group()
    filters.add_argument(
        "--top-k", type=integer(1), metavar="N", help="sample among the N likeliest tokens (default: a tenth)"
    )
    filters.add_argument(
        "--top-p", type=number(0, 1), metavar="X", help="sample among the likeliest tokens of total probability X"
    )
    filters.add_argument(
        "--min-p", type=number(0, 1), metavar="X", help="drop tokens less than X times as likely as the best"
    )
    parser.add_argument("--seed", type=SEED, metavar="N", help="make the sample repeatable")
    parser.add_argument("--no-prompt", action="store_true", help="print the continuation only")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
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
    given = [name for name in _FILTERS if getattr(arguments, name) is not None]
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
        filter_logits_fn=given[0] if given else "top_k",
        filter_kwargs={_FILTERS[name]: getattr(arguments, name) for name in given},
        generator=generator,
        on_token=lambda column: writer.add(column.tolist()),
    )
    writer.finish()
    seconds = time.perf_counter() - started
    say(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:,.1f} tokens/s on {model.device}")
    return 0


class _TextWriter:
    """Writes text as its tokens arrive, and each character once all its bytes have arrived.

    It decodes all ids again for every token and writes the difference, because the text of some tokens has a space that
    depends on their neighbours.
    """

    def __init__(self, tokenizer: AndromedaTokenizer, context: list[int], stream: TextIO) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.ids = context[-8:]
        self.written = self._decoded()

    def write(self, text: str) -> None:
        with writing_results():
            self.stream.write(text)
            self.stream.flush()

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        text = self._decoded()
        # U+FFFD at the end is a character whose last bytes are still to come.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text[len(self.written) :])
            self.written = text

    def finish(self) -> None:
        self.write(self._decoded()[len(self.written) :] + "\n")

    def _decoded(self) -> str:
        text = self.tokenizer.decode(self.ids)
        assert isinstance(text, str)  # the text of one row
        return text
