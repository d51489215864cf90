"""Files as people have them: every shape becomes the same conversation, every wrong row is named by path and line."""

import base64
import gzip
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Message
from itjax.data import sources
from itjax.data.sources import FileSource, Subset, hold_out, open_files, parse

ROW = {"prompt": "2 + 2?", "completion": "4"}
ANSWERED = (Message("user", "2 + 2?"), Message("assistant", "4"))


def write(path, *rows, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + ending.encode() for row in rows)
    )
    return path


def only(path):
    (source,) = open_files(str(path))
    return source


def complaint(path):
    """What reading every row of the file says."""
    with pytest.raises(ValueError, match=r".+") as error:
        read_all(path)
    return str(error.value).removeprefix(f"{path}:")


def read_all(path):
    source = only(path)
    return [source.conversation(index) for index in range(len(source))]


@pytest.mark.parametrize(
    ("row", "template", "messages"),
    [
        (ROW, "prompt", ANSWERED),
        ({"instruction": "2 + 2?", "output": "4"}, "instruction", ANSWERED),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.", "history": [["a", "b"]]},
            "instruction",
            (
                Message("system", "Be brief."),
                Message("user", "a"),
                Message("assistant", "b"),
                Message("user", "Add.\n\n2, 2"),
                Message("assistant", "4"),
            ),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "2 + 2?", "learn": 0.5},
                    {"role": "assistant", "content": "4", "learn": False},
                ]
            },
            "messages",
            (Message("user", "2 + 2?", learn=0.5), Message("assistant", "4", learn=False)),
        ),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
            ANSWERED,
        ),
    ],
)
def test_every_shape_is_recognised_by_looking(tmp_path, row, template, messages):
    path = write(tmp_path / "rows.jsonl", row)
    conversation = only(path).conversation(0)
    assert conversation.messages == messages
    assert (conversation.source, conversation.key, conversation.template) == ("rows", f"{path}:1", template)


def test_a_json_array_gives_rows_with_their_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"prompt": "é\u2028", "completion": "4"},\n\n  {"prompt": "b",\n "completion": "5"}\n]\n')
    source = only(path)
    assert [source.conversation(i).messages[0].content for i in range(2)] == ["é\u2028", "b"]
    assert [source.conversation(i).key for i in range(2)] == [f"{path}:2", f"{path}:4"]


def test_one_row_in_one_json_file_is_a_row(tmp_path):
    assert len(only(write(tmp_path / "row.json", ROW))) == 1


TASK = {"type": "task", "task": "task1_sum", "definition": ["Add the numbers"], "category": ["Mathematics"]}
ASKED = "Definition: Add the numbers.\n\nNow complete the following example -\nInput: 2, 2.\nOutput: "


def test_natural_instructions_lines_are_asked_in_the_benchmark_s_words(tmp_path):
    path = write(
        tmp_path / "t.jsonl", TASK, {"type": "instance", "id": "i7", "input": "2, 2 ", "output": ["4", "four"]}
    )
    conversation = only(path).conversation(0)
    assert conversation.messages == (Message("user", ASKED), Message("assistant", "4"))
    assert conversation.key == f"{path}:2"
    assert conversation.template == "natural_instructions/definition"
    assert conversation.tags == {
        "task": "task1_sum",
        "category": "Mathematics",
        "id": "i7",
        "references": '["4", "four"]',
    }


def test_a_natural_instructions_task_in_one_json_object_is_the_same(tmp_path):
    path = tmp_path / "task1_sum.json"
    document = {
        "Definition": "Add the numbers",
        "Categories": ["Mathematics"],
        "Positive Examples": [],
        "Instances": [{"id": "i7", "input": "2, 2", "output": ["4", "four"]}, {"input": "1!", "output": "1"}],
        "License": ["MIT"],
    }
    for indent in (None, 4):
        path.write_text(json.dumps(document, indent=indent))
        first, second = (only(path).conversation(i) for i in range(2))
        assert first.messages == (Message("user", ASKED), Message("assistant", "4"))
        assert first.tags["task"] == "task1_sum"
        assert "Input: 1!\n" in second.messages[0].content


