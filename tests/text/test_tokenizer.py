"""A tokenizer made from a few lines: exact round trips, whole words, and no way from text to a control token."""

import io
import json
import pickle

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itjax.text import tokenizer as tokenizer_module
from itjax.text.formats import CHATML_CONTROLS
from itjax.text.tokenizer import HuggingFace, SentencePiece, train

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
        (lambda: SentencePiece("nowhere.model"), "nowhere.model: no such file"),
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


# ------------------------------------------------------------------------------------------ pieces of other makers


def test_text_that_goes_on_gets_no_space_of_the_tokenizer(shared_data):
    mistral = SentencePiece(shared_data / "tokenizers" / "mistral_v3.model")
    assert mistral.space_before == "always"
    both = mistral.encode("Hello") + mistral.encode_more([" world", "!"])[0] + mistral.encode_more(["!"])[0]
    assert both == mistral.encode("Hello world!")
    assert mistral.control("[INST]") == 3
    assert not {3, 4} & set(mistral.encode("[INST] a [/INST]"))


@pytest.fixture(scope="module")
def gemma_like():
    """Control tokens as pieces of the user's own definition, which the library finds in any text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "<table>", "\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePiece(model.getvalue())


@given(
    text=st.lists(st.sampled_from(["<start_of_turn>", "<<", "start_of_turn>", "<end_of_turn>", "a ", " b"])).map(
        "".join
    )
)
@settings(max_examples=100, deadline=None)
def test_pieces_of_the_users_own_are_controls_only_where_the_format_says_so(gemma_like, text):
    controls = {gemma_like.control("<start_of_turn>"), gemma_like.control("<end_of_turn>")}
    assert None not in controls
    assert gemma_like.control("<table>") is None
    for ids in (gemma_like.encode(text), gemma_like.encode_more([text])[0]):
        assert not controls & set(ids)
    assert gemma_like.decode(gemma_like.encode(text)) == text


def byte_level():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    made.add_tokens([tokenizers.AddedToken("<think>"), tokenizers.AddedToken("    ")])
    return made.to_str().encode()


def metaspace(scheme):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    return made.to_str().encode()


BYTE_LEVEL = HuggingFace(byte_level(), {"eos_token": "<|end|>"})


@given(
    text=st.lists(st.text(max_size=8) | st.sampled_from(["<|end|>", "<think>", "<|user|>", "    ", "<|"])).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_a_hugging_face_tokenizer_gives_back_any_text_and_never_a_control(text):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text
    assert not set(BYTE_LEVEL.controls.values()) & set(ids)


def test_a_hugging_face_tokenizer_knows_its_controls():
    assert set(BYTE_LEVEL.controls) == {"<|end|>", "<|user|>", "<think>"}
    assert BYTE_LEVEL.eos == BYTE_LEVEL.control("<|end|>") == 0
    assert (BYTE_LEVEL.bos, BYTE_LEVEL.pad, BYTE_LEVEL.space_before) == (None, None, "")
    assert BYTE_LEVEL.token(0) == "<|end|>"
    assert BYTE_LEVEL.decode([0, *BYTE_LEVEL.encode("a"), 0]) == "a"
    assert len(BYTE_LEVEL.encode("    ")) == 1  # an added token that is no control stays what it is
    assert max(BYTE_LEVEL.controls.values()) < BYTE_LEVEL.size
    again = pickle.loads(pickle.dumps(BYTE_LEVEL))
    assert again.fingerprint() == BYTE_LEVEL.fingerprint()
    assert again.encode_many(LINES[:2]) == [BYTE_LEVEL.encode(line) for line in LINES[:2]]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_hugging_face_tokenizer_sets_its_space_where_it_would(scheme):
    made = HuggingFace(metaspace(scheme), {"bos_token": "<s>", "eos_token": "</s>"})
    assert made.space_before == ("" if scheme == "never" else scheme)
    whole = made.encode("The capital")
    assert made.encode("The") + made.encode_more([" capital"])[0] == whole
    assert made.token(whole[0]).startswith(" ") == (scheme != "never")
    assert not {made.bos, made.eos} & set(made.encode("<s></s>"))


def test_a_vocabulary_of_whole_words_cannot_be_talked_into_a_control():
    words = {"<unk>": 0, "[CLS]": 1, "a": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "[CLS]"])
    made = HuggingFace(made.to_str().encode(), {"unk_token": "<unk>", "eos_token": "[CLS]"})
    assert 1 not in made.encode("a [CLS] a")
    assert made.eos == 1


def test_open_takes_a_model_a_json_file_or_a_folder(tmp_path, tokenizer):
    (tmp_path / "x.model").write_bytes(tokenizer.model)
    assert tokenizer_module.open(tmp_path / "x.model").fingerprint() == tokenizer.fingerprint()
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    assert isinstance(tokenizer_module.open(tmp_path), SentencePiece)
    (tmp_path / "tokenizer.json").write_bytes(byte_level())
    config = {
        "eos_token": {"content": "<|end|>"},
        "added_tokens_decoder": {"500": {"content": "<|x|>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = tokenizer_module.open(tmp_path)
    assert isinstance(opened, HuggingFace)
    assert (opened.eos, opened.control("<|x|>"), opened.size) == (0, 500, 501)
    (tmp_path / "kept.model").write_bytes(opened.model)  # one file, whatever its name, keeps the special tokens
    assert tokenizer_module.open(tmp_path / "kept.model").fingerprint() == opened.fingerprint()
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json or tokenizer\.model in"):
        tokenizer_module.open(tmp_path.parent)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer"):
        tokenizer_module.open(tmp_path / "bad.json")


def test_a_tokenizer_that_loses_text_is_told_of(shared_data, caplog):
    """This one has no token for a space."""
    opened = tokenizer_module.open(shared_data / "tokenizers" / "torchtitan_tokenizer.json")
    assert "does not give back its text: 'Two words, 1 line.' is read as 'Twowords,1line.'" in caplog.text
    fields = json.loads((shared_data / "tokenizers" / "torchtitan_tokenizer_config.json").read_text())
    opened = HuggingFace(opened.model, fields)
    assert (opened.bos, opened.eos, opened.pad) == (2002, 2003, 2001)
    assert opened.control("<|vision_start|>") is not None
    assert not set(opened.controls.values()) & set(opened.encode("<|end_of_text|><|begin_of_text|>"))
