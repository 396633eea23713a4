"""From the bytes of a file to text: recognising its kind by the first bytes, unpacking, and decoding UTF-8."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEAD_BYTES = 1 << 16  # number of first bytes by which the kind of a file is recognised
BLOCK_BYTES = 1 << 20
# A file with a larger share of bytes that are not UTF-8 is not damaged text but a file of another kind. A few such
# bytes in a short text prove nothing.
MAX_BAD_SHARE = 0.05
MIN_BAD_BYTES = 8
REMEDY = "errors='replace' puts U+FFFD in its place, errors='skip' leaves the document out"

COMPRESSED_SUFFIXES = {
    **{".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz", ".zst": "Zstandard"},
    ".zstd": "Zstandard",
}
_COMPRESSED = (  # first bytes of the files that are unpacked
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\0|\x5d\0\0.{2}[\0\xff]", re.DOTALL), "xz"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL), "Zstandard"),
)
_KINDS = (  # first bytes of files that are not text; no text begins with the bytes of any pattern
    (rb"PAR1\x15|PARE.{0,32}\0", "a Parquet file"),
    (rb"ARROW1\0|\xff{4}.{2}\0\0", "an Arrow file"),
    (rb"FEA1.{0,8}\0|ORC.{0,64}\0|Obj\x01|SEQ[\x04-\x06]", "a table of an unknown format (Feather, ORC, Avro)"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or docx, xlsx, npz or a PyTorch file, which are such)"),
    (rb".{257}ustar", "a tar archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a rar archive"),
    (rb"\x1f[\x9d\xa0]|\x04\x22\x4d\x18|\x02\x21\x4c\x18|LZIP\x01|\x89LZO|\xff\x06\0\0sNaPpY|MSCF\0",
     "a file that is compressed in a way not known here (lz4, lzip, lzop, snappy, compress or cab)"),
    (rb"!<arch>\n|\xed\xab\xee\xdb|hsqs.{0,8}\0|PACK\0\0\0", "an archive"),
    (rb"%PDF-\d", "a PDF document"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document (doc, xls, ppt)"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a.{0,16}\0|BM.{4}\0{4}|II\x2a\0|MM\0\x2a|RIFF.{4}WEBP|\0\0\x01\0|8BPS\0",
     "an image"),
    (rb"OggS\0|ID3[\x02-\x04]|\xff[\xfb\xf3\xf2]|fLaC\0|RIFF.{4}(WAVE|AVI )|MThd\0|\0.{3}ftyp|\x1a\x45\xdf\xa3",
     "audio or video"),
    (rb"\x7fELF|MZ.{0,62}\0|[\xcf\xce]\xfa\xed\xfe|\xfe\xed\xfa[\xcf\xce]|\xca\xfe\xba\xbe|\0asm|BC\xc0\xde",
     "a program"),
    (rb"\x80[\x02-\x05][(X\]}cJKM\x8a\x8c\x95]|\([ld]p\d+\n", "a Python pickle"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"\x89HDF\r\n\x1a\n|CDF[\x01\x02]", "an HDF5 or NetCDF file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb".{4}\0{4}\{", "a safetensors file"),
    (rb"GGUF[\x01-\x09]\0", "a GGUF model"),
    (rb"\0\x01\0\0\0|OTTO\0|wOF[F2]\0", "a font"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32 (iconv -f UTF-32 -t UTF-8 converts it)"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"),
)  # fmt: skip
_ANY_KIND = re.compile(b"|".join(pattern for pattern, _ in _KINDS), re.DOTALL)
_BAD_BYTES = re.compile("[\0\udc80-\udcff]")


class SourceError(ValueError):
    """A source of documents cannot be read; the message names the file and the position."""

    def __init__(self, message: str):
        super().__init__(f"DatasetBuilder: {message}")


def recognise(head: bytes) -> str | None:
    """The kind of a file with these first bytes, in words; None if it may be text."""
    if compression := _compression_of(head):
        return _a_file(compression)
    if not _ANY_KIND.match(head):
        return None
    return next(kind for pattern, kind in _KINDS if re.compile(pattern, re.DOTALL).match(head))


class Input(NamedTuple):
    """An open file, unpacked if it is compressed."""

    file: BinaryIO
    head: bytes  # its first bytes, at most HEAD_BYTES; reading `file` still returns them


@contextlib.contextmanager
def open_input(path: Path, where: str, stream: BinaryIO | None = None) -> Iterator[Input]:
    """Open a file and unpack it if its first bytes show that it is compressed, whatever its name.

    Args:
        path: the file. If its suffix names a compression, the file, or the `stream`, must be compressed that way.
        where: name in messages.
        stream: read this instead of opening `path`.
    """
    promised = COMPRESSED_SUFFIXES.get(path.suffix.lower())
    with contextlib.ExitStack() as stack:
        file: BinaryIO = stack.enter_context(open(path, "rb", HEAD_BYTES)) if stream is None else stream
        head, file = _look(file)
        compression = _compression_of(head)
        if promised and compression is None:
            got = recognise(head) or ("an empty file" if not head else "a file that is not compressed")
            raise SourceError(f"{where} must be {_a_file(promised)}, as its name says, got {got}")
        if compression is not None:
            file = io.BufferedReader(_Unpacked(file, compression, where), HEAD_BYTES)
            head, file = _look(file)
            if twice := _compression_of(head):
                raise SourceError(f"{where} must be compressed once, got {_a_file(twice)} in {_a_file(compression)}")
        yield Input(file, head)


def _a_file(compression: str) -> str:
    return f"{'an' if compression == 'xz' else 'a'} {compression} file"


def _compression_of(head: bytes) -> str | None:
    return next((kind for pattern, kind in _COMPRESSED if pattern.match(head)), None)


def _look(file: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first bytes of a file, and a file whose reads still return them."""
    head = file.read(HEAD_BYTES)
    while 0 < len(head) < HEAD_BYTES and (more := file.read(HEAD_BYTES - len(head))):
        head += more
    if len(head) < HEAD_BYTES:
        return head, io.BytesIO(head)  # the whole file
    if file.seekable():
        file.seek(0)
        return head, file
    return head, io.BufferedReader(_Joined(head, file), HEAD_BYTES)


