"""Rates and updates of torch and transformers, which most published recipes were run with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base import schema, tree
from itjax.train import optimizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, WARMUP = 40, 8


def theirs(name: str, **settings) -> list[float]:
    """The rates that transformers' scheduler gives steps 0, 1, ... of a peak of 1."""
    moved = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, moved, WARMUP, STEPS, scheduler_specific_kwargs=settings or None)
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        moved.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "ours, name, settings",
    [
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "final": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (
            {"schedule": "wsd", "decay": 0.25},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "decay_type": "linear"},
        ),
        ({"schedule": "inverse_sqrt"}, "inverse_sqrt", {}),
    ],
)
def test_rates_are_those_of_transformers_and_the_warm_up_is_one_step_ahead(ours, name, settings):
    """Theirs does nothing at step 0; ours moves at every step, and from the end of the warm-up on both agree."""
    config = schema.Optimizer(learning_rate=1.0, warmup=WARMUP / STEPS, **ours)
    rate = optimizer.learning_rate(config, num_steps=STEPS)
    rates, expected = [float(rate(jnp.int32(step))) for step in range(STEPS)], theirs(name, **settings)
    assert expected[0] == 0 < rates[0]
    np.testing.assert_allclose(rates[: WARMUP - 1], expected[1:WARMUP], rtol=1e-6)
    np.testing.assert_allclose(rates[WARMUP:], expected[WARMUP:], rtol=1e-5, atol=1e-7)


def gradient(shape: tuple[int, ...], step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=shape).astype(np.float32)


def ours(config: schema.Optimizer, path: str, start: np.ndarray, *, steps: int, rate: float) -> np.ndarray:
    tx, params = optimizer.make(config), tree.unflatten({path: jnp.asarray(start)})
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        directions, state = update(tree.unflatten({path: jnp.asarray(gradient(start.shape, step))}), state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
    return np.asarray(tree.flatten(params)[path])


def of_torch(make, start: np.ndarray, *, steps: int) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.tensor(start))
    moved = make([parameter])
    for step in range(steps):
        parameter.grad = torch.tensor(gradient(start.shape, step))
        moved.step()
    return parameter.detach().numpy()


def settings(kind: str) -> schema.Optimizer:
    return schema.Optimizer(kind=kind, clip_norm=0.0, b2=0.999, weight_decay=0.1, no_decay=())


def test_adamw_is_that_of_torch():
    start = gradient((6, 5), 100)
    expected = of_torch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), start, steps=5)
    np.testing.assert_allclose(ours(settings("adamw"), "a", start, steps=5, rate=0.01), expected, rtol=1e-5, atol=1e-6)


def test_adafactor_is_that_of_transformers():
    """Both with steps relative to the parameters' size; ours factors matrices from 128 x 128 on."""
    start = gradient((144, 130), 100)
    expected = of_torch(
        lambda p: transformers.Adafactor(
            p, lr=0.01, scale_parameter=True, relative_step=False, warmup_init=False, weight_decay=0.1
        ),
        start,
        steps=5,
    )
    found = ours(settings("adafactor"), "head/kernel", start, steps=5, rate=0.01)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_the_first_step_of_muon_is_that_of_torch():
    """Theirs multiplies matrices in bfloat16, and does not correct the momentum's start, which only later steps see."""
    start = gradient((24, 40), 100)
    expected = of_torch(
        lambda p: torch.optim.Muon(p, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        start,
        steps=1,
    )
    found = ours(settings("muon"), "layers/mlp/up/kernel", start[None], steps=1, rate=0.01)[0]
    moved, wanted = found - start, expected - start
    assert np.linalg.norm(moved - wanted) < 0.02 * np.linalg.norm(wanted)
