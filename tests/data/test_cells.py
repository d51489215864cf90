"""Tables of text: cells as a reader of the whole file finds them, names where the first line gives names."""

import csv
import io

import numpy as np
import pytest

from tests.data.reading import lines, open_one, rows, write


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
