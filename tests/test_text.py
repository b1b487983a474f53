"""Encoding, cleaning, lossless splitting, and how text is read aloud."""

import random
import re
import shutil
import unicodedata
from itertools import islice, pairwise

import numpy as np
import pytest

from echo_eqx import EchoError
from echo_eqx.data.text import (
    CHARACTERS_PER_SECOND,
    check_text,
    encode_text,
    halve_text,
    normalize_text,
    speaking_width,
    split_text,
)
from echo_eqx.data.text.boundaries import cuts_after_sentences, cuts_inside_word
from echo_eqx.data.text.english import expand_english
from echo_eqx.voice.espeak import SILENCE_SECONDS, Voice, speak
from echo_eqx.voice.grammar import training_texts

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
def test_chunks_fit_and_join_to_the_text(name, max_bytes, max_width):
    pieces = split_text(TEXTS[name], max_bytes, max_width)
    assert squeezed("".join(pieces)) == squeezed(TEXTS[name])
    for piece in pieces:
        assert piece == piece.strip() and piece
        assert len(piece.encode()) <= max_bytes
        is_one_unit = len(cuts_inside_word(piece, 0, len(piece))) == 1
        assert speaking_width(piece) <= max_width or is_one_unit


def test_sentences_stay_whole_if_they_fit():
    pieces = split_text(ENGLISH, 767, 210.0)
    assert all(piece.endswith("times.") for piece in pieces)
    assert len(pieces) == 4  # three sentences of 52 in 210, and twelve of them
    japanese = split_text(TEXTS["japanese"], 767, 40.0)
    assert all(piece[-1] in "。、" for piece in japanese)
    german = split_text(TEXTS["german"], 767, 70.0)
    assert all(piece[-1] in ".!?" for piece in german)


def test_short_text_is_one_chunk():
    assert split_text("Hello.", 767, 210.0) == ["Hello."]


def test_every_chunk_starts_with_the_current_tag():
    text = "[S1] One one one one. Two two two two. [S2] Three three three. Four four four four."
    assert split_text(text, 767, 20.0) == [
        "[S1] One one one one.",
        "[S1] Two two two two.",
        "[S2] Three three three.",
        "[S2] Four four four four.",
    ]


def test_tags_are_never_cut():
    text = "日本語日本語日本語[S2]日本語です"
    pieces = split_text(text, 700, 37.0)
    assert pieces == ["日本語日本語日本語", "[S2] 日本語です"]


def test_text_is_cleaned_as_in_training():
    assert normalize_text("“Hi” — it’s…\nme: you; we") == '[S1] "Hi" , it\'s... me, you, we'
    assert normalize_text("[S2] Hi.") == "[S2] Hi."


@pytest.mark.parametrize("text", ["(laughs) Hi.", "[music] Hi.", "S1 says hi.", "Hi. [S2] Hello."])
def test_every_text_gets_a_leading_tag(text):
    assert normalize_text(text) == f"[S1] {text}"
    assert normalize_text(normalize_text(text)) == normalize_text(text)
    pieces = split_text(normalize_text(f"{text} And more of it. " * 9), 100, 30.0)
    assert len(pieces) > 5 and all(re.match(r"\[S[12]\] ", piece) for piece in pieces)


def test_encoded_text_starts_with_a_zero():
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
        ("ab\udcff", "not valid UTF-8 at character 2"),
    ],
)
def test_unspeakable_text_is_rejected(text, message):
    with pytest.raises(EchoError, match=message):
        check_text(text)


# --- Cleaning -----------------------------------------------------------------------------------

PLAIN = "Turn off the kitchen lights, René."


