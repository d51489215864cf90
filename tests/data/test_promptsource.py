"""Promptsource files: every template is translated whole or refused with a reason, and reads as real Jinja renders it."""

import functools
import json
import random
import re

import jinja2
import pytest
import yaml

from itjax.data import promptsource, templates
from itjax.data.templates import Lots

WORDS = ["The", "Cat", "sat.", "on_____", "a", "{mat}", "{{x}}", "{%", "y", "%}", "|||", "?", "Sue's", "é"]
NUMBERS = {"label": 6}


def one_file(*entries):
    """A promptsource file of these templates."""
    lines = ["dataset: made", "templates:"]
    for number, entry in enumerate(entries):
        lines.append(f"  t{number}: !Template")
        lines += [f"    {key}: {json.dumps(value)}" for key, value in {"name": f"n{number}", **entry}.items()]
        lines.append("    metadata: !TemplateMetadata\n      original_task: true")
    return "\n".join(lines)


def ours(family, template, raw):
    """(prompt, answer) as we write it, drawing the first of any choice; None where the template does not fit."""
    row = templates.read(family, raw, columns={}, place="k:1")
    if not family.fits(template, row):
        return None
    made = templates.render(family, template, row, lots=FirstLots(0, "k:1", 0), source="s", place="k:1").conversation
    return made.messages[0].content, made.messages[-1].content


class FirstLots(Lots):
    def number(self, what):
        return 0


JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
JINJA.globals["zip"] = zip
JINJA.filters["choice"] = lambda things: things[0]
compiled = functools.lru_cache(JINJA.from_string)


def theirs(entry, raw):
    """(prompt, answer) as promptsource makes them with Jinja, drawing the first; None where Jinja misses something."""
    protected = _replaced(raw, "|||", "<3pipes>")
    try:
        if entry["answer_choices"]:
            rendered = compiled(entry["answer_choices"]).render(**protected)
            protected["answer_choices"] = [part.strip() for part in rendered.split("|||")]
        text = compiled(entry["jinja"]).render(**protected)
    except (jinja2.UndefinedError, TypeError, ValueError):
        return None
    parts = [part.strip().replace("<3pipes>", "|||") for part in text.split("|||")]
    return tuple(parts) if len(parts) == 2 and parts[1] else None


def _replaced(value, old, new):
    if isinstance(value, dict):
        return {key: _replaced(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, old, new) for one in value]
    return value.replace(old, new) if isinstance(value, str) else value


def random_row(names, dataset, rng, number):
    """Something for every name that the file's templates know, of the type that the real data has."""

    def text():
        return rng.choice(["", " "]) + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + rng.choice(["", " \n"])

    row = {name: rng.randint(-1, NUMBERS[name] - 1) if name in NUMBERS else text() for name in names}
    labels = list("ABCDE")[: rng.randint(2, 5)]
    special = {
        "choices": {"text": [text() for _ in labels], "label": labels},
        "answerKey": rng.choice(labels),
        "concepts": [text() for _ in range(3)],
        "fine_label": number % 50,
        "coarse_label": number // 50 - 1,
        "answer": rng.choice("12") if dataset == "winogrande" else text(),
        "question": rng.choice(["cause", "effect", text()]),
    }
    return row | {name: value for name, value in special.items() if name in names}


def read(path):
    loader = promptsource._Loader(path.read_text())
    return loader.get_single_data()


def test_every_template_of_the_real_files_is_translated(shared_data):
    counts = {}
    for path in sorted((shared_data / "promptsource/visible").glob("*.yaml")):
        imported = promptsource.read(path)
        counts[path.stem] = (len(imported.family.templates), len(imported.refused))
    assert sum(good for good, _ in counts.values()) == 237
    assert sum(bad for _, bad in counts.values()) == 0
    assert len(counts) == 26


