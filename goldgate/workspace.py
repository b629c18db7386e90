"""Where one run of goldgate finds its files, and the steps over them that the command line and the demo share."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from goldgate.pipeline.errors import EnvironmentFailure, NotComputed, Refused, UsageError
from goldgate.pipeline.params import Params, load_params, parse_record
from goldgate.pipeline.schema import (
    FORMAT_VERSION,
    CaseAnswer,
    Document,
    Event,
    Generation,
    GoldCase,
    Record,
    Release,
    Report,
    Timings,
    Unreadable,
    Verdict,
)  # fmt: skip
from goldgate.pipeline.store import Store, digest_file, digest_json, write_files

if TYPE_CHECKING:
    from goldgate.evals.review import Item
    from goldgate.pipeline.embed import EmbedCounts
    from goldgate.serving.answer import Answerer
    from goldgate.serving.generate import Generator
    from goldgate.serving.model import Model

Reporter = Callable[[str, int, int], None]
R = TypeVar("R", bound=Record)


class Baseline(Record):
    """baseline.json: what DVC stages depend on of production. Rewritten by promote and rollback."""

    release: str | None = None
    dtype: str | None = None


class ReadSummary(Record):
    """build/read.json"""

    documents: int
    by_media_type: dict[str, int]
    unreadable: tuple[Unreadable, ...] = ()


@dataclass(frozen=True)
class Workspace:
    """The files of one run; every path may be given on the command line."""

    params: Path = Path("params.toml")
    knowledge: str = "knowledge"
    golden: Path = Path("golden/cases.jsonl")
    policy: Path = Path("golden/gate.toml")
    labels: Path = Path("golden/labels.jsonl")
    build: Path = Path("build")
    baseline: Path = Path("baseline.json")
    store_url: str | None = None
    application: str = "default"
    system: Path | None = None

    def store(self) -> Store:
        """Open the store, making it when it is not there."""
        return Store.open(self.store_url)

    def load_params(self) -> Params:
        """Read params.toml. Model and prompt files are relative to its folder."""
        return load_params(self.params)

    def beside_params(self, name: str) -> Path:
        """Return a file that params.toml names, relative to the folder that params.toml is in."""
        path = self.params.parent / name
        if not path.is_file():
            raise UsageError(f"{self.params} names {name}, which is no file", "a file beside params.toml")
        return path

    @contextlib.contextmanager
    def exclusive(self, store: Store) -> Iterator[None]:
        """Hold this build folder: two builds into one folder would mix. Raises Refused when it is held."""
        try:
            self.build.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.build} cannot be made: {error.strerror}", "a folder that can be written"
            ) from None
        name = "folder-" + hashlib.sha256(str(self.build.resolve()).encode()).hexdigest()[:16]
        with store.lock(name):
            yield

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the build folder whole or not at all."""
        write_files(self.build, {name: data})
        return self.build / name

    def read(self, name: str, record: type[R], made_by: str) -> R:
        """Read a record of the build folder. Raises UsageError that names the command that makes it."""
        path = self.build / name
        return parse_record(read_json(path, made_by), record, str(path))


