"""Duplicates: what counts as the same, near-duplicates as often as the formula says, nothing below the threshold."""

import csv
import itertools
import json
import pickle
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from itjax.base.records import Conversation, Message, ToolCall
from itjax.base.schema import Filters
from itjax.data import duplicates
from itjax.data.duplicates import ExactDuplicates, NearDuplicates, normalised, shingles, stages_of, text_of
from itjax.data.sources import open_files
from itjax.data.stages import Address, Example, run

WORDS = [f"word{number}" for number in range(20_000)]
GOLDEN = [1981418886, 1881748345, 809182175]  # the same on every machine and numpy, or two reports of one corpus differ
CONFIDENCE = 3.9  # standard deviations: one in ten thousand


def chat(*turns: str, number: int = 0, split: str = "train", source: str = "s", system: str = "", **more) -> Example:
    """Turns of user and assistant, by turns."""
    first = (Message("system", system),) if system else ()
    said = tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(turns))
    return Example(number, split, Conversation((*first, *said), source, f"{source}:{number}", **more))


def chats(*rows: tuple[str, ...], eval_from: int = 10**9) -> list[Example]:
    return [chat(*row, number=n, split="eval" if n >= eval_from else "train") for n, row in enumerate(rows)]


def exact(examples, of="both"):
    return run([ExactDuplicates(of)], examples)


def near(examples, of="both", similarity=0.8, **settings):
    return run([NearDuplicates(of, similarity, **settings)], examples)


def told(findings):
    return [(finding.key, finding.reason, finding.action, finding.other) for finding in findings]


# ---------------------------------------------------------------------------------------------- word for word


def test_the_first_is_kept_and_the_others_say_which_it_is():
    rows = [
        ("Name a colour.", "Blue."),
        ("Name a day.", "Monday."),
        ("name  a\ncolour.", "BLUE."),
        ("Name a day.", "Friday."),
    ]
    assert told(exact(chats(*rows))) == [("s:2", "repeats an earlier example", "drop", "s:0")]
    assert told(exact(chats(*rows), of="prompt")) == [
        ("s:2", "repeats an earlier example", "drop", "s:0"),
        ("s:3", "repeats an earlier example", "drop", "s:1"),
    ]


def test_an_example_for_evaluation_is_never_dropped():
    rows = [("Hi", "Hello"), ("Hi", "Hello"), ("Hi", "Hello"), ("Hi", "Hello")]
    assert told(exact(chats(*rows, eval_from=2))) == [
        ("s:0", "repeats an evaluation example", "drop", "s:2"),
        ("s:1", "repeats an evaluation example", "drop", "s:2"),
        ("s:3", "repeats an evaluation example", "tag", "s:2"),
    ]


@pytest.mark.parametrize(
    "one, other",
    [
        ("ﬁne", "FINE"),
        ("Ｈｅｌｌｏ", "hello"),
        ("a\u00a0b", "a b"),
        ("cafe\u0301", "CAFÉ"),
        (" a\t\tb\r\n", "a b"),
        ("Å", "å"),
    ],
)
def test_texts_are_the_same_in_their_normal_form(one, other):
    assert normalised(one) == normalised(other)
    assert len(exact(chats((one, "x"), (other, "x")))) == 1


@pytest.mark.parametrize(
    "one, other", [("3 + 4?", "3 - 4?"), ("don't", "dont"), ("ab", "a b"), ("it's 5.0", "it's 50")]
)
def test_texts_that_say_something_else_are_not(one, other):
    assert exact(chats((one, "x"), (other, "x"))) == []


def test_prompt_is_everything_before_the_last_answer_and_response_all_answers():
    row = chat("a", "b", "c", "d", "e", system="s").conversation
    assert text_of(row, "prompt") == "s a b c"
    assert text_of(row, "response") == "b d"
    assert text_of(row, "both") == "s a b c\0d e"


def test_words_do_not_move_between_prompt_and_response():
    assert exact(chats(("say hi", "there"), ("say", "hi there"))) == []