@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=8), ending=st.sampled_from(["\n", "\r\n", "\n\n"]))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_lines_arrays_and_packing(tmp_path_factory, contents, ending):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": text, "completion": text} for text in contents]
    lines = ending.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for source in open_files(str(folder)):
        again = pickle.loads(pickle.dumps(source))
        read = [again.conversation(i).messages[1].content for i in reversed(range(len(again)))]
        assert read == contents[::-1]


NESTED = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"prompt": "a", "comple', "not JSON: Unterminated string"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12 of the row"),
        (b'{"prompt": "a\0b", "completion": ""}', "not JSON: Invalid control character"),
        (b'{"prompt": "a", "completion": NaN}', "not JSON: NaN is not a number"),
        (b'{"prompt": "a", "completion": -Infinity}', "not JSON: -Infinity is not a number"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' stands twice"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "completion holds a lone surrogate"),
        (b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (NESTED, "nested too deeply"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data at character 17"),
        (b"[1]", "the row is a list, not an object"),
        (b"null", "the row is null, not an object"),
        ({"prompt": 3, "completion": "4"}, "prompt is a number, not a text"),
        ({"prompt": None, "completion": "4"}, "prompt is null, not a text"),
        ({"question": "a", "answer": "b"}, "keys ['answer', 'question'] are none of the known shapes"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is a text, not a list of turns"),
        ({"messages": [{"role": "user", "content": "a"}]}, "there is no assistant turn"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1: role 'usr' is unknown"),
        ({"messages": [{"role": "user"}]}, "message 1: content is missing"),
        ({"messages": [{"role": "user", "content": "a", "learn": -1}]}, "message 1: learn is -1"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "turn 1: from 'bot' is unknown"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is not a list of [question, answer]"),
    ],
)
def test_a_wrong_row_is_named_by_path_line_and_reason(tmp_path, row, reason):
    path = write(tmp_path / "rows.jsonl", ROW, b"", row)
    assert complaint(path).startswith(f"3: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"prompt": "a", "completion": "b"},\n {"prompt": NaN}]', "2: not JSON: NaN is not a number"),
        ('[{"prompt": "a", "completion": "b"}\n', "2: not JSON: ',' expected"),
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": 1, "completion": "b"}]', "3: prompt is a number"),
        ('[\n{"a": ' + "[" * 100_000, "2: nested too deeply"),
        ('[] {"a": 1}', "1: not JSON: more text after the end"),
        ('{\n"a": 1}', "1: one object with keys ['a'] is not a list of rows"),
        ('{\n"Instances": [{"input": "a", "output": "b"}]}', "2: the task has no definition"),
        ('{\n"Definition": ["a"], "Instances": [{"input": "a", "output": []}]}', "2: output is not a text or a list"),
    ],
)
def test_a_wrong_document_is_named_by_path_line_and_reason(tmp_path, text, reason):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert complaint(path).startswith(reason)


def test_files_that_hold_no_rows_are_named(tmp_path):
    assert "the file is empty" in complaint(write(tmp_path / "a.jsonl"))
    assert "the file is empty" in complaint(write(tmp_path / "b.jsonl", b"", b""))
    assert "there are no rows" in complaint(write(tmp_path / "c.jsonl", TASK))
    assert "there are no rows" in complaint(write(tmp_path / "d.json", b"[]"))
    assert "UTF-16" in complaint(write(tmp_path / "e.jsonl", '{"a": 1}'.encode("utf-16")))
    assert "not a whole gzip file" in complaint(write(tmp_path / "f.jsonl.gz", ROW))
    assert "not a whole gzip file" in complaint(write(tmp_path / "g.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]))
    assert "nothing matches" in complaint(tmp_path / "h*.jsonl")
    with pytest.raises(ValueError, match="names no file"):
        open_files(" , ")
    os.mkfifo(tmp_path / "i.jsonl")
    assert "not a regular file" in complaint(tmp_path / "i.jsonl")


def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_ROW", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (4 << 20)))
    assert "unpacks to over 200 times its size" in complaint(path)


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_ROW", 1 << 20)
    path = write(tmp_path / "long.jsonl", ROW, b'"' + b"a" * (1 << 20))
    assert complaint(path).startswith("2: the row is longer than 1 MiB")


def test_shards_are_one_source_and_equal_names_are_told_apart(tmp_path):
    for shard in (1, 0):
        write(tmp_path / "x" / f"math-0000{shard}-of-00002.jsonl", {"prompt": str(shard), "completion": "a"})
    write(tmp_path / "x" / "chat.jsonl.gz", gzip.compress(json.dumps(ROW).encode()), ending="")
    write(tmp_path / "y" / "chat.jsonl", ROW)
    (tmp_path / "x" / "README.md").write_text("not rows")
    found = {source.name: source for source in open_files(f"{tmp_path}/x, {tmp_path}/y/*.jsonl,{tmp_path}/y")}
    assert sorted(found) == ["x-chat", "x-math", "y-chat"]
    assert [found["x-math"].conversation(i).messages[0].content for i in range(2)] == ["0", "1"]


def test_the_fingerprint_follows_content_and_not_the_folder(tmp_path):
    here, there = write(tmp_path / "a" / "rows.jsonl", ROW), write(tmp_path / "b" / "rows.jsonl", ROW)
    changed = write(tmp_path / "c" / "rows.jsonl", ROW | {"completion": "5"})
    marks = [FileSource([path], "rows").fingerprint() for path in (here, there, changed)]
    assert marks[0] == marks[1] != marks[2]


class Numbers:
    name = "numbers"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def conversation(self, index):
        return index

    def fingerprint(self):
        return str(self.count)


def rows_of(source):
    return [source.conversation(i) for i in range(len(source))]


def test_held_out_rows_are_few_seeded_and_never_trained_on():
    train, held = hold_out(Numbers(100), examples=8, fraction=0.2, seed=0)
    assert len(held) == 8
    assert sorted(rows_of(train) + rows_of(held)) == list(range(100))
    assert rows_of(held) == rows_of(hold_out(Numbers(100), examples=8, fraction=0.2, seed=0)[1])
    assert rows_of(held) != rows_of(hold_out(Numbers(100), examples=8, fraction=0.2, seed=1)[1])
    assert len(hold_out(Numbers(10), examples=8, fraction=0.2, seed=0)[1]) == 2
    assert len(hold_out(Numbers(3), examples=8, fraction=0.2, seed=0)[1]) == 0
    assert rows_of(held) == [16, 19, 25, 39, 49, 79, 85, 88]  # the same on every machine and numpy


def test_a_subset_has_its_own_fingerprint():
    marks = {Subset(Numbers(9), indices).fingerprint() for indices in ([1, 2], [2, 1], np.arange(3))}
    assert len(marks) == 3


def test_the_real_tasks_read_without_a_complaint(shared_data):
    found = open_files(f"{shared_data}/natural_instructions/train/*.jsonl")
    assert (len(found), sum(map(len, found))) == (60, 15_104)
    assert all(source.conversation(len(source) - 1).tags["references"] for source in found)


def test_json_values_are_judged_as_the_json_test_suite_says(shared_data):
    lines = (shared_data / "json_test_suite" / "parsing_part1.jsonl").read_text().splitlines()
    cases = [case for case in map(json.loads, lines) if case["expect"] != "either"]
    assert len(cases) == 153
    wrong = {
        case["name"] for case in cases if accepts(base64.b64decode(case["base64"])) != (case["expect"] == "accept")
    }
    assert wrong == {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}  # refused on purpose


def accepts(raw):
    try:
        parse(raw)
    except ValueError:
        return False
    return True