def read_json(path: Path, made_by: str) -> object:
    """Read a JSON file. Raises UsageError naming the command that makes it when it is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "", f"run goldgate {made_by}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "JSON", f"run goldgate {made_by} again") from None


# ---------------------------------------------------------------- documents -> collection


def read_step(ws: Workspace, progress: Reporter, *, skip_unreadable: bool = False) -> ReadSummary:
    """Knowledge folder or URL -> documents.parquet and read.json."""
    from goldgate.pipeline.parquet import write_records
    from goldgate.pipeline.read import read_documents
    from goldgate.pipeline.reuse import ReadBefore

    params = ws.load_params().read
    if skip_unreadable:
        params = params.model_copy(update={"skip_unreadable": True})
    store = ws.store()
    with ws.exclusive(store):
        before = ReadBefore(store, params)
        documents, unreadable = read_documents(ws.knowledge, params, progress, before)
        kinds = sorted({document.media_type for document in documents})
        summary = ReadSummary(
            documents=len(documents),
            by_media_type={kind: sum(d.media_type == kind for d in documents) for kind in kinds},
            unreadable=tuple(unreadable),
        )
        write_records(ws.build / "documents.parquet", documents, Document)
        before.remember(ws.build / "documents.parquet")
        ws.write("read.json", summary.model_dump_json(indent=1).encode() + b"\n")
    return summary


def embed_step(ws: Workspace, progress: Reporter, *, engine: str = "ray") -> EmbedCounts:
    """documents.parquet -> chunks.parquet, embeddings.parquet and embed.json."""
    from goldgate.pipeline.embed import embed
    from goldgate.pipeline.parquet import read_records

    params = ws.load_params()
    path = ws.build / "documents.parquet"
    if not path.is_file():
        raise UsageError(f"{path} does not exist", "", "run goldgate read")
    store = ws.store()
    with ws.exclusive(store):
        documents = read_records(path, Document)
        if engine not in {"ray", "local"}:
            raise UsageError(f"engine {engine!r} is unknown", "ray or local")
        return embed(
            documents, params.chunk, params.embed, store, ws.build,
            engine="local" if engine == "local" else "ray", dtype=read_baseline(ws).dtype, progress=progress,
        )  # fmt: skip


def index_step(ws: Workspace, progress: Reporter) -> Generation:
    """chunks.parquet and embeddings.parquet -> a generation in the store, and generation.json."""
    from goldgate.pipeline.index import index

    params = ws.load_params()
    summary = ws.read("read.json", ReadSummary, "read")
    store = ws.store()
    with ws.exclusive(store):
        return index(ws.build, params.index, store, unreadable=summary.unreadable, progress=progress)


def model_step(ws: Workspace, progress: Reporter) -> Model:
    """Model file -> weights in the store, and model.json."""
    from goldgate.serving.model import build_model, load_model_spec

    spec = load_model_spec(ws.beside_params(ws.load_params().model.file))
    store = ws.store()
    model = build_model(spec, store, progress)
    ws.build.mkdir(parents=True, exist_ok=True)
    summary = {"digest": model.digest, "name": spec.name, "kind": spec.kind}
    ws.write("model.json", json.dumps(summary, indent=1).encode() + b"\n")
    return model


# ---------------------------------------------------------------- answers -> report -> verdict


def load_cases(ws: Workspace) -> list[GoldCase]:
    """Read the gold set."""
    from goldgate.evals.golden import load_cases as load

    return load(ws.golden)


def candidate_generation(ws: Workspace) -> Generation:
    """Return the generation that this build folder made."""
    return ws.read("generation.json", Generation, "build")


@contextlib.contextmanager
def open_candidate(ws: Workspace, store: Store, generator: Generator | None = None) -> Iterator[Answerer]:
    """Open what this build folder would answer with. A `generator` that is given is used and left open."""
    params = ws.load_params()
    prompt, model = ws.beside_params(params.prompt.file), ws.beside_params(params.model.file)
    with _opened(candidate_generation(ws), params, prompt, model, store, generator, "") as answerer:
        yield answerer


@contextlib.contextmanager
def open_release(store: Store, digest: str, generator: Generator | None = None) -> Iterator[Answerer]:
    """Open what a release answers with, from the files that it binds."""
    from goldgate.serving.release import load_release, release_folder

    load_release(store, digest)
    folder = release_folder(store, digest)
    params = load_params(folder / "params.toml")
    generation = Generation.model_validate_json((folder / "generation.json").read_bytes())
    prompt, model = folder / "prompt.toml", folder / "model.toml"
    with _opened(generation, params, prompt, model, store, generator, digest) as answerer:
        yield answerer


@contextlib.contextmanager
def _opened(
    generation: Generation, params: Params, prompt: Path, model: Path, store: Store, generator: Generator | None,
    release: str,
) -> Iterator[Answerer]:  # fmt: skip
    from goldgate.serving.answer import open_answerer
    from goldgate.serving.generate import load_generator
    from goldgate.serving.model import build_model, load_model_spec

    made = None
    if generator is None:
        made = generator = load_generator(build_model(load_model_spec(model), store), params.answer)
    try:
        answerer = open_answerer(
            generation, params.embed, params.retrieve, prompt, model, params.answer, store, generator, release
        )
        try:
            yield answerer
        finally:
            answerer.close()
    finally:
        if made is not None:
            made.close()


def candidate_parts(ws: Workspace, store: Store) -> dict[str, str]:
    """Return the digest of every part that decides the candidate's answers."""
    from goldgate.serving.answer import answer_path_digest
    from goldgate.serving.model import build_model, load_model_spec

    params = ws.load_params()
    generation = candidate_generation(ws)
    model = build_model(load_model_spec(ws.beside_params(params.model.file)), store)
    return {
        "knowledge_base": generation.digest,
        "embedder": generation.embedder,
        "retrieval": digest_json(params.retrieve.model_dump(mode="json")),
        "prompt": digest_file(ws.beside_params(params.prompt.file)),
        "model": model.digest,
        "answering": digest_json(params.answer.model_dump(mode="json")),
        "code": answer_path_digest(),
    }


