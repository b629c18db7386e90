"""answer text -> does it refuse? Small, deterministic, English."""

from __future__ import annotations

import re

_NOT = r"(?:do not|don't|does not|doesn't|did not|didn't)"
_CANNOT = r"(?:cannot|can't|can not|could not|couldn't|(?:am|was) (?:unable|not able) to)"
_SOURCE = (
    r"(?:(?:the|these|those|your|this|provided|given|retrieved|supplied|above|available|\[?\d+\]?) )*"
    r"(?:passages?|contexts?|texts?|documents?|documentation|sources?|excerpts?|information|knowledge base|handbook)"
    r"(?: (?:provided|given|above|at hand|supplied))?"
)
_TELL = (
    r"(?:contain|include|mention|provide|say|state|specify|give|tell|answer|address|discuss|cover|indicate|explain"
    r"|describe|have)s?"
)
_GIVEN = r"(?:there|given|provided|stated|mentioned|contained|found|available|present|included|specified|known)"

_REFUSALS = tuple(
    re.compile(pattern)
    for pattern in (
        # I do not know, I cannot answer, I do not have enough information
        rf"^i {_NOT} (?:\w+ )?know\b(?! (?:about )?any)",
        rf"\bi {_CANNOT} (?:\w+ly )?(?:answer|find|provide|determine|tell|help|say|locate)\b",
        rf"\bi {_NOT} have (?:enough |any |sufficient |the )?(?:\w+ )?(?:information|knowledge|context|data|access)\b",
        # the passages do not say
        rf"\b{_SOURCE} {_NOT} (?:\w+ly )?{_TELL}\b",
        rf"^none of (?:the |these )?(?:\w+ )?(?:passages|documents|sources|texts) (?:\w+ly )?{_TELL}\b",
        # there is no information
        (
            r"\b(?:there is|there's|there was|i found|i see) (?:no|not enough|insufficient) (?:\w+ )?"
            r"(?:information|answer|mention|evidence|context|data|details?)\b"
        ),
        r"^(?:no|not enough|insufficient) (?:\w+ )?(?:information|context|answer|evidence|data)\b",
        # the question cannot be answered, the answer is not given
        (
            r"\b(?:question|answer)\b.{0,40} (?:cannot|can't|can not|could not) be (?:\w+ )?"
            r"(?:answered|determined|found|given)\b"
        ),
        (
            rf"^(?:the |this )?(?:answer|information)(?: (?:to|about|on|for) .{{1,80}}?)? (?:is|was) (?:not|nowhere)"
            rf" (?:\w+ly )?(?:in the|{_GIVEN})\b"
        ),
        r"^(?:it is|it's|this is) not (?:\w+ly )?(?:mentioned|stated|specified|possible to (?:answer|tell|say))",
        # the bare words
        rf"^(?:unknown|unclear|not (?:\w+ly )?(?:{_GIVEN}|answerable))\W*$",
        rf"^not (?:\w+ly )?{_GIVEN} in (?:the |these )?(?:\w+ )?(?:passages?|text|context|documents?)\b",
    )
)
_APOLOGY = re.compile(r"^(?:i(?:'m| am) (?:\w+ )?sorry|unfortunately|sorry|apologies|i apologi[sz]e)[,.:;]? *(?:but )?")
_LEAD_IN = re.compile(
    r"^(?:(?:based on|according to|from|given) [^,]{1,80}, "
    r"|(?:the )?answer(?: to (?:this|the|your) question)?(?: is)?: )+"
)
_TURN = re.compile(r"\b(?:but|however|although|though|nevertheless)\b,? (?P<rest>.+)")
_SENTENCE = re.compile(r"(?<=[.!?])\s")


def detect_abstention(text: str) -> bool:
    """Whether an answer says that it cannot answer.

    Its first sentence must be such a refusal, and no `but` in it may lead on to an answer after all. A wrong answer,
    and an answer that something is *not* so, is none.
    """
    plain = " ".join(text.replace("’", "'").replace("*", "").lower().split())
    plain = _LEAD_IN.sub("", _APOLOGY.sub("", _LEAD_IN.sub("", plain)))
    first = _SENTENCE.split(plain, maxsplit=1)[0]
    turn = _TURN.search(first)
    if turn is not None and not _refuses(turn["rest"]):
        return False
    return _refuses(first)


def _refuses(sentence: str) -> bool:
    return any(pattern.search(sentence) for pattern in _REFUSALS)
