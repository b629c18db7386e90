from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.index import index
from goldgate.pipeline.params import AnswerParams, EmbedParams, IndexParams, RetrieveParams
from goldgate.pipeline.schema import Answer, CaseAnswer, Failure, GoldCase, Message, Principal, Query, Record
from goldgate.pipeline.sentences import sentence_spans
from goldgate.pipeline.store import Store
from goldgate.serving.answer import Answerer, answer_cases, detect_abstention, open_answerer, read_answers
from goldgate.serving.cite import cite
from goldgate.serving.generate import Generation, Generator, load_renderer
from goldgate.serving.model import ModelSpec, build_model
from goldgate.serving.prompt import Prompt, load_prompt
from tests.pipeline.builds import document, write_build
from tests.serving.models import Shelf, double, model_folder, passage

ROOT = Path(__file__).resolve().parents[2]
PROMPT = Prompt(name="p", version="1", system="Rules.")
TOWER = "The tower is 330 metres tall. It was finished in 1889 by Gustave Eiffel."
BREAD = "Bread is baked every morning at six."


def query(question: str, *history: Message, principal: Principal | None = None) -> Query:
    return Query(question=question, history=history, principal=principal or Principal())


def answered(result: Answer | Failure) -> Answer:
    assert isinstance(result, Answer), result
    return result


class Said:
    """A generator that says what a test wants; counts what it is asked."""

    batch = 2

    def __init__(
        self, store: Store, says: Sequence[Generation | Failure] | BaseException, identity: str = "said"
    ) -> None:
        self._double = double(store)
        self.spec = self._double.spec
        self.identity = identity
        self.says = says
        self.asked: list[str] = []

    def render(self, messages: tuple[Message, ...]) -> str:
        return self._double.render(messages)

    def count_tokens(self, rendered: str) -> int:
        return self._double.count_tokens(rendered)

    def generate(self, batch: Sequence[tuple[Message, ...]]) -> list[Generation | Failure]:
        start = len(self.asked)
        self.asked.extend(messages[-1].content for messages in batch)
        if isinstance(self.says, BaseException):
            if start:
                raise self.says
            return [Generation(text=f"Bread {n}.") for n in range(len(batch))]
        return [self.says[(start + n) % len(self.says)] for n in range(len(batch))]

    def stream(self, messages: tuple[Message, ...]) -> Iterator[str | Generation | Failure]:
        yield from self.generate([messages])

    def close(self) -> None:
        return


def said(store: Store, *texts: str) -> Said:
    return Said(store, [Generation(text=text, prompt_tokens=5, completion_tokens=2) for text in texts])


# ---------------------------------------------------------------- one path


def test_an_answer_carries_passages_citations_usage_and_times(store: Store) -> None:
    shelf = Shelf([passage(BREAD, "b.md"), passage(TOWER, "a.md", start=100, prefix="Towers > Eiffel\n")])
    answerer = Answerer(shelf, PROMPT, double(store), release="r1")
    answer = answered(answerer.answer(query("How tall is the tower in metres?")))
    assert answer.text == "The tower is 330 metres tall."
    assert answer.abstained is False
    assert answer.release == "r1"
    assert answer.passages == tuple(shelf.passages)
    (citation,) = answer.citations
    assert (citation.document, citation.passage, citation.quote) == ("a.md", 2, "The tower is 330 metres tall.")
    assert (citation.start, citation.end) == (100, 129)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.timings.total_ms is not None
    assert answer.timings.retrieve_ms is not None


def test_many_streamed_and_single_answers_agree(store: Store) -> None:
    answerer = Answerer(Shelf([passage(TOWER), passage(BREAD, "b.md")]), PROMPT, double(store))
    questions = ["How tall is the tower in metres?", "When is bread baked?", "Who?", "How tall is the tower in metres?"]
    many = answerer.answer_many([query(q) for q in questions])
    still = [m.model_copy(update={"timings": answered(m).timings}) for m in many]
    for question, expected in zip(questions, still, strict=True):
        single = answered(answerer.answer(query(question)))
        *pieces, streamed = answerer.stream(query(question))
        assert isinstance(streamed, Answer)
        for other in (single, streamed):
            assert other.model_copy(update={"timings": answered(expected).timings}) == expected
        assert "".join(str(p) for p in pieces) == streamed.text


