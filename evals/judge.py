"""answer, gold case, passages -> deterministic local judgements; no LLM, no network, the same result on every run.

The functions compare *facts*: numbers, dates, names and words, folded so that case, diacritics, articles, plurals and
notation (`1,000` = `1000`, `3 March 2018` = `2018-03-03`, `five` = `5`, `5 percent` = `5%`) do not matter, and so that
`5` is never found in `15` or in `5.2`. How far they agree with people is measured by `goldgate.evals.calibrate`.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from goldgate.pipeline.embedder import Embedder

# ---------------------------------------------------------------- tokens


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


# ---------------------------------------------------------------- facts

MAX_GAP = 2
"""Words that may stand between two words of a fact: `Wilhelm Röntgen` is said by `Wilhelm Conrad Röntgen`."""
FACT_SHARE = 0.75
"""A fact counts as said when this share of its words is found close together, and all its numbers and dates."""
NAME_SHARE = 0.6
"""The same for a name, of which a middle part may be missing: `Keeley Hawes` is Keeley Clare Hawes."""
ANSWER_SHARE = 0.5
"""A graded agreement from here on is what people call correct (tuned on one half of EVOUNA-NQ)."""


def contains_fact(text: str, fact: str, question: str = "") -> bool:
    """True when `text` states `fact`; `a|b` allows either wording.

    Function words, articles, plurals, case and notation do not matter; numbers and dates must agree exactly (a date may
    be said with more precision), of a name at least the last part must be there, and a denial (`not supported`) does
    not state the fact. Words of the `question` need not be repeated.
    """
    said, asked = tokens(text), tokens(question)
    for wording in fact.split("|"):
        wanted = content(tokens(wording))
        share = NAME_SHARE if _is_name(wanted) else FACT_SHARE
        if wanted and _agrees(said, tokens(wording), asked) >= share:
            return True
    return False


def agreement(text: str, expected: str, question: str = "") -> float:
    """Return how much of `expected` is said by `text`, 0..1; 0 when its numbers, dates or names disagree.

    1 when the words come in order with at most two others between; otherwise the share of its words found within
    neighbouring sentences. `a|b` takes the better wording.
    """
    said, asked = tokens(text), tokens(question)
    shares = [_agrees(said, tokens(wording), asked) for wording in expected.split("|") if wording.strip()]
    return max(shares, default=0.0)


def content(of: Sequence[Token]) -> list[Token]:
    """Leave out function words, unless nothing would remain."""
    return [t for t in of if t.text not in FUNCTION_WORDS] or list(of)


def _agrees(said: Sequence[Token], fact: Sequence[Token], asked: Sequence[Token]) -> float:
    wanted = content(fact)
    if not wanted:
        return 0.0
    if _states(said, wanted):
        return 1.0
    new = [t for t in wanted if not any(_near(a, t) for a in asked)] or wanted
    denies = any(t.text in NEGATORS for t in new)
    usable = [t for i, t in enumerate(said) if denies or not _denied(said, i)]
    if not _anchors_agree(usable, new):
        return 0.0
    if len(new) > 2 and _is_name(new) and _states(usable, [new[0], new[-1]]):
        return max(NAME_SHARE, _share(usable, new, 0, len(usable)))
    span = 1 + max(t.sentence for t in fact) - min(t.sentence for t in fact) + 1
    return max((_share(usable, new, first, span) for first in {t.sentence for t in usable}), default=0.0)


def _share(said: Sequence[Token], wanted: Sequence[Token], first: int, span: int) -> float:
    window = [t for t in said if first <= t.sentence < first + span]
    return sum(any(_near(s, t) for s in window) for t in wanted) / len(wanted)


def _anchors_agree(said: Sequence[Token], wanted: Sequence[Token]) -> bool:
    """Every number, date and negator of the fact is said, and of a name the last part."""
    for at, token in enumerate(wanted):
        if token.kind == "word" and token.text not in NEGATORS:
            continue
        places = [i for i, s in enumerate(said) if _same(s, token)]
        if not places or (token.kind == "number" and not any(_belongs(said, place, wanted, at) for place in places)):
            return False
    return not _is_name(wanted) or any(_near(s, wanted[-1]) for s in said)


def _belongs(said: Sequence[Token], place: int, wanted: Sequence[Token], at: int) -> bool:
    """The number at `place` is the nearest one to some word of the fact, in its sentence: `FAIL is 1 and PASS is 0`
    says neither `PASS is 1` nor `FAIL is 0`. Between two at the same distance the order of the fact decides."""
    words = [(word, i < at) for i, word in enumerate(wanted) if word.kind == "word" and word.text not in NEGATORS]
    sentence = [i for i, token in enumerate(said) if token.sentence == said[place].sentence]
    numbers = [i for i in sentence if said[i].kind != "word"]
    for word, leads in words:
        for here in (i for i in sentence if _near(said[i], word)):
            nearest = min(numbers, key=lambda i: abs(i - here) - (0.5 if (i > here) == leads else 0))
            if nearest == place:
                return True
    return not words


def _is_name(wanted: Sequence[Token]) -> bool:
    return len(wanted) > 1 and all(t.capital for t in wanted)


def _near(said: Token, fact: Token) -> bool:
    """The same number or date, or words of one stem: `orbiting` and `orbit`, `R` and `Robert`."""
    if said.kind != "word" or fact.kind != "word" or said.text == fact.text:
        return _same(said, fact)
    short, long = sorted((said.text, fact.text), key=len)
    if len(short) >= 5:
        return len(long) - len(short) <= 5 and long.startswith(short[: max(5, len(short) - 3)])
    return len(short) == 1 and said.capital and fact.capital and long.startswith(short)


def _states(said: Sequence[Token], wanted: Sequence[Token]) -> bool:
    """The words of the fact come in order, and the first is not denied."""
    has_number = any(t.kind != "word" for t in wanted)
    denies = any(t.text in NEGATORS for t in wanted)
    for index, token in enumerate(said):
        if not _same(token, wanted[0]):
            continue
        if _follows(said, index, wanted, has_number) and (denies or not _denied(said, index)):
            return True
    return False


def _same(said: Token, fact: Token) -> bool:
    if fact.kind == "date" and said.kind == "date":
        return all(f is None or f == s for f, s in zip(fact.date, said.date, strict=True))
    if said.kind == "date" and fact.kind == "number":  # a year is said by a full date
        return fact.text == str(said.date[0])
    return said.kind != "date" and fact.kind != "date" and said.text == fact.text


def _follows(said: Sequence[Token], first: int, wanted: Sequence[Token], has_number: bool) -> bool:
    position = first
    for token in wanted[1:]:
        gap = 0
        position += 1
        while position < len(said) and not _same(said[position], token):
            between = said[position]
            gap += between.text not in FUNCTION_WORDS
            crossed = between.sentence != said[first].sentence
            if gap > MAX_GAP or crossed or between.text in NEGATORS or (has_number and between.kind != "word"):
                return False
            position += 1
        if position >= len(said):
            return False
    return True


def _denied(said: Sequence[Token], index: int) -> bool:
    """A negator stands directly before, function words aside; `not only` does not deny."""
    before = index - 1
    while before >= 0 and said[before].sentence == said[index].sentence and said[before].text in FUNCTION_WORDS:
        before -= 1
    if before < 0 or said[before].sentence != said[index].sentence:
        return False
    return said[before].text in NEGATORS


# ---------------------------------------------------------------- correctness


def correctness(
    answer: str, must_say: Sequence[str], expected: str | None, question: str = ""
) -> tuple[float, tuple[str, ...]]:
    """Return (score 0..1, facts that are missing).

    With `must_say` the share of the facts stated; with `expected` alone the graded agreement. An abstention scores 0.
    """
    if is_abstention(answer):
        return 0.0, tuple(must_say) or ((expected,) if expected else ())
    if must_say:
        missing = tuple(fact for fact in must_say if not contains_fact(answer, fact, question))
        return 1 - len(missing) / len(must_say), missing
    if not expected:
        raise ValueError("correctness needs must_say or an expected answer")
    share = agreement(answer, expected, question)
    return share, () if share >= ANSWER_SHARE else (expected,)


# ---------------------------------------------------------------- abstention

_TOLD = "mentioned|specified|stated|provided|given|included|covered|discussed|addressed|available|answerable"
_TELL = "mention|specify|state|provide|contain|include|say|cover|discuss|address|answer|explain|indicate|give|tell"
_REFUSAL = re.compile(
    rf"""
      \b(?:i|we)\s(?:really\s|still\s|currently\s)?(?:do\snot|don't|dont|cannot|can't|can\snot|could\snot|couldn't|
          am\snot\sable\sto|are\snot\sable\sto|am\sunable\sto|are\sunable\sto|was\snot\sable\sto|was\sunable\sto|did\snot|didn't)\s
          (?:\w+\s){{0,2}}?(?:know|find|answer|have|see|say|tell|determine|provide|locate|help|access|confirm|assist)
    | \bi(?:'m|\sam)\s(?:not\ssure|unsure|not\saware|not\scertain|unable|not\sable)\b
    | \b(?:no|insufficient|not\senough)\s(?:\w+\s){{0,2}}?(?:information|details?|mention|answer|data|context)\b
          .{{0,60}}?(?:available|provided|given|found|about|on|regarding|in|to\sanswer|$)
    | \b(?:is|are|was|were)\s(?:not|n't)\s(?:\w+\s)?(?:{_TOLD})\b
    | \b(?:isn't|aren't|wasn't|weren't)\s(?:\w+\s)?(?:{_TOLD})\b
    | \b(?:do|does|did)\s(?:not|n't)\s(?:\w+\s)?(?:{_TELL})
    | \b(?:don't|doesn't|didn't)\s(?:\w+\s)?(?:{_TELL})
    | \b(?:cannot|can't|could\snot|couldn't)\sbe\s(?:answered|determined|found|inferred)
    | \b(?:unanswerable|out\sof\sscope|outside\s(?:the|my)\sscope)\b
    """,
    re.VERBOSE,
)
_SOURCE = re.compile(
    r"\b(?:i|we|my|context|contexts|document|documents|passage|passages|text|source|sources|information|answer|"
    r"article|articles|knowledge|documentation|material|excerpts?)\b"
)
_UNSAID = re.compile(r"(?:not|n't)\s(?:\w+\s)?(?:mentioned|specified|stated|discussed|addressed|answerable)\b")
_PLEASANTRY = re.compile(
    r"^(?:(?:i'm|i\sam|we're|we\sare)\s(?:very\s|so\s)?sorry|sorry|unfortunately|apologies|please|thank|let\sme\sknow|feel\sfree|"
    r"if\syou|is\sthere|would\syou|could\syou|can\syou|hello|hi\b|you\s(?:may|might|can|could|should)\b|i\s(?:recommend|suggest|would\srecommend)|it\sis\sbest)"
)


def is_abstention(text: str) -> bool:
    """True when `text` refuses to answer and states nothing besides: `I don't know. But it is 5.` is an answer."""
    refused = False
    for sentence in sentences(text):
        plain = " ".join(fold(sentence).casefold().split())
        if _is_refusal(plain):
            refused = True
        elif not _PLEASANTRY.search(plain) and not plain.endswith("?") and content(tokens(plain)):
            return False
    return refused


def refuses_and_answers(text: str) -> bool:
    """True when one sentence refuses and another states something: `I don't know. It is 5.`"""
    plain = [" ".join(fold(sentence).casefold().split()) for sentence in sentences(text)]
    return any(_is_refusal(sentence) for sentence in plain) and bool(split_claims(text))


def _is_refusal(plain: str) -> bool:
    found = _REFUSAL.search(plain)
    if not found or not (_SOURCE.search(plain) or _UNSAID.search(plain)):
        return False
    but = re.search(r"\b(?:but|however|although|though|except)\b(.*)", plain[found.start() :])
    # "I don't know the exact date, but it was in 2018" states something after all.
    return not (but and not _REFUSAL.search(but[1]) and len(content(tokens(but[1]))) > 3)


# ---------------------------------------------------------------- claims and support

_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[^\sa-z])|\n+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|mr|mrs|ms|dr|st|no|fig|cf|approx|inc|jr|sr)|\b[A-Za-z])\.$", re.IGNORECASE
)
_MARK = re.compile(r"^\s*(?:[-*•>#]+|\d+[.)])\s+|\s*\[\d+(?:,\s*\d+)*\]|\*\*|`")  # bullets, citations, bold


def sentences(text: str) -> list[str]:
    """Split `text` at sentence ends and line breaks; abbreviations and initials do not end a sentence."""
    out: list[str] = []
    for line in text.splitlines():
        start = len(out)
        for piece in _BREAK.split(line):
            if not piece or not piece.strip():
                continue
            if len(out) > start and _ABBREVIATION.search(out[-1]):
                out[-1] = f"{out[-1]} {piece.strip()}"
            else:
                out.append(piece.strip())
    return out


def split_claims(answer: str) -> list[str]:
    """Return the sentences of `answer` that assert something: no questions, lead-ins, pleasantries or refusals."""
    claims = []
    for sentence in sentences(answer):
        claim = _MARK.sub("", sentence).strip()
        plain = " ".join(fold(claim).casefold().split())
        asserts = claim and not plain.endswith(("?", ":")) and not _PLEASANTRY.search(plain) and not _is_refusal(plain)
        if asserts and [t for t in tokens(claim) if t.text not in FUNCTION_WORDS]:
            claims.append(" ".join(claim.split()))
    return claims


@dataclass(frozen=True)
class Support:
    """How well the passages support a claim."""

    supported: bool
    share: float
    passage: int | None
    missing: tuple[str, ...]
    anchored: bool = False


SUPPORT_SHARE = 0.6
"""A claim is supported when this share of its words stands in one stretch of a passage, and all its numbers."""
SUPPORT_COSINE = 0.7
"""With fewer words (a paraphrase) the claim must also mean what the stretch means, by the embedding model."""
PARAPHRASE_SHARE = 0.4


def supports(claim: str, passages: Sequence[str], similarity: Similarity | None = None, question: str = "") -> Support:
    """Judge whether one of `passages` supports `claim`. Words of the question need no support."""
    asked = tokens(question)
    wanted = [t for t in content(tokens(claim)) if not any(_near(a, t) for a in asked)] or content(tokens(claim))
    if not wanted:
        return Support(False, 0.0, None, ())
    found = [
        (_by_words(wanted, stretch, number), stretch)
        for number, passage in enumerate(passages)
        for stretch in _stretches(passage)
    ]
    best = max((support for support, _ in found), key=lambda s: (s.supported, s.share), default=None)
    if best is None:
        return Support(False, 0.0, None, tuple(t.text for t in wanted))
    if best.supported or similarity is None:
        return best
    return _by_meaning(claim, found, similarity) or best


def _by_words(wanted: Sequence[Token], stretch: str, number: int) -> Support:
    said = tokens(stretch)
    missing = [t for t in wanted if not any(_near(s, t) for s in said)]
    share = round(1 - len(missing) / len(wanted), 6)
    supported = share >= SUPPORT_SHARE and _anchored(missing)
    return Support(supported, share, number, tuple(t.text for t in missing), anchored=_anchored(missing))


def _anchored(missing: Sequence[Token]) -> bool:
    """No number, date or negator is missing."""
    return all(t.kind == "word" and t.text not in NEGATORS for t in missing)


def _by_meaning(claim: str, found: Sequence[tuple[Support, str]], similarity: Similarity) -> Support | None:
    """A paraphrase: enough of the words, every number, and the same meaning."""
    likely = [
        (support, stretch) for support, stretch in found if support.anchored and support.share >= PARAPHRASE_SHARE
    ]
    similarity.prefetch((claim, *(stretch for _, stretch in likely)) if likely else ())
    for support, stretch in sorted(likely, key=lambda pair: -pair[0].share):
        if similarity.cosine(claim, stretch) >= SUPPORT_COSINE:
            return replace(support, supported=True)
    return None


def _stretches(passage: str, length: int = 3) -> list[str]:
    parts = sentences(passage)
    if len(parts) <= length:
        return [passage]
    return [" ".join(parts[i : i + length]) for i in range(len(parts) - length + 1)]


# ---------------------------------------------------------------- meaning


class Similarity:
    """Cosines of an embedding model, each text embedded once. Values are rounded to 6 digits, so that they repeat."""

    def __init__(self, embedder: Embedder) -> None:
        """Keep the embedder; nothing is embedded yet."""
        self._embedder = embedder
        self._vectors: dict[str, np.ndarray] = {}
        self.digest = embedder.digest

    def prefetch(self, texts: Iterable[str]) -> None:
        """Embed the new ones of `texts` together."""
        new = sorted({text for text in texts if text not in self._vectors})
        if new:
            vectors = self._embedder.embed([self._fit(text) for text in new])
            self._vectors.update(zip(new, vectors, strict=True))

    def cosine(self, first: str, second: str) -> float:
        """Return the cosine of two texts, -1..1; what is longer than the model can see is cut."""
        self.prefetch((first, second))
        return round(float(np.dot(self._vectors[first], self._vectors[second])), 6)

    def _fit(self, text: str) -> str:
        limit = self._embedder.max_tokens - 2
        encoding = self._embedder.tokenizer.encode(text or " ", add_special_tokens=False)
        if len(encoding.ids) <= limit:
            return text or " "
        return text[: encoding.offsets[limit - 1][1]]


RELEVANCE_SLOPE, RELEVANCE_MIDDLE = 11.4, 0.44
"""Logistic map from the cosine to the chance that a passage bears on the question; fitted on half of XQuAD's evidence."""


def relevance(question: str, text: str, similarity: Similarity) -> float:
    """Return how likely `text` bears on `question`, 0..1."""
    cosine = similarity.cosine(question, text)
    return round(1 / (1 + math.exp(-RELEVANCE_SLOPE * (cosine - RELEVANCE_MIDDLE))), 6)


# ---------------------------------------------------------------- identity


def code_digest(*paths: Path) -> str:
    """SHA-256 of what the Python files do: comments, formatting and docstrings do not count."""
    parts = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                node.body = kept  # type: ignore[attr-defined]
        parts.append(ast.dump(tree))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def judge_digest() -> str:
    """Return the digest of this module's code, the identity of the local judge."""
    return code_digest(Path(__file__))
