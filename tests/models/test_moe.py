"""Mixtures of experts, against a loop over tokens in float64: values, gradients, sums, capacities, and every mesh.

B rows, T positions, D width, F feed-forward, E experts, C chosen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from itjax.base import tree
from itjax.base.schema import Lora, Parallel
from itjax.models import dispatch, leaves, moe, quantize
from itjax.models.config import Experts, ModelConfig
from itjax.models.layers import Draws, Options
from itjax.models.moe import Facts, Mixture
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for
from tests.models.test_activations import sigmoid

CONFIG = ModelConfig(
    vocab=16, layers=2, dim=16, heads=2, kv_heads=2, head_size=8, ffn=24, norm_eps=1e-5, tie_embeddings=True,
    experts=Experts(number=8, chosen=2),
)  # fmt: skip
B, T, E, C = 8, 12, 8, 2


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def documents(lengths: list[list[int]], length: int = T) -> Facts:
    """Rows of documents that long, the rest padding; every other position is learned."""
    segments = np.array([np.pad(np.repeat(np.arange(len(row)) + 1, row), (0, length - sum(row))) for row in lengths])
    weights = (segments > 0) * (np.arange(length) % 2) * (1 + segments / 4)
    return Facts(segments.astype(np.int32), weights.astype(np.float32))


X_BTD, DY_BTD = numbers(B, T, 16, seed=0), numbers(B, T, 16, seed=1)
FACTS = documents([[12], [5, 7], [3, 3, 3], [1, 11], [2, 4], [], [6, 6], [4, 4, 4]])


@functools.cache
def parts(config: ModelConfig = CONFIG, capacity: float | None = None):
    mixture = Mixture(config, iter(jax.random.split(jax.random.key(0), 4)), Options(capacity_factor=capacity))
    graph, state = nnx.split(mixture)
    flat = tree.flatten(nnx.to_pure_dict(state))
    noisy = {path: leaf + 0.3 * numbers(*leaf.shape, seed=n) for n, (path, leaf) in enumerate(flat.items())}
    return graph, tree.unflatten(noisy), leaves.names_of(state)


@functools.cache
def compiled(config: ModelConfig, capacity: float | None, out=None):
    graph = parts(config, capacity)[0]

    def loss(params, x_BTD, facts, dy_BTD):
        y_BTD, aux = nnx.merge(graph, params)(x_BTD, Draws(), facts)
        total = (y_BTD * dy_BTD).sum() + aux["router_balance"] + 0.1 * aux["router_z"]
        return total, (y_BTD, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), out_shardings=out)


def outcome(config=CONFIG, capacity=None, *, params=None, x=X_BTD, facts=FACTS, dy=DY_BTD):
    """(y_BTD, aux, gradients of parameters, gradient of x)."""
    (_, (y_BTD, aux)), (grads, dx_BTD) = compiled(config, capacity)(params or parts(config)[1], x, facts, dy)
    return y_BTD, aux, grads, dx_BTD


# --- values -----------------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def gates(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate * sigmoid(gate) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def by_hand(params, x_D: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, list[int]]:
    """What a mixture says of one token, and whom it asked, best first."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    logits = x_D @ leaves["router/kernel"] + leaves.get("router/bias", 0)
    asked = np.argsort(-logits)[: config.experts.chosen]
    weights = softmax(logits)[asked]
    weights = weights / weights.sum() if config.experts.renormalize else weights

    def linear(name: str, e: int, x: np.ndarray) -> np.ndarray:
        bias = leaves[f"{name}/bias"][e] if f"{name}/bias" in leaves else 0
        return x @ leaves[f"{name}/kernel"][e] + bias

    said = [linear("down", e, gates(linear("gate", e, x_D), linear("up", e, x_D), config.activation)) for e in asked]
    return sum(w * y for w, y in zip(weights, said, strict=True)), asked.tolist()


GPT_OSS = dataclasses.replace(CONFIG, activation="swiglu_clamped", experts=Experts(number=8, chosen=3, bias=True))


