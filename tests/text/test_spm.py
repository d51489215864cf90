"""A SentencePiece file read and changed byte by byte, beside the library's own reading of it."""

import pytest
import sentencepiece

from itjax.text import spm
from itjax.text.tokenizer import train

MODEL = train(["The capital of France is Paris."] * 20, size=320, controls=("<|x|>",))


def test_pieces_are_those_the_library_reads():
    library = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    read = spm.read(MODEL)
    assert [piece.name for piece in read.pieces] == [library.id_to_piece(id) for id in range(library.vocab_size())]
    assert [piece.score for piece in read.pieces] == [library.get_score(id) for id in range(library.vocab_size())]
    assert (read.kind, read.byte_fallback, read.charsmap) == (spm.BPE, True, b"")
    assert (read.dummy_prefix, read.squeezes, read.escapes, read.suffix) == (False, False, True, False)


def test_a_piece_in_place_of_another_and_one_behind_a_gap():
    grown = spm.with_pieces(MODEL, {4: ("<|y|>", spm.CONTROL), 322: ("<|z|>", spm.CONTROL)})
    library = sentencepiece.SentencePieceProcessor(model_proto=grown)
    size = sentencepiece.SentencePieceProcessor(model_proto=MODEL).vocab_size()
    assert library.vocab_size() == 323
    assert library.is_control(4)
    assert library.id_to_piece(4) == "<|y|>"
    assert all(library.is_unused(id) for id in range(size, 322))
    assert library.encode("The capital") == sentencepiece.SentencePieceProcessor(model_proto=MODEL).encode(
        "The capital"
    )


def test_a_role_moves_to_another_control_piece():
    library = sentencepiece.SentencePieceProcessor(model_proto=spm.with_roles(MODEL, {"eos_token": "<|x|>"}))
    assert (library.bos_id(), library.eos_id()) == (2, 4)


def test_fields_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="field 1 is of an unknown kind 3"):
        list(spm.fields(b"\x0b\x00"))
