"""From findings to rows: which are kept, what is counted, and what is read of those that are left."""

import json
import pickle

import numpy as np
import pytest

from itjax.base.records import Conversation, Message
from itjax.base.schema import Filters
from itjax.data import duplicates, filters, leakage, privacy, quality, sources, toxicity
from itjax.data.filters import Own

MAIL = "write to ann@example.org"


class Listed:
    """Rows in a list: (question, answer) pairs."""

    def __init__(self, name, rows):
        self.name, self._rows = name, rows

    def __len__(self):
        return len(self._rows)

    def conversation(self, index):
        asked, answer = self._rows[index]
        messages = (Message("user", asked), Message("assistant", answer))
        return Conversation(messages, self.name, f"{self.name}.jsonl:{index + 1}")

    def fingerprint(self):
        return repr(self._rows)


ROWS = [("Who?", MAIL), ("Two?", "Two."), ("Two?", "Two."), ("Empty?", ""), ("Help?", "I cannot help with that.")]
NAMES = ("exact_duplicates", "personal", "quality")


def review(*train, held=(), names=NAMES, **options):
    return filters.review(train, held, names, Filters(**options))


def test_what_becomes_of_each_row():
    done = review(Listed("mine", ROWS))
    (one,) = done.reviewed
    assert one.kept.tolist() == [0, 1, 4]
    assert one.dropped == {"exact_duplicates: repeats an earlier example": 1, "quality: empty answer": 1}
    assert one.masked == {"personal: email": 1}
    assert one.tagged == {"quality: refusal": 1}
    (left,) = done.train
    assert [left.conversation(number).messages[1].content for number in range(len(left))] == [
        "write to <EMAIL_1>",
        "Two.",
        "I cannot help with that.",
    ]
    assert done.notes() == [
        "1 of 5 examples dropped: exact_duplicates: repeats an earlier example",
        "1 of 5 examples dropped: quality: empty answer",
        "1 of 5 examples masked: personal: email",
    ]


def test_every_row_that_is_not_kept_is_counted_once():
    rows = [(MAIL, ""), (MAIL, ""), ("Fine?", "Fine.")]
    (one,) = review(Listed("mine", rows), personal="drop").reviewed
    assert one.kept.tolist() == [2]
    assert sum(one.dropped.values()) == one.rows - len(one.kept)
    assert one.dropped == {"personal: email": 1, "exact_duplicates: repeats an earlier example": 1}
    assert (one.masked, one.tagged) == ({}, {})


def test_a_tagged_row_is_left_as_it_is():
    (left,) = review(Listed("mine", ROWS[:2]), personal="tag").train
    assert left.conversation(0).messages[1].content == MAIL


def test_rows_held_out_are_not_trained_on_and_never_dropped():
    train, held = Listed("mine", ROWS[:2]), Listed("held", [("Two?", "Two."), ("Empty?", "")])
    done = review(train, held=[held])
    assert [(one.name, one.split, one.kept.tolist()) for one in done.reviewed] == [
        ("mine", "train", [0]),
        ("held", "eval", [0, 1]),
    ]
    assert done.reviewed[1].tagged == {"quality: empty answer": 1}
    assert [len(source) for source in done.train] == [1]


def test_the_same_row_in_two_sources_is_dropped_from_the_second():
    done = review(Listed("first", ROWS[1:2]), Listed("second", ROWS[1:2]))
    assert [one.kept.tolist() for one in done.reviewed] == [[0], []]


def test_no_stage_changes_nothing():
    source = Listed("mine", ROWS)
    done = review(source, names=())
    assert done.train == (source,)
    assert not done.findings


def test_a_source_without_findings_is_the_source_unless_it_may_be_masked():
    source = Listed("mine", ROWS[1:2])
    assert review(source, names=("quality",)).train == (source,)


def test_what_is_left_is_the_same_wherever_it_is_read(tmp_path):
    (left,) = review(Listed("mine", ROWS)).train
    copy = pickle.loads(pickle.dumps(left))
    assert [copy.conversation(number) for number in range(len(copy))] == left.conversations(range(len(left)))
    assert copy.fingerprint() == left.fingerprint()


