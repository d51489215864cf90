"""A SentencePiece file as data: its pieces and switches, read and changed without the library's generated classes.

The file is one protocol buffer. Later bytes of the same field win or add, so a model is changed by what stands behind it.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
ROLES = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}  # names of pieces in the trainer's part
PIECE, TRAINER, NORMALIZER = 1, 2, 3  # fields of a model


class Piece(NamedTuple):
    """One token of the vocabulary; `name` has spaces as U+2581."""

    name: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a SentencePiece file says of how it reads text."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    charsmap: bytes  # of the normalizer, compiled; empty: characters stay as they are
    dummy_prefix: bool  # a space before every text
    squeezes: bool  # runs of spaces become one, those at the ends go
    escapes: bool  # spaces are written as U+2581
    suffix: bool  # words end with their space instead of beginning with it


def read(model: bytes) -> Model:
    """The parts of a model that decide what ids a text has."""
    pieces, trainer, normalizer = [], b"", b""
    for number, value in fields(model):
        if number == PIECE:
            pieces.append(_piece(_bytes(value)))
        elif number == TRAINER:
            trainer += _bytes(value)
        elif number == NORMALIZER:
            normalizer += _bytes(value)
    trained, normalized = dict(fields(trainer)), dict(fields(normalizer))
    return Model(
        pieces=pieces,
        kind=_number(trained.get(3, UNIGRAM)),
        byte_fallback=bool(trained.get(35, 0)),
        charsmap=_bytes(normalized.get(2, b"")),
        dummy_prefix=bool(normalized.get(3, 1)),
        squeezes=bool(normalized.get(4, 1)),
        escapes=bool(normalized.get(5, 1)),
        suffix=bool(trained.get(24, 0)),
    )


def with_pieces(model: bytes, changed: Mapping[int, tuple[str, int]]) -> bytes:
    """The model with pieces (name, kind) at these ids, in place of those that stood there or behind the last.

    Ids between the last piece and a new one get pieces that no text has.
    """
    names = {name for name, _ in changed.values()}
    out, id = [], 0
    for number, value in fields(model):
        if number == PIECE:
            old = _bytes(value)
            out.append(_field(PIECE, _written(*changed[id], score=_piece(old).score) if id in changed else old))
            id += 1
        else:
            out.append(_field(number, value))
    for at in range(id, max(changed, default=-1) + 1):
        out.append(_field(PIECE, _written(*changed.get(at, (_unused(at, names), UNUSED)), score=0.0)))
    return b"".join(out)


def with_roles(model: bytes, roles: Mapping[str, str]) -> bytes:
    """The model whose `bos_token`, `eos_token`, ... are the control pieces of these names."""
    trainer = b"".join(_field(ROLES[role], name.encode()) for role, name in roles.items())
    return model + _field(TRAINER, trainer) if trainer else model


def spans(encoded: bytes) -> list[tuple[int, int, int]]:
    """Id, first and last byte of each token of an encoded text that the library gave as bytes."""
    found = []
    for number, value in fields(encoded):
        if number == 2:
            token = dict(fields(_bytes(value)))
            found.append((_number(token.get(2, 0)), _number(token.get(4, 0)), _number(token.get(5, 0))))
    return found


def _unused(id: int, taken: set[str]) -> str:
    name = f"<unused_{id}>"
    return name if name not in taken else f"<unused_{id}_>"


def _piece(message: bytes) -> Piece:
    found = dict(fields(message))
    score = struct.unpack("<f", _bytes(found.get(2, b"\0\0\0\0")))[0]
    return Piece(_bytes(found.get(1, b"")).decode(), score, _number(found.get(3, NORMAL)))


def _written(name: str, kind: int, *, score: float) -> bytes:
    return _field(1, name.encode()) + bytes([2 << 3 | FIXED32]) + struct.pack("<f", score) + _field(3, kind)


# ------------------------------------------------------------------------------------------ protocol buffers


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field, in their order. Numbers are as written, everything else is its bytes."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(
                f"SentencePiece model: field {number} is of an unknown kind {kind}; give the file unchanged"
            )
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint_bytes(number << 3 | VARINT) + _varint_bytes(value)
    return _varint_bytes(number << 3 | BYTES) + _varint_bytes(len(value)) + value


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value
