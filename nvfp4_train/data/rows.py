"""The rows of one local file, each cut down to the columns that are asked for.

A text file is one row with the column `text`. Of every other format only the named columns are looked at, so files whose other
columns differ lie side by side. A name with dots, `a.b`, that is no column itself reaches into the nested value `a`.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nvfp4_train.data.file_bytes import BYTE_ORDER_MARK, ReadError, decode, opened, read_text

Columns = Mapping[str, Literal["text", "json", "beside", "place"]]
"""What is read, by column: the text of strings, or the JSON text of values of any type.

That of columns `beside` is read where one of these is there. A column of places, which has a name that the data has not, says where
each row stands, for errors about it.
"""
Row = dict[str, str | None]

MISSING = object()

_COLUMNAR = ("parquet", "arrow")
_ARROW_BATCH_ROWS = 256
_JSON_CHUNK_CHARS = 1 << 20
_CSV_FIELD_CHARS = (1 << 31) - 1


def read_rows(file: str, kind: str, columns: Columns) -> Iterator[Row]:
    """One row per row of `file`, in its order: a text file's own text, and of a table the columns asked for.

    A value that is null or not there is None. Raises ReadError, with the file and where there is one the row, for what is not readable,
    for a text column that holds something else than strings, and for a file that has none of the columns.
    """
    is_found, names = False, dict[str, None]()
    for number, row in _numbered_rows(file, kind, columns):
        if not is_found:
            is_found = any(lookup(row, name) is not MISSING for name in sought(columns))
            names.update(dict.fromkeys(row))
        yield converted(row, columns, number, file, is_columnar=kind in _COLUMNAR)
    if names and not is_found:
        raise ReadError(f"{file} has the columns {list(names)}; {wanted(columns)}")


def wanted(columns: Columns) -> str:
    """What was asked for, as the end of an error."""
    texts = [name for name, how in columns.items() if how == "text"]
    if texts:
        return f"got data.text_column={texts[0]!r}"
    return f"none of them is {' or '.join(map(repr, sought(columns)))}"


def sought(columns: Columns) -> list[str]:
    """The columns of which a row, and a file, must have one."""
    return [name for name, how in columns.items() if how in ("text", "json")]


def first_columns(file: str, kind: str) -> list[str]:
    """The names of the columns of `file`: those of its schema or header, or of its first hundred rows, or of those before a bad one."""
    names: dict[str, None] = {}
    try:
        for _, row in islice(_numbered_rows(file, kind, {}), 100):
            names.update(dict.fromkeys(row))
    except ReadError:
        # It may lie behind what is read at all.
        if not names:
            raise
    return list(names)


def has_any(file: str, kind: str, columns: Columns) -> bool:
    """Whether one of the first hundred rows of `file` has one of the columns. Raises ReadError where they are not readable."""
    rows = islice(_numbered_rows(file, kind, columns), 100)
    return any(lookup(row, name) is not MISSING for _, row in rows for name in sought(columns))


def check_columns(schema: pa.Schema, columns: Columns, place: str) -> tuple[list[str], list[str]]:
    """(the columns asked for that are there, the columns of `schema` that they are or lie in).

    Raises ReadError where there is none, or a text column does not hold strings; `place` says of what the schema is.
    """
    types = {name: found for name in columns if (found := _arrow_type(schema, name)) is not None}
    if not any(name in types for name in sought(columns)):
        raise ReadError(f"{place} has the columns {schema.names}; {wanted(columns)}")
    for name, found in types.items():
        if columns[name] == "text" and not _is_text(found):
            hint = "; a name with a dot, 'column.field', reaches into it" if pa.types.is_struct(found) else ""
            raise ReadError(f"column {name!r} of {place} must hold strings; it holds {found}{hint}")
    heads = [head for head in schema.names if any(name == head or name.startswith(f"{head}.") for name in types)]
    return list(types), heads


def converted(row: Mapping[str, Any], columns: Columns, number: int, place: str, *, is_columnar: bool) -> Row:
    """The columns asked for of `row`, the row `number` of `place`; see `read_rows`.

    In JSON text of a columnar source nothing is null: there every value has the fields of all others.
    """
    return {name: _convert(row, name, how, number, place, is_columnar) for name, how in columns.items()}


def _convert(row: Mapping[str, Any], name: str, how: str, number: int, place: str, is_columnar: bool) -> str | None:
    if how == "place":
        return f"row {number} of {place}"
    value = lookup(row, name)
    if value is None or value is MISSING:
        return None
    if how in ("json", "beside"):
        if is_columnar:
            value = _without_null_fields(value)
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ReadError(f"column {name!r} in row {number} of {place} cannot be written as JSON: {error}") from error
    elif isinstance(value, str):
        text = value
    else:
        raise ReadError(
            f"column {name!r} in row {number} of {place} must hold a string; it holds {_described(value)}. data.text_column names "
            "the column of the text."
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # A byte of an array that is not UTF-8 was read as 0xDC00 plus the byte.
            code = ord(text[error.start])
            what = (
                f"the byte {code - 0xDC00:#04x}, which is not UTF-8"
                if code >= 0xDC80
                else f"U+{code:04X}, which is no character"
            )
            raise ReadError(f"column {name!r} in row {number} of {place} holds {what}") from error
    return text


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_fields(own) for key, own in value.items() if own is not None}
    return [_without_null_fields(own) for own in value] if isinstance(value, list) else value


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of the column `name`, or of the nested value that its dots lead to; MISSING where there is none."""
    if name in row:
        return row[name]
    for head, value in row.items():
        if name.startswith(f"{head}."):
            if value is None:
                return None
            if isinstance(value, Mapping):
                return lookup(value, name[len(head) + 1 :])
    return MISSING


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return f"the truth value {value}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with the keys {list(value)[:10]}; a name with a dot, 'column.key', reaches into it"
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _numbered_rows(file: str, kind: str, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of the row, row), counted from 1. In files of lines it is the number of the line where the row begins."""
    if kind in ("text", "unknown"):
        text = read_text(file)
        if kind == "unknown" and "\0" in text:
            raise ReadError(f"{file} is not text: it has zero bytes, as files of other kinds have")
        yield 1, {"text": text}
        return
    with opened(file) as stream:
        if kind == "jsonl":
            yield from _json_lines(file, stream)
        elif kind == "json":
            yield from _json_document(file, stream, columns)
        elif kind in ("csv", "tsv"):
            yield from _table_lines(file, stream, "\t" if kind == "tsv" else ",")
        else:
            yield from _arrow_rows(file, kind, columns)


def _json_lines(file: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        line = line.strip()
        if not line:
            continue
        place = f"row {number} of {file}"
        try:
            row = json.loads(decode(line, place))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ReadError(f"{place} is not JSON: {error}") from error
        yield number, _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ReadError(f"{place} must be a JSON object; it is {_described(row)}")
    return row


def _json_document(file: str, stream: Any, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .json file: an array of objects, one object per line, or one object, whose only list of objects may be the rows."""
    if stream.peek(_JSON_CHUNK_CHARS).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        # A byte that is not UTF-8 becomes half of a surrogate pair, and an error in the row where it stands.
        yield from _json_array(file, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        return
    first = _through_a_line_with_content(stream)
    decode(first, f"row 1 of {file}")
    more = b""
    try:
        json.loads(first)
        more = _through_a_line_with_content(stream)
    except json.JSONDecodeError:
        # An object that goes over several lines.
        first += stream.read()
    if more.strip():
        yield from _json_lines(file, chain(io.BytesIO(first + more), stream))
        return
    first = first.removeprefix(BYTE_ORDER_MARK)
    if not first.strip():
        return
    try:
        whole = _object(json.loads(decode(first, file)), file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ReadError(f"{file} is not JSON: {error}") from error
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    has_rows = len(lists) == 1 and not any(lookup(whole, name) is not MISSING for name in sought(columns))
    if not has_rows or not columns:
        yield 1, whole
    if has_rows:
        yield from ((number, _object(row, f"row {number} of {file}")) for number, row in enumerate(lists[0], 1))


def _through_a_line_with_content(stream: Any) -> bytes:
    content = b""
    while not content.strip() and (line := stream.readline()):
        content += line
    return content


def _json_array(file: str, stream: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any]]]:
    """The elements of one array of any size: only the piece that is being read is in memory."""
    parse, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    buffer = stream.read(_JSON_CHUNK_CHARS)
    at, number = buffer.index("[") + 1, 0
    while True:
        try:
            start = blank.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer.startswith("]", start):
                break
            if number:
                if not buffer.startswith(",", start):
                    raise json.JSONDecodeError("Expecting ',' or ']'", buffer, start)
                start = blank.match(buffer, start + 1).end()  # type: ignore[union-attr]
            row, at = parse(buffer, start)
        except json.JSONDecodeError as error:
            # An error at the end of what was read may be gone with more of the file; the longest literal is -Infinity.
            may_go_on = error.pos >= len(buffer) - len("-Infinity") or error.msg.startswith("Unterminated")
            if may_go_on and (more := stream.read(max(_JSON_CHUNK_CHARS, len(buffer) - at))):
                buffer, at = buffer[at:] + more, 0
                continue
            raise ReadError(f"row {number + 1} of {file} is not JSON: {error.msg}") from error
        except RecursionError as error:
            raise ReadError(f"row {number + 1} of {file} is not JSON: {error}") from error
        number += 1
        yield number, _object(row, f"row {number} of {file}")
    if (buffer[start + 1 :] + stream.read(_JSON_CHUNK_CHARS)).strip():
        raise ReadError(f"{file} goes on after the end of its array; one array, or one object per line, makes a file")


