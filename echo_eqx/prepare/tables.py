"""Tables of recordings: detect the separator, and name the columns.

A table may have a header (Common Voice, F5-TTS, XTTS, any CSV). If it has none (LJSpeech, VITS,
Piper, StyleTTS 2, GPT-SoVITS), its columns are guessed from their values.
"""

import csv
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from echo_eqx.data.text_file import lines_of, open_text
from echo_eqx.errors import EchoError, printable
from echo_eqx.prepare.guess_columns import guess_columns
from echo_eqx.prepare.records import (
    AUDIO_FIELDS,
    KEY_FIELDS,
    LANGUAGE_FIELDS,
    SPEAKER_FIELDS,
    TEXT_FIELDS,
    SkippedInput,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".psv", ".list", ".txt")
_ROLES = {
    "audio": (*AUDIO_FIELDS, *KEY_FIELDS, "file_id", "utt_id", "clip_id"),
    "text": TEXT_FIELDS,
    "speaker": SPEAKER_FIELDS,
    "language": LANGUAGE_FIELDS,
}
_SAMPLE = 1000
logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, list[str] | SkippedInput]]
"""The place (file and line) and the values of each row."""


def read_table(
    path: Path, count_audio: Callable[[Sequence[str]], int]
) -> Iterator[tuple[str, dict[str, Any] | SkippedInput]]:
    """The place and fields of each row: `audio`, `text`, and if present `speaker`, `language` and
    the other columns of the header.

    `count_audio` counts the values of a column that name existing audio.

    **Raises**: `EchoError` naming the table if its columns cannot be determined.
    """
    head = [line or "" for line in itertools.islice(lines_of(path), 100)]
    filled = [line for line in head if line.strip() and not line.startswith("sep=")]
    uncommented = [line for line in filled if not line.startswith("#")]
    separator, is_quoted = _detect_separator(path, uncommented or filled)
    sample = [row for _, row in itertools.islice(_rows(path, separator, is_quoted), _SAMPLE)]
    rows = [row for row in sample if not isinstance(row, SkippedInput)]
    first = next((i for i, row in enumerate(sample) if _is_first(row)), 0)
    header = _header(sample[first]) if sample else []
    if header:
        columns = _name_columns(header, path.name)
    else:
        columns = guess_columns(rows, count_audio, path.name)
    is_text_alone = set(columns) <= {"audio", "raw_text", "text", ""}
    shown = "|".join(printable(name) or "-" for name in columns)
    logger.info("%s: columns %s%s", path.name, shown, "" if header else " (it has no header)")
    start = first + 1 if header else 0
    for place, row in itertools.islice(_rows(path, separator, is_quoted), start, None):
        if isinstance(row, SkippedInput):
            yield place, row
            continue
        while len(row) > len(columns) and not row[-1]:
            row = row[:-1]
        is_short = not header and is_text_alone and 2 <= len(row) < len(columns)
        if len(row) != len(columns) and not is_short:
            detail = f"expected {len(columns)} fields, got {len(row)}: {shown}"
            yield place, SkippedInput("manifest", place, detail)
            continue
        fields: dict[str, Any] = {n: v for n, v in zip(columns, row, strict=False) if n and v}
        if not header:
            raw = fields.pop("raw_text", "")
            fields["text"] = fields.get("text") or raw
        yield place, fields


def _detect_separator(path: Path, head: Sequence[str]) -> tuple[str, bool]:
    """The separator of the columns, and whether fields are quoted as in CSV."""

    def regularity(separator: str) -> float:
        counts = [len(row) for row in csv.reader(head, delimiter=separator)]
        return sum(count == counts[0] > 1 for count in counts) / len(counts)

    if not head:
        raise EchoError(f"{path}: expected a table of recordings, got neither a header nor rows")
    # A tab or bar in the first line is always a separator; ; and , also occur in texts.
    certain = "\t|" if path.suffix.lower() == ".tsv" else "|\t"
    separator = next((mark for mark in certain if mark in head[0]), None)
    if separator is None:
        try:
            return max(";,", key=regularity), True
        except csv.Error:
            return ",", True
    # Tables with bars and tabs may be quoted as CSV or not; texts may begin with quotes too.
    if not any(f'{separator}"' in line or line.startswith('"') for line in head):
        return separator, False
    if 2 * sum(line.startswith('"') for line in head) >= len(head):
        return separator, True
    plain = [line.count(separator) for line in head]
    quoted = [len(row) - 1 for row in csv.reader(head, delimiter=separator)]
    return separator, len(quoted) == len(plain) and _irregular(quoted) < _irregular(plain)


def _irregular(counts: Sequence[int]) -> int:
    """How many counts differ from the most common one."""
    return len(counts) - Counter(counts).most_common(1)[0][1]


def _rows(path: Path, separator: str, is_quoted: bool) -> Rows:
    """The rows of a table, without blank lines and comments."""
    try:
        for place, row in (_quoted_rows if is_quoted else _plain_rows)(path, separator):
            if isinstance(row, SkippedInput):
                yield place, row
                continue
            row = [field.strip() for field in row]
            is_comment = row[:1] == ["sep="] or (len(row) == 1 and row[0].startswith("#"))
            if any(row) and not is_comment:
                yield place, row
    except UnicodeDecodeError as error:
        detail = f"cannot be read as text: {error}"
        yield path.name, SkippedInput("manifest", path.name, detail)


def _plain_rows(path: Path, separator: str) -> Rows:
    for number, line in enumerate(lines_of(path), 1):
        place = f"{path.name}:{number}"
        if line is None:
            yield place, SkippedInput("manifest", place, "is too long for a line of a table")
        else:
            yield place, [_unquoted(field.strip()) for field in line.split(separator)]


def _unquoted(field: str) -> str:
    """`field` without its quotes if they are clearly CSV quotes: CSV doubles the inner ones."""
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '""' in inside
    return inside.replace('""', '"') if is_quoted and '"' not in inside.replace('""', "") else field


def _quoted_rows(path: Path, separator: str) -> Rows:
    with open_text(path) as file:
        # Strict: otherwise an unclosed quote would swallow the rows that follow.
        rows = csv.reader(file, delimiter=separator, strict=True)
        while True:
            place = f"{path.name}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, SkippedInput("manifest", place, f"is not CSV: {error}")
            else:
                yield place, row


def _is_first(row: list[str] | SkippedInput) -> bool:
    """Whether `row` is the header, or the first row that is not a comment."""
    return not isinstance(row, SkippedInput) and (not row[0].startswith("#") or bool(_header(row)))


def _header(row: list[str] | SkippedInput) -> list[str]:
    """The names in `row` in lower case if they include audio and text, else nothing."""
    if isinstance(row, SkippedInput):
        return []
    names = [field.lstrip("#").strip().strip('"').lower() for field in row]
    is_header = all(set(names) & set(_ROLES[role]) for role in ("audio", "text"))
    return names if is_header else []


def _name_columns(names: Sequence[str], table_name: str) -> list[str]:
    """The names in a header, with the column of each role renamed to the role."""
    columns = list(names)
    for role, known in _ROLES.items():
        found = next((name for name in known if name in columns), None)
        if found is not None:
            columns[columns.index(found)] = role
    repeated = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if repeated:
        raise EchoError(
            f"{table_name}: expected each column once, got {repeated[0]!r} more than once; rename "
            "the others"
        )
    return columns
