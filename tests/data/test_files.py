"""Files are found by patterns, near and far; what is packed or far is copied once, privately, and never grows without bound."""

import gzip
import json
import os
import socket
import stat
import sys
import threading

import fsspec
import pytest
import zstandard

from itjax.base.files import BUILDING
from itjax.data import files
from itjax.data.files import Bytes, find
from itjax.data.sources import open_files

ROW = {"prompt": "2 + 2?", "completion": "4"}
LINE = json.dumps(ROW).encode() + b"\n"


def write(path, content=LINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zstd(content):
    return zstandard.ZstdCompressor().compress(content)


@pytest.fixture
def memory():
    """A store that is reached by an address only."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


# ---------------------------------------------------------------------------------------------- which files


def test_patterns_name_files_folders_and_globs(tmp_path):
    for name in ("x/a.jsonl", "x/deep/b.csv.gz", "x/c.parquet", "x/README.md", "x/.git/d.jsonl", "y/e.tsv"):
        write(tmp_path / name)
    found = find(f"{tmp_path}/x, {tmp_path}/**/*.tsv,{tmp_path}/x/a.jsonl")
    assert {name: [os.path.relpath(path, tmp_path) for path in paths] for name, paths in found.items()} == {
        "a": ["x/a.jsonl"],
        "c": ["x/c.parquet"],
        "b": ["x/deep/b.csv.gz"],
        "e": ["y/e.tsv"],
    }


def test_shards_are_one_source_and_equal_names_are_told_apart(tmp_path):
    for name in ("x/math-00001-of-00002.jsonl", "x/math-00000-of-00002.jsonl", "x/chat.jsonl.gz", "y/chat.jsonl"):
        write(tmp_path / name)
    found = find(f"{tmp_path}/x, {tmp_path}/y/*.jsonl,{tmp_path}/y")
    assert sorted(found) == ["x-chat", "x-math", "y-chat"]
    assert [path[-19:] for path in found["x-math"]] == ["-00000-of-00002.jsonl"[-19:], "-00001-of-00002.jsonl"[-19:]]


def test_files_that_differ_in_their_ending_alone_are_sources_of_their_own(tmp_path):
    for name in ("chat.csv", "chat.jsonl", "chat.jsonl.gz", "math.jsonl", "math-00000-of-00001.jsonl", "v1.2.json"):
        write(tmp_path / name)
    found = find(str(tmp_path))
    assert list(found) == ["chat.csv", "chat.jsonl", "chat.jsonl.gz", "math", "math.jsonl", "v1.2"]
    assert all(len(paths) == 1 for paths in found.values())


def test_relative_names_start_from_the_data_folder(tmp_path, memory):
    path = write(tmp_path / "a.jsonl")
    assert find("a.jsonl", data_dir=str(tmp_path)) == find(str(path)) == find(str(path), data_dir="/elsewhere")
    memory.pipe("/data/a.jsonl", LINE)
    assert find("*.jsonl", data_dir="memory://data/") == {"a": ["memory:///data/a.jsonl"]}


def test_nothing_found_is_told():
    with pytest.raises(ValueError, match="nothing matches '/no/such/"):
        find("/no/such/*.jsonl")
    with pytest.raises(ValueError, match="names no file"):
        find(" , ")


# ---------------------------------------------------------------------------------------------- far files


def test_far_files_are_found_and_read_like_near_ones(tmp_path, memory):
    memory.pipe("/b/chat/a.jsonl", LINE)
    memory.pipe("/b/chat/b.json.gz", gzip.compress(json.dumps([ROW]).encode()))
    memory.pipe("/b/chat/notes.txt", b"no rows")
    for pattern in ("memory://b/chat", "memory://b/chat/*.json*"):
        sources = open_files(pattern, cache_dir=tmp_path)
        assert [source.name for source in sources] == ["a", "b"]
        assert [source.conversation(0).messages[1].content for source in sources] == ["4", "4"]
        assert sources[0].key(0) == "memory:///b/chat/a.jsonl:1"


def test_a_far_file_is_copied_once_and_again_when_it_changed(tmp_path, memory, monkeypatch):
    fetched = []
    fetch = files.fetch
    monkeypatch.setattr(files, "fetch", lambda path, target: fetched.append(path) or fetch(path, target))
    memory.pipe("/a.jsonl", LINE)
    for _ in range(3):
        (source,) = open_files("memory://a.jsonl", cache_dir=tmp_path)
    assert len(fetched) == 1
    memory.pipe("/a.jsonl", LINE + LINE)
    (source,) = open_files("memory://a.jsonl", cache_dir=tmp_path)
    assert len(source) == 2
    assert len(fetched) == 2
    assert len([folder for folder in (tmp_path / "files").iterdir() if folder.is_dir()]) == 1  # the old copy is gone


def test_a_password_in_an_address_is_never_shown(tmp_path, memory):
    secret = "memory://me:hunter2@host/a.jsonl?id=7&X-Amz-Signature=hunter2&sig=hunter2"
    assert files.shown(secret) == "memory://...@host/a.jsonl?id=7&X-Amz-Signature=...&sig=..."
    memory.pipe("/a.jsonl?token=hunter2", b"{}\n")
    (source,) = open_files("memory:///a.jsonl?token=hunter2", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^memory:///a\.jsonl\?token=\.\.\.:1: ") as error:
        source.conversation(0)
    with pytest.raises(ValueError, match=r"nothing matches") as nothing:
        open_files("memory://no.jsonl?token=hunter2")
    kept = [path.name for path in tmp_path.rglob("*")]
    assert kept
    for text in (str(error.value), str(nothing.value), source.key(0), source.name, str(source.notes()), *kept):
        assert "hunter2" not in text


def test_a_file_address_is_a_path(tmp_path):
    path = write(tmp_path / "a.jsonl")
    (source,) = open_files(f"file://{path}")
    assert source.key(0) == f"{path}:1"


@pytest.mark.parametrize(("address", "package"), [("gs://b/a.jsonl", "gcsfs"), ("s3://b/a.jsonl", "s3fs")])
def test_a_missing_driver_names_its_package(address, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{address}: .* needs {package}; pip install {package}"):
        open_files(address)


def test_an_unknown_address_and_a_missing_file_are_told(memory):
    with pytest.raises(ValueError, match=r"^nowhere://a.jsonl: .*nowhere"):
        open_files("nowhere://a.jsonl")
    with pytest.raises(ValueError, match=r"nothing matches 'memory://no\.jsonl'"):
        open_files("memory://no.jsonl")


# ---------------------------------------------------------------------------------------------- packed files


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl"])
def test_a_packed_file_is_known_by_its_first_bytes(tmp_path, pack, name):
    path = write(tmp_path / name, pack(LINE) + pack(LINE))  # both kinds may be written in pieces
    right = {gzip.compress: ".gz", zstd: ".zst"}[pack]
    if name.endswith(("jsonl", right)):
        assert len(open_files(str(path))[0]) == 2
    else:
        with pytest.raises(ValueError, match=r"not a whole .* file"):
            open_files(str(path))


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_a_packed_file_that_is_not_whole_is_refused(tmp_path, name, pack):
    whole = pack(os.urandom(5000).hex().encode())
    for broken in (LINE, whole[:-9], whole[:20], whole + b"more"):
        path = write(tmp_path / name, broken)
        with pytest.raises(ValueError, match=f"{path}: not a whole (gzip|zstd) file"):
            open_files(str(path))


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path, name, pack):
    path = write(tmp_path / name, pack(b" " * (4 << 20)))
    with pytest.raises(ValueError, match="unpacks to over 200 times its size"):
        open_files(str(path), longest_row=1 << 20, cache_dir=tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("content"))


@pytest.mark.parametrize(("start", "name"), [(b"BZh9", "bzip2"), (b"PK\x03\x04", "zip"), (b"\xfd7zXZ\0", "xz")])
def test_other_ways_of_packing_are_named(tmp_path, start, name):
    with pytest.raises(ValueError, match=f"this is {name}; unpack it"):
        open_files(str(write(tmp_path / "a.jsonl", start + b"x" * 20)))


# ---------------------------------------------------------------------------------------------- private copies


def test_copies_are_for_nobody_else(tmp_path):
    old = os.umask(0)
    try:
        (source,) = open_files(str(write(tmp_path / "a.jsonl.gz", gzip.compress(LINE))), cache_dir=tmp_path / "kept")
    finally:
        os.umask(old)
    assert source.conversation(0).messages[1].content == "4"
    found = [tmp_path / "kept", *(tmp_path / "kept").rglob("*")]
    assert len(found) >= 6
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {0o600}


def test_who_starts_at_the_same_time_unpacks_once(tmp_path, monkeypatch):
    unpacked = []
    unpack = files.unpack
    monkeypatch.setattr(files, "unpack", lambda *a, **k: unpacked.append(a) or unpack(*a, **k))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINE * 1000))
    threads = [threading.Thread(target=open_files, args=(str(path),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(unpacked) == 1


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINE))
    with pytest.raises(ValueError, match=rf"^{path}: cannot be made .* set cache_dir or XDG_CACHE_HOME"):
        open_files(str(path), cache_dir=path)


def test_a_build_that_was_killed_is_cleared_away(tmp_path):
    left = tmp_path / "files" / f"{BUILDING}-{socket.gethostname()}-999999999-x"
    write(left / "content")
    open_files(str(write(tmp_path / "a.jsonl.gz", gzip.compress(LINE))), cache_dir=tmp_path)
    assert not left.exists()


# ---------------------------------------------------------------------------------------------- changes while in use


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_a_file_that_changes_while_in_use_is_named(tmp_path, name, change):
    content = {"a.json": b"[" + LINE + b"]", "a.csv": b"prompt,completion\na,b\n"}.get(name, LINE)
    pack = {".gz": gzip.compress, "zst": zstd}.get(name[-3:], bytes)
    path = write(tmp_path / name, pack(content))
    (source,) = open_files(str(path))
    source.conversation(0)
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, 5) if change == "shorter" else os.replace(write(tmp_path / "new", pack(content)), path)
    with pytest.raises(ValueError, match=rf"^{path}: (the file changed|no such file)") as error:
        source.conversation(0)
    assert type(error.value) is ValueError  # a bad row may be skipped, this may not


def test_few_files_are_open_at_one_time(tmp_path):
    paths = [write(tmp_path / f"{number}.jsonl", LINE * 5) for number in range(3 * files.OPEN_AT_ONCE)]
    sources = [open_files(str(path))[0] for path in paths]
    for _ in range(2):
        for source in sources:
            source.conversation(0)
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert len([name for name in opened if name.startswith(str(tmp_path))]) <= files.OPEN_AT_ONCE


def _is_open(descriptor):
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_bytes_are_read_from_any_place(tmp_path):
    path = write(tmp_path / "a", b"0123456789")
    data = Bytes(str(path), str(path), files.state(str(path)))
    assert (data.read(3, 4), data.size) == (b"3456", 10)
    with pytest.raises(ValueError, match="became shorter"):
        data.read(8, 4)