def test_prepare_and_finish_are_all_that_an_engine_elsewhere_needs(tmp_path: Path, store: Store) -> None:
    source = model_folder(tmp_path / "source")
    model = build_model(ModelSpec(name="m", kind="vllm", source=str(source)), store)
    answerer = Answerer(Shelf([passage(TOWER)]), PROMPT, load_renderer(model, AnswerParams()))
    (prepared,) = answerer.prepare([query("How tall?")])
    assert prepared.settled is None
    assert prepared.rendered.endswith("Question: How tall?<|im_end|>\n<|im_start|>assistant\n")
    answer = answered(answerer.finish(prepared, Generation(text=" It is 330 metres tall. ")))
    assert answer.text == "It is 330 metres tall."
    assert answer.usage is None, "an endpoint that counts nothing must not look like one that counted 0"
    with pytest.raises(UsageError, match="renderer only"):
        answerer.answer(query("How tall?"))


@pytest.mark.parametrize("text", ["", "  \n", "Answer:"])
def test_an_empty_generation_is_a_failure(store: Store, text: str) -> None:
    result = Answerer(Shelf([passage(TOWER)]), PROMPT, said(store, text)).answer(query("How tall?"))
    assert isinstance(result, Failure)
    assert result.kind == "empty"


def test_a_failure_of_the_engine_stays_a_failure(store: Store) -> None:
    broken = Said(store, [Failure(kind="timeout", message="late")])
    answerer = Answerer(Shelf([passage(TOWER)]), PROMPT, broken)
    assert answerer.answer(query("How tall?")) == Failure(kind="timeout", message="late")
    assert list(answerer.stream(query("How tall?")))[-1] == Failure(kind="timeout", message="late")


# ---------------------------------------------------------------- keys


def test_the_key_covers_what_decides_the_answer_and_nothing_else(store: Store) -> None:
    def key(
        question: Query, texts: Sequence[object] = (passage(TOWER),), prompt: Prompt = PROMPT, identity: str = "x"
    ) -> str:
        said_by = Said(store, [], identity)
        return Answerer(Shelf(list(texts)), prompt, said_by).prepare([question])[0].key  # type: ignore[arg-type]

    base = query("How tall?")
    turn = Message(role="user", content="Hello")
    different = [
        key(base),
        key(query("How tall? ")),
        key(query("How tall?", turn)),
        key(query("How tall?", principal=Principal(tenant="acme"))),
        key(base, [passage(TOWER, "other.md")]),
        key(base, [passage(TOWER + " It is red.")]),
        key(base, [passage(TOWER), passage(BREAD)]),
        key(base, [passage(BREAD), passage(TOWER)]),
        key(base, prompt=PROMPT.model_copy(update={"system": "Other rules."})),
        key(base, identity="another engine"),
        key(base, []),
        key(base, [], prompt=PROMPT.model_copy(update={"refusal": "Sorry."})),
    ]
    assert len(set(different)) == len(different)
    assert key(base) == different[0]
    assert key(base, [passage(TOWER, start=7, score=0.5)]) == different[0], "where it lies does not change what is said"


# ---------------------------------------------------------------- nothing to answer from


def test_without_a_relevant_passage_the_engine_is_not_asked(store: Store) -> None:
    engine = said(store, "It is red.")
    weak = [passage(TOWER, similarity=0.19), passage(BREAD, similarity=-0.2)]
    for shelf in (Shelf([]), Shelf(weak, min_similarity=0.2)):
        answer = answered(Answerer(shelf, PROMPT, engine).answer(query("How tall?")))
        assert (answer.text, answer.abstained, answer.citations) == ("I don't know.", True, ())
        assert answer.passages == tuple(shelf.passages)
    assert engine.asked == []
    for least in (0.0, -1.0, 0.19):
        answered(Answerer(Shelf(weak, least), PROMPT, engine).answer(query("How tall?")))
    answered(Answerer(Shelf([passage(TOWER)], 0.9), PROMPT, engine).answer(query("How tall?")))
    assert len(engine.asked) == 4, "a similarity that was not measured refuses nothing"


def test_a_refusal_without_the_engine_streams_too(store: Store) -> None:
    text, answer = Answerer(Shelf([]), PROMPT, said(store, "x")).stream(query("How tall?"))
    assert text == "I don't know."
    assert isinstance(answer, Answer)
    assert answer.abstained is True


# ---------------------------------------------------------------- fitting


