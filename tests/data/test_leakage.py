"""Leakage: coverage to the token, the same as comparing everything with everything, real evaluation files."""

import csv
import json
import pickle
import random

import numpy as np
import pytest

from itjax.base.records import Conversation, Message
from itjax.data import leakage
from itjax.data.leakage import (
    COVERS,
    IS_SHORT,
    MEANS,
    SHARES,
    Leakage,
    SemanticLeakage,
    contamination,
    evaluation_texts,
    items_of,
    prompts_of,
    tokens_of,
)
from itjax.data.stages import Example, run


def row(*turns: str, number: int = 0, source: str = "train", split: str = "train") -> Example:
    said = tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(turns))
    return Example(number, split, Conversation(said, source, f"{source}.jsonl:{number}"))


def words(num: int, name: str = "w") -> list[str]:
    return [f"{name}{number}" for number in range(num)]


def look(items, *turns, coverage=0.5):
    named = [(f"eval.jsonl:{number}", text) for number, text in enumerate(items)]
    found = Leakage(named, coverage=coverage).look(row(*turns))
    return [(finding.reason, finding.action, finding.other, finding.message, finding.score) for finding in found]


# ---------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("covered, leaks", [(49, False), (50, False), (51, True)])
def test_more_than_half_of_an_item_is_leaked(covered, leaks):
    """100 tokens; `covered` of them in a row are in the training turn, which shares nothing else."""
    item = words(100)
    turn = [*words(20, "before"), *item[30 : 30 + covered], *words(20, "after")]
    found = [hit for hit in look([" ".join(item)], " ".join(turn), "yes") if hit[0] == COVERS]
    assert found == ([(COVERS, "drop", "eval.jsonl:0", 0, covered / 100)] if leaks else [])


def test_coverage_is_of_tokens_not_of_stretches():
    """Two stretches of 8 that overlap in 4 cover 12; a third on its own covers 8: 20 of 40."""
    item = words(40)
    turn = [*item[0:12], "x", *item[20:28], "y", *item[30:37]]  # seven in a row are no 8-gram
    assert look([" ".join(item)], " ".join(turn), coverage=0.49) == [(COVERS, "drop", "eval.jsonl:0", 0, 0.5)]
    assert look([" ".join(item)], " ".join(turn), coverage=0.5) == []


def test_stretches_that_repeat_cover_once():
    item = words(20)
    assert look([" ".join(item)], " ".join(item[:10] * 3)) == []
    twice = words(10) * 2
    found = look([" ".join(twice)], " ".join(words(10)))  # what stands twice in the item is covered twice
    assert [(hit[0], hit[4]) for hit in found] == [(COVERS, 1.0)]


def test_tokens_are_split_as_published():
    assert tokens_of('He said: "No-one, (really?)";\nC:\\dir') == ["he", "said", "no", "one", "really", "c", "dir"]
    assert tokens_of("it's a\ttab,\r\nno\u00a0break") == ["it's", "a", "tab", "no", "break"]  # not published
    assert tokens_of("日本の首都は?") == list("日本の首都は")  # not published: a sentence without spaces


def test_case_and_punctuation_do_not_hide_a_leak():
    asked = "What is the capital of France, and how many people live there (today)?"
    other = "what is the capital of france and how many people live there today"
    assert [hit[0] for hit in look([asked], other)] == [COVERS, SHARES]


def test_only_what_users_say_is_looked_at():
    item = " ".join(words(30))
    assert look([item], "a question", item) == []
    assert [hit[3] for hit in look([item], "a question", "an answer", item)] == [2, 2]


def test_a_short_item_must_be_the_whole_turn():
    item = "How can I kill a process?"
    assert look([item], "how can I kill a process") == [(IS_SHORT, "drop", "eval.jsonl:0", 0, 1.0)]
    assert look([item], "How can I kill a process? Or should I wait for it?") == []
    assert look([" ".join(words(8))], " ".join(words(8))) == [(COVERS, "drop", "eval.jsonl:0", 0, 1.0)]


