"""The files of a folder: the same ids, the same text, the same marks, and an end to every answer."""

import io
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings

from itjax.text import chat, formats, published
from itjax.text import tokenizer as tokenizer_module
from itjax.text.formats import CHATML_CONTROLS, FORMATS
from itjax.text.jinja import ChatTemplate
from itjax.text.tokenizer import HuggingFace, SentencePiece, train, with_tokens
from tests.text.conversations import rows
from tests.text.test_tokenizer import BYTE_LEVEL, LINES, texts

OWN = SentencePiece(train([*LINES, "aaa aaaa bbb 1234"] * 5, size=420, controls=CHATML_CONTROLS))


def opened(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return tokenizer_module.open(folder)


def converted(tokenizer):
    fields = json.dumps(published.tokenizer_json(tokenizer), ensure_ascii=False).encode()
    return HuggingFace(
        fields, json.loads(published.files(tokenizer, FORMATS["plain"], max_length=64)["special_tokens_map.json"])
    )


CONVERTED = converted(OWN)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_an_own_tokenizer_reads_any_text_the_same_as_a_json(text):
    assert CONVERTED.encode(text) == OWN.encode(text)
    assert CONVERTED.decode(OWN.encode(text)) == text


def test_ten_thousand_texts_have_the_same_ids():
    rng = random.Random(0)
    letters = "aab  \n\t\r\0\u2581\u2585\u00e9\u6f22\U0001f389\ufb01<>|_'{}0123456789.,"
    made = ["".join(rng.choice(letters) for _ in range(rng.randint(0, 40))) for _ in range(10_000)]
    assert published.differences(OWN, CONVERTED, made) == []


@pytest.mark.parametrize("name", ["mistral_v3", "sentencepiece_test_model", "seqio_26_pieces"])
def test_published_models_read_real_text_the_same_as_a_json(shared_data, name):
    """Byte pairs with a space before text, and unigrams that normalise."""
    theirs = SentencePiece(shared_data / "tokenizers" / f"{name}.model")
    made = HuggingFace(json.dumps(published.tokenizer_json(theirs), ensure_ascii=False).encode(), {})
    real = (shared_data / "tokenizers" / "botchan.txt").read_text().split("\n")[:1000]
    assert published.differences(theirs, made, [*real, *published.PROBES]) == []
    assert made.space_before == theirs.space_before


def test_a_folder_is_opened_as_it_was_written(tmp_path):
    grown = with_tokens(OWN, ["<|tool|>"])
    fmt = formats.resolve("chatml", grown)
    again = opened(tmp_path, published.files(grown, fmt, max_length=77))
    assert isinstance(again, HuggingFace)
    assert (again.bos, again.eos, again.pad, again.unk, again.size) == (
        grown.bos,
        grown.eos,
        grown.pad,
        grown.unk,
        grown.size,
    )
    assert again.controls == {**grown.controls, "<unk>": grown.unk}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["bos_token"], config["eos_token"]) == (77, "<s>", "</s>")
    template = ChatTemplate.open(tmp_path, again)
    for row in rows(20):
        ours, theirs = (chat.render(row, f, prompt_weight=0.0) for f in (fmt, template))
        [(ids, weights), (their_ids, their_weights)] = chat.encode(ours, grown), chat.encode(theirs, again)
        assert ids.tolist() == their_ids.tolist()
        assert weights.tolist() == their_weights.tolist()
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_module.open(tmp_path).encode_many(LINES) == grown.encode_many(LINES)


def test_generation_stops_where_an_answer_ends():
    assert published.generation_config(OWN, formats.resolve("chatml", OWN)) == {
        "bos_token_id": 2,
        "eos_token_id": [3, 5],
        "pad_token_id": 0,
    }


def test_a_json_goes_out_as_it_came_in(tmp_path):
    files = published.files(with_tokens(BYTE_LEVEL, ["<|new|>"]), FORMATS["zephyr"], max_length=64)
    assert set(files) == {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
        "chat_template.jinja",
    }
    again = opened(tmp_path, files)
    assert again.control("<|new|>") == BYTE_LEVEL.size
    assert again.encode_many(LINES) == BYTE_LEVEL.encode_many(LINES)
    assert tokenizer_module.CONFIG not in json.loads(files["tokenizer.json"])


def test_a_models_own_template_goes_out_unchanged():
    source = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    template = ChatTemplate(source, {"eos_token": "</s>"}, controls=CHATML_CONTROLS, tool_source=source + " ")
    files = published.files(OWN, template, max_length=64)
    assert files["chat_template.jinja"].decode() == source
    assert files["additional_chat_templates/tool_use.jinja"].decode() == source + " "
    named = json.loads(files["tokenizer_config.json"])["chat_template"]
    assert [entry["name"] for entry in named] == ["default", "tool_use"]


def test_a_tokenizer_that_another_library_would_read_otherwise_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"written as tokenizer\.json it would read '.*' as other ids"):
        published.files(SentencePiece(model.getvalue()), FORMATS["plain"], max_length=64)