def answer_step(ws: Workspace, progress: Reporter, generator: Generator | None = None) -> list[CaseAnswer]:
    """Gold questions -> answers.jsonl and parts.json, by the built-in system or by an application over HTTP."""
    cases = load_cases(ws)
    store = ws.store()
    with ws.exclusive(store):
        if ws.system is not None:
            return _answer_http(ws, ws.system, cases, progress)
        from goldgate.serving.answer import answer_cases

        parts = candidate_parts(ws, store)
        with open_candidate(ws, store, generator) as answerer:
            answers = answer_cases(cases, answerer, store, ws.build / "answers.jsonl", progress)
        ws.write("parts.json", json.dumps({"system": "builtin", **parts}, indent=1).encode() + b"\n")
        return answers


def shared_prefix_share(ws: Workspace) -> float | None:
    """Return the share of the last answered prompts' tokens that is common to all of them; None where not known."""
    found = read_json(ws.build / "timings.json", "answer")
    share = found.get("shared_prefix_share") if isinstance(found, dict) else None
    return float(share) if isinstance(share, int | float) else None


def _answer_http(ws: Workspace, system_file: Path, cases: Sequence[GoldCase], progress: Reporter) -> list[CaseAnswer]:
    from goldgate.evals.system import HttpSystem, answer_http

    system = HttpSystem.load(system_file)
    answers = answer_http(cases, system, progress)
    # Times differ from run to run: they stay out of the file that is measured.
    stable = [
        a.model_copy(update={"answer": a.answer.model_copy(update={"timings": Timings()})}) if a.answer else a
        for a in answers
    ]
    times = {a.case: a.answer.timings.model_dump() for a in answers if a.answer}
    ws.write("answers.jsonl", b"".join(a.model_dump_json().encode() + b"\n" for a in stable))
    ws.write("timings.json", json.dumps({"format_version": FORMAT_VERSION, "cases": times}, indent=1).encode() + b"\n")
    ws.write("parts.json", json.dumps({"system": "http", "declared": system.digest}, indent=1).encode() + b"\n")
    return answers


def evaluate_step(ws: Workspace, progress: Reporter) -> Report:
    """answers.jsonl -> report.json, metrics.json and plots/, by the pytest suite. Evidence is followed from
    production's documents."""
    from goldgate.evals.evaluate import run_suite
    from goldgate.evals.promote import production_documents, production_places

    store = ws.store()
    with ws.exclusive(store):
        params = ws.load_params()
        prompt = params.prompt.model_copy(update={"file": str(ws.params.parent / params.prompt.file)})
        return run_suite(
            ws.build, ws.golden, params.model_copy(update={"prompt": prompt}), store,
            previous=production_documents(store, ws.application),
            places=production_places(store, ws.application),
            progress=progress,
        )  # fmt: skip


