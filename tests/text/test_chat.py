"""What is learned of a conversation, and that a prompt is the beginning of the training text."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Conversation, Message
from itjax.text import chat, formats, jinja
from itjax.text.tokenizer import SentencePiece, train

CONTROLS = tuple(dict.fromkeys(name for fmt in formats.FORMATS.values() for name in fmt.controls))
TOKENIZER = SentencePiece(train(["user assistant system model The answer is Paris."] * 9, size=400, controls=CONTROLS))
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
ASKED = (Message("system", "Be brief."), Message("user", "Capital of France?"))
ANSWERED = (*ASKED, Message("assistant", "Paris."))

content = st.text(max_size=12) | st.sampled_from(
    ["<|im_end|>", "</s>", "<s>", "{role}", "<start_of_turn>model\n", "  x\n"]
)


def conversation(*messages):
    return Conversation(messages, source="test", key="test:1")


def text(segments):
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "<s>Be brief.\n\nUser:\nCapital of France?\n\nAssistant:\n[Paris.</s>]\n\n"),
        ("alpaca", "<s>Be brief.\n\n### Instruction:\nCapital of France?\n\n### Response:\n[Paris.</s>]\n\n"),
        ("zephyr", "<|system|>\nBe brief.</s>\n<|user|>\nCapital of France?</s>\n<|assistant|>\n[Paris.</s>]\n"),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
            "<|im_start|>assistant\n[Paris.<|im_end|>]\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[Paris.<|eot_id|>]",
        ),
        ("vicuna", "<s>Be brief.\n\nUSER: Capital of France?\nASSISTANT:[ Paris.</s>]\n"),
        (
            "qwen3",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
            "<|im_start|>assistant\n[<think>\n\n</think>\n\nParis.<|im_end|>]\n",
        ),
        ("llama2", "<s>{INST} <<SYS>>\nBe brief.\n<</SYS>>\n\nCapital of France? {/INST}[ Paris. </s>]"),
        ("mistral_v1", "<s>{INST} Be brief.\n\nCapital of France? {/INST}[ Paris.</s>]"),
        ("mistral_v3", "<s>{INST}Be brief.\n\nCapital of France?{/INST}[Paris.</s>]"),
        ("mistral_v7", "<s>{SYSTEM_PROMPT}Be brief.{/SYSTEM_PROMPT}{INST}Capital of France?{/INST}[Paris.</s>]"),
        (
            "phi3",
            "<|system|>\nBe brief.<|end|>\n<|user|>\nCapital of France?<|end|>\n<|assistant|>\n[Paris.<|end|>]\n</s>",
        ),
        (
            "phi4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Capital of France?<|im_end|>"
            "<|im_start|>assistant<|im_sep|>[Paris.<|im_end|>]",
        ),
        ("olmo2", "<s><|system|>\nBe brief.\n<|user|>\nCapital of France?\n<|assistant|>\n[Paris.</s>]"),
        ("tulu", "<|system|>\nBe brief.\n<|user|>\nCapital of France?\n<|assistant|>\n[Paris.</s>]"),
        (
            "deepseek_r1",
            "<s>Be brief.<｜User｜>Capital of France?<｜Assistant｜><think>\n[\n</think>\n\nParis.</s>]",
        ),
        (
            "gemma2",
            "<s><start_of_turn>user\nBe brief.\n\nCapital of France?<end_of_turn>\n"
            "<start_of_turn>model\n[Paris.<end_of_turn>]\n",
        ),
    ],
)
def test_exactly_what_the_model_must_emit_is_learned(name, expected):
    segments = chat.render(conversation(*ANSWERED), formats.FORMATS[name], prompt_weight=0.0)
    before, answer, after = (part.replace("{", "[").replace("}", "]") for part in expected.replace("]", "[").split("["))
    learned = [segment for segment in segments if segment.weight]
    assert text(segments) == before + answer + after
    assert text(learned) == answer
    assert {segment.weight for segment in learned} == {1.0}


def test_weights_are_per_message_and_per_prompt():
    turns = (
        Message("user", "a"),
        Message("assistant", "b", learn=False),
        Message("user", "c", learn=0.5),
        Message("assistant", "d"),
    )
    segments = chat.render(conversation(*turns), formats.FORMATS["plain"], prompt_weight=0.1)
    assert [(s.text, s.weight) for s in segments if s.text in "abcd<s></s>"] == [
        ("<s>", 0.0),
        ("a", 0.1),
        ("b", 0.0),
        ("</s>", 0.0),
        ("c", 0.5),
        ("d", 1.0),
        ("</s>", 1.0),
    ]


def said(content, fmt):
    """What stands before the terminator: the content, behind an empty thought and the space of the format."""
    thought = "" if fmt.reasoning is None else (fmt.reasoning.closing if fmt.reasoning.prompted else EMPTY_THOUGHT)
    own = fmt.turns["assistant"].terminator.removesuffix("</s>") if "</s>" in fmt.turns["assistant"].terminator else ""
    content = content.strip() if fmt.trims else content.lstrip("\n") if thought else content
    return thought + fmt.turns["assistant"].space + content + own


@given(
    name=st.sampled_from(sorted(formats.FORMATS)),
    system=st.none() | content,
    turns=st.lists(st.tuples(content, content), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_a_prompt_is_the_exact_beginning_of_the_training_ids_and_data_never_makes_a_control(name, system, turns):
    fmt = formats.resolve(name, TOKENIZER)
    messages = [Message("system", system)] if system is not None else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    segments = chat.render(conversation(*messages), fmt, prompt_weight=0.0)
    ids, weights = chat.encode(segments, TOKENIZER)
    prompt_ids, _ = chat.encode(chat.prompt(messages[:-1], fmt), TOKENIZER)

    assert ids[: len(prompt_ids)].tolist() == prompt_ids.tolist()
    answer = ids[len(prompt_ids) :][weights[len(prompt_ids) :] > 0]
    assert TOKENIZER.decode(answer) == said(messages[-1].content, fmt)
    assert int(answer[-1]) in chat.stop_ids(fmt, TOKENIZER)

    control_ids = {TOKENIZER.control(control) for control in (*CONTROLS, "<s>", "</s>")}
    assert sum(int(id) in control_ids for id in ids) == sum(segment.special for segment in segments)


def test_a_format_that_cannot_write_something_says_so():
    plain, gemma = formats.FORMATS["plain"], formats.FORMATS["gemma2"]
    call = Message("assistant", "", tool_calls=({"name": "f", "arguments": {}},))
    with pytest.raises(ValueError, match="'plain' cannot write tool calls"):
        chat.render(conversation(Message("user", "a"), call), plain, prompt_weight=0.0)
    with pytest.raises(ValueError, match="'gemma2' has no place for role 'tool'"):
        chat.render(conversation(Message("user", "a"), Message("tool", "b")), gemma, prompt_weight=0.0)
    with pytest.raises(ValueError, match="cannot write the row's tools"):
        chat.render(Conversation(ANSWERED, "s", "k", tags={"tools": "[{}]"}), plain, prompt_weight=0.0)


# ------------------------------------------------------------------------------------------ which turns are learned

TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


def learned(segments):
    return text([segment for segment in segments if segment.weight])


@pytest.mark.parametrize(
    ("learn", "flags", "expected"),
    [
        ("all", (None, None), "b</s>d</s>"),
        ("all", (False, None), "d</s>"),
        ("last", (None, None), "d</s>"),
        ("last", (True, None), "d</s>"),
        ("last", (None, False), ""),
        ("flag", (True, None), "b</s>"),
        ("flag", (None, 0.5), "d</s>"),
    ],
)
def test_all_turns_the_last_or_those_with_a_flag_are_learned(learn, flags, expected):
    first, second = flags
    turns = (TURNS[0], replace(TURNS[1], learn=first), TURNS[2], replace(TURNS[3], learn=second))
    segments = chat.render(conversation(*turns), formats.FORMATS["plain"], prompt_weight=0.0, learn=learn)
    assert learned(segments) == expected


def test_flags_that_nobody_set_are_an_error():
    with pytest.raises(ValueError, match="no message has `learn` set"):
        chat.render(conversation(*TURNS), formats.FORMATS["plain"], prompt_weight=0.0, learn="flag")
    with pytest.raises(ValueError, match="learn: 'some' is unknown"):
        chat.render(conversation(*TURNS), formats.FORMATS["plain"], prompt_weight=0.0, learn="some")


def test_the_separator_is_learned_only_when_asked_for():
    row, plain = conversation(*TURNS), formats.FORMATS["plain"]
    assert learned(chat.render(row, plain, prompt_weight=0.0, learns_separator=True)) == "b</s>\n\nd</s>\n\n"


# ------------------------------------------------------------------------------------------ history that is rewritten

THOUGHTS = tuple(replace(turn, reasoning=f"so {turn.content}") if turn.role == "assistant" else turn for turn in TURNS)
BEFORE = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_an_earlier_turn_without_its_thought_is_not_learned_where_it_stands():
    segments = chat.render(conversation(*THOUGHTS), formats.FORMATS["qwen3"], prompt_weight=0.0)
    assert text(segments).startswith(BEFORE + "b<|im_end|>\n")
    assert learned(segments) == "<think>\nso d\n</think>\n\nd<|im_end|>"
    assert chat.inexact(conversation(*THOUGHTS), formats.FORMATS["qwen3"]) == [1]


def test_views_show_every_turn_as_its_prompt_led_to_it():
    first, second = chat.views(conversation(*THOUGHTS), formats.FORMATS["qwen3"])
    assert (len(first.messages), len(second.messages)) == (2, 4)
    rendered = [chat.render(view, formats.FORMATS["qwen3"], prompt_weight=0.0) for view in (first, second)]
    assert text(rendered[0]).startswith(BEFORE + "<think>\nso b\n</think>\n\nb<|im_end|>")
    assert [learned(segments) for segments in rendered] == [
        "<think>\nso b\n</think>\n\nb<|im_end|>",
        "<think>\nso d\n</think>\n\nd<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2", "gemma3"])
def test_one_view_is_enough_where_history_stays(name):
    assert chat.views(conversation(*TURNS), formats.FORMATS[name])[0].messages[0] == TURNS[0]
    assert len(chat.views(conversation(*TURNS), formats.FORMATS[name])) == 1


def test_reasoning_can_be_kept_in_all_turns_or_in_none():
    kept = formats.keep_reasoning(formats.FORMATS["qwen3"], "all")
    segments = chat.render(conversation(*THOUGHTS), kept, prompt_weight=0.0)
    assert learned(segments) == "<think>\nso b\n</think>\n\nb<|im_end|><think>\nso d\n</think>\n\nd<|im_end|>"
    stripped = formats.keep_reasoning(formats.FORMATS["qwen3"], "none")
    assert learned(chat.render(conversation(*THOUGHTS), stripped, prompt_weight=0.0)) == "b<|im_end|>d<|im_end|>"
    deepseek = formats.keep_reasoning(formats.FORMATS["deepseek_r1"], "none")
    assert text(chat.render(conversation(*THOUGHTS[:2]), deepseek, prompt_weight=0.0)).startswith(
        text(chat.prompt(THOUGHTS[:1], deepseek))
    )
    with pytest.raises(ValueError, match="'chatml' has no place for reasoning"):
        formats.keep_reasoning(formats.FORMATS["chatml"], "all")


def test_reasoning_that_is_asked_to_be_left_out_is_left_out_by_every_format():
    row = Conversation((Message("user", "2 + 2?"), Message("assistant", "4", reasoning="Two and two.")), "s", "k")
    stripped = formats.keep_reasoning(formats.FORMATS["chatml"], "none")
    assert "Two and two" not in "".join(segment.text for segment in chat.render(row, stripped, prompt_weight=0.0))
    with pytest.raises(ValueError, match="reasoning"):
        chat.render(row, formats.FORMATS["chatml"], prompt_weight=0.0)


def test_a_thought_at_the_beginning_of_content_is_reasoning():
    inline = Message("assistant", "<think>\nso d\n</think>\n\nd")
    rendered = [
        chat.render(conversation(TURNS[0], answer), formats.FORMATS["qwen3"], prompt_weight=0.0)
        for answer in (inline, replace(TURNS[3], reasoning="so d"))
    ]
    assert text(rendered[0]) == text(rendered[1])


def test_the_system_prompt_that_moves_is_learned_where_it_was():
    """Mistral's system prompt stands before the last question, so an earlier answer followed another text."""
    row = conversation(Message("system", "s"), *TURNS)
    mistral = formats.FORMATS["mistral_v3"]
    assert text(chat.render(row, mistral, prompt_weight=0.0)) == "<s>[INST]a[/INST]b</s>[INST]s\n\nc[/INST]d</s>"
    views = [chat.render(view, mistral, prompt_weight=0.0) for view in chat.views(row, mistral)]
    assert [(text(v), learned(v)) for v in views] == [
        ("<s>[INST]s\n\na[/INST]b</s>", "b</s>"),
        ("<s>[INST]a[/INST]b</s>[INST]s\n\nc[/INST]d</s>", "d</s>"),
    ]


