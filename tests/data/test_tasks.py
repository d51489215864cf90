"""The embedded tasks: enough phrasings, every row renders, train and eval never meet, the same everywhere."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from itjax.data.tasks import FAMILIES, TaskSource, split_of
from itjax.data.templates import conversation, fill

NAMES = sorted(FAMILIES)


def source(
    family: str, *, examples: int = 200, seed: int = 0, split: str = "train", phrasings: str = "seen"
) -> TaskSource:
    return TaskSource(family, examples=examples, seed=seed, split=split, phrasings=phrasings)


def test_the_four_kinds_of_instruction_tuning_are_there():
    assert set(FAMILIES) == {"triage", "arithmetic", "functions", "support"}


@pytest.mark.parametrize("family", NAMES)
def test_there_are_ten_wordings_to_train_on_and_three_more_to_measure_with(family):
    templates = FAMILIES[family].templates
    wordings = {
        kind: {template.name.split("/")[0] for template in templates if template.heldout == kind}
        for kind in (True, False)
    }
    assert len(wordings[False]) >= 10
    assert len(wordings[True]) >= 3
    assert not wordings[False] & wordings[True]
    assert len({template.name for template in templates}) == len(templates)
    assert len({(template.system, template.prompt) for template in templates}) == len(templates)


@pytest.mark.parametrize("family", NAMES)
def test_system_prompts_and_answer_formats_vary(family):
    seen = [template for template in FAMILIES[family].templates if not template.heldout]
    assert "" in {template.system for template in seen}
    assert len({template.system for template in seen}) >= 4
    assert len({template.answer for template in seen}) >= 3


@pytest.mark.parametrize("family", NAMES)
def test_heldout_wordings_are_new_but_their_answer_formats_are_not(family):
    seen = [template for template in FAMILIES[family].templates if not template.heldout]
    held = [template for template in FAMILIES[family].templates if template.heldout]
    assert {template.answer for template in held} == {template.answer for template in seen}
    assert not {template.prompt for template in held} & {template.prompt for template in seen}


@pytest.mark.parametrize("family", NAMES)
def test_every_template_renders_every_row_without_leftovers(family):
    rows = source(family)
    for index in range(200):
        row = rows[index]
        for template in FAMILIES[family].templates:
            made = conversation(template, row, source=family, key="k")
            assert made.messages[-1].role == "assistant"
            for message in made.messages[:-1]:
                assert not set("{}<>") & set(message.content), message
            answer = made.messages[-1].content
            assert "{" not in answer or json.loads(answer)


@pytest.mark.parametrize("family", NAMES)
def test_the_question_tells_all_that_the_answer_needs(family):
    """The same prompt never has two answers, so that exact match is fair."""
    answers: dict[str, str] = {}
    for index in range(3000):
        *asked, answered = source(family, examples=3000, phrasings="all").conversation(index).messages
        assert answers.setdefault(str(asked), answered.content) == answered.content


@pytest.mark.parametrize("family", NAMES)
def test_train_and_eval_questions_never_meet(family):
    family_of = FAMILIES[family]

    def questions(split: str, seed: int) -> set[tuple[str, ...]]:
        rows = source(family, examples=2000, seed=seed, split=split)
        return {tuple(rows[index][field] for field in family_of.identity) for index in range(2000)}

    train, held = questions("train", 0) | questions("train", 1), questions("eval", 0) | questions("eval", 1)
    assert not train & held
    assert len(train) > 3000  # thousands of different questions, not a few learned by heart


@pytest.mark.parametrize("family", NAMES)
def test_what_a_prompt_says_of_the_row_is_its_identity(family):
    """Two rows with one identity are one question: nothing outside it, hidden tests for instance, reaches a prompt."""
    family_of = FAMILIES[family]
    row = source(family)[0]
    hidden = set(row) - set(family_of.identity)
    changed = row | {field: "CHANGED" for field in hidden}
    assert split_of(family_of, row) == split_of(family_of, changed)
    for template in family_of.templates:
        told = fill(template.system + template.prompt, changed).count("CHANGED")
        assert told == template.prompt.count("{example}") + template.system.count("{example}")


@pytest.mark.parametrize("family", NAMES)
def test_a_row_does_not_depend_on_the_rows_before_it_nor_on_how_many_there_are(family):
    few, many = source(family, examples=10), source(family, examples=1000)
    assert [many[index] for index in (7, 3, 7)] == [few[7], few[3], few[7]]
    assert few.conversation(7).key == f"task/{family}:7"


def test_another_seed_draws_other_rows():
    assert [source("triage", seed=0)[index] for index in range(5)] != [
        source("triage", seed=1)[index] for index in range(5)
    ]


@pytest.mark.parametrize(
    "phrasings, templates",
    [("seen", {False}), ("heldout", {True}), ("all", {True, False})],
)
def test_phrasings_choose_the_templates(phrasings, templates):
    rows = source("support", phrasings=phrasings)
    assert {rows.template(index).heldout for index in range(200)} == templates
    splits = {rows.conversation(index).tags["template_split"] for index in range(200)}
    assert splits == {"heldout" if held else "seen" for held in templates}


def test_one_phrasing_can_be_had_alone():
    rows = source("triage", phrasings="sort/line")
    assert {rows.conversation(index).template for index in range(200)} == {"sort/line"}


def test_sources_pickle_and_name_what_shapes_them():
    rows = source("functions")
    assert pickle.loads(pickle.dumps(rows))[5] == rows[5]
    assert rows.fingerprint() == source("functions").fingerprint()
    others = [
        source("functions", seed=1),
        source("functions", examples=201),
        source("functions", split="eval"),
        source("functions", phrasings="all"),
        source("support"),
    ]
    assert len({rows.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_rows_are_the_same_in_every_process():
    code = (
        "from itjax.data.tasks import FAMILIES, TaskSource\n"
        "for name in sorted(FAMILIES):\n"
        "    s = TaskSource(name, examples=50, seed=4, split='eval', phrasings='all')\n"
        "    print([s.conversation(i) for i in range(50)], s.fingerprint())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "123")
    }
    assert len(said) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "triagge"}, r"task: 'triagge' is unknown; did you mean 'triage'\?"),
        ({"split": "test"}, r"task 'triage': split: 'test' is unknown"),
        ({"phrasings": "sort/lin"}, r"task 'triage': phrasings: 'sort/lin' is unknown; did you mean 'sort/lin"),
        ({"phrasings": "hedout"}, r"did you mean 'heldout'\?"),
        ({"examples": 0}, r"task 'triage': examples is 0; give at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_with_a_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        source(**{"family": "triage"} | change)


@pytest.mark.parametrize("index", [-1, 200, 10**9])
def test_rows_outside_the_source_are_an_error(index):
    with pytest.raises(IndexError, match="triage"):
        source("triage")[index]
