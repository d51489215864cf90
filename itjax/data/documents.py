"""Files of JSON: a value a line, one list of all rows, or a Natural-Instructions task with its instances."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from itjax.data import places
from itjax.data.files import Bytes, stem
from itjax.data.places import BOM, Layout, Place, lines_of, places_at
from itjax.data.strict_json import LINE_END, RowError, parse, parts

DEFINITION = re.compile(rb'"Definition"\s*:')  # opens a Natural-Instructions task that is one JSON object


class Lines(Layout):
    """JSON Lines: a value a line; blank lines are no rows, and neither is the head of a Natural-Instructions file."""

    kind = "lines"

    def places(self) -> Iterator[np.ndarray]:
        start, line = self.facts["begin"], self.facts["line"]  # of the line that a block may have begun
        has_text = False  # so far
        for at in range(start, self.data.size, places.BLOCK):
            raw = self.data.read(at, min(places.BLOCK, self.data.size - at))
            ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == LINE_END)
            bounds = np.concatenate([[0], ends + 1, [len(raw)]])
            have_text = _have_text(raw, bounds)
            have_text[0] |= has_text
            starts = np.concatenate([[start], at + ends + 1])
            found = places_at(starts[:-1], line + np.arange(len(ends)), np.diff(starts))
            yield found[have_text[:-1]]
            start, line, has_text = int(starts[-1]), line + len(ends), bool(have_text[-1])
        if has_text:
            yield places_at([start], [line], [self.data.size - start])

    def decode(self, raw: bytes, place: Place) -> Any:
        return super().decode(raw.rstrip(b"\r\n"), place)


def _have_text(raw: bytes, bounds: np.ndarray) -> np.ndarray:
    """Whether the stretches between bounds hold more than spaces."""
    firsts = np.frombuffer(raw + b"\n", np.uint8)[bounds[:-1]]
    have_text = ~_IS_BLANK[firsts]
    for number in np.flatnonzero(~have_text).tolist():
        have_text[number] = bool(raw[bounds[number] : bounds[number + 1]].strip())
    return have_text


_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(b" \t\r\n\v\f")] = True


class Array(Layout):
    """A JSON document: a list of rows, or a Natural-Instructions task with its list of `Instances`."""

    kind = "array"

    def places(self) -> Iterator[np.ndarray]:
        spot = {name: self.facts[name] for name in ("start", "stop", "line")}
        for found in _told(self.data.origin, parts(self.data.read, **spot)):
            yield places_at(found.starts, found.lines, found.sizes)


def _told(name: str, found: Iterator[Any]) -> Iterator[Any]:
    """A fault of the whole document: its row cannot be left out, so it has no rows."""
    try:
        yield from found
    except RowError as error:
        line, _, reason = str(error).removeprefix("line ").partition(": ")
        raise ValueError(f"{name}:{line}: {reason}") from None


def look_at_object(data: Bytes, begin: int, line: int, *, longest: int) -> dict[str, Any]:
    """Fields of a task, and where its `Instances` are."""
    head: dict[str, Any] = {}
    rows = None
    members = _told(data.origin, parts(data.read, start=begin, stop=data.size, line=line))
    for start, size, at_line in ((int(s), int(n), int(i)) for found in members for s, n, i in zip(*found, strict=True)):
        try:
            key, value_start = _key(data.read(start, min(size, 4096)))
            if key == "Instances":
                rows = {"start": start + value_start, "stop": start + size, "line": at_line}
            elif size > longest:
                raise RowError(f"{key!r} is too long", "too long")
            else:
                head[key] = parse(data.read(start + value_start, size - value_start), start=start + value_start)
        except RowError as error:
            raise ValueError(f"{data.origin}:{at_line}: {error}") from None
    if rows is None or data.read(rows["start"], 1) != b"[":
        raise ValueError(
            f"{data.origin}:{line}: one object with keys {_few(sorted(head))} is not a list of rows; "
            "give a list, an object a line, or a task with Definition and Instances"
        )
    return {**rows, "task": _task({"task": stem(data.origin), **{key.lower(): value for key, value in head.items()}})}


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _key(raw: bytes) -> tuple[str, int]:
    """The key of a member, and how many bytes stand before its value."""
    text = raw.decode(errors="ignore")
    try:
        key, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        key, end = None, 0
    match = re.compile(r"\s*:\s*").match(text, end)
    if not isinstance(key, str) or match is None:
        raise RowError("not JSON: a key and ':' expected", "not JSON")
    return key, len(text[: match.end()].encode())


def _task(head: Mapping[str, Any]) -> dict[str, Any]:
    """What the heads of both kinds of Natural-Instructions files call by one name."""
    names = {"categories": "category", "positive examples": "positive_examples"}
    names |= {"negative examples": "negative_examples"}
    return {names.get(key, key): value for key, value in head.items()}


# ---------------------------------------------------------------------------------------------- what the head shows


def is_named_json(path: str) -> bool:
    return path.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson", ".json"))


def is_value(text: bytes) -> bool:
    """Whether the first line is JSON, or a bracket that opens a document."""
    line = text.partition(b"\n")[0].rstrip(b"\r, ")
    return line in (b"[", b"{", b"[{") or _parsed(line) is not None


def is_document(text: bytes, *, cut: bool) -> bool:
    """Whether a text that opens an object is one JSON value as a whole; else each line is one."""
    first_line, line_end, others = text.partition(b"\n")
    if not line_end and cut:  # the line goes on behind the head
        return DEFINITION.search(first_line) is not None
    row = _parsed(first_line)
    if isinstance(row, dict):
        return "Definition" in row and "Instances" in row
    second_line = others.lstrip().partition(b"\n")[0]
    is_broken_row = first_line.rstrip().endswith(b"}") or isinstance(_parsed(second_line), dict) or not second_line
    return not is_broken_row


def look_at_lines(data: Bytes, head: bytes, *, longest: int) -> dict[str, Any]:
    """Where lines of rows begin: behind a mark of the byte order, and behind the head of a Natural-Instructions file."""
    begin = len(BOM) if head.startswith(BOM) else 0
    end = head.find(b"\n", begin) + 1
    if b'"definition"' not in head[begin : end or len(head)]:
        return {"begin": begin, "line": 1}
    if not end and len(head) < data.size:
        end = next((len(line) for line in lines_of(data, 0, longest)), 0)
    task = _parsed(data.read(begin, (end or data.size) - begin))
    if not isinstance(task, dict) or task.get("type") != "task":
        return {"begin": begin, "line": 1}
    return {"begin": end or data.size, "line": 2, "task": _task(task)}


def _parsed(line: bytes) -> Any:
    try:
        return parse(line)
    except ValueError:
        return None
