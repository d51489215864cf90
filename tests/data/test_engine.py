"""The same stages on Ray's own local runner: the same list of findings as in one process."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from itjax.data import engine, stages
from itjax.data.sources import BadRow
from tests.data.test_stages import all_stages, corpus

ROOT = Path(__file__).resolve().parents[2]


def needs_ray(test):
    """Ray starts processes of its own for each run: ten seconds and more."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'itjax[audit-ray]'"),
        pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # of its own settings
    ):
        test = mark(test)
    return test


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"itjax\[audit-ray\]"):
        engine.run([], [])


@needs_ray
def test_a_cluster_finds_the_same():
    examples = corpus()
    for some, asked in ((examples, all_stages(examples)), (examples[:40], all_stages(examples)[:3]), ([], [])):
        assert engine.run(asked, some, shards=3) == stages.run(asked, some)


@needs_ray
def test_rows_that_cannot_be_read_are_counted_or_an_error():
    some, unreadable = OneIsBroken(corpus(60)), Counter[str]()
    readable = [example for example in some.examples if example.number != 7]
    asked = all_stages(corpus(100))
    assert engine.run(asked, some, shards=2, unreadable=unreadable) == stages.run(asked, readable)
    assert unreadable == {"no answer": 1}
    with pytest.raises(ValueError, match=r"rows.jsonl:8: the answer is missing; .* `unreadable`"):
        engine.run(asked, some, shards=2)


@needs_ray
def test_the_snippet_of_the_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "audit_at_scale.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    for name, number in (("data", 60), ("evals", 5)):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {row % 50} asks", "completion": "so"} for row in range(number)]
        (tmp_path / name / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # workers have itjax installed
    monkeypatch.chdir(tmp_path)
    one_process, cluster = snippet.replace("workers=4", "workers=1").split("findings = engine.run")
    there: dict = {}
    exec(one_process, there)
    found = there["findings"]
    exec(f"findings = engine.run{cluster}", there)
    assert there["findings"] == found
    assert len(found) == 20  # ten repeats, by both stages


class OneIsBroken:
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        if number == 7:
            raise BadRow("rows.jsonl:8", "no answer", "the answer is missing")
        return self.examples[number]
