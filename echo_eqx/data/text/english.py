"""Expanding numbers, dates, money, addresses and abbreviations in English text.

Each rule has a pattern and a replacement; `num2words` writes the numbers. The rules of `_RULES` are
applied in order, each to the result of those before it.
"""

from collections.abc import Callable

import regex
from num2words import num2words

from echo_eqx.data.text.boundaries import cuts_after_sentences
from echo_eqx.data.text.clean import plain_characters
from echo_eqx.data.text.english_tables import (
    ADDRESS_SYMBOLS,
    BEFORE_NUMBERS,
    CODES,
    CURRENCIES,
    DAYS,
    KINGS,
    MAY_END,
    MONTHS,
    NOT_STREETS,
    READ_AS_WORDS,
    SIZES,
    SPELLED,
    SYMBOLS,
    UNCHANGED_PLURALS,
    UNITS,
    WORDS,
)

_CAPITAL_FOLLOWS = "\ue000"
"""A private-use character, which no text contains."""
_TAGS = regex.compile(r"(\[S[0-9]+\]\s*)")


def expand_english(text: str) -> str:
    """`text` with everything but words spelled out as it is read aloud in American English:

    money, dates, times, years, ordinals, fractions, ranges, units, telephone numbers (digit by
    digit), versions, e-mail and web addresses, titles and abbreviations, acronyms, Roman numerals
    after names, and symbols. Words and speaker tags stay as they are. As in the United States
    `1,000` is a thousand, `3/5/2024` is in March, and `1.5` is one point five.
    """
    text = plain_characters(text).replace("−", "-").replace(_CAPITAL_FOLLOWS, "")
    parts = _TAGS.split(text)
    return "".join(part if _TAGS.fullmatch(part) else _expand(part) for part in parts)


def _expand(text: str) -> str:
    # A number at the start of a sentence becomes a word with a capital.
    for cut in reversed([0, *cuts_after_sentences(text)]):
        if not text[cut : cut + 1].isalpha():
            text = text[:cut] + _CAPITAL_FOLLOWS + text[cut:]
    for pattern, becomes in _RULES:
        text = pattern.sub(becomes, text)
    text = regex.sub(
        rf"{_CAPITAL_FOLLOWS}(\W*)(\w?)", lambda match: match[1] + match[2].upper(), text
    )
    text = regex.sub(r"[^\S\n]{2,}", " ", text)
    return regex.sub(r" +(?=[,.!?;:)](?:\s|$))", "", text)


# --- Numbers ------------------------------------------------------------------------------------


def _number(number: str) -> str:
    """Such as `1,299`, `2.50` or `007` in words."""
    whole, point, decimals = number.replace(",", "").partition(".")
    is_code = len(whole) > 15 or (len(whole) > 1 and whole[0] == "0")
    said = _digits(whole) if is_code else num2words(int(whole or "0")).replace(",", "")
    return f"{said} point {_digits(decimals)}" if point else said


def _digits(text: str) -> str:
    return " ".join(num2words(int(char)) for char in text if char.isdecimal())


def _ordinal(number: str) -> str:
    return num2words(int(number.replace(",", "")), to="ordinal").replace(",", "")


def _year(number: str) -> str:
    return num2words(int(number), to="year").replace(",", "").replace("oh-", "oh ")


def _decade(match: regex.Match) -> str:
    number = match[1]
    said = num2words(int(number)) if len(number) == 2 else _year(number)
    return said[:-1] + "ies" if said.endswith("y") else said + "s"


def _plural(word: str) -> str:
    """Of a unit: `feet`, `degrees Celsius`, `miles per hour`, `kilowatt hours`."""
    first, _, rest = word.partition(" ")
    if first in UNCHANGED_PLURALS or first.endswith("hertz"):
        return word
    if rest and rest != "Celsius" and rest != "Fahrenheit" and not rest.startswith("per"):
        return f"{first} {_plural(rest)}"
    return f"{_IRREGULAR.get(first, first + 's')} {rest}".strip()


