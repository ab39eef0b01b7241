"""Why a file cannot be read, and in which line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from veneer.data.records import LINES, SEPARATORS, records
from veneer.errors import DataError

_HEAD = 4096
_CHUNK = 1 << 24
_SHOWN = 80
_OTHERWISE = {
    b"PAR1": "is a Parquet file; name it .parquet",
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"PK\x03\x04": "is a zip archive or an office document; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
}


def check_bytes(path: Path, reader: str) -> None:
    """Look at a file's bytes: is it what its name says?

    Raises:
        DataError: it is empty, UTF-16, binary, or of another kind.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise DataError(f"{path} is empty.")
    if reader == "parquet":
        if head[:4] != b"PAR1":
            raise DataError(f"{path} is no Parquet file: it does not begin as one.")
        return
    for magic, what in _OTHERWISE.items():
        if head.startswith(magic):
            raise DataError(f"{path} {what}.")
    if head[:2] in {b"\xff\xfe", b"\xfe\xff"} or (b"\0" in head and _every_other(head)):
        raise DataError(
            f"{path} is not UTF-8 text but UTF-16; convert it: iconv -f utf-16 -t utf-8 {path.name} > new{path.suffix}"
        )
    if b"\0" in head:
        raise DataError(f"{path} is not UTF-8 text: it is binary.")
    if reader == "json" and not _is_utf8(path) and (problem := _encoding_problem(path)):
        raise DataError(problem)  # the reader itself lets bad bytes through, and fails much later


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _every_other(head: bytes) -> bool:
    """Whether half of the bytes are zero, all on one side: UTF-16 of mostly Latin text, without its mark."""
    sides = head[0::2].count(0), head[1::2].count(0)
    return min(sides) == 0 and max(sides) > len(head) // 4


def check_header(path: Path, header: list[str]) -> None:
    """Check the names of a table's columns.

    Raises:
        DataError: a name occurs twice, or the table seems to be separated by something else.
    """
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}, line 1: the header names {', '.join(map(repr, twice))} twice; rename one.")
    for other, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
        if len(header) == 1 and other in header[0]:
            raise DataError(
                f"{path}, line 1: the cells seem to be separated by {name}; save it as .csv with commas, or as .tsv "
                "with tabs."
            )


def explained(path: Path, reader: str, error: Exception) -> str:
    """What is wrong with a file that a reader gave up on, with the line if it can be found."""
    cause = error.__cause__ or error
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{path} has no rows."
    if isinstance(cause, OSError) and cause.strerror:
        return f"{path} cannot be read: {cause.strerror}" + (f" ({cause.filename})." if cause.filename else ".")
    if problem := _problem(path, reader):
        return problem
    first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return f"{path} cannot be read as {reader}: {first}"


def _problem(path: Path, reader: str) -> str | None:
    if reader == "parquet":
        return _parquet_problem(path)
    inner = {"json": _json_problem, "csv": _table_problem}.get(reader, lambda _: None)
    return _encoding_problem(path) or inner(path)


def _parquet_problem(path: Path) -> str | None:
    with path.open("rb") as file:
        file.seek(-4, 2)
        whole = file.read() == b"PAR1"
    return None if whole else f"{path} is cut off: a Parquet file's end is missing. Copy or download it again."


def _encoding_problem(path: Path) -> str | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: not UTF-8 text (byte 0x{line[error.start]:02x}); convert the file "
                    f"first, e.g. iconv -f latin1 -t utf-8 {path.name} > new{path.suffix}"
                )
    return None


def _json_problem(path: Path) -> str | None:
    if path.suffix.lower() in LINES:
        return _json_lines_problem(path)
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines_problem(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as broken:
        line = text.split("\n")[broken.lineno - 1]
        cut = _cut_off(text, broken.pos)
        return (
            f"{path}, line {broken.lineno}: malformed JSON ({broken.msg}, column {broken.colno}){cut}: {_short(line)}"
        )
    wrong = [number for number, value in enumerate(values, start=1) if not isinstance(value, dict)]
    return f"{path}, row {wrong[0]}: not a JSON object." if wrong else None


def _json_lines_problem(path: Path) -> str | None:
    for record in records(path):
        try:
            value = json.loads(record.text)
        except json.JSONDecodeError as broken:
            cut = "" if record.text.endswith("\n") else _cut_off(record.text, broken.pos)
            return _malformed(path, record.line, broken, cut, record.text)
        if not isinstance(value, dict):
            return f"{path}, line {record.line}: not a JSON object: {_short(record.text)}"
    return None


def _malformed(path: Path, number: int, broken: json.JSONDecodeError, cut: str, line: str) -> str:
    return f"{path}, line {number}: malformed JSON ({broken.msg}, column {broken.colno}){cut}: {_short(line)}"


def _cut_off(text: str, position: int) -> str:
    """A hint if the text simply stops: nothing closes after the place where parsing failed."""
    return "" if text.rstrip().endswith(("}", "]")) and position < len(text.rstrip()) else "; the file seems cut off"


def _table_problem(path: Path) -> str | None:
    width = 0
    record = None
    for record in records(path):
        width = width or len(record.cells)
        if len(record.cells) > width:
            separator = SEPARATORS[path.suffix.lower()]
            return (
                f"{path}, line {record.line}: {len(record.cells)} cells where the header has {width}; put cells that "
                f"hold a {'comma' if separator == ',' else 'tab'} in double quotes."
            )
    if record is not None and record.text.count('"') % 2:
        return f"{path}, line {record.line}: a quote is opened here and never closed; the file seems cut off."
    return None


def _short(line: str) -> str:
    return line.strip()[:_SHOWN]
