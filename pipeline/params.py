"""params.toml -> Params: every knob, by section, closed against misspelling."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Record

R = TypeVar("R", bound=Record)


class ReadParams(Record):
    """[read]"""

    include: tuple[str, ...] = Field(("**/*",), min_length=1, description="Glob patterns below the knowledge root.")
    exclude: tuple[str, ...] = Field((), description="Glob patterns to leave out.")
    max_bytes: int = Field(20_000_000, gt=0, description="A larger document is unreadable.")
    skip_unreadable: bool = Field(False, description="Record an unreadable document instead of stopping.")


class ChunkParams(Record):
    """[chunk]"""

    max_tokens: int = Field(200, ge=16, description="Longest chunk in the embedder's tokens, special tokens included.")
    overlap_tokens: int = Field(32, ge=0, description="Tokens that a chunk repeats from the one before it.")

    @model_validator(mode="after")
    def _overlap_fits(self) -> ChunkParams:
        if self.overlap_tokens * 2 > self.max_tokens:
            raise ValueError("overlap_tokens must be at most half of max_tokens")
        return self


class EmbedParams(Record):
    """[embed]"""

    model: str = Field("all-MiniLM-L6-v2", description="all-MiniLM-L6-v2, a folder, or hashing (the test double).")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_rows: int = Field(8, ge=1, description="Rows of every batch; the last one is filled with dummy rows.")
    bucket_tokens: int = Field(16, ge=8, description="Texts are padded to a multiple of this.")
    query_prefix: str = Field("", description="Put before a query, never before a passage.")
    actors: int = Field(1, ge=1, description="Embedding actors.")


class IndexParams(Record):
    """[index]"""

    exact_below: int = Field(50_000, ge=0, description="Up to this many chunks search is exact; above, HNSW.")
    hnsw_m: int = Field(16, ge=4)
    ef_construct: int = Field(128, ge=8)
    ef_search: int = Field(128, ge=8)


class RetrieveParams(Record):
    """[retrieve]"""

    top_k: int = Field(4, ge=1, le=100, description="Passages given to the model.")
    candidates: int = Field(40, ge=1, le=1000, description="Candidates per ranking before fusion.")
    dense_weight: float = Field(1.0, ge=0)
    bm25_weight: float = Field(1.0, ge=0)
    rrf_k: int = Field(60, ge=1, description="Constant of reciprocal rank fusion.")
    min_similarity: float = Field(
        0.0, ge=-1, le=1, description="Refuse when no passage has a cosine at least this high; 0 or less: never."
    )

    @model_validator(mode="after")
    def _something_ranks(self) -> RetrieveParams:
        if self.dense_weight == 0 and self.bm25_weight == 0:
            raise ValueError("dense_weight and bm25_weight are both 0: nothing would rank")
        if self.top_k > self.candidates:
            raise ValueError("top_k must be at most candidates")
        return self


class PromptParams(Record):
    """[prompt]"""

    file: str = "serving/prompts/grounded.toml"


class ModelParams(Record):
    """[model]"""

    file: str = "serving/models/smollm2-135m.toml"


class AnswerParams(Record):
    """[answer]"""

    batch: int = Field(8, ge=1, description="Prompts generated together; fixed, because it can change bf16 results.")
    timeout_s: float = Field(120.0, gt=0, description="Longest wait for one answer.")


class EvaluateParams(Record):
    """[evaluate]"""

    metrics: tuple[str, ...] = Field(
        (
            "evidence_recall", "evidence_precision", "contextual_relevance", "faithfulness",
            "answer_relevance", "correctness", "abstention", "leaks",
        ),
        min_length=1,
        description="Metrics to compute, by name.",
    )  # fmt: skip
    judge_url: str = Field("", description="OpenAI-compatible endpoint for DeepEval's LLM metrics; empty: none.")
    judge_model: str = ""


class Params(Record):
    """params.toml"""

    read: ReadParams = ReadParams()
    chunk: ChunkParams = ChunkParams()
    embed: EmbedParams = EmbedParams()
    index: IndexParams = IndexParams()
    retrieve: RetrieveParams = RetrieveParams()
    prompt: PromptParams = PromptParams()
    model: ModelParams = ModelParams()
    answer: AnswerParams = AnswerParams()
    evaluate: EvaluateParams = EvaluateParams()


def load_params(path: Path) -> Params:
    """Read `path`. Raises UsageError that names the parameter, what was expected and the nearest known name."""
    return load_toml(path, Params)


def load_toml(path: Path, record: type[R]) -> R:
    """Read a TOML file into a closed record; every mistake is one UsageError line."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "a TOML file", "run goldgate from the repository root") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "valid TOML") from None
    return parse_record(raw, record, str(path))


def parse_record(raw: object, record: type[R], where: str) -> R:
    """Validate `raw` as `record`. Raises UsageError naming `where`, the field, and the nearest known field."""
    try:
        return record.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        if first["type"] == "extra_forbidden":
            known = sorted(_fields_at(record, first["loc"][:-1]))
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UsageError(f"{where}: {field} is unknown", "", hint) from None
        got = f", got {first['input']!r:.60}" if first["type"] not in {"missing", "value_error"} else ""
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {field}: {message}{got}") from None


def _fields_at(record: type[Record], loc: tuple[int | str, ...]) -> set[str]:
    current: type[Record] = record
    for part in loc:
        if isinstance(part, int):
            continue
        info = current.model_fields.get(part)
        if info is None:
            return set()
        candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
        nested = next((c for c in candidates if isinstance(c, type) and issubclass(c, Record)), None)
        if nested is None:
            return set()
        current = nested
    return set(current.model_fields)
