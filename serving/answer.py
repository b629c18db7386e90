"""Query -> Answer: the one path that production and the gate share.

    prepare: retrieve, fit into the model's room, render, key       finish: clean, tell refusals, cite

Between the two lies only the engine, which production reaches through Ray Serve and the gate in its own process.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import AnswerParams, EmbedParams, RetrieveParams
from goldgate.pipeline.schema import (
    FORMAT_VERSION,
    Answer,
    CaseAnswer,
    Failure,
    GoldCase,
    Message,
    Passage,
    Query,
    Timings,
    Usage,
)
from goldgate.pipeline.schema import Generation as BuiltCollection
from goldgate.pipeline.store import Store, digest_json, json_bytes, write_files
from goldgate.serving.abstain import detect_abstention
from goldgate.serving.cite import cite
from goldgate.serving.generate import Generation, Generator, Renderer, load_generator
from goldgate.serving.model import build_model, load_model_spec
from goldgate.serving.prompt import Prompt, load_prompt, render, shared_prefix_share

Progress = Callable[[str, int, int], None]

ANSWER_PATH = (
    "retrieve.py", "prompt.py", "rendering.py", "generate.py", "endpoint.py", "extractive.py",
    "answer.py", "abstain.py", "cite.py",
)  # fmt: skip
"""Modules of serving/ whose source is part of every answer key: changed code means a new answer."""


class Retrieves(Protocol):
    """What an Answerer needs of serving/retrieve.py."""

    params: RetrieveParams

    def retrieve(self, queries: Sequence[Query]) -> list[list[Passage]]:
        """Return the ranked passages of each query."""


@dataclass(frozen=True)
class Prepared:
    """A query with everything that decides its answer."""

    query: Query
    key: str
    """Content address of the answer."""
    passages: tuple[Passage, ...]
    """What the model is shown, in this order; what was retrieved where it is not asked."""
    messages: tuple[Message, ...] = ()
    rendered: str = ""
    """The prompt text, chat template applied: what an engine gets, to be tokenised without adding special tokens."""
    settled: Answer | Failure | None = None
    """Set where the engine is not asked: nothing relevant was found, or the question is longer than the model takes."""
    dropped: int = 0
    """Retrieved passages that did not fit."""
    retrieve_ms: float | None = None


class Answerer:
    """Answers queries from one knowledge base, with one prompt and one model."""

    def __init__(
        self,
        retriever: Retrieves,
        prompt: Prompt,
        generator: Renderer,
        release: str = "",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Keep the parts; `on_close` frees those that were opened for this answerer.

        `generator` needs to be a whole Generator only for answering by itself.
        """
        self.retriever = retriever
        self.prompt = prompt
        self.generator = generator
        self.release = release
        self._on_close = on_close
        self._code = answer_path_digest()

    def close(self) -> None:
        """Free what was opened for this answerer. Calling it twice is allowed."""
        close, self._on_close = self._on_close, None
        if close is not None:
            close()

    # -------------------------------------------------------- before and after the engine

    def prepare(self, queries: Sequence[Query]) -> list[Prepared]:
        """Retrieve, fit, render and key each query. Pure given the knowledge base: the same query, the same key."""
        started = time.monotonic()
        found = self.retriever.retrieve(queries)
        each_ms = (time.monotonic() - started) * 1000 / max(len(queries), 1)
        return [self._prepare(query, tuple(p), each_ms) for query, p in zip(queries, found, strict=True)]

    def finish(self, prepared: Prepared, generation: Generation | Failure | None) -> Answer | Failure:
        """Turn what the engine returned (None where `prepared.settled` says all) into the answer or its failure."""
        if prepared.settled is not None:
            return prepared.settled
        if generation is None:
            return Failure(kind="error", message="the engine returned nothing for this question")
        if isinstance(generation, Failure):
            return generation
        text = post_process(generation.text)
        if not text:
            return Failure(kind="empty", message="the model answered with nothing")
        abstained = detect_abstention(text)
        counts = (generation.prompt_tokens, generation.completion_tokens)
        return Answer(
            text=text,
            citations=() if abstained else cite(text, prepared.passages),
            passages=prepared.passages,
            abstained=abstained,
            release=self.release,
            usage=None if None in counts else Usage(prompt_tokens=counts[0] or 0, completion_tokens=counts[1] or 0),
            timings=_timings(prepared, generation),
        )

    # -------------------------------------------------------- with an engine in this process

    def answer_many(self, queries: Sequence[Query], progress: Progress | None = None) -> list[Answer | Failure]:
        """Answer queries in order; equal ones are generated once."""
        prepared = self.prepare(queries)
        made = dict(self.generate(prepared, progress))
        return [self.finish(item, made.get(item.key)) for item in prepared]

    def answer(self, query: Query) -> Answer | Failure:
        """Answer one query."""
        return self.answer_many([query])[0]

    def stream(self, query: Query) -> Iterator[str | Answer | Failure]:
        """Yield pieces of the answer's text as they come, then the whole Answer, or the Failure that ended it."""
        prepared = self.prepare([query])[0]
        if prepared.settled is not None:
            if isinstance(prepared.settled, Answer):
                yield prepared.settled.text
            yield prepared.settled
            return
        last: Generation | Failure | None = None
        for item in self._engine().stream(prepared.messages):
            if isinstance(item, str):
                yield item
            else:
                last = item
        yield self.finish(prepared, last)

    def generate(
        self, prepared: Sequence[Prepared], progress: Progress | None = None
    ) -> Iterator[tuple[str, Generation | Failure]]:
        """Yield (key, result) for what the engine must be asked, batch by batch.

        Prompts are taken in the order of their keys, so that the order of the questions changes no batch.
        """
        wanted = {item.key: item for item in prepared if item.settled is None}
        keys = sorted(wanted)
        engine = self._engine() if keys else None
        for start in range(0, len(keys), max(self.generator.batch, 1)):
            if engine is None:
                break
            batch = keys[start : start + self.generator.batch]
            yield from zip(batch, engine.generate([wanted[key].messages for key in batch]), strict=True)
            _report(progress, "answer", start + len(batch), len(keys))

    def _engine(self) -> Generator:
        if not hasattr(self.generator, "generate"):
            raise UsageError("this answerer has a renderer only", "a generator", "use prepare and finish")
        return self.generator  # type: ignore[return-value]  # checked above; isinstance is slow on protocols

    def _prepare(self, query: Query, passages: tuple[Passage, ...], retrieve_ms: float) -> Prepared:
        if not _relevant(passages, self.retriever.params.min_similarity):
            answer = Answer(
                text=self.prompt.refusal,
                passages=passages,
                abstained=True,
                release=self.release,
                timings=Timings(retrieve_ms=retrieve_ms),
            )
            key = self._key(query, passages, f"refused: {self.prompt.refusal}")
            return Prepared(query, key, passages, settled=answer, retrieve_ms=retrieve_ms)
        room = self.generator.spec.engine.max_model_len - self.generator.spec.sampling.max_tokens
        messages: tuple[Message, ...] = ()
        rendered, tokens = "", 0
        for shorter, shown in _shorter(query, passages):
            messages = render(self.prompt, shorter, shown)
            rendered = self.generator.render(messages)
            tokens = self.generator.count_tokens(rendered)
            if tokens <= room:
                key = self._key(query, shown, rendered)
                dropped = len(passages) - len(shown)
                return Prepared(query, key, shown, messages, rendered, None, dropped, retrieve_ms)
        message = f"the question with one passage takes {tokens} tokens, the model has room for {room}"
        failure = Failure(kind="budget", message=message)
        return Prepared(query, self._key(query, passages, rendered), passages, settled=failure, retrieve_ms=retrieve_ms)

    def _key(self, query: Query, passages: Sequence[Passage], rendered: str) -> str:
        return answer_key(query, passages, rendered, self.generator.identity, self._code)


