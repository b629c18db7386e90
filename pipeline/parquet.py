"""records -> Parquet -> records: the same records give the same bytes.

Nested records become structs, tuples become lists, dictionaries become maps. The settings below are pinned, because
pyarrow's defaults may change between versions; nothing in a file tells when or where it was written.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Record

R = TypeVar("R", bound=Record)

ROW_GROUP_ROWS = 4096
_SCALARS = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def write_records(path: Path, records: Iterable[R], record: type[R]) -> int:
    """Write `records` in their order to `path`; returns how many. Raises OSError as the disk does."""
    schema = arrow_schema(record)
    rows = (item.model_dump() for item in records)
    return write_batches(path, (pa.RecordBatch.from_pylist(group, schema) for group in _groups(rows)), schema)


def read_records(path: Path, record: type[R]) -> list[R]:
    """Read the records of `path`. Raises UsageError when it is absent, damaged or holds other records."""
    try:
        rows = read_table(path).to_pylist(maps_as_pydicts="strict")
        return [record.model_validate(row) for row in rows]
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {field}: {first['msg']}", f"{record.__name__} records", "build it again") from None


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises UsageError when it is absent, damaged or lacks one of `columns`."""
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if missing:
                raise UsageError(f"{path} has no column {', '.join(missing)}", "", "build it again")
            return file.read(columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "a Parquet file", "run the step that writes it") from None
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "an undamaged Parquet file", "build it again") from None


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> int:
    """Write Arrow record batches, each as one row group, with pinned settings; returns the number of rows."""
    rows = 0
    with pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=False,
        store_schema=True,
    ) as writer:
        for batch in batches:
            writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
            rows += batch.num_rows
    return rows


def write_table(path: Path, table: pa.Table) -> int:
    """Write a table in row groups of ROW_GROUP_ROWS, independently of how it is chunked in memory."""
    whole = table.combine_chunks()
    batches = whole.to_batches(max_chunksize=ROW_GROUP_ROWS)
    return write_batches(path, batches, table.schema)


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The Arrow schema of a record type. Raises TypeError for a field type that has no form here."""
    return pa.schema([_field(name, info.annotation) for name, info in record.model_fields.items()])


def _field(name: str, annotation: Any) -> pa.Field:
    plain, nullable = _without_none(annotation)
    return pa.field(name, _type(plain), nullable=nullable)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in {Union, types.UnionType}:
        rest = [option for option in get_args(annotation) if option is not type(None)]
        if len(rest) == 1 and len(rest) < len(get_args(annotation)):
            return rest[0], True
    return annotation, False


def _type(annotation: Any) -> pa.DataType:
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


def _item(annotation: Any) -> tuple[pa.DataType, bool]:
    plain, nullable = _without_none(annotation)
    return _type(plain), nullable


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while group := list(islice(iterator, ROW_GROUP_ROWS)):
        yield group
