"""The local judge: what a fact is, what a refusal is, what a passage supports."""

from __future__ import annotations

import string
import textwrap
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from goldgate.evals.judge import (
    Similarity,
    agreement,
    code_digest,
    contains_fact,
    correctness,
    is_abstention,
    refuses_and_answers,
    relevance,
    sentences,
    split_claims,
    supports,
)
from goldgate.pipeline.embedder import Embedder

# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("It needs 1,000 documents.", "1000"),
        ("It needs 1000 documents.", "1,000 documents"),
        ("Two million rows.", "2,000,000"),
        ("$5 million was spent", "5 million dollars"),
        ("It waits 500ms.", "500 ms"),
        ("It waits 12.5 seconds.", "12.5 s"),
        ("five percent", "5%"),
        ("at 05 minutes", "5 minutes"),
        ("5 per cent of it", "5 percent"),
        ("There are twenty-five of them", "25"),
        ("released on March 3rd, 2018", "2018-03-03"),
        ("released on 3 March 2018", "March 2018"),
        ("released on 2018-03-03", "2018"),
        ("in the 16th century", "sixteenth century|16th century"),
        ("Exit code is 5.", "exit code 5"),
        ("The start was a release on 3 March 2018", "release start 2018"),
        ("FAIL is 1 and PASS is 0.", "PASS is 0"),
        ("FAIL is 1 and PASS is 0.", "FAIL is 1"),
        ("A margin of 5 points is the default.", "default margin 5 points"),
        ("The exit code of FAIL is 1", "exit code 1"),
        ("Wilhelm Conrad Röntgen won", "wilhelm rontgen"),
        ("Keeley Hawes plays her", "Keeley Clare Julia Hawes"),
        ("by J. K. Rowling", "J.K. Rowling"),
        ("The documents are stored", "document"),
        ("the gate's margins", "gate margin"),
        ("use `golden/gate.toml`", "golden/gate.toml"),
        ("set top_k to 4", "top_k"),
        ("version v2.1 is out", "2.1"),
        ("World War II ended", "World War 2"),
        ("It is not supported.", "not supported"),
        ("It isn't only fast, it is safe", "safe"),
        ("either red or blue", "green|blue"),
        ("The U.S. won", "USA"),
        ("-5 degrees", "-5"),
        ("between 5 and 10 items", "between 5 and 10"),
    ],
)
def test_facts_that_are_said(text: str, fact: str) -> None:
    assert contains_fact(text, fact)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("It needs 15 documents.", "5"),
        ("version 5.2 is out", "5"),
        ("version 5.2 is out", "2"),
        ("version 2.10", "2.1"),
        ("version 2.1", "2.10"),
        ("sha256 is used", "256"),
        ("1,000 documents", "100"),
        ("5,000 documents", "5"),
        ("-5 degrees", "5"),
        ("5 MB", "5 GB"),
        ("500 ms", "500 s"),
        ("5% of it", "50%"),
        ("on 4 March 2018", "3 March 2018"),
        ("in March 2018", "3 March 2018"),
        ("in 2018", "March 2018"),
        ("in the 5th century", "5"),
        ("It is not supported.", "supported"),
        ("It never stops", "stops"),
        ("without a network", "network"),
        ("It is supported.", "not supported"),
        ("exit code 3 and 5 retries", "exit code 5"),
        ("write only access", "read only access"),
        ("Keeley Smith plays her", "Keeley Hawes"),
        ("one of the reasons", "1"),
        ("the category", "cat"),
        ("", "5"),
        ("anything", "|"),
        ("It has 5 tiers and 7 metrics.", "7 tiers"),
        ("FAIL is 1 and PASS is 0.", "PASS is 1"),
        ("FAIL is 1 and PASS is 0.", "FAIL is 0"),
    ],
)
def test_facts_that_are_not_said(text: str, fact: str) -> None:
    assert not contains_fact(text, fact)


