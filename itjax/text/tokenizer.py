"""Text to token ids and back, and the tokenizer one can make from one's own text.

Two promises everything above relies on: text from data never becomes a control token, and a tokenizer made by `train`
gives back exactly the text it was given. What a tokenizer of others changes in text is said once, when it is opened.
"""

import hashlib
import io
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from itjax.text import spm

log = logging.getLogger(__name__)

FOLDER_FILES = ("tokenizer.json", "tokenizer.model")  # of a model's folder, the first that is there
NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"  # of a SentencePiece model, behind its bytes: add_dummy_prefix = false
SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside pieces; it decodes as a space wherever it stands
UNKNOWN_MARK = "\u2585"  # SentencePiece's own sign for unknown text
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
WHOLE = ("\n", "\t")  # always a token of their own, so that no word is learned together with a line break
NUM_BYTES = 256
BUDGET = 32_000_000  # characters that are counted in full; of every further stretch as long, half as many texts
MARKS = "!-/:-@\\[-`{-~"  # ASCII punctuation, as ranges of a character class
# Letters, digits and punctuation are words of their own, so that `58`, ` 58` and `58,` share the token of the number.
WORD = re.compile(
    f" ?[^ \n\t\0{SPACE_MARK}{UNKNOWN_MARK}0-9{MARKS}]{{1,64}}| ?[0-9]{{1,64}}| ?[{MARKS}]{{1,64}}| +(?= )| +"
)

CONTROL_NAME = re.compile(
    r"<\|[^<>\s]+\|>|<｜[^<>\s]+｜>|</?[A-Za-z][\w@:.-]*>|\[/?[A-Z][A-Z0-9_]*\]|\[control_\d+\]|\[@[A-Z]+@\]"
)
HTML_NAME = re.compile(
    r"</?(a|b|i|u|p|q|s|em|h[1-6]|li|ol|ul|td|th|tr|br|hr|sub|sup|div|span|code|pre|table|caption|thead|tbody|tfoot"
    r"|strong|blockquote)>"
)
ADDED = "added_tokens.json"
SPECIALS_MAP = "special_tokens_map.json"
CONFIG = "special_tokens"  # of a file of ours: what `tokenizer_config.json` says beside the published one
PROBES = (
    "Two words, 1 line.",
    "\ufb01\u2460\uff21",
    "a\tb\r\nc",
    " two  spaces ",
)  # what a tokenizer may not give back
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """What the rest of the code knows about a tokenizer."""

    model: bytes  # the file it was made from
    file_name: str  # what that file is called
    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    controls: Mapping[str, int]  # control tokens by their text
    space_before: str  # whether it sets a space before text: "always", before the "first" text only, or "" for never

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """The ids of each text. One thread unless asked: who encodes much has processes of its own."""

    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that go on after other text: without a space that was not there."""

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        """Of each token of `encode(text)` the characters it stands for, from and until; None where nobody knows.

        A token that spells a part of a character has the whole character.
        """

    def decode(self, ids: Sequence[int]) -> str: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The same as bytes, also where they end inside a character."""

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to a text, wherever in it; nothing for control tokens."""

    def control(self, text: str) -> int | None:
        """The id of the control token with exactly this text."""

    def token(self, id: int) -> str: ...
    def fingerprint(self) -> str: ...


def open(path: str | Path) -> "SentencePiece | HuggingFace":
    """The tokenizer of a SentencePiece model, of a `tokenizer.json`, or of a model's folder that holds either."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise ValueError(
                f"{path}: there is no {' or '.join(FOLDER_FILES)} in this folder; name the tokenizer's file"
            )
        path = found[0]
    opened = HuggingFace(path) if _read(path).lstrip()[:1] == b"{" else SentencePiece(path)
    changed = changes(opened)
    if changed:
        said = "; ".join(f"{text!r} is read as {back!r}" for text, back in changed.items())
        log.warning("%s: this tokenizer does not give back its text: %s", path, said)
    return opened


