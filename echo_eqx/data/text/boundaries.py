"""Where a text may be split, and the cost of each place."""

import regex

from echo_eqx.data.text.clean import TAG

SENTENCE, CLAUSE, WORD, CLOSE_WORDS, UNIT = 0.0, 1.0, 3.0, 6.0, 8.0
"""Cost of a cut after a sentence, after a clause, after a word, between words that belong together
such as `Dr. Smith`, and inside a word."""

# Abbreviations after which a sentence continues, without their last full stop.
_ABBREVIATIONS = frozenset(
    """
    Dr Mr Mrs Ms Mx Messrs Prof Rev Fr Hon Gen Col Maj Capt Cpt Cmdr Lt Sgt Gov Sen Rep Pres St Ste
    Mt Ft Jr Sr Esq Ave Blvd Rd Dept Univ Assn Bros Inc Ltd Co Corp vs etc cf al ca approx est viz
    ibid resp incl excl tel ext max min
    bzw usw evtl ggf vgl inkl zzgl Hr Hrn Nr Str Mme Mlle Sra Srta Dra Ud Uds Dott Sig
    """.split()
)
# The same, but only before a number, because many of them are words too.
_BEFORE_NUMBERS = frozenset(
    """
    no nos p pp vol vols ch chap sec sect fig figs art eq ex op bd para v ver
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun
    """.split()
)
# Unicode calls Myanmar's little section a sentence terminal, but it is a comma. In Tibetan, shad
# ends a sentence.
_END = regex.compile(
    r"""(?P<ends>[[\p{STerm}…།༎߸]--[၊]]+)[\p{Pe}\p{Pf}"'»]*(?P<space>\s*)""", regex.VERSION1
)
_CLAUSE = regex.compile(
    r"[,;:]+[\"')\]]*\s+|[，、；：،؛၊፣፤](?!\p{Nd})[」』”]*\s*|\s[-–—]\s|\s+(?=\()"
    r"|(?<=[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])\s+"
)
_SPACE = regex.compile(r"\s+|(?<=་)(?=\p{Tibetan})")
_WORD_BEFORE = regex.compile(r"[\p{L}\p{M}\p{N}.]+$")
_DOTTED = regex.compile(r"(?:\p{L}{1,2}\.)+\p{L}{1,2}")
_OPENING = regex.compile(r"""[\p{Ps}\p{Pi}"'«¿¡]*""")
_LOWER_CASE = regex.compile(r"(?!\p{Georgian})\p{Ll}")
_LABEL = regex.compile(r"(?:^|[.!?]\s+)\(?[0-9]{1,3}$")  # 1. Milk. 2. Bread.
_NUMBER_AND_NEXT = regex.compile(r"(?<=\p{Nd})\s+(?=\p{Nd}|[\p{L}°%]{1,3}(?!\p{L}))")  # 5 kg
_LOOK_BACK = 40


def cuts_after_sentences(text: str) -> list[int]:
    """Ends of sentences, and places where another speaker begins."""
    ends = [match.end() for match in _END.finditer(text) if _ends_sentence(text, match)]
    return sorted({*ends, *(match.start() for match in TAG.finditer(text))})


def cuts_after_words(text: str, start: int, stop: int) -> dict[int, float]:
    """Places inside a sentence, and the cost of each."""
    cuts = {match.end(): WORD for match in _SPACE.finditer(text, start, stop)}
    for match in _NUMBER_AND_NEXT.finditer(text, start, stop):
        cuts[match.end()] = CLOSE_WORDS
    for match in _END.finditer(text, start, stop):  # not the end of a sentence: `Dr. Smith`
        if match["ends"] == "." and match["space"]:
            cuts[match.end()] = CLOSE_WORDS
    for match in _CLAUSE.finditer(text, start, stop):
        cuts[match.end()] = CLAUSE
    return cuts


