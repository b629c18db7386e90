"""packs -> adapter: train the grounding adapter on CPU or GPU, with checkpoints, resumable at any step.

    python -m goldgate.serving.training.train --data ../shared/data --out build/training --steps 280

The order of packs depends on the seed and the step alone, so an interrupted run that is started again goes on where its
last checkpoint was and sees the same data. Checkpoints lie in `--out`, outside Git; the adapter is written there too.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.errors import GoldgateError, UsageError
from goldgate.pipeline.params import AnswerParams, EmbedParams
from goldgate.pipeline.store import Store
from goldgate.serving.model import Model, build_model, load_model_spec
from goldgate.serving.prompt import load_prompt
from goldgate.serving.rendering import VllmRenderer
from goldgate.serving.training.examples import Topic, load_clapnq, load_instructions, load_own, load_xquad
from goldgate.serving.training.lora import WEIGHTS, AdapterConfig, add_adapter, fill_adapter, load_adapter, save_adapter
from goldgate.serving.training.packing import Pack, Packer

CHECKPOINT = "checkpoint.pt"
DECIDING, COPIED = 4, 0.15
"""The first tokens of an answer count fully, those behind them so much: see `lay_out`."""

STEP_TOKENS = 1300
"""Tokens of one optimiser step: one pack or two, some twelve questions."""


@dataclass(frozen=True)
class Settings:
    """What decides the adapter, beside code and data."""

    steps: int = 280
    peak_rate: float = 1e-3
    warmup: float = 0.06
    seed: int = 7
    rank: int = 16
    alpha: int = 32
    start: str = ""
    """SHA-256 of the adapter that training goes on from; empty: a new one."""


def batches(packer: Packer, topics: Sequence[Topic], seed: int) -> Iterator[list[Pack]]:
    """Yield packs for one optimiser step each, epoch after epoch, for ever."""
    packs = packer.packs(topics)
    epoch = 0
    while True:
        waiting: list[Pack] = []
        for pack in packs(seed * 1000 + epoch):
            waiting.append(pack)
            if sum(map(len, waiting)) >= STEP_TOKENS:
                yield waiting
                waiting = []
        epoch += 1


@dataclass(frozen=True)
class Layout:
    """Where a pack's tokens lie. A question sees the context and itself, never another question."""

    ids: torch.Tensor
    """[L] token ids: the context, then the segments one behind the other."""
    positions: torch.Tensor
    """[L] every segment begins where the context ends."""
    places: torch.Tensor
    """[n] the tokens whose next token is learned."""
    weights: torch.Tensor
    """[n] how much each of them counts."""
    context: int
    """Tokens of the context."""
    grid: torch.Tensor
    """[segments, longest] index of each segment's tokens behind the context; padding repeats the last token."""
    real: torch.Tensor
    """[L - context] the place of each token in the flattened grid."""

    def to(self, device: str) -> Layout:
        """Move everything."""
        ids, positions, places, weights = (t.to(device) for t in (self.ids, self.positions, self.places, self.weights))
        return Layout(ids, positions, places, weights, self.context, self.grid.to(device), self.real.to(device))


