"""Texts to train a small voice on: a grammar over a few thousand common English words.

`words.txt` has the words, `grammar.txt` the rules. With its speaker tag, every text is ASCII of at
most `MAX_BYTES`, and `normalize_text` only adds that tag.

Held-out texts are determined by hashes, without a list: one text in twenty, and every text with a
held-out word (6 % of the lexicon).
"""

import random
import re
from collections.abc import Container, Iterator
from functools import cache
from importlib.resources import files
from typing import Literal, get_args
from zlib import crc32

from num2words import num2words

MAX_BYTES = 63
MIN_CHARACTERS, MAX_CHARACTERS = 8, MAX_BYTES - len("[S1] ")
SMALL_SHARE = 0.2
Kind = Literal["small", "seen", "unseen"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_TABLES = ("irregular_verbs", "irregular_plurals", "doubled")
_VERBS = ("do_thing", "do_person", "do_idea", "act", "say", "want")
_COUNTED = ("thing", "person", "animal", "place", "idea")
# "a" or "an" depends on the sound, not the letter.
_SAID_WITH_VOWEL = re.compile(r"(?!uni|use|usu|eur|one\b|once\b)[aeiou]|hour|hono|honest|heir")


def training_texts(seed: int, small_share: float = SMALL_SHARE) -> Iterator[str]:
    """An endless sequence of distinct texts; the same seed gives the same sequence.

    A share of `small_share` is of the small domain: numbers, dates, times, prices and household
    commands. The others are sentences, questions, commands, lists and phrases of the whole lexicon.
    """
    rng = random.Random(seed)
    writer = Writer(rng)
    written: set[str] = set()
    while True:
        text = writer.write("small" if rng.random() < small_share else "open")
        if text in written or is_held_out(text) or held_out_words(text):
            writer.put_back(keep=_held_out_forms())
        else:
            written.add(text)
            yield text


def random_phrase(text: str, rng: random.Random, max_words: int) -> str:
    """1 to `max_words` consecutive words of `text`, without punctuation at the ends."""
    words = text.split()
    length = rng.randint(1, min(max_words, len(words)))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length]).strip('.,!?;:-"')


def held_out_texts(kind: Kind, count: int = 50, seed: int = 0) -> list[str]:
    """`count` different texts that are never among the training texts.

    `small`: of the small domain; `seen`: open sentences of words in the training texts; `unseen`:
    open sentences with at least two words that are not.
    """
    writer = Writer(random.Random(seed))
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = writer.write("small" if kind == "small" else "open")
        unseen = len(held_out_words(text))
        if unseen >= 2 if kind == "unseen" else is_held_out(text) and not unseen:
            texts[text] = None
    return list(texts)


def held_out_words(text: str) -> set[str]:
    """Words of `text`, in lower case, that no training text has."""
    return _held_out_forms() & set(words_of(text))


