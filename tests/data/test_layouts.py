"""Rows are found in files of every kind, recognised by looking, each with an address that a person can go to."""

import csv
import gzip
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.data import layouts, strict_json
from itjax.data.sources import open_files

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8) | st.sampled_from(
    ['"', '""', ",", "\t", "a\nb", "\u2028", "é" * 20, "", " "]
)


def open_one(path, **settings):
    (source,) = open_files(str(path), **settings)
    return source


def rows(path, **settings):
    source = open_one(path, **settings)
    return [source.row(number) for number in range(len(source))]


def lines(path, **settings):
    """The addresses of all rows, without the path."""
    source = open_one(path, **settings)
    return [source.key(number).removeprefix(f"{path}:") for number in range(len(source))]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


# ---------------------------------------------------------------------------------------------- the same rows everywhere


@pytest.mark.parametrize("block", [3, 16, 1 << 20])
@given(texts=st.lists(TEXT, min_size=1, max_size=6), ending=st.sampled_from(["\n", "\r\n", "\n \n"]))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_every_layout(tmp_path_factory, block, texts, ending):
    folder = tmp_path_factory.mktemp("rows")
    expected = [{"prompt": text, "completion": text[::-1]} for text in texts]
    text = ending.join(json.dumps(row, ensure_ascii=False) for row in expected)
    write(folder / "a.jsonl", text)
    write(folder / "b.jsonl", b"\xef\xbb\xbf" + text.encode())
    write(folder / "c.json", json.dumps(expected, ensure_ascii=False, indent=1))
    for name, delimiter in (("d.csv", ","), ("e.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(expected)
    pq.write_table(pa.Table.from_pylist(expected), folder / "f.parquet")
    write_records(folder / "g.array_record", [json.dumps(row).encode() for row in expected])
    write(folder / "h.csv.gz", gzip.compress((folder / "d.csv").read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "BLOCK", max(block, 16))  # what is looked at first is a block as well
        patch.setattr(strict_json, "BLOCK", block)
        patch.setattr(layouts, "HEAD", 1 << 20)
        for path in sorted(folder.iterdir()):
            source = open_one(path, cache_dir=folder / "kept")
            assert [dict(source.row(number)) for number in range(len(source))] == expected, path.name
            assert source.rows(range(len(source))[::-1]) == expected[::-1]


# ---------------------------------------------------------------------------------------------- lines and documents


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\r\n  \n\n{"a": "\u2028"}\n{"a": 3}')
    assert lines(path) == ["2", "5", "6"]


def test_a_json_array_gives_rows_with_their_lines(tmp_path):
    path = write(tmp_path / "a.json", '\n[\n  {"a": "é\u2028"},\n\n  {"a": "b",\n "c": "]"}\n]\n')
    assert lines(path) == ["3", "5"]


def test_lines_whatever_the_ending(tmp_path):
    assert rows(write(tmp_path / "a.txt", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write(tmp_path / "a.csv", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write(tmp_path / "a.jsonl", '[\n{"a": 1},\n{"a": 2}\n]')) == [{"a": 1}, {"a": 2}]


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


# ---------------------------------------------------------------------------------------------- tables of text


def test_a_cell_over_several_lines_keeps_the_addresses_right(tmp_path):
    path = write(tmp_path / "a.csv", 'name,text\na,"one\ntwo, ""three"""\n\nb,four\r\nc,"\n"\nd,')
    assert rows(path) == [
        {"name": "a", "text": 'one\ntwo, "three"'},
        {"name": "b", "text": "four"},
        {"name": "c", "text": "\n"},
        {"name": "d", "text": ""},
    ]
    assert lines(path) == ["2", "5", "6", "8"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prompt,completion\nhi,ho\n", ["prompt", "completion"]),  # known names
        ("id;Frage\n1;Wie geht es dir heute? Und was machst du morgen so alles?\n", ["id", "Frage"]),
        ("word,count\ncat,3\ndog,5\n", ["word", "count"]),  # numbers below a name
        (",tweet\n0,Hello you all. I am here now; at last.\n", ["0", "tweet"]),  # an index without a name
        ("What is it?\t72\tIt is 72.\nAnd now?\t3\tIt is 3.\n", ["0", "1", "2"]),
        ("cat\tchat\ndog\tchien\n", ["0", "1"]),  # words are no header of words
        ("cat,cat\n3,4\n", ["0", "1"]),
    ],
)
def test_a_header_is_recognised_by_looking(tmp_path, text, names):
    path = write(tmp_path / ("a.tsv" if "\t" in text else "a.csv"), text)
    assert list(rows(path)[0]) == names
    assert open_one(path).notes() == [
        f"{path}: columns have no names but numbers: {', '.join(names)}"
        if names == [str(n) for n in range(len(names))]
        else f"{path}: the first line names the columns: {', '.join(names)}"
    ]


def test_columns_that_are_asked_for_make_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "english,french\ncat,chat\n")
    assert rows(path)[0] == {"0": "english", "1": "french"}
    source = open_one(path, columns={"prompt": "english", "completion": "french"})
    assert [len(source), source.conversation(0).messages[0].content] == [1, "cat"]


def test_columns_of_a_table_go_by_position_too(tmp_path):
    path = write(tmp_path / "a.tsv", "2 + 2?\t(B)\t4\n3 + 3?\t(A)\t6\n")
    source = open_one(path, columns={"prompt": "0", "completion": "2"})
    assert [message.content for message in source.conversation(1).messages] == ["3 + 3?", "6"]
    assert source.row(1) == {"0": "3 + 3?", "1": "(A)", "2": "6", "prompt": "3 + 3?", "completion": "6"}


def test_quotes_between_tabs_are_quotes_only_where_cells_are_quoted(tmp_path):
    literal = write(tmp_path / "a.tsv", '"Hi" she said\t1.\n5" nails\t"yes"\n')
    assert [row["0"] for row in rows(literal)] == ['"Hi" she said', '5" nails']
    quoted = write(tmp_path / "b.tsv", 'x 1.\t"a\tb"\n"c\nd"\te 2.\n')
    assert rows(quoted) == [{"0": "x 1.", "1": "a\tb"}, {"0": "c\nd", "1": "e 2."}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_recognised_whatever_the_ending(tmp_path, delimiter):
    text = f"prompt{delimiter}completion\na b{delimiter}c\nd{delimiter}e f\n"
    assert rows(write(tmp_path / "a.txt", text)) == [
        {"prompt": "a b", "completion": "c"},
        {"prompt": "d", "completion": "e f"},
    ]


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two columns are named 'prompt'"):
        open_one(write(tmp_path / "a.csv", "prompt,completion,prompt \n1,2,3\n"), columns={"prompt": "prompt"})


# ---------------------------------------------------------------------------------------------- Parquet, ArrayRecord


def test_parquet_rows_are_addressed_by_number_whatever_the_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "ARROW_BATCH", 4)
    expected = [{"prompt": f"q{n}", "completion": f"a{n}", "kind": "xy"[n % 2]} for n in range(23)]
    table = pa.Table.from_pylist(expected)
    table = table.set_column(2, "kind", table["kind"].dictionary_encode())
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=5, compression="zstd")
    assert rows(path) == expected
    assert lines(path) == [str(n) for n in range(1, 24)]
    assert [c.messages[0].content for c in open_one(path).conversations([22, 0, 7])] == ["q22", "q0", "q7"]


def test_long_rows_of_parquet_come_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "ARROW_BYTES", 10_000)
    expected = [{"prompt": "".join(chr(97 + (n * k) % 26) for k in range(3000)), "completion": ""} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(expected), tmp_path / "a.parquet", use_dictionary=False)
    source = open_one(tmp_path / "a.parquet")
    assert source.rows(range(9)) == expected
    assert source._files[0].layout.facts["batch"] in (2, 3)


def test_parquet_holds_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "ho"}]}
    path = tmp_path / "a.bin"  # known by its first bytes
    pq.write_table(pa.Table.from_pylist([row, row]), path)
    assert [message.content for message in open_one(path).conversation(1).messages] == ["hi", "ho"]