def small(tmp_path: Path, store: Store, room: int) -> Answerer:
    """An answerer whose model takes `room` prompt tokens and counts every word as one."""
    source = model_folder(tmp_path / f"source{room}")
    engine = {"max_model_len": room + 8}
    spec = ModelSpec.model_validate(
        {"name": "m", "kind": "vllm", "source": str(source), "engine": engine, "sampling": {"max_tokens": 8}}
    )
    shelf = Shelf([passage("one " * 40, "1.md"), passage("two " * 40, "2.md"), passage("three " * 40, "3.md")])
    return Answerer(shelf, Prompt(name="p", version="1"), load_renderer(build_model(spec, store), AnswerParams()))


def test_last_passages_are_dropped_until_the_prompt_fits(tmp_path: Path, store: Store) -> None:
    counts = []
    for room in (200, 120, 70):
        answerer = small(tmp_path, store, room)
        (prepared,) = answerer.prepare([query("What is three?")])
        assert prepared.settled is None
        assert answerer.generator.count_tokens(prepared.rendered) <= room
        assert [p.document for p in prepared.passages] == ["1.md", "2.md", "3.md"][: len(prepared.passages)]
        assert "What is three?" in prepared.rendered
        counts.append((len(prepared.passages), prepared.dropped))
    assert counts == [(3, 0), (2, 1), (1, 2)]


def test_old_turns_go_before_passages_and_the_last_exchange_after_them(tmp_path: Path, store: Store) -> None:
    history = [Message(role="user", content=f"turn{n} " * 20) for n in range(6)]
    (prepared,) = small(tmp_path, store, 240).prepare([query("What is three?", *history)])
    assert len(prepared.passages) == 3
    assert [n for n in range(6) if f"turn{n}" in prepared.rendered] == [2, 3, 4, 5]
    (tight,) = small(tmp_path, store, 130).prepare([query("What is three?", *history)])
    assert len(tight.passages) == 1
    assert [n for n in range(6) if f"turn{n}" in tight.rendered] == [4, 5]


def test_a_question_that_cannot_fit_is_a_failure_and_never_cut(tmp_path: Path, store: Store) -> None:
    (prepared,) = small(tmp_path, store, 100).prepare([query("why " * 90)])
    assert isinstance(prepared.settled, Failure)
    assert prepared.settled.kind == "budget"
    assert "has room for 100" in prepared.settled.message


# ---------------------------------------------------------------- refusals

REFUSALS = [
    "I don't know.",
    "I don’t know",
    "I do not know the answer to this question.",
    "I don't actually know.",
    "I'm sorry, but I don't have enough information to answer that.",
    "I'm sorry, I cannot answer this question based on the provided passages.",
    "Sorry, I could not find this in the passages.",
    "Unfortunately, the passages do not mention the height of the tower.",
    "The provided passages do not contain information about this.",
    "The passage does not specify who built it.",
    "The text doesn't say when it was released.",
    "The given context does not provide the answer.",
    "Based on the passages, there is no information about the price.",
    "According to the passages, it is not specified.",
    "There is not enough information to answer the question.",
    "There is no mention of a second tower.",
    "No information is given.",
    "Not enough information.",
    "The question cannot be answered from the passages.",
    "The answer to this question cannot be determined from the text.",
    "The answer is not in the passages.",
    "The answer is not there.",
    "The answer is not explicitly stated in the text.",
    "None of the passages mention a price.",
    "It is not mentioned in the passages.",
    "Unknown.",
    "The answer is: I don't know.",
    "Answer: not stated.",
    "Based on the passages, I'm sorry, but I cannot find the answer.",
    "Not stated in the passages.",
    "I am unable to answer.",
    "**I don't know.** The passages are about bread.",
    "I don't know, but the passages do not mention it either.",
]

