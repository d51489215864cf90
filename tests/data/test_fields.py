"""Fields: what a column may hold, and every way to say it."""

import pytest

from itjax.data import fields
from itjax.data.fields import Field, Listed, mark, marked, position, read, say_list


@pytest.mark.parametrize(
    "marker, third, called",
    [
        ("(A) ", "(C) ", "(C)"),
        ("A. ", "C. ", "C"),
        ("[a] ", "[c] ", "[c]"),
        ("1) ", "3) ", "3"),
        ("Option 1: ", "Option 3: ", "Option 3"),
        ("- ", "- ", "-"),
    ],
)
def test_a_marker_counts_where_it_has_a_letter_or_a_one(marker, third, called):
    assert (marked(marker, 2), mark(marker, 2)) == (third, called)
    assert fields.counts(marker) == (marker != "- ")


def test_behind_the_last_letter_come_numbers():
    assert [marked("A. ", number) for number in (25, 26)] == ["Z. ", "27. "]


def test_a_list_is_said_in_three_ways():
    items = ["red", "blue", "green"]
    assert say_list(items, "", "- ") == "red, blue, green"
    assert say_list(items, "_or", "- ") == "red, blue or green"
    assert say_list(items, "_lines", "a) ") == "a) red\nb) blue\nc) green"
    assert say_list(["red"], "_or", "- ") == "red"


@pytest.mark.parametrize(
    "value, listed, first, expected",
    [
        ("blue", ("red", "blue"), 0, 1),
        ("BLUE ", ("red", "blue"), 0, 1),
        (1, ("red", "blue"), 0, 1),
        ("2", ("red", "blue"), 1, 1),
        ("B", ("red", "blue"), 0, 1),
        ("b", ("red", "blue"), 0, 1),
        ("1", ("2", "1"), 0, 1),
        ("A", ("B", "A"), 0, 1),
        (True, ("False", "True"), 0, 1),
    ],
)
def test_a_choice_is_meant_by_text_number_or_letter_and_text_goes_first(value, listed, first, expected):
    assert position(value, Listed(listed), first) == expected


def test_labels_of_the_row_come_before_letters_and_numbers():
    listed = read({"text": ["red", "blue"], "label": ["2", "1"]}, Field("list"))
    assert listed == Listed(("red", "blue"), ("2", "1"))
    assert position("1", listed, 0) == 1


@pytest.mark.parametrize("value", [2, -1, "C", "green", ""])
def test_a_choice_outside_its_list_is_an_error(value):
    with pytest.raises(ValueError, match="is none of"):
        position(value, Listed(("red", "blue")), 0)


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("text", 3, "3"),
        ("text", 0.5, "0.5"),
        ("text", ["only"], "only"),
        ("list", ["a", 1], Listed(("a", "1"))),
        ("list", '["a", "b"]', Listed(("a", "b"))),
        ("list", [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], Listed(("x", "y"), ("A", "B"))),
        ("json", '{"a": 1}', {"a": 1}),
        ("json", {"a": 1}, {"a": 1}),
    ],
)
def test_what_columns_hold_is_read(kind, value, expected):
    assert read(value, Field(kind)) == expected


@pytest.mark.parametrize(
    "kind, value, message",
    [
        ("text", {"a": 1}, "an object, not a text"),
        ("text", ["a", "b"], "a list, not a text"),
        ("list", "a, b", "a text, not a list"),
        ("list", [], "an empty list"),
        ("json", '{"a": ', "it is not JSON"),
        ("turns", "hello", "a text, not a list of turns"),
        ("turns", [{"role": "pope", "content": "x"}], "turn 1 has role 'pope'"),
        ("tools", 3, "a number, not a list of functions"),
        ("calls", [{"arguments": {}}], "call 1 has no name"),
        ("calls", [], "there is no call"),
    ],
)
def test_what_a_column_should_not_hold_is_told(kind, value, message):
    with pytest.raises(ValueError, match=message):
        read(value, Field(kind))


def test_turns_are_read_from_texts_and_objects_and_said_as_lines():
    turns = read(["Hi", {"from": "gpt", "value": "Hello"}, {"role": "user", "content": "Bye"}], Field("turns"))
    assert fields.say_turns(turns) == "User: Hi\nAssistant: Hello\nUser: Bye"
    assert {turn.learn for turn in turns} == {False}


def test_calls_are_said_as_json_whether_arguments_are_an_object_or_its_text():
    (first, second) = read(
        [{"name": "f", "arguments": '{"a": 1}'}, {"function": {"name": "g", "arguments": {"é": 2}}, "id": "7"}],
        Field("calls"),
    )
    assert (
        fields.say_calls([first, second])
        == '{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {"é": 2}}'
    )
    assert second.id == "7"


def test_json_is_said_in_three_ways():
    value = {"name": "Zoë", "age": 7}
    assert fields.say_json(value, "") == '{"name": "Zoë", "age": 7}'
    assert fields.say_json(value, "_indented") == '{\n  "name": "Zoë",\n  "age": 7\n}'
    assert fields.say_json([value, {"city": 1}], "_keys") == "name, age, city"
    with pytest.raises(ValueError, match="no keys"):
        fields.say_json([1], "_keys")


def test_the_first_of_several_right_answers_is_said():
    assert read(["4", "four"], Field("references")) == ("4", "four")
    assert read("4", Field("references")) == ("4",)


def test_a_sentence_ends_in_punctuation():
    assert [fields.sentence(text) for text in (" a b ", "a?", "(a)", "")] == ["a b.", "a?", "(a)", "."]


@pytest.mark.parametrize("items", [["a", "None of the above"], ["x", "Both A and B"], ["all of these", "b"]])
def test_items_that_speak_of_others_keep_their_order(items):
    assert fields.keeps_order(items)
    assert not fields.keeps_order(["a cat", "a dog"])