_IRREGULAR = {"foot": "feet", "inch": "inches"}


def _counted(number: str, unit: str) -> str:
    return f"{_number(number)} {unit if number == '1' else _plural(unit)}"


# --- Rules --------------------------------------------------------------------------------------


def _address(match: regex.Match) -> str:
    """An e-mail or web address as one would dictate it, without `https://`."""
    said = []
    for token in regex.findall(r"[A-Za-z]+|\p{L}+|[0-9]|[^\s\p{L}0-9]", match["address"]):
        is_spelled = 1 < len(token) <= 4 and not regex.search(r"[aeiouy]|\P{ASCII}", token.lower())
        spelled = " ".join(token) if is_spelled else token
        said.append(_digits(token) if token.isdecimal() else ADDRESS_SYMBOLS.get(token, spelled))
    return " ".join(said)


def _telephone(match: regex.Match) -> str:
    plus = "plus " if match[0].startswith("+") else ""
    return plus + ", ".join(map(_digits, regex.findall("[0-9]+", match[0])))


def _date(match: regex.Match) -> str:
    """With the groups year, month (number or name) and day; month and day may be swapped."""
    year, month, day = match["year"], match["month"], int(match["day"])
    number = int(month) if month.isdigit() else _month_of(month)
    if number > 12 and "/" in match[0] and not match[0].startswith(year):
        number, day = day, number
    if not (1 <= number <= 12 and 1 <= day <= 31):
        return match[0]
    said = f"{MONTHS[number - 1]} {_ordinal(str(day))}"
    return f"{said}, {_year(year if len(year) == 4 else '20' + year)}" if year else said


def _month_of(name: str) -> int:
    return next(i for i, month in enumerate(MONTHS, 1) if month[:3] == name[:3])


def _day_first(match: regex.Match) -> str:
    said = f"the {_ordinal(match['day'])} of {MONTHS[_month_of(match['month']) - 1]}"
    return f"{said}, {_year(match['year'])}" if match["year"] else said


def _month_and_year(match: regex.Match) -> str:
    return f"{MONTHS[_month_of(match['month']) - 1]} {_year(match['year'])}"


def _time(match: regex.Match) -> str:
    hour, minute, second = match["hour"], match["minute"] or "00", match["second"]
    half = match["half"]
    if int(hour) > 24 or int(minute) > 59:
        return f"{_number(hour)} to {_number(minute)}"
    said = [_number(hour.lstrip("0") or "0")]
    if minute != "00":
        said.append(f"oh {_number(minute[1])}" if minute[0] == "0" else _number(minute))
    elif not half and not second:
        said.append("o'clock" if int(hour) <= 12 else "hundred")
    if second:
        said.append(f"and {_number(second.lstrip('0') or '0')} seconds")
    if half:
        said.append(f"{half[0].lower()} m")
        is_end = regex.fullmatch(r"\s*|\s+(?!\p{Lu}\w*day).*", match.string[match.end() :], regex.S)
        follows = regex.match(r"\s*$|\s+\p{Lu}", match.string, pos=match.end())
        if half.endswith(".") and is_end and follows:
            said[-1] += "."
    return " ".join(said)


def _money(match: regex.Match) -> str:
    symbol = match["symbol"] if match["symbol"] in CURRENCIES else CODES[match["symbol"]]
    one, many, cent, cents = CURRENCIES[symbol]
    number, size = match["number"], match["size"]
    sign = "minus " if match["sign"] else ""
    if size:
        return f"{sign}{_number(number)} {SIZES[size]} {many}"
    whole, _, part = number.partition(".")
    if len(part) != 2:
        return f"{sign}{_number(number)} {one if number == '1' else many}"
    said = [f"{_number(whole)} {one if whole == '1' else many}"]
    if whole == "0" and int(part):
        said = []
    if int(part):
        said.append(f"{num2words(int(part))} {cent if part == '01' else cents}")
    return sign + " and ".join(said)