def test_words_of_the_question_need_not_be_repeated() -> None:
    assert contains_fact("It is 5 points.", "default margin 5 points", "What is the default margin?")
    assert not contains_fact("It is 3 points.", "default margin 5 points", "What is the default margin?")


NUMBERS = st.integers(0, 10**7)
WORD = st.text(string.ascii_lowercase, min_size=4, max_size=9)


@given(first=NUMBERS, second=NUMBERS)
def test_a_number_is_said_only_by_itself(first: int, second: int) -> None:
    assert contains_fact(f"It takes {first:,} rows.", str(second)) == (first == second)


@given(whole=st.integers(0, 99), part=st.integers(0, 99), fact=st.integers(0, 99))
def test_a_whole_number_is_never_in_a_decimal(whole: int, part: int, fact: int) -> None:
    assert not contains_fact(f"It is {whole}.{part} today", str(fact))


@given(
    words=st.lists(WORD, min_size=1, max_size=5), before=st.lists(WORD, max_size=4), after=st.lists(WORD, max_size=4)
)
def test_what_stands_there_word_for_word_is_said(words: list[str], before: list[str], after: list[str]) -> None:
    assume(not {"without", "never", "neither", "cannot", "unlike", "isnt", "dont", "wont", "cant"} & {*before, *words})
    assert contains_fact(" ".join([*before, *words, *after]).upper(), " ".join(words))


PIECES = (
    "gate",
    "codes",
    "5",
    "7",
    "1,000",
    "3 March 2018",
    "2018-03-03",
    "$",
    "%",
    "not",
    "the",
    "of",
    ".",
    "?",
    "\n",
)
PIECE = st.sampled_from((*PIECES, "Keeley", "Hawes", "II", "v2.1", "-5", "12.5ms", "million", "first", "one"))
PHRASE = st.lists(PIECE, max_size=12).map(" ".join)


@given(text=st.text(max_size=200) | PHRASE, fact=st.text(max_size=60) | PHRASE, question=st.text(max_size=60) | PHRASE)
def test_the_judge_never_raises_and_stays_in_range(text: str, fact: str, question: str) -> None:
    assert 0 <= agreement(text, fact, question) <= 1
    assert contains_fact(text, fact, question) in {True, False}
    assert is_abstention(text) in {True, False}
    for claim in split_claims(text):
        assert 0 <= supports(claim, [fact, question]).share <= 1


def test_graded_agreement() -> None:
    expected = "The margin is 5 points and the floor is 0.8"
    assert agreement("The floor is 0.8; the margin is 5 points.", expected) == 1
    assert agreement("The margin is 5 points and the floor is 0.7", expected) == 0
    partly = agreement("Promotion needs a signature from the operator", "A signed verdict and the operator's approval")
    assert 0 < partly < 1


def test_correctness() -> None:
    assert correctness("FAIL is 1, PASS is 0.", ("FAIL is 1", "PASS is 0"), None) == (1, ())
    assert correctness("FAIL is 1.", ("FAIL is 1", "INCONCLUSIVE"), None) == (0.5, ("INCONCLUSIVE",))
    assert correctness("I don't know.", ("know",), None)[0] == 0  # an abstention is not right by accident
    assert correctness("3 points", (), "5 points") == (0, ("5 points",))
    with pytest.raises(ValueError, match="must_say or an expected answer"):
        correctness("x", (), None)


# ---------------------------------------------------------------- abstention


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I do not know the answer to that question.",
        "I’m sorry, but I cannot find that in the provided documents.",
        "The passages do not mention a refund policy.",
        "The documents don't specify this. Please contact support.",
        "There is not enough information in the context to answer this question.",
        "Unfortunately, the answer is not provided in the context. Is there anything else?",
        "I do not have specific information.",
        "This question cannot be answered from the documents.",
        "The refund policy is not mentioned.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_abstention(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The margin is 5 points.",
        "I don't know. But it is 5 points.",
        "I don't know the exact date, but the release came out in March 2018.",
        "The gate does not provide a default floor; set one in gate.toml.",
        "A crashed metric is not provided with a score.",
        "No.",
        "You cannot promote a release without a verdict.",
        "The key is not included in the release, it is read from the environment.",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_abstention(text)


