"""Splitting text into chunks that fit the text length and the length of speech."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import regex

from echo_eqx.data.text.boundaries import (
    SENTENCE,
    UNIT,
    cuts_after_sentences,
    cuts_after_words,
    cuts_inside_word,
)
from echo_eqx.data.text.clean import TAG, says_something
from echo_eqx.data.text.width import character_widths, width_of

_TAGS_AT_END = regex.compile(r"(\[S[0-9]+\]\s*)+$")
# The cost of a cut is in boundaries.py. A chunk has a cost too, the higher the emptier it is: if it
# fills a tenth of the limit, as much as a cut between two words. So chunks have similar lengths.
_UNSPACED = regex.compile(
    r"(?<=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}])\p{L}"
)
_CHUNK, _EMPTY, _SAYS_NOTHING = 0.3, 4.0, 10.0

_Place = int | np.integer | np.ndarray


def split_text(text: str, max_bytes: int, max_width: float) -> list[str]:
    """`text` in chunks of at most `max_bytes` of UTF-8 and `max_width` of `speaking_width`.

    Text is cut at ends of sentences. A sentence that is too long is cut at commas or between words
    into chunks of similar length, and a word that is too long between its syllables or characters;
    a single character may be wider than `max_width`. The joined chunks equal the text, except for
    white space at the cuts. If the text has speaker tags, each chunk begins with the current tag.
    """
    tags = TAG.findall(text)
    tag_bytes = max((len(tag.encode()) + 1 for tag in tags), default=0)
    limits = _Limits(max(max_bytes - tag_bytes, 4), max(max_width, 2.0))
    chunks = []
    current_tag = ""
    for chunk in _best_chunks(text, limits):
        tag = TAG.match(chunk)
        tagged = f"{tag[0].strip()} {chunk[tag.end() :]}" if tag else current_tag + chunk
        tagged = _TAGS_AT_END.sub("", tagged).strip()
        if tagged:
            chunks.append(tagged)
        if found := TAG.findall(chunk):
            current_tag = found[-1].strip() + " "
    return chunks


def halve_text(text: str) -> list[str]:
    """`text` cut once, at the best place near its middle that is not inside a word.

    It stays whole if there is no such place. In scripts without spaces a cut may follow any
    syllable. The second half begins with the speaker tag of the first.
    """
    inside = (cut for cut in cuts_inside_word(text, 0, len(text)) if _UNSPACED.match(text, cut))
    cuts = dict.fromkeys(inside, UNIT) | cuts_after_words(text, 0, len(text))
    cuts |= dict.fromkeys(cuts_after_sentences(text), SENTENCE)
    if not cuts:
        return [text]
    places, whole = np.array(list(cuts)), _Text(text)
    limits = _Limits(len(text.encode()), max(float(whole.width(0, len(text))), 1.0))
    costs = whole.cost(0, places, limits) + whole.cost(places, len(text), limits)
    best = int(places[np.argmin(costs + np.array(list(cuts.values())))])
    halves = text[:best].strip(), text[best:].strip()
    if not all(map(says_something, halves)):
        return [text]
    tags = TAG.findall(halves[0])
    if tags and not TAG.match(halves[1]):
        halves = halves[0], tags[-1].strip() + " " + halves[1]
    return list(halves)


@dataclass(frozen=True)
class _Limits:
    num_bytes: int
    width: float


class _Text:
    """A text and measures of its ranges. Starts or stops may be arrays."""

    def __init__(self, text: str):
        said, pauses = character_widths(text)
        self.said, self.pauses = _sums(said), _sums(pauses)
        self.num_bytes = _sums([len(char.encode("utf-8")) for char in text])
        sounds = [int(char.isalnum()) for char in text]
        for match in TAG.finditer(text):
            sounds[match.start() : match.end()] = [0] * len(match[0])
        self.sounds = _sums(sounds)
        is_sound, places = np.array(sounds, bool), np.arange(len(text))
        # For each place: the end of the last letter before it, the next character that is not
        # white space, and the end of the last one.
        self.sound_end = np.append(0, np.maximum.accumulate(np.where(is_sound, places + 1, 0)))
        is_space = np.array([char.isspace() for char in text], bool)
        after = np.where(is_space, len(text), places)[::-1]
        self.next = np.append(np.minimum.accumulate(after)[::-1], len(text))
        self.last = np.append(0, np.maximum.accumulate(np.where(is_space, 0, places + 1)))

    def width(self, start: _Place, stop: _Place) -> Any:
        first, last = self.next[start], self.last[stop]
        said = np.maximum(self.said[last] - self.said[first], 0)
        pauses = self.pauses[np.maximum(self.sound_end[last], first)] - self.pauses[first]
        return width_of(said, pauses)

    def fits(self, start: _Place, stop: _Place, limits: _Limits) -> Any:
        num_bytes = self.num_bytes[self.last[stop]] - self.num_bytes[self.next[start]]
        return (num_bytes <= limits.num_bytes) & (self.width(start, stop) <= limits.width)

    def cost(self, start: _Place, stop: _Place, limits: _Limits) -> Any:
        """Cost of a chunk: the emptier, the higher."""
        empty = np.maximum(0, 1 - self.width(start, stop) / limits.width)
        is_silent = self.sounds[stop] == self.sounds[start]
        return _CHUNK + _EMPTY * empty**4 + _SAYS_NOTHING * is_silent


def _sums(values: list[int] | list[float]) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... values."""
    return np.append(0, np.cumsum(values)) if values else np.zeros(1)