@pytest.mark.parametrize("config", [CONFIG, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_a_token_gets_the_weighted_answers_of_the_experts_it_chose(config):
    params = parts(config)[1]
    x_BTD = 3 * X_BTD  # some gates beyond the clamp
    y_BTD, aux, *_ = outcome(config, params=params, x=x_BTD)
    counts = np.zeros(E)
    for b, t in np.ndindex(B, T):
        if FACTS.segments_BT[b, t]:
            expected, asked = by_hand(params, x_BTD[b, t].astype(np.float64), config)
            np.testing.assert_allclose(y_BTD[b, t], expected, atol=2e-4, rtol=1e-4)
            counts[asked] += 1
    np.testing.assert_array_equal(aux["expert_tokens"], counts)
    assert aux["dropped"] == 0


def test_weights_are_probabilities_among_all_or_among_the_chosen():
    logits_BTE = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3]]]))
    experts_BTC, weights_BTC = moe.choose(logits_BTE, Experts(number=4, chosen=2, renormalize=False))
    assert experts_BTC.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(weights_BTC, [[[0.4, 0.3]]], rtol=1e-6)
    _, weights_BTC = moe.choose(logits_BTE, Experts(number=4, chosen=2))
    np.testing.assert_allclose(weights_BTC, [[[4 / 7, 3 / 7]]], rtol=1e-6)


def test_padding_asks_nobody():
    y_BTD, _, _, dx_BTD = outcome(x=np.where(FACTS.segments_BT[..., None] == 0, np.float32(1e4), X_BTD))
    is_padding = FACTS.segments_BT == 0
    assert not np.asarray(y_BTD)[is_padding].any()
    assert not np.asarray(dx_BTD)[is_padding].any()
    np.testing.assert_array_equal(np.asarray(y_BTD)[~is_padding], np.asarray(outcome()[0])[~is_padding])


def test_gradients_are_those_of_a_loop_over_all_experts():
    """Autodiff of the plainest program: every expert answers every token, and weights choose."""
    params = parts()[1]

    def plain(params, x_BTD):
        logits_BTE = x_BTD @ params["router"]["kernel"]
        best = jnp.sort(logits_BTE, axis=-1)[..., -C][..., None]
        weights_BTE = jax.nn.softmax(jnp.where(logits_BTE >= best, logits_BTE, -jnp.inf), axis=-1)
        total = 0.0
        for e in range(E):
            kernel = {name: params[name]["kernel"][e] for name in ("gate", "up", "down")}
            hidden = jax.nn.silu(x_BTD @ kernel["gate"]) * (x_BTD @ kernel["up"])
            total += weights_BTE[..., e, None] * (hidden @ kernel["down"])
        return (jnp.where(FACTS.segments_BT[..., None] > 0, total, 0) * DY_BTD).sum()

    expected, dx_BTD = jax.jit(jax.grad(plain, argnums=(0, 1)))(params, X_BTD)
    _, _, grads, dx = outcome(
        facts=FACTS._replace(weights_BT=np.zeros_like(FACTS.weights_BT))
    )  # no terms of the router
    np.testing.assert_allclose(dx, dx_BTD, atol=1e-4)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(grads)[path], leaf, atol=2e-4, err_msg=path)


def test_all_tokens_to_one_expert_are_all_answered():
    params = dict(parts(GPT_OSS)[1])
    params["router"] = {**params["router"], "bias": jnp.array([0, 0, 0, 90.0, 0, 60.0, 0, 80.0])}
    y_BTD, aux, *_ = outcome(GPT_OSS, params=params, x=3 * X_BTD)
    real = int((FACTS.segments_BT > 0).sum())
    assert aux["expert_tokens"].tolist() == [0, 0, 0, real, 0, real, 0, real]
    for b, t in ((0, 3), (7, 11)):
        expected, _ = by_hand(params, 3 * X_BTD[b, t].astype(np.float64), GPT_OSS)
        np.testing.assert_allclose(y_BTD[b, t], expected, atol=2e-4, rtol=1e-4)


