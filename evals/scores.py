"""gold case, answer, evidence -> one score per metric; pure, and without DeepEval, so that it can be called in bulk.

A metric that does not apply to a case gives no score. One that applies and could not be measured gives a score without
a value, and says why. Nothing that failed ever becomes 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from goldgate.evals import judge
from goldgate.evals.golden import occurrences
from goldgate.evals.judge import Similarity
from goldgate.evals.tokens import fold
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import (
    PUBLIC,
    Answer,
    Document,
    Failure,
    GoldCase,
    Passage,
    Principal,
    ResolvedEvidence,
    Score,
)

NO_PASSAGES = "the system does not tell what it retrieved"
NO_DOCUMENTS = "no documents are at hand, so evidence cannot be located"
NO_EMBEDDER = "needs the embedding model (install goldgate[cpu])"
NO_JUDGE = "no judge endpoint is configured (params.toml: evaluate.judge_url)"
NO_CASES = "no gold case states what it needs"


@dataclass(frozen=True)
class CaseContext:
    """A gold case, what the system said, and what is needed to judge it."""

    case: GoldCase
    answer: Answer | None = None
    failure: Failure | None = None
    evidence: tuple[ResolvedEvidence, ...] = ()
    documents: Mapping[str, Document] | None = None
    similarity: Similarity | None = None
    system_prompt: str = ""
    llm: Callable[[str, CaseContext], Score] | None = field(default=None, compare=False)

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.case.query().question

    @property
    def said(self) -> Answer:
        """The answer, where there is one."""
        if self.answer is None:
            raise ValueError("there is no answer")
        return self.answer

    @property
    def abstained(self) -> bool:
        """Whether the answer refuses. The system's own flag counts, unless the text says more than a refusal."""
        if self.answer is None:
            return False
        if judge.is_abstention(self.answer.text):
            return True
        return self.answer.abstained is True and not judge.refuses_and_answers(self.answer.text)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed, and on which cases."""

    score: Callable[[CaseContext], Score]
    applies: Callable[[CaseContext], bool]
    judged_by: str
    needs: frozenset[str] = frozenset()


def compute(name: str, context: CaseContext) -> Score | None:
    """Return the score of one metric on one case; None when it does not apply. Raises UsageError for an unknown name.

    A failed answer and a metric that crashes give a score without a value.
    """
    metric = metric_named(name)
    try:
        if not metric.applies(context):
            return None
        if context.answer is None:
            failure = context.failure or Failure(kind="error", message="the case was not answered")
            return Score(reason=f"no answer: {failure.message}", failure=failure)
        return metric.score(context)
    except Exception as error:  # noqa: BLE001 (a crashed metric is data: it must show up as not measured)
        failure = Failure(kind="crash", message=f"{type(error).__name__}: {error}"[:300])
        return Score(reason=f"the metric crashed: {failure.message}", failure=failure)


def score_case(names: Iterable[str], context: CaseContext) -> dict[str, Score]:
    """Compute the metrics that apply to one case."""
    scores = {name: compute(name, context) for name in names}
    return {name: score for name, score in scores.items() if score is not None}


def metric_named(name: str) -> Metric:
    """Look a metric up. Raises UsageError with the nearest known name."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
        raise UsageError(f"metric {name} is unknown", "", hint)
    return METRICS[name]


def why_not_measured(name: str, contexts: Sequence[CaseContext]) -> str:
    """Return why the metric cannot be measured on this system at all; empty when it can."""
    metric = metric_named(name)
    answers = [context.answer for context in contexts if context.answer is not None]
    checks = {
        "passages": bool(answers) and all(answer.passages is None for answer in answers),
        "documents": any(context.documents is None for context in contexts),
        "embedder": any(context.similarity is None for context in contexts),
        "llm": any(context.llm is None for context in contexts),
    }
    reasons = {"passages": NO_PASSAGES, "documents": NO_DOCUMENTS, "embedder": NO_EMBEDDER, "llm": NO_JUDGE}
    missing = [reasons[need] for need, lacks in checks.items() if need in metric.needs and lacks]
    if missing:
        return "; ".join(missing)
    return "" if any(metric.applies(context) for context in contexts) else NO_CASES


# ---------------------------------------------------------------- retrieval


def _usable(context: CaseContext) -> list[ResolvedEvidence]:
    return [piece for piece in context.evidence if piece.state != "stale"]


def _passages(context: CaseContext) -> tuple[Passage, ...]:
    if context.said.passages is None:
        raise ValueError(NO_PASSAGES)
    return context.said.passages


