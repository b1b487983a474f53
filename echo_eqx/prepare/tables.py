"""Lists of recordings in columns: which separator they use, and what each column holds.

Read are lists with a heading (Common Voice, F5-TTS, XTTS, CSV of any origin) and those without one
(LJSpeech, VITS, Piper, StyleTTS 2, GPT-SoVITS), whose columns are known by what stands in them.
"""

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from echo_eqx.data.text_file import lines_of, open_text
from echo_eqx.errors import EchoError
from echo_eqx.prepare.guess_columns import guessed_columns
from echo_eqx.prepare.records import (
    AUDIO_FIELDS,
    KEY_FIELDS,
    LANGUAGE_FIELDS,
    SPEAKER_FIELDS,
    TEXT_FIELDS,
    SkippedInput,
    printable,
)

LIST_SUFFIXES = (".csv", ".tsv", ".psv", ".list", ".txt")
_SEPARATORS = "|\t;,"
_ROLES = {
    "audio": (*AUDIO_FIELDS, *KEY_FIELDS, "file_id", "utt_id", "clip_id"),
    "text": TEXT_FIELDS,
    "speaker": SPEAKER_FIELDS,
    "language": LANGUAGE_FIELDS,
}
_SAMPLE = 1000

Rows = Iterator[tuple[str, list[str] | SkippedInput]]
"""Where a row stands, and its fields."""


def read_list(
    path: Path, count_audio: Callable[[Sequence[str]], int], say: Callable[[str], object]
) -> Iterator[tuple[str, dict[str, Any] | SkippedInput]]:
    """Rows of a list as fields `audio`, `text` and, where there are such, `speaker`, `language` and
    the other columns of its heading.

    `count_audio` tells how many of the values in a column name audio that exists; `say` is told how
    the list is read.

    **Raises**: `EchoError` naming the list if it cannot be told what its columns are.
    """
    head = [line or "" for line in itertools.islice(lines_of(path), 100)]
    filled = [line for line in head if line.strip() and not line.startswith("sep=")]
    plain = [line for line in filled if not line.startswith("#")]
    separator, is_quoted = _separator(path, plain or filled)
    sample = [row for _, row in itertools.islice(_rows(path, separator, is_quoted), _SAMPLE)]
    rows = [row for row in sample if not isinstance(row, SkippedInput)]
    first = next((i for i, row in enumerate(sample) if _begins(row)), 0)
    heading = _heading(sample[first]) if sample else []
    if heading:
        columns = _named_columns(heading, path.name)
    else:
        columns = guessed_columns(rows, count_audio, path.name)
    is_text_alone = set(columns) <= {"audio", "raw_text", "text", ""}
    shown = "|".join(printable(name) or "-" for name in columns)
    say(f"{path.name}: columns {shown}" + ("" if heading else " (it has no heading)"))
    start = first + 1 if heading else 0
    for place, row in itertools.islice(_rows(path, separator, is_quoted), start, None):
        if isinstance(row, SkippedInput):
            yield place, row
            continue
        while len(row) > len(columns) and not row[-1]:
            row = row[:-1]
        is_short = not heading and is_text_alone and 2 <= len(row) < len(columns)
        if len(row) != len(columns) and not is_short:
            detail = f"has {len(row)} fields; expected {len(columns)}: {shown}"
            yield place, SkippedInput("manifest", place, detail)
            continue
        fields: dict[str, Any] = {n: v for n, v in zip(columns, row, strict=False) if n and v}
        if not heading:
            raw = fields.pop("raw_text", "")
            fields["text"] = fields.get("text") or raw
        yield place, fields


