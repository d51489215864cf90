"""Rows in many words: every phrasing in turn, the same everywhere, with worked examples that leak nothing."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from itjax.base.schema import Source
from itjax.data import library, phrase, sources
from itjax.data.cache import encode_source
from itjax.data.encode import Encoding
from itjax.data.phrase import Phrased
from itjax.data.sources import BadRow
from itjax.data.templates import FewShot
from itjax.text.tokenizer import SentencePiece, train


@dataclass(frozen=True)
class Table:
    """Rows in a list."""

    table: tuple
    name: str = "table"
    start: int = 0

    def __len__(self):
        return len(self.table)

    def row(self, index):
        return self.table[index]

    def key(self, index):
        return f"{self.name}.jsonl:{self.start + index + 1}"

    def fingerprint(self):
        return repr(self)


def questions(count, *, start=0, name="table"):
    rows = tuple({"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(start, start + count))
    return Table(rows, name, start)


CHOICES = Table(
    tuple(
        {"question": f"Which is {n}?", "options": [f"n{n}", f"x{n}", f"y{n}", f"z{n}"], "answer": n % 4}
        for n in range(200)
    )
)
SMALL = library.parse(
    """
    kind = "sums"
    [fields]
    question = {}
    answer = {}
    [[template]]
    name = "a"
    prompt = "{question}"
    answer = "{answer}"
    [[template]]
    name = "b"
    prompt = "Q: {question}"
    answer = "A: {answer}"
    [[template]]
    name = "c"
    prompt = "{question}!"
    answer = "{answer}!"
    [[template]]
    name = "turned"
    prompt = "{answer}"
    answer = "{question}"
    tags = ["inverted"]
    [[template]]
    name = "held"
    prompt = "Held: {question}"
    answer = "{answer}"
    tags = ["held_out"]
    """,
    place="sums.toml",
)


def phrased(rows, family=SMALL, **changes):
    return Phrased(rows, family, **({"split": "train", "phrasings": "seen", "seed": 0} | changes))


def all_of(source):
    return [source.conversation(index) for index in range(len(source))]


def texts(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def test_a_row_is_said_in_the_words_of_a_template():
    made = phrased(questions(1), phrasings="b").conversation(0)
    assert texts(made) == [("user", "Q: What is 0 + 1?"), ("assistant", "A: 1")]
    assert (made.source, made.key, made.template) == ("table", "table.jsonl:1", "sums/b")
    assert made.tags == {"template_split": "seen", "kind": "sums"}


def test_a_row_meets_every_phrasing_before_it_meets_one_again():
    source = phrased(questions(50), editions=7)
    assert len(source) == 350
    for row in range(50):
        names = [source.conversation(edition * 50 + row).template for edition in range(7)]
        assert {source.conversation(edition * 50 + row).key for edition in range(7)} == {f"table.jsonl:{row + 1}"}
        assert set(names[:3]) == set(names[3:6]) == {"sums/a", "sums/b", "sums/c"}


def test_direct_phrasings_come_in_turn_although_inverted_ones_come_between():
    source = phrased(questions(50), editions=12, inverted=0.5)
    for row in range(50):
        names = [source.conversation(edition * 50 + row).template for edition in range(12)]
        direct = [name for name in names if name != "sums/turned"]
        assert len(direct) == 6
        assert set(direct[:3]) == set(direct[3:]) == {"sums/a", "sums/b", "sums/c"}


def test_phrasings_are_spread_evenly():
    counts = Counter(made.template for made in all_of(phrased(questions(3000))))
    assert all(900 < count < 1100 for count in counts.values()), counts
    orders = Counter(
        tuple(phrased(questions(600), editions=3).conversation(e * 600 + row).template for e in range(3))
        for row in range(600)
    )
    assert len(orders) == 6
    assert all(60 < count < 140 for count in orders.values()), orders


def test_another_seed_says_it_otherwise():
    first, second = (all_of(phrased(questions(300), seed=seed)) for seed in (0, 1))
    same = sum(a.template == b.template for a, b in zip(first, second, strict=True))
    assert 60 < same < 140


def test_more_editions_later_do_not_change_the_earlier_ones():
    assert all_of(phrased(questions(20), editions=5))[:40] == all_of(phrased(questions(20), editions=2))


def test_a_row_is_said_alike_among_other_rows():
    """The key decides, not the place: held-out rows or rows left out move nothing."""
    many = questions(30)
    some = Table(many.table[10:], "table", 10)
    assert all_of(phrased(some)) == all_of(phrased(many))[10:]


def test_conversations_are_the_same_in_every_process():
    code = (
        "from tests.data.test_phrase import *\n"
        "s = phrased(CHOICES, library.family('multiple_choice'), few_shot=2, inverted=0.3, editions=2, pool=CHOICES)\n"
        "print([s.conversation(i) for i in range(0, 400, 7)], s.fingerprint())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "77")
    }
    assert len(said) == 1


def test_sources_pickle_and_name_what_shapes_them():
    rows = questions(20)
    source = phrased(rows, few_shot=1, pool=rows, editions=2)
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)
    others = [
        phrased(rows, few_shot=1, pool=rows),
        phrased(rows, few_shot=2, pool=rows, editions=2),
        phrased(rows, few_shot=1, pool=questions(19), editions=2),
        phrased(rows, few_shot=1, pool=rows, editions=2, seed=1),
        phrased(rows, few_shot=1, pool=rows, editions=2, inverted=0.5),
        phrased(rows, few_shot=1, pool=rows, editions=2, phrasings="a"),
        phrased(rows, few_shot=1, pool=rows, editions=2, columns={"answer": "question"}),
        phrased(rows, replace(SMALL, few_shot=FewShot(style="text")), few_shot=1, pool=rows, editions=2),
        phrased(questions(21), few_shot=1, pool=rows, editions=2),
    ]
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == 10
    assert source.fingerprint() == phrased(rows, few_shot=1, pool=rows, editions=2).fingerprint()


# ---------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("kind", [kind for kind in library.kinds() if kind != "natural_instructions"])
def test_no_heldout_phrasing_is_ever_trained_on(kind):
    family = library.family(kind)
    rows = Table(tuple(family.sample for _ in range(40)))
    held = {f"{kind}/{one.name}" for one in family.templates if one.heldout}
    trained = {made.template for made in all_of(phrased(rows, family, editions=20, inverted=0.3))}
    measured = {made.template for made in all_of(phrased(rows, family, split="eval", phrasings="heldout"))}
    assert not trained & held
    assert measured == held
    for phrasings in ("all", "heldout", sorted(held)[0].split("/")[1]):
        with pytest.raises(ValueError, match="held out for evaluation; train on 'seen' ones"):
            phrased(rows, family, phrasings=phrasings)


def test_a_kind_of_task_can_be_held_out_as_a_whole():
    family = library.parse('extends = "paraphrase"\nkind = "other"\ntags = ["held_out"]', place="other.toml")
    rows = Table((family.sample,))
    with pytest.raises(ValueError, match="it has no seen phrasings"):
        phrased(rows, family)
    assert phrased(rows, family, split="eval", phrasings="heldout").conversation(0).tags["template_split"] == "heldout"


# ---------------------------------------------------------------------------------------------- worked examples


def test_worked_examples_are_earlier_turns_that_are_not_learned():
    rows = questions(100)
    made = next(one for one in all_of(phrased(rows, few_shot=1, pool=rows, phrasings="b")) if phrase.exemplars(one))
    (key,) = phrase.exemplars(made)
    number = int(key.split(":")[1]) - 1
    assert texts(made)[:2] == [("user", f"Q: What is {number} + 1?"), ("assistant", f"A: {number + 1}")]
    assert [message.learn for message in made.messages] == [None, False, None, None]
    assert json.loads(made.tags["exemplars"]) == [key]


def test_worked_examples_can_be_text_of_the_prompt():
    family = replace(SMALL, few_shot=FewShot(style="text", lead="Examples.", delimiter=" => ", separator="\n#\n"))
    rows = questions(100)
    made = next(
        one
        for one in all_of(phrased(rows, family, few_shot=2, pool=rows, phrasings="a"))
        if len(phrase.exemplars(one)) == 2
    )
    first, second = (int(key.split(":")[1]) - 1 for key in phrase.exemplars(made))
    row = int(made.key.split(":")[1]) - 1
    assert made.messages[0].content == (
        f"Examples.\n#\nWhat is {first} + 1? => {first + 1}\n#\nWhat is {second} + 1? => {second + 1}\n#\nWhat is {row} + 1?"
    )
    assert len(made.messages) == 2


def test_worked_examples_can_stand_where_a_phrasing_wants_them():
    rows = questions(40)
    made = all_of(phrased(rows, library.family("qa"), few_shot=2, pool=rows, phrasings="as_before"))
    assert {len(phrase.exemplars(one)) for one in made} == {1, 2}
    number = int(phrase.exemplars(made[0])[0].split(":")[1]) - 1
    assert f"\n\nWhat is {number} + 1? -> {number + 1}\n\n" in made[0].messages[-2].content


def test_there_are_none_to_as_many_worked_examples_as_were_asked_for():
    rows = questions(2000)
    counts = Counter(len(phrase.exemplars(one)) for one in all_of(phrased(rows, few_shot=3, pool=rows)))
    assert set(counts) == {0, 1, 2, 3}
    assert all(400 < count < 600 for count in counts.values()), counts


def test_a_worked_example_is_never_the_row_itself_nor_one_that_asks_the_same():
    rows = Table(tuple({"question": f"What is {n % 5} + 1?", "answer": str(n % 5 + 1)} for n in range(50)))
    source = phrased(rows, few_shot=3, pool=rows, editions=4)
    drawn = 0
    for made in all_of(source):
        *shown, question, _ = (message.content for message in made.messages)
        assert made.key not in phrase.exemplars(made)
        assert question not in shown
        drawn += len(phrase.exemplars(made))
    assert drawn > 100


def test_no_evaluation_row_enters_training_as_a_worked_example():
    pool, held = questions(60), questions(40, start=60)
    trained = all_of(phrased(pool, few_shot=3, pool=pool, editions=6))
    measured = all_of(phrased(held, few_shot=3, pool=pool, split="eval", phrasings="heldout"))
    train_keys, held_keys = ({rows.key(index) for index in range(len(rows))} for rows in (pool, held))
    assert not train_keys & held_keys
    for made in trained:
        assert {made.key, *phrase.exemplars(made)} <= train_keys
    for made in measured:
        assert made.key in held_keys
        assert set(phrase.exemplars(made)) <= train_keys
    assert len({key for made in trained for key in phrase.exemplars(made)}) == 60
    words = {word for made in trained for message in made.messages for word in message.content.split()}
    assert not words & {str(number) for number in range(70, 100)}


def test_worked_examples_are_cut_to_the_budget():
    rows = questions(100)
    family = replace(SMALL, few_shot=FewShot(budget=40))  # one and a bit more of 14 + 2 to 15 + 3 characters
    counts = Counter(
        len(phrase.exemplars(one)) for one in all_of(phrased(rows, family, few_shot=3, pool=rows, phrasings="a"))
    )
    assert set(counts) == {0, 1, 2}
    words = Counter(
        len(phrase.exemplars(one)) for one in all_of(phrased(rows, family, few_shot=3, pool=rows, measure=count_words))
    )
    assert set(words) == {0, 1, 2, 3}


def test_worked_examples_leave_room_for_the_question():
    rows = questions(100)
    for made in all_of(phrased(rows, few_shot=3, pool=rows, phrasings="a", room=60)):
        assert sum(len(message.content) for message in made.messages) <= 60
    counts = Counter(len(phrase.exemplars(made)) for made in all_of(phrased(rows, few_shot=3, pool=rows, room=60)))
    assert set(counts) == {0, 1, 2}
    assert not [made for made in all_of(phrased(rows, few_shot=3, pool=rows, room=5)) if phrase.exemplars(made)]


def count_words(text):
    return len(text.split())


def test_worked_examples_mark_their_options_as_the_question_does():
    family = library.family("multiple_choice")
    source = phrased(CHOICES, family, few_shot=2, pool=CHOICES, phrasings="exam")
    for made in all_of(source):
        answers = [message.content for message in made.messages if message.role == "assistant"]
        assert len({(answer[0] in "([", answer.strip("()[]").isdigit(), answer.islower()) for answer in answers}) == 1


# ---------------------------------------------------------------------------------------------- tokenised


def test_editions_are_tokenised_one_behind_the_other_by_any_number_of_processes(tmp_path):
    rows = questions(900)
    source = phrased(rows, few_shot=1, pool=rows, editions=3)
    model = train([made.messages[-1].content for made in all_of(source)[:200]], size=300, controls=())
    encoding = Encoding(SentencePiece(model), format="plain", length=100, truncation="drop", prompt_weight=0.0)
    one, two = (encode_source(source, encoding, cache_dir=tmp_path / str(n), workers=n, progress=None) for n in (1, 2))
    ends = one.edition_ends.tolist()
    assert len(ends) == 3
    assert ends[-1] == len(one) > 1000
    assert one.report["rows"] == 900
    assert one.report["kept"] + sum(one.report["dropped"].values()) == 2700
    for edition, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        assert set(one.rows[start:end] // 900) == {edition}
        first = one.rows[start]
        assert one.address(start) == source.conversation(first).key
        assert one.template(start) == source.conversation(first).template
    assert np.array_equal(one.tokens, two.tokens)
    assert two.edition_ends.tolist() == ends


# ---------------------------------------------------------------------------------------------- options, inversion


def test_the_marked_answer_follows_the_shuffled_options():
    source = phrased(CHOICES, library.family("multiple_choice"), phrasings="letter", editions=3)
    places, markers = Counter(), Counter()
    for index, made in enumerate(all_of(source)):
        row = CHOICES.table[index % 200]
        lines, answer = made.messages[-2].content.splitlines()[1:5], made.messages[-1].content
        (line,) = (line for line in lines if line.split(" ", 1)[1] == row["options"][row["answer"]])
        assert line.split(" ")[0].rstrip(".):") in (answer, answer.rstrip(")"))
        assert {line.split(" ", 1)[1] for line in lines} == set(row["options"])
        places[lines.index(line)] += 1
        markers[answer.strip("()[]")] += 1
    assert all(110 < count < 190 for count in places.values()), places
    assert len(markers) == 12


def test_options_that_speak_of_their_order_keep_it():
    row = {"question": "?", "options": ["a", "b", "All of the above"], "answer": "b"}
    source = phrased(Table((row,) * 30), library.family("multiple_choice"), phrasings="inline")
    assert {made.messages[-2].content for made in all_of(source)} == {"? Is it a, b or All of the above?"}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_inverted_phrasings_come_at_their_rate_in_every_epoch_and_for_every_row(rate):
    source = phrased(questions(1000), inverted=rate, editions=10)
    per_edition, per_row = Counter(), Counter()
    for index, made in enumerate(all_of(source)):
        edition, row = divmod(index, 1000)
        is_inverted = made.template == "sums/turned"
        assert is_inverted == made.messages[-1].content.startswith("What is")
        per_edition[edition] += is_inverted
        per_row[row] += is_inverted
    assert all(abs(per_edition[edition] - 1000 * rate) < 60 for edition in range(10)), per_edition
    assert {per_row[row] for row in range(1000)} == {round(10 * rate)}


# ---------------------------------------------------------------------------------------------- columns and structure


def test_columns_are_mapped_by_name_and_by_path():
    rows = Table(({"q": "Where?", "answers": {"text": ["here", "there"]}},))
    made = phrased(rows, phrasings="a", columns={"question": "q", "answer": "answers.text.1"}).conversation(0)
    assert texts(made) == [("user", "Where?"), ("assistant", "there")]


def test_tools_and_calls_travel_unless_a_phrasing_writes_them():
    family = library.family("tool_use")
    rows = Table((family.sample,))
    native = phrased(rows, family, phrasings="native").conversation(0)
    assert native.tools[0]["name"] == "weather"
    (call,) = native.messages[-1].tool_calls
    assert (call.name, call.arguments, native.messages[-1].content) == ("weather", {"city": "Lisbon"}, "")
    written = phrased(rows, family, phrasings="text").conversation(0)
    assert not written.tools
    assert not written.messages[-1].tool_calls
    assert json.loads(written.messages[-1].content) == {"name": "weather", "arguments": {"city": "Lisbon"}}


def test_turns_travel_unless_a_phrasing_writes_them_and_are_not_learned():
    family = library.family("dialogue")
    made = phrased(Table((family.sample,)), family, phrasings="native_setting").conversation(0)
    assert [message.role for message in made.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.learn for message in made.messages[1:]] == [False, False, False, None]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, r"table.jsonl:1: field 'answer' of family 'sums' is to come from column 'answer'"),
        ({"question": "?", "anwser": "x"}, r"did you mean 'anwser'\?"),
        ({"question": "?", "answer": " "}, r"table.jsonl:1: column 'answer' is empty"),
        ({"question": {"x": 1}, "answer": "x"}, r"table.jsonl:1: column 'question': it is an object, not a text"),
    ],
)
def test_a_row_that_cannot_be_said_is_named_with_a_way_out(row, message):
    with pytest.raises(ValueError, match=message):
        phrased(Table((row,)), phrasings="a").conversation(0)


@pytest.mark.parametrize("answer", [4, -1, "n1", "E"])
def test_an_answer_that_is_none_of_the_options_is_told_whatever_the_phrasing(answer):
    row = {"question": "?", "options": ["a1", "b1", "c1", "d1"], "answer": answer}
    for name in ("inline", "letter", "make_question"):
        with pytest.raises(ValueError, match=r"table.jsonl:1: column 'answer': .* is none of"):
            phrased(Table((row,)), library.family("multiple_choice"), phrasings=name).conversation(0)


def test_a_bad_row_has_a_reason_that_can_be_counted_and_quotes_no_data():
    rows = Table(({"question": "secret"}, {"question": {"secret": 1}, "answer": "x"}, {"question": "?", "answer": " "}))
    reasons = []
    for index in range(3):
        with pytest.raises(BadRow) as bad:
            phrased(rows).conversation(index)
        assert bad.value.key == f"table.jsonl:{index + 1}"
        assert str(bad.value).count("table.jsonl") == 1
        reasons.append(bad.value.reason)
    assert reasons == ["there is no answer", "question is not of its kind", "there is no answer"]


def test_bad_rows_are_left_out_and_counted(tmp_path):
    lines = [{"q": f"What is {n}?", "a": str(n)} for n in range(20)] + [{"q": "?", "a": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (rows,) = sources.open_files(str(tmp_path / "rows.jsonl"), columns={"question": "q", "answer": "a"})
    good, bad = sources.usable(phrased(rows), most=0.1)
    assert (len(good), [row.reason for row in bad]) == (20, ["there is no answer"])
    kept = phrased(rows).over(sources.Subset(rows, range(20)), editions=3)
    assert kept.conversation(59).messages[-1].content in ("19", "A: 19", "19!")
    assert kept.conversations(range(60)) == all_of(kept)
    with pytest.raises(ValueError, match=r"there is no answer.*more than max_bad_rows"):
        sources.usable(phrased(rows), most=0.01)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phrasings": "aa"}, r"family 'sums': phrasings: 'aa' is unknown; did you mean 'a'\?"),
        ({"few_shot": 1}, "few_shot is 1, and no row can be a worked example"),
        ({"columns": {"qestion": "q"}}, r"columns: 'qestion' is no field of family 'sums'; did you mean 'question'\?"),
        (
            {"family": library.family("coding"), "phrasings": "heldout", "split": "eval", "inverted": 0.5},
            "no such phrasings",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused_before_any_row_is_read(change, message):
    with pytest.raises(ValueError, match=message):
        phrased(questions(3), **change)


@pytest.mark.parametrize("index", [-1, 6, 10**9])
def test_rows_outside_the_source_are_an_error(index):
    with pytest.raises(IndexError, match="table"):
        phrased(questions(3), editions=2).conversation(index)


def test_data_that_looks_like_a_pattern_or_a_choice_of_words_stays_as_it_is():
    text = "{answer} {{question}} {exemplars} {% x %} <|im_end|> (A) |||"
    rows = Table(({"question": text, "answer": text}, *questions(9).table))
    source = phrased(rows, few_shot=2, pool=rows, editions=12, inverted=0.2)
    for edition in range(12):
        assert text in source.conversation(edition * 10).messages[-1].content


def test_templates_of_a_promptsource_file_that_are_not_used_are_told(tmp_path):
    (tmp_path / "ps.yaml").write_text(
        'templates: {a: !Template {name: good, jinja: "{{ a }} ||| {{ b }}"}, '
        'b: !Template {name: bad, jinja: "{{ a | tojson }} ||| {{ b }}"}}'
    )
    source = phrased(Table(({"a": "1", "b": "2"},)), library.read(tmp_path / "ps.yaml"))
    assert source.notes() == ["ps: template 'bad' is left out: filter 'tojson' is not translated"]


def test_a_source_of_the_config_names_a_kind_or_a_file():
    assert phrase.family_of(Source(kind="qa"), place="config.sources.x") is library.family("qa")
    with pytest.raises(ValueError, match=r"config.sources.x: it names kind 'qa' and templates 'f.toml'; keep one"):
        phrase.family_of(Source(kind="qa", templates="f.toml"), place="config.sources.x")
