"""build + verdict -> release, pointer and ledger.

A release is a folder `releases/<digest>/` of the store that holds every small file that decides its answers or
judged them, and names the large ones (generation, model weights) by digest. Production is one pointer file per
application. The pointer is written last: ledger lines after the pointer's sequence belong to a write that never
finished, were never acknowledged, and are dropped by the next one.
"""

from __future__ import annotations

import datetime as dt
import getpass
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import FORMAT_VERSION, Event, Record, Release
from goldgate.pipeline.store import Store, digest_file, digest_json

RELEASE_FILES = (
    "params.toml", "prompt.toml", "model.toml", "cases.jsonl", "gate.toml",
    "report.json", "answers.jsonl", "verdict.json", "generation.json",
)  # fmt: skip
"""What a release folder holds beside release.json."""

OPTIONAL_FILES = ("labels.jsonl",)
"""And what it holds where the verdict used it."""


class Pointer(Record):
    """apps/<application>/production.json: what is live, and how far the ledger is committed."""

    format_version: int = FORMAT_VERSION
    release: str = Field(pattern=r"^[0-9a-f]{64}$")
    sequence: int = Field(ge=1, description="Sequence of the event that made this release live.")
    ledger: str = Field(description="SHA-256 of that event's line.")


class Status(Record):
    """What is live and why it was allowed."""

    release: str
    since: str
    actor: str
    kind: str
    verdict: str | None
    knowledge_base: str
    prompt: str
    model: str
    note: str = ""


# ---------------------------------------------------------------- releases


def make_release(
    store: Store, files: Mapping[str, Path], fields: Mapping[str, str | None], *, application: str, bootstrap: bool
) -> Release:
    """Publish the release made of `files` (name -> path, all of RELEASE_FILES and some others) and return its record.

    `fields` holds the digests and the verdict word of `Release`. The same input gives the same release.
    Raises UsageError when a file is missing and EnvironmentFailure when the store cannot be written.
    """
    kept = [*RELEASE_FILES, *(name for name in OPTIONAL_FILES if name in files)]
    for name in kept:
        if name not in files or not files[name].is_file():
            raise UsageError(
                f"{name} is missing", "a build that was answered, evaluated and gated", "run goldgate repro"
            )
    draft = Release.model_validate(
        {
            **fields,
            "application": application,
            "kind": "bootstrap" if bootstrap else "gated",
            "files": {name: digest_file(files[name]) for name in kept},
        }
    )
    digest = release_digest(draft)
    release = draft.model_copy(update={"digest": digest})

    def fill(folder: Path) -> None:
        for name in kept:
            shutil.copyfile(files[name], folder / name)
        (folder / "release.json").write_text(release.model_dump_json(indent=1) + "\n", encoding="utf-8")

    store.publish("releases", digest, fill)
    # The files may have changed between hashing and copying: what was published is what is checked.
    return load_release(store, digest)


def release_digest(release: Release) -> str:
    """Return the digest of every field but the digest itself."""
    return digest_json(release.model_dump(mode="json", exclude={"digest"}))


def release_folder(store: Store, digest: str) -> Path:
    """Return the folder of a release; it may not exist."""
    return store.path("releases", digest)


def load_release(store: Store, digest: str) -> Release:
    """Read a release and hash its files again.

    Raises Refused for an unknown digest or bytes that differ from what was released, UsageError for a newer format.
    """
    folder = release_folder(store, digest)
    path = folder / "release.json"
    if not path.is_file():
        raise Refused(f"release {digest[:12]} is not in this store", "a digest from `goldgate log`")
    release = _parse_release(path)
    if release.digest != digest or release_digest(release) != digest:
        raise Refused(f"release {digest[:12]} was changed after it was made: release.json", "its original bytes")
    for name, expected in release.files.items():
        file = folder / name
        known = name in RELEASE_FILES or name in OPTIONAL_FILES
        if not known or not file.is_file() or file.is_symlink() or digest_file(file) != expected:
            raise Refused(f"release {digest[:12]} was changed after it was made: {name}", "its original bytes")
    return release


def _parse_release(path: Path) -> Release:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UsageError(
                f"release format {version} is newer than this goldgate", f"{FORMAT_VERSION}", "upgrade goldgate"
            )
        return Release.model_validate(raw)
    except (ValueError, ValidationError) as error:
        raise Refused(f"{path.name} of release {path.parent.name[:12]} is damaged", "its original bytes") from error


def resolve_release(store: Store, prefix: str) -> str:
    """Return the one release digest that starts with `prefix` (at least 6 characters). Raises Refused or UsageError."""
    if len(prefix) < 6 or not all(c in "0123456789abcdef" for c in prefix):
        raise UsageError(f"{prefix!r} is no release digest", "at least 6 hexadecimal characters", "see goldgate log")
    folder = store.path("releases")
    found = sorted(p.name for p in folder.iterdir() if p.name.startswith(prefix)) if folder.is_dir() else []
    if len(found) != 1:
        problem = "matches more than one release" if found else "is not in this store"
        raise Refused(f"release {prefix} {problem}", "a digest from `goldgate log`")
    return found[0]


# ---------------------------------------------------------------- pointer and ledger


def check_application(name: str) -> str:
    """Return `name` when it is a safe application name. Raises UsageError."""
    if not name or len(name) > 64 or not all(c.isalnum() or c in "-_" for c in name) or not name.isascii():
        raise UsageError(f"application {name!r} is no name", "letters, digits, - and _, at most 64")
    return name


def _folder(store: Store, application: str) -> Path:
    return store.path("apps", check_application(application))


