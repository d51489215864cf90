"""Text to token ids and back, and the tokenizer one can make from one's own text.

Two promises everything above relies on: text from data never becomes a control token, and a tokenizer made by `train`
gives back exactly the text it was given.
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
CONFIG = "special_tokens"  # of a file of ours: what `tokenizer_config.json` says beside the published one
PROBE = "Two words, 1 line."
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
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that go on after other text: without a space that was not there."""

    def decode(self, ids: Sequence[int]) -> str: ...
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
    return HuggingFace(path) if _read(path).lstrip()[:1] == b"{" else SentencePiece(path)


class SentencePiece:
    """A SentencePiece model, from its file or its bytes.

    Pieces of the user's own definition that are written like control tokens (`<start_of_turn>`) are control tokens: the
    library would find them in any text, so such text is encoded in two halves.
    """

    file_name: str = "tokenizer.model"

    def __init__(self, model: str | Path | bytes) -> None:
        self.model = model if isinstance(model, bytes) else _read(Path(model))
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            place = "tokenizer" if isinstance(model, bytes) else str(model)
            raise ValueError(f"{place}: not a SentencePiece model ({error}); give a .model file") from None
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

    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.space_before:
            return self.encode_many(texts)
        ids = self._going_on.encode([_utf8(text) for text in texts], num_threads=1) if texts else []
        if self._own_controls is not None:
            for number, text in enumerate(texts):
                if self._own_controls.search(text):
                    ids[number] = self._encode_more_exactly(cut_inside(text, self._own_controls))
        return ids

    def _encode_more_exactly(self, texts: Sequence[str]) -> list[int]:
        """Texts that hold no control token and go on, one after the other."""
        raw = [_utf8(text) for text in texts]
        return [id for part in (self._going_on.encode(raw, num_threads=1) if raw else []) for id in part]

    @cached_property
    def _going_on(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model + NO_SPACE_BEFORE)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as SentencePiece gives them on one thread; texts that hold a space mark stay exact."""
        raw = [_utf8(text) for text in texts]
        ids = self._pieces.encode(raw, num_threads=1) if raw else []
        if self._space_mark_ids:
            for number, text in enumerate(texts):
                if not text.isascii() and SPACE_MARK in text:
                    ids[number] = self._encode_around_marks(text)
        if self._own_controls is not None:
            for number, text in enumerate(texts):
                if self._own_controls.search(text):
                    first, *others = cut_inside(text, self._own_controls)
                    ids[number] = self._pieces.encode(_utf8(first)) + self._encode_more_exactly(others)
        return ids

    def _encode_around_marks(self, text: str) -> list[int]:
        first, *others = self._pieces.encode([_utf8(part) for part in text.split(SPACE_MARK)], num_threads=1)
        return first + [id for part in others for id in (*self._space_mark_ids, *part)]

    @cached_property
    def _space_mark_ids(self) -> tuple[int, ...]:
        """Bytes that spell the space mark, for models that otherwise keep text as it is; else nothing."""
        ids = tuple(self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode())
        spelt_in_bytes = all(self._pieces.is_byte(id) for id in ids)
        adds_nothing = self._pieces.encode("\x01", out_type=str) == ["<0x01>"]  # a dummy prefix would show
        keeps_spaces = self._pieces.decode(self._pieces.encode(" \x01  \x01 ")) == " \x01  \x01 "
        return ids if spelt_in_bytes and adds_nothing and keeps_spaces else ()

    def decode(self, ids: Sequence[int]) -> str:
        """The text; control tokens are silent, bytes that are not UTF-8 become U+FFFD."""
        return self._pieces.decode([int(id) for id in ids])

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
        for token in ("bos_token", "eos_token", "pad_token"):
            name = self.config.get(token)
            id = fields.get("model", {}).get("vocab", {}).get(name) if isinstance(name, str) else None
            if isinstance(id, int):
                controls.setdefault(str(name), id)
        self.controls: Mapping[str, int] = controls
        added = [token | {"special": _is_control_token(token)} for token in fields.get("added_tokens", [])]
        plain = fields | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        self._begins = _load(plain, place)
        going_on = _without_prefix(plain)
        self._goes_on = self._begins if going_on == plain else _load(going_on, place)
        self.space_before: str = "" if going_on == plain else ("first" if '"first"' in json.dumps(plain) else "always")
        self._decoder = _load(fields | {"truncation": None, "padding": None}, place)
        self._by_id = {id: name for name, id in self.controls.items()}
        self._any_control = _any_of([*self.controls]) if self.controls else re.compile("(?!)")
        self.size = max([self._decoder.get_vocab_size(with_added_tokens=True), *(id + 1 for id in self._by_id)])
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        self.pad, self.unk = self._named("pad_token"), self._named("unk_token")
        self._never = frozenset(self._by_id) - {self.unk}
        if self._read(PROBE) != PROBE:
            log.warning(
                "%s: this tokenizer does not give back its text: %r is read as %r", place, PROBE, self._read(PROBE)
            )

    def _read(self, text: str) -> str:
        return self.decode(self.encode(text))

    def __reduce__(self) -> tuple[type["HuggingFace"], tuple[bytes]]:
        return HuggingFace, (self.model,)

    def _named(self, name: str) -> int | None:
        text = self.config.get(name)
        if not isinstance(text, str):
            return None
        return self.controls.get(text, self._decoder.token_to_id(text))

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self._begins)

    def encode_more(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, self._goes_on)

    def _encode(self, texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        encoded = [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        for number, ids in enumerate(encoded):
            if not self._never.isdisjoint(ids):  # a vocabulary of whole words holds its control tokens' names
                parts = cut_inside(texts[number], self._any_control)
                first = tokenizer.encode(parts[0], add_special_tokens=False).ids
                others = self._goes_on.encode_batch(parts[1:], add_special_tokens=False)
                encoded[number] = first + [id for row in others for id in row.ids]
        return encoded

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

    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


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


def _config(folder: Path) -> dict[str, Any]:
    """Special tokens by their role, and tokens that are declared beside the tokenizer."""
    fields: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields |= _fields((folder / name).read_bytes(), str(folder / name))
    roles = {name: fields.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in roles.items()}
    more = fields.get("added_tokens_decoder")
    found: dict[str, Any] = {name: text for name, text in texts.items() if isinstance(text, str)}
    return found | ({"added_tokens_decoder": more} if more else {})


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
        raise ValueError(f"{place}: reading this file needs `tokenizers`; install itjax[hf]") from None
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


def _id_or_none(id: int) -> int | None:
    return None if id < 0 else id


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; name a SentencePiece .model, a tokenizer.json or a folder with one, or 'auto'"
        )
    return path.read_bytes()