def answer_key(query: Query, passages: Sequence[Passage], rendered: str, identity: str, code: str) -> str:
    """Return the content address of an answer: equal keys mean that nothing that decides the answer differs.

    `identity` names model files, engine settings and versions, and sampling; `code` the answer path's own source.
    """
    return digest_json(
        {
            "query": query.model_dump(mode="json"),
            "passages": [[p.document, p.text] for p in passages],
            "rendered": rendered,
            "identity": identity,
            "code": code,
        }
    )


def answer_path_digest() -> str:
    """Return the digest of the source of every module named in ANSWER_PATH."""
    folder = importlib.resources.files("goldgate.serving")
    return digest_json({name: (folder / name).read_text(encoding="utf-8") for name in ANSWER_PATH})


def open_answerer(
    generation: BuiltCollection,
    embed: EmbedParams,
    retrieve: RetrieveParams,
    prompt_file: Path,
    model_file: Path,
    answer: AnswerParams,
    store: Store,
    generator: Renderer | None = None,
    release: str = "",
) -> Answerer:
    """Open the parts of a built collection and return an Answerer over them.

    `generator` is used instead of loading the model, and left open when the answerer is closed. Raises the errors of
    each part.
    """
    from goldgate.pipeline.embedder import load_embedder
    from goldgate.pipeline.index import open_collection
    from goldgate.serving.retrieve import Retriever

    prompt = load_prompt(prompt_file)
    with contextlib.ExitStack() as opened:
        embedder = load_embedder(embed, generation.dtype)
        collection = open_collection(generation.digest, store)
        opened.callback(collection.close)
        if generator is None:
            loaded = load_generator(build_model(load_model_spec(model_file), store), answer)
            opened.callback(loaded.close)
            generator = loaded
        retriever = Retriever(collection, embedder, retrieve)
        return Answerer(retriever, prompt, generator, release, on_close=opened.pop_all().close)