def test_every_translated_template_reads_as_jinja_renders_it(shared_data):
    compared, equal, never = 0, 0, []
    for path in sorted((shared_data / "promptsource/visible").glob("*.yaml")):
        document, family = read(path), promptsource.read(path).family
        names = set(family.fields) | {name for made in family.expressions.values() for name in _names(made)}
        rng = random.Random(path.stem)
        rows = [
            random_row(names, document["dataset"], rng, number)
            for number in range(400 if "fine_label" in names else 40)
        ]
        for entry, template in zip(document["templates"].values(), family.templates, strict=True):
            here = 0
            for row in rows:
                expected = theirs(entry, row)
                try:
                    said = ours(family, template, row)
                except ValueError:
                    said = None
                assert said == expected, (path.stem, template.name, row)
                here += expected is not None
            compared, equal = compared + len(rows), equal + here
            never += [] if here else [(path.stem, template.name)]
    assert not never
    assert equal > 8_000, (equal, compared)


def _names(made):
    if isinstance(made, tuple) and made and made[0] == "name":
        yield made[1]
    elif isinstance(made, tuple):
        bound = set(made[1]) | {"loop"} if made and made[0] == "for" else set()
        for part in made:
            yield from (name for name in _names(part) if name not in bound)


PUBLISHED = {  # file of promptsource -> the published file that rows are read back from
    "common_gen": "sentence_to_concepts",
    "commonsense_qa": "question_answering",
    "cosmos_qa": "context_description_question_answer_id",
}
DRAWN = ("topic_to_sentence", "random_task_template_prompt", "choice_in_concept_centric_sentence_generation")


@pytest.mark.parametrize("dataset, told", PUBLISHED.items())
def test_published_renders_of_the_same_templates_are_ours(shared_data, dataset, told):
    """T0's training data: rows read back from one template's texts give the texts of all others of the dataset."""
    folder = shared_data / "t0_templates/visible"
    family = promptsource.read(shared_data / f"promptsource/visible/{dataset}.yaml").family
    rows = [READ_BACK[dataset](*_stripped(line)) for line in _lines(folder / f"{dataset}_{told}.jsonl")]
    assert len(rows) == 200
    compared = 0
    for template in family.templates:
        name = re.sub("[^A-Za-z0-9]+", "_", template.name)
        if name in DRAWN:  # they drew other words than we do
            continue
        for row, line in zip(rows, _lines(folder / f"{dataset}_{name}.jsonl"), strict=True):
            assert ours(family, template, row) == _stripped(line)
            compared += 1
    assert compared == 200 * {"common_gen": 6, "commonsense_qa": 5, "cosmos_qa": 13}[dataset]


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _stripped(line):
    return line["prompt"].strip(), line["completion"].removesuffix("<|endoftext|>").strip()


def _common_gen(prompt, answer):
    target = prompt.removeprefix("We have the sentence: ").removesuffix("; \nExtract all the key concepts:")
    return {"concepts": answer.split(", "), "target": target}


def _commonsense_qa(prompt, answer):
    question, *options = re.split(r"\n+- ", prompt)
    letters = "ABCDE"[: len(options)]
    key = letters[options.index(answer)]
    return {"question": question, "choices": {"text": options, "label": list(letters)}, "answerKey": key}


def _cosmos_qa(prompt, answer):
    context, rest = prompt.split("\nAccording to the above context, choose", 1)
    question, options = rest.split("\nQuestion: ", 1)[1].split("\nOptions:\nA. ")
    answers = re.split(r"\n[BCD]\. ", options)
    named = {f"answer{number}": text for number, text in enumerate(answers)}
    return {"context": context, "question": question, "label": "ABCD".index(answer), **named}


READ_BACK = {"common_gen": _common_gen, "commonsense_qa": _commonsense_qa, "cosmos_qa": _cosmos_qa}