def _separator(path: Path, head: Sequence[str]) -> tuple[str, bool]:
    """What stands between the columns, and whether fields are quoted as in CSV."""

    def regular(separator: str) -> float:
        counts = [len(row) for row in csv.reader(head, delimiter=separator)]
        return sum(count == counts[0] > 1 for count in counts) / len(counts)

    if not head:
        raise EchoError(f"{path} has neither a heading nor rows; expected a list of recordings")
    # A tab or a bar in the first line is there to part columns; the others also stand in texts.
    order = _SEPARATORS if path.suffix.lower() != ".tsv" else "\t|;,"
    separator = next((mark for mark in order[:2] if mark in head[0]), None)
    if separator is None:
        try:
            separator = max(order[2:], key=regular)
        except csv.Error:
            separator = ","
    if separator in ";,":
        return separator, True
    # Bars and tabs come with and without the quotes of CSV; texts begin with quotes too.
    if not any(f'{separator}"' in line or line.startswith('"') for line in head):
        return separator, False
    if 2 * sum(line.startswith('"') for line in head) >= len(head):
        return separator, True
    plain = [line.count(separator) for line in head]
    quoted = [len(row) - 1 for row in csv.reader(head, delimiter=separator)]
    return separator, len(quoted) == len(plain) and _spread(quoted) < _spread(plain)


def _spread(counts: Sequence[int]) -> int:
    """How many rows have another number of fields than most."""
    return len(counts) - Counter(counts).most_common(1)[0][1]


def _rows(path: Path, separator: str, is_quoted: bool) -> Rows:
    """The rows of a list without blank ones and comments."""
    for place, row in (_quoted if is_quoted else _plain)(path, separator):
        if isinstance(row, SkippedInput):
            yield place, row
            continue
        row = [field.strip() for field in row]
        is_comment = row[:1] == ["sep="] or (len(row) == 1 and row[0].startswith("#"))
        if any(row) and not is_comment:
            yield place, row


def _plain(path: Path, separator: str) -> Rows:
    try:
        for number, line in enumerate(lines_of(path), 1):
            place = f"{path.name}:{number}"
            if line is None:
                yield place, SkippedInput("manifest", place, "is too long for a line of a list")
            else:
                yield place, [_unquoted(field.strip()) for field in line.split(separator)]
    except UnicodeDecodeError as error:
        yield path.name, SkippedInput("manifest", path.name, f"cannot be read as text: {error}")


def _unquoted(field: str) -> str:
    """Without the quotes of CSV, where it can only be them: those inside are doubled."""
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '""' in inside
    return inside.replace('""', '"') if is_quoted and '"' not in inside.replace('""', "") else field


def _quoted(path: Path, separator: str) -> Rows:
    with open_text(path) as file:
        # Strictly: else a quote that is not closed would take the rows after it into its field.
        rows = csv.reader(file, delimiter=separator, strict=True)
        while True:
            place = f"{path.name}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, SkippedInput("manifest", place, f"is not CSV: {error}")
            except UnicodeDecodeError as error:
                yield place, SkippedInput("manifest", place, f"cannot be read as text: {error}")
                return
            else:
                yield place, row


def _begins(row: list[str] | SkippedInput) -> bool:
    """Whether `row` is the heading or the first that is not a comment."""
    return not isinstance(row, SkippedInput) and (not row[0].startswith("#") or bool(_heading(row)))


def _heading(row: list[str] | SkippedInput) -> list[str]:
    """The names in `row`, in lower case, if it names columns of audio and of text, else none."""
    if isinstance(row, SkippedInput):
        return []
    names = [field.lstrip("#").strip().strip('"').lower() for field in row]
    is_heading = all(set(names) & set(_ROLES[role]) for role in ("audio", "text"))
    return names if is_heading else []


def _named_columns(names: Sequence[str], list_name: str) -> list[str]:
    """The names of a heading, with the first that is known for each role named after that."""
    columns = list(names)
    for role, known in _ROLES.items():
        found = next((name for name in known if name in columns), None)
        if found is not None:
            columns[columns.index(found)] = role
    repeated = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if repeated:
        raise EchoError(
            f"{list_name}: expected each column once, got {repeated[0]!r} more than once; rename "
            "the columns that are not meant"
        )
    return columns
