"""The frozen records that cross between packages. Between processes only files cross, and these are their lines.

Every record is closed (an unknown field is an error) and finite (no NaN, no infinity). Character offsets count
Unicode code points of `Document.text`, half open: `text[start:end]`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION = 1
"""Written into every stored record set; a reader refuses a newer one."""

PUBLIC = "public"
"""The tenant of documents that everyone may read, and of the principal that names nobody."""


class Record(BaseModel):
    """A frozen, closed record with finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------- who asks


class Principal(Record):
    """Who asks. A document is visible when its tenant is `public` or the principal's, and it carries no access label
    or one that the principal holds."""

    tenant: str = Field(PUBLIC, min_length=1, description="The asking tenant.")
    labels: tuple[str, ...] = Field((), description="Access labels that the principal holds, sorted.")


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Query(Record):
    """A question, the conversation before it, and who asks. There is no query without a principal."""

    question: str = Field(min_length=1, description="The last user turn.")
    history: tuple[Message, ...] = Field((), description="Earlier turns, oldest first.")
    principal: Principal


# ---------------------------------------------------------------- documents and chunks

BlockKind = Literal["heading", "paragraph", "list", "table_header", "table_row", "code", "quote"]


class Block(Record):
    """A structural part of a document; blocks do not overlap and are in order."""

    kind: BlockKind
    start: int = Field(ge=0, description="First character, inclusive.")
    end: int = Field(ge=0, description="Last character, exclusive.")
    level: int = Field(0, ge=0, description="Heading level 1..6; 0 for everything else.")
    title: str = Field("", description="A heading's plain text without markup; empty otherwise.")


class Document(Record):
    """One document as text, with its structure and who may read it."""

    id: str = Field(min_length=1, description="Path relative to the knowledge root, with forward slashes.")
    text: str = Field(min_length=1, description="The text that every character span refers to.")
    title: str = Field("", description="First heading or the parser's title.")
    blocks: tuple[Block, ...] = ()
    media_type: str = Field(description="text/markdown, text/html, text/x-rst, text/plain, application/pdf or DOCX.")
    parser: str = Field(description="Library and version that made `text` and `blocks`, part of the identity.")
    digest: str = Field(description="SHA-256 of the source bytes and of the sidecar, if any.")
    tenant: str = PUBLIC
    access: tuple[str, ...] = Field((), description="Access labels, sorted; empty means everyone of the tenant.")
    version: str = ""
    date: str = Field("", description="ISO 8601 date of the content, from front matter or sidecar; empty if not given.")


class Unreadable(Record):
    """A document that could not be read and was skipped on request."""

    id: str
    reason: str


class Chunk(Record):
    """A passage of one document. `text` is what is embedded and shown to the model."""

    id: str = Field(description="UUIDv5 of document id, span and text digest.")
    document: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    text: str = Field(min_length=1, description="Heading path, the table header where needed, then text[start:end].")
    heading: tuple[str, ...] = Field((), description="Titles of the enclosing headings, outermost first.")
    tokens: int = Field(gt=0, description="Length of `text` in the embedder's own tokens, special tokens included.")
    tenant: str = PUBLIC
    access: tuple[str, ...] = ()
    version: str = ""
    date: str = ""


class Passage(Record):
    """A retrieved chunk, with the score that ranked it."""

    chunk: str
    document: str
    start: int
    end: int
    text: str
    heading: tuple[str, ...] = ()
    score: float = Field(description="Fused rank score; comparable within one query only.")
    similarity: float | None = Field(None, description="Cosine of query and passage embeddings, where measured.")
    tenant: str = PUBLIC


# ---------------------------------------------------------------- a built collection


class Generation(Record):
    """The manifest of a built collection; `digest` covers every other field."""

    format_version: int = FORMAT_VERSION
    digest: str = ""
    documents: int
    chunks: int
    files: dict[str, str] = Field(description="File name -> SHA-256: documents, chunks and embeddings Parquet.")
    embedder: str = Field(description="Digest of model files, tokenizer, dtype, batch shape, pooling, normalisation.")
    embedder_name: str
    dtype: str
    dimension: int
    bm25: dict[str, str] = Field(description="Implementation, version and parameters of the sparse vectors.")
    hnsw: bool = Field(description="False: exact search. True: HNSW, with its recall measured elsewhere.")
    hnsw_params: dict[str, int] = Field({}, description="m, ef_construct and ef_search; empty for exact search.")
    parsers: dict[str, str] = Field(description="Media type -> parser and version.")
    tenants: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = Field((), description="Documents skipped with --skip-unreadable.")