def test_decoding_gives_the_answers_of_training_and_no_sums():
    graph, params, _ = parts()
    facts = documents([[T]] * B)
    y_BTD, aux = jax.jit(lambda params, x: nnx.merge(graph, params)(x, Draws(), None))(params, X_BTD[:, :1])
    np.testing.assert_allclose(y_BTD, outcome(facts=facts)[0][:, :1], atol=1e-5)
    assert aux == {}


def test_half_precision_does_not_change_who_is_chosen():
    """Scores differ by less than bfloat16 tells apart; a router in bfloat16 would see ties."""
    router = nnx.merge(*nnx.split(moe.Router(CONFIG, CONFIG.experts, jax.random.key(0))))
    router.kernel[...] = jnp.zeros((16, E)).at[0].set(1 + jnp.arange(E) / 4096)
    x_BTD = jnp.ones((1, 1, 16), jnp.bfloat16)
    assert router(x_BTD).dtype == jnp.float32
    assert moe.choose(router(x_BTD), CONFIG.experts)[0].tolist() == [[[7, 6]]]


# --- sums -------------------------------------------------------------------------------------------------------------


def sums_by_hand(params, facts: Facts, config: ModelConfig) -> tuple[float, float]:
    """The balance and z sums, document by document."""
    balance = z = 0.0
    for row, (segments_T, weights_T) in enumerate(zip(*facts, strict=True)):
        for segment in range(1, segments_T.max(initial=0) + 1):
            here = segments_T == segment
            x_nD = X_BTD[row, here].astype(np.float64)
            logits = x_nD @ np.asarray(params["router"]["kernel"], np.float64)
            asked = np.array([by_hand(params, x_D, config)[1] for x_D in x_nD])
            f_E = np.array([(asked == e).sum() for e in range(E)]) * E / (C * len(x_nD))
            mean_E = np.mean([softmax(line) for line in logits], axis=0)
            balance += weights_T[here].sum() * (f_E * mean_E).sum()
            z += weights_T[here].sum() * np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    return balance, z


