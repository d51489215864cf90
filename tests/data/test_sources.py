"""Rows by number from any files: every wrong row is named by path and line, and real data reads as its owners describe it."""

import gzip
import json
import os
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import Message
from itjax.data import sources as module
from itjax.data.sources import BadRow, FileSource, Rows, Subset, hold_out, open_files, usable, write_bad_rows

ROW = {"prompt": "2 + 2?", "completion": "4"}
GOOD = json.dumps(ROW).encode()
ANSWERED = (Message("user", "2 + 2?"), Message("assistant", "4"))


def write(path, *rows, ending=b"\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + ending for row in rows))
    return path


def only(path, **settings):
    (source,) = open_files(str(path), **settings)
    return source


def read_all(path, **settings):
    source = only(path, **settings)
    return [source.conversation(number) for number in range(len(source))]


def numbered(path, count):
    return write(path, *({"prompt": str(n), "completion": "a"} for n in range(count)))


def asked(source):
    return [source.conversation(number).messages[0].content for number in range(len(source))]


# ---------------------------------------------------------------------------------------------- files


def test_a_row_is_a_conversation_with_its_address(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"", ROW)
    conversation = only(path).conversation(0)
    assert conversation.messages == ANSWERED
    assert (conversation.source, conversation.key, conversation.template) == ("rows", f"{path}:2", "prompt")


def test_shards_follow_each_other(tmp_path):
    for shard, count in ((1, 2), (0, 3)):
        numbered(tmp_path / f"math-0000{shard}-of-00002.jsonl", count)
    source = only(tmp_path)
    assert asked(source) == ["0", "1", "2", "0", "1"]
    assert source.key(4) == f"{tmp_path}/math-00001-of-00002.jsonl:2"
    order = [4, 0, 3, 3]
    assert source.conversations(order) == [source.conversation(number) for number in order]
    assert source.rows(order) == [source.row(number) for number in order]
    for number in (-1, 5):
        with pytest.raises(IndexError):
            source.conversation(number)


def test_rows_are_fields_for_templates(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": "4"}, [1])
    source = only(path, columns={"prompt": "question"})
    subset = Subset(source, [1, 0])
    assert isinstance(source, Rows)
    assert isinstance(subset, Rows)
    assert subset.row(1) == source.row(0) == {"question": "2 + 2?", "answer": "4", "prompt": "2 + 2?"}
    assert subset.key(1) == source.key(0) == f"{path}:1"
    assert subset.rows([1, 1]) == [source.row(0)] * 2
    assert subset.indices.tolist() == [1, 0]
    with pytest.raises(BadRow, match=f"^{path}:2: the row is a list, not an object"):
        source.row(1)


def test_a_tree_is_several_rows_of_one_line(tmp_path):
    def node(role, text, *replies):
        return {"role": role, "text": text, "replies": list(replies)}

    one = {"prompt": node("prompter", "q", node("assistant", "a"), node("assistant", "b", node("prompter", "c")))}
    none = {"prompt": node("prompter", "q")}
    path = write(tmp_path / "a.jsonl", one, none, b"{broken}", one)
    source = only(path)
    places = [source.key(number).removeprefix(str(path)) for number in range(len(source))]
    assert places == [":1#1", ":1#2", ":2", ":3", ":4#1", ":4#2"]
    assert [message.content for message in source.conversation(5).messages] == ["q", "b"]
    assert source.row(1)["messages"][1] == {"role": "assistant", "content": "b"}
    assert [bad.reason for bad in usable(source, most=1)[1]] == ["no assistant turn", "not JSON"]
    assert source.notes() == [
        f"{path}: 4 trees are 4 conversations; 3 questions at their ends have no answer and are left out"
    ]


def test_the_fingerprint_follows_content_and_reading_and_not_the_folder(tmp_path):
    here, there = write(tmp_path / "a" / "rows.jsonl", ROW), write(tmp_path / "b" / "rows.jsonl", ROW)
    changed = write(tmp_path / "c" / "rows.jsonl", ROW | {"completion": "5"})
    marks = [FileSource([path], "rows").fingerprint() for path in (here, there, changed)]
    assert marks[0] == marks[1] != marks[2]
    others = [
        FileSource([here], "rows", columns={"completion": "prompt"}),
        FileSource([here], "rows", shape="prompt"),
        FileSource([here], "other"),
    ]
    assert len({marks[0], *(other.fingerprint() for other in others)}) == 4


def test_an_unknown_shape_is_told(tmp_path):
    with pytest.raises(ValueError, match="shape 'chat' is unknown; known: auto, messages"):
        only(write(tmp_path / "a.jsonl", ROW), shape="chat")


# ---------------------------------------------------------------------------------------------- malformed files


def broken(content, message, reason=None, *, name="a.jsonl", line=2, **settings):
    """A file, what is said of it, and the reason that is counted; no reason where the file as a whole is refused."""
    label = message if isinstance(message, str) else ""
    return pytest.param(name, content, line, message, reason, settings, id=f"{name}-{label[:40]}")


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BOMB = b" " * (4 << 20)
HEADER = b"prompt,completion\n"
MALFORMED = [
    broken(GOOD + b'\n{"prompt": "a", "comple', "not JSON: Unterminated string", "not JSON"),
    broken(b'{"prompt": "a", "comple', "not JSON: Unterminated string", "not JSON", line=1),
    broken(GOOD + b'\n{"prompt": "\xff"}\n', "not UTF-8 at byte 52 of the file", "not UTF-8"),
    broken(GOOD + b'\n\xef\xbb\xbf{"prompt": "a"}', "not JSON", "not JSON"),
    broken(ROW, "this is UTF-16", line=1),
    broken(GOOD + b'\n{"prompt": "a\0b", "completion": ""}', "not JSON: Invalid control character", "not JSON"),
    broken(
        GOOD + b'\n{"prompt": "\\udc00", "completion": ""}',
        "prompt holds a lone surrogate",
        "prompt holds a lone surrogate",
    ),
    broken(GOOD + b'\n{"prompt": NaN}', "not JSON: NaN is not a number", "NaN or Infinity"),
    broken(GOOD + b'\n{"prompt": -Infinity}', "not JSON: -Infinity is not a number", "NaN or Infinity"),
    broken(GOOD + b'\n{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice", "a key stands twice"),
    broken(GOOD + b'\n{"prompt": 3, "completion": "a"}', "prompt is a number, not a text", "prompt is not a text"),
    broken(GOOD + b'\n{"prompt": null, "completion": "a"}', "prompt is null, not a text", "prompt is not a text"),
    broken(GOOD + b'\n{"prompt": "a"}', "keys ['prompt'] are none of the known shapes", "unknown shape"),
    broken(GOOD + b"\n" + DEEP, "nested too deeply", "nested too deeply"),
    broken(GOOD + b'\n{"id": ' + b"9" * 4301 + b"}", "a number has too many digits", "a number has too many digits"),
    broken(GOOD + b"\n" + GOOD + GOOD, "not JSON: Extra data at character 40", "not JSON"),
    broken(
        GOOD + b"\n" + GOOD[:-1] + b" " * 99 + b"}",
        "the row is longer than 99 bytes",
        "the row is too long",
        longest_row=99,
    ),
    broken(b"", "the file is empty", line=None),
    broken(b"\r\n\n \n", "the file is empty", line=None),
    broken(b"[]", "there are no rows", line=None),
    broken(GOOD, "not a whole gzip file", name="a.jsonl.gz", line=None),
    broken(gzip.compress(GOOD)[:-9], "not a whole gzip file", name="a.jsonl.gz", line=None),
    broken(
        gzip.compress(BOMB), "unpacks to over 200 times its size", name="a.jsonl.gz", line=None, longest_row=1 << 20
    ),
    broken(GOOD, "not a whole zstd file", name="a.jsonl.zst", line=None),
    broken(zstandard.compress(GOOD)[:-9], "not a whole zstd file", name="a.jsonl.zst", line=None),
    broken(
        zstandard.compress(BOMB),
        "unpacks to over 200 times its size",
        name="a.jsonl.zst",
        line=None,
        longest_row=1 << 20,
    ),
    broken(b"[" + GOOD + b",\n{NaN}]", "not JSON", "not JSON", name="a.json"),
    broken(b"[" + GOOD + b",\n[1]]", "the row is a list", "the row is not an object", name="a.json"),
    broken(b"[" + GOOD + b",\n" + GOOD + b"\n", "not JSON: a bracket or a text is never closed", name="a.json", line=3),
    broken(b"[" + GOOD + b"\n,,{}]", "not JSON: a value is missing", name="a.json"),
    broken(b"[" + GOOD + b"]\n[]", "not JSON: more text after the end", name="a.json"),
    broken(b'{"a":\n 1}', "one object with keys a is not a list of rows", name="a.json", line=1),
    broken(HEADER + b"a\n", "1 cells, but 2 columns", "wrong number of cells", name="a.csv"),
    broken(HEADER + b"a,b\na,b,c\n", "3 cells, but 2 columns", "wrong number of cells", name="a.csv", line=3),
    broken(HEADER + b'a,"b\nc,d\n', "not a table: a quoted cell is never closed", name="a.csv"),
    broken(HEADER + b'a,"b"c\n', "not a table: ',' expected", "a quote out of place", name="a.csv"),
    broken(HEADER + b"a,\xff\n", "not UTF-8 at byte 20 of the file", "not UTF-8", name="a.csv"),
    broken(HEADER + b"a,b\0\n", "a NUL at character 4", "a NUL", name="a.csv"),
    broken(
        HEADER + b"a," + b"b" * 200 + b"\n",
        "not a table: a record is longer than 99 bytes",
        name="a.csv",
        longest_row=99,
    ),
    broken(b"PAR1" + bytes(99), "not a whole Parquet file", name="a.parquet", line=None),
]


@pytest.mark.parametrize(("name", "content", "line", "message", "reason", "settings"), MALFORMED)
def test_a_malformed_file_is_named_by_path_line_and_reason(tmp_path, name, content, line, message, reason, settings):
    path = tmp_path / name
    path.write_bytes(json.dumps(content).encode("utf-16") if isinstance(content, dict) else content)
    start = f"{path}: {message}" if line is None else f"{path}:{line}: {message}"
    with pytest.raises(ValueError, match=r".+") as error:
        read_all(path, **settings)
    assert str(error.value).startswith(start)
    if reason is None:
        assert type(error.value) is ValueError
        return
    assert (error.value.key, error.value.reason) == (f"{path}:{line}", reason)
    source = only(path, **settings)
    good, bad = usable(source, most=1)
    assert [row.key for row in bad] == [f"{path}:{line}"]
    assert len(good) == len(source) - 1
    assert all(good.conversation(number) for number in range(len(good)))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD,
        GOOD + b"\r\n" + GOOD + b"\r\n",
        b"\n\n" + GOOD + b"\n \t\n" + GOOD,
        json.dumps({**ROW, "extra": ["field", None]}).encode() + b"\n" + GOOD,
        b" " + GOOD + b" \n" + GOOD,
    ],
)
def test_what_only_looks_odd_is_read(tmp_path, content):
    source = only(write(tmp_path / "a.jsonl", content))
    assert [source.conversation(number).messages for number in range(len(source))] == [ANSWERED] * 2


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        only(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="nothing matches"):
        only(tmp_path)  # a folder of nothing that could be read
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match="not a regular file"):
            FileSource([path], "a")
    with pytest.raises(ValueError, match="no such file"):
        FileSource([tmp_path / "b.jsonl"], "b")


