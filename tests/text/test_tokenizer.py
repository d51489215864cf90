"""A tokenizer made from a few lines: exact round trips, whole words, and no way from text to a control token."""

import pickle

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itjax.text.formats import CHATML_CONTROLS
from itjax.text.tokenizer import SentencePiece, train

LINES = [
    "The capital of France is Paris.\n\nThe capital of Peru is Lima.",
    "def add(x, y):\n    return x + y\n",
    "What is the capital of the country? Answer: 1,234.50 km\u00b2",
] * 20
MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<0x41>",
    "\u2581",
    "\u2585",
    "\0",
    "\r\n",
    "  ",
]
texts = st.lists(st.text(max_size=8) | st.sampled_from([*MARKERS, *LINES[:3]]), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePiece(train(LINES, size=400, controls=CHATML_CONTROLS))


@given(text=texts)
@example(text="\u2581a \u2581\u2581")
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text_and_no_text_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    controls = {tokenizer.control(name) for name in ("<s>", "</s>", "<pad>", *CHATML_CONTROLS)} | {tokenizer.unk}
    assert not controls & set(ids)


def test_a_frequent_word_is_one_token_with_its_space_and_digits_stand_alone(tokenizer):
    tokens = [tokenizer.token(id) for id in tokenizer.encode("The capital is 12.\n")]
    assert tokens == ["The", " capital", " is", " ", "1", "2", ".", "\n"]


def test_control_names_only_control_tokens(tokenizer):
    assert [tokenizer.control(name) for name in CHATML_CONTROLS] == [4, 5]
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2, 3)
    assert tokenizer.control(" capital") is None
    assert tokenizer.control("<0x41>") is None


def test_the_same_texts_in_any_order_give_the_same_bytes():
    assert train(LINES, size=300, controls=()) == train(reversed(LINES), size=300, controls=())


def test_a_corpus_that_repeats_control_names_still_makes_text_of_them():
    tokenizer = SentencePiece(train(["<|im_start|> <|im_end|>"] * 50, size=400, controls=CHATML_CONTROLS))
    ids = tokenizer.encode("<|im_start|>")
    assert tokenizer.decode(ids) == "<|im_start|>"
    assert tokenizer.control("<|im_start|>") not in ids


@pytest.mark.parametrize("corpus", [["a"], ["  \n "], ["".join(map(chr, range(0x4E00, 0x5E00)))]])
def test_odd_corpora_give_a_working_tokenizer(corpus):
    tokenizer = SentencePiece(train(corpus, size=400, controls=CHATML_CONTROLS))
    assert tokenizer.size <= 400
    assert tokenizer.decode(tokenizer.encode("a \u4e00\U0001f389\n")) == "a \u4e00\U0001f389\n"


def test_pickles_as_the_model(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("The capital") == tokenizer.encode("The capital")
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train(["a"], size=100, controls=()), "vocab_size: 100 is too small"),
        (lambda: train([], size=400, controls=()), "there is no text"),
        (lambda: train(["a\ud800"], size=400, controls=()), "lone surrogate '\\\\ud800' at character 1"),
        (lambda: train(["a"], size=400, controls=("<s>",)), "'<s>' exists already"),
        (lambda: SentencePiece(b"garbage"), "not a SentencePiece model"),
        (lambda: SentencePiece("nowhere.model"), "nowhere.model: no such tokenizer file"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_encoding_a_lone_surrogate_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("ok \udfff")


def test_a_published_model_gives_the_ids_of_its_own_library(shared_data):
    path = shared_data / "tokenizers" / "mistral_v1.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = SentencePiece(path)
    for text in ("Hello, world!", " two  spaces", "a\u2581b", "\u6f22\n"):
        assert ours.encode(text) == theirs.encode(text)