class _Joined(io.RawIOBase):
    """Bytes, then the rest of a file."""

    def __init__(self, head: bytes, file: BinaryIO):
        self._head = memoryview(head)
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._head[: len(view)] or self._file.read(len(view))
        self._head = self._head[len(data) :]
        view[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file: all its streams, one after the other; each must be complete."""

    def __init__(self, file: BinaryIO, compression: str, where: str):
        self._compression = compression
        self._where = where
        self._size = 0
        self._read: Callable[[int], bytes]
        if compression == "gzip":
            self._read = gzip.GzipFile(fileobj=file, mode="rb").read1
        elif compression == "Zstandard":
            import pyarrow

            self._read = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd").read
        else:
            self._read = _Streams(file, bz2.BZ2Decompressor if compression == "bzip2" else lzma.LZMADecompressor).read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        try:
            data = self._read(len(view))
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk
            message = f"must be a whole {self._compression} file, it is damaged after {self._size} bytes of its content"
            raise SourceError(f"{self._where} {message}: {error}") from error
        view[: len(data)] = data
        self._size += len(data)
        return len(data)


class _Streams:
    """Streams of bzip2 or xz, one after the other. Python's own readers treat a damaged later stream as the end."""

    def __init__(self, file: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]):
        self._file = file
        self._new = new
        self._rest = b""  # read, but not yet given to the decompressor
        self._decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = new()

    def read(self, size: int) -> bytes:
        while self._decompressor is not None:
            data, self._rest = self._rest, b""
            if not data and self._decompressor.needs_input and not (data := self._file.read(HEAD_BYTES)):
                raise EOFError("it ends before its end mark")
            content = self._decompressor.decompress(data, size)
            if self._decompressor.eof:
                rest = self._decompressor.unused_data
                # Zeros between the streams are padding.
                while not (rest := rest.lstrip(b"\0")) and (more := self._file.read(HEAD_BYTES)):
                    rest = more
                self._rest = rest
                self._decompressor = self._new() if rest else None
            if content:
                return content
        return b""