def _ends_sentence(text: str, match: regex.Match) -> bool:
    ends, opening = match["ends"], _OPENING.match(text, match.end())
    after = opening.end() if opening else match.end()
    following = text[after : after + 1]
    if not set(ends) <= set(".!?…"):
        return not (text[match.start() - 1 : match.start()].isdigit() and following.isdigit())
    if match.end() < len(text) and not match["space"]:
        return False
    if _LOWER_CASE.match(following):
        return False
    return ends != "." or not _is_abbreviation(text, match.start(), following)


def _is_abbreviation(text: str, stop: int, following: str) -> bool:
    """Whether the full stop at `stop` belongs to an abbreviation, an initial or a list number."""
    before = text[max(0, stop - _LOOK_BACK) : stop]
    found = _WORD_BEFORE.search(before)
    if found is None:
        return False
    word = found[0]
    if label := _LABEL.search(before):
        start = stop - len(before) + label.start()
        if start == 0 or text[start] != "." or not _is_abbreviation(text, start, word):
            return True
    if len(word) == 1 and (word.isupper() or _LOWER_CASE.match(word)):
        is_pronoun = word == "I" and regex.search(r"\p{Ll},? I$", before)
        return not is_pronoun
    forms = {word, word.capitalize()} if word.isupper() else {word}
    forms |= {word[:1].lower() + word[1:]}
    if forms & _ABBREVIATIONS or _DOTTED.fullmatch(word) or word.lower().endswith("str"):
        return True
    return following.isdigit() and word.lower() in _BEFORE_NUMBERS


# --- Inside words -------------------------------------------------------------------------------

# Stays together: a tag, a group of digits, or a character with its marks, opening brackets before
# it, and characters after it that may not begin a line in Chinese and Japanese.
_CLUSTER = regex.compile(
    r"\[S[0-9]+\]\s*|\p{Nd}{1,4}[.,:/-]?"
    r"|[\p{Ps}\p{Pi}]{0,3}\X(?:[\p{Pe}\p{Pf}、。，．！？…・：；ーヽヾゝゞ々〜ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ]){0,4}"
)
# Scripts that write syllables without spaces, and where a syllable certainly begins. In Thai, Lao
# and Khmer: before a vowel written first, or before a consonant with its own vowel after another
# vowel (except `ิ` and `ุ`, which are silent in words such as ชาติ). In Burmese: before a consonant
# that is neither killed nor stacked (after Ye Kyaw Thu's sylbreak).
_SYLLABLES = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_INSIDE = regex.compile(rf"(?<={_SYLLABLES}){_SYLLABLES}")
_BEGINS = regex.compile(
    r"""
    (?<![เ-ไ])[เ-ไ] | (?<=[ะำๆฯ])[ก-ฮ]
    | (?<=[าิีุู][่-๋]?)(?!(?<=ี[่-๋]?)ย)[ก-ฮ](?:[ัาำีึืูะ]|[่-๋][ะ-ู])(?!์)
    | (?<![ເ-ໄ])[ເ-ໄ] | (?<=[ະຳໆ])[ກ-ຮໜໝ] | (?<=[າິີຸູ][່-໋]?)[ກ-ຮໜໝ](?:[ັາຳີຶືູະ]|[່-໋][ະ-ູ])
    | (?<=[ា-ៈ])[ក-អ](?:្[ក-អ])*[៉៊]?[ាីឹឺូ-ៈ]
    | (?<!္)[က-ဪဿ၎](?![့း]?[်္]) | (?<=་)\p{Tibetan}
    """,
    regex.VERBOSE,
)


def cuts_inside_word(text: str, start: int, stop: int) -> list[int]:
    """Ends of the units that stay together between `start` and `stop`: syllables, if known."""
    ends = []
    for match in _CLUSTER.finditer(text, start, stop):
        at = match.start()
        if ends and _INSIDE.match(text, at) and not _BEGINS.match(text, at):
            ends.pop()
        ends.append(match.end())
    return ends