ANSWERS = [
    "The tower is 330 metres tall.",
    "Edge does not support aliases.",
    "No, it is not allowed.",
    "Not more than 200 tokens.",
    "Do not run it twice.",
    "It does not matter which order is used.",
    "The gate exits with 4 when something was not measured.",
    "A release cannot be changed after it was published.",
    "The document does not need a heading.",
    "The index is not found in the store until it has been built.",
    "When no baseline is there, the verdict is null.",
    "You cannot read another tenant's documents.",
    "The verdict is INCONCLUSIVE when there is too little evidence.",
    "Nobody knows the exact date, which is why 1889 is used.",
    "The passages do not mention a height, but the tower was finished in 1889.",
    "I don't know any limit other than the 50 000 chunks of the manual.",
    "It refuses: the system answers 'I don't know.' when nothing was found.",
    "The file must not contain an unknown field. I don't know of an exception.",
    "Unknown parameters are an error.",
    "The answer is 42.",
    "The answer is: it does not.",
    "According to the passages, a document that does not state its tenant is public.",
    "The information is stored in the manifest.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_recognised(text: str) -> None:
    assert detect_abstention(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_hold_a_not_are_no_refusals(text: str) -> None:
    assert not detect_abstention(text)


def test_a_refusal_by_the_model_is_marked_and_cites_nothing(store: Store) -> None:
    shelf = Shelf([passage("I don't know. The passages do not contain the answer.")])
    answer = answered(Answerer(shelf, PROMPT, said(store, "I don't know.")).answer(query("How tall?")))
    assert (answer.abstained, answer.citations) == (True, ())


@given(st.text())
def test_detection_takes_any_text(text: str) -> None:
    assert detect_abstention(text) in {True, False}


# ---------------------------------------------------------------- citations


def test_each_sentence_gets_the_sentence_that_supports_it() -> None:
    passages = [passage(BREAD, "b.md", start=50), passage(TOWER, "a.md", start=7, prefix="Sights > Tower\n\n")]
    found = cite("Gustave Eiffel finished it in 1889. The bread is baked at six every morning. It is purple.", passages)
    assert [(c.document, c.passage, c.quote) for c in found] == [
        ("a.md", 2, "It was finished in 1889 by Gustave Eiffel."),
        ("b.md", 1, BREAD),
    ]
    assert (found[0].start, found[1].start) == (7 + len("The tower is 330 metres tall. "), 50)


def test_a_number_that_the_passage_lacks_is_not_supported() -> None:
    assert cite("The tower is 300 metres tall.", [passage(TOWER)]) == ()
    assert cite("The tower is 330 metres tall.", [passage(TOWER)])


def test_a_mark_names_its_passage() -> None:
    twice = [
        passage(TOWER, "a.md"),
        passage("A copy says the tower is 330 metres tall.", "copy.md"),
        passage(BREAD, "b.md"),
    ]
    assert [c.document for c in cite("The tower is 330 metres tall [2].", twice)] == ["copy.md"]
    assert [c.document for c in cite("The tower is 330 metres tall [1, 2].", twice)] == ["a.md", "copy.md"]
    assert [c.document for c in cite("The tower is 330 metres tall [9].", twice)] == ["a.md"], "no such passage"
    assert [c.document for c in cite("The tower is 330 metres tall [3].", twice)] == ["a.md"], "the mark is wrong"
    assert cite("The tower is 331 metres tall [3].", twice) == (), "a mark alone supports nothing"
    assert cite("[1]", twice) == ()
    # Behind the full stop, as the default model writes it, a mark belongs to the sentence before.
    assert [c.document for c in cite("The tower is 330 metres tall. [2]", twice)] == ["copy.md"]
    assert cite("The tower is 300 metres tall. [3]", twice) == ()
    both = cite("The tower is 330 metres tall. [2] The tower is 330 metres tall. [1]", twice)
    assert [c.document for c in both] == ["copy.md", "a.md"]


@given(
    body=st.text(min_size=1, max_size=300).filter(str.strip),
    before=st.text(max_size=40),
    prefix=st.text(max_size=40),
)
def test_citations_point_at_the_documents_own_text(body: str, before: str, prefix: str) -> None:
    document_text = before + body + " tail"
    passages = [passage(body, start=len(before), prefix=prefix)]
    for start, end in sentence_spans(body):
        for citation in cite(body[start:end], passages):
            assert document_text[citation.start : citation.end] == citation.quote


# ---------------------------------------------------------------- the gold set and the answer store


def cases(*questions: str) -> list[GoldCase]:
    return [GoldCase(id=f"c{n}", question=q, answerable=True) for n, q in enumerate(questions, start=1)]


QUESTIONS = ("How tall is the tower in metres?", "When is bread baked every morning?", "Who reigns?", "What is six?")


def run(answerer: Answerer, store: Store, out: Path, *questions: str) -> tuple[list[CaseAnswer], list[str]]:
    seen: list[str] = []
    done = answer_cases(
        cases(*(questions or QUESTIONS)),
        answerer,
        store,
        out,
        lambda what, n, total: seen.append(f"{what} {n}/{total}"),
    )
    return done, seen


def test_unchanged_cases_are_not_generated_again_and_the_file_is_the_same_bytes(tmp_path: Path, store: Store) -> None:
    shelf, out = Shelf([passage(TOWER), passage(BREAD, "b.md")]), tmp_path / "build" / "answers.jsonl"
    first, seen = run(Answerer(shelf, PROMPT, double(store)), store, out)
    assert seen == ["answers reused 0/4", "answer 3/4", "answer 4/4"]
    data = out.read_bytes()
    again, seen = run(Answerer(shelf, PROMPT, double(store)), store, out)
    assert seen == ["answers reused 4/4"]
    assert [a.reused for a in first + again] == [False] * 4 + [True] * 4
    assert out.read_bytes() == data
    assert [a.case for a in read_answers(out)] == ["c1", "c2", "c3", "c4"]
    assert [a.answer.text for a in read_answers(out) if a.answer] == [answered_text(a) for a in first]
    timings = json.loads((out.parent / "timings.json").read_text())
    assert timings["reused"] == 4
    assert timings["cases"]["c1"]["retrieve_ms"] is not None
    assert '"retrieve_ms": null' in out.read_text().splitlines()[0], "times would change the bytes"
    assert sorted(p.name for p in out.parent.iterdir()) == ["answers.jsonl", "timings.json"]


def answered_text(case: CaseAnswer) -> str:
    assert case.answer is not None
    return case.answer.text


def test_only_what_changed_is_generated_again(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "answers.jsonl"
    engine = said(store, "Bread.")
    shelf = Shelf([passage(TOWER)])
    run(Answerer(shelf, PROMPT, engine), store, out)
    assert len(engine.asked) == 4
    run(Answerer(shelf, PROMPT, engine), store, out, *QUESTIONS, "A fifth?")
    assert len(engine.asked) == 5
    run(Answerer(Shelf([passage(TOWER + " More.")]), PROMPT, engine), store, out)
    assert len(engine.asked) == 9


def test_a_reused_answer_points_at_where_its_passages_lie_now(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "answers.jsonl"
    run(Answerer(Shelf([passage(TOWER, start=0)]), PROMPT, double(store)), store, out)
    moved, _ = run(Answerer(Shelf([passage(TOWER, start=500)]), PROMPT, double(store)), store, out)
    assert moved[0].reused
    assert moved[0].answer is not None
    assert moved[0].answer.citations[0].start == 500


def test_the_order_of_the_cases_changes_no_batch(tmp_path: Path, store: Store) -> None:
    forward, backward = said(store, "a", "b", "c", "d"), said(store, "a", "b", "c", "d")
    Answerer(Shelf([passage(TOWER)]), PROMPT, forward).answer_many([query(q) for q in QUESTIONS])
    Answerer(Shelf([passage(TOWER)]), PROMPT, backward).answer_many([query(q) for q in reversed(QUESTIONS)])
    assert forward.asked == backward.asked


def entries(store: Store) -> list[Path]:
    return sorted(store.root.glob("answers/*/*.json"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-30],
        lambda data: data.replace(b"330 metres", b"990 metres"),
        lambda data: b"[]",
        lambda data: b'{"checksum": 1}',
        lambda data: b"\xff\xfe",
        lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
    ],
)
def test_a_damaged_entry_is_reported_and_generated_again(tmp_path: Path, store: Store, damage: object) -> None:
    out = tmp_path / "answers.jsonl"
    answerer = Answerer(Shelf([passage(TOWER), passage(BREAD, "b.md")]), PROMPT, double(store))
    first, _ = run(answerer, store, out)
    path = store.path("answers", first[0].key[:2], f"{first[0].key}.json")
    whole = path.read_bytes()
    assert callable(damage)
    path.write_bytes(damage(whole))
    again, seen = run(answerer, store, out)
    assert f"answer store: {first[0].key[:12]} is damaged and is generated again 0/1" in seen
    assert "answers reused 3/4" in seen
    assert [answered_text(a) for a in again] == [answered_text(a) for a in first]
    assert path.read_bytes() == whole


def test_an_entry_under_another_key_is_not_trusted(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "answers.jsonl"
    answerer = Answerer(Shelf([passage(TOWER), passage(BREAD, "b.md")]), PROMPT, double(store))
    first, _ = run(answerer, store, out)
    paths = {a.key: store.path("answers", a.key[:2], f"{a.key}.json") for a in first}
    paths[first[0].key].write_bytes(paths[first[1].key].read_bytes())
    again, _ = run(answerer, store, out)
    assert [a.reused for a in again] == [False, True, True, True]
    assert answered_text(again[0]) == answered_text(first[0])


def test_failures_are_lines_and_never_stored(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "answers.jsonl"
    broken = Said(store, [Failure(kind="timeout", message="late"), Generation(text=" "), Generation(text="Bread.")])
    done, _ = run(Answerer(Shelf([passage(TOWER)]), PROMPT, broken), store, out, "One?", "Two?", "Three?")
    kinds = sorted(a.failure.kind if a.failure else "answered" for a in done)
    assert kinds == ["answered", "empty", "timeout"]
    assert len(entries(store)) == 1
    assert len(read_answers(out)) == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), EnvironmentFailure("the disk is full")])
def test_an_interruption_keeps_what_was_finished(tmp_path: Path, store: Store, stop: BaseException) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("the file from before\n")
    interrupted = Answerer(Shelf([passage(TOWER)]), PROMPT, Said(store, stop))
    with pytest.raises(type(stop)):
        run(interrupted, store, out)
    assert out.read_text() == "the file from before\n"
    assert len(entries(store)) == 2
    resumed = said(store, "Bread.")
    done, seen = run(Answerer(Shelf([passage(TOWER)]), PROMPT, resumed), store, out)
    assert "answers reused 2/4" in seen
    assert len(resumed.asked) == 2
    assert sum(a.reused for a in done) == 2


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, store: Store) -> None:
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(EnvironmentFailure, match=r"answers\.jsonl in .* cannot be written: Is a directory"):
        run(Answerer(Shelf([passage(TOWER)]), PROMPT, double(store)), store, tmp_path / "answers.jsonl")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".answers")] == []