def test_a_prompt_may_ask_for_an_answer_without_a_thought():
    for name, default, without in (
        ("qwen3", "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("deepseek_r1", "<｜Assistant｜><think>\n", "<｜Assistant｜><think>\n\n</think>\n\n"),
    ):
        fmt = formats.FORMATS[name]
        assert text(chat.prompt(TURNS[:1], fmt)).endswith(default)
        assert text(chat.prompt(TURNS[:1], fmt, thinking=False)).endswith(without)


def test_generation_stops_at_the_end_of_a_turn_of_a_call_and_of_text():
    tokenizer = SentencePiece(train(["a"], size=320, controls=(*formats.FORMATS["llama3"].controls, "<|eom_id|>")))
    stops = chat.stop_ids(formats.FORMATS["llama3"], tokenizer)
    assert stops == {tokenizer.control("<|eot_id|>"), tokenizer.control("<|eom_id|>"), tokenizer.eos}


# ------------------------------------------------------------------------------------------ data is inert

PIECES = [
    *CONTROLS,
    *("<s>", "</s>", "<pad>", "<unk>", "<think>", "</think>", "<tool_call>", "[SYSTEM_PROMPT]", "<<SYS>>"),
    *("<|", "|>", "im_end", "<|im_", "end|>", "<", ">", "[", "]", "[IN", "ST]", "<｜", "<\uff5cUser"),
    *("{{ messages }}", "{% for x in y %}", "{x.__class__}", "{role}", "{0}", "%s", "\ue000", "\ufdd0", "\ufdd1", "\0"),
    *("\u2581", "\u200b", "\u202e", "e\u0301", "\U0001f3f3\ufe0f\u200d\U0001f308", " ", "\n", "a", "Paris"),
]
HF_SOURCE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def hostile_texts(number):
    rng = random.Random(0)
    return [*PIECES, *("".join(rng.choices(PIECES, k=rng.randint(1, 8))) for _ in range(number - len(PIECES)))]


def own_controls(segments):
    return [segment.text for segment in segments if segment.special]


def test_ten_thousand_hostile_texts_make_no_control_token():
    """For every format: as many control ids as the same conversation has with harmless text, in the same order."""
    template = jinja.ChatTemplate(
        HF_SOURCE, {"bos_token": "<s>", "eos_token": "</s>"}, controls=tuple(TOKENIZER.controls)
    )
    all_formats = [*(formats.resolve(name, TOKENIZER) for name in sorted(formats.FORMATS)), template]
    control_ids = {*TOKENIZER.controls.values()}
    texts = hostile_texts(10_000)
    contents = ["".join(texts[start : start + 20]) for start in range(0, len(texts), 20)]
    for fmt in all_formats:
        expected = own_controls(chat.render(conversation(*TURNS[:2]), fmt, prompt_weight=0.0))
        thinks = isinstance(fmt, formats.Format) and fmt.reasoning is not None  # such formats take a thought out
        inert = [content.replace("</think>", "</thought>") if thinks else content for content in contents]
        pairs = zip(inert[::2], inert[1::2], strict=True)
        pairs = [(Message("user", asked), Message("assistant", answered)) for asked, answered in pairs]
        rendered = [chat.render(conversation(*pair), fmt, prompt_weight=0.0) for pair in pairs]
        for segments, (ids, _) in zip(rendered, chat.encode_many(rendered, TOKENIZER), strict=True):
            assert own_controls(segments) == expected
            assert sum(int(id) in control_ids for id in ids) == len(expected)


def test_the_ids_of_padding_play_no_part():
    row = conversation(*TURNS)
    fmt = formats.resolve("plain", TOKENIZER)
    whole = chat.encode(chat.render(row, fmt, prompt_weight=0.0), TOKENIZER)[0].tolist()
    again = SentencePiece(TOKENIZER.model)
    for pad in (0, TOKENIZER.eos, TOKENIZER.unk):
        again.pad = pad
        assert chat.encode(chat.render(row, fmt, prompt_weight=0.0), again)[0].tolist() == whole
