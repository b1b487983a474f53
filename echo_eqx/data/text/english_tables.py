"""English readings of numbers, units, symbols and abbreviations."""

MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS = {"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday"}
DAYS |= {"Thu": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday"}
DAYS |= {"Sun": "Sunday"}
CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "₽": ("ruble", "rubles", "kopeck", "kopecks"),
    "₩": ("won", "won", "jeon", "jeon"),
    "¢": ("cent", "cents", "", ""),
}
CODES = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹"}
SIZES = {"k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million"}
SIZES |= {"bn": "billion", "B": "billion", "b": "billion", "tn": "trillion", "T": "trillion"}
SIZES |= {word: word for word in ("hundred", "thousand", "million", "billion", "trillion")}
UNITS = {
    "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "nm": "nanometer",
    "mi": "mile", "ft": "foot", "yd": "yard", "in.": "inch", "l": "liter", "L": "liter",
    "ml": "milliliter", "mL": "milliliter", "cl": "centiliter", "gal": "gallon", "s": "second",
    "sec": "second", "secs": "second", "ms": "millisecond", "min": "minute", "mins": "minute",
    "h": "hour", "hr": "hour", "hrs": "hour", "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte",
    "GB": "gigabyte", "TB": "terabyte", "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz",
    "GHz": "gigahertz", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "kWh": "kilowatt hour",
    "V": "volt", "mA": "milliamp", "A": "amp", "dB": "decibel", "cal": "calorie",
    "kcal": "kilocalorie", "mph": "mile per hour", "km/h": "kilometer per hour",
    "kph": "kilometer per hour", "m/s": "meter per second", "px": "pixel", "ha": "hectare",
    "°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree", "℃": "degree Celsius",
    "℉": "degree Fahrenheit", "%": "percent", "‰": "per mille",
}  # fmt: skip
UNCHANGED_PLURALS = ("hertz", "percent", "mille")
WORDS = {
    "Dr.": "Doctor", "Mr.": "Mister", "Mrs.": "Missus", "Ms.": "Miz", "Prof.": "Professor",
    "Rev.": "Reverend", "Gen.": "General", "Col.": "Colonel", "Capt.": "Captain",
    "Lt.": "Lieutenant", "Sgt.": "Sergeant", "Gov.": "Governor", "Sen.": "Senator",
    "Rep.": "Representative", "Pres.": "President", "Jr.": "Junior", "Sr.": "Senior",
    "Mt.": "Mount", "Ft.": "Fort", "Ave.": "Avenue", "Blvd.": "Boulevard", "Rd.": "Road",
    "Inc.": "Incorporated", "Ltd.": "Limited", "Corp.": "Corporation", "Co.": "Company",
    "Dept.": "Department", "Univ.": "University", "e.g.": "for example", "i.e.": "that is",
    "etc.": "et cetera", "vs.": "versus", "vs": "versus", "approx.": "approximately",
    "cf.": "compare", "et al.": "and others", "a.k.a.": "also known as", "w/o": "without",
    "incl.": "including", "est.": "established", "ca.": "about",
}  # fmt: skip
# Their full stop ends a sentence too.
MAY_END = ("etc.", "Inc.", "Ltd.", "Corp.", "Co.", "Jr.", "Sr.", "et al.", "Ave.", "Blvd.", "Rd.")
# Capitalised words before `St.` or `Dr.` that are not the name of a street.
NOT_STREETS = "On In At To By For From With The And But Near Ask Tell See Call My Our".split()
SYMBOLS = {
    "&": "and", "+": "plus", "=": "equals", "@": "at", "%": "percent", "×": "times",
    "÷": "divided by", "±": "plus or minus", "≈": "approximately", "≠": "is not equal to",
    "≤": "less than or equal to", "≥": "greater than or equal to", "<": "less than",
    ">": "greater than", "°": "degrees", "©": "copyright", "®": "", "™": "", "§": "section",
    "→": "to", "№": "number", "#": "hash", "*": "", "^": "", "~": "about", "|": "", "/": "slash",
    "\\": "backslash", "_": "", "²": "squared", "³": "cubed", "µ": "micro", "μ": "micro",
    "$": "dollars", "€": "euros", "£": "pounds",
}  # fmt: skip
ADDRESS_SYMBOLS = {".": "dot", "@": "at", "/": "slash", "-": "dash", "_": "underscore"}
ADDRESS_SYMBOLS |= {":": "colon", "?": "question mark", "=": "equals", "&": "and", "#": "hash"}
ADDRESS_SYMBOLS |= {"%": "percent", "+": "plus", "~": "tilde"}
BEFORE_NUMBERS = {
    "no": "number", "nos": "numbers", "p": "page", "pp": "pages", "vol": "volume",
    "ch": "chapter", "fig": "figure", "figs": "figures", "sec": "section", "art": "article",
    "eq": "equation", "ex": "exercise", "nr": "number",
}  # fmt: skip
# Capitals that are read as a word. Others of two or three letters, or without a vowel, are spelled.
READ_AS_WORDS = frozenset(
    """
    NASA NATO FIFA UEFA OPEC AIDS ASAP RAM GIF JPEG LASER RADAR NAFTA COVID SWAT TED PIN SIM OK
    NOT AND THE ALL ANY YOU NO YES STOP GO SO IS IT WHO ONLY BIG NEW NOW HOW WHY OUR CAN OFF OUT
    """.split()
)
SPELLED = frozenset("UCLA ESPN HTTP HTML CEOS AARP ACLU ASCAP IEEE IOUS AIIMS UEFI OECD".split())
KINGS = (
    "Henry Louis Charles George Edward William Elizabeth James Richard John Paul Benedict Pius "
    "Philip Napoleon Catherine Peter Alexander Frederick Leo Ramses Wilhelm Gregory"
).split()