def test_a_damaged_answers_file_names_its_line(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "answers.jsonl"
    run(Answerer(Shelf([passage(TOWER)]), PROMPT, double(store)), store, out)
    lines = out.read_text().splitlines()
    out.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    with pytest.raises(UsageError, match="line 2"):
        read_answers(out)
    with pytest.raises(UsageError, match="run `goldgate answer`"):
        read_answers(tmp_path / "absent.jsonl")


# ---------------------------------------------------------------- all parts together


def test_a_built_collection_answers_within_what_its_principal_may_see(tmp_path: Path, store: Store) -> None:
    documents = [
        document("tower.md", TOWER),
        document("bread.md", BREAD),
        document("secret.md", "The secret tower of acme is 990 metres tall.", tenant="acme"),
    ]
    built = index(write_build(tmp_path / "build", documents), IndexParams(), store)
    answerer = open_answerer(
        built,
        EmbedParams(model="hashing"),
        RetrieveParams(top_k=2),
        ROOT / "serving" / "prompts" / "grounded.toml",
        ROOT / "serving" / "models" / "extractive.toml",
        AnswerParams(),
        store,
    )
    question = "How many metres tall is the secret tower?"
    public = answered(answerer.answer(query(question)))
    acme = answered(answerer.answer(query(question, principal=Principal(tenant="acme"))))
    assert public.text == "The tower is 330 metres tall."
    assert {p.document for p in public.passages or ()} == {"tower.md", "bread.md"}
    assert acme.text == "The secret tower of acme is 990 metres tall."
    assert acme.citations[0].document == "secret.md"
    answerer.close()
    answerer.close()


@pytest.mark.engine
def test_the_real_model_answers_from_the_passages(generator: Generator, store: Store, tmp_path: Path) -> None:
    prompt = load_prompt(ROOT / "serving" / "prompts" / "grounded.toml")
    tower = (
        "Sights of Paris > The Eiffel Tower\nThe tower stands on the Champ de Mars and is 330 metres tall. It was "
        "finished in 1889 by the company of Gustave Eiffel, after two years of work by some 300 workers."
    )
    bread = (
        "The bakery in Rue Cler > Opening hours\nBread is baked every morning at six, and the shop opens at seven. On "
        "Mondays it stays closed. Cakes have to be ordered two days ahead by telephone."
    )
    answerer = Answerer(Shelf([passage(tower), passage(bread, "b.md")]), prompt, generator)
    first, _ = run(answerer, store, tmp_path / "answers.jsonl")
    data = (tmp_path / "answers.jsonl").read_bytes()
    assert "330" in answered_text(first[0])
    assert first[0].answer is not None
    assert first[0].answer.citations
    again, seen = run(answerer, store, tmp_path / "answers.jsonl")
    assert seen == ["answers reused 4/4"]
    assert (tmp_path / "answers.jsonl").read_bytes() == data
    assert [answered_text(a) for a in again] == [answered_text(a) for a in first]


def test_records_of_an_answer_are_closed() -> None:
    assert issubclass(Generation, Record)
    with pytest.raises(ValueError, match="extra"):
        Generation.model_validate({"text": "x", "tokens": 1})
