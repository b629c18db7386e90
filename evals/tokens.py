"""text -> tokens: words, numbers and dates in one notation, so that facts can be compared.

`1,000` and `1000`, `3 March 2018` and `2018-03-03`, `five` and `5`, `5 percent` and `5%`, `$5 million` and
`5,000,000 dollars`, `World War II` and `world war 2` give the same tokens; `5` and `5.2`, `2.1` and `2.10` do not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache


@dataclass(frozen=True)
class Token:
    """A folded word, number or date and where it stands."""

    text: str
    kind: str  # word, number or date
    sentence: int
    start: int
    end: int
    date: tuple[int | None, int | None, int | None] = (None, None, None)  # year, month, day
    capital: bool = False


def _list(words: str) -> list[str]:
    return words.split()


MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
            "september sept sep", "october oct", "november nov", "december dec",
        ),
        start=1,
    )
    for name in names.split()
}  # fmt: skip
UNITS = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = {word: 10 * n for n, word in enumerate(_list("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)}
SMALL = {word: n for n, word in enumerate(UNITS)} | TENS
_ORDINAL_WORDS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
ORDINALS = {
    word: f"{n}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(n, 'th') }" for n, word in enumerate(_list(_ORDINAL_WORDS), start=1)
}
SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 10**9, "trillion": 10**12}
ROMAN = {
    "ii": "2", "iii": "3", "iv": "4", "vi": "6", "vii": "7", "viii": "8", "ix": "9", "xi": "11", "xii": "12",
    "xiii": "13", "xiv": "14", "xv": "15", "xvi": "16", "xvii": "17", "xviii": "18", "xix": "19", "xx": "20",
}  # fmt: skip
ALIASES = {
    "usa": "us",
    "percent": "%",
    "pct": "%",
    "vs": "versus",
    "st": "saint",
    "foot": "ft",
    "feet": "ft",
    "inch": "in",
    "kilometre": "km",
    "kilometer": "km",
    "metre": "m",
    "meter": "m",
    "mbp": "mbit",
    "second": "s",
}
ARTICLES = frozenset(("a", "an", "the"))
FUNCTION_WORDS = ARTICLES | frozenset(
    _list(
        "is are was were be been being am do does did has have had of to in on at for by from with as and or it its "
        "this that these those which who whom there their his her your our you we they he she i will would can could "
        "may might shall should must so then than also just about into"
    )
)
NEGATORS = frozenset(
    _list(
        "not never no neither nor without cannot isnt arent wasnt werent doesnt dont didnt wont cant couldnt wouldnt "
        "shouldnt hasnt havent hadnt unlike"
    )
)

_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY = r"(?:3[01]|[12]\d|0?[1-9])"
_UNITS = "ms|sec|s|min|h|kb|mb|gb|tb|kib|mib|gib|km|kg|k|m|g|cm|mm|ft|in|x|px|am|pm"  # 500ms, 80GB
_PATTERN = re.compile(
    rf"""
      (?P<iso>(?<![\w.-])\d{{4}}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?![\w-]))
    | (?P<mdy>\b(?P<m1>{_MONTH})\b\.?\s+(?P<d1>{_DAY})(?:st|nd|rd|th)?(?![\d:.]\d|\d)(?:,?\s+(?P<y1>\d{{4}})(?!\d))?)
    | (?P<dmy>(?<![\w.])(?P<d2>{_DAY})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<m2>{_MONTH})\b\.?(?:,?\s+(?P<y2>\d{{4}})(?!\d))?)
    | (?P<my>\b(?P<m3>{_MONTH})\b\.?,?\s+(?:of\s+)?(?P<y3>\d{{4}})(?!\d))
    | (?P<ordinal>(?<![\w.])\d+(?:st|nd|rd|th)\b)
    | (?P<decade>(?<![\w.])'?\d{{1,3}}0s\b)
    | (?P<number>(?<![\w.])(?:(?<![^\s(\[=:])[-+])?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)*
          (?P<unit>{_UNITS})?(?![^\W_])(?!\.\d))
    | (?P<version>\bv\d+(?:\.\d+)*\b)
    | (?P<initials>\b(?:[^\W\d_]\.\s?){{1,}}[^\W\d_]\.|\b[^\W\d_]\.(?=[^\W\d_]\b)[^\W\d_]\b)
    | (?P<word>[^\W_]+(?:'[^\W_]+)*)
    | (?P<symbol>[%$€£])
    | (?P<stop>[.!?](?=\s|$)|\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)])\s))
    """,
    re.VERBOSE,
)


def fold(text: str) -> str:
    """Return `text` without case, diacritics, invisible characters and typographic variants; offsets change."""
    text = re.sub(r"(?<=[^\W\d_])[⁰¹²³⁴-⁹]+|\[\d+\]", " ", text)  # footnote marks
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if unicodedata.category(c) not in {"Mn", "Cf"})
    text = re.sub(r"[‐‑‒–—−]", "-", text)
    return re.sub(r"[’‘ʼ`´]", "'", text).replace("ß", "ss")


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[Token, ...]:
    """Split `text` into folded tokens. Sentence numbers start at 0."""
    plain = fold(text)
    lower = plain.casefold() if len(plain.casefold()) == len(plain) else plain.lower()
    found: list[Token] = []
    sentence = 0
    for match in _PATTERN.finditer(lower):
        if match.group("stop") is not None:
            sentence += 1
            continue
        found.extend(_read(match, sentence, plain))
    return tuple(_numbers(found))


def _read(match: re.Match[str], sentence: int, plain: str) -> list[Token]:
    start, end = match.span()
    text = match.group()
    date = _read_date(match)
    if date:
        return [Token("date", "date", sentence, start, end, date)]
    if match.group("number"):
        unit = match.group("unit") or ""
        cut = end - len(unit)
        number = Token(_canonical_number(text[: len(text) - len(unit)]), "number", sentence, start, cut)
        return [number, Token(unit, "word", sentence, cut, end)] if unit else [number]
    if match.group("ordinal") or match.group("decade") or match.group("version"):
        return [Token(text.lstrip("'v"), "number", sentence, start, end)]
    if match.group("initials"):
        text = re.sub(r"[.\s]", "", text)
        return [Token(ALIASES.get(text, text), "word", sentence, start, end, capital=True)]
    return [_read_word(text, sentence, start, end, plain[start].isupper())]


def _read_date(match: re.Match[str]) -> tuple[int | None, int | None, int | None] | None:
    if match.group("iso"):
        year_, month_, day_ = (int(part) for part in match.group("iso").split("-"))
        return year_, month_, day_
    for day, month, year in (("d1", "m1", "y1"), ("d2", "m2", "y2"), ("", "m3", "y3")):
        if match.group(month) is not None:
            number = int(match.group(day)) if day else None
            return int(match.group(year)) if match.group(year) else None, MONTHS[match.group(month)], number
    return None


_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}


def _read_word(text: str, sentence: int, start: int, end: int, capital: bool) -> Token:
    if text in _CURRENCIES:
        return Token(_CURRENCIES[text], "word", sentence, start, end)
    if text in ORDINALS:
        return Token(ORDINALS[text], "number", sentence, start, end)
    if text in ROMAN and capital:
        return Token(ROMAN[text], "number", sentence, start, end)
    negator = text.replace("'", "")
    if negator in NEGATORS:
        return Token(negator, "word", sentence, start, end)
    stem = stem_word(text)
    return Token(ALIASES.get(text, ALIASES.get(stem, stem)), "word", sentence, start, end, capital=capital)


def _canonical_number(text: str) -> str:
    text = text.replace(",", "").replace("+", "").replace(" ", "")
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    if digits.count(".") == 0:
        digits = digits.lstrip("0") or "0"
    return sign + digits


def stem_word(word: str) -> str:
    """Fold a plural or possessive onto its base form: `documents` and `document's` -> `document`."""
    word = re.sub(r"'s$|'$", "", word).replace("'", "")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("xes", "ches", "shes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


_ONE_IS_A_PRONOUN_BEFORE = frozenset(("of", "another", "who", "that", "which", "can", "may", "should", "must"))
_ONE_IS_A_PRONOUN_AFTER = frozenset(("no", "the", "this", "that", "any", "each", "every", "another"))


def _numbers(found: list[Token]) -> list[Token]:
    """Turn number words and scales into numbers: `twenty five` -> 25, `2 million` -> 2000000."""
    out: list[Token] = []
    found = _currency_last(found)
    for index, token in enumerate(found):
        if token.kind == "word" and token.text in SMALL and not _pronoun(found, index):
            value = SMALL[token.text]
            last = out[-1] if out else None
            joined = last and last.text in {str(n) for n in TENS.values()} and found[index - 1].text in TENS
            if last is not None and joined and value < 10:
                out[-1] = Token(str(int(last.text) + value), "number", last.sentence, last.start, token.end)
            else:
                out.append(Token(str(value), "number", token.sentence, token.start, token.end))
            continue
        if token.kind == "word" and token.text in SCALES and out and out[-1].kind == "number":
            out[-1] = _scaled(out[-1], token)
            continue
        if token.text == "cent" and out and out[-1].text == "per":
            out[-1] = Token("%", "word", token.sentence, out[-1].start, token.end)
            continue
        out.append(token)
    return out


def _currency_last(found: list[Token]) -> list[Token]:
    """`$5 million` reads as `5 million dollars`."""
    out = list(found)
    for index in range(len(out) - 1):
        sign, number = out[index], out[index + 1]
        if sign.text in _CURRENCIES.values() and sign.end - sign.start == 1 and number.kind == "number":
            out[index], out[index + 1] = number, sign
            if index + 2 < len(out) and out[index + 2].text in SCALES:
                out[index + 1], out[index + 2] = out[index + 2], sign
    return out


def _pronoun(found: list[Token], index: int) -> bool:
    if found[index].text != "one":
        return False
    after = found[index + 1].text if index + 1 < len(found) else ""
    before = found[index - 1].text if index else ""
    return after in _ONE_IS_A_PRONOUN_BEFORE or before in _ONE_IS_A_PRONOUN_AFTER


def _scaled(number: Token, scale: Token) -> Token:
    try:
        value = Decimal(number.text) * SCALES[scale.text]
    except InvalidOperation:  # an ordinal or a version
        return number
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return Token(text, "number", number.sentence, number.start, scale.end)


def content(of: Sequence[Token]) -> list[Token]:
    """Leave out function words, unless nothing would remain."""
    return [t for t in of if t.text not in FUNCTION_WORDS] or list(of)
