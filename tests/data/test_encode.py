"""One conversation to one shifted example, and what happens to those that are too long."""

import pickle

import pytest

from itjax.base.records import Conversation, Message
from itjax.data.encode import Dropped, Encoding, encode, encode_many
from itjax.text.formats import CHATML_CONTROLS
from itjax.text.tokenizer import SentencePiece, train

TOKENIZER = SentencePiece(train(["user assistant abcdefgh"] * 9, size=300, controls=CHATML_CONTROLS))
TALK = Conversation((Message("user", "ab"), Message("assistant", "cd")), source="talk", key="talk.jsonl:7")


def encoding(*, length=64, truncation="drop", prompt_weight=0.0, format="chatml"):
    return Encoding(TOKENIZER, format=format, length=length, truncation=truncation, prompt_weight=prompt_weight)


def spelt(ids):
    return "".join(TOKENIZER.token(int(id)) for id in ids)


def test_the_shift_is_the_picture():
    example, was_cut = encode(TALK, encoding())
    whole = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    assert spelt(example.tokens_T) == whole[:-1]
    assert spelt(example.targets_T) == whole.removeprefix("<|im_start|>")
    assert example.tokens_T[1:].tolist() == example.targets_T[:-1].tolist()
    assert spelt(example.targets_T[example.weights_T > 0]) == "cd<|im_end|>"
    assert {str(array.dtype) for array in (example.tokens_T, example.targets_T)} == {"int32"}
    assert str(example.weights_T.dtype) == "float32"
    assert not was_cut


def whole_length():
    return len(encode(TALK, encoding())[0].tokens_T)


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end", "error"])
def test_an_example_of_exactly_the_length_is_kept_whole(truncation):
    example, was_cut = encode(TALK, encoding(length=whole_length(), truncation=truncation))
    assert len(example.tokens_T) == whole_length()
    assert not was_cut


def test_a_longer_example_meets_the_policy():
    length = whole_length() - 2  # the separator and the terminator do not fit
    assert encode(TALK, encoding(length=length, truncation="drop")) == (Dropped("too long"), False)

    start, was_cut = encode(TALK, encoding(length=length, truncation="keep_start"))
    assert was_cut
    assert spelt(start.targets_T[start.weights_T > 0]) == "cd"  # a cut answer does not teach to stop

    end, was_cut = encode(TALK, encoding(length=length, truncation="keep_end"))
    assert was_cut
    assert len(end.tokens_T) == length
    assert spelt(end.targets_T[end.weights_T > 0]) == "cd<|im_end|>"

    with pytest.raises(
        ValueError, match=rf"talk.jsonl:7: {length + 2} positions, but length is {length}; raise length"
    ):
        encode(TALK, encoding(length=length, truncation="error"))


def test_what_teaches_nothing_is_dropped():
    silent = Conversation((Message("assistant", "cd", learn=False),), source="talk", key="1")
    assert encode(silent, encoding()) == (Dropped("no trained token"), False)
    assert encode(TALK, encoding(length=4, truncation="keep_start")) == (Dropped("no trained token"), True)


def test_many_at_a_time_are_the_same_as_one_by_one():
    talks = [TALK, Conversation((Message("assistant", ""),), "talk", "2"), TALK]
    for (many, _), (one, _) in zip(encode_many(talks, encoding()), (encode(t, encoding()) for t in talks), strict=True):
        assert many.tokens_T.tolist() == one.tokens_T.tolist()
        assert many.weights_T.tolist() == one.weights_T.tolist()


def test_the_fingerprint_follows_everything_that_shapes_tokens():
    other = SentencePiece(train(["other words"] * 9, size=300, controls=CHATML_CONTROLS))
    marks = [
        encoding().fingerprint(),
        encoding(length=63).fingerprint(),
        encoding(truncation="keep_end").fingerprint(),
        encoding(prompt_weight=0.5).fingerprint(),
        encoding(format="plain").fingerprint(),
        Encoding(other, format="chatml", length=64, truncation="drop", prompt_weight=0.0).fingerprint(),
    ]
    assert len(set(marks)) == len(marks)
    assert encoding(format="auto").fingerprint() == pickle.loads(pickle.dumps(encoding())).fingerprint() == marks[0]


def test_a_conversation_the_format_cannot_write_is_named():
    call = Conversation((Message("assistant", "", tool_calls=({"name": "f"},)),), source="talk", key="talk.jsonl:9")
    with pytest.raises(ValueError, match=r"talk\.jsonl:9: format 'chatml' cannot write tool calls"):
        encode(call, encoding())
    with pytest.raises(ValueError, match="truncation: 'cut' is unknown"):
        encoding(truncation="cut")