@pytest.mark.parametrize("shared, tagged", [(12, False), (13, True)])
def test_any_thirteen_tokens_in_a_row_are_told(shared, tagged):
    item, turn = words(100), [*words(30, "a"), *words(100)[50 : 50 + shared], *words(30, "b")]
    expected = [(SHARES, "tag", "eval.jsonl:0", 0, 0.13)] if tagged else []
    assert look([" ".join(item)], " ".join(turn)) == expected


def test_scattered_eights_are_no_thirteen():
    item = words(26)
    turn = [*item[0:12], "x", *item[12:24]]
    assert [hit[0] for hit in look([" ".join(item)], " ".join(turn))] == [COVERS]


def test_the_best_turn_of_an_item_is_told():
    item = words(100)
    found = look([" ".join(item)], " ".join(item[:60]), "so", " ".join(item[:80]), "so", " ".join(item[:80]))
    assert found[0] == (COVERS, "drop", "eval.jsonl:0", 2, 0.8)


def test_examples_for_evaluation_may_repeat_an_evaluation():
    item = " ".join(words(30))
    assert Leakage([("e:0", item)], coverage=0.5).look(row(item, split="eval")) == []


def test_many_hits_are_told_up_to_a_number_for_every_set(monkeypatch):
    monkeypatch.setattr(leakage, "MOST", 3)
    item = words(40)
    names = [(f"{name}.jsonl:{n}", " ".join([*item, *words(n, "more")])) for name in ("a", "b") for n in range(10)]
    found = Leakage(names, coverage=0.5).look(row(" ".join(item)))
    covers = [finding.other for finding in found if finding.reason == COVERS]
    assert covers == ["a.jsonl:0", "b.jsonl:0", "a.jsonl:1", "b.jsonl:1", "a.jsonl:2", "b.jsonl:2"]


def test_the_picture_of_coverage():
    hits = np.array([1, 2, 6, (3 << 32) + 4], np.uint64)  # of items 0 and 3
    items, shares = leakage.coverage(hits, np.array([10, 1, 1, 12]), 3)
    assert (items.tolist(), shares.tolist()) == ([0, 3], [0.7, 0.25])


# ---------------------------------------------------------------------------------------------- by brute force


def by_brute_force(item: list[str], turn: list[str], width: int) -> float:
    there = {tuple(turn[start : start + width]) for start in range(len(turn) - width + 1)}
    covered = set()
    for start in range(len(item) - width + 1):
        if tuple(item[start : start + width]) in there:
            covered.update(range(start, start + width))
    return len(covered) / len(item)


@pytest.mark.parametrize("seed", range(8))
def test_the_index_finds_what_comparing_everything_finds(seed):
    rng = random.Random(seed)
    vocabulary, phrases = words(30), [[rng.choice(words(30)) for _ in range(rng.randrange(3, 25))] for _ in range(12)]

    def text() -> list[str]:
        parts = [
            rng.choice(phrases) if rng.random() < 0.7 else [rng.choice(vocabulary)] for _ in range(rng.randrange(1, 8))
        ]
        return [word for part in parts for word in part]

    items, turns = [text() for _ in range(40)], [text() for _ in range(60)]
    stage = Leakage(((f"e:{number}", " ".join(item)) for number, item in enumerate(items)), coverage=0.5)
    found = {
        (finding.key, finding.other, finding.reason): finding.score
        for finding in run([stage], [row(" ".join(turn), number=n) for n, turn in enumerate(turns)])
    }
    expected = {}
    for (n, turn), (m, item) in ((one, other) for one in enumerate(turns) for other in enumerate(items)):
        place = (f"train.jsonl:{n}", f"e:{m}")
        if len(item) < 8:
            expected |= {(*place, IS_SHORT): 1.0} if item == turn else {}
        elif (covered := by_brute_force(item, turn, 8)) > 0.5:
            expected[*place, COVERS] = covered
        if len(item) >= 13 and (shared := by_brute_force(item, turn, 13)):
            expected[*place, SHARES] = shared
    assert found == expected
    assert len(expected) > 50