@pytest.mark.parametrize(
    "written",
    [
        PLAIN.replace("kit", "kit\u00ad"),
        PLAIN.replace("kit", "kit\u200b"),
        PLAIN.replace("kit", "k\u2060it\u200d"),
        "\ufeff\u200e" + PLAIN + "\u200f",
        unicodedata.normalize("NFD", PLAIN),
        PLAIN.translate({n: n + 0xFEE0 for n in range(0x21, 0x7F)}),
        PLAIN.replace("Turn", "𝐓𝐮𝐫𝐧").replace("the", "𝓉𝒽ℯ"),
        PLAIN.replace("off", "oﬀ").replace("the", "ⓣⓗⓔ"),
        PLAIN.replace(" ", "\u00a0\u2009\u3000\n"),
        PLAIN.replace("off", "off\x1b\x07"),
    ],
)
def test_variants_of_the_same_letters_are_unified(written):
    assert normalize_text(written) == f"[S1] {PLAIN}"


@pytest.mark.parametrize(
    "text",
    [
        "5 m², ½ cup, ACME™ and ①",  # their plain forms mean something else
        "👩‍👩‍👧 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ 👍🏽 smile",
        "می‌خواهم",
        "क्‍ष and ක්‍ර",
        "你好，世界！（真的？）",
        "ภาษาไทยมีน้ำ",
        "Բարև ձեզ",
    ],
)
def test_characters_with_a_meaning_of_their_own_are_kept(text):
    assert normalize_text(text) == f"[S1] {text}"


@pytest.mark.parametrize(
    "text, clean",
    [
        ("group)—and at the same time—we", "group), and at the same time, we"),
        ("yes ―― no⸺maybe", "yes , no, maybe"),
        ("—Hello.", "Hello."),
        ("well-known – e‑mail", "well-known – e-mail"),
        ("Τι κάνεις; Καλά", "Τι κάνεις? Καλά"),
    ],
)
def test_dashes_and_foreign_question_marks(text, clean):
    assert normalize_text(text) == f"[S1] {clean}"
    assert normalize_text(normalize_text(text)) == normalize_text(text)


@pytest.mark.parametrize(
    "text", ["...", "?!", "🎉", "\u200b", "\u00ad", "[S1] .", "$ %", "ー", "\u3164"]
)
def test_text_without_letters_or_digits_is_rejected(text):
    with pytest.raises(EchoError, match=r"nothing to say: expected at least one letter|empty"):
        check_text(text)
    for spoken in ("7", "½", "a", "字", "[S1] é", "1️⃣"):
        check_text(spoken)


# --- Cutting ------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    cuts = [0, *cuts_after_sentences(text), len(text)]
    return [text[a:b].strip() for a, b in pairwise(cuts) if text[a:b].strip()]


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met J. R. R. Tolkien|. He was late.",
        "At 10.30 a.m. he paid 2.5 million, e.g. in cash|. Then he left.",
        "Turn to No. 5|. No|. I mean Fig. 3.",
        '"Stop!" he said|. "Never."|',
        "1. Buy milk|. 2. Buy bread.",
        "Wait...| What?| So do I|. Yes.",
        "Er wohnt in der Hauptstr. 5|. Das ist z. B. gut.",
        "यह है।| वह है॥| ठीक",
        "هل؟| نعم",
        "我3.5点来。|你呢？|好",
        "ក។| ខ",
        "ကောင်း။| ဟုတ်၊ ပြီး",
        "Բարև։| Լավ",
        "བོད་ཡིག།| བོད",
        "ሰላም።| እንዴት",
        "გამარჯობა.| როგორ ხარ?",
    ],
)
def test_sentence_boundaries_are_found(text):
    expected = text.replace("|. ", ".| ").split("|")
    assert sentences("".join(expected)) == [part.strip() for part in expected if part.strip()]


