"""The same stages on Ray's own local runner: the same list of findings as in one process."""

import importlib.util

import pytest

from itjax.data import engine, stages
from tests.data.test_stages import all_stages, corpus


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"itjax\[audit-ray\]"):
        engine.run([], [])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'itjax[audit-ray]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray of its own settings
def test_a_cluster_finds_the_same():
    examples = corpus()
    examples_and_stages = [(examples, all_stages(examples)), (examples[:40], all_stages(examples)[:3]), ([], [])]
    for some, asked in examples_and_stages:
        assert engine.run(asked, some, shards=3) == stages.run(asked, some)
