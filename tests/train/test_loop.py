"""What a run begins with."""

import jax
import numpy as np

from itjax.base import tree
from itjax.base.schema import Lora, Parallel, Run
from itjax.models import lora as adapters
from itjax.parallel.mesh import mesh_for
from itjax.train import loop
from tests import fakes

LINE = fakes.packed([[fakes.example(0, length=12)]], length=16)


def test_adapters_with_lengths_begin_as_the_base_does_without_a_folder_too():
    run = Run(lora=Lora(rank=2, dora=True, targets=("layers/attn/*",)))
    mesh, model = mesh_for(Parallel(), jax.devices()[:1]), fakes.tiny_model(lora=run.lora, base="int8")
    with jax.set_mesh(mesh):
        compiled = loop.compile_step(run, model, mesh, num_steps=1)
        params = loop.first_parameters(run, model, compiled, None)
    kept = {path: leaf for path, leaf in tree.flatten(params).items() if not adapters.is_adapter(path)}
    plain = fakes.tiny_model(base="int8")
    ours, base_alone = jax.jit(model.features)(params, LINE), jax.jit(plain.features)(tree.unflatten(kept), LINE)
    np.testing.assert_allclose(ours.x_BTD, base_alone.x_BTD, atol=1e-5)
