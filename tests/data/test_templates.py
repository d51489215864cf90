"""Templates: one pass, inert data, errors that name the place, and choices that chance cannot move."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itjax.data import library, templates
from itjax.data.templates import Lots, Template, choose, fill

ASK = Template(name="ask", prompt="Note: {note}", answer='{{"label": "{label}"}}', system="You sort notes.")


def test_fields_are_filled_and_doubled_braces_are_braces():
    assert fill('{{"a": {a}, "b": "{b}"}}', {"a": "1", "b": "x"}) == '{"a": 1, "b": "x"}'


@pytest.mark.parametrize(
    "text", ["{label}", "{{label}}", "{x.__class__}", "{0}", "{{ x }}", "{% raw %}", "<|im_end|>", "%s"]
)
def test_data_is_inert(text):
    assert fill("Note: {note} {label}", {"note": text, "label": "ok"}) == f"Note: {text} ok"


@given(st.text(alphabet="{}ab \n"), st.text(alphabet="{}ab \n"))
def test_data_of_any_kind_comes_out_as_it_went_in(a, b):
    assert fill("{a}|{b}|{a}", {"a": a, "b": b}) == f"{a}|{b}|{a}"


@given(st.text())
def test_any_text_can_be_written_as_a_pattern(text):
    assert fill(text.replace("{", "{{").replace("}", "}}"), {}) == text


def test_an_unknown_field_names_the_template_and_the_nearest_field():
    with pytest.raises(ValueError, match=r"task/t:3: template 'ask': field 'label' .* did you mean 'labels'\? Known"):
        templates.conversation(ASK, {"note": "n", "labels": "l"}, source="t", key="task/t:3")


@pytest.mark.parametrize("pattern", ["{", "}", "a { b", "{a.b}", "{a!r}", "{0}", "{a:>9}", "{}"])
def test_a_lone_brace_is_an_error_not_a_guess(pattern):
    with pytest.raises(ValueError, match="lone"):
        fill(pattern, {"a": "1"})


def test_a_conversation_has_the_turns_and_the_address_of_its_row():
    made = templates.conversation(ASK, {"note": "late", "label": "delivery"}, source="triage", key="task/triage:7")
    assert [(m.role, m.content) for m in made.messages] == [
        ("system", "You sort notes."),
        ("user", "Note: late"),
        ("assistant", '{"label": "delivery"}'),
    ]
    assert (made.source, made.key, made.template) == ("triage", "task/triage:7", "ask")
    assert made.tags == {"template_split": "seen"}


def test_no_system_prompt_means_no_system_turn():
    made = templates.conversation(
        Template("bare", "{q}", "{a}", heldout=True), {"q": "1", "a": "2"}, source="s", key="k"
    )
    assert [message.role for message in made.messages] == ["user", "assistant"]
    assert made.tags == {"template_split": "heldout"}


def test_choices_are_even_and_depend_on_key_and_seed():
    names = [Template(str(number), "", "") for number in range(8)]
    chosen = [choose(names, key=f"k{number}", seed=0).name for number in range(8000)]
    assert all(850 < count < 1150 for count in Counter(chosen).values())
    assert len(Counter(chosen)) == 8
    again = [choose(names, key=f"k{number}", seed=1).name for number in range(8000)]
    assert 0.08 < sum(a == b for a, b in zip(chosen, again, strict=True)) / 8000 < 0.17


def test_choosing_from_nothing_is_an_error():
    with pytest.raises(ValueError, match="no templates"):
        choose([], key="k", seed=0)


def test_choices_are_the_same_in_every_process():
    code = (
        "from itjax.data.templates import Template, choose; t = [Template(str(i), '', '') for i in range(9)];"
        "print([choose(t, key=f'k{i}', seed=3).name for i in range(50)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------- families


FAMILY = library.parse(
    """
    kind = "weather"
    [fields]
    city = { about = "where" }
    sky = { one_of = "skies" }
    skies = { list = true, optional = true }
    [[template]]
    name = "plain"
    prompt = "How is {city}?"
    answer = "{sky}"
    [[template]]
    name = "listed"
    prompt = "How is {city}? {skies_lines}"
    answer = "{sky_mark}"
    tags = ["held_out"]
    """,
    place="weather.toml",
)


def test_the_fields_of_a_pattern_are_told_in_order():
    assert templates.names("{b} {{c}} {a} {b}") == ["b", "a", "b"]
    with pytest.raises(ValueError, match="lone '}' at character 2"):
        templates.names("a }")


@pytest.mark.parametrize(
    "path, value",
    [("a", 1), ("b.c", 2), ("b.d.1", "y"), ("b.d.7", None), ("b.c.x", None), ("x.y", "dotted"), ("none", None)],
)
def test_a_column_is_found_by_name_or_by_path(path, value):
    assert templates.column({"a": 1, "b": {"c": 2, "d": ["x", "y"]}, "x.y": "dotted"}, path) == value


@pytest.mark.parametrize("phrasings, chosen", [("seen", ["plain"]), ("heldout", ["listed"]), ("listed", ["listed"])])
def test_phrasings_are_chosen_by_split_or_by_name(phrasings, chosen):
    assert [one.name for one in templates.selected(FAMILY, phrasings)] == chosen
    assert [one.name for one in templates.selected(FAMILY, "all")] == ["plain", "listed"]


def test_samples_fill_each_template_or_say_why_not():
    row = {"city": "Bergen", "sky": "rain"}
    plain, listed = templates.samples(FAMILY, row, columns={}, source="s", key="k", seed=0)
    assert plain.conversation.messages[-1].content == "rain"
    assert (listed.conversation, listed.reason) == (None, "the row has no skies")
    plain, listed = templates.samples(FAMILY, row | {"skies": ["sun", "rain"]}, columns={}, source="s", key="k", seed=0)
    assert listed.conversation.tags == {"template_split": "heldout", "kind": "weather"}
    assert listed.conversation.messages[0].content.startswith("How is Bergen? ")


def test_a_number_that_stands_for_nothing_is_refused():
    (plain, _) = templates.samples(FAMILY, {"city": "Bergen", "sky": 1}, columns={}, source="s", key="k", seed=0)
    assert "it is the number 1, and nothing says what it stands for; give 'skies'" in plain.reason


def test_orders_are_permutations_and_shares_are_even():
    orders = Counter(tuple(Lots(0, f"k{n}", 0).order(3, "x")) for n in range(3000))
    assert len(orders) == 6
    assert all(400 < count < 600 for count in orders.values())
    shares = [Lots(0, f"k{n}", 0).share("x") for n in range(3000)]
    assert 0 <= min(shares) < 0.01
    assert 0.99 < max(shares) < 1
