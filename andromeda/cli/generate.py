"""`andromeda generate`: the continuation of a prompt, written as it is made."""

import sys
import time

from andromeda.cli.arguments import SEED, device_options, integer, number
from andromeda.cli.console import UsageError, say
from andromeda.cli.loading import find_model, load_model, read_device, read_prompt, tokenizer_of

DESCRIPTION = """\
Continue a prompt with a trained model. The text appears as it is made.

  andromeda generate run/model --prompt "Once upon" --tokens 200
  andromeda generate run/model --prompt-file story.txt --temperature 0"""


def add_options(parser):
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
    device_options(parser)


def run(arguments) -> int:
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
