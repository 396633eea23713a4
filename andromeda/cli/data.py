"""`andromeda build-dataset`: text into packed rows."""

import sys
from pathlib import Path

from andromeda.cli.arguments import integer
from andromeda.cli.console import UsageError
from andromeda.cli.loading import load_tokenizer, pack, texts_of

DESCRIPTION = """\
Tokenise text, pack it into rows of equal length without padding, and write them to a folder that
`train` and `eval` read. The tokenizer is saved inside it, so those commands need not be told.

SOURCE is a text, json, jsonl, csv, parquet or arrow file, a folder of them, a pipe (- is standard input), or the name
of a data set on the hub. gzip, bzip2, xz and zstd are unpacked on the way.

  andromeda build-dataset corpus.txt --train-tokenizer 8192 --seq-len 1024 --out rows
  andromeda build-dataset corpus.jsonl --tokenizer EleutherAI/gpt-neox-20b --out rows
  zcat stories.gz | andromeda build-dataset - --train-tokenizer 8192 --document-separator '<|endoftext|>' --out rows"""


def add_options(parser):
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


def run(arguments) -> int:
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
