"""Packing text into rows of token ids: tokens per second, compared with the tokenizer alone.

    python benchmarks/data.py [--megabytes 20] [--processes 1 2] [--rounds 7] [--quick] [--json F] [--plot F]

The text is the source of Python's standard library, repeated or cut to the requested size, one document per file, in
one jsonl file; the tokenizer is a byte-level BPE trained on it. "andromeda" rows time all of
`DatasetBuilder.build_dataset`: reading the file, tokenising, packing, writing to the disk with fsync, opening.
"tokenizers" rows time only `encode_batch_fast` on the same batches, already in memory, in the same number of processes,
already started. `ratio` is the tokenizer's time divided by the row's, in the same round. One process is not one thread:
the tokenizer uses all cores by itself.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import report
import timing

from andromeda.data import workers
from andromeda.data.builder import DatasetBuilder
from andromeda.data.packed import PackedDataset
from andromeda.data.tokenizer import AndromedaTokenizer

# One of the n processes of a baseline: tokenises every n-th batch each time it reads a line.
TOKENIZE = """
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.encode_special_tokens = True
batches = json.load(open(sys.argv[2]))[int(sys.argv[3])::int(sys.argv[4])]
for line in sys.stdin:
    for batch in batches:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    print(flush=True)
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--packing", nargs="+", choices=("stream", "bfd"), default=["stream", "bfd"])
    parser.add_argument("--rounds", type=int, default=7)
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.megabytes, args.vocab_size, args.seq_len, args.rounds = 2.0, 2048, 1024, 2
    return args


def corpus(size: int) -> list[str]:
    """`size` bytes of documents, the last one cut."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some files test exactly this error
            continue
        if text.strip() and "\0" not in text:
            texts.append(text)
    documents, total = [], 0
    for text in itertools.cycle(texts):
        documents.append(text[: size - total])
        total += len(documents[-1].encode())
        if total >= size:
            return documents


class TokenizerProcesses:
    """Processes of the baseline; a call makes them tokenise all batches once."""

    def __init__(self, count: int, tokenizer_path: Path, batches_path: Path) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", TOKENIZE, str(tokenizer_path), str(batches_path), str(index), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # like the builder's workers: Linux divides a busy machine among sessions
            )
            for index in range(count)
        ]

    def __call__(self) -> None:
        for process in self._processes:
            print(file=process.stdin, flush=True)
        for process in self._processes:
            if not process.stdout.readline():
                raise RuntimeError(f"a tokenizer process ended with status {process.wait()}")

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait()


def build(
    source: Path, tokenizer: AndromedaTokenizer, cache: Path, args: argparse.Namespace, packing: str, count: int
) -> PackedDataset:
    """The data set, built from scratch."""
    shutil.rmtree(cache, ignore_errors=True)
    return DatasetBuilder(
        source, args.seq_len, count, tokenizer=tokenizer, packing=packing, cache_dir=cache, progress=False
    ).build_dataset()


def run(folder: Path, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    texts = corpus(int(args.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    source, tokenizer_path, batches_path = folder / "corpus.jsonl", folder / "tokenizer.json", folder / "batches.json"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    batches = list(workers.document_batches(texts))
    batches_path.write_text(json.dumps(batches))
    tokenizer = AndromedaTokenizer.train(texts, vocab_size=args.vocab_size)
    tokenizer_path.write_text(workers.packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer))
    alone = type(tokenizer.tokenizer.backend_tokenizer).from_file(str(tokenizer_path))
    alone.encode_special_tokens = True

    def tokenize_alone() -> int:
        return sum(len(e) for batch in batches for e in alone.encode_batch_fast(batch, add_special_tokens=False))

    tokens = tokenize_alone()
    functions, baselines, servers = {}, {}, []
    for count in args.processes:
        plural = f"{count} process" + ("es" if count > 1 else "")
        baseline = f"tokenizers, {plural}"
        if count > 1:
            servers.append(TokenizerProcesses(count, tokenizer_path, batches_path))
        functions[baseline] = tokenize_alone if count == 1 else servers[-1]
        baselines[baseline] = baseline
        for kind in args.packing:
            name = f"andromeda {kind}, {plural}"
            functions[name] = functools.partial(build, source, tokenizer, folder / "cache", args, kind, count)
            baselines[name] = baseline
    try:
        timings = timing.measure(functions, device="cpu", rounds=args.rounds, budget_s=600)
    finally:
        for server in servers:
            server.close()

    notes = [f"{size / 1e6:.1f} MB, {len(texts)} documents, {tokens} tokens and {len(texts)} ends of documents."]
    for kind in args.packing:
        dataset = build(source, tokenizer, folder / "cache", args, kind, 1)
        counts = dataset.statistics
        in_rows = counts["rows"] * args.seq_len
        balance = tokens + counts["documents"] - (in_rows - counts["padding"] + counts["remainder"])
        notes.append(
            f"{kind}: {tokens} + {counts['documents']} tokens in; {counts['rows']} rows x {args.seq_len} - "
            f"{counts['padding']} padding + {counts['remainder']} left over out; unaccounted for: {balance}; "
            f"{dataset.metadata['data_bytes'] / 1e6:.1f} MB on the disk."
        )
        if balance:
            raise RuntimeError(notes[-1])
        reading = timing.measure(
            {"items": lambda dataset=dataset: [dataset[index] for index in range(len(dataset))]},
            device="cpu",
            rounds=args.rounds,
            budget_s=10,
        )
        notes.append(f"{kind}: {reading['items'].median_ms * 1e3 / len(dataset):.1f} us to read an item.")

    shape = f"{size / 1e6:.0f} MB, {tokens / 1e6:.2f} M tokens, vocab {len(tokenizer)}, rows {args.seq_len}"
    rows = []
    for name, measured in timings.items():
        row = report.make_row(
            measured,
            op="data",
            step="tokenize" if name == baselines[name] else "build",
            shape=shape,
            dtype="uint16",
            device="cpu",
            backend=name,
            tokens=tokens,
            spreads={"ratio": timing.paired_ratio(timings[baselines[name]], measured)},
            peak_memory_mb=timing.peak_memory_mb(functions[name], "cpu") if "1 process" in name else None,
        )
        rows.append(row)
    return rows, notes


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="andromeda-data-") as folder:
        rows, notes = run(Path(folder), args)
    report.finish(args, rows, device="cpu", title="Text to packed rows", notes=notes)


if __name__ == "__main__":
    main()