def test_refusing_and_answering_at_once() -> None:
    assert refuses_and_answers("I don't know. It is 5 points.")
    assert not refuses_and_answers("I don't know.")
    assert not refuses_and_answers("It is 5 points.")


# ---------------------------------------------------------------- claims


def test_sentences_keep_abbreviations_and_initials_together() -> None:
    assert sentences("Dr. Smith met J. K. Rowling, e.g. at noon. It is 3.5 km. Is it?\n- One\n- Two") == [
        "Dr. Smith met J. K. Rowling, e.g. at noon.", "It is 3.5 km.", "Is it?", "- One", "- Two",
    ]  # fmt: skip


def test_claims_leave_out_what_asserts_nothing() -> None:
    text = "Here is the list:\n- **FAIL** is 1 [1].\n- PASS is 0.\nWould you like more? Please let me know."
    assert split_claims(text) == ["FAIL is 1.", "PASS is 0."]
    assert split_claims("I don't know.") == []


PASSAGE = (
    "The gate compares a candidate with production on any date. The default margin is 5 points. A verdict is signed."
)


@pytest.mark.parametrize(
    ("claim", "supported"),
    [
        ("The default margin is 5 points.", True),
        ("By default the margin is five points.", True),
        ("The default margin is 3 points.", False),
        ("The default margin is not 5 points.", False),
        ("Rome was founded by Romulus.", False),
        ("The candidate was compared on 3 March 2018.", False),
        ("The default margin of 5 points was invented by Napoleon in Paris.", False),
    ],
)
def test_support(claim: str, supported: bool) -> None:
    assert supports(claim, ["Something else.", PASSAGE]).supported == supported


def test_nothing_supports_without_passages() -> None:
    assert supports("The margin is 5.", []).supported is False
    assert supports("The margin is 5.", [""]).supported is False


# ---------------------------------------------------------------- meaning


def test_similarity_embeds_each_text_once_and_repeats(hashing: Embedder) -> None:
    first, second = Similarity(hashing), Similarity(hashing)
    second.prefetch(["the gate decides", "a gate decides", "other text"])
    assert first.cosine("the gate decides", "a gate decides") == second.cosine("the gate decides", "a gate decides")
    assert first.cosine("the gate", "the gate") == 1
    long = "gate " * 5000
    assert first.cosine(long, long) == 1  # longer than the model can see


def test_relevance_is_between_zero_and_one(hashing: Embedder) -> None:
    similarity = Similarity(hashing)
    same, other = relevance("the gate", "the gate", similarity), relevance("the gate", "blue whales sing", similarity)
    assert 0 <= other < 0.5 < same <= 1


@pytest.mark.engine
def test_relevance_with_the_real_model(minilm: Embedder) -> None:
    similarity = Similarity(minilm)
    question = "What is the default margin of the gate?"
    assert relevance(question, PASSAGE, similarity) > 0.5
    assert relevance(question, "Blue whales sing at low frequencies to find each other.", similarity) < 0.1


# ---------------------------------------------------------------- identity


def test_code_digest_ignores_comments_and_sees_code(tmp_path: Path) -> None:
    def digest(source: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(textwrap.dedent(source))
        return code_digest(path)

    plain = digest("LIMIT = 5\ndef f():\n    return LIMIT\n")
    assert digest('"""Doc."""\nLIMIT = 5  # why\n\n\ndef f():\n    """Doc."""\n    return LIMIT\n') == plain
    assert digest("LIMIT = 6\ndef f():\n    return LIMIT\n") != plain
