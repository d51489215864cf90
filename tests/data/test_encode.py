"""One conversation to one shifted example, and what happens to those that are too long."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Conversation, Message
from itjax.data.encode import Dropped, Encoding, encode, encode_many, proportions
from itjax.text.formats import CHATML_CONTROLS
from itjax.text.tokenizer import SentencePiece, train

TOKENIZER = SentencePiece(train(["user assistant abcdefgh"] * 9, size=300, controls=CHATML_CONTROLS))
TALK = Conversation((Message("user", "ab"), Message("assistant", "cd")), source="talk", key="talk.jsonl:7")


def encoding(*, length=64, truncation="drop", prompt_weight=0.0, format="chatml", **more):
    return Encoding(TOKENIZER, format=format, length=length, truncation=truncation, prompt_weight=prompt_weight, **more)


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
        encoding(learn="last").fingerprint(),
        encoding(bad_rows="skip").fingerprint(),
        encoding(learns_separator=True).fingerprint(),
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


# ------------------------------------------------------------------------------------------ too long

CUTS = ("keep_start", "keep_end", "middle_out", "proportional", "drop_oldest_turns")
LONG = Conversation(
    (
        Message("system", "ga"),
        *(Message("user", "abcd"), Message("assistant", "efgh")),
        *(Message("user", "dcba"), Message("assistant", "hgfe")),
    ),
    source="talk",
    key="talk.jsonl:3",
)


def learned(example):
    return spelt(example.targets_T[example.weights_T > 0])


def text(example):
    return spelt([*example.tokens_T, example.targets_T[-1]])


def test_the_oldest_turns_go_and_what_stays_is_a_conversation_with_its_system_prompt():
    whole, _ = encode(LONG, encoding(length=500, format="plain"))
    one_less = len(whole.tokens_T) - 1
    example, was_cut = encode(LONG, encoding(length=one_less, format="plain", truncation="drop_oldest_turns"))
    assert was_cut
    shorter = replace(LONG, messages=(LONG.messages[0], *LONG.messages[3:]))
    assert text(example) == text(encode(shorter, encoding(length=500, format="plain"))[0])
    assert encode(LONG, encoding(length=20, format="plain", truncation="drop_oldest_turns")) == (
        Dropped("too long"),
        False,
    )


def test_the_middle_goes_and_what_follows_the_gap_is_not_learned():
    example, _ = encode(TALK, encoding(length=whole_length() - 4, truncation="middle_out", prompt_weight=1.0))
    whole = text(encode(TALK, encoding())[0])
    gap = int((example.weights_T == 0).argmax()) + 1  # the one token that is not learned
    kept = [*example.tokens_T, example.targets_T[-1]]
    assert (example.weights_T == 0).sum() == 1
    assert whole.startswith(spelt(kept[:gap]))
    assert whole.endswith(spelt(kept[gap:]))
    assert spelt(kept) != whole


def test_the_end_is_kept_behind_the_begin_of_text():
    example, _ = encode(LONG, encoding(length=20, format="plain", truncation="keep_end", prompt_weight=1.0))
    assert text(example).startswith("<s>")
    assert text(example).endswith("hgfe</s>\n\n")
    assert example.weights_T[0] == 0.0  # what follows the gap


@pytest.mark.parametrize(
    ("asked", "answered", "most", "expected"),
    [
        (3000, 2000, 1000, (600, 400)),
        (2000, 3000, 1000, (400, 600)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
    ],
)
def test_questions_and_answers_share_the_row_as_llama_factory_shares_it(asked, answered, most, expected):
    assert proportions(asked, answered, most) == expected


def test_of_a_question_and_its_answer_the_beginnings_stay():
    row = Conversation((Message("user", "abcd" * 10), Message("assistant", "hdbf" * 10)), "talk", "1")
    whole, _ = encode(row, encoding(length=500))
    answered = int((whole.weights_T > 0).sum())
    asked = len(whole.tokens_T) - answered  # with the last token, which separates
    most = len(whole.tokens_T) // 2
    example, _ = encode(row, encoding(length=most - 1, truncation="proportional"))
    num_asked, num_answered = proportions(asked, answered, most)
    tokens, all_tokens = [*example.tokens_T, example.targets_T[-1]], [*whole.tokens_T, whole.targets_T[-1]]
    assert tokens == all_tokens[:num_asked] + all_tokens[asked : asked + num_answered]
    assert int((example.weights_T > 0).sum()) == num_answered - 1  # the first of the answer follows the gap


words = st.text("abcdefgh", max_size=12)


@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    system=st.none() | words,
    length=st.integers(2, 60),
    truncation=st.sampled_from(CUTS),
    name=st.sampled_from(["chatml", "plain"]),
)
@settings(max_examples=250, deadline=None)
def test_whatever_is_cut_nothing_is_invented(turns, system, length, truncation, name):
    """What stays is shorter, was there, follows what it followed where it is learned, and teaches something."""
    said = [Message("system", system)] if system is not None else []
    for asked, answered in turns:
        said += [Message("user", asked), Message("assistant", answered)]
    row = Conversation(tuple(said), "talk", "1")
    whole, _ = encode(row, encoding(length=10_000, format=name))
    example, was_cut = encode(row, encoding(length=length, format=name, truncation=truncation))
    if isinstance(example, Dropped):
        assert example.reason in ("too long", "no trained token")
        return
    assert len(example.tokens_T) <= length
    assert example.weights_T.any()
    assert was_cut == (len(whole.tokens_T) > length)
    trained = {(int(a), int(b)) for a, b, w in zip(whole.tokens_T, whole.targets_T, whole.weights_T, strict=True) if w}
    pairs = zip(example.tokens_T, example.targets_T, example.weights_T, strict=True)
    assert all((int(a), int(b)) in trained for a, b, w in pairs if w)
    stops = {TOKENIZER.control("<|im_end|>"), TOKENIZER.eos}
    ends = sum(int(id) in stops for id in whole.targets_T[whole.weights_T > 0])
    assert sum(int(id) in stops for id in example.targets_T[example.weights_T > 0]) <= ends
    if name == "plain" and truncation != "drop_oldest_turns":
        assert example.tokens_T[0] == TOKENIZER.bos
    if truncation == "drop_oldest_turns":
        assert text(example).count("ystem") <= 1
        assert text(example)[-20:] == text(whole)[-20:] or len(text(example)) < 20


# ------------------------------------------------------------------------------------------ what is learned, what cannot be


def test_the_last_turn_or_flagged_turns_are_learned():
    both = encode(LONG, encoding(length=200, format="plain"))[0]
    assert learned(both) == "efgh</s>hgfe</s>"
    assert learned(encode(LONG, encoding(length=200, format="plain", learn="last"))[0]) == "hgfe</s>"
    flagged = replace(LONG, messages=tuple(replace(m, learn=True) if m.content == "efgh" else m for m in LONG.messages))
    assert learned(encode(flagged, encoding(length=200, format="plain", learn="flag"))[0]) == "efgh</s>"


def test_rows_that_the_format_cannot_write_are_skipped_with_a_reason_or_named():
    rows = {
        "no place for a role": Conversation(
            (Message("user", "a"), Message("tool", "b"), TALK.messages[1]), "talk", "1"
        ),
        "no place for tools": replace(TALK, tools=({"name": "f"},)),
        "no place for reasoning": replace(TALK, messages=(TALK.messages[0], replace(TALK.messages[1], reasoning="x"))),
        "text is not Unicode": Conversation((Message("user", "a\ud800"), TALK.messages[1]), "talk", "4"),
    }
    asked = encoding(format="alpaca", length=200, bad_rows="skip")
    results = [result for result, _ in encode_many([TALK, *rows.values(), TALK], asked)]
    assert [result.reason for result in results[1:-1]] == [f"format: {reason}" for reason in rows]
    assert results[0].tokens_T.tolist() == results[-1].tokens_T.tolist()
    for row in rows.values():
        with pytest.raises(ValueError, match=rf"^{row.key}: "):
            encode_many([TALK, row], replace(asked, bad_rows="error"))
    unflagged = encode(TALK, encoding(learn="flag", bad_rows="skip"))
    assert unflagged == (Dropped("format: no message has `learn` set"), False)


def test_reasoning_is_kept_where_the_setting_says():
    row = replace(TALK, messages=(TALK.messages[0], replace(TALK.messages[1], reasoning="ab")))
    examples = [encode(row, encoding(format="qwen3", reasoning=kept))[0] for kept in ("", "all", "none")]
    shown = [TOKENIZER.decode(example.targets_T[example.weights_T > 0]) for example in examples]
    assert shown == ["<think>\nab\n</think>\n\ncd"] * 2 + ["cd"]
