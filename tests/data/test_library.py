"""The library: every phrasing of every kind reads well on a row, differs from its siblings, and says what it must."""

import difflib
import itertools
import re

import pytest

from itjax.data import library, sources, templates
from itjax.data.templates import EXEMPLARS, Lots

KINDS = [kind for kind in library.kinds() if kind != "natural_instructions"]  # which has published encodings
MINE = """
kind = "reviews"

[fields.review]
[fields.verdict]
one_of = "verdicts"
[fields.verdicts]
list = true
default = ["bad", "good"]

[[template]]
name = "ask"
prompt = '''
{review}

Is it {verdicts_or}?
'''
answer = "{verdict}"

[[template]]
name = "stars"
prompt = "{review}"
answer = "{verdict}"
words = ["one star", "five stars"]
tags = ["held_out"]
"""


def rendered(family, template, *, seed=0):
    row = templates.read(family, family.sample, columns={}, place="k")
    return templates.render(
        family, template, row, lots=Lots(seed, "k", 0), source="s", place="k", exemplars="(worked examples)"
    ).conversation


def said(conversation):
    """All that is said and handed over, as one text."""
    messages = [f"{message.content} {message.tool_calls}" for message in conversation.messages]
    return " ".join([*messages, *map(str, conversation.tools)])


def test_the_kinds_that_instruction_tuning_is_made_of_are_there():
    assert {"qa", "qa_with_context", "multiple_choice", "classification", "nli", "extraction"} <= set(KINDS)
    assert {"summarisation", "translation", "rewriting", "reasoning", "coding", "dialogue", "tool_use"} <= set(KINDS)
    assert {"refusal", "paraphrase", "keywords_to_text"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_ten_direct_phrasings_to_train_on_and_three_more_to_measure_with(kind):
    phrasings = library.family(kind).templates
    assert len([one for one in phrasings if not one.heldout and not one.inverted and not one.exemplar]) >= 10
    assert len([one for one in phrasings if one.heldout]) >= 3
    assert not [one.name for one in phrasings if one.heldout and one.inverted]
    assert [one for one in phrasings if one.inverted]


@pytest.mark.parametrize("kind", KINDS)
def test_every_phrasing_is_filled_from_a_row(kind):
    family = library.family(kind)
    for template in family.templates:
        made = rendered(family, template)
        assert made.messages[-1].role == "assistant"
        assert made.messages[-1].content.strip() or made.messages[-1].tool_calls, template.name
        for message in made.messages:
            left = set(re.findall(r"\{(\w+)\}", message.content)) & set(family.names)
            assert not left, (template.name, left)
            assert message.content == message.content.strip("\n"), template.name
            assert "  \n" not in message.content, template.name


@pytest.mark.parametrize("kind", KINDS)
def test_direct_phrasings_say_all_that_a_row_must_have(kind):
    """What is given stands in the question and what is wanted in the answer: nothing of a row is left out."""
    family = library.family(kind)
    for template in family.templates:
        if template.inverted:
            continue
        names = family.said[template.name]
        silent = {key for key, one in family.fields.items() if one.kind in ("turns", "tools", "calls")}
        told = {family.names[name][0] for name in names - {EXEMPLARS}} | silent
        required = {key for key, one in family.fields.items() if not one.optional and one.default is None}
        if kind == "summarisation" and template.name == "headline":
            required -= {"summary"}
        if kind == "reasoning" and not {"steps"} & told:
            required -= {"steps"}  # a bare result
        assert required <= told, (template.name, required - told)


@pytest.mark.parametrize("kind", KINDS)
def test_phrasings_of_a_kind_differ(kind):
    texts = {
        one.name: "\n".join((*one.systems[:1], one.prompt, one.exemplar)).lower()
        for one in library.family(kind).templates
    }
    if kind in ("dialogue", "tool_use"):  # two natives are the same question with other system prompts
        texts = {name: text for name, text in texts.items() if "native" not in name}
    for (a, first), (b, second) in itertools.combinations(texts.items(), 2):
        ratio = difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()
        assert ratio < 0.9, (a, b, ratio)


def test_no_phrasing_is_told_twice_anywhere_in_the_library():
    seen = {}
    for kind in KINDS:
        for one in library.family(kind).templates:
            text = (one.systems, one.prompt, one.answer, one.exemplar)
            assert seen.setdefault((kind, text), one.name) == one.name


@pytest.mark.parametrize("kind", KINDS)
def test_inverted_phrasings_answer_with_what_is_otherwise_given(kind):
    family = library.family(kind)
    direct = [one for one in family.templates if not one.inverted and not one.exemplar]
    answers = {family.names[name][0] for one in direct for name in templates.names(one.answer)}
    prompts = {
        family.names[name][0]
        for one in direct
        for pattern in (one.prompt, *one.systems)
        for name in templates.names(pattern)
    }
    prompts |= {key for key, one in family.fields.items() if one.kind in ("turns", "tools")}
    given = prompts - (answers - prompts)
    for template in family.templates:
        if template.inverted:
            assert {family.names[name][0] for name in templates.names(template.answer)} & given, template.name


@pytest.mark.parametrize("kind", KINDS)
def test_system_prompts_and_answers_vary(kind):
    seen = [one for one in library.family(kind).templates if not one.heldout and not one.inverted]
    systems = {system for one in seen for system in one.systems}
    assert "" in systems
    assert len(systems) >= 4 or kind in ("dialogue", "tool_use")
    assert len({one.answer for one in seen}) >= 2


def test_a_kind_that_is_misspelt_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"kind 'classifcation' is unknown; did you mean 'classification'\?"):
        library.family("classifcation")


