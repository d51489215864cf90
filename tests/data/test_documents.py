"""Rows of JSON have the lines that an editor shows."""

import json

from tests.data.reading import lines, open_one, rows, write


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\r\n  \n\n{"a": "\u2028"}\n{"a": 3}')
    assert lines(path) == ["2", "5", "6"]


def test_a_json_array_gives_rows_with_their_lines(tmp_path):
    path = write(tmp_path / "a.json", '\n[\n  {"a": "é\u2028"},\n\n  {"a": "b",\n "c": "]"}\n]\n')
    assert lines(path) == ["3", "5"]


TASK = {"type": "task", "task": "t1", "definition": ["Add"], "positive_examples": [{"input": "1", "output": "1"}]}
INSTANCES = [{"id": "i7", "input": "2, 2", "output": ["4", "four"]}, {"input": "1!", "output": "1"}]


def test_natural_instructions_come_as_lines_and_as_one_object(tmp_path):
    document = {"Definition": ["Add"], "Positive Examples": TASK["positive_examples"], "Instances": INSTANCES, "X": 1}
    files = [
        write(tmp_path / "t1.jsonl", "".join(json.dumps(row) + "\n" for row in [TASK, *INSTANCES])),
        write(tmp_path / "t1.json", json.dumps(document)),
        write(tmp_path / "t2.json", json.dumps(document, indent=2)),
    ]
    for path in files:
        first, second = rows(path)
        assert (first["definition"], first["positive_examples"]) == ("Add", TASK["positive_examples"])
        assert (first["input"], first["output"], second["input"]) == ("2, 2", ["4", "four"], "1!")
        assert open_one(path).conversation(0).messages[1].content == "4"
    assert [lines(path) for path in files] == [["2", "3"], ["1", "1"], ["12", "20"]]
