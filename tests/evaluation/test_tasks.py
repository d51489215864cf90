"""Scores of the embedded tasks: a reference answer has full marks, and each way to be wrong costs its metric."""

import json
import logging

import pytest

from itjax.data.tasks import FAMILIES, Field, TaskSource
from itjax.data.templates import fill
from itjax.evaluation import sandbox, tasks
from itjax.evaluation.tasks import PRIMARY, score, score_all

NAMES = sorted(FAMILIES)


def answers(family: str, *, examples: int):
    """(row, template, reference) for rows that meet every template in turn."""
    rows = TaskSource(family, examples=examples, seed=5, split="eval", phrasings="all")
    templates = FAMILIES[family].templates
    for index in range(examples):
        row, template = rows[index], templates[index % len(templates)]
        yield row, template, fill(template.answer, row)


def one(family: str, form: str):
    return next(answer for answer in answers(family, examples=200) if answer[1].name.endswith(f"/{form}"))


@pytest.mark.parametrize("family", NAMES)
def test_the_reference_answer_of_every_template_has_full_marks(family):
    many = list(answers(family, examples=2 * len(FAMILIES[family].templates)))
    scores = score_all(family, many)
    assert len(scores) == len(many)
    assert all(PRIMARY[family] in marks and "exact_match" in marks for marks in scores)
    assert {value for marks in scores for value in marks.values()} == {1.0}


def test_every_reference_function_passes_its_tests_and_its_example_holds():
    """The tests were computed beside the code, not from it: here the code itself is run, in this process."""
    rows = TaskSource("functions", examples=400, seed=9, split="train", phrasings="all")
    for index in range(400):
        space: dict = {}
        exec(fill("def {name}({v}):\n    return {code}\nassert {example}", rows[index]), space)
        for arguments, expected in json.loads(rows[index]["tests"]):
            assert repr(space[rows[index]["name"]](*arguments)) == repr(expected)


def test_every_arithmetic_reference_is_true():
    rows = TaskSource("arithmetic", examples=400, seed=9, split="train", phrasings="all")
    for index in range(400):
        row = rows[index]
        for step in (row["first"], row["second"]):
            if "=" in step:
                left, right = step.split(" = ")
                assert eval(left) == int(right)
                assert 0 <= int(right) < 100
            else:
                number, _, parity = step.split()
                assert parity == ("even", "odd")[int(number) % 2]
        assert row["second"].endswith(row["answer"])
        assert row["first"].split()[0] in row["story"].split()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "wrong", ["", "sorry", "{", "{}", "[]", "null", "def", "Answer:", "\x00", "{" * 5000, "[" * 100000]
)
def test_nonsense_scores_nothing(family, wrong):
    row, template, _ = next(answers(family, examples=1))
    assert set(score(family, row, template, wrong).values()) == {0.0}


@pytest.mark.parametrize("family", NAMES)
def test_the_answer_to_another_row_is_wrong(family):
    first, second = list(answers(family, examples=200))[:: len(FAMILIES[family].templates)][:2]
    assert first[1] is second[1]
    marks = score(family, first[0], first[1], second[2])
    assert marks["exact_match"] == 0
    assert marks[PRIMARY[family]] == 0


@pytest.mark.parametrize(
    "form, change",
    [
        ("line", ('"wait": ', '"wait": "2", "x": ')),  # another key
        ("line", ('"urgent": ', '"urgent": 1, "u": ')),
        ("line", ('"category": "', '"category": "other ')),  # no such label
        ("line", ('"unit": "', '"unit": "milli')),  # no such unit
        ("line", ('"product": ', '"Product": ')),
        ("line", ("}", "")),
        ("line", ("}", "} and that is all")),
        ("line", ("{", '{"urgent": true, ')),  # a key twice
        ("lines", ('"wait": ', '"wait": 0.')),  # a float
        ("short", ("{", "[{")),
    ],
)
def test_json_is_valid_only_by_the_schema(form, change):
    row, template, reference = one("triage", form)
    wrong = reference.replace(*change, 1)
    assert wrong != reference
    assert score("triage", row, template, wrong) == {"exact_match": 0, "valid_json": 0}


