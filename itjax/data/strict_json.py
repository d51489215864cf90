"""JSON read strictly: one value of a row, and where the values of a long document begin without reading it whole.

    document  [ {"a": 1},\\n  {"b": ","} ]
    parts       ^^^^^^^^      ^^^^^^^^^^       commas count only at the depth of the list and outside of texts

What is wrong with a value is a `RowError`: a message for a person, and a reason that can be counted and quotes no data.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

QUOTE, BACKSLASH, COMMA, LINE_END = b'"\\,\n'
BLOCK = 1 << 20
STEPS = np.zeros(256, np.int8)  # what a byte outside of texts does to the depth
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1
IS_SPACE = np.zeros(256, bool)
IS_SPACE[list(b" \t\r\n")] = True


class RowError(ValueError):
    """Why a row cannot be used. `reason` is the same for all rows with the same fault and holds nothing of the data."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


# ---------------------------------------------------------------------------------------------- one value


def parse(raw: bytes, *, start: int = 0) -> Any:
    """One JSON value: UTF-8, no NaN, no key twice, nothing after the end. `start` is where it stands in its file."""
    try:
        return _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        place = f"byte {start + error.start} of the file"
        raise RowError(f"not UTF-8 at {place}; save the file as UTF-8", "not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos + 1}", "not JSON") from None
    except RecursionError:
        raise RowError("nested too deeply", "nested too deeply") from None
    except RowError:
        raise
    except ValueError:  # int() of more digits than Python converts
        raise RowError("a number has too many digits; write it as a text", "a number has too many digits") from None


def _refuse_constant(name: str) -> Any:
    raise RowError(f"not JSON: {name} is not a number; use null or leave the field out", "NaN or Infinity")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"key {twice!r} stands twice; keep one", "a key stands twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


# ---------------------------------------------------------------------------------------------- parts of a document


class Parts(NamedTuple):
    """Elements of a list, or `"key": value` pairs of an object: where they begin (bytes), how long, on which line."""

    starts: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray


def parts(read: Callable[[int, int], bytes], *, start: int, stop: int, line: int) -> Iterator[Parts]:
    """The parts of the list or object between two places, whatever they hold, in the memory of one block.

    `read(start, size)` gives bytes. Raises RowError where brackets do not close or something follows them.
    """
    brackets = _Brackets(line)
    for at in range(start, stop, BLOCK):
        yield brackets.follow(read(at, min(BLOCK, stop - at)), at)
    if not brackets.closed:
        raise RowError(f"line {brackets.line}: not JSON: a bracket or a text is never closed", "not JSON")


class _Brackets:
    """What must be remembered from block to block to tell texts, depths and lines."""

    def __init__(self, line: int) -> None:
        self.line = line  # of the block's first byte
        self.in_text = False
        self.escapes = False  # the last byte is a backslash that escapes the next
        self.depth = 0
        self.closed = False
        self.awaits = False  # a part has begun and only spaces of it were seen
        self.open: tuple[int, int] | None = None  # a part whose end is not yet seen: its start and line
        self.count = 0

    def follow(self, raw: bytes, at: int) -> Parts:
        data = np.frombuffer(raw, np.uint8)
        ends_of_lines = np.flatnonzero(data == LINE_END)
        solid = np.flatnonzero(~IS_SPACE[data])
        edges, begins, ends = self._edges(data)
        behind = solid[np.searchsorted(solid, edges[-1], side="right") if len(edges) else 0 :]
        if self.closed and len(behind):
            line = self.line + np.searchsorted(ends_of_lines, behind[0])
            raise RowError(f"line {line}: not JSON: more text after the end", "not JSON")

        firsts = np.searchsorted(solid, edges[begins] + 1)
        if self.awaits and len(solid):
            firsts, self.awaits = np.concatenate([[0], firsts]), False
        if len(firsts) and firsts[-1] == len(solid):
            firsts, self.awaits = firsts[:-1], True
        starts = solid[firsts]
        lines = self.line + np.searchsorted(ends_of_lines, starts)
        starts = starts + at
        if self.open is not None:
            starts, lines = np.concatenate([[self.open[0]], starts]), np.concatenate([[self.open[1]], lines])
        stops = edges[ends] + at
        found = Parts(starts[: len(stops)], stops - starts[: len(stops)], lines[: len(stops)])
        self.open = (int(starts[-1]), int(lines[-1])) if len(starts) > len(stops) else None
        self.line += len(ends_of_lines)
        return self._checked(found)

    def _edges(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Brackets and commas of the outermost level; which of them begin a part, and which end one."""
        inside = self._inside_texts(data)
        marks = np.flatnonzero(((STEPS[data] != 0) | (data == COMMA)) & ~inside)
        steps = STEPS[data[marks]]
        depths = self.depth + np.cumsum(steps, dtype=np.int64)
        closing = np.flatnonzero((depths <= 0) & (steps < 0))
        if self.closed or len(closing):
            count = 0 if self.closed else closing[0] + 1
            marks, steps, depths = marks[:count], steps[:count], depths[:count]
            self.closed = True
        self.depth = int(depths[-1]) if len(depths) else self.depth
        outermost = np.where(steps < 0, depths == 0, depths == 1)
        steps = steps[outermost]
        return marks[outermost], steps >= 0, steps <= 0

    def _inside_texts(self, data: np.ndarray) -> np.ndarray:
        quotes = data == QUOTE
        if self.escapes and len(quotes):
            quotes[0] = False
        escaped = self._escaped(data)
        quotes[escaped] = False
        inside = ((np.cumsum(quotes, dtype=np.uint8) + self.in_text) & 1).astype(bool)  # 256 is even: it may wrap
        self.in_text = bool(inside[-1]) if len(inside) else self.in_text
        return inside

    def _escaped(self, data: np.ndarray) -> np.ndarray:
        """Places behind an odd number of backslashes."""
        is_backslash = data == BACKSLASH
        if self.escapes and len(data):
            is_backslash[0] = False
        bounds = np.flatnonzero(np.diff(is_backslash, prepend=False, append=False))
        starts, stops = bounds[::2], bounds[1::2]
        behind = stops[(stops - starts) % 2 == 1]
        self.escapes = bool(len(behind)) and int(behind[-1]) == len(data)
        return behind[:-1] if self.escapes else behind

    def _checked(self, found: Parts) -> Parts:
        """`[]` has no part; nothing before a comma or after one is a fault."""
        empty = np.flatnonzero(found.sizes == 0)
        self.count += len(found.sizes)
        if not len(empty):
            return found
        if self.count > 1 or not self.closed:
            raise RowError(f"line {found.lines[empty[0]]}: not JSON: a value is missing beside a comma", "not JSON")
        return Parts(*(column[:0] for column in found))
