"""question -> streamed answer with sources, from a running deployment or in this process."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from goldgate.console import Reporter, note, out
from goldgate.pipeline.errors import EnvironmentFailure, Refused
from goldgate.pipeline.schema import Answer, Failure, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.workspace import Workspace, open_candidate, open_release

if TYPE_CHECKING:
    from goldgate.serving.answer import Answerer


def ask_question(
    ws: Workspace, question: str, principal: Principal, *, url: str = "", candidate: bool = False, as_json: bool = False
) -> Answer:
    """Answer on stdout as it is generated, then print the sources and the time to first token.

    Raises Refused when nothing is live, EnvironmentFailure when no answer came.
    """
    query = Query(question=question, principal=principal)
    if url:
        from goldgate.serving.deploy import ask_http

        return show_stream(ask_http(url, query.question, query.principal), as_json=as_json)
    store = ws.store()
    opened = open_candidate(ws, store) if candidate else _open_live(ws, store)
    with contextlib.ExitStack() as stack:
        with Reporter() as progress:
            progress("loading the model", 0, 0)
            answerer = stack.enter_context(opened)
        return show_stream(answerer.stream(query), as_json=as_json)


def _open_live(ws: Workspace, store: Store) -> contextlib.AbstractContextManager[Answerer]:
    from goldgate.serving.release import production

    live = production(store, ws.application)
    if live is None:
        raise Refused("nothing is live", "a promoted release", "promote one, or run goldgate ask --candidate")
    return open_release(store, live)


def show_stream(pieces: Iterator[str | Answer | object], *, as_json: bool = False) -> Answer:
    """Print pieces of text as they come; the last piece is the Answer. Returns it."""
    started = time.monotonic()
    first_ms: float | None = None
    final: Answer | None = None
    for piece in pieces:
        if isinstance(piece, Answer):
            final = piece
        elif isinstance(piece, str):
            if first_ms is None:
                first_ms = (time.monotonic() - started) * 1000
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        else:
            if first_ms is not None and not as_json:
                out("")  # the answer broke off within a line
            why = f"{piece.message} ({piece.kind})" if isinstance(piece, Failure) else piece
            raise EnvironmentFailure(f"no answer: {why}", "an answer", "run goldgate doctor")
    if final is None:
        raise EnvironmentFailure("the stream ended before the answer was complete", "a whole answer")
    if as_json:
        out(final.model_dump_json(indent=1))
    else:
        _show_sources(final, first_ms)
    return final


def _show_sources(answer: Answer, first_ms: float | None) -> None:
    out("")
    seen = set()
    for citation in answer.citations:
        where = (citation.document, citation.start, citation.end)
        if where not in seen:
            seen.add(where)
            out(f"  source [{citation.passage}]: {citation.document}, characters {citation.start}-{citation.end}")
    if not answer.citations:
        out("  source: none of the passages supports this answer" if not answer.abstained else "  (refused: no source)")
    first = f"first token after {first_ms:.0f} ms" if first_ms is not None else "no token was generated"
    note(f"{first}; release {answer.release[:12] or 'none'}")
