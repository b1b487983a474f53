"""How long a text takes to say, in characters of plain English."""

from typing import Any

import numpy as np
import regex

CHARACTERS_PER_SECOND = 14.0
"""Plain English, read calmly."""

# Seconds that espeak-ng 1.51 takes (160 words a minute, each language's voice, 20 to 50 samples of
# each kind), times 14. Plain English measures 0.75 per character and counts 1, to leave room for
# slower readers and for the pauses of ordinary prose.
_DIGIT = {1: 4.5, 2: 5.5, 3: 7.0, 4: 7.0}  # a digit of a number with so many
_DIGIT_OF_LONG = 8.5
_CAPITAL_OF_ACRONYM, _W_OF_ACRONYM = 3.0, 6.0
_EMOJI = 10.0
_JOINED = 5.0  # example.com, 2.5
_SYMBOLS = (
    {"$": 5, "€": 6, "£": 6, "¥": 5, "₹": 5, "%": 8, "&": 4, "@": 4, "#": 5, "+": 5, "=": 9}
    | {"/": 7, "*": 8, "\\": 8, "°": 7, "©": 9, "®": 8, "™": 10, "§": 8, "~": 6, "µ": 6, "×": 7}
    | {"÷": 10, "_": 2, "^": 2, "|": 2, "<": 3, ">": 3, "℃": 16, "℉": 20, "№": 7, "`": 1, "´": 1}
)
_PAUSE = {"sentence": 7.5, "clause": 4.5, "bracket": 2.0}
_PAUSES_IN_PROSE = 0.25
"""Part of a character's width that already accounts for pauses."""
_KINDS = regex.compile(
    r"""
    (?P<tag> \[S[0-9]+\]\s* )
    | (?P<digits> \p{Nd}+ )
    | (?P<acronym> (?<!\p{L})(?:\p{Lu}{2,6}(?=s?(?!\p{L}))|(?:www|https?)(?=[.:,])) )
    | (?P<silent> [\p{M}\p{Cf}\p{EMod}] | \p{Extended_Pictographic}(?<=\u200d.) )
    | (?P<emoji> \p{Extended_Pictographic}(?<![©®™]) )
    | (?P<han> \p{Han} )
    | (?P<syllable> [\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}\p{Yi}] )
    | (?P<abugida> [\p{L}&&[\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Gujarati}\p{Oriya}\p{Tamil}
        \p{Telugu}\p{Kannada}\p{Malayalam}\p{Sinhala}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}
        \p{Ethiopic}\p{Cherokee}\p{Balinese}\p{Javanese}]] )
    | (?P<abjad> [\p{L}&&[\p{Arabic}\p{Hebrew}\p{Syriac}\p{Thaana}]] )
    | (?P<number> [\p{No}\p{Nl}] )
    | (?P<joined> (?<=[\p{L}\p{N}])[.:,?](?=[\p{L}\p{N}/]) )
    | (?P<accented> [\p{Latin}&&\p{L}--[A-Za-z]] )
    | (?P<sentence> (?<!(?<!\p{L})\p{L}(?=\.))[\p{STerm}…]
        (?=[\p{Pe}\p{Pf}"']*\s+(?!\p{Ll}|$)|(?<=[^.!?…])) )
    | (?P<clause> [,;:](?=\s) | [，、；：،؛၊] | (?<=\s)[-–—](?=\s) )
    | (?P<bracket> [\p{Ps}\p{Pi}] )
    | (?P<symbol> \p{S} | [%&@\#/*\\_§] )
    """,
    regex.VERBOSE | regex.VERSION1,
)
_LETTERS = {
    "han": 4.0,
    "syllable": 2.3,
    "abugida": 2.0,
    "abjad": 1.4,
    "number": 6.0,
    "accented": 1.5,
}


def character_widths(text: str) -> tuple[list[float], list[float]]:
    """Width of the speech and of the pause at each character of `text`."""
    said, pauses = [1.0] * len(text), [0.0] * len(text)
    for match in _KINDS.finditer(text):
        kind, start, end = match.lastgroup, match.start(), match.end()
        if kind in ("tag", "silent"):
            said[start:end] = [0.0] * (end - start)
        elif kind == "digits":
            said[start:end] = [_DIGIT.get(end - start, _DIGIT_OF_LONG)] * (end - start)
        elif kind == "acronym":
            said[start:end] = [
                _W_OF_ACRONYM if char in "Ww" else _CAPITAL_OF_ACRONYM for char in match[0]
            ]
        elif kind in _PAUSE:
            pauses[start] = _PAUSE[kind]
        elif kind in _LETTERS:
            said[start] = _LETTERS[kind]
        elif kind == "emoji":
            said[start] = _EMOJI
        elif kind == "joined":
            said[start] = _JOINED
        else:
            said[start] = float(_SYMBOLS.get(match[0], 7))
    return said, pauses


def width_of(said: Any, pauses: Any) -> Any:
    """Width of a range, or of many, from the sums of `character_widths` over it."""
    return said + np.maximum(0, pauses - _PAUSES_IN_PROSE * said)


def speaking_width(text: str) -> float:
    """How long `text` takes to say, in characters of plain English, at 14 per second.

    A digit or a capital of an acronym counts as much as the words for it, a Chinese character 4.
    Speaker tags and the final pause count nothing.
    """
    said, pauses = character_widths(text)
    end = next((i for i in range(len(text), 0, -1) if text[i - 1].isalnum()), 0)
    return float(width_of(sum(said), sum(pauses[:end])))
