"""Running stages: findings in the order of the examples, nothing kept but what grouping needs, the same by processes."""

import os
import random
import subprocess
import sys
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Conversation, Finding, Message
from itjax.data import stages
from itjax.data.duplicates import ExactDuplicates, NearDuplicates
from itjax.data.leakage import Leakage
from itjax.data.stages import Address, Buckets, Example, Mark, run


class Shouts:
    """A row stage: two findings for a text in capitals."""

    name = "shouts"

    def look(self, example):
        row = example.conversation
        if not row.messages[0].content.isupper():
            return []
        return [Finding(row.key, row.source, self.name, reason, "tag") for reason in ("is loud", "has capitals")]


def example(number: int, text: str, split: str = "train") -> Example:
    row = Conversation((Message("user", text), Message("assistant", "Yes.")), "s", f"s:{number}")
    return Example(number, split, row)


def corpus(num: int = 900) -> list[Example]:
    """Every kind of finding in it: copies, near copies, leaks, capitals, a few for evaluation."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(5000)]
    bases = [rng.choices(words, k=50) for _ in range(num // 6)]
    examples = []
    for number in range(num):
        said = list(rng.choice(bases))
        if rng.random() < 0.5:
            said[rng.randrange(50)] = rng.choice(words)
        text = " ".join(said)
        examples.append(
            example(number, text.upper() if number % 10 == 0 else text, "eval" if number % 9 == 0 else "train")
        )
    return examples


def all_stages(examples):
    leaked = [(f"eval.jsonl:{n}", examples[n].conversation.messages[0].content) for n in range(0, 100, 5)]
    return [Leakage(leaked, coverage=0.5), ExactDuplicates("both"), Shouts(), NearDuplicates("both", 0.8)]


def test_findings_come_in_the_order_of_examples_and_then_of_stages():
    texts = ["A B C", "x", "a b c", "X", "x"]
    found = run([ExactDuplicates("both"), Shouts()], [example(n, text) for n, text in enumerate(texts)])
    assert [(finding.key, finding.reason) for finding in found] == [
        ("s:0", "is loud"),
        ("s:0", "has capitals"),
        ("s:2", "repeats an earlier example"),
        ("s:3", "repeats an earlier example"),
        ("s:3", "is loud"),
        ("s:3", "has capitals"),
        ("s:4", "repeats an earlier example"),
    ]


def test_processes_find_the_same(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 50)  # more of them than are sent ahead
    examples = corpus()
    alone = run(all_stages(examples), examples)
    assert len({finding.reason for finding in alone}) >= 7
    assert run(all_stages(examples), examples, workers=2) == alone


def test_little_memory_finds_the_same():
    examples = corpus()
    assert run(all_stages(examples), examples, memory=2000) == run(all_stages(examples), examples)


def test_examples_are_let_go():
    gone, most = [], 0

    def stream():
        nonlocal most
        for one in corpus(600):
            fresh = Example(one.number, one.split, one.conversation)
            weakref.finalize(fresh, gone.append, one.number)
            most = max(most, one.number + 1 - len(gone))
            yield fresh

    run([ExactDuplicates("both"), NearDuplicates("both", 0.8), Shouts()], stream())
    assert most <= 3


def test_no_examples_and_no_stages_are_no_findings():
    assert run([], corpus(20)) == run(all_stages(corpus(100)), []) == run([], [], workers=2) == []


def test_an_error_in_a_process_arrives():
    with pytest.raises(ValueError, match="no words"):
        run([Refuses()], corpus(20), workers=2)


class Dies:
    name = "dies"

    def look(self, example):
        os._exit(1)


def test_a_killed_process_is_told():
    with pytest.raises(RuntimeError, match="a process was killed"):
        run([Dies()], corpus(20), workers=2)


SCRIPT = """
from itjax.data.stages import run
from tests.data.test_stages import Shouts, example

print("the script runs as", __name__)
print(len(run([Shouts()], [example(number, "HEY") for number in range(600)], workers=2)))
"""


def test_processes_do_not_run_the_script_again_and_need_no_file_of_it():
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-"],
        input=SCRIPT,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["the script runs as __main__", "1200"], done.stderr


class Refuses:
    name = "refuses"

    def look(self, example):
        raise ValueError(f"{example.conversation.key}: no words")


bucketed = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.binary(max_size=3)), max_size=40)


@given(bucketed, st.sampled_from([24, 100, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_groups_are_the_members_of_every_bucket_with_more_than_one(rows, memory):
    expected = defaultdict(list)
    with Buckets(memory) as buckets:
        for number, (names, content) in enumerate(rows):
            address = Address(number, f"ключ:{number}", "s", "train")
            marks = [Mark(name.to_bytes(16, "big"), content) for name in names]
            buckets.add(address, marks)
            for mark in marks:
                expected[mark.bucket].append((address, content))
        groups = sorted(list(group) for group in buckets.groups())
    assert groups == sorted(members for members in expected.values() if len(members) > 1)


def test_a_bucket_of_another_size_is_an_error():
    with Buckets() as buckets, pytest.raises(ValueError, match="3 bytes; give 16"):
        buckets.add(Address(0, "s:0", "s", "train"), [Mark(b"abc", b"")])


def test_an_example_takes_few_bytes():
    """14 bands of 24 bytes, 4 for each of 96 shingles, its address."""
    rng, stage = np.random.default_rng(0), NearDuplicates("both", 0.8)
    with Buckets() as buckets:
        for number in range(50):
            said = " ".join(f"w{word}" for word in rng.integers(0, 1 << 30, 99))
            buckets.add(
                Address(number, f"data/rows.jsonl:{number}", "rows", "train"), stage.marks(example(number, said))
            )
        assert 700 < buckets.num_bytes / 50 < 14 * 24 + 4 * 97 + 8 + 60