@pytest.mark.parametrize(
    "syllables",
    [
        "ภา|ษา|ไทย|เป็นภา|ษา|ที่|มี|ระ|ดับ|เสียงชาติ",
        "မြန်|မာ|ဘာ|သာ|စ|ကား|သည်",
        "ភា|សា|ខ្មែរគឺ|ជា|ជាតិ",
        "ພາ|ສາ|ລາວ",
        "क्ष|त्रि|य",
        "ちょっ|と|ラー|メ|ン、|「きゃ|あ」",
        "👩‍👩‍👧|🇬🇧|é",
        "1234|5678|901,|299.|99",
    ],
)
def test_syllables_and_graphemes_stay_whole(syllables):
    text = syllables.replace("|", "")
    assert text.encode()
    ends = cuts_inside_word(text, 0, len(text))
    assert [text[a:b] for a, b in pairwise([0, *ends])] == syllables.split("|")


def test_chunks_are_even_and_none_is_a_single_word():
    text = normalize_text(
        "Dr. Smith opened the door. He said that Mr. J. R. R. Tolkien had met St. Paul on a "
        "Monday, and that they had a very long conversation about everything under the sun before "
        "the small grey cat came in through the door. Then we left."
    )
    pieces = [piece.removeprefix("[S1] ") for piece in split_text(text, 63, 44.8)]
    assert min(len(piece.split()) for piece in pieces) >= 3
    assert pieces[0] == "Dr. Smith opened the door."
    assert not any(piece.endswith(("Mr.", "J.", "R.", "St.", "Dr.")) for piece in pieces)


def test_text_is_halved_only_between_words():
    assert halve_text("[S1] Hello.") == ["[S1] Hello."]
    first, second = halve_text("[S1] Hello there my friend, how are you doing today?")
    assert (first, second) == ("[S1] Hello there my friend,", "[S1] how are you doing today?")
    assert halve_text("吾輩は猫である名前はまだ無い") == ["吾輩は猫である", "名前はまだ無い"]
    assert halve_text("Hello ... !!!") == ["Hello ... !!!"]


def test_punctuation_alone_makes_no_chunk():
    pieces = split_text("Hello there. ... !!! And on it goes.", 767, 20.0)
    assert all(re.search("[a-z]", piece) for piece in pieces)


# --- Width --------------------------------------------------------------------------------------

KINDS = {
    "prose": ("en-us", "The dog is in the house and my mother sings in the kitchen. "),
    "numbers": ("en-us", "Call 4915 7723 8801, then 17 or 123456789 or 20240305, or 5. "),
    "money": ("en-us", "It costs $1,299.99 or €849.95 or £7, and 50% less. "),
    "acronyms": ("en-us", "The FBI, IBM, BBC, CNN, UCLA and WWF of the USA. "),
    "addresses": ("en-us", "See https://www.example.com/a/b?id=42 or mail j.smith@example.org. "),
    "short": ("en-us", "Yes. No. Well, so. Oh! But why? And? Or if. He. Me. "),
    "emoji": ("en-us", "Nice 🎉😀👍 work ❤️. "),
    "german": ("de", "Die Bäche fließen über Köln, und die Größe der Stadt zählt. "),
    "hungarian": ("hu", "A kutya a házban van, és anyám énekel a konyhában. "),
    "hindi": ("hi", "यह एक लंबा वाक्य है जो पढ़ा जाए और मेरी माँ गाती है। "),
    "arabic": ("ar", "الكلب في البيت وأمي تغني في المطبخ لأن اليوم عيد. "),
    "thai": ("th", "ภาษาไทยเป็นภาษาที่มีระดับเสียงและสุนัขอยู่ในบ้าน "),
    "amharic": ("am", "ውሻው ቤት ውስጥ ነው እና እናቴ በኩሽና ውስጥ ትዘፍናለች። "),
    "korean": ("ko", "개는 집에 있고 어머니는 부엌에서 노래를 부르십니다. "),
    "japanese": ("ja", "わがはいはねこである。なまえはまだない。 "),
    "cantonese": ("yue", "狗喺屋企，我媽媽喺廚房唱歌，因為今日係節日。 "),
}


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_width_is_an_upper_bound_of_the_speaking_time(kind):
    espeak, text = KINDS[kind]
    text = (text * 4).strip()
    audio, rate = speak(text, Voice("", espeak, speed=160, pitch=50))
    needed = len(audio) / rate - 2 * SILENCE_SECONDS
    given = speaking_width(text) / CHARACTERS_PER_SECOND
    assert needed <= 1.05 * given, f"{needed:.2f} s for a width of {given:.2f} s"
    assert given <= 2.5 * needed


