"""case -> score by DeepEval's own LLM metrics, through an OpenAI-compatible judge. Uncalibrated, so advisory.

DeepEval scores an answer without claims 1.0 and drops verdicts that it cannot read. Here no claims, a verdict too few
or too many, and a reply that cannot be parsed are *not measured*.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import openai
from deepeval.metrics import AnswerRelevancyMetric, ContextualRelevancyMetric, FaithfulnessMetric
from deepeval.models import DeepEvalBaseLLM
from pydantic import BaseModel, ValidationError

from goldgate.evals.metrics import build_test_case
from goldgate.evals.scores import NO_PASSAGES, CaseContext
from goldgate.pipeline.schema import Failure, Score

KEY_VARIABLE = "GOLDGATE_JUDGE_KEY"


class _Unparsable(Exception):
    """The judge's reply is not what was asked for."""


class EndpointJudge(DeepEvalBaseLLM):  # type: ignore[misc]  # DeepEval publishes no types
    """An OpenAI-compatible endpoint as DeepEval's model. Every reply is checked against the wanted schema."""

    def __init__(self, url: str, model: str, timeout_s: float = 60.0) -> None:
        """The key comes from the environment variable GOLDGATE_JUDGE_KEY; an endpoint without keys needs none."""
        self._url, self._model, self._timeout_s = url, model, timeout_s
        super().__init__(model)

    def load_model(self) -> openai.OpenAI:
        """Return the client; nothing is sent yet."""
        key = os.environ.get(KEY_VARIABLE) or "none"
        return openai.OpenAI(base_url=self._url, api_key=key, timeout=self._timeout_s, max_retries=2)

    def get_model_name(self) -> str:
        """Return the judge's model name."""
        return self._model

    def generate(self, prompt: str, schema: type[BaseModel] | None = None) -> Any:  # noqa: ANN401 (DeepEval's interface)
        """Ask once, greedily. Raises _Unparsable when the reply does not fit `schema`."""
        reply = self.model.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": prompt}], temperature=0, seed=0
        )
        text = (reply.choices[0].message.content or "") if reply.choices else ""
        return text if schema is None else _parse(text, schema)

    async def a_generate(self, prompt: str, schema: type[BaseModel] | None = None) -> Any:  # noqa: ANN401
        """As `generate`."""
        return self.generate(prompt, schema)


def _parse(text: str, schema: type[BaseModel]) -> BaseModel:
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        return schema.model_validate(json.loads(match[0] if match else text))
    except (ValueError, ValidationError) as error:
        raise _Unparsable(f"the judge's reply is not {schema.__name__}: {' '.join(str(error).split())[:120]}") from None


def llm_scorer(url: str, model: str) -> Callable[[str, CaseContext], Score]:
    """Return the scorer of the llm_* metrics for the endpoint at `url`."""
    judge = EndpointJudge(url, model)
    scorers = {
        "llm_faithfulness": _faithfulness,
        "llm_answer_relevancy": _answer_relevancy,
        "llm_contextual_relevancy": _contextual_relevancy,
    }

    def score(name: str, context: CaseContext) -> Score:
        try:
            return scorers[name](judge, context)
        except _Unparsable as error:
            return _failed("malformed", str(error))
        except openai.APITimeoutError:
            return _failed("timeout", "the judge did not reply in time")
        except openai.RateLimitError:
            return _failed("rate_limited", "the judge refused: too many requests")
        except openai.APIStatusError as error:
            return _failed("http", f"the judge replied HTTP {error.status_code}")
        except openai.APIConnectionError:
            return _failed("unreachable", "the judge cannot be reached")

    return score


def _failed(kind: Any, message: str) -> Score:  # noqa: ANN401 (a FailureKind)
    return Score(reason=message, failure=Failure(kind=kind, message=message))


_QUIET = {"include_reason": False, "async_mode": False, "eval_mode": "llm", "threshold": None}


def _faithfulness(judge: EndpointJudge, context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    metric = FaithfulnessMetric(model=judge, penalize_ambiguous_claims=True, **_QUIET)
    metric.measure(build_test_case(context), _show_indicator=False)
    return _checked(metric.score, len(metric.claims), len(metric.verdicts), "claims")


def _answer_relevancy(judge: EndpointJudge, context: CaseContext) -> Score:
    metric = AnswerRelevancyMetric(model=judge, **_QUIET)
    metric.measure(build_test_case(context), _show_indicator=False)
    return _checked(metric.score, len(metric.statements), len(metric.verdicts), "statements")


def _contextual_relevancy(judge: EndpointJudge, context: CaseContext) -> Score:
    if context.said.passages is None:
        return Score(reason=NO_PASSAGES)
    if not context.said.passages:
        return Score(value=0.0, reason="nothing was retrieved")
    metric = ContextualRelevancyMetric(model=judge, **_QUIET)
    metric.measure(build_test_case(context), _show_indicator=False)
    counts = [len(verdicts.verdicts) for verdicts in metric.verdicts_list]
    if len(counts) != len(context.said.passages) or not all(counts):
        return _failed("malformed", f"the judge gave verdicts on {sum(map(bool, counts))} of {len(counts)} passages")
    return Score(value=round(float(metric.score), 6), reason=f"{sum(counts)} statements")


def _checked(score: float, asked: int, judged: int, what: str) -> Score:
    if asked == 0:
        return Score(reason=f"the judge found no {what} in the answer")
    if asked != judged:
        return _failed("malformed", f"the judge gave {judged} verdicts on {asked} {what}")
    return Score(value=round(float(score), 6), reason=f"{asked} {what}")