def read_pointer(store: Store, application: str = "default") -> Pointer | None:
    """Return what is live, or None when nothing was promoted. Raises EnvironmentFailure when the pointer is damaged."""
    path = _folder(store, application) / "production.json"
    try:
        return Pointer.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise EnvironmentFailure(
            f"the production pointer of {application!r} is damaged", "", "see goldgate log"
        ) from error


def production(store: Store, application: str = "default") -> str | None:
    """Return the digest of the live release, or None."""
    pointer = read_pointer(store, application)
    return pointer.release if pointer else None


def read_ledger(store: Store, application: str = "default") -> list[Event]:
    """Return every acknowledged event, oldest first; the hash chain is checked. Raises EnvironmentFailure if broken."""
    path = _folder(store, application) / "ledger.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    pointer = read_pointer(store, application)
    events: list[Event] = []
    parent = ""
    for number, line in enumerate(lines, 1):
        try:
            event = Event.model_validate_json(line)
        except ValueError as error:
            raise EnvironmentFailure(f"ledger of {application!r}: line {number} is damaged") from error
        if event.sequence != number or event.parent != parent:
            raise EnvironmentFailure(f"ledger of {application!r}: line {number} does not follow the line before it")
        parent = hashlib.sha256(line).hexdigest()
        events.append(event)
        if pointer and pointer.sequence == number and pointer.ledger != parent:
            raise EnvironmentFailure(f"ledger of {application!r}: line {number} is not the one that the pointer names")
    committed = pointer.sequence if pointer else 0
    if len(events) < committed:
        raise EnvironmentFailure(f"ledger of {application!r} ends at {len(events)}, before the pointer's {committed}")
    return events[:committed]


def promote(store: Store, digest: str, *, application: str = "default", actor: str = "", note: str = "") -> Event:
    """Make a release live. Compare-and-swap: it must have been judged against what is live now.

    Raises Refused when the release is already live, was not passed, or was judged against another release.
    """
    with store.lock(f"app-{check_application(application)}", wait_s=10):
        release = load_release(store, digest)
        if release.application != application:
            raise Refused(f"release {digest[:12]} belongs to application {release.application!r}", f"{application!r}")
        live = production(store, application)
        _check_promotable(release, live)
        return _append(store, application, "promoted", digest, live, actor, note)


def _check_promotable(release: Release, live: str | None) -> None:
    name = release.digest[:12]
    if live == release.digest:
        raise Refused(f"release {name} is already live")
    if release.kind == "bootstrap":
        if live is not None:
            raise Refused(
                f"release {name} was made with --bootstrap, without a comparison, but {live[:12]} is live",
                "a release that was judged against production", "run goldgate gate, then goldgate release",
            )  # fmt: skip
        return
    if release.verdict_word != "PASS":
        raise Refused(f"the verdict of release {name} is {release.verdict_word}", "PASS")
    if release.baseline != live:
        raise Refused(
            f"release {name} was judged against {_short(release.baseline)}, but {_short(live)} is live",
            "a verdict against what is live", "run goldgate gate and goldgate release again",
        )  # fmt: skip


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "nothing"


def rollback(store: Store, *, application: str = "default", actor: str = "", note: str = "") -> Event:
    """Make the release before the live one live again. Needs no judge, no LLM and no CI.

    Raises Refused when there is nothing to go back to.
    """
    with store.lock(f"app-{check_application(application)}", wait_s=10):
        stack = promotion_stack(read_ledger(store, application))
        if len(stack) < 2:
            raise Refused("there is no release to roll back to", "at least two promotions", "see goldgate log")
        load_release(store, stack[-2])
        return _append(store, application, "rolled_back", stack[-2], stack[-1], actor, note)


def promotion_stack(events: list[Event]) -> list[str]:
    """Return the releases that rolling back walks through, the live one last."""
    stack: list[str] = []
    for event in events:
        if event.kind == "promoted":
            stack.append(event.release)
        elif event.kind == "rolled_back":
            stack.pop()
    return stack


def _append(
    store: Store, application: str, kind: str, digest: str, previous: str | None, actor: str, note: str
) -> Event:
    events = read_ledger(store, application)
    lines = [_line(event) for event in events]
    event = Event.model_validate(
        {
            "sequence": len(events) + 1,
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "release": digest,
            "previous": previous,
            "actor": actor or default_actor(),
            "note": note,
            "parent": hashlib.sha256(lines[-1]).hexdigest() if lines else "",
        }
    )
    line = _line(event)
    folder = f"apps/{application}"
    store.write_bytes(f"{folder}/ledger.jsonl", b"".join(entry + b"\n" for entry in [*lines, line]))
    pointer = Pointer(release=digest, sequence=event.sequence, ledger=hashlib.sha256(line).hexdigest())
    store.write_bytes(f"{folder}/production.json", pointer.model_dump_json().encode() + b"\n")
    return event


def _line(event: Event) -> bytes:
    return event.model_dump_json().encode()


def status(store: Store, application: str = "default") -> Status | None:
    """Return what is live, or None when nothing was promoted yet."""
    events = read_ledger(store, application)
    if not events:
        return None
    last = events[-1]
    release = load_release(store, last.release)
    return Status(
        release=last.release, since=last.at, actor=last.actor, kind=release.kind, verdict=release.verdict_word,
        knowledge_base=release.generation, prompt=release.prompt, model=release.model, note=last.note,
    )  # fmt: skip


def default_actor() -> str:
    """Return the user name of this process, or `unknown` where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