def _table_lines(file: str, stream: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_CSV_FIELD_CHARS)
    lines = (
        decode(line if number > 1 else line.removeprefix(BYTE_ORDER_MARK), f"row {number} of {file}")
        for number, line in enumerate(stream, 1)
    )
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin, header = 1, None
    try:
        for fields in reader:
            begin, number = reader.line_num + 1, begin
            if header is None:
                header = fields
            elif len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            elif fields:
                raise ReadError(f"row {number} of {file} has {len(fields)} fields; its header has {len(header)}")
    except csv.Error as error:
        raise ReadError(f"row {begin} of {file} is not {'TSV' if delimiter == chr(9) else 'CSV'}: {error}") from error


def _arrow_rows(file: str, kind: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, or of a file that `Dataset.save_to_disk` wrote. Only the columns asked for are read."""
    try:
        with pa.OSFile(file) as source:
            reader: Any = pq.ParquetFile(source) if kind == "parquet" else pa.ipc.open_stream(source)
            schema = reader.schema_arrow if kind == "parquet" else reader.schema
            if not columns:
                yield 1, dict.fromkeys(schema.names)
                return
            present, heads = check_columns(schema, columns, file)
            if kind == "parquet":
                batches = reader.iter_batches(_ARROW_BATCH_ROWS, columns=present)
            else:
                batches = (batch.select(heads) for batch in reader)
            number = 1
            for batch in batches:
                for start in range(0, batch.num_rows, _ARROW_BATCH_ROWS):
                    rows = batch.slice(start, _ARROW_BATCH_ROWS)
                    yield from enumerate(_as_dicts(rows, number, file), number)
                    number += rows.num_rows
    except pa.ArrowException as error:
        raise ReadError(f"{file} is not readable as {kind}: {error}") from error


def _arrow_type(fields: pa.Schema | pa.StructType, name: str) -> pa.DataType | None:
    """The type of the column `name`, or of the field that its dots lead to; None where there is none."""
    names = fields.names
    if name in names:
        return fields.field(name).type
    for head in names:
        if name.startswith(f"{head}.") and pa.types.is_struct(inner := fields.field(head).type):
            return _arrow_type(inner, name[len(head) + 1 :])
    return None


def _is_text(of: pa.DataType) -> bool:
    if pa.types.is_dictionary(of):
        of = of.value_type
    is_any = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_one(of) for is_one in is_any)


def _as_dicts(rows: pa.RecordBatch, number: int, file: str) -> list[dict[str, Any]]:
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        for i in range(rows.num_rows):
            try:
                rows.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise ReadError(f"row {number + i} of {file} is not UTF-8 text: {error}") from error
        raise