def test_reasoning_tool_calls_and_declared_tools_count():
    def row(number, **answer):
        turns = (Message("user", "Weather?"), Message("assistant", "", **answer))
        return Example(number, "train", Conversation(turns, "s", f"s:{number}"))

    paris, rome = (ToolCall("weather", {"city": city, "unit": "C"}) for city in ("Paris", "Rome"))
    again = ToolCall("weather", {"unit": "C", "city": "Paris"})
    assert exact([row(0, tool_calls=(paris,)), row(1, tool_calls=(rome,)), row(2, reasoning="hm")]) == []
    assert len(exact([row(0, tool_calls=(paris,)), row(1, tool_calls=(again,))])) == 1
    tools = [chat("Weather?", "Sunny", number=n, tools=({"name": name},)) for n, name in enumerate("ab")]
    assert exact(tools) == []


@pytest.mark.parametrize("stage", [ExactDuplicates("response"), NearDuplicates("response", 0.8)])
def test_an_empty_text_repeats_nothing(stage):
    assert run([stage], chats(("a", ""), ("b", " \n"), ("c",))) == []


def test_texts_that_are_no_text_do_not_stop_the_audit():
    rows = chats(("\ud800", "\udfff"), ("\ud800", "\udfff"), ("\0", "\0"))
    assert len(exact(rows)) == len(near(rows)) == 1


def test_config_chooses_both_stages():
    first, second = stages_of(Filters(duplicates_of="prompt", similarity=0.7), seed=3)
    assert (first.of, second.of, second.similarity, second.seed) == ("prompt", "prompt", 0.7, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactDuplicates("answer"),
        lambda: NearDuplicates("answer", 0.8),
        lambda: NearDuplicates("both", 0.0),
        lambda: NearDuplicates("both", 80),
        lambda: NearDuplicates("both", 0.8, bands=256),
        lambda: NearDuplicates("both", 0.8, rows=0),
    ],
)
def test_settings_that_make_no_sense_are_errors(make):
    with pytest.raises(ValueError, match=r"choose from prompt, response, both|at most 1"):
        make()


# ---------------------------------------------------------------------------------------------- MinHash


