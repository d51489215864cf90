"""Formats are chosen by name and fit the tokenizer, or say why not."""

import pickle

import pytest

from itjax.text import formats
from itjax.text.tokenizer import SentencePiece, train


def tokenizer_with(*controls):
    return SentencePiece(train(["a word"], size=300, controls=controls))


def test_auto_is_chatml_where_its_control_tokens_exist_else_plain():
    assert formats.resolve("auto", tokenizer_with(*formats.CHATML_CONTROLS)).name == "chatml"
    assert formats.resolve("auto", tokenizer_with()).name == "plain"


def test_an_unknown_format_is_told_its_nearest_name():
    with pytest.raises(ValueError, match=r"'chatlm' is unknown; did you mean 'chatml'\? Known: auto, alpaca, chatml"):
        formats.resolve("chatlm", tokenizer_with())


def test_a_format_without_its_control_tokens_is_refused():
    with pytest.raises(ValueError, match=r"'chatml' needs the control tokens \['<\|im_end\|>'\]"):
        formats.resolve("chatml", tokenizer_with("<|im_start|>"))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_can_be_resolved_and_pickled(name):
    fmt = formats.resolve(name, tokenizer_with(*formats.FORMATS[name].controls))
    assert pickle.loads(pickle.dumps(fmt)) == fmt


def test_a_tokenizer_without_begin_of_text_writes_none(shared_data):
    seqio = SentencePiece(shared_data / "tokenizers" / "seqio_26_pieces.model")
    assert seqio.bos is None
    assert formats.resolve("plain", seqio).begin == ""
