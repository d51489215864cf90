"""What the page of an audit shows of a text, and what it keeps from the eye."""

import json

import pytest

from itjax.base.records import Finding
from itjax.base.schema import Filters
from itjax.data import filters
from itjax.evaluation import audit
from itjax.evaluation.audit import Shown
from tests.data.test_filters import MAIL, Listed
from tests.evaluation.test_report import Reader

ROWS = [
    ("Who?", f"{MAIL}, blockhead"),
    ("Two?", "<Two> & more."),
    ("Two?", "<Two> & more."),
    ("Help?", "I cannot help."),
]


@pytest.fixture
def options(tmp_path):
    (tmp_path / "words.txt").write_text("blockhead\n")
    return Filters(word_lists=str(tmp_path / "words.txt"))


def test_personal_data_is_masked_and_offensive_words_are_covered(options):
    text = f"{MAIL}, blockhead"
    shown = Shown(options).around(text, text.index("ann"), text.index(","))
    assert shown == (
        'write to <span class="masked">&lt;EMAIL_1&gt;</span>, '
        '<span class="veil" tabindex="0" title="offensive: click to read">blockhead</span>'
    )


def test_what_was_found_is_marked_and_only_a_little_around_it_is_shown():
    text = "a " * 500 + "found" + " b" * 500
    shown = Shown(Filters()).around(text, 1000, 1005)
    assert "<mark>found</mark>" in shown
    assert shown.startswith("…")
    assert shown.endswith("…")
    assert len(shown) < 400


def test_a_card_that_stands_across_the_edge_is_masked_whole():
    text = "x" * (audit.AROUND - 10) + " 4111 1111 1111 1111 " + "y " * 200 + "found"
    shown = Shown(Filters()).around(text, 0, 1)
    assert "4111" not in shown
    shown = Shown(Filters()).around(text, len(text) - 5, len(text))
    assert "1111" not in shown


def test_a_turn_that_a_classifier_calls_toxic_is_covered():
    assert Shown(Filters()).around("all of it", 0, 9, veil=True) == (
        '<span class="veil" tabindex="0" title="offensive: click to read">all of it</span>'
    )


def finding(key, other):
    return Finding(key, "mine", "exact_duplicates", "repeats an earlier example", "drop", other=other)


def test_rows_that_repeat_the_same_row_are_one_cluster():
    found = audit.clusters([finding("2", "1"), finding("5", "4"), finding("3", "1")])
    assert [(cluster.first, [one.key for one in cluster.repeats]) for cluster in found] == [
        ("1", ["2", "3"]),
        ("4", ["5"]),
    ]


def test_manifest_and_page_tell_the_same(options, tmp_path):
    train = [Listed("mine", ROWS)]
    review = filters.review(train, [], ("exact_duplicates", "personal", "toxic", "quality"), options)
    paths = audit.write(tmp_path / "out", review, filters.Examples(train, []), version="1")
    account = json.loads(paths[0].read_text())
    assert (account["totals"]["rows"], account["totals"]["kept"]) == (4, 2)
    assert account["totals"]["dropped"] == {
        "exact_duplicates: repeats an earlier example": 1,
        "toxic: word of words.txt": 1,
    }
    page = Reader(paths[2].read_text())
    assert {"4", "2"} <= set(page.text)
    assert "<Two> & more." in " ".join(page.text)
    assert "ann@example.org" not in paths[2].read_text()


def test_the_same_data_gives_the_same_manifest(options):
    train = [Listed("mine", ROWS)]
    made = [audit.manifest(filters.review(train, [], ("personal", "quality"), options), version="1") for _ in range(2)]
    assert made[0] == made[1]