# --- English ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("$1,249.99.", "One thousand two hundred and forty-nine dollars and ninety-nine cents."),
        ("$0.99, £1, €2.5 million", "Ninety-nine cents, one pound, two point five million euros"),
        ("at 3:45 pm or 10:30", "at three forty-five p m or ten thirty"),
        ("from 9 a.m.-5 p.m.", "from nine a m to five p m."),
        ("on 2024-03-05.", "on March fifth, twenty twenty-four."),
        ("on 3/5/2024.", "on March fifth, twenty twenty-four."),
        ("on 5 March 1856, Mar. 3rd", "on the fifth of March, eighteen fifty-six, March third"),
        ("the 1st, 22nd in the 1990s", "the first, twenty-second in the nineteen nineties"),
        ("5 kg, 1 km, 2 m²", "Five kilograms, one kilometer, two square meters"),
        ("72°F, 50 %", "Seventy-two degrees Fahrenheit, fifty percent"),
        ("No. 5, p. 3", "number five, page three"),
        ("Call 555-123-4567", "Call five five five, one two three, four five six seven"),
        ("+49 151 2345", "Plus four nine, one five one, two three four five"),
        ("see https://www.example.com/a.", "see w w w dot example dot com slash a."),
        ("j.smith@example.org", "j dot smith at example dot org"),
        ("Dr. Smith, St. Paul, Main St.", "Doctor Smith, Saint Paul, Main Street."),
        ("on 5th St. or 22 Elm St.", "on fifth Street or twenty-two Elm Street."),
        ("On St. Patrick's Day", "On Saint Patrick's Day"),
        ("the 3rd St. Patrick's Day", "the third Saint Patrick's Day"),
        ("e.g. Tom vs. Jerry & co, etc.", "for example Tom versus Jerry and co, et cetera."),
        ("the FBI and NASA", "the F B I and NASA"),
        ("Henry VIII in Chapter IV", "Henry the eighth in Chapter four"),
        ("I am well. Mix it.", "I am well. Mix it."),
        ("1/2, 2 3/4, and/or 24/7", "One half, two and three quarters, and or twenty-four seven"),
        ("3-5 or -7", "Three to five or minus seven"),
        ("1e6, v2.0.1", "One times ten to the power of six, version two point zero point one"),
        ("$.50, $-5, ५ kg", "Fifty cents, minus five dollars, five kilograms"),
        ("#1 fan @home", "Number one fan at home"),
        ("[S2] 7 dogs. 68 cats.", "[S2] Seven dogs. Sixty-eight cats."),
        ("STOP IT NOW!", "STOP IT NOW!"),
        ("the 1,000th guest", "the one thousandth guest"),
        ("10 000 steps", "Ten thousand steps"),
        ("ISBN 3-16-148410", "I S B N three, one six, one four eight four one zero"),
        ("100/100", "One hundred slash one hundred"),
        ("see /etc/passwd", "see slash etc slash passwd"),
    ],
)  # fmt: skip
def test_english_is_expanded(text, said):
    assert expand_english(text) == said
    assert expand_english(said) == said


def test_no_number_or_symbol_is_left_in_english():
    rng = random.Random(0)
    pieces = "0123456789" * 2 + "$€£%&#@+-/.,:°'\"()½²km VI ax"
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 20)))
        assert not re.search(r"[0-9$€£%&#@+°½²]", expand_english(f"See {text} there.")), text


def test_training_sentences_of_the_small_voice_are_unchanged():
    for text in islice(training_texts(0), 500):
        assert normalize_text(text) == f"[S1] {text}"
        if not re.search("[0-9]", text):
            assert expand_english(text) == text
