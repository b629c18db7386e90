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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from goldgate.evals.tokens import FUNCTION_WORDS, NEGATORS, Token, content, fold, tokens

if TYPE_CHECKING:
    from goldgate.pipeline.embedder import Embedder

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
    likely: bool = False


SUPPORT_SHARE = 0.6
"""A claim is supported when this share of its words stands in one stretch of a passage, and all its numbers."""
SUPPORT_COSINE = 0.7
"""With fewer words (a paraphrase) the claim must also mean what the stretch means, by the embedding model."""
PARAPHRASE_SHARE = 0.4


def supports(claim: str, passages: Sequence[str], similarity: Similarity | None = None, question: str = "") -> Support:
    """Judge whether one of `passages` supports `claim`. Words of the question need no support."""
    found = _compare_words(claim, passages, question)
    best = max((support for support, _ in found), key=lambda s: (s.supported, s.share), default=None)
    if best is None:
        return Support(False, 0.0, None, tuple(t.text for t in content(tokens(claim))))
    if best.supported or similarity is None:
        return best
    return _by_meaning(claim, found, similarity) or best


def to_compare(claim: str, passages: Sequence[str], question: str = "") -> list[str]:
    """Return the texts whose meaning `supports` will compare, the claim first; nothing when words decide."""
    found = _compare_words(claim, passages, question)
    if any(support.supported for support, _ in found):
        return []
    likely = [stretch for support, stretch in found if support.likely]
    return [claim, *likely] if likely else []


def _compare_words(claim: str, passages: Sequence[str], question: str) -> list[tuple[Support, str]]:
    asked = tokens(question)
    wanted = [t for t in content(tokens(claim)) if not any(_near(a, t) for a in asked)] or content(tokens(claim))
    if not wanted:
        return []
    return [
        (_by_words(wanted, stretch, number), stretch)
        for number, passage in enumerate(passages)
        for stretch in _stretches(passage)
    ]


def _by_words(wanted: Sequence[Token], stretch: str, number: int) -> Support:
    said = tokens(stretch)
    texts = {s.text for s in said if s.kind != "date"}
    missing = [t for t in wanted if t.kind == "date" or t.text not in texts]
    missing = [t for t in missing if not any(_near(s, t) for s in said)]
    share = round(1 - len(missing) / len(wanted), 6)
    anchored = _anchored(missing)
    names = tuple(t.text for t in missing)
    return Support(anchored and share >= SUPPORT_SHARE, share, number, names, anchored and share >= PARAPHRASE_SHARE)


def _anchored(missing: Sequence[Token]) -> bool:
    """No number, date or negator is missing."""
    return all(t.kind == "word" and t.text not in NEGATORS for t in missing)


def _by_meaning(claim: str, found: Sequence[tuple[Support, str]], similarity: Similarity) -> Support | None:
    """A paraphrase: enough of the words, every number, and the same meaning."""
    likely = [(support, stretch) for support, stretch in found if support.likely]
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
"""Logistic map from the cosine to the chance that a passage bears on the question; fitted on half of XQuAD."""


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
    """Return the digest of the code of this module and of tokens.py: the identity of the local judge."""
    return code_digest(Path(__file__), Path(__file__).with_name("tokens.py"))
