"""`andromeda quickstart`: corpus, tokenizer, rows, training, evaluation, a saved model and a sample, without a network.

The corpus is the source of the running interpreter's standard library. The folder of every step appears whole or not at
all, and `quickstart.json` records settings and figures, so an interrupted quickstart continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import shlex
import shutil
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from andromeda import __version__
from andromeda.cli import interrupts
from andromeda.cli.arguments import SEED, number
from andromeda.cli.console import UsageError, say, say_how_to_continue, show
from andromeda.cli.loading import load_model, load_tokenizer, pack, texts_of, training_device
from andromeda.cli.sizes import model_arguments, parameter_count
from andromeda.files import check_output_folder, is_temporary, read_json, whole_folder, write_json

if TYPE_CHECKING:
    import torch

    from andromeda.data.packed import PackedDataset
    from andromeda.training import Evaluation, TrainResult

_RECORD = "quickstart.json"
_HELD_OUT_EVERY = 20  # one file in 20 is kept for the evaluation
_CORPUS_BYTES_PER_MINUTE = 4_000_000  # of training: a short training needs no long preparation
# In such a short time small batches learn most: equal CPU time gives 1.92 bits per byte with 4 rows and 2.02 with 8.
# At twice this learning rate, some seeds keep the model at the frequencies of single tokens (loss 6.4) for a long time;
# at this rate the long warm-up prevents that.
_BATCH_SIZE = 4
_LEARNING_RATE = 3e-3
_WARMUP = 0.15  # of the steps
_SEQ_LEN = 256
_VOCABULARY = 2048
_PROMPT = "def "

DESCRIPTION = """\
Run every step once, on real text and without a network: train a tokenizer on the source of this machine's Python
standard library, pack the source, train a small model, evaluate it on files it has not seen, save it, reload it, and
let it write some Python.

