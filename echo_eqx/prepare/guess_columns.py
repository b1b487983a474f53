"""Guess the columns of a table without a header from their values."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from echo_eqx.errors import EchoError, printable
from echo_eqx.prepare.records import AUDIO_FIELDS, TEXT_FIELDS

_ENOUGH = 8
"""With fewer rows, how often a value repeats means nothing."""
_TOO_FEW = 20
"""With fewer rows, raw and normalized text need not share words to be recognized."""
_LONGEST_LABEL = 64
_DECIMAL = re.compile(r"-?\d+\.\d+")
_WORD = re.compile(r"[\w.@:/+-]+")
_LANGUAGES = set(
    "af am ar az be bg bn bs ca cs cy da de el en es et eu fa fi fil fr ga gl gu he hi hr hu hy id "
    "is it ja jp ka kk km kn ko lo lt lv mk ml mn mr ms mt my nb ne nl nn no pa pl ps pt ro ru si "
    "sk sl so sq sr sv sw ta te th tl tr uk ur uz vi yue zh zu".split()
)


def guess_columns(
    rows: Sequence[list[str]], count_audio: Callable[[Sequence[str]], int], table_name: str
) -> list[str]:
    """Names of the columns; two columns of text are `raw_text` and `text`.

    The audio column names existing files, a language is a known code, a speaker is a short name
    that repeats, and the longest of the other columns is text.

    **Raises**: `EchoError` if any column remains unclear.
    """
    lengths = Counter(map(len, rows))
    width = max((n for n in lengths if lengths[n] * 5 >= len(rows)), default=0)
    whole = [row for row in rows if len(row) == width]
    values = [[row[i] for row in whole] for i in range(width)]
    audio = _audio_column(values, count_audio, table_name)
    columns = [""] * width
    columns[audio] = "audio"
    rest = [i for i in range(width) if i != audio and any(values[i])]
    if not rest:
        raise EchoError(f"{table_name}: expected a column of text, got only audio")
    text = max(rest, key=lambda i: sum(map(len, set(values[i]))))
    texts = [i for i in rest if i == text or _is_same_text(values[i], values[text])]
    labels = [i for i in rest if i not in texts and _is_label(values[i], values[text])]
    unsure = [i for i in rest if i not in texts and i not in labels]
    is_small = not labels and len(texts) == 1 and len(whole) < _TOO_FEW
    if len(unsure) == 1 and is_small and 2 * _sentences(values[unsure[0]]) >= len(whole):
        texts, unsure = sorted([*texts, *unsure]), []  # raw and normalized text
    languages = [
        i for i in labels if all(re.split("[-_]", x.lower())[0] in _LANGUAGES for x in values[i])
    ]
    speakers = [i for i in labels if i not in languages]
    doubtful = unsure + texts[2:] + speakers[1:] + languages[1:]
    if labels and not _is_text(values[text], [values[i] for i in labels]):
        doubtful.append(text)
    if doubtful:
        example = next((value for value in values[doubtful[0]] if value), "")
        raise EchoError(
            f"{table_name}: cannot tell what column {doubtful[0] + 1} is (example: "
            f"{printable(example[:40])!r}); name the columns in the first line, such as "
            "audio|text|speaker"
        )
    for i in texts:
        columns[i] = "raw_text"
    columns[texts[-1]] = "text"
    for i, name in [*((i, "speaker") for i in speakers), *((i, "language") for i in languages)]:
        columns[i] = name
    return columns


def _audio_column(
    values: Sequence[list[str]], count_audio: Callable[[Sequence[str]], int], table_name: str
) -> int:
    """The column in which most values name existing files."""
    hits = [count_audio(column) for column in values]
    best = max(hits, default=0)
    if best == 0:
        example = next((value for column in values for value in column if value), "")
        if len(values) == 1:
            raise EchoError(
                f"{table_name}: expected a header, or columns separated by |, tab, ; or comma, got "
                f"{printable(example[:60])!r}; separation by spaces (Kaldi) is not supported"
            )
        raise EchoError(
            f"{table_name}: expected a header with one of {', '.join(AUDIO_FIELDS[:4])} and one of "
            f"{', '.join(TEXT_FIELDS[:4])}, or a column of existing audio files relative to the "
            f"table, got {printable(example[:60])!r}"
        )
    likely = [i for i, count in enumerate(hits) if 2 * count > best]
    if len(likely) > 1:
        raise EchoError(
            f"{table_name}: columns {likely[0] + 1} and {likely[1] + 1} both name existing audio; "
            "name the columns in the first line, such as audio|text|speaker"
        )
    return likely[0]


def _is_same_text(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether most rows of two columns share words: the same text, raw and normalized."""
    pairs = [(_words(a), _words(b)) for a, b in zip(ours, theirs, strict=True) if a and b]
    return 2 * sum(4 * len(a & b) >= max(1, len(a | b)) for a, b in pairs) > len(pairs)


def _words(text: str) -> set[str]:
    # Chinese and Japanese do not separate words; there, characters are compared.
    return set(re.findall(r"[^\W\u3040-\u9fff]+|[\u3040-\u9fff]", text.casefold()))


def _is_label(column: Sequence[str], text: Sequence[str]) -> bool:
    """Whether values are labels: short, and either repeated or single words."""
    found = [value for value in column if value]
    distinct = set(found)
    if max(map(len, distinct)) > _LONGEST_LABEL or any(map(_DECIMAL.fullmatch, distinct)):
        return False
    if len(found) >= _ENOUGH and len(distinct) == len(found):
        return False
    is_repeated = len(found) >= 4 and 2 * len(distinct) <= len(found)
    if is_repeated and len(distinct) < len(set(text)):
        return True
    return all(map(_WORD.fullmatch, distinct))


def _sentences(column: Sequence[str]) -> int:
    """How many values are more than one word."""
    return sum(_WORD.fullmatch(value) is None for value in column if value)


def _is_text(column: Sequence[str], labels: Sequence[Sequence[str]]) -> bool:
    """Whether `column` is text rather than a label: it has sentences, or far more variety."""
    if 2 * _sentences(column) > sum(map(bool, column)):
        return True
    most = max(len(set(label)) for label in labels)
    are_ids = all(value.isdigit() for label in labels for value in label)
    return are_ids or (len(column) >= _ENOUGH and len(set(column)) > 2 * most)
