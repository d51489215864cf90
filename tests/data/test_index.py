"""Rows of a large file are found once; the index is never older than the file and travels as a path."""

import gzip
import json
import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itjax.data import files, index
from itjax.data.sources import open_files


def only(path, **settings):
    (source,) = open_files(str(path), **settings)
    return source


def numbered(path, count):
    path.write_text("".join(json.dumps({"prompt": str(n), "completion": "a"}) + "\n" for n in range(count)))
    return path


def asked(source):
    return [source.conversation(number).messages[0].content for number in range(len(source))]


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_a_source_reads_the_same_wherever_it_is_unpickled(tmp_path, monkeypatch, small):
    monkeypatch.setattr(index, "SMALL", small)
    path = numbered(tmp_path / "a.jsonl", 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        source = only(tmp_path / name)
        pickled = pickle.dumps(source)
        again = pickle.loads(pickled)
        assert asked(again) == [str(n) for n in range(1000)]
        assert again.fingerprint() == source.fingerprint()
        assert len(pickled) < 2000 or (name, small) == ("a.jsonl", 1 << 20)  # an index that is kept does not travel


def test_an_index_is_made_anew_when_the_file_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 0)
    path = numbered(tmp_path / "a.jsonl", 3)
    assert len(only(path)) == 3
    numbered(path, 5)
    assert asked(only(path)) == ["0", "1", "2", "3", "4"]
    kept, mark = path.stat(), only(path).fingerprint()
    content = path.read_bytes().replace(b'"4"', b'"9"')
    path.write_bytes(content)  # of the same size, and the clock set back
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert asked(only(path))[-1] == "9"
    assert only(path).fingerprint() != mark


def test_a_damaged_index_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 0)
    path = numbered(tmp_path / "a.jsonl", 3)
    only(path, cache_dir=tmp_path / "kept")
    (places,) = (tmp_path / "kept").rglob("places")
    os.truncate(places, 10)
    with pytest.raises(ValueError, match=r"the index is damaged .* delete this folder"):
        only(path, cache_dir=tmp_path / "kept")


def test_a_large_file_is_looked_through_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 10)
    path = numbered(tmp_path / "a.jsonl", 3)
    open_files(str(path))
    monkeypatch.setattr(files, "_build", None)
    assert len(open_files(str(path))[0]) == 3


def test_another_reading_of_a_file_has_an_index_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 0)
    path = tmp_path / "a.csv"
    path.write_text("english,french\ncat,chat\n")
    for _ in range(2):
        assert len(only(path)) == 2
        assert len(only(path, columns={"prompt": "english"})) == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_copy_that_was_deleted_is_told(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}]), path)
    else:
        path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}'))
    source = only(path, cache_dir=tmp_path / "kept")
    pickled = pickle.dumps(source)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(ValueError, match=rf"^{path}: .*start again"):
        source.conversation(0)
    with pytest.raises(ValueError, match=rf"^{path}: its index in .* is gone; start again"):
        pickle.loads(pickled)


def test_small_files_leave_nothing_behind(tmp_path):
    only(numbered(tmp_path / "a.jsonl", 3), cache_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
