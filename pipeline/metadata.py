"""front matter and sidecar -> Metadata: who may read a document, its version and its date."""

from __future__ import annotations

import codecs
import datetime
import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from goldgate.pipeline.schema import PUBLIC

SIDECAR_SUFFIX = ".meta.yaml"
"""`guide.pdf` is described by `guide.pdf.meta.yaml`."""

KNOWN = ("tenant", "access", "version", "date", "charset")
EVERYONE = "*"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_NEAR = 0.8
_MOST_LETTERS_APART = 1  # in length: `tennant`, `acces`, but not `accessed` or `conversion`


class MetadataError(Exception):
    """Raised for a mistake in front matter or sidecar. The message is the reason shown to a person."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What front matter or a sidecar says; None where it says nothing."""

    tenant: str | None = None
    access: tuple[str, ...] | None = None
    version: str | None = None
    date: str | None = None
    charset: str | None = None


def split_front_matter(text: str) -> tuple[str, int]:
    """The YAML at the start of a Markdown text, and the character where the document itself starts (0 without YAML)."""
    match = _FRONT_MATTER.match(text)
    if match is None or not _looks_like_yaml(match.group(1)):
        return "", 0
    return match.group(1), match.end()


def _looks_like_yaml(text: str) -> bool:
    """Between two thematic breaks there may be ordinary text: front matter has a key on its first line, or nothing."""
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    return not first or re.match(r"""["']?[\w.-]+["']?\s*:(?:\s|$)""", first) is not None


def read_metadata(source: str, where: str) -> Metadata:
    """Read YAML. Raises MetadataError naming `where`, the key and what was expected.

    A key that is not ours is left alone; one that is nearly ours is a mistake, because a misspelt `access` would show
    a document to everyone.
    """
    try:
        raw = yaml.load(source, Loader=_UniqueKeys)  # noqa: S506  (a subclass of SafeLoader)
        written = yaml.load(source, Loader=yaml.BaseLoader)  # noqa: S506  (every scalar as it is written)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MetadataError(f"{where} is not valid YAML: {_first_line(error)}") from None
    if raw is None:
        return Metadata()
    if not isinstance(raw, dict):
        raise MetadataError(f"{where} is not a mapping of keys to values")
    for key in raw:
        _check_spelling(str(key), where)
    return Metadata(
        tenant=_tenant(raw, where),
        access=_access(raw, where),
        version=_version(raw, written, where),
        date=_date(raw, where),
        charset=_charset(raw, where),
    )


def merge(front: Metadata, sidecar: Metadata) -> Metadata:
    """Both together. Raises MetadataError when they contradict each other."""
    values: dict[str, Any] = {}
    for name in KNOWN:
        inner, outer = getattr(front, name), getattr(sidecar, name)
        if inner is not None and outer is not None and inner != outer:
            raise MetadataError(f"{name} is {inner!r} in the front matter and {outer!r} in the sidecar; keep one")
        values[name] = outer if outer is not None else inner
    return Metadata(**values)


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in seen if seen.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep=deep)


def _check_spelling(key: str, where: str) -> None:
    if key in KNOWN:
        return
    folded = key.strip().casefold().rstrip("_-")
    near = difflib.get_close_matches(folded, KNOWN, n=1, cutoff=_NEAR)
    if near and abs(len(near[0]) - len(folded)) <= _MOST_LETTERS_APART:
        raise MetadataError(f"{where}: {key} is unknown; did you mean {near[0]}?")


def _tenant(raw: Mapping[str, Any], where: str) -> str | None:
    if "tenant" not in raw:
        return None
    return _label(raw["tenant"], f"{where}: tenant", f'a name such as "{PUBLIC}"')


def _access(raw: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    if "access" not in raw:
        return None
    value = raw["access"]
    if not isinstance(value, list):
        raise MetadataError(f"{where}: access is {value!r:.60}, expected a list of labels such as [operators]")
    return tuple(sorted({_label(item, f"{where}: access", "a list of labels that are text") for item in value}))


def _label(value: object, what: str, expected: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise MetadataError(f"{what} is {value!r:.60}, expected {expected}")
    if value.strip() == EVERYONE:
        raise MetadataError(f"{what} is {EVERYONE!r}, which is reserved; leave access out to let everyone read")
    return value.strip()


def _version(raw: Mapping[str, Any], written: Mapping[str, Any], where: str) -> str | None:
    """The version as it is written: 1.10 is a number to YAML, and not the same as 1.1 to anyone else."""
    if "version" not in raw:
        return None
    value = raw["version"]
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.date) or not str(value).strip():
        raise MetadataError(f'{where}: version is {value!r:.60}, expected text such as "2.1"')
    return str(written["version"]).strip()


def _date(raw: Mapping[str, Any], where: str) -> str | None:
    if "date" not in raw:
        return None
    value = raw["date"]
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            raise MetadataError(f"{where}: date is {value!r:.60}, expected ISO 8601 such as 2024-05-31") from None
    if not isinstance(value, datetime.date):
        raise MetadataError(f"{where}: date is {value!r:.60}, expected ISO 8601 such as 2024-05-31")
    return value.date().isoformat() if isinstance(value, datetime.datetime) else value.isoformat()


def _charset(raw: Mapping[str, Any], where: str) -> str | None:
    if "charset" not in raw:
        return None
    value = raw["charset"]
    try:
        codecs.lookup(value)
    except (LookupError, TypeError, ValueError):
        raise MetadataError(f"{where}: charset is {value!r:.60}, expected a name such as windows-1252") from None
    return str(value)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