# ---------------------------------------------------------------------------------------------- published encodings


def test_natural_instructions_are_encoded_to_the_letter():
    family = library.family("natural_instructions")
    assert [one.name for one in family.templates] == [
        "definition",
        "positive",
        "definition_positive",
        "definition_positive_negative",
        "definition_explained",
        "definition_reasoned",
    ]
    made, again = (rendered(family, family.template(f"definition_{name}ed")) for name in ("explain", "reason"))
    assert made.messages == again.messages
    assert made.messages[0].content == (
        "Definition: Add the two numbers.\n\n"
        " Positive Example 1 -\nInput: 1, 1.\n Output: 2.\n Explanation: 1 + 1 = 2.\n\n"
        " Positive Example 2 -\nInput: 4, 4.\n Output: 8.\n Explanation: 4 + 4 = 8.\n\n"
        "Now complete the following example -\nInput: 2, 3.\nOutput: "
    )
    assert made.messages[1].content == "5"
    assert made.tags["references"] == '["5", "five"]'


def test_natural_instructions_files_give_the_same_words_by_both_ways(shared_data):
    """The definition-only encoding of the file reader, which has its own tests, is the template's on real instances."""
    family = library.family("natural_instructions")
    compared = 0
    for path in sorted((shared_data / "natural_instructions/train").iterdir())[::6]:
        (rows,) = sources.open_files(str(path))
        for index in range(0, len(rows), max(1, len(rows) // 5)):
            row = templates.read(family, rows.row(index), columns={}, place="k")
            made = templates.render(
                family, family.template("definition"), row, lots=Lots(0, "k", 0), source="s", place="k"
            ).conversation
            expected = rows.conversation(index)
            assert made.messages == expected.messages
            assert made.tags["references"] == expected.tags["references"]
            compared += 1
    assert compared >= 50


# ---------------------------------------------------------------------------------------------- one's own


def test_ones_own_family_is_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text(MINE)
    family = library.read(tmp_path / "mine.toml")
    row = templates.read(family, {"review": "Great!", "verdict": 1}, columns={}, place="k")
    ask, stars = (
        templates.render(family, one, row, lots=Lots(0, "k", 0), source="s", place="k").conversation
        for one in family.templates
    )
    assert [message.content for message in ask.messages] == ["Great!\n\nIs it bad or good?", "good"]
    assert [message.content for message in stars.messages] == ["Great!", "five stars"]
    assert (ask.template, ask.tags) == ("reviews/ask", {"template_split": "seen", "kind": "reviews"})
    assert stars.tags["template_split"] == "heldout"


def test_a_family_of_the_library_is_extended_in_four_lines():
    family = library.parse(
        """
        extends = "classification"
        kind = "sentiment"
        without = ["open", "open_quoted"]
        fields.labels = { default = ["negative", "positive"] }
        fields.text = { about = "a review" }
        """,
        place="mine.toml",
    )
    base = library.family("classification")
    assert len(family.templates) == len(base.templates) - 2
    assert family.name == "sentiment"
    assert family.fields["labels"].kind == "list"
    row = templates.read(family, {"text": "Great!", "label": 0}, columns={}, place="k")
    made = templates.render(family, family.template("terse"), row, lots=Lots(1, "k", 0), source="s", place="k")
    assert made.answer == "negative"
    assert made.prompt in ("Great! -> negative or positive?", "Great! -> positive or negative?")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("{review}\n", "{reviw}\n"),
            r"mine.toml:12: template 'ask': field 'reviw' is unknown; did you mean 'review'\?",
        ),
        (("{review}\n", "{review\n"), r"mine.toml:12: template 'ask': lone '\{' at character 0"),
        (('"held_out"', '"heldout"'), r"mine.toml:21: template 'stars': tag 'heldout' is unknown; .*'held_out'"),
        (("answer =", "anwser ="), r"template 'ask': 'anwser' is unknown; did you mean 'answer'\?"),
        (('name = "stars"', 'name = "ask"'), r"template 'ask': there are two of this name"),
        (("list = true", 'kind = "lst"'), r"field 'verdicts': kind 'lst' is unknown; did you mean 'list'\?"),
        (('one_of = "verdicts"', 'one_of = "verdict"'), r"field 'verdict': one_of 'verdict' is not a list"),
        (('"five stars"]', '"five stars", "six"]'), r"template 'stars': words are .* give one for each default"),
        (('kind = "reviews"', ""), r"mine.toml: it has no kind; write kind"),
        (('kind = "reviews"', "kind = reviews"), r"mine.toml: not TOML: .*line 2"),
        (('kind = "reviews"', 'extends = "clasification"'), r"kind 'clasification' is unknown; did you mean"),
        (("tags = [", "markers = ['  ']\ntags = ["), r"template 'stars': marker '  ' is blank"),
        (
            ('"{review}"', '"{review} {verdict_mark}"\nmarkers = ["- "]'),
            "says the mark of an option, and no marker counts",
        ),
        (("tags = [", 'tags = ["few_shot", '), "tag few_shot, .* go together"),
        (("[fields.review]", "[fields.review]\noptional = 1"), "field 'review': optional is 1; write true or false"),
        (
            ("[fields.review]", "[few_shot]\nstyle = 'turn'\n[fields.review]"),
            r"few_shot: style 'turn' is unknown; .*'turns'",
        ),
        (('prompt = "{review}"\n', ""), r"template 'stars': it has no prompt"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line_and_a_way_out(change, message):
    assert MINE.count(change[0]) >= 1
    with pytest.raises(ValueError, match=message):
        library.parse(MINE.replace(*change, 1), place="mine.toml")


def test_files_that_are_not_there_or_not_text_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml: no such file"):
        library.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml: not UTF-8 at byte 0"):
        library.read(tmp_path / "bytes.toml")


def test_a_promptsource_file_is_a_family(tmp_path):
    (tmp_path / "rte.yaml").write_text('templates: {a: !Template {name: ask, jinja: "{{ a }}? ||| {{ b }}"}}')
    assert [one.name for one in library.read(tmp_path / "rte.yaml").templates] == ["ask"]