@pytest.mark.parametrize(
    "jinja, reason",
    [
        ("{{ a | tojson }} ||| {{ b }}", "filter 'tojson' is not translated"),
        ("{{ a.__class__.__mro__() }} ||| {{ b }}", "calls a function"),
        ("{% macro f() %}{% endmacro %} ||| {{ b }}", "Macro is not translated"),
        ("{% include 'x' %} ||| {{ b }}", "Include is not translated"),
        ("{{ a }}", "0 signs"),
        ("{{ a }} ||| {{ b }} ||| {{ c }}", "2 signs"),
        ("{{ a ||| b", "cannot be read"),
        ("{{ a }} ||| ", "no answer"),
        ("{{ a }} ||| {{ answer_choices[0] }}", "has none"),
        ("{% for x in a if x %}{{ x }}{% endfor %} ||| {{ b }}", "condition"),
        ("{{ cycler(1) }} ||| {{ b }}", "calls a function"),
        ("{% for x in a %}" * 3 + "{{ x }}" + "{% endfor %}" * 3 + " ||| {{ b }}", "more than 2 loops"),
        ("{% if a %}{% set x = b %}{% endif %}{{ x }} ||| {{ b }}", "sets a name in the middle"),
        ("{% set y = x %}{% for x in a %}{{ y }}{% endfor %} ||| {{ b }}", "reuses a name"),
        ("{{ a * 10 ** 9 }} ||| {{ b }}", "Mul is not translated"),
    ],
)
def test_what_cannot_be_translated_is_listed_with_its_reason(jinja, reason):
    text = one_file({"jinja": jinja}, {"jinja": "{{ a }} ||| {{ b }}"})
    imported = promptsource.parse(text, name="made", place="made.yaml")
    assert [one.name for one in imported.family.templates] == ["n1"]
    assert reason in imported.refused["n0"]


def test_attributes_reach_columns_and_nothing_else():
    text = one_file({"jinja": "{{ a.__class__ }} ||| {{ b }}"})
    family = promptsource.parse(text, name="made", place="made.yaml").family
    with pytest.raises(ValueError, match="item cannot be had"):
        ours(family, family.templates[0], {"a": "x", "b": "y"})


def test_braces_of_a_template_and_of_the_data_are_inert():
    text = one_file({"jinja": "{a} {{ '{{' }} {{ a }} ||| {{ b }}"})
    family = promptsource.parse(text, name="made", place="made.yaml").family
    assert ours(family, family.templates[0], {"a": "{b} {{ b }} |||", "b": "y"}) == ("{a} {{ {b} {{ b }} |||", "y")


def test_a_parting_sign_in_the_data_moves_no_choice():
    choices = {"answer_choices": "{{ one }} ||| {{ two }}", "jinja": "{{ a }} ||| {{ answer_choices[label] }}"}
    family = promptsource.parse(one_file(choices), name="made", place="made.yaml").family
    assert ours(family, family.templates[0], {"a": "q", "one": "x ||| y", "two": "z", "label": 1}) == ("q", "z")


def test_what_is_drawn_once_is_the_same_wherever_it_stands_and_two_draws_are_two():
    jinja = "{% set one = a | choice %}{{ one }} {{ one }} {{ a | choice }} ||| {{ b }}"
    family = promptsource.parse(one_file({"jinja": jinja}), name="made", place="made.yaml").family
    row = templates.read(family, {"a": ["x", "y"], "b": "z"}, columns={}, place="k")
    drawn = [
        templates.render(family, family.templates[0], row, lots=Lots(0, f"k{n}", 0), source="s", place="k").prompt
        for n in range(100)
    ]
    assert set(drawn) == {"x x x", "x x y", "y y x", "y y y"}


def test_a_condition_around_a_template_is_a_condition_on_rows():
    text = one_file({"jinja": "{% if kind == 'a' %} {{ q }} ||| {{ t }} {% endif %}"})
    family = promptsource.parse(text, name="made", place="made.yaml").family
    assert ours(family, family.templates[0], {"kind": "a", "q": "1", "t": "2"}) == ("1", "2")
    assert ours(family, family.templates[0], {"kind": "b", "q": "1", "t": "2"}) is None


@pytest.mark.parametrize(
    "text",
    [
        "templates:\n  a: !!python/object/apply:os.system ['touch /tmp/never']",
        "templates:\n  a: !Other {}",
        "- 1",
        "a: [",
        "templates: 3",
        "templates:\n  a: {name: b}",
    ],
)
def test_other_yaml_is_refused_and_runs_nothing(text):
    with pytest.raises(ValueError, match=r"made\.yaml: "):
        promptsource.parse(text, name="made", place="made.yaml")


def test_a_huge_loop_is_refused():
    text = one_file({"jinja": "{% for i in range(10000000) %}x{% endfor %} ||| {{ b }}"})
    family = promptsource.parse(text, name="made", place="made.yaml").family
    with pytest.raises(ValueError, match="range of 10000000"):
        ours(family, family.templates[0], {"b": "y"})


def test_the_loader_is_a_safe_one():
    assert issubclass(promptsource._Loader, yaml.SafeLoader)
