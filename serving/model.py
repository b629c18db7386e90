"""model file -> Model: weights in the store under their content address, converted once.

A model is a TOML file in serving/models/. The folder `models/<weights>` of the store is named by what goes into the
conversion (source files, adapter and converter versions), so that it is known before anything is converted;
`files.json` in it holds the SHA-256 and size of every file that came out, and every load compares them.

An adapter is merged into the weights: the engine serves one plain model. The model file pins the adapter's content, so
that the file alone says what is served, and a release that holds the file needs no copy of the adapter.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.params import load_toml
from goldgate.pipeline.schema import FORMAT_VERSION, Record
from goldgate.pipeline.store import Store, digest_file, digest_json

Progress = Callable[[str, int, int], None]

CONVERTERS = ("transformers", "gguf", "torch", "safetensors", "tokenizers")
"""Packages whose version can change the converted files."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment in which the libraries of model files call nobody."""

FILES = "files.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TAKEN = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # what a ready folder is made of
_ENVIRONMENT_NAME = re.compile(r"^[A-Z][A-Z0-9_]*$")


class NgramSpeculation(Record):
    """[engine.speculation]: propose tokens that followed the same words in the prompt."""

    tokens: int = Field(4, ge=1, le=16, description="Tokens proposed at a time.")
    lookup_max: int = Field(4, ge=1, description="Longest run of words looked up.")
    lookup_min: int = Field(2, ge=1, description="Shortest run of words looked up.")


class Engine(Record):
    """[engine]: what the engine is started with. All of it is part of the model's identity."""

    max_model_len: int = Field(2048, ge=64, description="Prompt and answer together, in tokens.")
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    block_size: int = Field(32, ge=8, description="Only full blocks of this many tokens are prefix-cached.")
    enforce_eager: bool = Field(True, description="False compiles first: a slower start, faster tokens.")
    prefix_caching: bool = True
    max_batched_tokens: int | None = Field(
        None, ge=64, description="Tokens of one engine step; None: the engine's own."
    )
    kv_cache_gib: int = Field(1, ge=1, description="Memory of the key-value cache on a CPU.")
    speculation: NgramSpeculation | None = None
    options: dict[str, str | int | float | bool] = Field(
        {}, description="Further engine arguments, passed on as they are."
    )


class Sampling(Record):
    """[sampling]. Temperature 0 is greedy: the gate needs the same answer again."""

    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(96, ge=1, description="Longest answer, in tokens.")
    stop: tuple[str, ...] = Field((), description="Strings that end the answer.")
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    logit_bias: dict[str, float] = Field(
        {}, description="Token id -> what is added to its logit at every step, as in the OpenAI protocol."
    )
    seed: int = 0

    @field_validator("logit_bias")
    @classmethod
    def _known_range(cls, found: dict[str, float]) -> dict[str, float]:
        for token, bias in found.items():
            if not (token.isascii() and token.isdigit() and -100 <= bias <= 100):
                raise ValueError(f"{token} = {bias} is not a token id with a bias of -100 to 100")
        return found


class ModelSpec(Record):
    """A file in serving/models/."""

    format_version: int = FORMAT_VERSION
    name: str = Field(min_length=1, description="Shown to people and to OpenAI clients.")
    kind: Literal["vllm", "openai", "extractive"] = Field(
        description="vLLM, an OpenAI-compatible endpoint, or the double."
    )
    source: str = Field(
        "", description="vllm: a package with one GGUF file, or a folder (safetensors or one GGUF file)."
    )
    adapter: str = Field("", description="vllm: a LoRA adapter in PEFT's format, a folder beside this file.")
    adapter_digest: str = Field("", description="The adapter's content; a wrong one is refused with the right one.")
    engine: Engine = Engine()
    sampling: Sampling = Sampling()
    url_env: str = Field("", description="openai: the environment variable that holds the base URL.")
    key_env: str = Field("", description="openai: the environment variable that holds the key; empty: no key.")
    model: str = Field("", description="openai: the model's name at the endpoint.")
    retries: int = Field(2, ge=0, le=5, description="openai: tries after the first on 429, 5xx, time-out and refusal.")

    _folder: Path = PrivateAttr(Path())
    """Where the file lies: an adapter lies beside it. Set on loading, no part of the identity."""

    @model_validator(mode="after")
    def _complete(self) -> ModelSpec:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is newer than this goldgate ({FORMAT_VERSION})")
        if self.adapter and self.kind != "vllm":
            raise ValueError("adapter is merged into weights, so it is for kind vllm only")
        if bool(self.adapter) != bool(self.adapter_digest):
            raise ValueError("adapter and adapter_digest belong together")
        if (self.kind == "vllm") != bool(self.source):
            raise ValueError("source is needed for kind vllm, and for that kind only")
        if self.kind == "openai":
            for name, value in (("url_env", self.url_env), ("key_env", self.key_env or "UNSET")):
                if not _ENVIRONMENT_NAME.match(value):
                    raise ValueError(f"{name} must be the name of an environment variable, like GOLDGATE_LLM_URL")
            if not self.model:
                raise ValueError("model is needed for kind openai: the model's name at the endpoint")
        if self.sampling.max_tokens >= self.engine.max_model_len:
            raise ValueError("sampling.max_tokens must be smaller than engine.max_model_len")
        return self


