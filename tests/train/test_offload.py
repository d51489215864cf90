"""Moments in the memory of the host between steps: the same numbers, in another place."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from itjax.base import schema
from itjax.base.records import DataPosition
from itjax.base.schema import Optimizer, Parallel, Run
from itjax.parallel import layout, memory
from itjax.parallel.mesh import mesh_for
from itjax.train import loop
from itjax.train.checkpoint import Checkpoints
from itjax.train.state import evaluated
from tests import fakes

BATCH = fakes.packed([[fakes.example(n, length=9), fakes.example(n + 8, length=6)] for n in range(8)], length=16)
ONE_LAYER = dataclasses.replace(fakes.TINY, layers=1)
PLACES = {1: Parallel(), 8: Parallel(data=1, fsdp=8)}


class Trained:
    """A run of a few steps, and what it left."""

    def __init__(self, devices: int, **optimizer):
        self.run = Run(rows=8, length=16, optimizer=Optimizer(learning_rate=1e-2, warmup=0, **optimizer))
        self.mesh = mesh_for(PLACES[devices], jax.devices()[:devices])
        with jax.set_mesh(self.mesh):
            model = fakes.tiny_model(ONE_LAYER, attention="reference")
            self.compiled = loop.compile_step(self.run, model, self.mesh, num_steps=4)
            self.state = loop.first(self.run, model, self.compiled, None)
        self.losses = [self.step() for _ in range(2)]

    def step(self) -> float:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled.step(self.state, layout.place(BATCH, self.mesh, rows=8))
        return float(metrics["loss"])


trained = functools.cache(Trained)


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def shardings(run: Trained):
    return jax.tree.map(lambda x: x.sharding, run.compiled.abstract)


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, tree) for tree in (a, b)))


SLOW = [pytest.param(1, {}, marks=pytest.mark.slow), pytest.param(8, {"moments": "int8"}, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("devices", "settings"), [(8, {}), *SLOW])
def test_the_steps_are_the_same_to_the_bit(devices, settings):
    here, there = trained(devices, **settings), trained(devices, offload=True, **settings)
    assert kinds(here.state) == {"device"}
    assert (kinds(there.state.params), kinds(there.state.opt_state)) == ({"device"}, {memory.HOST})
    assert here.losses == there.losses
    same(here.state, there.state)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_checkpoint_does_not_depend_on_it(tmp_path, before, after):
    wrote, wants = trained(8, offload=before), trained(8, offload=after)
    saved = Checkpoints(tmp_path, schema.Checkpoint(asynchronous=False))
    saved.save(wrote.state, DataPosition(2, "plan"), {}, {})
    read, _ = saved.restore(2, wants.compiled.abstract)
    saved.close()
    same(read, wrote.state)
    assert kinds(read.opt_state) == kinds(wants.state.opt_state)


def test_a_run_goes_on_with_it_switched():
    """What is read back can be stepped on, and comes to what it would have come to."""
    here, there = trained(8), trained(8, offload=True)
    before = jax.tree.map(np.asarray, there.state)
    there.state = jax.device_put(jax.tree.map(np.asarray, here.state), shardings(there))
    here.state = jax.device_put(before, shardings(here))
    assert there.step() == here.step()
    same(here.state, there.state)


def test_the_mean_of_schedule_free_is_read_wherever_its_parts_lie():
    config = Optimizer(kind="schedule_free_adamw", learning_rate=1e-2, offload=True)
    run = Run(optimizer=config)
    mesh, model = mesh_for(Parallel(), jax.devices()[:1]), fakes.tiny_model()
    with jax.set_mesh(mesh):
        state = loop.first(run, model, loop.compile_step(run, model, mesh, num_steps=1), None)
        assert kinds(state.opt_state) == {memory.HOST}
        mean = evaluated(state, config)  # nothing has moved yet: the parameters, within rounding
        jax.tree.map(lambda x, p: np.testing.assert_allclose(x, p, rtol=1e-6), mean, state.params)
        away = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 1, state.params))
        assert kinds(evaluated(away, config)) == {"device"}
