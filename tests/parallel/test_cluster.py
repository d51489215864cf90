"""Processes of one run find and wait for each other."""

import types

import jax
from jax._src import distributed

from itjax.parallel import cluster


def test_processes_wait_for_each_other_longer_than_a_collective_would(monkeypatch):
    """The service is asked, with hours of patience: a large data set takes longer to prepare than 30 seconds."""
    waits = []
    service = types.SimpleNamespace(wait_at_barrier=lambda name, milliseconds: waits.append((name, milliseconds)))
    monkeypatch.setattr(distributed.global_state, "client", service)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    cluster.barrier("data encoded")
    assert waits == [("data encoded", 24 * 3600 * 1000)]