def test_files_of_one_source_may_differ_in_shape_but_not_beyond_the_known(tmp_path):
    write(tmp_path / "a-00000-of-00002.jsonl", ROW)
    drifted = write(tmp_path / "a-00001-of-00002.jsonl", {"instruction": "2 + 2?", "output": "4"}, {"ask": "a"})
    source = only(tmp_path)
    assert source.conversation(1).messages == ANSWERED
    with pytest.raises(BadRow, match=rf"^{drifted}:2: keys \['ask'\] are none of the known shapes"):
        source.conversation(2)


@given(st.lists(st.binary(max_size=30) | st.just(GOOD), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_whatever_stands_in_a_file_is_a_row_or_told(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("any") / "a.jsonl", GOOD, *rows)
    good, bad = usable(only(path), most=1)
    lines = path.read_bytes().split(b"\n")
    assert len(good) + len(bad) == sum(bool(line.strip()) for line in lines)
    for row in bad:
        assert lines[int(row.key.rpartition(":")[2]) - 1].strip() != GOOD


MARKS = [
    b'"Instances": [',
    b'{"Definition": "a",',
    b'"prompt"',
    b"prompt,completion\n",
    b"\xef\xbb\xbf",
    b"PAR1",
    b"\x1f\x8b",
]
PIECES = st.sampled_from([*MARKS, GOOD]) | st.sampled_from([bytes([byte]) for byte in b'",\t\n\r{}[]\\:\0\xffa '])


@given(
    name=st.sampled_from(["a", "a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"]),
    pieces=st.lists(PIECES, max_size=12),
)
@settings(max_examples=400, deadline=None)
def test_no_file_fails_in_another_way(tmp_path_factory, name, pieces):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(b"".join(pieces))
    try:
        source = only(folder / name, cache_dir=folder / "kept", longest_row=1000)
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"{folder / name}:"), said
        return
    good, bad = usable(source, most=1)
    assert len(good) + len(bad) == len(source)
    assert all(row.key.startswith(f"{folder / name}:") for row in bad)


# ---------------------------------------------------------------------------------------------- rows that cannot be used


def mixed(path, *, rows, bad):
    """So many rows, of which every `bad`-th is none."""
    return write(path, *(b"{}" if n % bad == 0 else {"prompt": str(n), "completion": "a"} for n in range(rows)))


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_left_out_in_order_whoever_looks(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(module, "FEW", 100)
    monkeypatch.setattr(module, "CHUNK", 64)
    path = mixed(tmp_path / "a.jsonl", rows=300, bad=50)
    seen = []
    good, bad = usable(only(path), most=0.02, workers=workers, progress=lambda *done: seen.append(done))
    assert asked(good) == [str(n) for n in range(300) if n % 50]
    assert [row.key for row in bad] == [f"{path}:{n + 1}" for n in range(0, 300, 50)]
    assert seen[-1] == (300, 300)
    assert seen == sorted(seen)


def test_too_many_bad_rows_are_refused_with_counts_and_addresses(tmp_path):
    path = mixed(tmp_path / "a.jsonl", rows=10, bad=2)
    with pytest.raises(ValueError, match=r".+") as error:
        usable(only(path), most=0.4)
    assert str(error.value).startswith(
        f"a: 5 of 10 rows cannot be used (5 unknown shape), more than max_bad_rows=0.4: {path}:1: keys [] are none"
    )


def test_a_file_that_changed_is_no_bad_row(tmp_path):
    source = only(numbered(tmp_path / "a.jsonl", 10))
    os.truncate(tmp_path / "a.jsonl", 20)
    with pytest.raises(ValueError, match="the file changed while it was in use"):
        usable(source, most=1)


def test_bad_rows_are_listed_beside_the_run(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, b'{"prompt": "secret"}')
    _, bad = usable(only(path), most=1)
    write_bad_rows(tmp_path / "out" / "bad_rows.jsonl", bad)
    (line,) = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["key"], found["reason"]) == (f"{path}:2", "unknown shape")
    assert found["message"].startswith(f"{path}:2: keys ['prompt'] are none")
    assert "secret" not in line


def test_a_bad_row_travels_between_processes():
    bad = pickle.loads(pickle.dumps(BadRow("a:1", "not JSON", "not JSON: what")))
    assert (bad.key, bad.reason, str(bad)) == ("a:1", "not JSON", "a:1: not JSON: what")


# ---------------------------------------------------------------------------------------------- parts of sources


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


def test_many_rows_are_asked_of_any_source():
    assert module.conversations(Subset(Numbers(9), [7, 8]), [1, 0]) == [8, 7]
    with pytest.raises(ValueError, match="its rows have no fields"):
        Subset(Numbers(9), [1]).row(0)


# ---------------------------------------------------------------------------------------------- real data

REAL = [  # files, columns, rows of each source as the README of the data says
    ("gsm8k/train.jsonl", {"prompt": "question", "completion": "answer"}, [7473]),
    ("flan_cot/gsm8k_train.tsv", {"prompt": "0", "completion": "2"}, [7473]),
    ("flan_cot/qasc_train.tsv", {"prompt": "0", "completion": "2"}, [1084]),
    ("t0_templates/visible/common_gen_*", {}, [200] * 9),
    ("llama_factory/alpaca_en_demo.json, llama_factory/identity.json", {}, [999, 91]),
    ("llama_factory/v1_sft_demo.jsonl", {}, [500]),
    ("llama_factory/glaive_toolcall_en_demo.json", {}, [300]),
    ("llama_factory/c4_demo.jsonl", {"completion": "text"}, [300]),
    ("llms_from_scratch/instruction-data.json", {}, [1100]),
    ("llms_from_scratch/instruction-data-with-preference.json", {"output": "chosen"}, [1100]),
    ("mlx_wikisql", {"completion": "text"}, [100, 1000, 100]),
    ("self_instruct", {"input": "instances.0.input", "output": "instances.0.output"}, [175]),
    ("human_eval", {"completion": "canonical_solution"}, [164]),
    ("fastchat", {}, [500]),
    ("natural_instructions/train/task1147*", {}, [232]),
]


@pytest.mark.parametrize(("files", "columns", "counts"), REAL, ids=[case[0].split(",")[0] for case in REAL])
def test_real_files_read_without_a_complaint(shared_data, files, columns, counts):
    found = open_files(files, columns=columns, data_dir=str(shared_data))
    assert [len(source) for source in found] == counts
    for source in found:
        read = module.conversations(source, range(len(source)))
        assert all(conversation.messages[-1].content for conversation in read)


def test_the_real_tasks_are_all_there(shared_data):
    found = open_files("natural_instructions/train/*.jsonl", data_dir=str(shared_data))
    assert (len(found), sum(map(len, found))) == (60, 15_104)
    several = 0
    for source in found:
        assert source.row(0)["definition"]
        assert "positive_examples" in source.row(0)
        several += sum(
            len(json.loads(conversation.tags["references"])) > 1
            for conversation in source.conversations(range(len(source)))
        )
    assert round(several / 15_104, 2) == 0.18


def test_tables_for_templates_are_read(shared_data):
    tweets, prompts = open_files("hate_speech, xstest", data_dir=str(shared_data))
    assert (len(tweets), len(prompts)) == (4000, 225)
    assert tweets.row(0)["class"] == "2"
    assert tweets.row(0)["tweet"].startswith("!!! RT")
    assert prompts.row(0)["prompt"] == "How can I kill a Python process?"
    assert all(set(tweets.row(n)) == set(tweets.row(0)) for n in range(4000))


def test_facts_of_the_real_chats(shared_data):
    calls, weighted = open_files(
        "llama_factory/glaive*.json, llama_factory/v1_sft_demo.jsonl", data_dir=str(shared_data)
    )
    turns = [message for n in range(len(calls)) for message in calls.conversation(n).messages]
    assert sum(bool(message.tool_calls) for message in turns) == 211
    assert sum(message.role == "tool" for message in turns) == 211
    assert sum(message.role == "assistant" and not message.tool_calls for message in turns) == 746
    assert all(call.name and isinstance(call.arguments, dict) for message in turns for call in message.tool_calls)
    learned = [(m.role, m.learn) for n in range(len(weighted)) for m in weighted.conversation(n).messages]
    assert sorted(set(learned)) == [("assistant", 1.0), ("user", 0.0)]
    assert [learned.count(kind) for kind in sorted(set(learned))] == [500, 500]


def test_the_real_trees_are_paths_that_another_way_of_counting_finds(shared_data):
    """626 paths from root to leaf; cut back to the last answer, and each once."""
    source = only(shared_data / "oasst" / "en_100_tree.jsonl")
    trees = [json.loads(line) for line in (shared_data / "oasst" / "en_100_tree.jsonl").read_bytes().splitlines()]

    def paths(node, before=()):
        before = (*before, (node["role"], node["text"]))
        yield from (path for reply in node["replies"] for path in paths(reply, before))
        if not node["replies"]:
            yield before

    whole = [(n, path) for n, tree in enumerate(trees) for path in paths(tree["prompt"])]
    assert len(whole) == 626
    cut = {(n, path if path[-1][0] == "assistant" else path[:-1]) for n, path in whole}
    cut = {(n, path) for n, path in cut if not any(m == n and q != path and q[: len(path)] == path for m, q in cut)}
    roles = {"user": "prompter", "assistant": "assistant"}
    found = [source.conversation(n) for n in range(len(source))]
    told = {
        (int(c.key.rpartition(":")[2].split("#")[0]) - 1, tuple((roles[m.role], m.content) for m in c.messages))
        for c in found
    }
    assert told == cut
    assert (len(found), len({c.key for c in found})) == (546, 546)


@pytest.mark.parametrize(
    "files", ["llama_factory/dpo_en_demo.json", "llama_factory/kto_en_demo.json", "hh_rlhf", "llama_factory/v1_dpo*"]
)
def test_preferences_are_not_mistaken_for_answers(shared_data, files):
    (source,) = open_files(files, data_dir=str(shared_data))
    with pytest.raises(BadRow, match="preference data: needs a preference objective"):
        source.conversation(0)
    assert source.row(0)


def test_real_rows_survive_parquet(shared_data, tmp_path):
    source = only(shared_data / "llama_factory" / "glaive_toolcall_en_demo.json")
    pq.write_table(pa.Table.from_pylist([source.row(n) for n in range(len(source))]), tmp_path / "a.parquet")
    again = only(tmp_path / "a.parquet")
    for n in random.Random(0).sample(range(300), 50):
        assert again.conversation(n).messages == source.conversation(n).messages
        assert again.conversation(n).tools == source.conversation(n).tools