def sets_of(similarity: float, rng: np.random.Generator, union: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of shingles that share exactly this part of their union."""
    both = round(similarity * union)
    shuffled = rng.permutation(np.unique(rng.integers(0, 2**32, union + 20, dtype=np.uint32)))[:union]
    middle = (union - both) // 2
    return shuffled[: both + middle], np.concatenate([shuffled[:both], shuffled[both + middle :]])


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_candidates_are_found_as_often_as_the_formula_says(similarity):
    stage, rng, num = NearDuplicates("both", 0.8), np.random.default_rng(int(similarity * 10)), 2000
    expected = 1 - (1 - similarity**stage.rows) ** stage.bands
    found, estimates = 0, []
    for _ in range(num):
        one, other = (stage.signature(shingles_S) for shingles_S in sets_of(similarity, rng))
        bands = (one == other).reshape(stage.bands, stage.rows)
        found += bands.all(axis=1).any()
        estimates.append(bands.mean())
    assert abs(found / num - expected) <= CONFIDENCE * (expected * (1 - expected) / num) ** 0.5 + 0.5 / num
    deviation = (similarity * (1 - similarity) / (num * stage.bands * stage.rows)) ** 0.5
    assert abs(np.mean(estimates) - similarity) <= CONFIDENCE * deviation


def test_candidates_share_a_bucket_exactly_where_a_band_agrees():
    stage, rng = NearDuplicates("both", 0.8), np.random.default_rng(0)
    for _ in range(50):
        one, other = sets_of(0.75, rng)
        bands = (stage.signature(one) == stage.signature(other)).reshape(stage.bands, stage.rows).all(axis=1)
        assert len(set(stage.buckets(one)) & set(stage.buckets(other))) == bands.sum()


def test_signatures_depend_on_the_seed_alone():
    shingles_S = shingles("a b c d e f g h", 5)
    one, same, other = (NearDuplicates("both", 0.8, seed=seed).signature(shingles_S) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).mean() > 0.9
    assert NearDuplicates("both", 0.8).signature(shingles_S)[:3].tolist() == GOLDEN


def test_a_long_text_is_permuted_in_blocks():
    stage, shingles_S = (
        NearDuplicates("both", 0.8),
        np.unique(np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32)),
    )
    parts = [stage.signature(part) for part in np.array_split(shingles_S, 11)]
    assert (stage.signature(shingles_S) == np.min(parts, axis=0)).all()


def test_shingles_are_five_words_and_a_short_text_is_one():
    assert len(shingles("a b c d e f g", 5)) == 3
    assert len(shingles("a b c d e f a b c d e f", 5)) == 6  # each once
    assert [len(shingles(" ".join("abcdefgh"[:num]), 5)) for num in range(8)] == [0, 1, 1, 1, 1, 1, 2, 3]
    assert not set(shingles("a b c", 5)) & set(shingles("a c b", 5))
    assert len(shingles("一二三四五六", 5)) == 2  # written without spaces: by characters


# ---------------------------------------------------------------------------------------------- nearly


def edited(words: list[str], edits: int, rng: random.Random) -> list[str]:
    """`edits` words replaced, far apart and far from the ends: each takes five shingles away and brings five."""
    changed = list(words)
    for place in range(edits):
        changed[10 + place * 10] = f"new{rng.random()}"
    return changed


def jaccard(one: list[str], other: list[str]) -> float:
    first, second = (set(zip(*(words[shift:] for shift in range(5)), strict=False)) for words in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_planted_near_duplicates(edits):
    """100 words, 96 shingles: one edit 91/101 = .901, two 86/106 = .811, three 81/111 = .730 (below the threshold)."""
    rng, num = random.Random(edits), 400
    originals = [rng.sample(WORDS, 100) for _ in range(num)]
    copies = [edited(words, edits, rng) for words in originals]
    similarity = jaccard(originals[0], copies[0])
    assert similarity == pytest.approx((96 - 5 * edits) / (96 + 5 * edits))
    found = near(chats(*((" ".join(words),) for words in originals + copies)))
    assert {finding.score for finding in found} <= {similarity}
    right = [finding for finding in found if int(finding.key[2:]) == int(finding.other[2:]) + num]
    assert len(right) == len(found)  # precision 1
    expected = 1 - (1 - similarity**8) ** 14 if similarity >= 0.8 else 0
    recall, deviation = len(right) / num, (expected * (1 - expected) / num) ** 0.5
    assert abs(recall - expected) <= CONFIDENCE * deviation + 0.5 / num


@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_those_of_all_pairs_that_share_a_bucket(seed):
    """Against comparing everything with everything, by words instead of hashes."""
    rng, stage = random.Random(seed), NearDuplicates("both", 0.6, seed=seed)
    bases = [rng.sample(WORDS, rng.randrange(2, 60)) for _ in range(8)]
    texts = [[rng.choice(WORDS) if rng.random() < 0.03 else word for word in rng.choice(bases)] for _ in range(120)]
    buckets = [set(stage.buckets(shingles(" ".join(words), 5))) for words in texts]
    joined: dict[int, set[int]] = {number: {number} for number in range(len(texts))}
    for one, other in itertools.combinations(range(len(texts)), 2):
        short = min(len(texts[one]), len(texts[other])) < 5
        similarity = float(texts[one] == texts[other]) if short else jaccard(texts[one], texts[other])
        if similarity >= stage.similarity and buckets[one] & buckets[other]:
            together = joined[one] | joined[other]
            for number in together:
                joined[number] = together
    expected = {f"s:{number}": f"s:{min(cluster)}" for number, cluster in joined.items() if number != min(cluster)}
    found = run([stage], chats(*((" ".join(words),) for words in texts)))
    assert {finding.key: finding.other for finding in found} == expected
    assert len(expected) > 20
    assert all(finding.score >= stage.similarity for finding in found)


def test_near_duplicates_are_found_across_sources_and_splits():
    words = WORDS[:60]
    rows = [
        (0, "train", "a", words),
        (1, "train", "b", ["other", *words[1:]]),
        (2, "eval", "c", [*words[:-1], "other"]),
    ]
    examples = [chat(" ".join(said), number=n, split=split, source=source) for n, split, source, said in rows]
    assert told(near(examples, bands=100, rows=2)) == [
        ("a:0", "nearly repeats an evaluation example", "drop", "c:2"),
        ("b:1", "nearly repeats an evaluation example", "drop", "c:2"),
    ]


def test_a_system_prompt_that_all_rows_share_makes_no_near_duplicates():
    system = " ".join(WORDS[:300])
    rows = [chat(f"Tell me of {name}", f"{name} is a town", number=n, system=system) for n, name in enumerate("abcd")]
    assert near(rows) == []


def test_one_question_under_two_long_system_prompts_is_two_examples():
    systems = (" ".join(WORDS[:300]), " ".join(WORDS[300:600]))
    rows = [chat("Is this sentence right or wrong?", "Right", number=n, system=systems[n % 2]) for n in range(4)]
    assert [(finding.key, finding.other) for finding in near(rows)] == [("s:2", "s:0"), ("s:3", "s:1")]


def test_crowded_buckets_stay_linear(monkeypatch):
    compared = Counter()

    def counted(one, other):
        compared["all"] += 1
        return len(one & other) / len(one | other)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    stage = NearDuplicates("both", 0.8)
    shared = np.arange(50)

    def members(num, *, own):
        for number in range(num):
            content = duplicates._pack(np.append(shared, 100 + number * own + np.arange(own)), shared[:0])
            yield Address(number, f"s:{number}", "s", "train"), content

    assert len(list(stage.pairs(members(10_000, own=0)))) == 9_999  # identical
    assert compared["all"] == 0
    assert len(list(stage.pairs(members(2_000, own=2)))) == 1_999  # all similar: each meets the first
    assert compared["all"] == 1_999
    compared.clear()
    assert list(stage.pairs(members(2_000, own=20))) == []  # none similar
    assert compared["all"] <= duplicates.COMPARISONS * 2_000


def test_a_text_between_two_clusters_makes_them_one():
    """c is like a and like b; d is like b alone, and must meet it among the members of a's cluster."""
    sets = {"a": range(0, 20), "b": range(8, 28), "c": range(4, 24), "d": [*range(8, 11), *range(13, 30)]}
    members = [
        (Address(number, name, "s", "train"), duplicates._pack(np.array(list(shingles_S)), np.empty(0, np.int64)))
        for number, (name, shingles_S) in enumerate(sets.items())
    ]
    pairs = [(pair.first.key, pair.second.key) for pair in NearDuplicates("both", 0.6).pairs(members)]
    assert pairs == [("a", "c"), ("b", "c"), ("b", "d")]


def test_the_order_of_pairs_and_their_repeats_change_nothing():
    stage = NearDuplicates("both", 0.8)
    addresses = [Address(number, f"s:{number}", "s", "eval" if number == 3 else "train") for number in range(6)]
    pairs = [
        duplicates.Pair(addresses[one], addresses[other], 0.8 + one / 100) for one, other in ((0, 1), (1, 3), (2, 5))
    ]
    expected = list(stage.findings(pairs))
    assert [(number, finding.other) for number, finding in expected] == [(0, "s:3"), (1, "s:3"), (5, "s:2")]
    rng = random.Random(0)
    for _ in range(20):
        shuffled = pairs * 3
        rng.shuffle(shuffled)
        assert list(stage.findings(shuffled)) == expected


def test_stages_travel():
    row = chat("What is the tallest mountain on earth?", "Everest")
    for stage in (ExactDuplicates("both"), NearDuplicates("both", 0.8)):
        before = stage.marks(row)
        assert pickle.loads(pickle.dumps(stage)).marks(row) == before


# ---------------------------------------------------------------------------------------------- real data


def rows_of(path, ask, answer="output"):
    return [(ask(row), row[answer]) for row in json.loads(path.read_text())]


def instruction(row):
    return f"{row['instruction']}\n{row['input']}"


def test_gsm8k_is_there_again_in_another_format(shared_data):
    rows = [json.loads(line) for line in (shared_data / "gsm8k/train.jsonl").read_text().splitlines()]
    with (shared_data / "flan_cot/gsm8k_train.tsv").open(newline="") as file:
        again = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == len(again) == 7473
    first = [chat(row["question"], row["answer"], number=n, source="gsm8k") for n, row in enumerate(rows)]
    second = [chat(row[0], row[2], number=7473 + n, source="flan") for n, row in enumerate(again)]
    found = exact(first + second, of="prompt")
    between = [finding for finding in found if finding.source == "flan" and finding.other.startswith("gsm8k")]
    assert len(between) == 7473
    assert exact(first + second, of="both") == []  # the answers are worded otherwise


def test_the_repeats_that_are_known_are_found(shared_data):
    files = shared_data / "llms_from_scratch/instruction-data.json", shared_data / "llama_factory/alpaca_en_demo.json"
    book, alpaca = (chats(*rows_of(file, instruction)) for file in files)
    assert len(exact(book, of="prompt")) == 25
    assert len(alpaca) == 999
    assert len(exact(alpaca)) == 14


def test_one_input_under_several_instructions_is_several_examples(shared_data):
    """Natural-Instructions: the prompt has the task's definition; its inputs alone repeat over a thousand times."""
    sources = open_files(str(shared_data / "natural_instructions/train"))
    rows = [source.conversation(index) for source in sources for index in range(len(source))]
    assert len(rows) == 15_104
    inputs = defaultdict(set)
    for row in rows:
        inputs[normalised(row.messages[0].content.split("\nInput: ")[1])].add(row.source)
    shared = {text for text, tasks in inputs.items() if len(tasks) > 1}
    assert len(shared) > 1_000
    number_of = {row.key: number for number, row in enumerate(rows)}
    found = exact([Example(number, "train", row) for number, row in enumerate(rows)], of="prompt")
    across = [finding for finding in found if rows[number_of[finding.other]].source != finding.source]
    assert across == []


def test_what_most_rows_of_a_source_say_makes_no_two_of_them_alike():
    """A long task definition around short questions; two of the questions do nearly repeat each other."""
    frame = " ".join(f"definition{number}" for number in range(60))
    asked = [f"what is the capital of country{number} please" for number in range(40)]
    way = "say how far it is from the old town to the new harbour by the long road along the green river when you go"
    examples = chats(*[(f"{frame} {question}", "") for question in [*asked, f"{way} today", f"{way} now"]])
    stage = NearDuplicates("prompt", 0.8)
    assert len(run([stage], examples)) > 30
    rows = [example.conversation for example in examples]
    assert [finding.key for finding in run([stage.knowing([rows])], examples)] == ["s:41"]
    assert stage.knowing([rows[:10]]) == stage  # too few to tell


def test_the_same_input_under_another_instruction_is_another_example():
    inputs = [" ".join(WORDS[40 * number : 40 * number + 40]) for number in range(30)]
    ask, label = (
        "say in a few words what happened before all else here",
        "find every noun that is in the plural there",
    )
    examples = chats(*[(f"{instruction} {text}", "") for instruction in (ask, label) for text in inputs])
    rows = [example.conversation for example in examples]
    stage = NearDuplicates("prompt", 0.7).knowing([rows[:30], rows[30:]])
    assert run([stage], examples) == []
    assert len(run([stage], chats(*[(f"{ask} {text}", "") for text in inputs for _ in range(2)]))) == 30


def test_marks_around_words_make_no_difference_but_numbers_and_signs_do():
    story = (
        '"A man has three red apples, two of them (the big ones) he gives away: how many does he still have? And why!"'
    )
    bare = story.translate(str.maketrans("", "", ',.:?!()"'))
    assert (shingles(story, 5) == shingles(bare, 5)).all()
    assert (shingles("oui ! \u00ab non \u00bb ... end", 5) == shingles("oui non end", 5)).all()
    assert not len(shingles("... !?", 5))
    texts = ("2 + 3", "2 - 3", "-2 + 3", ".2 + 3", "2.3", "2 3", "f(x)=1", "f x 1")
    assert len({shingles(text, 5).tobytes() for text in texts}) == len(texts)
