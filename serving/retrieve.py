"""queries -> passages: embed each question, rank by meaning and by words, keep what its principal may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from goldgate.pipeline.collection import Collection
from goldgate.pipeline.params import RetrieveParams
from goldgate.pipeline.schema import Passage, Query


class QueryEmbedder(Protocol):
    """The part of pipeline.embedder.Embedder that retrieval needs."""

    def embed_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


class Retriever:
    """Hybrid retrieval from one collection. It holds no state of its own: the same queries give the same passages."""

    def __init__(self, collection: Collection, embedder: QueryEmbedder, params: RetrieveParams) -> None:
        """Use `embedder`, which must be the one that made the collection's vectors. Closes neither."""
        self._collection = collection
        self._embedder = embedder
        self.params = params

    def retrieve(self, queries: Sequence[Query]) -> list[list[Passage]]:
        """Return at most `params.top_k` passages per query, best first, each with its similarity.

        Only passages that the query's principal may see are ranked at all. A query may get none. Raises
        EnvironmentFailure when the engine fails.
        """
        if not queries:
            return []
        texts = [search_text(query) for query in queries]
        principals = [query.principal for query in queries]
        return self._collection.query(self._embedder.embed_queries(texts), texts, principals, self.params)


def search_text(query: Query) -> str:
    """Return what is searched for: the question, and the user turn before it if there is one.

    A follow-up ("and on Windows?") means little alone. The question comes first, so that an embedder that cuts long
    texts never cuts it away.
    """
    turns = [message.content for message in query.history if message.role == "user"]
    return "\n".join([query.question, *turns[-1:]])