def seekable(file: BinaryIO) -> BinaryIO:
    """The file, or a nameless copy on the disk if the file cannot seek."""
    if file.seekable():
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed and removed with the last reference)
    while block := file.read(BLOCK_BYTES):
        copy.write(block)
    copy.seek(0)
    return copy


class Decoder:
    """UTF-8 to text, for the whole of one file or column.

    With errors="strict", bytes that are not UTF-8 are an error; otherwise they become surrogates, which
    `cleaning.clean` replaces or skips. More than a few per cent of them are always an error.

    Args:
        where: name of the file or column in messages.
        errors: as in `DatasetBuilder`.
    """

    def __init__(self, where: str, errors: str):
        self.where = where
        self.errors = errors
        self._bytes = self._bad = 0

    def __call__(self, data: bytes, offset: int = 0, place: str = "") -> str:
        """The text of `data`, which begins `offset` bytes after the start of `place` (a line or row, for messages)."""
        self._bytes += len(data)
        try:
            text = data.decode()
            if "\0" not in text:
                return text
            self._count(text)
            return text
        except UnicodeDecodeError as error:
            text = data.decode("utf-8", "surrogateescape")
            bad = self._count(text)
            if self.errors != "strict":
                return text
            advice = "; " + (_NOT_TEXT if _is_too_bad(bad, len(data)) else REMEDY)
            raise SourceError(
                f"{self.where}{place} must be UTF-8, got byte 0x{data[error.start]:02x} at byte "
                f"{offset + error.start}: {error.reason}{advice}"
            ) from None

    def count_good(self, size: int) -> None:
        """Count bytes that were decoded elsewhere."""
        self._bytes += size

    def finish(self) -> None:
        """Raise if the share of bad bytes in the whole file is too large."""
        if _is_too_bad(self._bad, self._bytes):
            raise SourceError(
                f"{self.where} must be UTF-8 text: {self._bad} of {self._bytes} bytes "
                f"({self._bad / self._bytes:.0%}) are NUL or not UTF-8; {_NOT_TEXT}"
            )

    def _count(self, text: str) -> int:
        bad = len(_BAD_BYTES.findall(text))
        self._bad += bad
        if self._bytes >= HEAD_BYTES:
            self.finish()
        return bad


_NOT_TEXT = "it looks like a binary file or text of another encoding: convert it to UTF-8, or leave it out"


def _is_too_bad(bad: int, size: int) -> bool:
    return bad >= MIN_BAD_BYTES and bad > MAX_BAD_SHARE * size


def check_text(head: bytes, where: str) -> None:
    """Raise unless a file that begins with `head` may be text."""
    if kind := recognise(head):
        table = next((name for name in ("parquet", "arrow") if name in kind.lower()), None)
        advice = "; unpack or convert it, or leave it out"
        if table:
            advice = f"; format={table!r} reads it, and so does the right suffix, .{table}"
        raise SourceError(f"{where} must be UTF-8 text, got {kind}{advice}")
    if len(head) == HEAD_BYTES:
        head = head[: end_of_last_character(head)]
    decoder = Decoder(where, "replace")
    decoder(head)
    decoder.finish()


def end_of_last_character(data: bytes) -> int:
    """The number of bytes before the last character if that is incomplete, else the number of all bytes."""
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:  # not a continuation byte
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) - back if size > back else len(data)
    return len(data)


def length_of_mark(data: bytes) -> int:
    """The length of the byte order mark at the start of `data`, 0 if there is none."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
