"""Formats write what the templates of published models write, byte for byte; where they do not, it is listed here."""

from dataclasses import replace

import pytest

from itjax.text import chat, formats, jinja
from itjax.text.pieces import CannotWrite
from tests.text.conversations import conversation, published_models, read_message, rows, text

FAMILIES = {
    "Qwen/Qwen2.5-3B-Instruct": "qwen2",
    "Qwen/Qwen3-4B": "qwen3",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "deepseek_r1",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "google/gemma-3-4b-it": "gemma3",
    "LLM-Research/Meta-Llama-3-8B-Instruct": "llama3",
    "LLM-Research/Phi-3.5-mini-instruct": "phi3",
    "LLM-Research/phi-4": "phi4",
}
REFUSED = "refused"  # the template leaves something out without a word; the format says so
OTHERWISE = "otherwise"  # the template contradicts itself; the format writes what its prompt leads to
# What a format does not write as published, and why. Everything that is not listed is equal byte for byte.
ON_PURPOSE = {
    "qwen2": {
        # arguments in a text are quoted once more by the template, and its own instructions ask for an object
        "assistant_tool_call_history": OTHERWISE,
        "tool_response_execution": OTHERWISE,
        "parallel_tool_calls": OTHERWISE,
        "reasoning_content": REFUSED,
    },
    "deepseek_r1": {
        # the prompt opens a thought, the template's answers have none
        "system_user_assistant": OTHERWISE,
        "reasoning_content": OTHERWISE,
        "empty_assistant_content": OTHERWISE,
        "empty_user_content": OTHERWISE,
        "empty_user_assistant_content": OTHERWISE,
        "tools_provided_no_call": REFUSED,
        "tool_response_execution": REFUSED,
    },
    "smollm2": dict.fromkeys(["tools_provided_no_call", "tool_response_execution", "reasoning_content"], REFUSED),
    "gemma3": dict.fromkeys(["tools_provided_no_call", "assistant_tool_call_history", "reasoning_content"], REFUSED),
    "llama3": dict.fromkeys(
        [
            "tools_provided_no_call",
            "assistant_tool_call_history",
            "tool_response_execution",
            "parallel_tool_calls",
            "reasoning_content",
        ],
        REFUSED,
    ),
    "phi3": dict.fromkeys(["tools_provided_no_call", "tool_response_execution", "reasoning_content"], REFUSED),
    "phi4": dict.fromkeys(["tools_provided_no_call", "tool_response_execution", "reasoning_content"], REFUSED),
}


def written(case, fmt, specials):
    messages = tuple(map(read_message, case["messages"]))
    tools = tuple(case.get("tools") or ())
    if case["add_generation_prompt"]:
        segments = chat.prompt(messages, fmt, tools=tools)
    else:
        segments = chat.render(conversation(*messages, tools=tools), fmt, prompt_weight=0.0)
    return text(segments, specials["bos_token"], specials["eos_token"])


@pytest.mark.parametrize("model", FAMILIES)
def test_published_models_are_written_byte_for_byte(shared_data, model):
    fields, fmt = published_models(shared_data)[model], formats.FORMATS[FAMILIES[model]]
    outcome = {}
    for case in fields["cases"]:
        assert written(case, formats.as_published(fmt), fields["special_tokens"]) == case["expected"]
        try:
            equal = written(case, fmt, fields["special_tokens"]) == case["expected"]
            outcome[case["description"]] = "equal" if equal else OTHERWISE
        except CannotWrite:
            outcome[case["description"]] = REFUSED
    assert {name: what for name, what in outcome.items() if what != "equal"} == ON_PURPOSE.get(fmt.name, {})


def template(shared_data, path, *controls, **fields):
    source = (shared_data / "chat_templates" / path).read_text()
    if path.startswith("chujiezheng"):  # laid out for reading; its readme says to take out indents and line breaks
        source = source.replace("    ", "").replace("\n", "")
    specials = {"bos_token": "<s>", "eos_token": "</s>"} | fields.pop("specials", {})
    return jinja.ChatTemplate(source, specials, controls=controls, place=path, **fields)


