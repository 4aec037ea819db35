"""Tab-separated tables, row by row: a malformed row is named by its line and takes no other row along."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST_FIELD = 2**31 - 1  # Python's csv takes 131,072 characters, fewer than an image in base64 has


@dataclass(frozen=True)
class TableRow:
    """The fields of one row by their column, or what is wrong with it, by its first line."""

    fields: dict[str, str]
    fault: str = ""


def read_tsv(path: Path, columns: Sequence[str], layout: str) -> list[TableRow]:
    """Read the rows of a tab-separated file in UTF-8 with a header; blank lines are passed over.

    A quoted field may hold tabs, line breaks and doubled quotes; a quote inside a field that is not quoted
    stands for itself. A row with a quote that is never closed or text after a closing one, another number of
    fields than the header, a NUL, or bytes that are not UTF-8, has a fault. Raises ValueError for a header
    with one, or without one of the columns; ``layout`` says whose they are.
    """
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = list(file)
        table = _rows(lines)
        header, fault = next(table, ([], ""))
        if fault:
            raise ValueError(f"{path.name} is no tab-separated table in UTF-8: {fault}")
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(
                f"{path.name} lacks the columns {', '.join(missing)}; give a tab-separated file in {layout}."
            )
        return [
            TableRow({} if fault else dict(zip(header, fields, strict=True)), fault)
            for fields, fault in table
        ]
    finally:
        csv.field_size_limit(limit)


def _rows(lines: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Fields and fault of the header, and of each row after it."""
    place, width = 0, None
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        fields, used, fault = _row(lines, place, width)
        yield fields, fault
        width = width or len(fields)
        place += used


def _row(lines: Sequence[str], place: int, width: int | None) -> tuple[list[str], int, str]:
    """Fields of the row that begins at a place, the number of its lines, and its fault, "" for none."""
    reader = csv.reader(map(lines.__getitem__, range(place, len(lines))), delimiter="\t", strict=True)
    try:
        fields, torn = next(reader, []), False
    except csv.Error:
        fields, torn = [], True
    used = reader.line_num
    if torn or _swallows(lines[place : place + used], width):
        torn = True
        used = _torn_lines(lines, place, width)
    return fields, used, _fault("".join(lines[place : place + used]), place + 1, torn, fields, width)


def _fault(text: str, line: int, torn: bool, fields: Sequence[str], width: int | None) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # of the surrogates that stand for bytes that are not UTF-8
        return f"line {line} is not UTF-8; save it as UTF-8."
    if "\0" in text:
        return f"line {line} holds a NUL character; remove it."
    if torn:
        return f"a quoted field is not closed, or followed by text; correct line {line}."
    if width is not None and len(fields) != width:
        return f"the row does not have as many columns as the header; correct line {line}."
    return ""


def _swallows(lines: Sequence[str], width: int | None) -> bool:
    """Whether the lines are several rows, of which one opened a quote that a later one happened to close.

    A line of a quoted field may look like a row too, where tabs stand in its text; least so between the
    first and the last line, and seldom both of them.
    """
    first, *between, last = [_is_whole(line, width) for line in lines] if len(lines) > 1 else [False, False]
    return any(between) or (first and last)


def _is_whole(line: str, width: int | None) -> bool:
    """Whether a line, its quotes aside, is a row of the table, and begins with a field that is not quoted."""
    start = line.partition("\t")[0]
    return line.count("\t") + 1 == width and start.strip() != "" and '"' not in start


def _torn_lines(lines: Sequence[str], place: int, width: int | None) -> int:
    """How many lines a row with a bad quote takes: those that together have the header's tabs, or one.

    What follows without any tab is the rest of its last field.
    """
    wanted = (width or 1) - 1
    used, tabs = 1, lines[place].count("\t")
    while tabs and place + used < len(lines):
        more = lines[place + used].count("\t")
        if tabs + more > wanted:
            break
        used, tabs = used + 1, tabs + more
    return used if tabs == wanted else 1