def read_baseline(ws: Workspace) -> Baseline:
    """Read baseline.json; an absent file means that there is no production yet."""
    if not ws.baseline.exists():
        return Baseline()
    return parse_record(read_json(ws.baseline, "promote"), Baseline, str(ws.baseline))


def write_baseline(ws: Workspace, store: Store) -> None:
    """Rewrite baseline.json from the pointer."""
    from goldgate.serving.release import load_release, production, release_folder

    live = production(store, ws.application)
    dtype = None
    if live is not None:
        load_release(store, live)
        dtype = Generation.model_validate_json((release_folder(store, live) / "generation.json").read_bytes()).dtype
    record = Baseline(release=live, dtype=dtype).model_dump_json(indent=1).encode() + b"\n"
    write_files(ws.baseline.parent, {ws.baseline.name: record})


def check_baseline(ws: Workspace, store: Store) -> str | None:
    """Return production's digest. Raises UsageError when baseline.json names another release than the pointer."""
    from goldgate.serving.release import production

    live = production(store, ws.application)
    named = read_baseline(ws).release
    if named != live:
        raise UsageError(
            f"{ws.baseline} names {(named or 'no release')[:12]}, but {(live or 'no release')[:12]} is live",
            "the live release", "run goldgate status --write-baseline",
        )  # fmt: skip
    return live


def gate_step(ws: Workspace, against: Path | None = None, progress: Reporter | None = None) -> Verdict:
    """report.json and production's report -> verdict.json, and its pages report.html and report.md.

    `against` names another report.json to compare with instead of production's: the way to judge an application that
    goldgate does not serve. Such a verdict never makes a release.
    """
    from goldgate.evals.gate import decide, feasible, load_policy, report_digest
    from goldgate.evals.report import pages

    policy = load_policy(ws.policy)
    feasible(policy, load_cases(ws))
    report = ws.read("report.json", Report, "evaluate")
    if progress is not None:
        progress("compare with production" if against is None else f"compare with {against}", 0, 0)
    name, measured, gold = _baseline_of(ws, report, against)
    judged, baseline, reviewed = _reviewed(ws, report, measured)
    verdict = decide(judged, baseline, policy, baseline_release=name, baseline_gold=gold)
    digests = {
        **verdict.digests,
        "policy": digest_file(ws.policy),
        "report": digest_file(ws.build / "report.json"),
        "labels": _labels_digest(ws),
    }
    # The reports as they were measured, whatever people said.
    candidate = report_digest(report)
    if measured is not None:
        digests["baseline_report"] = report_digest(measured)
    verdict = verdict.model_copy(update={"digests": digests, "reviewed": reviewed, "candidate": candidate})
    if against is not None and report.system == "builtin":
        verdict = _not_releasable(verdict)
    written = pages(verdict, judged, baseline)
    # The verdict last: beside it lie never the pages of another one.
    write_files(ws.build, {**written, "verdict.json": verdict.model_dump_json(indent=1).encode() + b"\n"})
    return verdict


def _reviewed(ws: Workspace, report: Report, baseline: Report | None) -> tuple[Report, Report | None, dict[str, int]]:
    """Put people's judgement in place of the judge's where `ws.labels` has it for both sides."""
    from goldgate.evals.review import apply_labels, load_labels

    labels = load_labels(ws.labels)
    if baseline is None or not labels:
        return report, baseline, {}
    return apply_labels(report, baseline, labels)


def _labels_digest(ws: Workspace) -> str:
    """Return the SHA-256 of the labels file; "" where there is none, or nothing in it."""
    return digest_file(ws.labels) if ws.labels.is_file() and ws.labels.stat().st_size else ""


def review_items(ws: Workspace, against: Path | None = None) -> list[Item]:
    """Return the changed answers that nobody has judged yet.

    Raises UsageError where there is no production, or where the gold set is not the one that the report was made with.
    """
    from goldgate.evals.golden import gold_digest
    from goldgate.evals.review import load_labels, pending

    report = ws.read("report.json", Report, "evaluate")
    if report.gold_digest != gold_digest(load_cases(ws)):
        raise UsageError(f"{ws.golden} is not the gold set of this report", "the same", "run goldgate evaluate again")
    _, baseline, _ = _baseline_of(ws, report, against)
    if baseline is None:
        raise UsageError("there is no production to compare with", "", "name another report with --against")
    return pending(report, baseline, load_labels(ws.labels))


