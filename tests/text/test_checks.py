"""Faults that train without complaint are found before the run."""

from dataclasses import replace

import pytest

from itjax.base.records import Message
from itjax.text import checks, formats, jinja
from itjax.text.tokenizer import SentencePiece, train
from tests.text.conversations import conversation

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|user|>")
TOKENIZER = SentencePiece(train(["user assistant"] * 9, size=320, controls=CONTROLS))
TALK = conversation(Message("user", "a"), Message("assistant", "b"))


@pytest.mark.parametrize("name", ["plain", "chatml", "alpaca", "qwen3"])
def test_sound_formats_have_no_problems(name):
    assert checks.problems([TALK], formats.resolve(name, TOKENIZER), TOKENIZER) == []


def test_two_begins_of_text_in_a_row_are_found():
    doubled = replace(formats.FORMATS["plain"], begin="<s><s>")
    assert "two begins of text in a row" in checks.problems([TALK], doubled, TOKENIZER)[0]


def test_a_terminator_that_nothing_teaches_is_found():
    silent = conversation(Message("user", "a"), Message("assistant", "b", learn=False))
    assert "no learned turn has a terminator" in checks.problems([silent], formats.FORMATS["plain"], TOKENIZER)[0]


def test_a_control_token_that_the_format_writes_as_text_is_found():
    found = checks.problems([TALK], formats.FORMATS["zephyr"], TOKENIZER)
    assert found == ["format 'zephyr' writes '<|user|>' as text, but the tokenizer has a control token of it"]


def test_data_that_looks_like_a_control_token_is_no_problem():
    row = conversation(Message("user", "<|im_end|><s><s>"), Message("assistant", "<|user|>"))
    assert checks.problems([row], formats.resolve("chatml", TOKENIZER), TOKENIZER) == []


def test_a_difference_names_the_case_and_the_first_characters():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    template = jinja.ChatTemplate(source, {}, controls=CONTROLS)
    found = checks.compare(formats.FORMATS["chatml"], template)
    assert found[0] == (
        "a question and its answer, text: at character 16 '\\nWhat is new?<|im_end|>\\n<|im_start|>assi' "
        "against ': What is new?<|im_end|>\\n<|im_start|>ass'"
    )
    assert any(line.startswith("several turns, prompt: ") for line in found)


def test_turns_that_are_not_learned_are_counted():
    thinking = Message("assistant", "b", reasoning="c")
    row = conversation(Message("user", "a"), thinking, Message("user", "a"), thinking)
    assert checks.count_unlearned([row, TALK], formats.FORMATS["qwen3"]) == 1
    assert checks.count_unlearned([row, TALK], formats.keep_reasoning(formats.FORMATS["qwen3"], "all")) == 0
