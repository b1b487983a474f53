"""Bytes, cleaning, and splitting that neither drops nor repeats."""

import re

import numpy as np
import pytest

from echo_eqx import EchoError
from echo_eqx.data.text import (
    _UNBROKEN,
    check_text,
    encode_text,
    normalise_text,
    speaking_width,
    split_text,
)

ENGLISH = "It was the best of times, it was the worst of times. " * 12
TEXTS = {
    "english": ENGLISH,
    "german": "Die Bäche fließen über Köln; Größe zählt! Ärger? Nein: Übermut. " * 9,
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか、とんと見当がつかぬ。" * 9,
    "emoji": "I love it 🎉🎉! Do you 👩‍👩‍👧? Yes 😀. " * 12,
    "one word": "a" * 3000,
    "no spaces": "、".join(["字" * 40] * 20),
    "quotes": '"Stop!" he said. "Never." (She laughed.) \'Why?\' ' * 10,
}


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("max_bytes, max_width", [(767, 210.0), (60, 1e9), (9999, 28.0), (30, 2.0)])
def test_pieces_fit_and_join_to_the_text(name, max_bytes, max_width):
    pieces = split_text(TEXTS[name], max_bytes, max_width)
    assert squeezed("".join(pieces)) == squeezed(TEXTS[name])
    for piece in pieces:
        assert piece == piece.strip() and piece
        assert len(piece.encode()) <= max_bytes
        assert speaking_width(piece) <= max_width or _UNBROKEN.fullmatch(piece)


def test_sentences_stay_whole_where_they_fit():
    pieces = split_text(ENGLISH, 767, 210.0)
    assert all(piece.endswith("times.") for piece in pieces)
    assert len(pieces) == 4  # three sentences of 52 in 210, and twelve of them
    japanese = split_text(TEXTS["japanese"], 767, 40.0)
    assert all(piece[-1] in "。、" for piece in japanese)
    german = split_text(TEXTS["german"], 767, 70.0)
    assert all(piece[-1] in ".!?" for piece in german)


def test_short_text_is_one_piece():
    assert split_text("Hello.", 767, 210.0) == ["Hello."]


def test_every_piece_carries_the_tag_that_holds_there():
    text = "[S1] One one one one. Two two two two. [S2] Three three three. Four four four four."
    assert split_text(text, 767, 20.0) == [
        "[S1] One one one one.",
        "[S1] Two two two two.",
        "[S2] Three three three.",
        "[S2] Four four four four.",
    ]


def test_a_tag_is_never_cut():
    text = "日本語日本語日本語[S2]日本語です"
    pieces = split_text(text, 700, 19.0)
    assert pieces == ["日本語日本語日本語", "[S2] 日本語です"]


def test_text_is_cleaned_as_in_training():
    assert normalise_text("“Hi” — it’s…\nme: you; we") == '[S1] "Hi" , it\'s... me, you, we'
    for tagged in ("[S2] Hi.", "(laughs) Hi.", "S1 says hi."):
        assert normalise_text(tagged) == tagged


def test_bytes_follow_a_zero():
    ids = encode_text("Köln 猫")
    assert ids.dtype == np.int32 and ids[0] == 0
    assert bytes(ids[1:].astype(np.uint8)).decode() == "Köln 猫"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("[S1] ", "empty"),
        ("a\0b", "NUL at character 1"),
        ("ab\udcff", "no UTF-8 at character 2"),
    ],
)
def test_text_that_cannot_be_spoken_is_named(text, message):
    with pytest.raises(EchoError, match=message):
        check_text(text)