def _not_releasable(verdict: Verdict) -> Verdict:
    """Say what follows a PASS against another report than production's."""
    if verdict.verdict != "PASS" or verdict.diagnosis is None:
        return verdict
    do_next = "a release needs a verdict against what is live: run goldgate gate without --against"
    return verdict.model_copy(update={"diagnosis": verdict.diagnosis.model_copy(update={"do_next": do_next})})


def _baseline_of(
    ws: Workspace, report: Report, against: Path | None
) -> tuple[str | None, Report | None, dict[str, str] | None]:
    """Return the baseline's name, its report under the candidate's definitions, and its own gold cases."""
    if against is not None:
        other = parse_record(read_json(against, "evaluate"), Report, str(against))
        return digest_file(against), other, _gold_of(other)
    from goldgate.evals.promote import production_report, released_report

    store = ws.store()
    live = check_baseline(ws, store)
    if live is None:
        return None, None, None
    return live, production_report(store, live, report, load_cases(ws)), _gold_of(released_report(store, live))


def _gold_of(report: Report) -> dict[str, str]:
    return {case.id: case.case_digest for case in report.cases}


# ---------------------------------------------------------------- release -> deployment


def release_step(ws: Workspace, *, bootstrap: bool = False) -> Release:
    """A build with its verdict -> a release in the store. Only PASS is released; the first one by `bootstrap`."""
    from goldgate.evals.gate import bootstrap_problems, load_policy
    from goldgate.serving.release import default_actor, make_release, production

    store = ws.store()
    with ws.exclusive(store):
        params = ws.load_params()
        report = ws.read("report.json", Report, "evaluate")
        verdict = ws.read("verdict.json", Verdict, "gate")
        live = production(store, ws.application)
        _check_release(ws, store, report, verdict, live, bootstrap=bootstrap)
        if bootstrap and (problems := bootstrap_problems(report, load_policy(ws.policy))):
            raise Refused(f"the first release has problems of its own: {problems[0]}", "", f"{len(problems)} in all")
        generation = candidate_generation(ws)
        parts = report.parts
        files = {
            "params.toml": ws.params,
            "prompt.toml": ws.beside_params(params.prompt.file),
            "model.toml": ws.beside_params(params.model.file),
            "cases.jsonl": ws.golden,
            "gate.toml": ws.policy,
            **{name: ws.build / name for name in ("report.json", "answers.jsonl", "verdict.json", "generation.json")},
            **({"labels.jsonl": ws.labels} if verdict.reviewed else {}),
        }
        fields = {
            "generation": generation.digest,
            "model": parts["model"], "prompt": parts["prompt"], "retrieval": parts["retrieval"],
            "embedder": parts["embedder"], "code": parts["code"],
            "gold": report.gold_digest, "policy": digest_file(ws.policy),
            "report": digest_file(ws.build / "report.json"), "verdict": digest_file(ws.build / "verdict.json"),
            "verdict_word": verdict.verdict, "baseline": live, "actor": default_actor(),
        }  # fmt: skip
        return make_release(store, files, fields, application=ws.application, bootstrap=bootstrap)


def _check_release(
    ws: Workspace, store: Store, report: Report, verdict: Verdict, live: str | None, *, bootstrap: bool
) -> None:
    _check_judged(ws, store, report, verdict)
    if verdict.baseline != live:
        raise Refused("production changed after the verdict", "a verdict against what is live", "run goldgate gate")
    if bootstrap:
        if live is not None:
            raise Refused(f"{live[:12]} is live already: --bootstrap is for the first release", "", "run goldgate gate")
        return
    if verdict.verdict is None:
        raise NotComputed("there is no production to compare with", "", "make the first release with --bootstrap")
    if verdict.verdict != "PASS":
        raise Refused(f"the verdict is {verdict.verdict}", "PASS", "see goldgate report")