def test_planted_leaks_are_found_and_nothing_else():
    """Half of the rows hold 70 % of an item in a row: recall 1, precision 1."""
    rng = random.Random(0)
    vocabulary = words(3000)
    items = [rng.choices(vocabulary, k=40) for _ in range(200)]
    examples, planted = [], set()
    for number in range(600):
        said = rng.choices(vocabulary, k=50)
        if number % 2:
            leaked = rng.randrange(200)
            said[10:10] = items[leaked][6:34]
            planted.add((f"train.jsonl:{number}", f"e:{leaked}"))
        examples.append(row(" ".join(said), number=number))
    stage = Leakage(((f"e:{number}", " ".join(item)) for number, item in enumerate(items)), coverage=0.5)
    found = {(finding.key, finding.other) for finding in run([stage], examples) if finding.reason == COVERS}
    assert found == planted


def test_the_stage_travels():
    item = " ".join(words(30))
    stage = Leakage([("e:0", item)], coverage=0.5)
    assert pickle.loads(pickle.dumps(stage)).look(row(item)) == stage.look(row(item)) != []


def test_the_index_has_a_size_that_can_be_told():
    """Two n-grams begin at nearly every token, each 16 bytes; no text is kept."""
    items = [(f"e:{n}", " ".join(words(200, f"item{n}word"))) for n in range(50)]
    assert len(pickle.dumps(Leakage(items, coverage=0.5))) < 50 * 200 * 2 * 16 + 50 * 40 + 2000


def test_a_turn_without_words_leaks_nothing():
    stage = Leakage([("e:0", "..."), ("e:1", "go on")], coverage=0.5)
    assert stage.items == {"e": 2}
    assert [stage.look(row(said)) != [] for said in ("...", "", "?!", "Go on!")] == [False, False, False, True]


@pytest.mark.parametrize("items", [[], [("e:3", " .?")]])
def test_nothing_to_look_for_is_an_error(items):
    with pytest.raises(ValueError, match="no evaluation item has words"):
        Leakage(items, coverage=0.5)


# ---------------------------------------------------------------------------------------------- how much


def test_contamination_counts_rows_and_items():
    items = {f"math.jsonl:{n}": " ".join(words(20, f"m{n}_")) for n in range(4)}
    items |= {f"code.jsonl:{n}": " ".join(words(20, f"c{n}_")) for n in range(2)}
    said = [items["math.jsonl:0"], items["math.jsonl:0"], items["math.jsonl:3"], "nothing"]
    examples = [row(text, number=n, source="a") for n, text in enumerate(said)] + [row("no", number=4, source="b")]
    stage = Leakage(items.items(), coverage=0.5)
    assert stage.items == {"math.jsonl": 4, "code.jsonl": 2}
    lines = contamination(run([stage], examples), rows={"a": 4, "b": 1}, items=stage.items)
    told = [(line.source, line.evaluation, line.rows_hit, line.items_hit) for line in lines]
    assert told == [
        ("a", "math.jsonl", 3, 2),
        ("a", "code.jsonl", 0, 0),
        ("b", "math.jsonl", 0, 0),
        ("b", "code.jsonl", 0, 0),
    ]
    assert (lines[0].of_rows, lines[0].of_items) == (0.75, 0.5)


# ---------------------------------------------------------------------------------------------- by meaning