An interrupted run continues when the same command is given again."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--out", default="andromeda-quickstart", metavar="DIR", help="folder to write")
    parser.add_argument("--minutes", type=number(0, 1e6, above=True), default=1.5, metavar="X", help="minutes to train")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="weights, order of the rows and sample")
    parser.add_argument("--force", action="store_true", help="replace what an earlier quickstart left in DIR")
    parser.add_argument("--device", metavar="NAME", help="cpu, even where there is a GPU, or cuda (default: a GPU)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
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
        show(outcome)
        return 0
    return say_how_to_continue(outcome, again)


def quickstart(
    out: Path, *, minutes: float = 1.5, seed: int = 0, device: str | None = None, force: bool = False
) -> str | TrainResult:
    """Run the quickstart in the folder `out`, or continue an interrupted one.

    Args:
        out: new or empty folder, or one of an earlier quickstart.
        minutes: time to train.
        seed: of the weights, the order of the rows, the choice of files and the sample.
        device: "cpu", or None for a GPU if there is one.
        force: replace what an earlier quickstart left in `out`.

    Returns:
        A summary to print; or the `TrainResult` of the training if a signal stopped it.

    Raises:
        UsageError: `out` holds other files, a finished quickstart, or one with other settings; or an argument is out
            of range.
        OSError: `out` cannot be written.
    """
    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes must be positive and finite, got {minutes:g}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    check_output_folder(out)
    started = time.perf_counter()
    state = _begin(out, {"minutes": minutes, "seed": seed, "device": device}, force)
    return _run_steps(out, state, started)


def _begin(out: Path, settings: dict[str, Any], force: bool) -> dict[str, Any]:
    """The record of an interrupted quickstart in `out`, or a new one; refuses any other folder that is not empty."""
    record = out / _RECORD
    # A file with a temporary name counts as a record: its process was killed while it wrote the first one.
    if out.exists() and not all(is_temporary(path.name) for path in out.iterdir()):
        if not record.is_file():
            raise UsageError(f"--out must be a new or empty folder, or one of an earlier quickstart, got {out}")
        state = {} if force else _read_record(record)
        if force:
            for name in ("corpus", "tokenizer", "rows", "run"):
                shutil.rmtree(out / name, ignore_errors=True)
            record.unlink()
        elif state["status"] == "done":
            raise UsageError(f"{out} holds a finished quickstart; --force replaces it, --out chooses another folder")
        elif state["settings"] != settings:
            was = ", ".join(f"{name} {value}" for name, value in state["settings"].items())
            raise UsageError(
                f"{out} holds an interrupted quickstart with {was}; give the same, or --force to start anew"
            )
        else:
            say(f"continuing the interrupted quickstart in {out}")
            return state
    out.mkdir(parents=True, exist_ok=True)
    state = {"andromeda": __version__, "python": platform.python_version(), "settings": settings, "status": "begun"}
    write_json(record, state)
    return state


def _read_record(record: Path) -> dict[str, Any]:
    try:
        return read_json(record, ("status", "settings"))
    except ValueError as error:
        raise UsageError(f"{error}; --force starts anew, --out chooses another folder") from error


def _run_steps(out: Path, state: dict[str, Any], started: float) -> str | TrainResult:
    import torch

    from andromeda import Andromeda, AndromedaTokenizer
    from andromeda.data.packed import PackedDataset
    from andromeda.training import TrainSettings, evaluate, latest_checkpoint, sample_text, train

    seed, device = state["settings"]["seed"], state["settings"]["device"]
    _stage(1, "corpus: the source of this Python's standard library")
    corpus = out / "corpus"
    if not corpus.is_dir():
        with whole_folder(corpus) as folder:
            counts = _write_corpus(folder, int(state["settings"]["minutes"] * _CORPUS_BYTES_PER_MINUTE), seed)
            write_json(folder / "counts.json", counts)
    counts = state["corpus"] = read_json(corpus / "counts.json", ("files", "bytes", "held_out_files"))
    say(f"  {counts['files']} files, {counts['bytes'] / 1e6:.1f} MB; {counts['held_out_files']} more are held out")

    _stage(2, "tokenizer: byte-level BPE")
    if not (out / "tokenizer").is_dir():
        with whole_folder(out / "tokenizer") as folder:
            AndromedaTokenizer.train(texts_of(corpus / "train.jsonl"), _VOCABULARY).save(folder)
    tokenizer = load_tokenizer(out / "tokenizer")
    say(f"  {len(tokenizer):,} tokens")

    _stage(3, f"rows of {_SEQ_LEN} tokens")
    for name in ("train", "heldout"):
        if not (out / "rows" / name).is_dir():
            pack(corpus / f"{name}.jsonl", out / "rows" / name, tokenizer, seq_len=_SEQ_LEN)
    rows, held_out = (PackedDataset(out / "rows" / name, doc_mask=True) for name in ("train", "heldout"))
    say(f"  {len(rows):,} to train on, {len(held_out):,} held out")

    _stage(4, "training")
    sizes = model_arguments("tiny", len(tokenizer), _SEQ_LEN)
    if "steps" not in state:
        seconds = _seconds_per_step(sizes, rows, device)
        state["steps"] = max(5, min(20_000, round(60 * state["settings"]["minutes"] / seconds)))
        state["evaluated_rows"] = max(8, min(len(held_out), state["steps"]))
        write_json(out / _RECORD, state)
    settings = TrainSettings(
        output_dir=str(out / "run"),
        steps=state["steps"],
        seed=seed,
        device=device,
        sample_every=max(1, -(-state["steps"] // 3)),
        sample_prompt=_PROMPT,
        save_every=max(1, state["steps"] // 5),
        warmup_steps=round(_WARMUP * state["steps"]),
        batch_size=_BATCH_SIZE,
        learning_rate=_LEARNING_RATE,
        weight_decay=0.05,
        log_every=10,
        keep=1,
    )
    torch.manual_seed(seed)
    model = Andromeda(**sizes)
    say(f"  {parameter_count(model):,} parameters, {state['steps']} steps of {settings.batch_size} rows")
    resume = latest_checkpoint(out / "run") is not None
    result = train(model, rows, settings, tokenizer=tokenizer, resume=resume)
    if result.interrupted:
        return result

    _stage(5, "evaluation on files it has not seen")
    evaluation = evaluate(model, held_out, tokenizer=tokenizer, max_rows=state["evaluated_rows"], progress=True)

    _stage(6, "reloading the saved model")
    reloaded = load_model(out / "run" / "model", device, None)
    probe = held_out[0]["input_ids"][None].to(reloaded.device)
    with torch.no_grad():
        if not torch.equal(model(probe), reloaded(probe).logits):
            raise RuntimeError(
                "quickstart: the saved model must give the same logits as the model in memory, and does not"
            )
    say("  the same logits, bit for bit")
    sample = sample_text(reloaded, tokenizer, _PROMPT, tokens=120, seed=seed)

    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    state |= {
        "status": "done",
        "training": {name: value for name, value in dataclasses.asdict(result).items() if name != "history"},
        "first_loss": losses[0] if losses else None,
        "evaluation": dataclasses.asdict(evaluation),
        "sample": sample,
        "seconds": time.perf_counter() - started,
    }
    write_json(out / _RECORD, state)
    return _summary(out, state, result, evaluation, parameter_count(model), reloaded.device)


def _stage(number: int, text: str) -> None:
    say(f"[{number}/6] {text}")


def _write_corpus(folder: Path, limit: int, seed: int) -> dict[str, int]:
    """Write train.jsonl and heldout.jsonl: the modules of the standard library, without tests and tables of data.

    `seed` shuffles the modules. The training modules end with the one that reaches `limit` bytes.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    paths = []
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in left_out)
        paths += [Path(directory, name) for name in sorted(files) if name.endswith(".py")]
    random.Random(seed).shuffle(paths)
    counts = {"files": 0, "held_out_files": 0, "bytes": 0}
    if not paths:
        raise FileNotFoundError(
            f"quickstart: no Python source below {root}: is the standard library installed as source?"
        )
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "heldout.jsonl", "w", encoding="utf-8") as held_out,
    ):
        for index, path in enumerate(paths):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules are in other encodings on purpose
            record = json.dumps({"text": text, "file": path.relative_to(root).as_posix()}) + "\n"
            if index % _HELD_OUT_EVERY == 0:
                held_out.write(record)
                counts["held_out_files"] += 1
            elif counts["bytes"] < limit:
                train.write(record)
                counts["files"] += 1
                counts["bytes"] += len(text.encode())
    return counts


def _seconds_per_step(sizes: dict[str, Any], rows: PackedDataset, device: str | None) -> float:
    """Measure the time of one training step, on a model of its own."""
    import torch

    from andromeda import Andromeda
    from andromeda.training import collate, seconds_per_step

    on = torch.device("cuda" if device is None and torch.cuda.is_available() else "cpu")
    batch = collate(rows.__getitems__(range(min(len(rows), _BATCH_SIZE))))
    return seconds_per_step(Andromeda(**sizes).to(on), batch)


def _summary(
    out: Path, state: dict[str, Any], result: TrainResult, evaluation: Evaluation, parameters: int, device: torch.device
) -> str:
    minutes, seconds = divmod(round(state["seconds"]), 60)
    first = "" if state["first_loss"] is None else f", loss {state['first_loss']:.2f} -> {result.loss:.2f}"
    folder = shlex.quote(str(out))
    lines = [
        f"Andromeda quickstart, done in {minutes}:{seconds:02}",
        f"  corpus       {state['corpus']['bytes'] / 1e6:.1f} MB of Python in {state['corpus']['files']} files",
        f"  model        {parameters:,} parameters on {device}",
        f"  training     {result.steps:,} steps, {result.tokens:,} tokens at {result.tokens_per_second:,.0f}/s{first}",
        f"  held out     loss {evaluation.loss:.3f}, perplexity {evaluation.perplexity:.1f}, "
        f"{evaluation.bits_per_byte:.3f} bits per byte over {evaluation.tokens:,} tokens",
        "  reloaded     same logits, bit for bit",
        "",
        f"A sample, from {_PROMPT!r}:",
        *(f"  | {line}" for line in state["sample"].splitlines()),
        "",
        f"In {out}: run/model (the model), rows/ and corpus/ (the data), quickstart.json (all figures).",
        "What to do next:",
        f"  andromeda generate {folder}/run --prompt 'class Parser' --tokens 200",
        f"  andromeda eval {folder}/run {folder}/rows/heldout",
        f"  andromeda train {folder}/rows/train --out longer --size tiny --steps 20000 --warmup-steps 1000"
        " --learning-rate 2e-3",
    ]
    return "\n".join(lines)