def _check_judged(ws: Workspace, store: Store, report: Report, verdict: Verdict) -> None:
    """What was judged must be what is released."""
    from goldgate.evals.golden import gold_digest

    if report.system != "builtin":
        raise Refused("an application over HTTP is judged, not released", "a build by goldgate")
    if verdict.digests.get("report") != digest_file(ws.build / "report.json"):
        raise Refused("the verdict is about another report", "the verdict on this build", "run goldgate gate")
    if verdict.digests.get("policy") != digest_file(ws.policy):
        again = "give the same --policy as to goldgate gate, or run goldgate gate again"
        raise Refused(f"{ws.policy} is not the policy that judged, or changed since", "the policy that judged", again)
    if verdict.digests.get("labels") != _labels_digest(ws):
        again = "give the same --labels as to goldgate gate, or run goldgate gate again"
        raise Refused(f"{ws.labels} changed after the verdict", "the labels that judged", again)
    if report.gold_digest != gold_digest(load_cases(ws)):
        again = "give the same --golden as to goldgate evaluate, or run goldgate evaluate again"
        raise Refused(
            f"{ws.golden} is not the gold set that judged, or changed since", "the gold set that judged", again
        )
    now = candidate_parts(ws, store)
    changed = sorted(part for part, digest in now.items() if report.parts.get(part) != digest)
    if changed:
        again = "give the same --params as before, or run goldgate repro"
        raise Refused(f"{', '.join(changed)} changed after the answers were judged", "what was judged", again)


def promote_step(ws: Workspace, digest: str, note: str = "") -> Event:
    """Make a release live, and tell the working copy."""
    from goldgate.serving.release import promote, resolve_release

    store = ws.store()
    event = promote(store, resolve_release(store, digest), application=ws.application, note=note)
    _tell_working_copy(ws, store)
    return event


def rollback_step(ws: Workspace, note: str = "") -> Event:
    """Make the release before the live one live again, and tell the working copy."""
    from goldgate.serving.release import rollback

    store = ws.store()
    event = rollback(store, application=ws.application, note=note)
    _tell_working_copy(ws, store)
    return event


def _tell_working_copy(ws: Workspace, store: Store) -> None:
    # An operator's machine has no working copy: there is nothing to tell then.
    if ws.params.exists() or ws.baseline.exists():
        write_baseline(ws, store)


def with_files(ws: Workspace, folder: Path) -> Workspace:
    """Return the same workspace with every relative path below `folder`."""
    return replace(
        ws, params=folder / ws.params, knowledge=str(folder / ws.knowledge), golden=folder / ws.golden,
        policy=folder / ws.policy, labels=folder / ws.labels, build=folder / ws.build, baseline=folder / ws.baseline,
    )  # fmt: skip


def build_documents(ws: Workspace) -> dict[str, Document]:
    """Return the documents of this build folder by id."""
    from goldgate.pipeline.parquet import read_records

    path = ws.build / "documents.parquet"
    if not path.is_file():
        raise UsageError(f"{path} does not exist", "", "run goldgate read")
    return {document.id: document for document in read_records(path, Document)}


def reports_of(ws: Workspace, verdict: Verdict) -> tuple[Report, Report | None]:
    """Return the candidate's report and the report that `verdict` compared it with, where it is at hand."""
    from goldgate.evals.promote import production_report
    from goldgate.serving.release import release_folder

    report = ws.read("report.json", Report, "evaluate")
    store = ws.store()
    if verdict.baseline is None or not release_folder(store, verdict.baseline).is_dir():
        return report, None
    baseline = production_report(store, verdict.baseline, report, load_cases(ws))
    if verdict.reviewed and verdict.digests.get("labels") == _labels_digest(ws):
        judged, baseline_judged, _ = _reviewed(ws, report, baseline)
        return judged, baseline_judged
    return report, baseline
