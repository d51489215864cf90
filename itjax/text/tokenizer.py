"""Text to token ids and back, and the tokenizer one can make from one's own text.

Two promises everything above relies on: text from data never becomes a control token, and a tokenizer made by `train`
gives back exactly the text it was given.
"""

import hashlib
import io
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import sentencepiece

log = logging.getLogger(__name__)

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


class Tokenizer(Protocol):
    """What the rest of the code knows about a tokenizer."""

    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def control(self, text: str) -> int | None:
        """The id of the control token with exactly this text."""

    def token(self, id: int) -> str: ...
    def fingerprint(self) -> str: ...


class SentencePiece:
    """A SentencePiece model, from its file or its bytes."""

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
        self._controls = {self.token(id): id for id in range(self.size) if self._pieces.is_control(id)}

    def __reduce__(self) -> tuple[type["SentencePiece"], tuple[bytes]]:
        return SentencePiece, (self.model,)

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as SentencePiece gives them on one thread; texts that hold a space mark stay exact."""
        raw = [_utf8(text) for text in texts]
        ids = self._pieces.encode(raw, num_threads=1) if raw else []
        if self._space_mark_ids:
            for number, text in enumerate(texts):
                if not text.isascii() and SPACE_MARK in text:
                    ids[number] = self._encode_around_marks(text)
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
        return self._controls.get(text)

    def token(self, id: int) -> str:
        """The token as it is written in the vocabulary, with spaces as spaces."""
        return self._pieces.id_to_piece(int(id)).replace(SPACE_MARK, " ")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


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
        raise ValueError(f"{path}: no such tokenizer file; give a SentencePiece .model file, or 'auto'")
    return path.read_bytes()