class StoredFile(Record):
    """One line of files.json."""

    bytes: int = Field(ge=0)
    sha256: str


class Model(Record):
    """A model that is ready to load."""

    digest: str = Field(description="Content address of the files and everything in the model file.")
    weights: str = Field("", description="Name of the folder models/<weights> in the store; empty: none needed.")
    files: dict[str, StoredFile] = Field({}, description="The files in it.")
    spec: ModelSpec
    path: Path | None = Field(None, exclude=True, description="That folder on this machine; never written to a file.")


def load_model_spec(path: Path) -> ModelSpec:
    """Read a model file. Raises UsageError naming the file and the field."""
    spec = load_toml(path, ModelSpec)
    spec._folder = path.parent
    return spec


def build_model(spec: ModelSpec, store: Store, progress: Progress | None = None) -> Model:
    """Return `spec` with its weights in the store, converted if they are not there yet, and verified.

    Raises UsageError for a source that is no model (or a damaged one that the user gave) and EnvironmentFailure for a
    missing or damaged package and for files in the store that changed since they were published.
    """
    if spec.kind != "vllm":
        return Model(digest=digest_json({"spec": _identity(spec)}), spec=spec)
    source = _find_source(spec.source)
    weights = _weights_digest(source, spec.adapter_digest)
    if not store.has("models", weights):
        with store.lock("model", wait_s=600):
            _report(progress, f"convert {spec.name}", 0, 1)
            adapter = _find_adapter(spec) if spec.adapter else None
            store.publish("models", weights, lambda folder: _fill(source, adapter, folder))
            _report(progress, f"convert {spec.name}", 1, 1)
    path = store.path("models", weights)
    files = verify_files(path)
    content = {"spec": _identity(spec), "files": {name: file.sha256 for name, file in files.items()}}
    return Model(digest=digest_json(content), weights=weights, files=files, spec=spec, path=path)


def _identity(spec: ModelSpec) -> dict[str, Any]:
    """Return what the digest covers. Fields that came later count where they are set: a model that was released before
    them keeps its digest, and can still be served."""
    found = spec.model_dump(mode="json")
    if not spec.adapter_digest:
        del found["adapter_digest"]
    if not spec.sampling.logit_bias:
        del found["sampling"]["logit_bias"]
    return found


def verify_files(folder: Path) -> dict[str, StoredFile]:
    """Compare every file of a published model with its recorded size and SHA-256 (about 0.2 s for this model).

    Raises EnvironmentFailure naming the first file that differs.
    """
    again = f"delete the folder {folder} and run `goldgate model`: it is made again from its source"
    try:
        recorded = json.loads((folder / FILES).read_text(encoding="utf-8"))
        files = {name: StoredFile.model_validate(entry) for name, entry in recorded["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise EnvironmentFailure(
            f"model manifest {folder / FILES} cannot be read ({type(error).__name__})", "", again
        ) from None
    for name, file in files.items():
        try:
            found = (folder / name).stat().st_size
            if found == file.bytes and digest_file(folder / name) == file.sha256:
                continue
        except OSError:
            found = 0
        what = f"has {found} bytes" if found != file.bytes else "has other content"
        raise EnvironmentFailure(f"model file {folder / name} {what}", f"{file.bytes} bytes as published", again)
    return files


# ---------------------------------------------------------------- sources


class _Source(Record):
    """Where weights come from: one GGUF file, or a folder of safetensors."""

    gguf: Path | None = None
    folder: Path
    package: bool


def _find_source(source: str) -> _Source:
    if Path(source).is_dir():
        return _inspect(Path(source), package=False)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source):
        raise UsageError(f"model source {source} is not a folder", "a folder or the name of an installed package")
    found = importlib.util.find_spec(source.replace("-", "_"))
    if found is None or found.origin is None:
        raise EnvironmentFailure(
            f"the package {source}, which carries the model's weights, is not installed",
            "",
            "install goldgate[cpu] or goldgate[gpu], or name a folder in `source` of the model file",
        )
    return _inspect(Path(found.origin).parent, package=True)