def lay_out(pack: Pack) -> Layout:
    """Return a pack as tensors."""
    context = len(pack.context)
    ids, positions = list(pack.context), list(range(context))
    places: list[int] = []
    weights: list[float] = []
    spans = []
    for question, answer in pack.segments:
        start, length = len(ids), len(question) + len(answer)
        spans.append((start - context, length))
        ids += [*question, *answer]
        positions += range(context, context + length)
        places += range(start + len(question) - 1, start + length - 1)
        # The first tokens decide which sentence is said, or that none is; behind them an answer is copied.
        weights += [1.0 if n < DECIDING else COPIED for n in range(len(answer))]
    longest = max(length for _, length in spans)
    grid = torch.tensor([[start + min(i, length - 1) for i in range(longest)] for start, length in spans])
    real = torch.tensor([row * longest + i for row, (_, length) in enumerate(spans) for i in range(length)])
    return Layout(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(places), torch.tensor(weights), context, grid, real
    )


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, scaling: float,  # noqa: ANN401
    layout: Layout, **_: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention over a pack: causal in the context; a segment sees the context and, causally, itself.

    query [1, heads, L, d], key and value [1, groups, L, d] -> [1, L, heads, d]. A mask over L x L would do the same at
    three times the work, most of it for pairs that do not see each other.
    """
    groups = module.num_key_value_groups
    q, k, v = query[0], key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
    c = layout.context
    first = torch.nn.functional.scaled_dot_product_attention(
        q[None, :, :c], k[None, :, :c], v[None, :, :c], is_causal=True, scale=scaling
    )[0]
    rows, longest = layout.grid.shape
    qs, ks, vs = (x[:, c:][:, layout.grid] for x in (q, k, v))  # [heads, rows, longest, d]
    hidden = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)
    own = (qs @ ks.transpose(-1, -2)).masked_fill(hidden, torch.finfo(q.dtype).min)
    own = own.flatten(1, 2)[:, layout.real]  # [heads, L - c, longest]
    shared = q[:, c:] @ k[:, :c].transpose(-1, -2)
    share = torch.softmax(torch.cat([shared, own], -1).float() * scaling, -1).to(q.dtype)
    spread = share.new_zeros(share.shape[0], rows * longest, longest).index_copy(1, layout.real, share[:, :, c:])
    behind = (spread.unflatten(1, (rows, longest)) @ vs).flatten(1, 2)[:, layout.real]
    rest = share[:, :, :c] @ v[:, :c] + behind
    return torch.cat([first, rest], 1).transpose(0, 1)[None], None


def pack_loss(model: Any, pack: Pack, device: str) -> torch.Tensor:  # noqa: ANN401 - transformers has no types here
    """Return the summed weighted loss of a pack's answers."""
    layout = lay_out(pack).to(device)
    hidden = model.model(
        input_ids=layout.ids[None],
        position_ids=layout.positions[None],
        attention_mask=None,
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    # The vocabulary projection is half of a small model's work: only for the tokens that are learned.
    logits = torch.nn.functional.linear(hidden[layout.places], model.lm_head.weight).float()
    loss = torch.nn.functional.cross_entropy(logits, layout.ids[layout.places + 1], reduction="none")
    return (loss * layout.weights).sum()


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.peak_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def load_topics(data: Path) -> list[Topic]:
    """Return everything that is trained on."""
    return [*load_xquad(data, judged=False), *load_clapnq(data), *load_own(judged=False)]


def load_base(model: Model, dtype: torch.dtype = torch.bfloat16) -> Any:  # noqa: ANN401 - transformers has no types here
    """Load the base with the attention over packs."""
    import transformers

    transformers.AttentionInterface.register("goldgate_packed", packed_attention)
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(model.path), dtype=dtype, local_files_only=True, attn_implementation="goldgate_packed"
    )