# ---------------------------------------------------------------- answers


class Citation(Record):
    """Where a part of the answer comes from."""

    document: str
    start: int
    end: int
    passage: int = Field(ge=1, description="1-based number of the passage in the prompt.")
    quote: str = Field("", description="The cited sentence.")


class Usage(Record):
    """Token counts of one answer."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Timings(Record):
    """Wall-clock times of one answer; never part of a score or a digest."""

    retrieve_ms: float | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None


class Answer(Record):
    """What the system said."""

    text: str = Field(min_length=1)
    citations: tuple[Citation, ...] = ()
    passages: tuple[Passage, ...] | None = Field(None, description="None: the system does not tell what it retrieved.")
    abstained: bool | None = Field(None, description="The system's own flag; None where it has none.")
    release: str = ""
    usage: Usage | None = None
    timings: Timings = Timings()


FailureKind = Literal[
    "empty", "error", "http", "rate_limited", "timeout", "unreachable", "malformed", "budget", "crash"
]


class Failure(Record):
    """Why there is no answer or no score. A failure is data: it never becomes 0, 1, NaN or ""."""

    kind: FailureKind
    message: str


class CaseAnswer(Record):
    """One line of answers.jsonl: a case and either its answer or the failure."""

    case: str
    key: str = Field(description="Answer key: digest of everything that decides the answer (content address).")
    answer: Answer | None = None
    failure: Failure | None = None
    reused: bool = Field(False, description="Taken from the answer store; nothing was generated.")

    @model_validator(mode="after")
    def _one_of(self) -> CaseAnswer:
        if (self.answer is None) == (self.failure is None):
            raise ValueError("a case has either an answer or a failure")
        return self


# ---------------------------------------------------------------- gold set


class Evidence(Record):
    """Text of a document that answers the question; anchored to the document, never to chunks."""

    document: str = Field(min_length=1)
    quote: str | None = Field(None, min_length=1, description="Verbatim text, unique in the document.")
    start: int | None = Field(None, ge=0)
    end: int | None = Field(None, ge=0)
    heading: str | None = Field(None, min_length=1, description="Heading whose section is the evidence.")
    or_document: bool = Field(
        False, description="The whole document is evidence too: it is used, as moved, when text and heading are gone."
    )

    @model_validator(mode="after")
    def _one_anchor(self) -> Evidence:
        if (self.start is None) != (self.end is None):
            raise ValueError("evidence needs both start and end")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError("evidence start must lie before end")
        if self.quote is not None and self.start is not None:
            raise ValueError("evidence has a quote or a span, not both")
        return self


class GoldCase(Record):
    """A question and what is expected of its answer."""

    id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str | None = Field(None, min_length=1)
    messages: tuple[Message, ...] = Field(
        (), description="A conversation ending in a user turn, instead of `question`."
    )
    expected_answer: str | None = Field(None, min_length=1)
    must_say: tuple[str, ...] = Field((), description="Facts that a right answer names; `a|b` allows either wording.")
    answerable: bool | None = Field(None, description="False: the system must refuse. None: not stated.")
    evidence: tuple[Evidence, ...] = ()
    cluster: str = Field(
        "", description="Cases that share a source; empty: the evidence's first document, else the id."
    )
    slices: tuple[str, ...] = ()
    language: str = "en"
    must_hold: bool = False
    principal: Principal = Principal()
    must_not_retrieve: tuple[str, ...] = Field(
        (), description="Document ids that may not be retrieved for this principal."
    )
    must_not_say: tuple[str, ...] = Field((), description="Strings that may not appear in the answer.")

    @model_validator(mode="after")
    def _complete(self) -> GoldCase:
        if (self.question is None) == (not self.messages):
            raise ValueError("needs a question or messages, not both")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages must end with a user turn")
        if self.answerable is False and (self.expected_answer or self.must_say):
            raise ValueError("an unanswerable case cannot expect an answer")
        if not (
            self.expected_answer or self.must_say or self.answerable is not None or self.evidence
            or self.must_not_retrieve or self.must_not_say
        ):  # fmt: skip
            raise ValueError("has no expectation: give expected_answer, must_say, answerable, evidence or must_not_*")
        return self

    def query(self) -> Query:
        """Return the question with its history and principal."""
        if self.question is not None:
            return Query(question=self.question, principal=self.principal)
        return Query(question=self.messages[-1].content, history=self.messages[:-1], principal=self.principal)


EvidenceState = Literal["resolved", "moved", "stale"]


class ResolvedEvidence(Record):
    """Where a piece of evidence lies in the documents at hand."""

    document: str
    start: int = 0
    end: int = 0
    state: EvidenceState
    note: str = ""


# ---------------------------------------------------------------- report


class Score(Record):
    """One metric on one case. `value` is None exactly when it was not measured, and `reason` says why."""

    value: float | None = Field(None, ge=0, le=1)
    reason: str = ""
    failure: Failure | None = None
    details: dict[str, str] = Field({}, description="What the metric saw, for people.")

    @model_validator(mode="after")
    def _explained(self) -> Score:
        if self.value is None and not self.reason:
            raise ValueError("a score without a value needs its reason")
        if self.value is not None and self.failure is not None:
            raise ValueError("a failed metric has no value")
        return self


class CaseReport(Record):
    """Everything that the gate needs about one case."""

    id: str
    question: str
    cluster: str
    slices: tuple[str, ...] = ()
    language: str = "en"
    must_hold: bool = False
    answerable: bool | None = None
    case_digest: str = Field(description="Digest of the gold case: a changed case is seen.")
    key: str = Field(description="Answer key; equal keys mean the same inputs, so the difference is a known zero.")
    answer: Answer | None = None
    failure: Failure | None = None
    evidence: tuple[ResolvedEvidence, ...] = ()
    scores: dict[str, Score] = Field(description="Metric name -> score; a metric that does not apply is absent.")


class MetricInfo(Record):
    """How a metric was computed."""

    name: str
    judge: str = Field(description="What judged: spans, local, or llm:<model>.")
    calibrated: bool = Field(description="True when checked against human labels or needing no judgement.")
    code_digest: str
    not_measured: str = Field("", description="Why the metric was not measured on this system at all; empty if it was.")


class Report(Record):
    """The measured candidate or production: the only input of the gate, beside the policy."""

    format_version: int = FORMAT_VERSION
    system: str = Field(description="builtin or http.")
    parts: dict[str, str] = Field(
        description="Part -> digest: knowledge_base, retrieval, prompt, model, embedder, code."
    )
    gold_digest: str
    metrics: dict[str, MetricInfo]
    cases: tuple[CaseReport, ...]
    documents: dict[str, str] = Field(
        {}, description="Document id -> digest of its text, to tell what the change touched."
    )
    unreadable: tuple[Unreadable, ...] = ()
    git: dict[str, str] = Field({}, description="commit and dirty.")


# ---------------------------------------------------------------- policy and verdict

Tier = Literal["critical", "supporting", "advisory"]
VerdictWord = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT_COMPUTED"]
ConditionStatus = Literal["holds", "broken", "inconclusive", "not_computed", "not_measured"]


class ConditionPolicy(Record):
    """What is required of one metric."""

    metric: str
    tier: Tier = "critical"
    margin: float = Field(gt=0, le=1, description="Largest mean loss against production that is tolerable.")
    floor: float | None = Field(None, ge=0, le=1, description="Smallest acceptable mean of the candidate.")
    slices: tuple[str, ...] = Field((), description="Slices held to the same margin; empty: all cases together.")
    min_cases: int = Field(1, ge=1, description="Fewer measured cases than this are NOT_COMPUTED.")


class Policy(Record):
    """golden/gate.toml."""

    format_version: int = FORMAT_VERSION
    alpha: float = Field(0.05, gt=0, lt=0.5, description="One-sided error each way.")
    max_stale_share: float = Field(0.05, ge=0, le=1, description="More stale evidence than this is NOT_COMPUTED.")
    max_unreadable: int = Field(0, ge=0, description="Skipped documents that are tolerated.")
    must_hold_metric: str = Field(
        "correctness", description="The metric that decides whether a must_hold case is lost."
    )
    zero_tolerance: tuple[str, ...] = Field(("leaks",), description="Metrics where any score below 1 is FAIL.")
    min_change: float = Field(
        0.2, gt=0, le=1, description="Smallest change of one case's score that counts as better, worse or lost."
    )
    touched_margin: float = Field(
        0.1, gt=0, le=1, description="Largest net loss among the touched cases, where there is any loss at all."
    )
    allow_not_measured: tuple[str, ...] = Field(
        (), description="Critical metrics that the system under test need not be able to give (http, no contexts)."
    )
    reviewed_removals: tuple[str, ...] = Field((), description="Gold cases whose removal a person has reviewed.")
    conditions: tuple[ConditionPolicy, ...]


class Interval(Record):
    """A two-sided interval made of two one-sided bounds at `1 - alpha` each."""

    lower: float
    upper: float


class Condition(Record):
    """One line of the verdict."""

    metric: str
    slice: str = ""
    tier: Tier
    n: int = Field(ge=0, description="Cases measured on both sides.")
    identical: int = Field(
        0, ge=0, description="Of those, cases whose answer key is the same: difference known to be 0."
    )
    candidate: float | None = None
    baseline: float | None = None
    delta: float | None = None
    interval: Interval | None = None
    margin: float | None = None
    floor: float | None = None
    p_worse: float | None = Field(None, description="One-sided p-value of 'worse', before Holm's correction.")
    status: ConditionStatus
    note: str = ""


class CaseChange(Record):
    """One case that got better or worse."""

    case: str
    question: str
    metric: str
    baseline: float
    candidate: float


class EvidenceChange(Record):
    """A piece of evidence that a person should look at: its text changed, or it is not there any more."""

    case: str
    document: str = Field(description="Where it lies now, or where it lay.")
    state: Literal["moved", "stale"]
    note: str = ""


class Diagnosis(Record):
    """Which part is to blame, and why it is thought so."""

    part: Literal["retrieval", "generation", "prompt", "document", "gold", "security", "none", "unknown"]
    headline: str
    evidence: tuple[str, ...] = ()
    do_next: str = ""


class Touched(Record):
    """The cases that the change touched, counted one by one."""

    total: int = Field(ge=0)
    better: int = Field(ge=0)
    worse: int = Field(ge=0)
    p_worse: float | None = None
    status: ConditionStatus
    cases: tuple[CaseChange, ...] = ()
    evidence_lost: dict[str, int] = Field({}, description="Document -> cases that lost its evidence from retrieval.")


class MustHold(Record):
    """The cases that production answers and that may not be lost."""

    total: int = Field(ge=0)
    lost: tuple[str, ...] = ()
    status: ConditionStatus


class Verdict(Record):
    """`goldgate gate --json`."""

    format_version: int = FORMAT_VERSION
    verdict: VerdictWord | None = Field(description="None with reason `no_baseline`: there is no production yet.")
    candidate: str = Field(description="Digest of the candidate's report.")
    baseline: str | None = Field(description="Production's release digest.")
    conditions: tuple[Condition, ...] = ()
    touched: Touched | None = None
    must_hold: MustHold | None = None
    anchor: str | None = None
    needed_cases: dict[str, int] = Field({}, description="Metric -> more cases that would decide an INCONCLUSIVE.")
    acceptance: str | None = None
    reason: str = ""
    diagnosis: Diagnosis | None = None
    evidence: tuple[EvidenceChange, ...] = Field(
        (), description="Evidence to review: stale, which is not scored, and moved, which is scored at its new place."
    )
    changed_cases: dict[str, str] = Field({}, description="Gold case id -> added, removed or changed since production.")
    reviewed: dict[str, int] = Field({}, description="Person -> answers that they judged blind, in the judge's place.")
    skipped_documents: tuple[Unreadable, ...] = ()
    digests: dict[str, str] = {}


# ---------------------------------------------------------------- releases


class Release(Record):
    """What is served, and why it was allowed. `digest` covers every other field."""

    format_version: int = FORMAT_VERSION
    digest: str = ""
    application: str = "default"
    kind: Literal["gated", "bootstrap"] = Field(description="bootstrap: the first release, without a baseline.")
    generation: str
    model: str
    prompt: str
    retrieval: str
    embedder: str
    code: str = Field(description="Digest of the modules on the answer path.")
    gold: str
    policy: str
    report: str
    verdict: str
    verdict_word: VerdictWord | None
    baseline: str | None
    actor: str
    files: dict[str, str] = Field(description="File in the release folder -> SHA-256.")


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Event(Record):
    """One line of an application's ledger. State is derived from events and never stored twice."""

    sequence: int = Field(ge=1)
    at: str = Field(description="UTC, ISO 8601.")
    kind: Literal["promoted", "rolled_back"]
    release: str
    previous: str | None = None
    actor: str
    note: str = ""
    parent: str = Field("", description="SHA-256 of the ledger line before this one; empty for the first.")
