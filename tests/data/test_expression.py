"""Expressions: a closed list of operations on a row, whose every fault is a ValueError."""

import pytest

from itjax.data import expression

ROW = {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answer": "B", "n": 2}
CHOICES = ("name", "choices")


def value(made, row=ROW):
    return expression.evaluate(made, row, lambda number, of: of - 1)


def test_the_picture_of_the_module():
    label = ("position", ("item", CHOICES, ("is", "label")), ("name", "answer"))
    assert value(("item", ("item", CHOICES, ("is", "text")), label)) == "blue"


@pytest.mark.parametrize(
    "made, expected",
    [
        (("text", ("is", "a"), ("name", "n"), ("is", True)), "a2True"),
        (("slice", ("name", "answer"), ("is", 1), ("is", None)), ""),
        (("if", ("==", ("name", "n"), ("is", 2)), ("is", "yes"), ("name", "absent")), "yes"),
        (("draw", "1", ("item", CHOICES, ("is", "text"))), "blue"),
        (
            ("for", ("x",), ("is", ["p", "q"]), ("text", ("item", ("name", "loop"), ("is", "index")), ("name", "x"))),
            "1p2q",
        ),
        (("for", ("a", "b"), ("zip", ("is", [1, 2]), ("is", "xy")), ("text", ("name", "b"), ("name", "a"))), "x1y2"),
        (("strip each", ("is", [" a ", "b "])), ["a", "b"]),
        (("item", ("is", "word"), ("negative", ("is", 1))), "d"),
    ],
)
def test_values(made, expected):
    assert value(made) == expected


@pytest.mark.parametrize(
    "made",
    [
        ("name", "absent"),
        ("item", ("name", "answer"), ("is", "__class__")),
        ("item", ("name", "n"), ("is", 0)),
        ("item", CHOICES, ("is", "absent")),
        ("text", CHOICES),
        ("text", ("is", None)),
        ("lower", CHOICES),
        ("length", ("name", "n")),
        ("number", ("is", "x")),
        ("add", ("is", "1"), ("is", 1)),
        ("sub", ("is", "a"), ("is", 1)),
        ("position", ("is", ["a"]), ("is", "b")),
        ("draw", "1", ("is", [])),
        ("for", ("x",), ("is", "abc"), ("name", "x")),
        ("range", ("is", 10**9)),
        ("replace", ("is", "a" * 2000), ("is", "a"), ("is", "b" * 2000)),
        ("<", ("is", "a"), ("is", 1)),
    ],
)
def test_faults_are_told_and_never_guessed(made):
    with pytest.raises(ValueError, match=r"\w"):
        value(made)
