"""Rows that stand together are read together."""

import json

import numpy as np

from itjax.data import places
from tests.data.reading import open_one, write


def test_rows_that_stand_together_are_read_together(tmp_path, monkeypatch):
    path = write(
        tmp_path / "a.jsonl", "".join(json.dumps({"prompt": str(n), "completion": ""}) + "\n" for n in range(500))
    )
    source = open_one(path)
    reads = []
    read = places.Bytes.read
    monkeypatch.setattr(places.Bytes, "read", lambda self, start, size: reads.append(size) or read(self, start, size))
    order = np.random.default_rng(0).permutation(500)
    assert [c.messages[0].content for c in source.conversations(order)] == [str(n) for n in order]
    assert len(reads) == 1
