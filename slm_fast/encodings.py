"""Decoding of files and streams into lines of text: detecting the encoding, and finding lines that are not valid."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from slm_fast.errors import InputError, WorkError, one_line, warn

HEAD = 1 << 20  # maximum bytes of the first line that are examined
UTF8 = "utf-8-sig"
LEGACY = "cp1252"
MARKS = ((codecs.BOM_UTF8, UTF8), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
GZIP = b"\x1f\x8b"
NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"%PDF": "a PDF file",
}
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # never found in Windows-1252 text
UNDECODED = re.compile("[\udc00-\udcff]")


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode each invalid byte to a lone surrogate, so that a row is read completely before it is reported as bad."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("slm_fast.mark", _mark)


def check_encoding(encoding: str) -> str:
    """Python's name of a text encoding. Raises InputError if it has none."""
    try:
        name = codecs.lookup(encoding).name
        with suppress(UnicodeError):
            b"text".decode(encoding)  # base64 and the like are not text encodings
        if name in ("idna", "punycode"):  # of domain names
            raise LookupError
    except (LookupError, TypeError, ValueError):
        raise InputError(f"encoding: expected a name such as utf-8, utf-16 or cp1252, got {encoding!r}") from None
    return UTF8 if name == "utf-8" else name


def guess_encoding(head: bytes) -> str:
    """Guess from a byte order mark, or the zero bytes, all on one side, of ASCII letters in UTF-16; else UTF-8."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < 2 or (even and odd):
        return UTF8
    return "utf-16-le" if odd else "utf-16-be"


def settle(encoding: str | None, head: bytes) -> str:
    """The encoding of data that begins with `head`: the given one, with a byte order if it has no mark, or a guess."""
    guess = guess_encoding(head)
    if encoding in ("utf-16", "utf-32") and guess != encoding:
        return guess if guess.startswith(encoding) else f"{encoding}-le"
    return encoding or guess


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed if its name ends in .gz. Raises WorkError."""
    try:
        return cast("IO[bytes]", (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb"))
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None


def read_head(file: IO[bytes], name: str) -> bytes:
    """Read up to the end of the first line that is not blank, without waiting for more."""
    head = b""
    try:
        while not head.strip(b"\xef\xbb\xbf \t\r\n\v\f") and len(head) < HEAD:
            line = file.readline(HEAD)
            if not line:
                break
            head += line
    except (EOFError, OSError, zlib.error) as error:
        raise WorkError(f"{name}: cannot be read: breaks off after line 0: {one_line(error)}") from None
    return head


class _Rejoined(io.RawIOBase):
    """A stream with the data already read from it put back. Closing it leaves the original open."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        size = len(into)
        if self._head:
            part, self._head = bytes(self._head[:size]), self._head[size:]
        else:
            part = getattr(self._rest, "read1", self._rest.read)(size) or b""
        into[: len(part)] = part
        return len(part)


def rejoined(head: bytes, rest: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Rejoined(head, rest))


class Lines:
    """Iterator over the lines of a binary file. `bad` collects (line number, byte) of lines that cannot be decoded.

    Args:
        file: the binary file.
        name: its name, for messages.
        encoding: None means UTF-8.
        newline: as for `open`: "\\n", or "" if "\\r" also ends a line.
        again: path of the file if it can be read again. If no line that is not plain ASCII is valid UTF-8, it is then
            read as Windows-1252, with a warning.
    """

    def __init__(
        self, file: IO[bytes], name: str, encoding: str | None, newline: str, again: Path | None = None
    ) -> None:
        self.name, self.encoding = name, encoding or UTF8
        self.bad: list[tuple[int, int]] = []
        self._again = again if encoding is None or encoding == UTF8 else None
        errors = "surrogateescape" if self.encoding == UTF8 else "slm_fast.mark"  # for UTF-8 the same, but faster
        self._text = io.TextIOWrapper(cast("Any", file), self.encoding, errors, newline)

    def __iter__(self) -> Iterator[str]:
        legacy = False
        for number, line in enumerate(_unbroken(self._text, self.name), 1):
            if line.isascii():
                yield line
                continue
            found = UNDECODED.search(line)
            if found is None:
                self._again = None
            elif self._again is not None:
                legacy, self._again = _is_legacy(self._again), None
                if legacy:
                    warn(f'{self.name}: not UTF-8; read as Windows-1252 (encoding="cp1252"; --encoding)')
            if found is not None and legacy:
                line = line.encode("utf-8", "surrogateescape").decode(LEGACY, "slm_fast.mark")
                found = UNDECODED.search(line)
            if found is not None:
                self.bad.append((number, ord(found.group()) - 0xDC00))
            yield line.removeprefix("\ufeff") if number == 1 else line

    def error(self, byte: int) -> WorkError:
        return WorkError(f"not {'UTF-8' if self.encoding == UTF8 else self.encoding} (byte 0x{byte:02x})")


def _is_legacy(path: Path) -> bool:
    """Whether a file is Windows-1252 rather than UTF-8 with some bad lines: no line that is not plain ASCII is valid
    UTF-8, and every byte is valid in Windows-1252."""
    with io.TextIOWrapper(open_binary(path), "utf-8", "surrogateescape", newline="") as text:
        try:
            for line in text:
                if not line.isascii():
                    if not UNDECODED.search(line):
                        return False
                    line.encode("utf-8", "surrogateescape").decode(LEGACY)
                if CONTROL.search(line):
                    return False
        except (EOFError, OSError, zlib.error, UnicodeDecodeError):
            return False
    return True


def _unbroken(lines: Iterable[str], name: str) -> Iterator[str]:
    """Yield the lines of a file. Raises WorkError if it breaks off."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007
            yield line
    except (EOFError, OSError, zlib.error, UnicodeError) as error:
        raise WorkError(f"{name}: cannot be read: breaks off after line {number}: {one_line(error)}") from None