def train(
    model: Model, packer: Packer, topics: Sequence[Topic], out: Path, settings: Settings, save_every: int = 20,
    first: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Train and return the adapter's folder, `out/adapter`. Goes on from `out/checkpoint.pt` where there is one.

    `first` are the tensors of an adapter to begin with. Raises UsageError when they do not fit, or when the checkpoint
    belongs to other settings.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.seed)
    base = load_base(model).to(device)
    base.eval()  # no dropout anywhere in this architecture; frozen but for the adapter
    config = AdapterConfig(r=settings.rank, lora_alpha=settings.alpha, base_model_name_or_path=model.spec.source)
    trainable = add_adapter(base, config)
    if first is not None:
        fill_adapter(trainable, first)
    optimiser = torch.optim.AdamW(trainable.values(), lr=settings.peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    start = _resume(out / CHECKPOINT, trainable, optimiser, settings)
    said = time.monotonic()
    losses: list[float] = []
    tokens = 0
    for step, packs in enumerate(batches(packer, topics, settings.seed)):
        if step >= settings.steps:
            break
        if step < start:
            continue  # drawn again, so that what follows is what it would have been
        losses.append(_step(base, optimiser, packs, rate_at(step, settings), trainable, device))
        tokens += sum(map(len, packs))
        if (step + 1) % 5 == 0:
            speed = tokens / (time.monotonic() - said)
            loss = sum(losses[-20:]) / len(losses[-20:])
            typer.echo(f"step {step + 1}/{settings.steps}  loss {loss:.3f}  {speed:.0f} tokens/s", err=True)
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            _save(out / CHECKPOINT, step + 1, trainable, optimiser, settings)
    save_adapter(out / "adapter", trainable, config)
    return out / "adapter"


def _step(
    model: Any, optimiser: torch.optim.Optimizer, packs: Sequence[Pack], rate: float,  # noqa: ANN401
    trainable: dict[str, torch.nn.Parameter], device: str,
) -> float:  # fmt: skip
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    total = sum(float(lay_out(pack).weights.sum()) for pack in packs)
    shown = 0.0
    for pack in packs:
        loss = pack_loss(model, pack, device)
        (loss / total).backward()
        shown += float(loss.detach()) / total
    torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
    optimiser.step()
    return shown


def _save(
    path: Path, step: int, trainable: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer,
    settings: Settings,
) -> None:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "settings": settings.__dict__,
        "adapter": {name: value.detach() for name, value in trainable.items()},
        "optimiser": optimiser.state_dict(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resume(
    path: Path, trainable: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, settings: Settings
) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings.__dict__:
        found = json.dumps(state["settings"])
        raise UsageError(f"{path} was made with other settings: {found}", "the same", "remove it or name another --out")
    with torch.no_grad():
        for name, value in trainable.items():
            value.copy_(state["adapter"][name])
    optimiser.load_state_dict(state["optimiser"])
    typer.echo(f"goes on after step {state['step']}", err=True)
    return int(state["step"])


def main(
    data: Annotated[Path, typer.Option(help="The shared data: xquad, clapnq, bipia.")] = Path("../shared/data"),
    out: Annotated[Path, typer.Option(help="Checkpoints and the adapter, outside Git.")] = Path("build/training"),
    base: Annotated[Path, typer.Option(help="Model file of the base.")] = Path("serving/models/smollm2-135m.toml"),
    prompt: Annotated[Path, typer.Option(help="Prompt file to train with.")] = Path("serving/prompts/grounded.toml"),
    start: Annotated[Path | None, typer.Option(help="Folder of an adapter to go on from; a new one if absent.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps; the rate falls to its end over them.")] = 280,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    seed: Annotated[int, typer.Option(help="Decides the order of everything.")] = 7,
    embedder: Annotated[
        str, typer.Option(help="As [embed] model: finds the neighbours of a passage.")
    ] = EmbedParams().model,
    store: Annotated[str, typer.Option(help="Store with the converted base.", envvar="GOLDGATE_STORE")] = ".goldgate",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.")] = 0,
) -> None:
    """Train the grounding adapter."""
    if threads:
        torch.set_num_threads(threads)
    try:
        model = build_model(load_model_spec(base), Store.open(store))
        renderer = VllmRenderer(model, AnswerParams())
        packer = Packer(
            renderer, load_prompt(prompt), load_instructions(data), load_embedder(EmbedParams(model=embedder))
        )
        topics = load_topics(data)
        first = packer.packs(topics)(seed * 1000)
        typer.echo(
            f"{len(topics)} topics, {sum(len(p.segments) for p in first)} questions in {len(first)} contexts, "
            f"{sum(map(len, first))} tokens an epoch",
            err=True,
        )
        settings = Settings(steps=steps, peak_rate=rate, seed=seed, rank=rank, alpha=2 * rank)
        tensors = None
        if start is not None:
            tensors = load_adapter(start)[1]
            settings = replace(settings, start=hashlib.sha256((start / WEIGHTS).read_bytes()).hexdigest())
        folder = train(model, packer, topics, out, settings, first=tensors)
    except GoldgateError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
