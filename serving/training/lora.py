"""The adapter: low-rank layers for training, the PEFT file format, and merging into plain weights.

A file pair as the package peft writes it (`adapter_config.json`, `adapter_model.safetensors`), so that other tools load
it; peft itself is not needed. W' = W + alpha / rank * B A, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import parse_record
from goldgate.pipeline.schema import Record
from goldgate.serving.model import ADAPTER_FILES

CONFIG, WEIGHTS = ADAPTER_FILES
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


class AdapterConfig(Record):
    """adapter_config.json, the fields that decide what the weights mean."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: str = "CAUSAL_LM"
    base_model_name_or_path: str = ""
    r: int = Field(16, ge=1, le=256, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="The product of the two matrices is scaled by lora_alpha / r.")
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    target_modules: tuple[str, ...] = TARGETS


class LoraLinear(torch.nn.Module):  # type: ignore[misc]
    """A frozen linear layer with a trainable low-rank part beside it. Shapes as torch.nn.Linear's."""

    def __init__(self, base: torch.nn.Linear, config: AdapterConfig) -> None:
        """Start with B = 0, so that nothing changes before the first step."""
        super().__init__()
        self.base = base
        self.scale = config.lora_alpha / config.r
        self.lora_A = torch.nn.Parameter(torch.empty(config.r, base.in_features, dtype=torch.float32))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, config.r, dtype=torch.float32))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        low = torch.nn.functional.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + torch.nn.functional.linear(low, (self.lora_B * self.scale).to(x.dtype))


def add_adapter(model: torch.nn.Module, config: AdapterConfig) -> dict[str, torch.nn.Parameter]:
    """Freeze `model`, put a LoraLinear in place of every target layer, return the trainable parameters by name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trainable: dict[str, torch.nn.Parameter] = {}
    for name, parent, child in list(_targets(model, config)):
        layer = LoraLinear(getattr(parent, child), config)
        setattr(parent, child, layer)
        trainable[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        trainable[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    if not trainable:
        raise UsageError("the model has none of the adapter's target layers", ", ".join(config.target_modules))
    return trainable


def _targets(model: torch.nn.Module, config: AdapterConfig) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for name, module in model.named_modules():
        parent_name, _, child = name.rpartition(".")
        if child in config.target_modules and isinstance(module, torch.nn.Linear):
            yield name, model.get_submodule(parent_name), child


def save_adapter(folder: Path, trainable: dict[str, torch.nn.Parameter], config: AdapterConfig) -> None:
    """Write the two files, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in trainable.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Read an adapter. Raises UsageError naming the file that is absent, damaged or of another kind."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = {name: value for name, value in raw.items() if name in AdapterConfig.model_fields}
        tensors = load_file(folder / WEIGHTS)
    except OSError as error:
        what = f"adapter file {error.filename} cannot be read: {error.strerror}"
        raise UsageError(what, f"{CONFIG} and {WEIGHTS}") from None
    except (ValueError, AttributeError, SafetensorError) as error:
        raise UsageError(f"adapter {folder} is damaged: {str(error)[:200]}", f"{CONFIG} and {WEIGHTS}") from None
    return parse_record(known, AdapterConfig, str(folder / CONFIG)), tensors


def fill_adapter(trainable: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Give the trainable parameters the values of an adapter. Raises UsageError unless names and shapes agree."""
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in trainable.items()}:
        raise UsageError("the adapter to go on from does not fit", "the same base, rank and target layers")
    with torch.no_grad():
        for name, value in tensors.items():
            trainable[name].copy_(value)


def merge_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Add the adapter to the weights of `model` (float32), in place.

    Raises UsageError when a tensor has no layer, a layer lacks its other half, or shapes do not fit.
    """
    config, tensors = load_adapter(folder)
    scale = config.lora_alpha / config.r
    names = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    if not names:
        raise UsageError(f"adapter {folder} holds no weights")
    for name in sorted(names):
        a, b = (tensors.get(f"{_PREFIX}{name}.lora_{half}.weight") for half in "AB")
        try:
            weight = model.get_submodule(name).weight
        except AttributeError:
            raise UsageError(f"adapter {folder} is for another model: {name} is not in this one") from None
        if a is None or b is None or (b.shape[0], a.shape[1]) != tuple(weight.shape) or b.shape[1] != a.shape[0]:
            raise UsageError(f"adapter {folder} does not fit: {name} has the shape {tuple(weight.shape)}")
        weight.data += scale * (b.float() @ a.float()).to(weight.dtype)
