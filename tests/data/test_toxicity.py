"""Which words count as words of a list, and how well a list tells offensive tweets from others."""

import csv
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Conversation, Message
from itjax.base.schema import Filters
from itjax.data import toxicity
from itjax.data.stages import Example
from itjax.data.toxicity import Toxic

LIST = toxicity.word_list(
    "mine", ["# a comment", "", "ass", "one cup two girls", "one cup", "a$$", "merde", "バカ", "Straße"]
)


def hits(text, words=LIST):
    return [text[hit.start : hit.stop] for hit in words.hits(list(toxicity.words(text)))]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("You ass!", ["ass"]),
        ("ASS, Ass; 'ass'", ["ASS", "Ass", "ass"]),
        ("one-cup  two_girls and one cup", ["one-cup  two_girls", "one cup"]),
        ("what an a$$", ["a$$"]),
        ("my ass’s ass…", ["ass", "ass"]),
        ("あのバカです", ["バカ"]),  # written without spaces
        ("STRASSE straße", ["straße"]),
        ("MERDE\nmerde", ["MERDE", "merde"]),
    ],
)
def test_whole_words_are_found_whatever_their_case_and_spacing(text, expected):
    assert hits(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Classes in Scunthorpe assess a bass, class or passage",
        "assé",
        "aß",
        "one cups",
        "one big cup",
        "a$",
        "ass9",
        "ass\u0301",
    ],
)
def test_words_that_hold_a_word_of_the_list_are_left(text):
    assert hits(text) == []


def look(stage, *texts):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[number % 2], text) for number, text in enumerate(texts))
    return stage.look(Example(0, "train", Conversation(messages, "mine", "mine.jsonl:1")))


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "en.txt").write_text("ass\nmerde\n")
    return str(tmp_path / "*.txt")


def test_a_finding_names_the_list_and_the_place_and_never_the_word(listed):
    (finding,) = look(Toxic(Filters(word_lists=listed)), "hello", "you ass")
    assert (finding.stage, finding.reason, finding.action) == ("toxic", "word of en.txt", "drop")
    assert (finding.message, finding.start, finding.stop, finding.score) == (1, 4, 7, 1.0)
    assert "ass" not in str(finding).replace("message", "").replace("mask", "")


def test_only_the_turns_asked_for(listed):
    stage = Toxic(Filters(word_lists=listed, toxic_roles=("assistant",), toxic="tag"))
    assert look(stage, "you ass", "I would rather not.") == []
    assert [finding.action for finding in look(stage, "say it", "ass")] == ["tag"]


PIECES = [
    "one",
    "cup",
    "two",
    "girls",
    "ass",
    "A",
    "$",
    "-",
    "_",
    " ",
    "\n",
    "’",
    "é",
    "\u0301",
    "バ",
    "カ",
    "ß",
    "straße",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_is_passed_over_at_a_glance_has_no_hits(quick, pieces):
    text = "".join(pieces)
    found = [text[one.start : one.stop] for one in look(quick, text)]
    assert found == hits(text, quick.lists[0])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "mine.txt"
    path.write_text("ass\none cup two girls\none cup\na$$\nバカ\nStraße\n")
    return Toxic(Filters(word_lists=str(path)))


def shouting(text):
    return sum(map(str.isupper, text)) / max(1, len(text))


def test_a_classifier_of_ones_own_scores_every_turn():
    stage = Toxic(Filters(toxic_classifier="tests.data.test_toxicity:shouting", toxic_threshold=0.9))
    (finding,) = look(stage, "HEY", "yes?")
    assert (finding.reason, finding.message, finding.score) == ("classifier", 0, 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "neither words nor a classifier"),
        ({"word_lists": "/nowhere/*.txt"}, "nothing matches '/nowhere/"),
        ({"toxic_classifier": "json:loads", "toxic_roles": ("human",)}, "'human' is unknown; known: system, user"),
    ],
)
def test_a_wrong_setting_is_one_message(options, message):
    with pytest.raises(ValueError, match=r"config\.audit") as error:
        Toxic(Filters(**options))
    assert message in str(error.value)


def test_a_list_without_words_is_a_fault(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"empty\.txt: there are no words in it"):
        Toxic(Filters(word_lists=str(tmp_path / "empty.txt")))


def test_a_classifier_that_gives_no_share_is_a_fault():
    with pytest.raises(ValueError, match=r"toxic_classifier: it gave 7\.0"):
        look(Toxic(Filters(), classifier=lambda text: 7), "hello")


@pytest.mark.parametrize("seed", ["one cup ", "one cup two ", "ass", "a$", "é", "a\u0301", "漢", "<", "a@", " "])
def test_time_grows_with_the_text_and_no_faster(seed, listed):
    stage = Toxic(Filters(word_lists=listed))

    def seconds(text):
        started = time.process_time()
        look(stage, text)
        return time.process_time() - started

    times = [min(seconds((seed * size)[:size]) for _ in range(2)) for size in (20_000, 80_000)]
    assert times[1] < 1
    assert times[1] < 9 * times[0] + 0.02


def test_offensive_tweets_are_told_from_others(shared_data):
    """People had called 3,351 of 3,613 tweets hateful or offensive; the English list finds three quarters of them."""
    (words,) = toxicity.read_word_lists(str(shared_data / "bad_words" / "en.txt"))
    with (shared_data / "hate_speech" / "labeled_part1.csv").open(newline="") as file:
        rows = [(row["class"] != "2", bool(hits(row["tweet"], words))) for row in csv.DictReader(file)]
    right = sum(is_offensive and is_found for is_offensive, is_found in rows)
    assert right / sum(is_found for _, is_found in rows) > 0.95  # 0.989
    assert right / sum(is_offensive for is_offensive, _ in rows) > 0.7  # 0.750


def test_safe_questions_with_frightening_words_are_kept(shared_data):
    (words,) = toxicity.read_word_lists(str(shared_data / "bad_words" / "en.txt"))
    with (shared_data / "xstest" / "xstest_prompts_odd.csv").open(newline="") as file:
        safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"]
    assert len(safe) == 127
    assert [prompt for prompt in safe if hits(prompt, words)] == []
