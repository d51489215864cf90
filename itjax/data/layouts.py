"""How a file holds its rows, recognised by looking: lines, a JSON list, a table of text, Parquet or ArrayRecord."""

from collections.abc import Iterable
from typing import Any

from itjax.data.binary import ARRAY_RECORD, PARQUET, ArrayRecord, Parquet, count_records
from itjax.data.cells import Cells, look_at_cells
from itjax.data.documents import Array, Lines, is_document, is_named_json, is_value, look_at_lines, look_at_object
from itjax.data.files import Bytes
from itjax.data.places import BOM, Layout, ending_of

HEAD = 1 << 20  # bytes that are looked at
LAYOUTS: dict[str, type[Layout]] = {layout.kind: layout for layout in (Lines, Array, Cells, Parquet, ArrayRecord)}


def look(data: Bytes, *, columns: Iterable[str], longest: int) -> tuple[str, dict[str, Any]]:
    """The kind of layout that a file has, and what has to be known to read it. Parquet is to be unpacked then."""
    head = data.read(0, min(HEAD, data.size))
    if head.startswith(PARQUET):
        return Parquet.kind, {}
    if head.startswith(ARRAY_RECORD):
        return ArrayRecord.kind, {"rows": count_records(data)}
    text = head.removeprefix(BOM).lstrip()
    begin = len(head) - len(text)
    line = 1 + head.count(b"\n", 0, begin)
    _check_text(text, data)
    is_json = text.startswith((b"{", b"["))
    if not is_json or (ending_of(data.origin) and not is_value(text)):
        facts = look_at_cells(head, data.origin, columns, whole=len(head) == data.size)
        if facts is not None:
            return Cells.kind, facts
    if text.startswith(b"["):
        return Array.kind, {"start": begin, "stop": data.size, "line": line}
    if is_json and is_document(text, cut=len(head) < data.size):
        return Array.kind, look_at_object(data, begin, line, longest=longest)
    if not is_json and not is_named_json(data.origin):
        raise ValueError(f"{data.origin}:1: neither JSON, CSV, TSV, Parquet nor ArrayRecord; look at its first line")
    return Lines.kind, look_at_lines(data, head, longest=longest)


def _check_text(text: bytes, data: Bytes) -> None:
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{data.origin}:1: this is UTF-16; save it as UTF-8")
    if not text and data.size <= HEAD:
        raise ValueError(f"{data.origin}: the file is empty; give a file with rows")