# ---------------------------------------------------------------- fitting


def _relevant(passages: Sequence[Passage], min_similarity: float) -> bool:
    """Whether anything found bears on the question; a similarity that was not measured refuses nothing."""
    if not passages:
        return False
    if min_similarity <= 0:
        return True
    return any(p.similarity is None or p.similarity >= min_similarity for p in passages)


def _shorter(query: Query, passages: tuple[Passage, ...]) -> Iterator[tuple[Query, tuple[Passage, ...]]]:
    """Yield ever smaller prompts: old turns go first, but for the last exchange; then the last passages, then it.

    The question and the first passage always stay: without them there is nothing to answer, or to answer from.
    """
    history = query.history
    while len(history) > 2:
        yield query.model_copy(update={"history": history}), passages
        history = history[1:]
    for count in range(len(passages), 0, -1):
        yield query.model_copy(update={"history": history}), passages[:count]
    while history:
        history = history[1:]
        yield query.model_copy(update={"history": history}), passages[:1]


def _timings(prepared: Prepared, generation: Generation) -> Timings:
    retrieve = prepared.retrieve_ms or 0.0
    first, total = generation.first_token_ms, generation.total_ms
    return Timings(
        retrieve_ms=prepared.retrieve_ms,
        first_token_ms=None if first is None else first + retrieve,
        total_ms=None if total is None else total + retrieve,
    )


# ---------------------------------------------------------------- what was said


def post_process(text: str) -> str:
    """Return a model's text as it is shown: without surrounding space and a leading label."""
    return re.sub(r"\A(?:\*\*)?Answer:(?:\*\*)?\s*", "", text.strip()).strip()


# ---------------------------------------------------------------- the gold set, with the answer store


