"""A row on disk, addressable by number: files of conversations in the shapes people have them in.

JSON Lines, JSON arrays and Natural-Instructions task files, each also as .gz. A source knows where every row begins and
reads one row at a time; nothing is held in memory but the index. What is wrong with a row is said as `path:line: reason`.
"""

import gzip
import hashlib
import json
import math
import re
import string
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from itjax.base.records import Conversation, Message

BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20
LONGEST_ROW = 64 << 20  # bytes
MOST_UNPACKED = 200  # times the size of a .gz file, once that is more than a longest row
ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SHAPES = (
    '{"messages"}, {"instruction", "output"}, {"prompt", "completion"}, {"conversations"} or Natural-Instructions files'
)
DEFINITION = re.compile(rb'"Definition"\s*:')  # opens a Natural-Instructions task that is one JSON object
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


class RowSource(Protocol):
    """Rows in a fixed order, each a conversation; the same wherever it is unpickled."""

    name: str

    def __len__(self) -> int: ...
    def conversation(self, index: int) -> Conversation: ...
    def fingerprint(self) -> str:
        """Changes when any row does."""


# ---------------------------------------------------------------------------------------------- files of rows


@dataclass(frozen=True)
class Rows:
    """Where the rows of one file begin (bytes), how long they are and on which line they stand."""

    path: Path
    starts: array
    sizes: array
    lines: array
    task: Mapping[str, Any] | None  # the head of a Natural-Instructions file
    digest: str


class FileSource:
    """Rows of one or more files that belong together (shards), in order."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = [_index(path) for path in paths]
        self._ends = np.cumsum([len(file.starts) for file in self._files])
        self._unpacked: dict[int, IO[bytes]] = {}
        if not len(self):
            raise ValueError(f"{', '.join(map(str, paths))}: there are no rows in it; give a file with rows")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": {}}

    def close(self) -> None:
        """Lets go of the unpacked copy of a packed file; reading makes it again."""
        for file in self.__dict__.get("_unpacked", {}).values():
            file.close()
        self._unpacked = {}

    __del__ = close

    def __len__(self) -> int:
        return int(self._ends[-1])

    def conversation(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[number]
        row = index - int(self._ends[number]) + len(file.starts)
        key = f"{file.path}:{file.lines[row]}"
        try:
            parsed = parse(self._read(number, row))
            return _instance(parsed, file.task, self.name, key) if file.task else _conversation(parsed, self.name, key)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

    def fingerprint(self) -> str:
        contents = [f"{file.path.name} {file.digest}" for file in self._files]
        return hashlib.sha256("\n".join(["file source 1", self.name, *contents]).encode()).hexdigest()

    def _read(self, number: int, row: int) -> bytes:
        file = self._files[number]
        start, size = file.starts[row], file.sizes[row]
        if _is_packed(file.path):
            if number not in self._unpacked:
                self.close()  # one copy at a time
                self._unpacked[number] = _open(file.path)
            raw = _slice(self._unpacked[number], start, size)
        else:  # opened for each row: thousands of sources do not hold thousands of open files
            with file.path.open("rb", buffering=0) as opened:
                raw = _slice(opened, start, size)
        if len(raw) < size:
            raise ValueError("the file became shorter while it was in use; start again")
        return raw


class Subset:
    """Some rows of a source, in the given order."""

    def __init__(self, source: RowSource, indices: Sequence[int] | np.ndarray, name: str | None = None) -> None:
        self.name = source.name if name is None else name
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def conversation(self, index: int) -> Conversation:
        return self._source.conversation(int(self._indices[index]))

    def fingerprint(self) -> str:
        parts = f"subset 1\n{self.name}\n{self._source.fingerprint()}\n".encode()
        return hashlib.sha256(parts + self._indices.astype("<i8").tobytes()).hexdigest()


def hold_out(source: RowSource, *, examples: int, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Rows to train on and rows to test on: at most `examples` and at most `fraction` of the source, chosen by `seed`.

    A row's lot depends on its number and the seed alone, so rows appended later move few others.
    """
    num_held = min(examples, math.floor(fraction * len(source)))
    held = np.zeros(len(source), dtype=bool)
    held[np.argsort(_lots(len(source), seed), kind="stable")[:num_held]] = True
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def _lots(count: int, seed: int) -> np.ndarray:
    """One pseudo-random number per row (SplitMix64, https://prng.di.unimi.it/splitmix64.c), the same everywhere."""
    start = int.from_bytes(hashlib.sha256(f"hold out {seed}".encode()).digest()[:8])
    x = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------- which files