def spelt(row, literal=False):
    return jinja.spelt(row.messages, literal=literal, nothing="")


def assert_writes_the_same(fmt, theirs, conversations, *, change=lambda text: text, literal=False):
    for row in conversations:
        ours = text(chat.render(row, fmt, prompt_weight=0.0))
        assert change(ours) == theirs.render(spelt(row, literal), row.tools)
        asked = row.messages[:-1]
        ours = text(chat.prompt(asked, fmt, tools=row.tools))
        assert change(ours) == theirs.render(spelt(replace(row, messages=asked), literal), row.tools, asks=True)


F = formats.FORMATS
EQUAL = [
    ("chujiezheng/alpaca.jinja", replace(F["alpaca"], default_system=""), {}),
    ("chujiezheng/chatml.jinja", replace(F["chatml"], begin="<s>"), {}),
    ("chujiezheng/gemma-it.jinja", formats.without_begin(F["gemma2"]), {}),
    ("chujiezheng/vicuna.jinja", F["vicuna"], {}),
    ("chujiezheng/zephyr.jinja", F["zephyr"], {}),
    ("mistral_common/v3.jinja", F["mistral_v3"], {}),
    ("trl/gemma_training.jinja", F["gemma2"], {"system": False}),
    ("trl/qwen2_5_training.jinja", F["qwen2"], {}),
    ("trl/qwen2_5_training.jinja", F["qwen2"], {"tools": True}),
    ("trl/qwen3_training.jinja", formats.keep_reasoning(F["qwen3"], "all"), {"thinks": True}),
    ("trl/qwen3_training.jinja", formats.keep_reasoning(F["qwen3"], "all"), {"tools": True, "thinks": True}),
]


@pytest.mark.parametrize(("path", "fmt", "kind"), EQUAL, ids=lambda value: value if isinstance(value, str) else "")
def test_templates_of_others_are_written_byte_for_byte(shared_data, path, fmt, kind):
    assert_writes_the_same(fmt, template(shared_data, path), rows(120, **kind))


@pytest.mark.parametrize("path", ["chujiezheng/llama-3-instruct.jinja", "trl/llama3_training.jinja"])
def test_llama3_is_written_byte_for_byte(shared_data, path):
    theirs = template(shared_data, path, specials={"bos_token": "<|begin_of_text|>"})
    assert_writes_the_same(F["llama3"], theirs, rows(120))


def test_phi3_is_written_byte_for_byte(shared_data):
    assert_writes_the_same(F["phi3"], template(shared_data, "trl/phi3_training.jinja"), rows(120))


def test_qwen3_follows_its_own_template_through_thinking_and_tools(shared_data):
    fields = published_models(shared_data)["Qwen/Qwen3-4B"]
    theirs = jinja.ChatTemplate(fields["template"], fields["special_tokens"], controls=("<|im_end|>",))
    assert_writes_the_same(F["qwen3"], theirs, [*rows(150, tools=True, thinks=True), *rows(50, thinks=True)])


def test_mistral_v3_is_written_byte_for_byte_with_tools(shared_data):
    """Its template escapes arguments that are objects as if they were HTML; those that are a text it writes as JSON."""
    theirs = template(shared_data, "mistral_common/v3.jinja")
    assert_writes_the_same(F["mistral_v3"], theirs, rows(120, tools=True), literal=True)


def test_mistral_v1_has_the_space_that_its_tokenizer_sets_before_an_answer(shared_data):
    theirs = template(shared_data, "mistral_common/v1.jinja")
    assert_writes_the_same(F["mistral_v1"], theirs, rows(120), change=lambda ours: ours.replace("[/INST] ", "[/INST]"))


def test_the_spaces_of_the_other_mistral_template_are_those_of_its_tokenizer(shared_data):
    """v3_spm.jinja writes the space that SentencePiece sets after control tokens; ours leaves it to the tokenizer."""
    theirs = template(shared_data, "mistral_common/v3_spm.jinja")
    for row in rows(120, tools=True):
        ours = text(chat.render(row, F["mistral_v3"], prompt_weight=0.0))
        assert ours.replace(" ", "") == theirs.render(spelt(row, literal=True), row.tools).replace(" ", "")