def _places(text: str, whole: _Text, limits: _Limits) -> dict[int, float]:
    """Places to cut and the cost of each; text between two places that fits is not cut further."""
    places = dict.fromkeys([0, len(text), *cuts_after_sentences(text)], SENTENCE)
    for start, stop in pairwise(sorted(places)):
        if whole.fits(start, stop, limits):
            continue
        words = cuts_after_words(text, start, stop)
        places |= {cut: cost for cut, cost in words.items() if start < cut < stop}
        for begin, end in pairwise([start, *sorted(c for c in words if start < c < stop), stop]):
            if not whole.fits(begin, end, limits):
                places |= dict.fromkeys(_places_inside(text, begin, end, whole, limits), UNIT)
    return places


def _places_inside(text: str, start: int, stop: int, whole: _Text, limits: _Limits) -> list[int]:
    """Cuts of one long word into parts of similar size that fit."""
    cuts = [start]
    for cut in cuts_inside_word(text, start, stop):
        if whole.num_bytes[cut] - whole.num_bytes[cuts[-1]] > limits.num_bytes:
            # Not even one character with its marks fits.
            cuts += _cuts_by_bytes(whole, cuts[-1], cut, limits.num_bytes)
        cuts.append(cut)

    def load(a: int, b: int) -> float:
        """Fraction of the limits that the range takes; parts add up to at least the whole range."""
        width = whole.said[b] - whole.said[a] + whole.pauses[b] - whole.pauses[a]
        num_bytes = whole.num_bytes[b] - whole.num_bytes[a]
        return max(width / limits.width, num_bytes / limits.num_bytes)

    total = sum(load(a, b) for a, b in pairwise(cuts))
    even = total / math.ceil(total)
    places, filled = [], 0.0
    for a, b in pairwise(cuts):
        step = load(a, b)
        if filled and (filled + step > 1 or filled + step / 2 > even):
            places.append(a)
            filled = 0.0
        filled += step
    return places


def _cuts_by_bytes(whole: _Text, start: int, stop: int, max_bytes: int) -> list[int]:
    cuts, begin = [], start
    for i in range(start + 1, stop):
        if whole.num_bytes[i + 1] - whole.num_bytes[begin] > max_bytes:
            cuts.append(i)
            begin = i
    return cuts


def _best_chunks(text: str, limits: _Limits) -> list[str]:
    """The chunks with the least total cost (dynamic programming)."""
    whole = _Text(text)
    places = _places(text, whole, limits)
    cuts = np.array(sorted(places))
    best, came_from = np.zeros(len(cuts)), [0]
    first = 0  # the chunk from here to the next cut fits
    for j in range(1, len(cuts)):
        fits = whole.fits(cuts[first:j], cuts[j], limits)
        first = first + int(np.argmax(fits)) if fits.any() else j - 1
        costs = best[first:j] + whole.cost(cuts[first:j], cuts[j], limits)
        best[j] = costs.min() + places[int(cuts[j])]
        came_from.append(first + int(np.argmin(costs)))
    chunks, j = [], len(cuts) - 1
    while j > 0:
        chunks.append(text[cuts[came_from[j]] : cuts[j]].strip())
        j = came_from[j]
    return [chunk for chunk in reversed(chunks) if chunk]