def test_sums_are_those_of_every_document_times_its_weight():
    _, aux, *_ = outcome()
    balance, z = sums_by_hand(parts()[1], FACTS, CONFIG)
    np.testing.assert_allclose(aux["router_balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(aux["router_z"], z, rtol=1e-5)


def test_choices_spread_evenly_cost_one_per_weight():
    logits_BTE = jnp.zeros((1, 4, E))
    experts_BTC = jnp.arange(E).reshape(1, 4, C)
    aux = moe.sums(logits_BTE, experts_BTC, Facts(jnp.ones((1, 4), jnp.int32), jnp.full((1, 4), 0.5)))
    np.testing.assert_allclose(aux["router_balance"], 2.0, rtol=1e-6)


def alone(x_BTD: np.ndarray, facts: Facts, length: int) -> tuple[np.ndarray, Facts]:
    """Every document in a row of its own, of another length."""
    found = [(b, s) for b, line in enumerate(facts.segments_BT) for s in range(1, line.max(initial=0) + 1)]
    x, segments, weights = np.zeros((len(found), length, 16)), *np.zeros((2, len(found), length))
    for row, (b, s) in enumerate(found):
        here = facts.segments_BT[b] == s
        x[row, : here.sum()], segments[row, : here.sum()] = x_BTD[b, here], 1
        weights[row, : here.sum()] = facts.weights_BT[b, here]
    return x.astype(np.float32), Facts(segments.astype(np.int32), weights.astype(np.float32))


@functools.cache
def of_sums(x_shape):
    """Gradient of the sums alone, as they enter the loss of a step."""
    graph = parts()[0]

    def total(params, x_BTD, facts):
        _, aux = nnx.merge(graph, params)(x_BTD, Draws(), facts)
        return aux["router_balance"] + aux["router_z"], aux

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def test_packing_padding_and_micro_batches_change_neither_sums_nor_their_gradient():
    params = parts()[1]
    (total, aux), grads = of_sums(X_BTD.shape)(params, X_BTD, FACTS)
    unpacked = alone(X_BTD, FACTS, length=16)
    (other, other_aux), other_grads = of_sums(unpacked[0].shape)(params, *unpacked)
    np.testing.assert_allclose(total, other, rtol=1e-5)
    np.testing.assert_array_equal(aux["expert_tokens"], other_aux["expert_tokens"])
    np.testing.assert_allclose(grads["router"]["kernel"], other_grads["router"]["kernel"], atol=1e-4, rtol=1e-4)
    micros = [of_sums((2, T, 16))(params, X_BTD[i::4], Facts(*(x[i::4] for x in FACTS))) for i in range(4)]
    np.testing.assert_allclose(total, sum(value for (value, _), _ in micros), rtol=1e-5)
    summed = sum(grads["router"]["kernel"] for _, grads in micros)
    np.testing.assert_allclose(grads["router"]["kernel"], summed, atol=1e-4, rtol=1e-4)


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_first_choices_come_before_second_ones_and_early_tokens_before_late_ones():
    a, b, c = 0, 1, 2
    slots_TC = dispatch._slots(jnp.array([[b, a], [b, c], [a, b]]), number=3)
    assert slots_TC.tolist() == [[0, 1], [1, 0], [0, 2]]


def kept_by_hand(params, capacity: int) -> tuple[np.ndarray, int]:
    """Answers when every expert takes so many tokens of a row, and how many find it full."""
    y_BTD, dropped = np.zeros(X_BTD.shape), 0
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for b in range(B):
        taken = np.zeros(E, int)
        asked = {t: by_hand(params, X_BTD[b, t].astype(np.float64), CONFIG)[1] for t in range(T)}
        for choice, t in np.ndindex(C, T):
            if FACTS.segments_BT[b, t] == 0:
                continue
            e = asked[t][choice]
            taken[e] += 1
            if taken[e] > capacity:
                dropped += 1
                continue
            x_D = X_BTD[b, t].astype(np.float64)
            gate, up = (x_D @ leaves[name]["kernel"][e] for name in ("gate", "up"))
            weight = softmax((x_D @ leaves["router"]["kernel"])[asked[t]])[choice]
            y_BTD[b, t] += weight * (gates(gate, up, "silu") @ leaves["down"]["kernel"][e])
    return y_BTD, dropped


def test_what_fits_the_capacity_is_answered_and_the_rest_is_counted():
    expected, dropped = kept_by_hand(parts()[1], capacity=3)
    y_BTD, aux, *_ = outcome(capacity=1.0)  # 1.0 · 12 positions · 2 choices / 8 experts
    assert dropped > 5
    assert aux["dropped"] == dropped
    np.testing.assert_allclose(y_BTD, expected, atol=1e-4)


# --- meshes -----------------------------------------------------------------------------------------------------------


def on(parallel: Parallel, config: ModelConfig, capacity: float | None):
    """The outcome on a mesh."""
    _, params, names = parts(config)
    mesh = mesh_for(parallel)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, layout.shardings(names, mesh, params))
        arrays = jax.device_put((X_BTD, FACTS, DY_BTD), layout.batch_sharding(mesh, B, 1))
        step = compiled(config, capacity, NamedSharding(mesh, PartitionSpec()))
        (_, (y_BTD, aux)), (grads, dx_BTD) = jax.device_get(step(placed, *arrays))
    return y_BTD, aux, grads, dx_BTD


MESHES = {
    "8 experts": (Parallel(data=1, expert=8), CONFIG, None),
    "2 shards of 4": (Parallel(data=1, fsdp=2, expert=4), CONFIG, None),
    "all at once": (Parallel(data=1, fsdp=2, expert=2, tensor=2), GPT_OSS, None),
    "no axis of experts": (Parallel(data=1, fsdp=4, tensor=2), CONFIG, None),
    "8 experts with a capacity": (Parallel(data=1, expert=8), CONFIG, 1.0),
    "2 copies with a capacity": (Parallel(data=2, expert=2, tensor=2), CONFIG, 1.0),
}


@pytest.mark.parametrize("parallel, config, capacity", MESHES.values(), ids=MESHES)
def test_every_mesh_says_the_same_and_xla_never_rematerializes_an_array_to_lay_it_out(
    parallel, config, capacity, capfd
):
    names = ("y", "aux", "grads", "dx")
    got = tree.flatten(dict(zip(names, on(parallel, config, capacity), strict=True)))
    for path, expected in tree.flatten(dict(zip(names, outcome(config, capacity), strict=True))).items():
        error = np.abs(got[path] - expected).max() / max(np.abs(expected).max(), 1e-30)
        assert error < 1e-5, (path, error)
    assert "rematerialization" not in capfd.readouterr().err


# --- adapters and quantised kernels -----------------------------------------------------------------------------------


def adapted(options: Options, config: ModelConfig = CONFIG):
    """A mixture whose adapters say something, as (graph, parameters, names)."""
    graph, state = nnx.split(Mixture(config, iter(jax.random.split(jax.random.key(0), 4)), options))
    flat = tree.flatten(nnx.to_pure_dict(state))
    drawn = {
        path: 0.3 * numbers(*leaf.shape, seed=n) for n, (path, leaf) in enumerate(flat.items()) if "lora_b" in path
    }
    return graph, tree.unflatten({**flat, **drawn}), leaves.names_of(state)


def merged(params, scale: float):
    """The same kernels in float32, each expert with its adapter in it."""
    plain = {"router": {"kernel": params["router"]["kernel"]}}
    for name in ("gate", "up", "down"):
        part = params[name]
        kernel = part["kernel"]
        kernel = quantize.dequantize(kernel, jnp.float32) if isinstance(kernel, dict) else kernel
        plain[name] = {"kernel": kernel + scale * jnp.einsum("EIr,ErO->EIO", part["lora_a"], part["lora_b"])}
    return plain


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
def test_every_expert_has_an_adapter_of_its_own_over_any_base(base):
    graph, params, _ = adapted(Options(Lora(rank=4, alpha=8.0), base=base))
    y_BTD, _ = jax.jit(lambda params, x: nnx.merge(graph, params)(x, Draws(), None))(params, X_BTD)
    expected, *_ = outcome(params=merged(params, scale=2.0), facts=documents([[T]] * B))
    np.testing.assert_allclose(y_BTD, expected, atol=2e-5)


def test_adapters_over_quantised_experts_have_the_same_gradient_on_a_mesh():
    options = Options(Lora(rank=4, alpha=8.0), base="int8")
    graph, params, names = adapted(options)
    is_adapter = {path: "lora" in path for path in tree.flatten(params)}
    moving = {path: leaf for path, leaf in tree.flatten(params).items() if is_adapter[path]}
    frozen = {path: leaf for path, leaf in tree.flatten(params).items() if not is_adapter[path]}

    def loss(moving, frozen, x_BTD, dy_BTD):
        y_BTD, _ = nnx.merge(graph, tree.unflatten({**moving, **frozen}))(x_BTD, Draws(), None)
        return (y_BTD * dy_BTD).sum()

    expected = jax.jit(jax.grad(loss))(moving, frozen, X_BTD, DY_BTD)
    mesh = mesh_for(Parallel(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = tree.flatten(jax.device_put(params, layout.shardings(names, mesh, params)))
        split = ({path: leaf for path, leaf in placed.items() if is_adapter[path] == side} for side in (True, False))
        got = jax.device_get(jax.jit(jax.grad(loss))(*split, X_BTD, DY_BTD))
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-5 * float(np.abs(leaf).max()), err_msg=path)


def test_adapters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"lora.dora: layers/mlp/gate is of experts"):
        adapted(Options(Lora(rank=4, dora=True)))
    adapted(Options(Lora(rank=4, dora=True, targets=("layers/attn/*",))))


def test_blocks_of_scales_that_devices_do_not_divide_are_an_error():
    config = dataclasses.replace(CONFIG, ffn=192)  # 3 blocks of 64 inputs in `down`
    graph, params, _ = adapted(Options(Lora(rank=4), base="nf4"), config)
    with (
        jax.set_mesh(mesh_for(Parallel(data=4, tensor=2))),
        pytest.raises(ValueError, match=r"parallel.tensor: 2 devices do not divide the 3 blocks"),
    ):
        nnx.merge(graph, params)(jnp.asarray(X_BTD), Draws(), None)