def open_files(patterns: str) -> list[FileSource]:
    """One source per file, or per set of shards, of all the files that comma-separated globs and directories name."""
    paths: dict[Path, None] = {}
    for pattern in filter(None, (pattern.strip() for pattern in patterns.split(","))):
        found = list(_find(pattern))
        if not found:
            raise ValueError(f"files: nothing matches {pattern!r}; check the path (endings read: {', '.join(ENDINGS)})")
        paths.update(dict.fromkeys(found))
    if not paths:
        raise ValueError(f"files: {patterns!r} names no file; give globs or directories separated by commas")
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.parent / SHARD.sub("", _stem(path)), []).append(path)
    names = _names(list(groups))
    return [FileSource(group, name) for name, group in zip(names, groups.values(), strict=True)]


def _find(pattern: str) -> Iterator[Path]:
    exact = Path(pattern).expanduser()
    for path in [exact] if exact.exists() else map(Path, sorted(glob(str(exact), recursive=True))):
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path}: not a regular file; give files that can be read more than once")


def _stem(path: Path) -> str:
    ending = next((e for e in sorted(ENDINGS, key=len, reverse=True) if path.name.endswith(e)), path.suffix)
    return path.name.removesuffix(ending) or path.name


def _names(groups: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `alpaca`, or `en-alpaca` and `de-alpaca`."""
    for depth in range(1, max(len(group.parts) for group in groups) + 1):
        names = ["-".join(part.strip("/") for part in group.parts[-depth:]) for group in groups]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, start=1)]


# ---------------------------------------------------------------------------------------------- where rows begin


def _index(path: Path) -> Rows:
    """Looks at a file, finds its rows and checks that it is text."""
    with _open(path) as file:
        head = file.read(BLOCK)
        _check_head(head, path)
        return _index_document(file, path) if _is_document(head) else _index_lines(file, path)


def _check_head(head: bytes, path: Path) -> None:
    if not head.strip():
        raise ValueError(f"{path}: the file is empty; give a file with rows")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}:1: this is UTF-16; save it as UTF-8")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}:1: this is gzip; give it a name that ends in .gz")


def _is_document(head: bytes) -> bool:
    """Whether the whole file is one JSON value; else each line is one."""
    text = head.removeprefix(BOM).lstrip()
    first_line, line_end, _ = text.partition(b"\n")
    if text.startswith(b"[") or not text.startswith(b"{"):
        return text.startswith(b"[")
    if not line_end and len(head) == BLOCK:  # the line goes on
        return DEFINITION.search(first_line) is not None
    try:
        row = json.loads(first_line)
    except (ValueError, RecursionError):
        return not first_line.rstrip().endswith(b"}")  # the opening of a document, or a broken row
    return "Definition" in row and "Instances" in row


def _index_lines(file: IO[bytes], path: Path) -> Rows:
    starts, sizes, lines = array("q"), array("q"), array("q")
    digest = hashlib.sha256()
    file.seek(0)
    position, task = 0, None
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), start=1):
        if len(line) > LONGEST_ROW:
            raise ValueError(f"{path}:{number}: the row is longer than {LONGEST_ROW >> 20} MiB; split it")
        digest.update(line)
        if number == 1:
            bom = len(BOM) if line.startswith(BOM) else 0
            task = _task_head(line[bom:])
            start, line = position + bom, line[bom:]
        else:
            start = position
        if line.strip() and not (number == 1 and task):
            starts.append(start)
            sizes.append(len(line.rstrip(b"\r\n")))
            lines.append(number)
        position = start + len(line)
    return Rows(path, starts, sizes, lines, task, digest.hexdigest())


def _task_head(line: bytes) -> Mapping[str, Any] | None:
    """The task when the first line opens a Natural-Instructions file."""
    if b'"definition"' not in line:
        return None
    try:
        row = parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.get("type") == "task" else None


def _index_document(file: IO[bytes], path: Path) -> Rows:
    """A JSON array of rows, or a Natural-Instructions task with its `Instances`, read once to find where rows begin."""
    file.seek(0)
    raw = file.read()
    text = _decode(raw, path)
    scan = _Scan(text, path)
    scan.skip_space()
    task = None
    if text[scan.at : scan.at + 1] == "[":
        rows = list(scan.items())
    else:
        head, rows = scan.task()
        task = {"task": _stem(path), "definition": head.get("Definition"), "category": head.get("Categories")}
    scan.end()
    starts, sizes, lines = array("q"), array("q"), array("q")
    seen, offset, line = 0, len(raw) - len(text.encode()), 1
    for start, end in rows:
        offset += len(text[seen:start].encode())
        line += text.count("\n", seen, start)
        size = len(text[start:end].encode())
        starts.append(offset)
        sizes.append(size)
        lines.append(line)
        offset, seen, line = offset + size, end, line + text.count("\n", start, end)
    return Rows(path, starts, sizes, lines, task, hashlib.sha256(raw).hexdigest())


class _Scan:
    """Walks over a JSON document and tells where its parts begin and end."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.at = text, path, 0

    def skip_space(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\n", "\r", "\t") and self.at < len(self.text):
            self.at += 1

    def take(self, character: str) -> bool:
        self.skip_space()
        found = self.text[self.at : self.at + 1] == character
        self.at += found
        return found

    def value(self) -> Any:
        self.skip_space()
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.at = error.pos
            raise self.error(f"not JSON: {error.msg}") from None
        except RecursionError:
            raise self.error("nested too deeply") from None
        except ValueError as error:
            raise self.error(str(error)) from None
        return value

    def items(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each element of an array."""
        self.expect("[")
        if self.take("]"):
            return
        while True:
            self.skip_space()
            start = self.at
            self.value()
            yield start, self.at
            if self.take("]"):
                return
            self.expect(",")

    def task(self) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """The fields of an object, and the elements of its `Instances`."""
        head: dict[str, Any] = {}
        rows = None
        self.expect("{")
        while not self.take("}"):
            if head or rows is not None:
                self.expect(",")
            key = self.value()
            self.expect(":")
            if key == "Instances":
                rows = list(self.items())
            else:
                head[key] = self.value()
        if rows is None:
            self.at = 0
            raise self.error(f"one object with keys {sorted(head)} is not a list of rows; known: {SHAPES}")
        return head, rows

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise self.error(f"not JSON: {character!r} expected")

    def end(self) -> None:
        self.skip_space()
        if self.at < len(self.text):
            raise self.error("not JSON: more text after the end")

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}:{1 + self.text.count(chr(10), 0, self.at)}: {reason}")


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 at byte {error.start} of the file; save it as UTF-8") from None


def _is_packed(path: Path) -> bool:
    return path.name.endswith(".gz")


def _slice(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, to be read from any place. A packed file is unpacked into a nameless temporary file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not _is_packed(path):
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, returned open
    most = max(MOST_UNPACKED * path.stat().st_size, LONGEST_ROW)
    try:
        with gzip.open(path) as packed:
            while block := packed.read(BLOCK):
                unpacked.write(block)
                if unpacked.tell() > most:
                    raise ValueError(f"{path}: unpacks to over {MOST_UNPACKED} times its size; unpack it yourself")
    except (EOFError, OSError, zlib.error) as error:
        unpacked.close()
        raise ValueError(f"{path}: not a whole gzip file ({error}); pack it again") from None
    except ValueError:
        unpacked.close()
        raise
    unpacked.seek(0)
    return unpacked


# ---------------------------------------------------------------------------------------------- one row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name} is not a number; use null or leave the field out")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice; keep one")
    return row


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def parse(raw: bytes) -> Any:
    """One JSON value, strictly: UTF-8, no NaN, no key twice, nothing after the end."""
    try:
        return _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the row; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _conversation(row: Any, source: str, key: str) -> Conversation:
    """A conversation from a row in whichever of the known shapes it has."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is {_kind(row)}, not an object; known shapes: {SHAPES}")
    for template, (needed, read) in _READERS.items():
        if all(name in row for name in needed):
            messages = tuple(read(row))
            if not any(message.role == "assistant" for message in messages):
                raise ValueError("there is no assistant turn; each row needs an answer to learn")
            return Conversation(messages, source, key, template, _tags(row))
    raise ValueError(f"keys {sorted(row)} are none of the known shapes: {SHAPES}")


def _from_messages(row: Mapping[str, Any]) -> Iterator[Message]:
    for number, message in enumerate(_list(row, "messages"), start=1):
        try:
            yield _message(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"it is {_kind(message)}, not an object with role and content")
    role = _text(message, "role")
    if role not in ROLES:
        raise ValueError(f"role {role!r} is unknown; known: {', '.join(ROLES)}")
    calls = message.get("tool_calls") or ()
    return Message(
        role=role,
        content=_text(message, "content", default="" if calls else None),
        learn=_learn(message),
        name=_text(message, "name", default="") or None,
        tool_calls=tuple(calls),
        reasoning=_text(message, "reasoning_content", default="") or None,
    )


def _learn(message: Mapping[str, Any]) -> bool | float | None:
    learn = message.get("learn", message.get("loss_weight"))
    if learn is None or isinstance(learn, bool):
        return learn
    if isinstance(learn, (int, float)) and 0 <= learn < math.inf:
        return float(learn)
    raise ValueError(f"learn is {learn!r}; use true, false or a weight of at least 0")


def _from_instruction(row: Mapping[str, Any]) -> Iterator[Message]:
    yield from _system(row)
    for pair in row.get("history") or ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError("history is not a list of [question, answer]")
        yield Message("user", _whole(pair[0], "history"))
        yield Message("assistant", _whole(pair[1], "history"))
    instruction, given = _text(row, "instruction"), _text(row, "input", default="")
    yield Message("user", f"{instruction}\n\n{given}" if given else instruction)
    yield Message("assistant", _text(row, "output"))


def _from_prompt(row: Mapping[str, Any]) -> Iterator[Message]:
    yield from _system(row)
    yield Message("user", _text(row, "prompt"))
    yield Message("assistant", _text(row, "completion"))


def _from_sharegpt(row: Mapping[str, Any]) -> Iterator[Message]:
    yield from _system(row)
    for number, turn in enumerate(_list(row, "conversations"), start=1):
        try:
            if not isinstance(turn, dict):
                raise ValueError(f"it is {_kind(turn)}, not an object with from and value")
            speaker, value = _text(turn, "from"), _text(turn, "value")
            if speaker not in SHAREGPT_ROLES:
                raise ValueError(f"from {speaker!r} is unknown; known: {', '.join(SHAREGPT_ROLES)}")
            calls = _calls(value) if speaker == "function_call" else ()
            content = "" if calls else value
            yield Message(SHAREGPT_ROLES[speaker], content, learn=_learn(turn), tool_calls=calls)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None


def _calls(value: str) -> tuple[Mapping[str, Any], ...]:
    parsed = parse(value.encode())
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError("a function_call is not a JSON object with name and arguments")
    return tuple(calls)


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Iterator[Message]]]] = {
    "messages": (("messages",), _from_messages),
    "instruction": (("instruction", "output"), _from_instruction),
    "prompt": (("prompt", "completion"), _from_prompt),
    "sharegpt": (("conversations",), _from_sharegpt),
}