def words_of(text: str) -> list[str]:
    """Words of `text` in lower case; `don't` is one word."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def lexicon_forms() -> dict[str, set[str]]:
    """Each word of the lexicon in lower case, and all its forms, including itself."""
    forms: dict[str, set[str]] = {}
    for section, words in _words().items():
        endings = ("s", "ed", "en", "ing") if section in _VERBS else ()
        endings = ("pl",) if section in _COUNTED else endings
        for word in words if section not in _TABLES else ():
            base = words_of(word.partition("_")[0])[0]
            inflected = {words_of(inflect(word, ending))[0] for ending in endings}
            forms.setdefault(base, {base}).update(inflected)
    return forms


class Writer:
    """Expands the rules of the grammar.

    Words are drawn from a section like cards from a shuffled deck, so that all are used about
    equally often.
    """

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._decks: dict[str, list[str]] = {}
        self._drawn: list[tuple[str, str]] = []

    def write(self, rule: str) -> str:
        """A text of the allowed length."""
        while True:
            self._drawn = []
            text = _tidy(self._expand(rule))
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                return text
            self.put_back()

    def put_back(self, keep: Container[str] = ()) -> None:
        """Put the words of the last text back under their decks, except those in `keep`."""
        for section, word in self._drawn:
            if word.lower() not in keep:
                self._decks[section].insert(0, word)

    def _expand(self, name: str) -> str:
        name, _, form = name.partition(".")
        if name in _rules():
            weights, lines = _rules()[name]
            line = self._rng.choices(lines, weights)[0]
            return re.sub(r"<([\w.]+)>", lambda slot: self._expand(slot[1]), line)
        if name in ("cardinal", "ordinal", "digits", "digit", "year"):
            return self._number(name)
        if not self._decks.get(name):
            self._decks[name] = list(_words()[name])
            self._rng.shuffle(self._decks[name])
        word = self._decks[name].pop()
        self._drawn.append((name, word))
        return inflect(word, form)

    def _number(self, kind: str) -> str:
        if kind == "digit":
            return num2words(self._rng.randrange(10))
        if kind == "ordinal":
            return num2words(self._rng.randint(1, 31), to="ordinal")
        if kind == "year":
            century = self._rng.choice(("eighteen", "nineteen", "nineteen", "twenty"))
            return f"{century} {num2words(self._rng.randint(10, 99))}"
        number = self._rng.randint(2, 12 if self._rng.random() < 0.4 else 99)
        return str(number) if kind == "digits" else num2words(number)


def inflect(word: str, form: str) -> str:
    """A word in one of the forms pl, s, ed, en, ing; unchanged if `form` is empty.

    The ending goes before a `_`, which becomes a space: `rely_on`, `relies on`.
    """
    word, _, rest = word.partition("_")
    verbs, plurals = _irregular("irregular_verbs"), _irregular("irregular_plurals")
    if form == "pl" and word in plurals:
        word = plurals[word][0]
    elif form in ("ed", "en") and word in verbs:
        word = verbs[word][form == "en"]
    elif form in ("pl", "s"):
        word = _with_s(word, after_o="es" if form == "s" else "s")
    elif form in ("ed", "en", "ing"):
        word = _with_vowel(word, "ing" if form == "ing" else "ed")
    return f"{word} {rest}" if rest else word


def _with_s(word: str, after_o: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    if word.endswith("o"):
        return word + after_o
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def _with_vowel(word: str, ending: str) -> str:
    if re.fullmatch(r"(qu|[^aeiou])*[aeiou][bdgklmnprtz]", word) or word in _words()["doubled"]:
        return word + word[-1] + ending
    if word.endswith("c"):
        return word + "k" + ending
    if ending == "ing":
        if word.endswith("ie"):
            return word[:-2] + "ying"
        return (word[:-1] if re.search(r"[^eoy]e$", word) else word) + ending
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")


def _tidy(text: str) -> str:
    text = re.sub(r"\b([Aa])n? (?=(\w+))", _article, text)
    # Capitalize the first letter of the text, and of a quotation.
    return re.sub(r'^"?[a-z]|, "[a-z]', lambda match: match[0].upper(), text)


def _article(match: re.Match) -> str:
    is_vowel = _SAID_WITH_VOWEL.match(match[2].lower())
    return f"{match[1]}{'n' if is_vowel else ''} "


def is_held_out(text: str) -> bool:
    """Whether the hash of `text` holds it out."""
    return crc32(text.encode()) % 20 == 0


@cache
def _held_out_forms() -> set[str]:
    """Forms of the held-out words. Words that the rules themselves contain are never held out."""
    spelled = {
        word
        for _, lines in _rules().values()
        for line in lines
        for word in words_of(re.sub(r"<[\w.]+>", "", line))
    }
    for number in range(100):
        spelled |= {*words_of(num2words(number)), num2words(number, to="ordinal")}
    held_out: set[str] = set()
    for base, forms in lexicon_forms().items():
        if crc32(base.encode()) % 16 == 0 and not forms & spelled:
            held_out |= forms
    return held_out


@cache
def _words() -> dict[str, list[str]]:
    return {name: " ".join(lines).split() for name, lines in _sections("words.txt").items()}


@cache
def _rules() -> dict[str, tuple[list[int], list[str]]]:
    """Weights and alternatives of each rule, by name."""
    rules = {}
    for name, lines in _sections("grammar.txt").items():
        parts = [re.fullmatch(r"(?:(\d+) )?(.+)", line) for line in lines]
        rules[name] = ([int(p[1] or 1) for p in parts if p], [p[2] for p in parts if p])
    return rules


@cache
def _irregular(table: str) -> dict[str, list[str]]:
    rows = (entry.split("-") for entry in _words()[table])
    return {row[0]: row[1:] for row in rows}


def _sections(name: str) -> dict[str, list[str]]:
    """Lines under each `[heading]` of a file in this folder; `#` starts a comment."""
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in files("echo_eqx.voice").joinpath(name).read_text("utf-8").splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            heading = match[1]
            sections[heading] = []
        elif line and not line.startswith("#"):
            sections[heading].append(line)
    return sections
