"""A tokenizer made from a few lines: exact round trips, whole words, and no way from text to a control token."""

import io
import json
import pickle
import time

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itjax.text import tokenizer as tokenizer_module
from itjax.text.formats import CHATML_CONTROLS
from itjax.text.tokenizer import HuggingFace, SentencePiece, train, with_tokens

LINES = [
    "The capital of France is Paris.\n\nThe capital of Peru is Lima.",
    "def add(x, y):\n    return x + y\n",
    "What is the capital of the country? Answer: 1,234.50 km\u00b2",
] * 20
SPACES = " " * 9
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


def llama_like():
    """Words with U+2581 before them, other text in bytes, as `tokenizer.json` of Llama 2 has it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    fields = json.loads(made.to_str())
    fields["added_tokens"] = fields["added_tokens"][:3]  # bytes are pieces, not added
    return json.dumps(fields).encode()


BYTE_LEVEL = HuggingFace(byte_level(), {"eos_token": "<|end|>"})
LLAMA_LIKE = HuggingFace(llama_like(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


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


# ------------------------------------------------------------------------------------------ bytes and places


@pytest.fixture(scope="module")
def unigram():
    """What SentencePiece makes when nobody says otherwise: NFKC, a space before every text, white space in runs gone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return SentencePiece(model.getvalue())


@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    for made in (tokenizer, BYTE_LEVEL):
        ids = made.encode(text)
        assert made.decode_bytes(ids) == text.encode()
        assert b"".join(made.token_bytes(id) for id in ids) == text.encode()
        parts = [made.decode_bytes(ids[:cut]) for cut in range(len(ids) + 1)]
        assert all(text.encode().startswith(part) for part in parts)  # also in the middle of a character


@given(ids=st.lists(st.integers(0, 399), max_size=8))
@settings(max_examples=150, deadline=None)
def test_bytes_and_text_of_any_ids_are_the_same(tokenizer, gemma_like, ids):
    for made in (tokenizer, gemma_like, BYTE_LEVEL, LLAMA_LIKE):
        some = [id % made.size for id in ids]
        read = made.decode(some)
        assert made.decode_bytes(some).decode(errors="replace") == read or "\ufffd" in read


@given(text=texts)
@example(text="\u6f22\U0001f389 a\u2581b<start_of_turn>\u6f22")
@settings(max_examples=150, deadline=None)
def test_offsets_cut_the_text_into_what_its_tokens_stand_for(tokenizer, gemma_like, text):
    for made in (tokenizer, gemma_like, BYTE_LEVEL):
        places = made.offsets(text)
        spelt = [made.token_bytes(id) for id in made.encode(text)]
        assert len(places) == len(spelt)
        for n, ((start, stop), token) in enumerate(zip(places, spelt, strict=True)):
            shown = made.decode(made.encode(text[start:stop])).encode()  # a space mark may be read as a space
            is_space_of_its_own = n == 0 and made.space_before and token[:1] == b" "
            assert (token.removeprefix(b" ") if is_space_of_its_own else token) in (shown, b" " + shown) or (
                token in shown and start < stop
            )
        assert sorted(places) == places
        assert "".join(text[a:b] for a, b in dict.fromkeys(places)) == text


def test_offsets_point_into_the_text_and_not_into_what_became_of_it(unigram):
    places = unigram.offsets("\ufb01 x")  # read as " fi x"
    named = [(unigram.token(id), place) for id, place in zip(unigram.encode("\ufb01 x"), places, strict=True)]
    assert named == [(" ", (0, 0)), ("f", (0, 0)), ("i", (0, 1)), (" ", (1, 2)), ("x", (2, 3))]


# ------------------------------------------------------------------------------------------ tokens that come later


@pytest.mark.parametrize("made", ["sentencepiece", "json"])
def test_new_tokens_get_the_ids_behind_the_last_and_change_nothing_else(tokenizer, made):
    base = tokenizer if made == "sentencepiece" else BYTE_LEVEL
    grown = with_tokens(base, ["<|tool|>", next(iter(base.controls)), "<|done|>", "<|tool|>"])
    assert [grown.control("<|tool|>"), grown.control("<|done|>"), grown.size] == [
        base.size,
        base.size + 1,
        base.size + 2,
    ]
    for text in [*LINES[:3], "<|tool|> \u6f22\n"]:
        assert grown.encode(text) == base.encode(text)
    assert grown.decode([base.size, *base.encode("a")]) == "a"
    assert (grown.bos, grown.eos, grown.pad, grown.unk) == (base.bos, base.eos, base.pad, base.unk)
    assert with_tokens(base, ["<|tool|>", "<|done|>"]).model == grown.model
    assert with_tokens(grown, ["<|done|>"]) is grown
    assert pickle.loads(pickle.dumps(grown)).controls == grown.controls


