"""`andromeda build-dataset`: tokenises text and packs it into rows."""

import argparse
import sys
from pathlib import Path

from andromeda.cli.arguments import integer
from andromeda.cli.console import UsageError, show
from andromeda.cli.loading import load_tokenizer, pack, texts_of

DESCRIPTION = """\
Tokenise text, pack it into rows of equal length without padding, and write them to a folder that
`train` and `eval` read. The tokenizer is saved inside the folder, where those commands find it.

SOURCE is a text, json, jsonl, csv, parquet or arrow file, a folder of them, a pipe (- is standard input), or the name
of a data set on the hub. gzip, bzip2, xz and zstd are unpacked while reading.

  andromeda build-dataset corpus.txt --train-tokenizer 8192 --seq-len 1024 --out rows
  andromeda build-dataset corpus.jsonl --tokenizer EleutherAI/gpt-neox-20b --out rows
  zcat stories.gz | andromeda build-dataset - --train-tokenizer 8192 --document-separator '<|endoftext|>' --out rows"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
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
        "--text-column",
        metavar="NAME",
        help="column of the text (default: `text`, or the only possible one)",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="read only the files of a folder that match (may be repeated)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave out files and folders of a folder that match (may be repeated)",
    )
    parser.add_argument("--document-separator", metavar="TEXT", help="text that separates the documents in text files")
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
        help="how to treat text that is not UTF-8",
    )
    parser.add_argument("--hub-repo", metavar="REPO", help="also upload the rows to this data set repository")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
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
        source.keep()  # a pipe can be read only once, and is packed after this
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
    show(f"rows         {len(rows):,} of {rows.seq_len:,} tokens in {target}")
    formats = ", ".join(f"{count:,} {name}" for name, count in rows.metadata["formats"].items())
    if formats:
        show(f"formats      {formats}")
    if rows.metadata["text_column"] is not None:
        show(f"text column  {rows.metadata['text_column']}")
    for name, value in rows.statistics.items():
        if value and name != "rows":
            show(f"{name.replace('_', ' '):12} {value:,}")
    for line in rows.metadata["skipped"]:
        show(f"left out     {line}")
    for line in rows.metadata["notes"]:
        show(f"note         {line}")
    show(f"vocabulary   {rows.vocab_size:,} ids (tokenizer in {target / 'tokenizer'})")
    return 0