def _version(match: regex.Match) -> str:
    said = " point ".join(map(_number, match[2].split(".")))
    return f"version {said}" if match[1] else said


def _fraction(match: regex.Match) -> str:
    whole, top, bottom = match["whole"], int(match["top"]), int(match["bottom"])
    if bottom == 0 or bottom > 100 or top >= bottom:
        return f"{match['whole'] or ''} {num2words(top)} over {num2words(bottom)}"
    name = {2: "half", 4: "quarter"}.get(bottom) or _ordinal(str(bottom))
    if whole and top == 1:
        return f"{_number(whole)} and {'an' if name[0] == 'e' else 'a'} {name}"
    plural = "s" if top > 1 else ""
    return f"{_number(whole) + ' and ' if whole else ''}{num2words(top)} {name}{plural}"


_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅛": "1/8", "⅜": "3/8"}


def _unit(match: regex.Match) -> str:
    number, unit, power = match["number"], UNITS[match["unit"]], match["power"]
    kind = {"²": "square ", "³": "cubic ", "2": "square ", "3": "cubic "}.get(power or "", "")
    return _counted(number, kind + unit)


def _power_of_ten(match: regex.Match) -> str:
    sign = "minus " if match[2] == "-" else ""
    return f"{_number(match[1])} times ten to the power of {sign}{_number(match[3])}"


def _telephone_or_number(match: regex.Match) -> str:
    return _number(match[0]) if match[0].endswith("000") else _digits(match[0])


