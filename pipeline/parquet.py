"""records -> Parquet -> records: the same records give the same bytes.

Nested records become structs, tuples become lists, dictionaries become maps. The settings below are pinned, because
pyarrow's defaults may change between versions; nothing in a file tells when or where it was written.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Record

R = TypeVar("R", bound=Record)

ROW_GROUP_ROWS = 4096
_SCALARS: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def write_records(path: Path, records: Iterable[R], record: type[R]) -> int:
    """Write `records` in their order to `path`; returns how many. Raises OSError as the disk does."""
    schema = arrow_schema(record)
    groups = (to_table(group, record) for group in _groups(records))
    return write_batches(path, (batch for table in groups for batch in table.to_batches()), schema)


def read_records(path: Path, record: type[R], rows: Sequence[int] | None = None) -> list[R]:
    """Read the records of `path`, or of some rows. Raises UsageError when it is absent, damaged or holds others."""
    try:
        table = read_table(path)
        if rows is not None:  # not by `take`: an Arrow array of Python numbers makes pyarrow import pandas, a second
            table = pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in rows)])
        return from_table(table, record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {field}: {first['msg']}", f"{record.__name__} records", "build it again") from None


def to_table(records: Sequence[R], record: type[R]) -> pa.Table:
    """The records as a table in memory, one row each."""
    return pa.Table.from_pylist([item.model_dump() for item in records], arrow_schema(record))


def from_table(table: pa.Table, record: type[R]) -> list[R]:
    """The rows of a table as records. Raises pydantic.ValidationError for a row that is none."""
    return [record.model_validate(row) for row in table.to_pylist(maps_as_pydicts="strict")]


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises UsageError when it is absent, damaged or lacks one of `columns`."""
    with _opened(path) as file:
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise UsageError(f"{path} has no column {', '.join(missing)}", "", "build it again")
        return file.read(columns=None if columns is None else list(columns))


def read_schema(path: Path) -> pa.Schema:
    """Read the Arrow schema of a Parquet file. Raises UsageError when it is absent or damaged."""
    with _opened(path) as file:
        return file.schema_arrow


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            yield file
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "a Parquet file", "run the step that writes it") from None
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "an undamaged Parquet file", "build it again") from None


def write_batches(path: Path | BinaryIO, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> int:
    """Write Arrow record batches, each as one row group, with pinned settings; returns the number of rows."""
    rows = 0
    with pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
        write_statistics=False,
        store_schema=True,
    ) as writer:
        for batch in batches:
            writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
            rows += batch.num_rows
    return rows


def write_table(path: Path | BinaryIO, table: pa.Table) -> int:
    """Write a table in row groups of ROW_GROUP_ROWS, independently of how it is chunked in memory."""
    whole = table.combine_chunks()
    batches = whole.to_batches(max_chunksize=ROW_GROUP_ROWS)
    return write_batches(path, batches, table.schema)


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The Arrow schema of a record type. Raises TypeError for a field type that has no form here."""
    return pa.schema([_field(name, info.annotation) for name, info in record.model_fields.items()])


def _field(name: str, annotation: object) -> pa.Field:
    plain, nullable = _without_none(annotation)
    return pa.field(name, _type(plain), nullable=nullable)


def _without_none(annotation: object) -> tuple[object, bool]:
    if get_origin(annotation) in {Union, types.UnionType}:
        rest = [option for option in get_args(annotation) if option is not type(None)]
        if len(rest) == 1 and len(rest) < len(get_args(annotation)):
            return rest[0], True
    return annotation, False


def _type(annotation: object) -> pa.DataType:
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return pa.struct([_field(name, info.annotation) for name, info in annotation.model_fields.items()])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal and all(isinstance(option, str) for option in arguments):
        return pa.string()
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return pa.list_(pa.field("item", *_item(arguments[0])))
    if origin is dict and arguments[0] is str:
        return pa.map_(pa.string(), pa.field("value", *_item(arguments[1])))
    raise TypeError(f"no Parquet form for {annotation}")


def _item(annotation: object) -> tuple[pa.DataType, bool]:
    plain, nullable = _without_none(annotation)
    return _type(plain), nullable


def _groups(records: Iterable[R]) -> Iterator[list[R]]:
    iterator = iter(records)
    while group := list(islice(iterator, ROW_GROUP_ROWS)):
        yield group


def write_embeddings(path: Path, ids: Sequence[str], vectors: np.ndarray) -> int:
    """Write columns `chunk` (its id) and `vector` (fixed-size list of float32); `vectors` is (n, dimension) float32."""
    return write_table(path, vector_table("chunk", ids, vectors))


def read_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Read what `write_embeddings` wrote: chunk ids and their vectors, (n, dimension) float32, in file order.

    Raises UsageError when the file is absent, damaged or holds something else.
    """
    table = read_table(path, ["chunk", "vector"])
    return table.column("chunk").to_pylist(), vectors_of(table, path)


def vector_table(key: str, names: Sequence[str], vectors: np.ndarray) -> pa.Table:
    """A table of names in column `key` and their vectors, (n, dimension) float32, in column `vector`."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel(), pa.float32())
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    schema = pa.schema(
        [
            pa.field(key, pa.string(), nullable=False),
            pa.field(
                "vector", pa.list_(pa.field("item", pa.float32(), nullable=False), vectors.shape[1]), nullable=False
            ),
        ]
    )
    return pa.table([pa.array(names, pa.string()), column.cast(schema.field("vector").type)], schema=schema)


def vectors_of(table: pa.Table, path: Path) -> np.ndarray:
    """The `vector` column as (n, dimension) float32. Raises UsageError, naming `path`, for another type."""
    kind = table.schema.field("vector").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        raise UsageError(f"{path}: column vector is {kind}", "a fixed-size list of float32", "build it again")
    values = table.column("vector").combine_chunks().flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(table.num_rows, kind.list_size)
