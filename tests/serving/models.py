"""Small model folders and model files for tests of the answer path: real formats, no weights worth running."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from goldgate.pipeline.params import AnswerParams, RetrieveParams
from goldgate.pipeline.schema import Passage, Query
from goldgate.pipeline.store import Store
from goldgate.serving.generate import Generator, load_generator
from goldgate.serving.model import ModelSpec, build_model

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer() -> Tokenizer:
    """A real tokenizer in which every word is the same token, so that lengths can be counted by hand."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer


def model_folder(folder: Path) -> Path:
    """A folder that looks like a model: real safetensors, tokenizer and chat template."""
    folder.mkdir(parents=True)
    save_file({"weight": np.arange(4096, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_model_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def double(store: Store, **changes: object) -> Generator:
    """The extractive double, as a caller gets it."""
    spec = ModelSpec.model_validate({"name": "extractive", "kind": "extractive", **changes})
    return load_generator(build_model(spec, store), AnswerParams(batch=3))


def passage(text: str, document: str = "a.md", start: int = 0, prefix: str = "", **fields: object) -> Passage:
    """A passage whose own text lies at `start` of its document, behind a heading path."""
    return Passage.model_validate(
        {
            "chunk": f"{document}:{start}",
            "document": document,
            "start": start,
            "end": start + len(text),
            "text": prefix + text,
            "score": 1.0,
            **fields,
        }
    )


class Shelf:
    """A retriever that finds the same passages for every question and counts its calls."""

    def __init__(self, passages: Sequence[Passage], min_similarity: float = 0.0) -> None:
        self.passages = list(passages)
        self.params = RetrieveParams(min_similarity=min_similarity)
        self.queries: list[Query] = []

    def retrieve(self, queries: Sequence[Query]) -> list[list[Passage]]:
        self.queries.extend(queries)
        return [list(self.passages) for _ in queries]
