"""What the demo proposes: each proposal changes what its story says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from goldgate.demo import PROPOSALS, _copy_files
from goldgate.pipeline.params import load_params
from goldgate.serving.model import load_model_spec
from goldgate.serving.prompt import load_prompt

ROOT = Path(__file__).resolve().parents[1]

CHANGES = {
    "harmful-document": ["knowledge/reference/exit-codes.md"],
    "harmful-retrieval": ["params.toml"],
    "harmful-prompt": ["serving/prompts/grounded.toml"],
    "good-document": ["knowledge/tutorials/first-run.md"],
    "base-model": ["params.toml"],
}


def propose(name: str, folder: Path) -> list[str]:
    """Make a proposal on a copy of the files; returns the names of those that changed."""
    _copy_files(ROOT, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    next(proposal for proposal in PROPOSALS if proposal.name == name).change(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    return sorted(path.relative_to(folder).as_posix() for path in after if after[path] != before[path])


def test_every_proposal_is_known() -> None:
    assert [proposal.name for proposal in PROPOSALS] == list(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_proposal_changes_its_file_only(name: str, tmp_path: Path) -> None:
    assert propose(name, tmp_path) == CHANGES[name]


def test_the_harmful_retrieval_shows_one_passage(tmp_path: Path) -> None:
    propose("harmful-retrieval", tmp_path)
    shipped, proposed = load_params(ROOT / "params.toml"), load_params(tmp_path / "params.toml")
    assert shipped.retrieve.top_k > 1
    assert proposed.retrieve == shipped.retrieve.model_copy(update={"top_k": 1})


def test_the_harmful_prompt_asks_for_no_source(tmp_path: Path) -> None:
    propose("harmful-prompt", tmp_path)
    shipped, proposed = (load_prompt(folder / "serving/prompts/grounded.toml") for folder in (ROOT, tmp_path))
    assert "passages only" in shipped.system
    assert "passages" not in proposed.system
    assert "{number}" in shipped.passage
    assert "{number}" not in proposed.passage


def test_the_base_model_has_no_adapter(tmp_path: Path) -> None:
    propose("base-model", tmp_path)
    shipped, proposed = (
        load_model_spec(folder / load_params(folder / "params.toml").model.file) for folder in (ROOT, tmp_path)
    )
    assert shipped.adapter
    assert not proposed.adapter
    assert shipped.source == proposed.source
