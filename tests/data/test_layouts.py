"""The same rows are read from files of every kind, recognised by looking."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.data import binary, places, strict_json
from tests.data.reading import open_one, rows, write, write_records

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8) | st.sampled_from(
    ['"', '""', ",", "\t", "a\nb", "\u2028", "é" * 20, "", " "]
)


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
        patch.setattr(places, "BLOCK", block)
        patch.setattr(strict_json, "BLOCK", block)
        for path in sorted(folder.iterdir()):
            source = open_one(path, cache_dir=folder / "kept")
            assert [dict(source.row(number)) for number in range(len(source))] == expected, path.name
            assert source.rows(range(len(source))[::-1]) == expected[::-1]


def test_lines_whatever_the_ending(tmp_path):
    assert rows(write(tmp_path / "a.txt", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write(tmp_path / "a.csv", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write(tmp_path / "a.jsonl", '[\n{"a": 1},\n{"a": 2}\n]')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PAR1" + bytes(40), "not a whole Parquet file"),
        (binary.ARRAY_RECORD + bytes(100), "(not a whole|or not a whole one)"),
        (b"just words\nand more\n", "neither JSON, CSV, TSV, Parquet nor ArrayRecord"),
        (bytes(range(256)), "neither JSON, CSV, TSV, Parquet nor ArrayRecord"),
    ],
)
def test_what_is_not_whole_or_not_known_is_refused(tmp_path, content, reason):
    path = write(tmp_path / "a", content)
    with pytest.raises(ValueError, match=f"^{path}:.*{reason}"):
        open_one(path)