def test_array_records_are_json(tmp_path):
    path = write_records(tmp_path / "a", [b'{"prompt": "a", "completion": "b"}', b'{"prompt": "\xff"}'])
    source = open_one(path)
    assert source.conversation(0).messages[1].content == "b"
    assert source.key(0) == f"{path}:1"
    with pytest.raises(ValueError, match=f"{path}:2: not UTF-8 at byte 12 of the record"):
        source.conversation(1)


@pytest.mark.parametrize("name", ["a.parquet", "a.array_record"])
@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_tables_that_change_while_in_use_are_named(tmp_path, name, change):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}]), path)
    else:
        write_records(path, [b'{"prompt": "a", "completion": "b"}'])
    source = open_one(path)
    source.conversation(0)
    os.truncate(path, 9) if change == "shorter" else path.unlink()
    for read in (lambda: source.conversation(0), lambda: source.conversations([0])):
        with pytest.raises(ValueError, match=rf"^{path}: (the file changed|no such file)"):
            read()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PAR1" + bytes(40), "not a whole Parquet file"),
        (layouts.ARROW_RECORDS + bytes(100), "(not a whole|or not a whole one)"),
        (b"just words\nand more\n", "neither JSON, CSV, TSV, Parquet nor ArrayRecord"),
        (bytes(range(256)), "neither JSON, CSV, TSV, Parquet nor ArrayRecord"),
    ],
)
def test_what_is_not_whole_or_not_known_is_refused(tmp_path, content, reason):
    path = write(tmp_path / "a", content)
    with pytest.raises(ValueError, match=f"^{path}:.*{reason}"):
        open_one(path)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": "a" * 50, "completion": "b"}] * 100), tmp_path / "a")
    path = write(tmp_path / "b", (tmp_path / "a").read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path}: not a whole Parquet file"):
        open_one(path)


# ---------------------------------------------------------------------------------------------- reading many


def test_rows_that_stand_together_are_read_together(tmp_path, monkeypatch):
    path = write(
        tmp_path / "a.jsonl", "".join(json.dumps({"prompt": str(n), "completion": ""}) + "\n" for n in range(500))
    )
    source = open_one(path)
    reads = []
    read = layouts.Bytes.read
    monkeypatch.setattr(layouts.Bytes, "read", lambda self, start, size: reads.append(size) or read(self, start, size))
    order = np.random.default_rng(0).permutation(500)
    assert [c.messages[0].content for c in source.conversations(order)] == [str(n) for n in order]
    assert len(reads) == 1


def test_a_csv_reader_agrees(tmp_path):
    """The addresses and cells are those of Python's own reader of the whole file."""
    random = np.random.default_rng(0)
    cells = ["".join(random.choice(list('ab",\n'), 6)) for _ in range(300)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["prompt", "completion"], *zip(cells[::2], cells[1::2], strict=True)])
    path = write(tmp_path / "a.csv", buffer.getvalue())
    reader = csv.reader(io.StringIO(buffer.getvalue(), newline=""))
    ends = [reader.line_num for _ in reader]
    assert lines(path) == [str(end + 1) for end in ends[:-1]]
    assert [list(row.values()) for row in rows(path)] == [
        list(pair) for pair in zip(cells[::2], cells[1::2], strict=True)
    ]