def _system(row: Mapping[str, Any]) -> Iterator[Message]:
    system = _text(row, "system", default="")
    if system:
        yield Message("system", system)


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    """Tools are kept with the conversation: a format that cannot write them has to say so."""
    tools = row.get("tools")
    if not tools or tools == "[]":
        return {}
    return {"tools": tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)}


def _instance(row: Any, task: Mapping[str, Any], source: str, key: str) -> Conversation:
    """A Natural-Instructions instance, in the words of the benchmark's definition-only encoding.

    https://github.com/yizhongw/Tk-Instruct/blob/main/src/ni_collator.py
    """
    if not isinstance(row, dict):
        raise ValueError(f"the instance is {_kind(row)}, not an object with input and output")
    outputs = row.get("output")
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or not outputs or not all(isinstance(text, str) for text in outputs):
        raise ValueError("output is not a text or a list of texts")
    definition = task.get("definition")
    definition = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(definition, str):
        raise ValueError("the task has no definition; give it one in the file's head")
    asked = (
        f"Definition: {_sentence(_whole(definition, 'definition'))}\n\n"
        f"Now complete the following example -\nInput: {_sentence(_text(row, 'input'))}\nOutput: "
    )
    tags = {
        "task": str(task.get("task", source)),
        "category": ", ".join(task.get("category") or ()),
        "id": str(row.get("id", "")),
        "references": json.dumps(outputs, ensure_ascii=False),
    }
    answer = Message("assistant", _whole(outputs[0], "output"))
    return Conversation(
        (Message("user", asked), answer),
        source,
        key,
        "natural_instructions/definition",
        {k: v for k, v in tags.items() if v},
    )


def _sentence(text: str) -> str:
    """The text without space around it, with a full stop unless punctuation ends it already."""
    text = text.strip()
    return text if text and text[-1] in string.punctuation else text + "."


def _text(row: Mapping[str, Any], name: str, *, default: str | None = None) -> str:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not a text" if name in row else f"{name} is missing")
    return _whole(value, name)


def _whole(text: str, name: str) -> str:
    """The text, if it is made of whole characters: JSON can spell half of a surrogate pair."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds a lone surrogate {text[error.start]!r} at character {error.start}"
            ) from None
    return text


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {_kind(value)}, not a list of turns" if value != [] else f"{name} is empty")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