def _inspect(folder: Path, package: bool) -> _Source:
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) == 1:
        return _Source(gguf=gguf[0], folder=folder, package=package)
    needed = ("config.json", "tokenizer.json")
    if not gguf and any(folder.glob("*.safetensors")) and all((folder / name).is_file() for name in needed):
        return _Source(folder=folder, package=package)
    raise UsageError(
        f"{folder} holds no model that can be loaded",
        "one .gguf file, or .safetensors with config.json and tokenizer.json",
    )


def _taken(folder: Path) -> list[Path]:
    return sorted(
        {path for pattern in _TAKEN for path in folder.glob(pattern) if path.is_file() and path.name != FILES}
    )


def _weights_digest(source: _Source, adapter: str) -> str:
    """Content address of the conversion: known before it runs."""
    try:
        made_of: dict[str, Any]
        if source.gguf is not None:
            made_of = {"gguf": digest_file(source.gguf)}
        else:
            made_of = {"folder": {path.name: digest_file(path) for path in _taken(source.folder)}}
        if source.gguf is not None or adapter:
            versions = {name: importlib.metadata.version(name) for name in CONVERTERS}
            made_of |= {"converters": versions, "dtype": "bfloat16"}
        return digest_json(made_of | ({"adapter": adapter} if adapter else {}))
    except OSError as error:
        raise UsageError(f"model source {error.filename} cannot be read: {error.strerror}") from None
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFailure(f"the package {error.name} is not installed", "", "install goldgate[cpu]") from None


def adapter_digest(folder: Path) -> str:
    """Return the content address of an adapter folder. Raises UsageError naming the file that cannot be read."""
    try:
        return digest_json({name: digest_file(folder / name) for name in ADAPTER_FILES})
    except OSError as error:
        raise UsageError(
            f"adapter file {error.filename} cannot be read: {error.strerror}",
            " and ".join(ADAPTER_FILES),
            "restore the folder beside the model file",
        ) from None


def _find_adapter(spec: ModelSpec) -> Path:
    folder = spec._folder / spec.adapter
    found = adapter_digest(folder)
    if found != spec.adapter_digest:
        raise UsageError(
            f"adapter {folder} is not the one that the model file {spec.name} names ({spec.adapter_digest[:12]})",
            "unchanged files",
            f'restore them, or write adapter_digest = "{found}" after a review',
        )
    return folder


def _fill(source: _Source, adapter: Path | None, folder: Path) -> None:
    try:
        if source.gguf is not None or adapter is not None:
            _convert(source, adapter, folder)
        else:
            for path in _taken(source.folder):
                shutil.copyfile(path, folder / path.name)
        _check_loadable(folder)
    except (UsageError, EnvironmentFailure):
        raise
    except OSError as error:
        # The store turns a full disk into its own message; a file that cannot be parsed has no errno.
        if error.errno is not None:
            raise
        raise _damaged(source, error) from error
    except Exception as error:  # the converters raise whatever they stumble over in a damaged file
        raise _damaged(source, error) from error
    files = {path.name: StoredFile(bytes=path.stat().st_size, sha256=digest_file(path)) for path in _taken(folder)}
    record = {"format_version": FORMAT_VERSION, "files": {name: file.model_dump() for name, file in files.items()}}
    (folder / FILES).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _damaged(source: _Source, error: Exception) -> UsageError | EnvironmentFailure:
    name = source.gguf or source.folder
    what = f"model weights {name} are damaged or truncated: {type(error).__name__}: {str(error)[:200]}"
    if source.package:
        return EnvironmentFailure(what, "", "install the package again, nothing was stored")
    return UsageError(what, "a complete model", "copy it again, nothing was stored")


def _convert(source: _Source, adapter: Path | None, folder: Path) -> None:
    """Write bfloat16 safetensors, dequantised and with the adapter merged in, tokenizer (chat template included) and
    generation config."""
    with environment({**OFFLINE, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}):
        import torch
        import transformers

        where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.folder), "local_files_only": True}
        options: dict[str, Any] = {"dtype": torch.float32}
        if source.gguf is not None:
            where["gguf_file"] = source.gguf.name
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, **options)
        if adapter is not None:
            from goldgate.serving.training.lora import merge_adapter

            merge_adapter(model, adapter)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_loadable(folder: Path) -> None:
    """Open every weights file: the header says how long it must be, so a truncated one is seen here."""
    from safetensors import safe_open

    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError("no .safetensors file came out")
    for path in weights:
        with safe_open(path, framework="numpy") as tensors:
            if not list(tensors.keys()):
                raise ValueError(f"{path.name} holds no tensors")
    for name in ("config.json", "tokenizer.json"):
        json.loads((folder / name).read_text(encoding="utf-8"))


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; afterwards the environment is as before, whatever was changed meanwhile.

    What a library writes to stdout meanwhile goes to stderr: stdout belongs to results.
    """
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