def angle(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def test_vectors_close_enough_are_leaks():
    items = [("e:0", 3 * angle(0)), ("e:1", angle(90)), ("e:2", angle(200))]
    said = [angle(10), 5 * angle(45), angle(95), angle(181), angle(89)]
    stage = SemanticLeakage(items, lambda example: said[example.number], cosine=float(np.cos(np.radians(20))))
    found = run([stage], [row("", number=n) for n in range(len(said))])
    assert [(finding.key, finding.other, finding.reason, finding.action) for finding in found] == [
        ("train.jsonl:0", "e:0", MEANS, "drop"),
        ("train.jsonl:2", "e:1", MEANS, "drop"),
        ("train.jsonl:3", "e:2", MEANS, "drop"),
        ("train.jsonl:4", "e:1", MEANS, "drop"),
    ]
    assert found[0].score == pytest.approx(np.cos(np.radians(10)))


@pytest.mark.parametrize(
    "items, said, message",
    [
        ([("e:0", np.zeros(2))], angle(0), "e:0: .*no direction"),
        ([("e:0", angle(0))], np.array([np.nan, 1]), "train.jsonl:0: .*no direction"),
        ([("e:0", angle(0))], np.ones(3), "train.jsonl:0: .*3 numbers"),
        ([("e:0", angle(0)), ("e:1", np.ones(3))], angle(0), "differ in size"),
        ([], angle(0), "no evaluation items"),
    ],
)
def test_vectors_that_cannot_be_compared_are_errors(items, said, message):
    with pytest.raises(ValueError, match=message):
        SemanticLeakage(items, lambda _: said, cosine=0.9).look(row("x"))


# ---------------------------------------------------------------------------------------------- evaluation files


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"question": "Why?", "answer": "So."}, ["Why?"]),
        ({"Question": "Why?", "Best Answer": "So."}, ["Why?"]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n1 2"]),
        ({"instruction": "Add 1 and 2.", "input": ""}, ["Add 1 and 2."]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
        ({"question": [[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]]}, ["a"]),
        ({"turns": ["first", "second"]}, ["first", "second"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, ["a"]),
        ({"text": "a passage", "label": 1}, ["a passage"]),
        ({"text": "a passage", "question": "Why?"}, ["Why?"]),
        ("a bare text", ["a bare text"]),
        ({"id": 7, "answer": "So."}, []),
    ],
)
def test_what_an_evaluation_asks_is_found_in_any_row(asked, expected):
    assert prompts_of(asked) == expected


def test_a_row_that_asks_nothing_is_an_error_with_its_address():
    with pytest.raises(ValueError, match=r"e.jsonl:7: .*\['answer', 'id'\].*`prompt`"):
        list(items_of([("e.jsonl:7", {"id": 7, "answer": "So."})]))


FILES = {  # a file, how many rows it has, and words of its first item
    "gsm8k/train.jsonl": (7473, "Natalia sold clips to 48"),
    "human_eval/HumanEval.jsonl.gz": (164, "from typing import List"),
    "ifeval/*.jsonl": (None, "Write a 300+ word summary"),
    "bfcl/BFCL_v4_simple_python.json": (400, "Find the area of a triangle"),
    "xstest/xstest_prompts_odd.csv": (None, "How can I kill a Python process?"),
    "llms_from_scratch/instruction-data.json": (1100, "Evaluate the following phrase"),
}


@pytest.mark.parametrize("name", FILES)
def test_evaluation_files_are_read_as_they_are(shared_data, tmp_path, name):
    items = list(evaluation_texts(str(shared_data / name), cache_dir=tmp_path))
    num, begins = FILES[name]
    assert items[0][1].startswith(begins)
    assert len({key for key, _ in items}) == (num or len(items)) > 100
    assert Leakage(items, coverage=0.5).items == {items[0][0].rpartition(":")[0]: len({key for key, _ in items})}


def test_a_training_file_with_gsm8k_in_another_format_is_all_leaked(shared_data, tmp_path):
    """Every question of flan_cot is one of GSM8K; eleven also cover a twin of it. A book's instructions cover none."""
    stage = Leakage(evaluation_texts(str(shared_data / "gsm8k/train.jsonl"), cache_dir=tmp_path), coverage=0.5)
    with (shared_data / "flan_cot/gsm8k_train.tsv").open(newline="") as file:
        questions = [fields[0] for fields in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][::3]
    examples = [row(question, "so", number=n, source="flan") for n, question in enumerate(questions)]
    book = json.loads((shared_data / "llms_from_scratch/instruction-data.json").read_text())
    examples += [
        row(f"{x['instruction']}\n{x['input']}", x["output"], number=n, source="book") for n, x in enumerate(book)
    ]
    (items,) = stage.items.values()
    flan, clean = contamination(run([stage], examples), rows={"flan": 2491, "book": 1100}, items=stage.items)
    assert (flan.rows_hit, flan.items_hit, items) == (2491, 2491 + 11, 7473)
    assert (clean.rows_hit, clean.items_hit) == (0, 0)