def test_the_fingerprint_changes_with_rows_stages_and_settings():
    source = Listed("mine", ROWS)
    same = [review(source).train[0].fingerprint() for _ in range(2)]
    others = [
        review(Listed("mine", ROWS[:-1])).train[0].fingerprint(),
        review(source, names=("personal",)).train[0].fingerprint(),
        review(source, personal_kinds=("email",)).train[0].fingerprint(),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others, source.fingerprint()}) == 5


@pytest.mark.parametrize("module", [duplicates, filters, leakage, privacy, quality, toxicity])
def test_the_fingerprint_changes_with_every_version(module, monkeypatch):
    before = filters.fingerprint(("personal",), Filters())
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert filters.fingerprint(("personal",), Filters()) != before


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": asked, "completion": answer, "by": "bob@example.org"} for asked, answer in ROWS]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fields_of_files_are_masked_too(files):
    (source,) = sources.open_files(str(files))
    (left,) = review(source).train
    assert left.row(0) == {"prompt": "Who?", "completion": "write to <EMAIL_1>", "by": "<EMAIL_2>"}
    assert [left.key(number) for number in range(3)] == [f"{files}:{line}" for line in (1, 2, 5)]


def test_rows_that_cannot_be_read_are_counted_and_kept_for_the_encoder(files):
    with files.open("a") as file:
        file.write('{"prompt": "no answer"}\n')
    (source,) = sources.open_files(str(files))
    (one,) = review(source).reviewed
    assert one.kept.tolist() == [0, 1, 4, 5]
    assert sum(one.unreadable.values()) == 1


def test_a_renamed_source_speaks_under_its_new_name():
    subset = sources.Subset(Listed("mine", ROWS), np.arange(5), "other")
    assert {finding.source for finding in review(subset).findings} == {"other"}


def test_processes_find_the_same(files, monkeypatch):
    monkeypatch.setattr(filters, "SMALL", 0)
    (source,) = sources.open_files(str(files))
    found = [filters.review([source], [], NAMES, Filters(), workers=workers).findings for workers in (1, 2)]
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_evaluations_must_not_be_trained_on():
    item = "How many apples are left when Ann eats three of the seven red apples today?"
    own = Own(items=[("gsm.jsonl:1", item)])
    source = Listed("mine", [(item, "Four."), ("Two?", "Two.")])
    done = filters.review([source], [], ("leakage",), Filters(), own=own)
    assert done.reviewed[0].kept.tolist() == [1]
    (contaminated,) = done.contamination
    assert (contaminated.rows_hit, contaminated.items_hit, contaminated.of_items) == (1, 1, 1.0)


def test_findings_on_disk_quote_nothing():
    lines = list(filters.lines(review(Listed("mine", ROWS)).findings))
    assert len(lines) == 4
    assert json.loads(lines[0]) == {
        "key": "mine.jsonl:1", "source": "mine", "stage": "personal", "reason": "email", "action": "mask", "message": 1,
        "part": "content", "start": 9, "stop": 24, "other": "", "score": None,
    }  # fmt: skip
    assert not any("ann@" in line for line in lines)


@pytest.mark.parametrize(
    "names, message",
    [
        (("persnal",), "'persnal' is no stage. Did you mean 'personal'?"),
        (("personal", "personal"), "'personal' stands twice"),
        (("leakage",), "config.audit.leakage_files: the leakage stage has nothing to compare with"),
        (("toxic",), "config.audit.word_lists"),
    ],
)
def test_a_wrong_name_is_one_message(names, message):
    with pytest.raises(ValueError, match=r"config\.") as error:
        filters.build(names, Filters())
    assert message in str(error.value)


def test_all_stages_that_have_what_they_need():
    assert filters.possible(Filters()) == ("exact_duplicates", "near_duplicates", "personal", "quality")
    assert set(filters.possible(Filters(word_lists="x", leakage_files="y"))) == set(filters.STAGES)
