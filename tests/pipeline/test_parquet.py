"""Records through Parquet and back: nothing is lost, and the same records give the same bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.parquet import ROW_GROUP_ROWS, read_embeddings, read_records, write_embeddings, write_records
from goldgate.pipeline.schema import Chunk, Document, Generation, Passage, Principal, Record


def fits(value: object) -> bool:
    """Whether every integer has 64 bits; Python's have no end."""
    if isinstance(value, dict):
        return all(map(fits, value.values()))
    if isinstance(value, list | tuple):
        return all(map(fits, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63


FINITE = st.floats(allow_nan=False, allow_infinity=False)
KINDS: dict[type[Record], st.SearchStrategy[Record]] = {
    kind: st.from_type(kind) for kind in (Document, Chunk, Generation, Principal)
}
KINDS[Passage] = st.builds(Passage, score=FINITE, similarity=st.none() | FINITE)
RECORDS = st.sampled_from(list(KINDS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(KINDS[kind].filter(lambda record: fits(record.model_dump())), max_size=4)
    )
)


@settings(max_examples=200, deadline=None)
@given(RECORDS)
def test_nothing_is_lost_and_bytes_are_the_same(case: tuple[type[Record], list[Record]]) -> None:
    kind, records = case
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        assert write_records(one, records, kind) == len(records)
        assert read_records(one, kind) == records
        write_records(two, iter(records), kind)
        assert one.read_bytes() == two.read_bytes()


def test_row_groups_are_of_one_size(tmp_path: Path) -> None:
    principals = [Principal(tenant=f"t{i}") for i in range(ROW_GROUP_ROWS * 2 + 1)]
    write_records(tmp_path / "p", principals, Principal)
    groups = pq.read_metadata(tmp_path / "p")
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 1]


@pytest.mark.parametrize("count", [0, 1, ROW_GROUP_ROWS + 1])
def test_vectors_keep_every_bit(tmp_path: Path, count: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((count, 7)).astype(np.float32)
    ids = [str(number) for number in range(count)]
    write_embeddings(tmp_path / "v", ids, vectors)
    found = read_embeddings(tmp_path / "v")
    assert (found[0], found[1].shape, found[1].tobytes()) == (ids, (count, 7), vectors.tobytes())


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(UsageError, match=r"p.parquet does not exist"):
        read_records(path, Principal)
    write_records(path, [Principal(tenant="t")], Principal)
    with pytest.raises(UsageError, match="Document records"):
        read_records(path, Document)
    with pytest.raises(UsageError, match="has no column chunk, vector"):
        read_embeddings(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"p.parquet cannot be read") as caught:
        read_records(path, Principal)
    assert "\n" not in str(caught.value)
