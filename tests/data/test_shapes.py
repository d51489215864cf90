"""Every shape that people write becomes the same conversation; every row that is none of them is told why."""

import json

import pytest

from itjax.base.records import Message, ToolCall
from itjax.data import shapes
from itjax.data.strict_json import RowError

ANSWERED = (Message("user", "2 + 2?"), Message("assistant", "4"))
CALL = {"name": "add", "arguments": {"a": 2}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(row, *, shape="auto", columns=None, task=None, number=0):
    columns = columns or {}
    row = shapes.mapped(row, columns, positions=False)
    return shapes.conversation(row, source="s", key="k", shape=shape, columns=columns, task=task, number=number)


def complaint(row, **settings):
    with pytest.raises(RowError, match=r".+") as error:
        read(row, **settings)
    return str(error.value), error.value.reason


def chat(**message):
    """A question, and an answer with these fields."""
    return {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", **message}]}


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4"}, "prompt"),
        ({"instruction": "2 + 2?", "output": "4"}, "instruction"),
        ({"instruction": "2 + 2?", "input": None, "output": "4", "system": None, "history": None}, "instruction"),
        ({"instruction": "2 + 2?", "response": "4", "context": ""}, "response"),
        ({"transcript": "\n\nHuman: 2 + 2?\n\nAssistant: 4"}, "transcript"),
        (chat(content="4"), "messages"),
        (chat(content=[{"type": "text", "text": "4"}]), "messages"),
        (chat(content=[{"type": "text", "value": "4"}]), "messages"),
        ({"messages": json.dumps(chat(content="4")["messages"])}, "messages"),  # a cell of a table
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "sharegpt"),
        ({"conversations": chat(content="4")["messages"]}, "sharegpt"),
        ({**chat(content="4"), "prompt": None, "completion": None, "tools": None, "id": 7}, "messages"),
    ],
)
def test_every_shape_is_recognised_by_looking(row, shape):
    conversation = read(row)
    assert conversation.messages == ANSWERED
    assert conversation.template == shape


def test_a_transcript_is_cut_where_a_speaker_begins_and_nowhere_else():
    said = "\n\nHuman: He said\nHuman: hello\n\nAssistant: So?\n\nWell.\n\nHuman:\n\nAssistant: yes"
    row = {"chosen": said, "rejected": said}
    made = read(row, columns={"transcript": "chosen"})
    assert [(m.role, m.content) for m in made.messages] == [
        ("user", "He said\nHuman: hello"), ("assistant", "So?\n\nWell."), ("user", ""), ("assistant", "yes")
    ]  # fmt: skip
    assert complaint({"transcript": "Assistant says: hi"})[1] == "transcript without a speaker"


def test_an_instruction_has_a_system_prompt_a_history_and_an_input():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.", "history": [["a", "b"]]}
    assert [(m.role, m.content) for m in read(row).messages] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n\n2, 2"),
        ("assistant", "4"),
    ]


def test_a_system_prompt_beside_messages_is_their_first():
    assert read({**chat(content="4"), "system": "Be brief."}).messages == (Message("system", "Be brief."), *ANSWERED)


@pytest.mark.parametrize(
    ("field", "value", "learn"),
    [("learn", True, True), ("learn", 0.5, 0.5), ("loss_weight", 0, 0.0), ("weight", 1, 1.0), ("learn", None, None)],
)
def test_a_message_says_how_much_it_is_learned(field, value, learn):
    assert read(chat(content="4", **{field: value})).messages[1].learn == learn


def test_turns_of_a_prompt_are_not_learned_and_those_of_its_completion_are():
    row = {"prompt": chat(content="5")["messages"], "completion": [{"role": "assistant", "content": "4"}]}
    assert [m.learn for m in read(row).messages] == [None, False, None]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "system"),
        ("ipython", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
        ("model", "assistant"),
    ],
)
def test_roles_have_many_names(name, role):
    row = chat(content="4")
    row["messages"].append({"role": name, "content": "x"})
    assert read(row).messages[-1].role == role