def changes(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts that the tokenizer does not give back, and what it makes of them."""
    read = {text: tokenizer.decode(tokenizer.encode(text)) for text in PROBES}
    return {text: back for text, back in read.items() if text != back}


def with_tokens(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """The tokenizer with these control tokens as well. Their ids follow the last one, in the order of the names.

    Those that it has already stay as they are. An ordinary token of that name is an error: text is full of them.
    """
    new = [name for name in dict.fromkeys(names) if tokenizer.control(name) is None]
    if not new:
        return tokenizer
    for name in new:
        if not name or name != name.strip():
            raise ValueError(f"new_tokens: {name!r} is empty or has white space around it; give a name like <|tool|>")
        _utf8(name)
    if isinstance(tokenizer, HuggingFace):
        return tokenizer.grown(new)
    assert isinstance(tokenizer, SentencePiece)
    return tokenizer.grown(new)


class SentencePiece:
    """A SentencePiece model, from its file or its bytes.

    Pieces of the user's own definition that are written like control tokens (`<start_of_turn>`) are control tokens: the
    library would find them in any text, so such text is encoded in two halves.
    """

    file_name: str = "tokenizer.model"

    def __init__(self, model: str | Path | bytes) -> None:
        place = "tokenizer" if isinstance(model, bytes) else str(model)
        raw = model if isinstance(model, bytes) else _read(Path(model))
        self._pieces = _processor(raw, place)
        if not isinstance(model, bytes) and Path(model).name == self.file_name:
            raw = _as_declared(raw, Path(model).parent)
            self._pieces = _processor(raw, place)
        self.model = raw
        self.size: int = self._pieces.vocab_size()
        self.bos = _id_or_none(self._pieces.bos_id())
        self.eos = _id_or_none(self._pieces.eos_id())
        self.pad = _id_or_none(self._pieces.pad_id())
        self.unk = _id_or_none(self._pieces.unk_id())
        self.controls: Mapping[str, int] = {
            self._pieces.id_to_piece(id): id for id in range(self.size) if self._is_control(id)
        }
        self.space_before: str = "always" if self._pieces.encode(",", out_type=str)[0].startswith(SPACE_MARK) else ""
        own = [name for name, id in self.controls.items() if not self._pieces.is_control(id)]
        self._own_controls = _any_of(own) if own else None

    def __reduce__(self) -> tuple[type["SentencePiece"], tuple[bytes]]:
        return SentencePiece, (self.model,)

    def _is_control(self, id: int) -> bool:
        """Controls of the model, and whole pieces that are written like one."""
        if self._pieces.is_control(id):
            return True
        name = self._pieces.id_to_piece(id)
        return names_control(name) and self._pieces.encode(name)[-1:] == [id]

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """The ids of each text, as SentencePiece gives them; texts that hold a space mark stay exact."""
        ids = self._pieces.encode(_all_utf8(texts), num_threads=threads) if texts else []
        for number in self._number_of_cut(texts):
            ids[number] = [id for part, processor in self._parts(texts[number]) for id in _ids_of(part, processor)]
        return ids

    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.space_before:
            return self.encode_many(texts)
        ids = self._going_on.encode(_all_utf8(texts), num_threads=1) if texts else []
        for number in self._number_of_cut(texts):
            parts = self._parts(texts[number])
            ids[number] = [id for part, _ in parts for id in _ids_of(part, self._going_on)]
        return ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        if not any(True for _ in self._number_of_cut([text])):
            return _offsets(text, self._pieces)
        found, at = [], 0
        for part, processor in self._parts(text):
            places = [(0, 1)] * len(part) if isinstance(part, tuple) else _offsets(part, processor)
            found += [(at + start, at + stop) for start, stop in places]
            at += 1 if isinstance(part, tuple) else len(part)
        return found

    def _number_of_cut(self, texts: Sequence[str]) -> Iterator[int]:
        """Which texts the library cannot encode as one: they hold a space mark, or what it would take for a control."""
        if not self._is_cut("\0".join(texts)):  # most are not, and one look is faster than many
            return
        yield from (number for number, text in enumerate(texts) if self._is_cut(text))

    def _is_cut(self, text: str) -> bool:
        if self._space_mark_ids and not text.isascii() and SPACE_MARK in text:
            return True
        return self._own_controls is not None and self._own_controls.search(text) is not None

    def _parts(self, text: str) -> Iterator[tuple[str | tuple[int, ...], sentencepiece.SentencePieceProcessor]]:
        """Stretches of text that are encoded one by one, and the ids that spell a space mark between them."""
        stretches = [text] if self._own_controls is None else cut_inside(text, self._own_controls)
        processor = self._pieces
        for stretch in stretches:
            for number, part in enumerate(stretch.split(SPACE_MARK) if self._space_mark_ids else [stretch]):
                if number:
                    yield self._space_mark_ids, processor
                if part:
                    yield part, processor
            processor = self._going_on

    @cached_property
    def _going_on(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model + NO_SPACE_BEFORE)

    @property
    def keeps_text(self) -> bool:
        """Whether any text comes back as it was."""
        return bool(self._space_mark_ids)

    @cached_property
    def _space_mark_ids(self) -> tuple[int, ...]:
        """Bytes that spell the space mark, for models that otherwise keep text as it is; else nothing."""
        ids = tuple(self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode())
        spelt_in_bytes = all(self._pieces.is_byte(id) for id in ids)
        adds_nothing = self._pieces.encode("\x01", out_type=str) == ["<0x01>"]  # a dummy prefix would show
        keeps_spaces = self._pieces.decode(self._pieces.encode(" \x01  \x01 ")) == " \x01  \x01 "
        return ids if spelt_in_bytes and adds_nothing and keeps_spaces else ()

    def grown(self, names: Sequence[str]) -> "SentencePiece":
        """This model with further control tokens."""
        for name in names:
            if self._pieces.piece_to_id(name) != self.unk or name == self._pieces.id_to_piece(self.unk or 0):
                raise ValueError(f"new_tokens: {name!r} is an ordinary token already; choose another name")
        changed = {self.size + number: (name, spm.CONTROL) for number, name in enumerate(names)}
        return SentencePiece(spm.with_pieces(self.model, changed))

    def decode(self, ids: Sequence[int]) -> str:
        """The text; control tokens are silent, bytes that are not UTF-8 become U+FFFD."""
        return self._pieces.decode([int(id) for id in ids if int(id) not in self._shown])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        table = self._token_bytes
        shown = [int(id) for id in ids if table[int(id)]]
        text = b"".join([table[id] for id in shown])
        if not shown or self._facts.pieces[shown[0]].kind in (spm.BYTE, spm.UNKNOWN):
            return text  # only a piece begins with the space that is set before text
        if self._facts.squeezes:
            return text.lstrip(b" ")
        return text.removeprefix(b" ") if self._facts.dummy_prefix else text

    def token_bytes(self, id: int) -> bytes:
        return self._token_bytes[int(id)]

    @cached_property
    def _facts(self) -> spm.Model:
        return spm.read(self.model)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """What each token adds, by its id."""
        unknown = self._pieces.decode([self.unk]).encode() if self.unk is not None else b""
        silent = set(self.controls.values())
        found = []
        for id, (name, _, kind) in enumerate(self._facts.pieces):
            if kind == spm.BYTE:
                found.append(bytes([int(name[3:5], 16)]))
            elif kind == spm.UNKNOWN:
                found.append(unknown)
            else:
                found.append(b"" if id in silent else name.replace(SPACE_MARK, " ").encode())
        return found

    @cached_property
    def _shown(self) -> frozenset[int]:
        """Controls of the user's own definition, which the library would write as text."""
        return frozenset(id for id in self.controls.values() if not self._pieces.is_control(id))

    def control(self, text: str) -> int | None:
        return self.controls.get(text)

    def token(self, id: int) -> str:
        """The token as it is written in the vocabulary, with spaces as spaces."""
        return self._pieces.id_to_piece(int(id)).replace(SPACE_MARK, " ")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


class HuggingFace:
    """A `tokenizer.json` of the `tokenizers` library, with the names of its special tokens from the file beside it.

    Added tokens that are special, or written like control tokens (`<think>`), are control tokens. No text becomes one.
    """

    file_name: str = "tokenizer.json"

    def __init__(self, model: str | Path | bytes, config: Mapping[str, Any] | None = None) -> None:
        place = "tokenizer" if isinstance(model, bytes) else str(model)
        fields = _fields(model if isinstance(model, bytes) else _read(Path(model)), place)
        within = fields.pop(CONFIG, {})
        beside = {} if isinstance(model, bytes) else _config(Path(model).parent)
        self.config: Mapping[str, Any] = config if config is not None else beside or within
        self.model = json.dumps(fields | {CONFIG: self.config}, ensure_ascii=False).encode()  # one file holds both
        declared = [token for token in fields.get("added_tokens", []) if _is_control_token(token)]
        controls = {token["content"]: int(token["id"]) for token in declared} | _more_controls(self.config)
        vocabulary = fields.get("model", {}).get("vocab", {})
        vocabulary = (
            vocabulary if isinstance(vocabulary, dict) else {name: id for id, (name, _) in enumerate(vocabulary)}
        )
        for token in ("bos_token", "eos_token", "pad_token"):
            name = self.config.get(token)
            id = vocabulary.get(name) if isinstance(name, str) else None
            if isinstance(id, int):
                controls.setdefault(str(name), id)
        self.controls: Mapping[str, int] = controls
        added = [token | {"special": _is_control_token(token)} for token in fields.get("added_tokens", [])]
        plain = fields | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        self._begins = _load(plain, place)
        going_on = _without_prefix(plain)
        self._goes_on = self._begins if going_on == plain else _load(going_on, place)
        self.space_before: str = (
            "" if going_on == plain else ("first" if '"first"' in json.dumps(plain.get("pre_tokenizer")) else "always")
        )
        self._decoder = _load(fields | {"truncation": None, "padding": None}, place)
        self._by_id = {id: name for name, id in self.controls.items()}
        self._any_control = _any_of([*self.controls]) if self.controls else re.compile("(?!)")
        self.size = max([self._decoder.get_vocab_size(with_added_tokens=True), *(id + 1 for id in self._by_id)])
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        self.pad, self.unk = self._named("pad_token"), self._named("unk_token")
        self._never = frozenset(self._by_id) - {self.unk}

    def __reduce__(self) -> tuple[type["HuggingFace"], tuple[bytes]]:
        return HuggingFace, (self.model,)

    def _named(self, name: str) -> int | None:
        text = self.config.get(name)
        if not isinstance(text, str):
            return None
        return self.controls.get(text, self._decoder.token_to_id(text))

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """The ids of each text. More than one thread are as many as the library takes (`RAYON_NUM_THREADS`)."""
        return self._encode(texts, self._begins, threads)

    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self._goes_on, 1)

    def _encode(self, texts: Sequence[str], tokenizer: Any, threads: int) -> list[list[int]]:
        try:
            batches = [[text] for text in texts] if threads == 1 else [list(texts)]  # one text, one thread
            rows = (row for batch in batches for row in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
            encoded = [row.ids for row in rows]
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _utf8(text)
            raise
        for number, ids in enumerate(encoded):
            if not self._never.isdisjoint(ids):  # a vocabulary of whole words holds its control tokens' names
                encoded[number] = [id for row in self._cut(texts[number], tokenizer) for id in row.ids]
        return encoded

    def _cut(self, text: str, tokenizer: Any) -> list[Any]:
        """Encodings of the text's parts, none of which holds the name of a control token."""
        first, *others = cut_inside(text, self._any_control)
        going_on = self._goes_on.encode_batch(others, add_special_tokens=False)
        return [tokenizer.encode(first, add_special_tokens=False), *going_on]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        _utf8(text)
        whole = self._begins.encode(text, add_special_tokens=False)
        if self._never.isdisjoint(whole.ids):
            return whole.offsets
        found, at = [], 0
        parts = cut_inside(text, self._any_control)
        for part, encoding in zip(parts, self._cut(text, self._begins), strict=True):
            found += [(at + start, at + stop) for start, stop in encoding.offsets]
            at += len(part)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text; control tokens are silent, bytes that are not UTF-8 become U+FFFD."""
        return self._decoder.decode([int(id) for id in ids if int(id) not in self._by_id], skip_special_tokens=False)

    def control(self, text: str) -> int | None:
        return self.controls.get(text)

    def token(self, id: int) -> str:
        """The token as it is written in the vocabulary, with spaces as spaces."""
        if int(id) in self._by_id:
            return self._by_id[int(id)]
        piece = self._decoder.id_to_token(int(id)) or ""
        return piece.replace(SPACE_MARK, " ") if SPACE_MARK in piece else self._decoder.decode([int(id)]) or piece

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Byte for byte where the tokenizer spells text in bytes; otherwise the bytes of what it decodes."""
        if self._spelling is None:
            return self.decode(ids).encode()
        text = b"".join([self.token_bytes(id) for id in ids])
        return text.removeprefix(b" ") if self._spelling.strips else text

    def token_bytes(self, id: int) -> bytes:
        known = self._known_bytes.get(int(id))
        if known is None:
            known = self._known_bytes[int(id)] = self._bytes_of(int(id))
        return known

    def _bytes_of(self, id: int) -> bytes:
        if id in self._by_id:
            return b""
        piece = self._decoder.id_to_token(id) or ""
        if self._spelling is None:
            return (self._decoder.decode([id], skip_special_tokens=False)).encode()
        return piece.encode() if id in self._added else self._spelling.bytes_of(piece)

    @cached_property
    def _known_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _spelling(self) -> "_Spelling | None":
        return _Spelling.of(json.loads(self.model).get("decoder") or {})

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(int(token["id"]) for token in json.loads(self.model).get("added_tokens", []))

    def grown(self, names: Sequence[str]) -> "HuggingFace":
        """This tokenizer with further control tokens. Ids that nobody declared in between get names of their own."""
        fields = json.loads(self.model)
        added = list(fields.get("added_tokens", []))
        vocabulary = self._decoder.get_vocab(with_added_tokens=True)
        for name in names:
            if name in vocabulary:
                raise ValueError(f"new_tokens: {name!r} is an ordinary token already; choose another name")
        for id in range(len(vocabulary), self.size):
            added.append(_control_token(self._by_id.get(id, f"<|unused_{id}|>"), id))
        added += [_control_token(name, self.size + number) for number, name in enumerate(names)]
        return HuggingFace(json.dumps(fields | {"added_tokens": added}, ensure_ascii=False).encode(), self.config)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


class _Spelling:
    """How the pieces of a `tokenizer.json` spell bytes: `byte_level`, or with `<0xE2>` for single ones."""

    def __init__(self, *, byte_level: bool, space: str, strips: bool) -> None:
        self.byte_level, self.space, self.strips = byte_level, space, strips

    @classmethod
    def of(cls, decoder: Mapping[str, Any]) -> "_Spelling | None":
        """None for decoders that do more than to spell."""
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step.get("type")}
        if set(steps) == {"ByteLevel"}:
            return cls(byte_level=True, space="", strips=False)
        if "ByteFallback" not in steps and "Metaspace" not in steps:
            return None
        if not set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            return None
        replaces, metaspace, strip = steps.get("Replace", {}), steps.get("Metaspace", {}), steps.get("Strip", {})
        if replaces and (replaces["content"] != " " or "String" not in replaces["pattern"]):
            return None
        if strip and (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
            return None
        space = replaces["pattern"]["String"] if replaces else metaspace.get("replacement", "")
        strips = bool(strip) or metaspace.get("prepend_scheme", "never") != "never"
        return cls(byte_level=False, space=space or " ", strips=strips)

    def bytes_of(self, piece: str) -> bytes:
        if self.byte_level:
            spelt = [BYTE_LETTERS.get(letter) for letter in piece]
            return piece.encode() if None in spelt else bytes(byte for byte in spelt if byte is not None)
        if BYTE_NAME.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(self.space, " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies: itself where one can see it, others moved up."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(NUM_BYTES) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(NUM_BYTES + n): byte for n, byte in enumerate(moved)}


BYTE_LETTERS = _byte_letters()


def names_control(name: str) -> bool:
    """Whether a token is written like a control token: `<|end|>`, `<think>`, `[INST]`; not white space, not HTML."""
    return bool(CONTROL_NAME.fullmatch(name)) and not HTML_NAME.fullmatch(name) and not BYTE_NAME.fullmatch(name)


def cut_inside(text: str, controls: re.Pattern[str]) -> list[str]:
    """The text in parts, none of which holds a control token: each is cut behind its first character."""
    cuts = [match.start() + 1 for match in re.finditer(f"(?={controls.pattern})", text)]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))))


