"""A cache is whole or absent, the same from any number of processes, and private."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from itjax.base.records import Conversation, Message
from itjax.data import cache
from itjax.data.cache import EncodedSource, default_dir, encode_source
from itjax.data.encode import Encoding, encode
from itjax.data.sources import FileSource
from itjax.text.tokenizer import SentencePiece, train

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
MODEL = train([" ".join(WORDS)] * 9, size=300, controls=())


def encoding(**changes):
    settings = {"format": "plain", "length": 40, "truncation": "drop", "prompt_weight": 0.0}
    return Encoding(SentencePiece(MODEL), **settings | changes)


@pytest.fixture
def source(tmp_path):
    """Ten rows; row 3 is too long."""
    return make_source(tmp_path, count=10)


def make_source(folder, *, count):
    rows = [{"prompt": " ".join(WORDS[: 1 + i % 3]), "completion": WORDS[i % 7]} for i in range(count)]
    rows[3]["completion"] = "x" * 100
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource([path], "rows")


def build(source, folder, *, workers=1, progress=None, **changes):
    return encode_source(source, encoding(**changes), cache_dir=folder, workers=workers, progress=progress)


def test_examples_come_back_as_they_were_encoded(source, tmp_path):
    encoded = build(source, tmp_path / "cache")
    kept = [i for i in range(10) if i != 3]
    assert len(encoded) == 9
    for number, row in enumerate(kept):
        expected, _ = encode(source.conversation(row), encoding())
        example = encoded.example(number)
        assert example.tokens_T.tolist() == expected.tokens_T.tolist()
        assert example.targets_T.tolist() == expected.targets_T.tolist()
        assert example.weights_T.tolist() == expected.weights_T.tolist()
        assert encoded.address(number) == f"{tmp_path}/rows.jsonl:{row + 1}"
        assert encoded.template(number) == "prompt"
        assert encoded.lengths[number] == len(expected.tokens_T)
        assert encoded.weight_sums[number] == expected.weights_T.sum()
        assert encoded.num_trained[number] == np.count_nonzero(expected.weights_T)
    assert encoded.rows.tolist() == kept
    assert encoded.offsets.tolist() == [0, *np.cumsum(encoded.lengths + 1)]
    assert (len(encoded.tokens), len(encoded.weights)) == (encoded.offsets[-1],) * 2
    assert encoded.edition_ends.tolist() == [9]
    assert encoded.report == {
        "rows": 10,
        "editions": 1,
        "kept": 9,
        "dropped": {"too long": 1},
        "truncated": 0,
        "tokens": int(encoded.lengths.sum()),
        "trained_tokens": int(encoded.num_trained.sum()),
    }


class Editions:
    """Rows in three editions; the second row of the second edition and all of the third are too long."""

    name, editions = "editions", 3
    texts = ("one", "two", "one", "x" * 99, "x" * 99, "x" * 99)

    def __len__(self):
        return len(self.texts)

    def conversation(self, index):
        return Conversation(
            (Message("user", "one"), Message("assistant", self.texts[index])), self.name, f"k:{index % 2}"
        )

    def fingerprint(self):
        return "editions"


def test_the_ends_of_editions_count_the_examples_that_were_kept(tmp_path):
    encoded = build(Editions(), tmp_path / "cache")
    assert encoded.rows.tolist() == [0, 1, 2]
    assert encoded.edition_ends.tolist() == [2, 3, 3]
    assert encoded.edition_ends.dtype == np.int64
    assert EncodedSource(encoded.path).edition_ends.tolist() == [2, 3, 3]
    report = encoded.report
    assert (report["rows"], report["editions"], report["kept"], report["dropped"]) == (2, 3, 3, {"too long": 3})


def test_ends_of_editions_that_do_not_fit_the_rows_are_damage(tmp_path):
    encoded = build(Editions(), tmp_path / "cache")
    summary = json.loads((encoded.path / "summary.json").read_text())
    (encoded.path / "summary.json").write_text(json.dumps(summary | {"edition_ends": [1, 3, 3]}))
    with pytest.raises(ValueError, match="edition_ends"):
        EncodedSource(encoded.path).check()


def test_what_was_cut_is_counted(source, tmp_path):
    report = build(source, tmp_path / "cache", truncation="keep_start").report
    assert (report["kept"], report["truncated"], report["dropped"]) == (10, 1, {})


def test_a_second_time_nothing_is_encoded(source, tmp_path, monkeypatch):
    first = build(source, tmp_path / "cache")
    monkeypatch.setattr(cache, "encode_rows", lambda *_: pytest.fail("encoded again"))
    assert build(source, tmp_path / "cache").fingerprint == first.fingerprint


def test_anything_that_shapes_tokens_makes_another_cache(source, tmp_path):
    marks = {build(source, tmp_path / "cache", length=length).fingerprint for length in (39, 40)}
    with Path(tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one", "completion": "two"}\n')
    marks.add(build(FileSource([tmp_path / "rows.jsonl"], "rows"), tmp_path / "cache").fingerprint)
    assert len(marks) == 3


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 0)
    source = make_source(tmp_path, count=3 * cache.CHUNK + 5)
    seen = []
    one = build(source, tmp_path / "a")
    two = build(source, tmp_path / "b", workers=2, progress=lambda done, total: seen.append((done, total)))
    for name in (*cache.COLUMNS, cache.SUMMARY):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    assert seen == [(256, 773), (512, 773), (768, 773), (773, 773)]


def test_a_wrong_row_is_named_from_a_process_too(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 0)
    make_source(tmp_path, count=700)
    with Path(tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one"}\n')
    source = FileSource([tmp_path / "rows.jsonl"], "rows")
    with pytest.raises(ValueError, match=r"rows.jsonl:701: keys \['prompt'\] are none of the known shapes"):
        build(source, tmp_path / "cache", workers=2)
    assert os.listdir(tmp_path / "cache") == []


MAIN = """
import sys
import time
from pathlib import Path