def test_types_are_exact():
    assert Field(int).accepts(1)
    assert not any(Field(int).accepts(value) for value in (True, 1.0, "1", None, [1]))
    assert not any(Field(bool).accepts(value) for value in (1, 0, "true", None))
    assert not FAMILIES["triage"].schema["wait"].accepts(10)


def test_valid_json_with_a_wrong_value_is_valid_and_wrong():
    row, template, reference = one("triage", "line")
    wrong = reference.replace(row["product"], "sofa" if row["product"] != "sofa" else "tent")
    assert score("triage", row, template, wrong) == {"exact_match": 0, "valid_json": 1}


def test_valid_json_is_claimed_only_where_json_was_asked_for():
    row, template, reference = one("triage", "label")
    assert score("triage", row, template, reference) == {"exact_match": 1}


def test_space_around_an_answer_does_not_count_and_a_word_more_does():
    row, template, reference = one("support", "footer")
    assert score("support", row, template, f"{reference}\n")["exact_match"] == 1
    assert score("support", row, template, f"{reference} ok")["exact_match"] == 0


@pytest.mark.parametrize("form", ["lines", "sentence", "words"])
def test_a_right_result_after_wrong_steps_is_only_the_result(form):
    row, template, reference = one("arithmetic", form)
    wrong = reference.replace(row["first"], "1 + 1 = 3")
    assert score("arithmetic", row, template, wrong) == {"exact_match": 0, "final_answer": 1}
    assert score("arithmetic", row, template, f"{reference}0") == {"exact_match": 0, "final_answer": 0}


def test_a_reply_must_cite_the_article_given_and_carry_the_ticket():
    row, template, reference = one("support", "footer")
    no_article = score("support", row, template, reference.replace(row["article"], "KB99"))
    assert no_article == {"exact_match": 0, "cites_article": 0, "carries_ticket": 1}
    two_articles = score("support", row, template, f"{reference} KB99")
    assert two_articles["cites_article"] == 0
    no_ticket = score("support", row, template, reference.replace(row["ticket"], "Z99"))
    assert no_ticket == {"exact_match": 0, "cites_article": 1, "carries_ticket": 0}


def test_functions_are_judged_by_what_they_do():
    row, template, _ = one("functions", "code")
    row = row | {"name": "f", "tests": "[[[2], 4], [[3], 6]]"}
    passed = lambda source: score("functions", row, template, source)["tests_passed"]  # noqa: E731
    assert passed("def f(x):\n    return x + x") == 1
    assert passed("def f(x):\n    return 4") == 0
    assert passed("def f(x):\n    return x * 2.0") == 0
    assert passed("def g(x):\n    return x + x") == 0
    assert passed("def f(x):\n    return x + x\n\nassert f(2) == 5") == 0
    assert passed("def f(x):\n    print(x + x)") == 0


def test_a_program_that_fails_passes_not_even_no_tests():
    assert not tasks.passes({"name": "f", "tests": "[]"}, "1 / 0")


def test_true_is_not_one():
    row = {"name": "f", "tests": "[[[2], true]]"}
    assert not tasks.passes(row, "def f(x):\n    return 1")
    assert tasks.passes(row, "def f(x):\n    return True")


@pytest.mark.parametrize(
    "source",
    [
        "import sys\ndef f(x):\n    sys.exit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "class Same(int):\n    def __eq__(self, other): return True\ndef f(x):\n    return Same(7)",
        "import json\njson.dumps = lambda *a, **k: '[4]'\ndef f(x):\n    return 4",
        "import os\ndef f(x):\n    os.write(3, b'ready\\n{\"values\": [4, 6]}')\n    os._exit(0)",
    ],
)
def test_tricks_do_not_pass(source):
    assert not tasks.passes({"name": "f", "tests": "[[[2], 4], [[3], 6]]"}, source)


def test_a_sandbox_that_does_not_start_is_no_pass_and_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(sandbox, "INSIDE", tmp_path / "missing.py")
    row, template, reference = one("functions", "code")
    with caplog.at_level(logging.WARNING):
        assert score("functions", row, template, reference) == {"exact_match": 1, "tests_passed": 0}
    assert "no program could be run" in caplog.text
