"""What the whole test run shares: one load per model, one Serve start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything is imported that would read them: nothing here calls out.
os.environ.update(
    DEEPEVAL_TELEMETRY_OPT_OUT="YES", DEEPEVAL_DISABLE_DOTENV="1", RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DVC_NO_ANALYTICS="1",
)  # fmt: skip

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from goldgate.pipeline.params import AnswerParams, EmbedParams
from goldgate.pipeline.store import Store

if TYPE_CHECKING:
    from goldgate.pipeline.embedder import Embedder
    from goldgate.serving.generate import Generator
    from tests.serving.serve_fixture import Deployment

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real corpora and labels, read in place."""
    if not DATA.is_dir():
        pytest.skip("the shared data folder (../shared/data) is not here")
    return DATA


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store.open(tmp_path / "store")


@pytest.fixture(scope="session")
def session_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that the whole run shares, for the converted model."""
    return Store.open(tmp_path_factory.mktemp("session") / "store")


@pytest.fixture(scope="session")
def hashing() -> Embedder:
    """The shipped double of the embedder."""
    from goldgate.pipeline.embedder import load_embedder

    return load_embedder(EmbedParams(model="hashing"))


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    """The real embedder, loaded once."""
    from goldgate.pipeline.embedder import load_embedder

    return load_embedder(EmbedParams(), dtype="float32")


@pytest.fixture(scope="session")
def generator(session_store: Store) -> Iterator[Generator]:
    """The real model on vLLM in this process, loaded once."""
    from goldgate.serving.generate import load_generator
    from goldgate.serving.model import build_model, load_model_spec

    path = ROOT / "serving" / "models" / "smollm2-135m-grounded.toml"
    model = build_model(load_model_spec(path), session_store, None)
    loaded = load_generator(model, AnswerParams())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def deployment(session_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The real model on Ray Serve and vLLM: the one Serve start with an engine of the whole run."""
    from tests.serving.serve_fixture import deployment_of_the_real_model

    with deployment_of_the_real_model(session_store, tmp_path_factory.mktemp("deployment")) as running:
        yield running