from itjax.data import cache
from itjax.data.sources import FileSource
from tests.data.test_cache import encoding

print("main module runs as", __name__, flush=True)
folder, pause = Path(sys.argv[1]), float(sys.argv[2])


def slowly(done, total):
    print(done, flush=True)
    time.sleep(pause)


if __name__ == "__main__":
    cache.SMALL = 0
    rows = FileSource([folder / "rows.jsonl"], "rows")
    cache.encode_source(rows, encoding(), cache_dir=folder / "cache", workers=2, progress=slowly)
"""


def start(folder, *, pause):
    """A script that encodes with two processes and rests after each chunk."""
    (folder / "main.py").write_text(MAIN)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(folder / "main.py"), str(folder), str(pause)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE)


def test_processes_do_not_run_the_main_module_again(tmp_path):
    """It is a command that imports jax, and they must start fast and never touch a device."""
    make_source(tmp_path, count=300)
    said, _ = start(tmp_path, pause=0).communicate()
    assert said.splitlines() == [b"main module runs as __main__", b"256", b"300"]


def test_a_build_that_is_killed_leaves_no_half_cache(tmp_path):
    source = make_source(tmp_path, count=1000)
    process = start(tmp_path, pause=30)
    assert [process.stdout.readline() for _ in range(2)][1] == b"256\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = os.listdir(tmp_path / "cache")
    assert left.startswith(".building")
    assert len(build(source, tmp_path / "cache")) == 999
    (place,) = os.listdir(tmp_path / "cache")  # and what the killed one left is gone
    assert place.startswith("rows-")


def test_losing_a_race_is_fine(source, tmp_path, monkeypatch):
    def overtaken(*arguments, **keywords):
        monkeypatch.undo()
        build(source, tmp_path / "cache")  # another process is faster
        return original(*arguments, **keywords)

    original = cache._write_columns
    monkeypatch.setattr(cache, "_write_columns", overtaken)
    assert len(build(source, tmp_path / "cache")) == 9
    assert len(os.listdir(tmp_path / "cache")) == 1


@pytest.mark.parametrize("column", [name for name in cache.COLUMNS])
def test_one_changed_byte_anywhere_is_found(source, tmp_path, column):
    path = build(source, tmp_path / "cache").path / column
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"the cache is damaged .*{column}.*; delete this folder and run again"):
        build(source, tmp_path / "cache")


def test_a_shortened_or_missing_file_is_found(source, tmp_path):
    folder = build(source, tmp_path / "cache").path
    (folder / "tokens").write_bytes((folder / "tokens").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"damaged \(tokens has \d+ bytes instead of"):
        build(source, tmp_path / "cache")
    (folder / cache.SUMMARY).unlink()
    with pytest.raises(ValueError, match=r"damaged \(summary.json cannot be read"):
        build(source, tmp_path / "cache")


def test_an_id_outside_the_vocabulary_is_found(source, tmp_path):
    path = build(source, tmp_path / "cache").path
    summary = json.loads((path / cache.SUMMARY).read_text())
    (path / cache.SUMMARY).write_text(json.dumps(summary | {"vocabulary": 50}))
    with pytest.raises(ValueError, match=r"ids \d+ to \d+, but the vocabulary has 50"):
        build(source, tmp_path / "cache")


def test_pickles_as_the_path(source, tmp_path):
    encoded = build(source, tmp_path / "cache")
    raw = pickle.dumps(encoded)
    assert len(raw) < 500
    assert pickle.loads(raw).example(0).tokens_T.tolist() == encoded.example(0).tokens_T.tolist()


def test_a_source_whose_rows_are_all_dropped_is_empty(source, tmp_path):
    encoded = build(source, tmp_path / "cache", length=2)
    assert len(encoded) == 0
    assert encoded.report["dropped"] == {"too long": 10}
    assert encoded.offsets.tolist() == [0]


def test_only_the_user_can_read_the_cache(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_dir() == tmp_path / "home" / "itjax"
    encoded = build(source, default_dir())
    assert isinstance(encoded, EncodedSource)
    modes = {path.stat().st_mode & 0o777 for path in (default_dir(), encoded.path)}
    assert modes == {0o700}
    assert {path.stat().st_mode & 0o777 for path in encoded.path.iterdir()} == {0o600}