def _is_control_token(token: Mapping[str, Any]) -> bool:
    return bool(token.get("special")) or names_control(token["content"])


def _control_token(name: str, id: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": name, **plain, "special": True}


def _processor(model: bytes, place: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{place}: not a SentencePiece model ({error}); give a .model file") from None


def _ids_of(part: str | tuple[int, ...], processor: sentencepiece.SentencePieceProcessor) -> Sequence[int]:
    return processor.encode(_utf8(part)) if isinstance(part, str) else part


def _offsets(text: str, processor: sentencepiece.SentencePieceProcessor) -> list[tuple[int, int]]:
    """Characters of each token: the library counts bytes, and gives a spelt character to the last of its bytes."""
    spans = spm.spans(processor.encode(_utf8(text), out_type="serialized_proto"))
    found = [(start, stop) for _, start, stop in spans]
    for number in range(len(found) - 2, -1, -1):
        if found[number][0] == found[number][1] and processor.is_byte(spans[number][0]):
            found[number] = found[number + 1]
    if text.isascii():
        return found
    character_at, places = 0, {}
    for number, character in enumerate(text):
        places[character_at] = number
        character_at += len(character.encode())
    places[character_at] = len(text)
    return [(places[start], places[stop]) for start, stop in found]


def _as_declared(model: bytes, folder: Path) -> bytes:
    """The model with the tokens and roles that the files beside it declare: `added_tokens.json`, `tokenizer_config.json`.

    A chat model made from a SentencePiece model has its own tokens there, behind the last piece or in place of one.
    """
    config = _config(folder)
    declared = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    if (folder / ADDED).is_file():
        listed = _fields((folder / ADDED).read_bytes(), str(folder / ADDED))
        special = _names_of_specials(folder)
        declared = {int(id): {"content": name, "special": name in special} for name, id in listed.items()} | declared
    known = _processor(model, str(folder))
    changed = {}
    for id, token in declared.items():
        kind = spm.CONTROL if _is_control_token(token) else spm.USER_DEFINED
        name = token["content"] if kind == spm.CONTROL else token["content"].replace(" ", SPACE_MARK)
        if id < known.vocab_size() and known.id_to_piece(id) == name:
            continue
        if known.id_to_piece(known.piece_to_id(name)) == name:
            raise ValueError(
                f"{folder}: token {name!r} is declared as {id}, but is {known.piece_to_id(name)} in the model"
            )
        changed[id] = (name, kind)
    grown = spm.with_pieces(model, changed) if changed else model
    return spm.with_roles(grown, _changed_roles(config, _processor(grown, str(folder))))


def _names_of_specials(folder: Path) -> list[str]:
    """Special tokens without a role."""
    path = folder / SPECIALS_MAP
    listed = _fields(path.read_bytes(), str(path)).get("additional_special_tokens", []) if path.is_file() else []
    return [token["content"] if isinstance(token, dict) else token for token in listed]


def _changed_roles(config: Mapping[str, Any], known: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """Roles that control tokens have in the files, but not in the model."""
    ids = {"bos_token": known.bos_id(), "eos_token": known.eos_id(), "pad_token": known.pad_id()}
    wanted = {role: known.piece_to_id(config[role]) for role in ids if role in config}
    changed = {role: id for role, id in wanted.items() if id != ids[role] and known.is_control(id)}
    return {role: known.id_to_piece(id) for role, id in changed.items()}


def _config(folder: Path) -> dict[str, Any]:
    """Special tokens by their role, and tokens that are declared beside the tokenizer."""
    fields: dict[str, Any] = {}
    for name in (SPECIALS_MAP, "tokenizer_config.json"):
        if (folder / name).is_file():
            fields |= _fields((folder / name).read_bytes(), str(folder / name))
    roles = {name: fields.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in roles.items()}
    more = fields.get("added_tokens_decoder")
    if more and not _is_declaration(more):
        raise ValueError(
            f"{folder}: added_tokens_decoder: {str(more)[:80]}; it should be ids, and of each its content; give "
            "tokenizer_config.json as it was published"
        )
    found: dict[str, Any] = {name: text for name, text in texts.items() if isinstance(text, str)}
    return found | ({"added_tokens_decoder": more} if more else {})


def _is_declaration(more: Any) -> bool:
    return isinstance(more, dict) and all(
        id.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for id, token in more.items()
    )


def _more_controls(config: Mapping[str, Any]) -> dict[str, int]:
    declared = config.get("added_tokens_decoder", {})
    return {token["content"]: int(id) for id, token in declared.items() if _is_control_token(token)}


def _without_prefix(fields: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer that sets no space before a text."""
    changed = json.loads(json.dumps(fields))
    normalizer = changed.get("normalizer") or {}
    if normalizer.get("type") == "Prepend":
        changed["normalizer"] = None
    if normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    before = changed.get("pre_tokenizer") or {}
    for step in before.get("pretokenizers", [before]):
        if step.get("type") == "Metaspace":
            step |= {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in step else {})
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    return changed


def _load(fields: dict[str, Any], place: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{place}: reading this file needs the package `tokenizers`; pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{place}: not a tokenizer of the tokenizers library ({error})") from None
    tokenizer.encode_special_tokens = True  # the text of special tokens is text
    return tokenizer


def _fields(raw: bytes, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); give the file as it was published") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: not a JSON object; give the file as it was published")
    return fields


def train(texts: Iterable[str], *, size: int, controls: Sequence[str], split_digits: bool = True) -> bytes:
    """A SentencePiece model made from texts: byte-pair merges of words, any other text spelt in bytes.

    Nothing is normalised, digits stand alone, and a frequent word is one token together with the space before it:

        "The answer is 42.\\n"    ["The", " answer", " is", " ", "4", "2", ".", "\\n"]

    Without `split_digits` a frequent number is one token as well. The same texts give the same bytes. A corpus too
    small for `size` tokens gives fewer.
    """
    _check_size(size, controls)
    words = _count_words(texts)
    if not words:
        raise ValueError("tokenizer: there is no text to make it from; give rows that hold text")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_word_lines(words, _alphabet(words, most=(size - _num_reserved(controls)) // 2)),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=SPACE_MARK,
        byte_fallback=True,
        split_digits=split_digits,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=list(controls),
        user_defined_symbols=list(WHOLE),
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    made = SentencePiece(model.getvalue()).size
    if made < size:
        log.info("tokenizer: %d tokens instead of %d; the text has no more words worth a token", made, size)
    return model.getvalue()


def _check_size(size: int, controls: Sequence[str]) -> None:
    least = _num_reserved(controls) + 2
    if size < least:
        raise ValueError(
            f"vocab_size: {size} is too small; bytes and control tokens alone are {least - 2}, so take at least {least}"
        )
    taken = sorted(set(controls) & {*SPECIALS, *WHOLE}) or [text for text, n in Counter(controls).items() if n > 1]
    if taken:
        raise ValueError(f"controls: {taken[0]!r} exists already; name each control token once")


def _num_reserved(controls: Sequence[str]) -> int:
    return NUM_BYTES + len(SPECIALS) + len(WHOLE) + len(controls) + len(SPACE_MARK)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word stands in the texts, a word with the space before it.

    After every BUDGET characters only half as many texts are read, and each counts twice as much, so that late texts
    weigh the same as early ones and time grows with the logarithm of the corpus.
    """
    words: Counter[str] = Counter()
    stride, num_characters, num_texts, num_counted = 1, 0, 0, 0
    for text in texts:
        _utf8(text)
        num_texts += 1
        if num_texts % stride:
            continue
        num_counted += 1
        num_characters += len(text)
        found = Counter(WORD.findall(text))
        words.update(found if stride == 1 else {word: count * stride for word, count in found.items()})
        if num_characters >= BUDGET:
            stride, num_characters = 2 * stride, 0
    if num_counted < num_texts:
        log.info("tokenizer: made from a sample, %d of %d texts", num_counted, num_texts)
    return words


def _alphabet(words: Counter[str], *, most: int) -> str:
    """The `most` frequent characters, without the rarest 0.01 % of the text: they get tokens, others are bytes."""
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters.items(), key=lambda item: (-item[1], item[0]))[: max(most, 1)]
    least = sum(characters.values()) / 10_000
    tail = itertools.accumulate(count for _, count in reversed(ranked))
    num_rare = sum(1 for _ in itertools.takewhile(lambda so_far: so_far <= least, tail))
    return "".join(character for character, _ in ranked[: len(ranked) - num_rare])


def _word_lines(words: Counter[str], alphabet: str) -> Iterator[str]:
    """`word<tab>count`, cut at characters outside the alphabet, in an order the order of the texts has no part in."""
    outside = re.compile(f"[^{re.escape(alphabet)}]")
    for word in sorted(words):
        yield from (f"{part}\t{words[word]}" for part in outside.split(word) if part)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: lone surrogate {text[error.start]!r} at character {error.start} is not text; remove it"
        ) from None


def _all_utf8(texts: Sequence[str]) -> list[bytes]:
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        return [_utf8(text) for text in texts]


def _id_or_none(id: int) -> int | None:
    return None if id < 0 else id


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; name a SentencePiece .model, a tokenizer.json or a folder with one, or 'auto'"
        )
    return path.read_bytes()