def answer_cases(
    cases: Sequence[GoldCase], answerer: Answerer, store: Store, out: Path, progress: Progress | None = None
) -> list[CaseAnswer]:
    """Answer every case, reusing what was generated before; write `out`, and timings.json beside it.

    Each finished batch is stored at once, so an interruption loses the batch at hand only. Failures are never stored.
    `out` (JSON lines, cases in their order) is the same bytes on every run; what differs from run to run, times and
    what was reused, is in timings.json.
    """
    prepared = answerer.prepare([case.query() for case in cases])
    known = _stored(prepared, store, progress)
    reused = set(known)
    _report(progress, "answers reused", len(reused), len({item.key for item in prepared if item.settled is None}))
    items = {item.key: item for item in prepared}
    for key, result in answerer.generate([item for item in prepared if item.key not in known], progress):
        known[key] = result
        if isinstance(result, Generation) and post_process(result.text):
            _remember(items[key], result, store)
    answers = []
    for case, item in zip(cases, prepared, strict=True):
        done = answerer.finish(item, known.get(item.key))
        parts = {"answer": done} if isinstance(done, Answer) else {"failure": done}
        answers.append(CaseAnswer(case=case.id, key=item.key, reused=item.key in reused, **parts))
    _write_answers(answers, prepared, out, _prefix_share(answerer, prepared))
    return answers


def read_answers(path: Path) -> list[CaseAnswer]:
    """Read answers.jsonl. Raises UsageError naming the line."""
    answers = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                answers.append(CaseAnswer.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(f"{path} line {number} is no answer: {error.errors()[0]['msg']}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "answers.jsonl", "run `goldgate answer`") from None
    return answers


def _stored(prepared: Sequence[Prepared], store: Store, progress: Progress | None) -> dict[str, Generation | Failure]:
    known: dict[str, Generation | Failure] = {}
    for item in prepared:
        if item.settled is not None or item.key in known:
            continue
        path = store.path(*_entry(item.key).split("/"))
        if not path.is_file():
            continue
        generation = _read_entry(path, item.key)
        if generation is None:
            _report(progress, f"answer store: {item.key[:12]} is damaged and is generated again", 0, 1)
        else:
            known[item.key] = generation
    return known


def _entry(key: str) -> str:
    return f"answers/{key[:2]}/{key}.json"


def _remember(item: Prepared, generation: Generation, store: Store) -> None:
    """Store what the engine said, not the answer: citations and spans are made anew from the passages at hand."""
    content = {
        "format_version": FORMAT_VERSION,
        "key": item.key,
        "documents": sorted({p.document for p in item.passages}),  # so that an erased document's answers are found
        "generation": generation.model_dump(mode="json", exclude={"first_token_ms", "total_ms"}),
    }
    store.write_json(_entry(item.key), {**content, "checksum": digest_json(content)})


def _read_entry(path: Path, key: str) -> Generation | None:
    """Return the stored generation, or None for an entry that is damaged, foreign or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        if checksum != digest_json(content) or content["key"] != key or content["format_version"] != FORMAT_VERSION:
            return None
        generation = Generation.model_validate(content["generation"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return generation if post_process(generation.text) else None


def _prefix_share(answerer: Answerer, prepared: Sequence[Prepared]) -> float | None:
    """Return the share of the prompts' tokens that one computation can serve; None where the engine counts them."""
    tokenizer = getattr(answerer.generator, "tokenizer", None)
    rendered = [item.rendered for item in prepared if item.settled is None]
    return None if tokenizer is None else shared_prefix_share(rendered, tokenizer)


def _write_answers(
    answers: Sequence[CaseAnswer], prepared: Sequence[Prepared], out: Path, prefix_share: float | None
) -> None:
    lines, timings = [], {}
    for answer, item in zip(answers, prepared, strict=True):
        done = answer.answer
        stable = answer.model_copy(update={"reused": False})
        times: Mapping[str, float | None] = {}
        if done is not None:
            stable = stable.model_copy(update={"answer": done.model_copy(update={"timings": Timings()})})
            times = done.timings.model_dump()
        timings[answer.case] = {**times, "reused": answer.reused, "passages_dropped": item.dropped}
        lines.append(json.dumps(stable.model_dump(mode="json"), sort_keys=True, ensure_ascii=False) + "\n")
    record = {"format_version": FORMAT_VERSION, "reused": sum(a.reused for a in answers), "cases": timings}
    record["shared_prefix_share"] = prefix_share
    text = "".join(lines).encode("utf-8", errors="backslashreplace")
    write_files(out.parent, {"timings.json": json_bytes(record), out.name: text})


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