@pytest.mark.parametrize(
    "fields",
    [
        {"content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"tool_calls": [{"id": "c1", **CALL}]},
    ],
)
def test_tool_calls_come_in_two_shapes(fields):
    assert read(chat(**fields)).messages[1] == Message("assistant", "", tool_calls=(ToolCall("add", {"a": 2}, "c1"),))


def test_arguments_stay_as_the_row_has_them():
    called = read(
        chat(content="", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 2}'}}, {"name": "now"}])
    )
    assert called.messages[1].tool_calls == (ToolCall("add", '{"a": 2}'), ToolCall("now", {}))


def test_sharegpt_calls_and_observations():
    turns = [("human", "2 + 2?"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "It is 4.")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": json.dumps([TOOL])}
    conversation = read(row)
    assert conversation.messages == (
        Message("user", "2 + 2?"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 2}),)),
        Message("tool", "4"),
        Message("assistant", "It is 4."),
    )
    assert conversation.tools == (TOOL,)
    assert conversation.tags == {}


@pytest.mark.parametrize("tools", [[TOOL], TOOL, json.dumps([TOOL])])
def test_tools_are_a_list_however_they_are_written(tools):
    assert read({**chat(content="4"), "tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_no_tools(tools):
    assert read({**chat(content="4"), "tools": tools}).tools == ()


def test_what_a_tool_answers_names_the_tool_and_the_call():
    row = chat(content="4")
    row["messages"].insert(1, {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"})
    assert read(row).messages[1] == Message("tool", "4", name="add", tool_call_id="c1")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(field):
    assert read(chat(content="4", **{field: "2 and 2"})).messages[1].reasoning == "2 and 2"


# ---------------------------------------------------------------------------------------------- trees


def node(role, text, *replies):
    return {"role": role, "text": text, "message_id": text, "lang": "en", "replies": list(replies)}


TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "prompter",
        "q",
        node("assistant", "a", node("prompter", "b", node("assistant", "c")), node("prompter", "unanswered")),
        node("assistant", "d", node("prompter", "unanswered"), node("prompter", "unanswered")),
    ),
}


def test_a_tree_is_its_paths_up_to_the_last_answer():
    assert shapes.count_paths(TREE) == (2, 3)
    paths = [[message.content for message in read(TREE, number=number).messages] for number in (1, 2)]
    assert paths == [["q", "a", "b", "c"], ["q", "d"]]
    assert [message.role for message in read(TREE, number=1).messages] == ["user", "assistant"] * 2
    assert read(TREE, number=1).tags == {"id": "c", "lang": "en"}


def test_a_tree_that_nobody_answered_is_told():
    tree = {"prompt": node("prompter", "q")}
    assert shapes.count_paths(tree) == (0, 1)
    assert complaint(tree)[1] == "no assistant turn"


def test_a_tree_among_other_rows_is_not_cut_to_one_path():
    assert complaint(TREE) == ("a tree among rows that are none; name its shape: 'oasst'", "a tree among other rows")


def test_a_path_of_a_tree_has_fields_for_templates():
    fields = shapes.path_fields(TREE, 2)
    assert fields["messages"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "d"}]
    assert fields["message_tree_id"] == "t"


# ---------------------------------------------------------------------------------------------- Natural-Instructions

TASK = {"type": "task", "task": "task1_sum", "definition": ["Add the numbers"], "category": ["Mathematics"]}


def test_an_instance_is_asked_in_the_benchmark_s_words():
    conversation = read({"type": "instance", "id": "i7", "input": "2, 2 ", "output": ["4", "four"]}, task=TASK)
    asked = "Definition: Add the numbers.\n\nNow complete the following example -\nInput: 2, 2.\nOutput: "
    assert conversation.messages == (Message("user", asked), Message("assistant", "4"))
    assert conversation.template == "natural_instructions/definition"
    assert conversation.tags == {
        "task": "task1_sum",
        "category": "Mathematics",
        "id": "i7",
        "references": '["4", "four"]',
    }


def test_an_instance_carries_the_examples_of_its_task():
    task = {**TASK, "positive_examples": [{"input": "1, 1", "output": "2"}]}
    row = shapes.with_task({"input": "2, 2", "output": ["4"]}, task)
    assert row["definition"] == "Add the numbers"
    assert row["positive_examples"] == [{"input": "1, 1", "output": "2"}]
    assert row["input"] == "2, 2"


# ---------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "2 + 2?", "answer": "4"}, {"prompt": "question", "completion": "answer"}),
        ({"prompt": "2 + 2?", "solution": "4"}, {"completion": "solution"}),
        ({"q": "2 + 2?", "a": [{"text": "4"}]}, {"instruction": "q", "output": "a.0.text"}),
        ({"turns": chat(content="4")["messages"], "prompt": "x", "completion": "y"}, {"messages": "turns"}),
        ({"instruction": "2 + 2?", "chosen": "4", "rejected": "5"}, {"output": "chosen"}),
        ({"a.b": "2 + 2?", "a": {"b": "no"}, "c": "4"}, {"prompt": "a.b", "completion": "c"}),
    ],
)
def test_columns_say_where_fields_stand(row, columns):
    assert read(row, columns=columns).messages == ANSWERED


