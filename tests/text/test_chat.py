"""What is learned of a conversation, and that a prompt is the beginning of the training text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Conversation, Message
from itjax.text import chat, formats
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
