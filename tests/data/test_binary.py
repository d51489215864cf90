"""Rows of Parquet and ArrayRecord by their numbers, one alone or many together."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itjax.data import binary
from tests.data.reading import lines, open_one, rows, write, write_records


def test_parquet_rows_are_addressed_by_number_whatever_the_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(binary, "ARROW_BATCH", 4)
    expected = [{"prompt": f"q{n}", "completion": f"a{n}", "kind": "xy"[n % 2]} for n in range(23)]
    table = pa.Table.from_pylist(expected)
    table = table.set_column(2, "kind", table["kind"].dictionary_encode())
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=5, compression="zstd")
    assert rows(path) == expected
    assert lines(path) == [str(n) for n in range(1, 24)]
    assert [c.messages[0].content for c in open_one(path).conversations([22, 0, 7])] == ["q22", "q0", "q7"]


def test_long_rows_of_parquet_come_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(binary, "ARROW_BYTES", 10_000)
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


def test_a_truncated_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": "a" * 50, "completion": "b"}] * 100), tmp_path / "a")
    path = write(tmp_path / "b", (tmp_path / "a").read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path}: not a whole Parquet file"):
        open_one(path)