def test_new_tokens_come_behind_those_that_only_the_file_beside_declares():
    declared = {"eos_token": "<|end|>", "added_tokens_decoder": {"405": {"content": "<|x|>", "special": True}}}
    base = HuggingFace(byte_level(), declared)
    grown = with_tokens(base, ["<|y|>"])
    assert (grown.control("<|x|>"), grown.control("<|y|>"), grown.size) == (405, 406, 407)
    plain = {name: part for name, part in json.loads(grown.model).items() if name != tokenizer_module.CONFIG}
    assert tokenizers.Tokenizer.from_str(json.dumps(plain)).token_to_id("<|y|>") == 406


@pytest.mark.parametrize("name", ["The", "\n", "", " <|x|>"])
def test_a_new_token_that_text_is_full_of_is_refused(tokenizer, name):
    with pytest.raises(ValueError, match=r"new_tokens: '.*' is (an ordinary token already|empty or has white space)"):
        with_tokens(tokenizer, [name])


def test_a_sentencepiece_folder_has_the_tokens_its_files_declare(tmp_path, tokenizer):
    """As chat models that were made from a SentencePiece model publish them: ids behind the last piece."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    last = tokenizer.size
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<|assistant|>": last + 1, "TOOL": last + 4, "<|end|>": last + 7})
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["TOOL"]}))
    config = {
        "eos_token": "<|endoftext|>",
        "bos_token": {"content": "<s>"},
        "added_tokens_decoder": {
            "2": {"content": "<s>", "special": True},
            str(last): {"content": "<|endoftext|>", "special": True},
            str(last + 2): {"content": SPACES, "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = tokenizer_module.open(tmp_path)
    assert (opened.size, opened.bos, opened.eos) == (last + 8, 2, last)
    assert [opened.control(name) for name in ("<|assistant|>", "TOOL", "<|end|>")] == [last + 1, last + 4, last + 7]
    assert opened.encode(f"a{SPACES}b")[1:-1] == [
        last + 2
    ]  # what is added and no control is one token wherever it stands
    assert opened.encode("<|end|>") == tokenizer.encode("<|end|>")
    assert opened.decode([opened.control("<|assistant|>"), *opened.encode(f"a{SPACES}b")]) == f"a{SPACES}b"
    assert pickle.loads(pickle.dumps(opened)).controls == opened.controls


def test_a_declared_token_may_take_the_place_of_an_unused_piece(tmp_path, gemma_like):
    (tmp_path / "tokenizer.model").write_bytes(gemma_like.model)
    place = gemma_like.encode("<table>")[-1]
    config = {"added_tokens_decoder": {str(place): {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = tokenizer_module.open(tmp_path)
    assert opened.control("<|im_end|>") == place
    assert opened.size == gemma_like.size
    assert place not in opened.encode("<table><|im_end|>")


# ------------------------------------------------------------------------------------------ hard text


def test_threads_change_nothing(tokenizer):
    for made in (tokenizer, BYTE_LEVEL, LLAMA_LIKE):
        assert made.encode_many(LINES, threads=2) == made.encode_many(LINES) == [made.encode(line) for line in LINES]


def test_what_normalisation_changes_is_said_once_when_a_tokenizer_is_opened(tmp_path, unigram, tokenizer, caplog):
    (tmp_path / "nfkc.model").write_bytes(unigram.model)
    tokenizer_module.open(tmp_path / "nfkc.model")
    assert "does not give back its text: '\ufb01\u2460\uff21' is read as 'fi1A'" in caplog.text
    assert "' two  spaces ' is read as 'two spaces'" in caplog.text
    assert len(caplog.records) == 1
    (tmp_path / "own.model").write_bytes(tokenizer.model)
    tokenizer_module.open(tmp_path / "own.model")
    assert len(caplog.records) == 1


def test_nfkc_is_named_with_its_example(shared_data, caplog):
    tokenizer_module.open(shared_data / "tokenizers" / "sentencepiece_test_model.model")
    assert "'\ufb01\u2460\uff21' is read as 'fi1A'" in caplog.text


def test_a_null_character_is_a_character(tokenizer):
    for made in (tokenizer, BYTE_LEVEL):
        assert made.decode(made.encode("a\0b\0")) == "a\0b\0"
        assert made.decode_bytes(made.encode("a\0b\0")) == b"a\0b\0"


@pytest.mark.parametrize("threads", [1, 2])
def test_lone_surrogates_are_refused_with_their_place(tokenizer, threads):
    for made in (tokenizer, BYTE_LEVEL):
        for call in (
            lambda made=made: made.encode_many(["ok", "ab\ud800"], threads=threads),
            lambda made=made: made.offsets("ab\ud800"),
        ):
            with pytest.raises(ValueError, match=r"text: lone surrogate '\\ud800' at character 2 is not text"):
                call()


@pytest.mark.parametrize("text", ["x", "The capital is 12.\n", "<|im_start|>", "\u2581"])
def test_a_text_twice_as_long_takes_twice_as_long(tokenizer, text):
    """Linear, with room for a busy machine; squares would be four times."""
    for made in (tokenizer, BYTE_LEVEL):
        long = text * (100_000 // len(text))
        once, twice = (min(seconds(made, long * n) for _ in range(2)) for n in (1, 2))
        assert twice < 3.5 * once + 0.1


def seconds(made, text):
    before = time.process_time()
    made.encode(text)
    return time.process_time() - before