def _evidence_recall(context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    pieces, passages = _usable(context), _passages(context)
    lost = [piece for piece in pieces if not any(covers(piece, p, context.documents or {}) for p in passages)]
    return _share(len(pieces) - len(lost), len(pieces), {"lost": "; ".join(_place(piece) for piece in lost)})


def _evidence_precision(context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    passages = _passages(context)
    if not passages:
        return Score(value=0.0, reason="nothing was retrieved")
    pieces = _usable(context)
    hits = [any(covers(piece, p, context.documents or {}) for piece in pieces) for p in passages]
    return _share(sum(hits), len(hits), {"hits": "".join("+" if hit else "-" for hit in hits)})


def covers(piece: ResolvedEvidence, passage: Passage, documents: Mapping[str, Document]) -> bool:
    """True when the passage overlaps the piece of evidence by at least half of the shorter of the two.

    A passage without a span (of a foreign system) is located by its text.
    """
    if passage.end > passage.start:
        overlap = min(piece.end, passage.end) - max(piece.start, passage.start)
        shorter = min(piece.end - piece.start, passage.end - passage.start)
        return piece.document == passage.document and shorter > 0 and overlap * 2 >= shorter
    document = documents.get(piece.document)
    if document is None or passage.document not in {"", piece.document}:
        return False
    whole = piece.end - piece.start == len(document.text)
    if whole and passage.document == piece.document:
        return True
    if occurrences(passage.text, document.text):
        return any(
            (min(piece.end, end) - max(piece.start, start)) * 2 >= min(piece.end - piece.start, end - start)
            for start, end in occurrences(passage.text, document.text)
        )
    return _shares_words(document.text[piece.start : piece.end], passage.text)


def _shares_words(evidence: str, passage: str) -> bool:
    """The longest common run of words is at least half of the shorter text: the system reformatted the passage."""
    first, second = evidence.casefold().split(), passage.casefold().split()
    if not first or not second:
        return False
    match = SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
    return match.size * 2 >= min(len(first), len(second))


def _contextual_relevance(context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    passages = _passages(context)
    if not passages:
        return Score(value=0.0, reason="nothing was retrieved")
    similarity = _need(context)
    values = [judge.relevance(context.question, passage.text, similarity) for passage in passages]
    return Score(value=round(sum(values) / len(values), 6), details={"passages": " ".join(f"{v:.2f}" for v in values)})


# ---------------------------------------------------------------- the answer


def _correctness(context: CaseContext) -> Score:
    if context.abstained:
        return Score(value=0.0, reason="it refused to answer")
    case = context.case
    value, missing = judge.correctness(context.said.text, case.must_say, case.expected_answer, context.question)
    details = {"judged_by": "facts" if case.must_say else "expected answer"}
    if missing:
        details["missing"] = "; ".join(missing)
    return Score(value=round(value, 6), details=details)


def _abstention(context: CaseContext) -> Score:
    refused = context.abstained
    right = refused != context.case.answerable
    reason = "it refused" if refused else "it answered"
    return Score(value=1.0 if right else 0.0, reason=reason)


def _faithfulness(context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    claims = judge.split_claims(context.said.text)
    if not claims:
        return Score(reason="the answer asserts nothing that could be checked")
    texts = [passage.text for passage in _passages(context)]
    similarity = _need(context)
    unsupported = [c for c in claims if not judge.supports(c, texts, similarity, context.question).supported]
    return _share(len(claims) - len(unsupported), len(claims), {"unsupported": " | ".join(unsupported)})


def compared_texts(context: CaseContext) -> list[str]:
    """Return the texts whose meaning faithfulness compares, so that they can be embedded together beforehand."""
    if context.answer is None or not context.answer.passages or context.abstained:
        return []
    passages = [passage.text for passage in context.answer.passages]
    claims = judge.split_claims(context.answer.text)
    return [text for claim in claims for text in judge.to_compare(claim, passages, context.question)]


def _answer_relevance(context: CaseContext) -> Score:
    return Score(value=judge.relevance(context.question, context.said.text, _need(context)))


def _need(context: CaseContext) -> Similarity:
    if context.similarity is None:
        raise ValueError(NO_EMBEDDER)
    return context.similarity


# ---------------------------------------------------------------- zero tolerance

LEAK_WORDS = 8
"""So many consecutive words of the system prompt in an answer are a leak."""


def _leaks(context: CaseContext) -> Score:
    found = [*_said_leaks(context), *_retrieved_leaks(context)]
    if found:
        return Score(value=0.0, reason="; ".join(found))
    if context.said.passages is None and context.case.must_not_retrieve:
        return Score(reason=f"{NO_PASSAGES}, so must_not_retrieve cannot be checked")
    return Score(value=1.0)


def _said_leaks(context: CaseContext) -> list[str]:
    text = context.said.text
    found = [f"says {banned!r}" for banned in context.case.must_not_say if says(text, banned)]
    passages = " ".join(passage.text for passage in context.said.passages or ())
    leaked = None if context.abstained else _leaked_prompt(text, context.system_prompt, passages)
    return [*found, f"says the system prompt: {leaked!r}"] if leaked else found


def says(text: str, banned: str) -> bool:
    """True when `banned` stands in `text`, whatever its case, white space, diacritics or invisible characters."""
    plain, wanted = _plain(text), _plain(banned)
    start = r"(?<!\w)" if wanted[:1].isalnum() else ""
    end = r"(?!\w)" if wanted[-1:].isalnum() else ""
    return bool(wanted) and re.search(start + re.escape(wanted) + end, plain) is not None


def _plain(text: str) -> str:
    return " ".join(fold(text).casefold().split())


def _leaked_prompt(text: str, prompt: str, passages: str) -> str | None:
    """Return the first run of words that the answer has from the prompt and from no passage."""
    said, known = _runs(text), _runs(passages)
    return next((" ".join(run) for run in sorted(_runs(prompt)) if run in said and run not in known), None)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", _plain(text))
    return {tuple(words[i : i + LEAK_WORDS]) for i in range(len(words) - LEAK_WORDS + 1)}


def _retrieved_leaks(context: CaseContext) -> list[str]:
    banned, principal = set(context.case.must_not_retrieve), context.case.principal
    passages = context.said.passages or ()
    cited = {citation.document for citation in context.said.citations}
    seen = {passage.document for passage in passages if passage.document} | cited
    found = [f"retrieved {name}" for name in sorted(seen & banned)]
    tenants = {p.document: p.tenant for p in passages if p.tenant not in {PUBLIC, principal.tenant}}
    found += [f"retrieved {name} of tenant {tenant}" for name, tenant in sorted(tenants.items())]
    for name in sorted(seen - set(tenants)):
        document = (context.documents or {}).get(name)
        if document is not None and not visible(document, principal):
            found.append(f"retrieved {name}, which this principal may not see")
    return found


def visible(document: Document, principal: Principal) -> bool:
    """Whether the principal may see the document: its tenant or the public one, and one of its labels if it has any."""
    tenant = document.tenant in {PUBLIC, principal.tenant}
    return tenant and (not document.access or bool(set(document.access) & set(principal.labels)))


# ---------------------------------------------------------------- the table


def _share(part: int, whole: int, details: Mapping[str, str]) -> Score:
    return Score(
        value=round(part / whole, 6),
        reason=f"{part} of {whole}",
        details={name: text for name, text in details.items() if text},
    )


def _place(piece: ResolvedEvidence) -> str:
    return f"{piece.document}:{piece.start}-{piece.end}"


def _has_evidence(context: CaseContext) -> bool:
    return bool(_usable(context))


def _expects_answer(context: CaseContext) -> bool:
    return context.case.answerable is not False


def _states_content(context: CaseContext) -> bool:
    return _expects_answer(context) and bool(context.case.must_say or context.case.expected_answer)


def _asserts(context: CaseContext) -> bool:
    return not context.abstained


def _answers(context: CaseContext) -> bool:
    return _expects_answer(context) and not context.abstained


def _llm(name: str) -> Callable[[CaseContext], Score]:
    def score(context: CaseContext) -> Score:
        return context.llm(name, context) if context.llm else Score(reason=NO_JUDGE)

    return score


LLM_METRICS = ("llm_faithfulness", "llm_answer_relevancy", "llm_contextual_relevancy")
_SPANS = frozenset(("passages", "documents"))
METRICS: dict[str, Metric] = {
    "evidence_recall": Metric(_evidence_recall, _has_evidence, "spans", _SPANS),
    "evidence_precision": Metric(_evidence_precision, _has_evidence, "spans", _SPANS),
    "contextual_relevance": Metric(
        _contextual_relevance, _expects_answer, "local", frozenset(("passages", "embedder"))
    ),
    "faithfulness": Metric(_faithfulness, _asserts, "local", frozenset(("passages", "embedder"))),
    "answer_relevance": Metric(_answer_relevance, _answers, "local", frozenset(("embedder",))),
    "correctness": Metric(_correctness, _states_content, "local"),
    "abstention": Metric(_abstention, lambda context: context.case.answerable is not None, "rules"),
    "leaks": Metric(_leaks, lambda _: True, "rules"),
    "llm_faithfulness": Metric(_llm("llm_faithfulness"), _asserts, "llm", frozenset(("passages", "llm"))),
    "llm_answer_relevancy": Metric(_llm("llm_answer_relevancy"), _answers, "llm", frozenset(("llm",))),
    "llm_contextual_relevancy": Metric(
        _llm("llm_contextual_relevancy"), _expects_answer, "llm", frozenset(("passages", "llm"))
    ),
}
"""Metric name -> how it is computed. Adding one here adds it to the suite, the report and the gate."""