def test_positions_count_the_columns_of_a_table():
    row = {"q": "2 + 2?", "a": "4"}
    assert shapes.mapped(row, {"prompt": "0", "completion": "1"}, positions=True) == {
        **row,
        "prompt": "2 + 2?",
        "completion": "4",
    }


def test_a_text_without_a_question_is_learned_whole():
    assert read({"text": "All of it."}, columns={"completion": "text"}).messages == (
        Message("assistant", "All of it."),
    )


def test_a_missing_column_is_named_with_the_nearest_and_all():
    message, reason = complaint({"question": "a", "answer": "b"}, columns={"prompt": "qestion"})
    assert message == (
        "column 'qestion' (for prompt) is missing; did you mean 'question'? Columns there: question, answer"
    )
    assert reason == "no column qestion"


# ---------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("row", "message", "reason"),
    [
        ([1], "the row is a list, not an object", "the row is not an object"),
        (None, "the row is null, not an object", "the row is not an object"),
        ({"prompt": 3, "completion": "4"}, "prompt is a number, not a text", "prompt is not a text"),
        ({"prompt": None, "completion": "4"}, "prompt is null, not a text", "prompt is not a text"),
        (
            {"prompt": "a", "completion": "\ud800"},
            "completion holds a lone surrogate",
            "completion holds a lone surrogate",
        ),
        ({"question": "a"}, "keys ['question'] are none of the known shapes", "unknown shape"),
        ({"messages": []}, "messages is empty", "messages is empty"),
        ({"messages": "hi"}, "messages is a text, not a list of turns", "messages is not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "there is no assistant turn", "no assistant turn"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1: role 'usr' is unknown", "unknown role"),
        ({"messages": [{"role": "user"}]}, "message 1: content is missing", "missing content"),
        ({"messages": [3]}, "message 1: it is a number", "a turn is not an object"),
        (chat(content="4", learn=-1), "message 2: learn is -1", "learn is not a weight"),
        (chat(content="4", learn="yes"), "message 2: learn is 'yes'", "learn is not a weight"),
        (chat(content=None), "message 2: content is null, not a text", "content is not a text"),
        (chat(content=[{"type": "image"}]), "message 2: part 1 of content is 'image'", "content is not only text"),
        (chat(tool_calls=[{"arguments": {}}]), "message 2: a tool call is not", "a tool call without a name"),
        (chat(tool_calls="add(2)"), "message 2: tool_calls is a text", "tool_calls is not a list"),
        ({**chat(content="4"), "tools": "add"}, "tools is not JSON", "tools is not JSON"),
        (
            {**chat(content="4"), "tools": [1]},
            "tools is a list, not a list of objects",
            "tools is not a list of objects",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "turn 1: from 'bot' is unknown", "unknown from"),
        (
            {"conversations": [{"from": "function_call", "value": "add"}]},
            "turn 1: what it calls is not JSON",
            "a tool call is not JSON",
        ),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "history is not a list of [question, answer]",
            "history is not a list of pairs",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data: needs a preference", "preference data"),
        ({"chosen_messages": [], "rejected_messages": []}, "preference data: needs", "preference data"),
        ({**chat(content="4"), "label": False}, "preference data: needs", "preference data"),
    ],
)
def test_a_wrong_row_is_told_why(row, message, reason):
    said, counted = complaint(row)
    assert said.startswith(message)
    assert counted == reason


def test_an_error_does_not_quote_a_long_value():
    said, reason = complaint({"messages": [{"role": "x" * 1000, "content": "a"}]})
    assert len(said) < 250
    assert "x" not in reason


def test_a_shape_by_name_is_not_guessed():
    row = {"prompt": "2 + 2?", "completion": "4", "messages": [{"role": "user", "content": "no"}]}
    assert read(row, shape="prompt").messages == ANSWERED


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        ("instruction", "instruction"),
        ("response", "response"),
        ("prompt", "prompt"),
        ("text", "completion"),
        ("messages", "messages"),
        ("sharegpt", "conversations"),
    ],
)
def test_a_row_without_the_fields_of_its_shape_is_told_which(shape, missing):
    assert complaint({"x": "a"}, shape=shape) == (f"{missing} is missing", f"missing {missing}")