def _roman(numeral: str) -> int | None:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50}[char] for char in numeral]
    value = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    tens, ones = ["", "X", "XX", "XXX", "XL"], "I II III IV V VI VII VIII IX".split()
    is_right = value < 50 and numeral == tens[value // 10] + (["", *ones][value % 10])
    return value if is_right else None


def _roman_after_name(match: regex.Match) -> str:
    value = _roman(match[2])
    if value is None:
        return match[0]
    first = match[1].split()[-1]
    said = f"the {_ordinal(str(value))}" if first in KINGS else num2words(value)
    return f"{match[1]} {said}"


def _word(match: regex.Match) -> str:
    short, after = match[0], match.string[match.end() :]
    ends = short in MAY_END and regex.match(r"\s*$|\s+\p{Lu}", after)
    return WORDS[short] + ("." if ends else "")


def _saint_or_street(match: regex.Match) -> str:
    """`5th St.` and `Main St.` are streets; `St. Paul` and `the 3rd St. Patrick's Day` are not."""
    next_name = regex.match(r"\s+\p{Lu}[\p{L}-]*('s)?", match.string, pos=match.end())
    if next_name and (next_name[1] or not match["name"]):
        return f"{match['name'] or ''}{'Saint' if match['short'] == 'St.' else 'Doctor'}"
    ends = "." if regex.match(r"\s*$|\s+\p{Lu}", match.string, pos=match.end()) else ""
    return f"{match['name'] or ''}{'Street' if match['short'] == 'St.' else 'Drive'}{ends}"


def _acronym(match: regex.Match) -> str:
    letters, plural = match[1], match[2]
    if letters in READ_AS_WORDS or _is_shouted(match):
        return match[0]
    can_be_read = regex.search("[AEIOUY]", letters) and not regex.search("[^AEIOUY]{3}", letters)
    if len(letters) > 3 and can_be_read and letters not in SPELLED:
        return match[0]
    return " ".join(letters) + plural


def _is_shouted(match: regex.Match) -> bool:
    """Whether the words around the match are in capitals too."""
    around = match.string[max(0, match.start() - 25) : match.end() + 25]
    neighbors = rf"\p{{Lu}}{{2,}}[!?]? {match[0]}\b|\b{match[0]} \p{{Lu}}{{2,}}"
    has_neighbor = regex.search(neighbors, around)
    return has_neighbor is not None and not regex.search(r"\p{Ll}", around)


def _letters(match: regex.Match) -> str:
    letters = " ".join(match[0].replace(".", ""))
    return letters + ("." if regex.match(r"\s*$", match.string, pos=match.end()) else "")


_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_MONTH = rf"(?P<month>(?:{'|'.join(f'{m}|{m[:3]}' for m in MONTHS)}|Sept)\b)\.?"
_MM, _DD, _YYYY = r"(?P<month>[0-9]{1,2})", r"(?P<day>[0-9]{1,2})", r"(?P<year>[12][0-9]{3})"
_HALF = r"(?P<half>[aApP]\.m\.|[AP]\.M\.|[aApP][mM]\b)"
_ALL_CURRENCIES = "".join(CURRENCIES)
_BEFORE = r"(?<![\p{L}\p{N}.,/:-])"
_AFTER = r"(?![\p{L}\p{N}])"
_FREE = r"(?<![\p{L}\p{N}])"
_SYMBOL = rf"(?:US)?(?P<symbol>[{_ALL_CURRENCIES}])"
_SIZE = r"(?:\s?(?P<size>thousand|million|billion|trillion|bn|mn|[kKMB])(?!\p{L}))?"
_EITHER = "|".join(map(regex.escape, sorted(UNITS, key=len, reverse=True)))
_ENDINGS = "com|org|net|edu|gov|io|ai|dev|app|info|co\\.uk|de|fr|eu"


def _rule(pattern: str, becomes: str | Callable[[regex.Match], str]) -> tuple:
    return regex.compile(pattern), becomes


_RULES: list[tuple] = [
    # Addresses
    _rule(r"(?P<address>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)", _address),
    _rule(r"(?:https?|ftp)://(?P<address>[^\s\"<>]*[\p{L}\p{N}])/?", _address),
    _rule(r"\b(?P<address>www\.[^\s\"<>]*[\p{L}\p{N}])/?", _address),
    _rule(
        rf"\b(?P<address>(?:[\w-]+\.)+(?:{_ENDINGS})\b(?:/[^\s\"<>]*[\p{{L}}\p{{N}}])?)", _address
    ),
    _rule(r"(?<![^\s(])(?P<address>/[\w.-]*\w(?:/[\w.-]*\w)+)", _address),
    _rule(r"(?<!\w)@(?=\w)", "at "),
    _rule(r"(?<!\w)#(?=[0-9])", "number "),
    _rule(r"(?<!\w)#(?=\p{L})", "hashtag "),
    # Numbers that are not counted
    _rule(r"[^\P{Nd}0-9]", lambda match: str(int(match[0]))),
    _rule(r"(?<![\p{L}\p{N}.])\.(?=[0-9])", "0."),
    _rule(r"([$€£¥₹])-(?=[0-9])", r"-\1"),
    _rule(r"(?<![0-9])([0-9]{1,3})\.([0-9]{3}),([0-9]{2})(?![0-9])", r"\1,\2.\3"),
    _rule(r"\+[0-9](?:[ ()./-]{0,2}[0-9]){6,14}(?![0-9])", _telephone),
    _rule(
        rf"{_BEFORE}(?:1[ .-])?\(?[0-9]{{3}}\)?[ .-][0-9]{{3}}[ .-][0-9]{{4}}{_AFTER}", _telephone
    ),
    # Spaces between thousands, and numbers in groups with dashes, such as an ISBN
    _rule(rf"{_BEFORE}[1-9][0-9]{{0,2}}(?: 000)+{_AFTER}", lambda m: m[0].replace(" ", ",")),
    _rule(
        rf"{_BEFORE}(?!(?:1|2)[0-9]{{3}}-)[0-9]+(?:-[0-9]+){{2,}}(?![\p{{L}}\p{{N}}-])", _telephone
    ),
    _rule(r"([0-9]\s?[ap]\.?m\.?|[0-9]:[0-9]{2})\s?[-–]\s?(?=[0-9])", r"\1 to "),
    _rule(rf"{_BEFORE}[0-9]{{3}}-[0-9]{{4}}(?![\p{{L}}\p{{N}}-])", _telephone),
    _rule(rf"{_BEFORE}0[0-9]{{2,4}}[ /-][0-9]{{3,}}(?:[ -][0-9]{{2,}})*{_AFTER}", _telephone),
    _rule(rf"{_BEFORE}[0-9]{{2,}}(?: [0-9]{{2,}}){{2,}}{_AFTER}", _telephone),
    _rule(rf"{_BEFORE}(?P<year>[0-9]{{4}})([-/]){_MM}\2{_DD}(?:T(?=[0-9]))?(?![0-9-])", _date),
    _rule(rf"{_BEFORE}{_MM}/{_DD}/(?P<year>[0-9]{{4}}|[0-9]{{2}})(?![0-9/])", _date),
    _rule(rf"{_BEFORE}{_DD}\.{_MM}\.{_YYYY}(?![0-9])", _date),
    _rule(rf"{_FREE}([vV])?\.?([0-9]+(?:\.[0-9]+){{2,}}){_AFTER}", _version),
    _rule(rf"{_FREE}([vV])\.?\s?([0-9]+(?:\.[0-9]+)?){_AFTER}", _version),
    # Dates and times
    _rule(rf"\b{_MONTH}\s+{_DD}(?:st|nd|rd|th)?(?:,?\s+{_YYYY})?{_AFTER}", _date),
    _rule(
        rf"\b(?:the\s+)?{_DD}(?:st|nd|rd|th)?\.?\s+(?:of\s+)?{_MONTH}"
        rf"(?:,?\s+{_YYYY})?{_AFTER}",
        _day_first,
    ),
    _rule(rf"\b{_MONTH},?\s+{_YYYY}{_AFTER}", _month_and_year),
    _rule(
        rf"{_BEFORE}(?P<hour>[0-9]{{1,2}}):(?P<minute>[0-9]{{2}})(?::(?P<second>[0-9]{{2}}))?"
        rf"(?:\s?{_HALF})?(?![0-9:])",
        _time,
    ),
    _rule(rf"{_BEFORE}(?P<hour>1[0-2]|0?[1-9])(?P<minute>)(?P<second>)\s?{_HALF}", _time),
    _rule(rf"{_BEFORE}([0-9]+):([0-9]+)(?![0-9:])", r"\1 to \2"),
    _rule(rf"{_FREE}'?([0-9]{{2}}|[12][0-9]{{2}}0)'?s{_AFTER}", _decade),
    _rule(rf"{_FREE}({'|'.join(DAYS)})\.(?=,|\s|$)", lambda match: DAYS[match[1]]),
    # Ranges, money, quantities
    _rule(rf"{_BEFORE}24/7{_AFTER}", "twenty-four seven"),
    _rule(rf"{_BEFORE}9/11{_AFTER}", "nine eleven"),
    _rule(
        rf"([{_ALL_CURRENCIES}])({_NUMBER})\s?[-–]\s?\1?({_NUMBER})",
        lambda match: f"{_number(match[2])} to {match[1]}{match[3]}",
    ),
    _rule(
        rf"(?<![\p{{L}}\p{{N}}.,-])({_NUMBER})\s?[-–]\s?({_NUMBER})(?![\p{{N}}]|[-–.][0-9])",
        lambda match: f"{match[1]} to {match[2]}",
    ),
    _rule(r"(?<![\p{L}\p{N}])[-–](?=[$€£¥₹]?[0-9])", "minus "),
    _rule(rf"(?P<sign>){_SYMBOL}\s?(?P<number>{_NUMBER}){_SIZE}", _money),
    _rule(
        rf"(?P<sign>){_FREE}(?P<number>{_NUMBER})(?P<size>)\s?"
        rf"(?P<symbol>[€£₹₽₩¢]|\$|{'|'.join(CODES)}){_AFTER}",
        _money,
    ),
    _rule(
        rf"(?P<sign>){_FREE}(?P<symbol>{'|'.join(CODES)})\s?(?P<number>{_NUMBER}){_SIZE}", _money
    ),
    _rule(rf"{_BEFORE}({_NUMBER})[eE]([+-]?)([0-9]{{1,3}}){_AFTER}", _power_of_ten),
    _rule(r"(?<=[0-9])\^(?=-?[0-9])", " to the power of "),
    _rule(rf"{_FREE}([0-9]+)'([0-9]{{1,2}})\"", lambda m: f"{_number(m[1])} foot {_number(m[2])}"),
    _rule(r"(?<=[0-9])\s?[x×*]\s?(?=[0-9])", " by "),
    _rule(
        rf"(?P<name>(?!(?:{'|'.join(NOT_STREETS)})\b)\p{{Lu}}\p{{Ll}}+\s+|[0-9](?:st|nd|rd|th)\s+)?"
        r"(?<!\p{L})(?P<short>St\.|Dr\.)",
        _saint_or_street,
    ),
    _rule(
        rf"{_FREE}([0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,15}})(?:st|nd|rd|th){_AFTER}",
        lambda match: _ordinal(match[1]),
    ),
    _rule(r"([0-9]*)([½⅓⅔¼¾⅛⅜])", lambda match: f"{match[1]} {_VULGAR[match[2]]} ".strip()),
    _rule(
        rf"{_BEFORE}(?:(?P<whole>[0-9]+)\s)?(?P<top>[0-9]{{1,2}})/(?P<bottom>[0-9]{{1,3}})"
        r"(?![\p{N}/])",
        _fraction,
    ),
    _rule(
        rf"{_FREE}(?P<number>{_NUMBER})\s?(?P<unit>{_EITHER})(?P<power>[²³23])?{_AFTER}"
        r"(?:\.(?=\s+\p{Ll}))?",
        _unit,
    ),
    _rule(r"\s?/\s?(?=(?:second|minute|hour|day|week|month|year|night|person|kg|lb)\b)", " per "),
    # Words
    _rule(
        rf"(?<!\p{{L}})({'|'.join([*BEFORE_NUMBERS, *map(str.title, BEFORE_NUMBERS)])})"
        r"\.\s?(?=[0-9])",
        lambda match: BEFORE_NUMBERS[match[1].lower()] + " ",
    ),
    _rule(rf"(?<!\p{{L}})(?:{'|'.join(map(regex.escape, WORDS))})(?!\p{{L}})", _word),
    _rule(r"(?<![\p{L}.])(?:\p{Lu}\.){2,}|Ph\.D\.|Ph\.D", _letters),
    _rule(
        rf"\b({'|'.join(KINGS)}|(?:World )?War|Chapter|Part|Act|Scene|Volume|Book|Section|Phase)"
        r"\s+([IVXL]{2,}|[VX])\b",
        _roman_after_name,
    ),
    _rule(r"(\b\p{Lu}\p{Ll}+)\s+([IVX]{2,})\b", _roman_after_name),
    _rule(r"(?<=\p{L})-(?=[0-9])|(?<=\p{L})(?=[0-9])|(?<=[0-9])(?=\p{L})", " "),
    _rule(r"(?<!\p{L})(\p{Lu}{2,6})(s?)(?![\p{L}'])", _acronym),
    # What is left
    _rule(r"(?<=[0-9])/(?=[0-9])", " slash "),
    _rule(rf"{_FREE}(?:1[1-9]|20)[0-9]{{2}}(?![\p{{N}}]|[.,][0-9])", lambda match: _year(match[0])),
    _rule(r"(?<![0-9.,])[0-9]{8,}(?![0-9.,])", _telephone_or_number),
    _rule(_NUMBER, lambda match: _number(match[0])),
    _rule(r"(?<=\p{L}),(?=\p{L})", ", "),
    _rule(r"\band/or\b", "and or"),
    _rule(r"(?<=\p{Ll})/(?=\p{Ll})", " or "),
    _rule(
        "[" + regex.escape("".join(SYMBOLS), special_only=False) + "]",
        lambda match: f" {SYMBOLS[match[0]]} ",
    ),
]
