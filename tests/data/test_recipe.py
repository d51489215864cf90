"""What a recipe promises: the shares that a config asks for, in the unit it names, at every step."""

import numpy as np
import pytest

from itjax.base.schema import Mixture, Source, Stage
from itjax.data import recipe
from itjax.data.recipe import Node, Recipe, Size

MAILS, SUMS, POEMS = Size(60, 600, 300), Size(30, 60, 30), Size(10, 340, 10)


def made(sources: dict[str, Source], mixture: Mixture | None = None, *, others=(), files=None, **sizes: Size) -> Recipe:
    """The recipe of a config; a source is opened as one leaf unless `files` names several."""
    opened = {path: [path] for path in _paths(sources)} | (files or {})
    root = recipe.tree(sources, mixture or Mixture(), opened=opened, others=others)
    return recipe.resolve(root, {name.replace("__", "/"): size for name, size in sizes.items()})


def _paths(sources, prefix=""):
    for name, source in sources.items():
        yield from _paths(source.sources, f"{prefix}{name}/") if source.sources else [f"{prefix}{name}"]


def shares(found: Recipe, step: int = 0, **changes) -> dict[str, float]:
    return dict(zip(found.names, found.shares(step, **changes).round(6).tolist(), strict=True))


def test_without_settings_a_source_has_the_share_of_its_size():
    sources = {"mails": Source(), "sums": Source()}
    for unit, expected in (("examples", 60 / 90), ("tokens", 600 / 660), ("trained_tokens", 300 / 330)):
        found = made(sources, Mixture(unit=unit), mails=MAILS, sums=SUMS)
        assert shares(found)["mails"] == pytest.approx(expected, abs=1e-6)
        assert found.in_examples(found.shares(0)).tolist() == pytest.approx([60 / 90, 30 / 90])


def test_half_the_tokens_as_a_share_of_the_examples():
    """A mail has 10 tokens and a sum 2: five sums for a mail."""
    found = made(
        {"mails": Source(weight=1.0), "sums": Source(weight=1.0)}, Mixture(unit="tokens"), mails=MAILS, sums=SUMS
    )
    assert found.shares(0).tolist() == [0.5, 0.5]
    assert found.in_examples(found.shares(0)).tolist() == pytest.approx([1 / 6, 5 / 6])


def test_files_without_settings_stand_beside_sources_with_them():
    found = made({"mails": Source(weight=0.5)}, others=("sums", "poems"), sums=SUMS, poems=POEMS, mails=MAILS)
    assert shares(found) == {"sums": 0.375, "poems": 0.125, "mails": 0.5}


def test_the_files_of_one_source_share_its_weight_by_size():
    sources = {"both": Source(weight=3.0), "mails": Source(weight=1.0)}
    files = {"both": ["both/sums", "both/poems"]}
    found = made(sources, files=files, both__sums=SUMS, both__poems=POEMS, mails=MAILS)
    assert shares(found) == {"both/sums": 0.5625, "both/poems": 0.1875, "mails": 0.25}


def test_the_files_of_one_source_may_have_rules_of_their_own():
    sources = {"both": Source(weight=0.5, mixture=Mixture(cap=20)), "mails": Source(weight=0.5)}
    files = {"both": ["both/sums", "both/poems"]}
    found = made(sources, files=files, both__sums=SUMS, both__poems=POEMS, mails=MAILS)
    assert shares(found) == {"both/sums": round(1 / 3, 6), "both/poems": round(1 / 6, 6), "mails": 0.5}


TASKS = {"tasks": Source(sources={"sums": Source(), "poems": Source()}, mixture=Mixture(rates="equal"), weight=0.5)}


def test_a_nested_mixture_divides_its_weight_by_its_own_rules():
    found = made(TASKS | {"mails": Source(weight=0.5)}, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert shares(found) == {"tasks/sums": 0.25, "tasks/poems": 0.25, "mails": 0.5}


def test_a_nested_mixture_of_another_unit_is_converted_by_mean_lengths():
    """Of 36 tokens of `tasks`, 2 are of a sum and 34 of a poem: as many examples of each, as `tasks` says."""
    sources = TASKS | {"mails": Source(weight=0.5)}
    found = made(sources, Mixture(unit="tokens"), tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert found.shares(0).tolist() == pytest.approx([0.5 * 2 / 36, 0.5 * 34 / 36, 0.5])
    sums, poems, _ = found.in_examples(found.shares(0))
    assert sums == pytest.approx(poems)


def test_a_group_without_a_weight_counts_as_large_as_its_members_together():
    group = {"tasks": Source(sources={"sums": Source(), "poems": Source()})}
    found = made(group | {"mails": Source()}, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert shares(found) == {"tasks/sums": 0.3, "tasks/poems": 0.1, "mails": 0.6}


STAGED = Mixture(
    stages={
        "late": Stage(start=20, weights={"mails": 1.0, "sums": 3.0}),
        "sums only": Stage(start=10, weights={"mails": 0.0}),
    }
)


def test_a_stage_changes_the_weights_that_it_names_from_its_step_on():
    found = made({"mails": Source(weight=1.0), "sums": Source(weight=1.0)}, STAGED, mails=MAILS, sums=SUMS)
    assert found.starts == (0, 10, 20)
    assert [found.stage(step) for step in (9, 10, 19, 20)] == ["", "sums only", "sums only", "late"]
    assert [found.shares(step)[0] for step in (0, 9, 10, 19, 20, 999)] == [0.5, 0.5, 0, 0, 0.25, 0.25]


def test_stages_of_a_nested_mixture_have_their_own_steps():
    inner = Mixture(stages={"later": Stage(start=5, weights={"sums": 1.0, "poems": 1.0})})
    sources = {"tasks": Source(sources={"sums": Source(), "poems": Source()}, mixture=inner), "mails": Source()}
    outer = Mixture(rates="equal", stages={"late": Stage(start=8, weights={"mails": 0.2})})
    found = made(sources, outer, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert found.starts == (0, 5, 8)
    assert [found.stage(step) for step in found.starts] == ["", "tasks/later", "late, tasks/later"]
    assert [shares(found, step)["tasks/sums"] for step in found.starts] == [0.375, 0.25, 0.4]


def test_the_share_of_an_exhausted_source_goes_to_its_group_first():
    found = made(TASKS | {"mails": Source(weight=0.5)}, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert shares(found, without=frozenset([0])) == {"tasks/sums": 0, "tasks/poems": 0.5, "mails": 0.5}
    assert shares(found, without=frozenset([0, 1])) == {"tasks/sums": 0, "tasks/poems": 0, "mails": 1}
    assert not any(shares(found, without=frozenset([0, 1, 2])).values())


def test_a_limit_of_a_group_holds_for_members_without_their_own():
    inner = {"sums": Source(max_epochs=1.0), "poems": Source()}
    found = made({"tasks": Source(sources=inner, max_epochs=3.0), "mails": Source()}, tasks__sums=SUMS,
                 tasks__poems=POEMS, mails=MAILS)  # fmt: skip
    assert found.limits == (1.0, 3.0, None)


def test_a_source_of_which_nothing_is_left_gives_its_share_to_the_others():
    sources = {"mails": Source(weight=1.0), "lost": Source(weight=2.0), "sums": Source(weight=1.0)}
    stages = {"late": Stage(start=5, weights={"lost": 9.0})}
    found = made(sources, Mixture(stages=stages), mails=MAILS, sums=SUMS)
    assert found.names == ("mails", "sums")
    assert found.shares(5).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "mixture, expected",
    [
        (Mixture(), "by size in examples"),
        (Mixture(cap=3000, temperature=2, unit="tokens"), "by size in tokens, at most 3,000 each, to the power 1/2"),
        (Mixture(rates="unimax", budget=1e6), "UniMax: 1,000,000 examples in all, at most 4 passes"),
        (Mixture(rates="equal", stages={"late": Stage(start=3)}), "equal, in 1 stage"),
    ],
)
def test_the_rule_is_said_in_words(mixture, expected):
    assert made({"mails": Source()}, mixture, mails=MAILS).rule == expected


def test_the_rule_names_weights_and_nested_mixtures():
    found = made(TASKS | {"mails": Source()}, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
    assert found.rule == "1 of 2 weights given, the rest by size in examples; tasks: equal"


@pytest.mark.parametrize(
    "mixture, sizes, message",
    [
        (
            Mixture(stages={"late": Stage(5, {"mals": 1.0})}),
            {"mails": MAILS, "sums": SUMS},
            r"config.mixture.stages.late.weights.mals: no such source. Did you mean 'mails'\? Known: mails, sums",
        ),
        (Mixture(), {}, "none with an example"),
        (Mixture(), {"poems": POEMS}, "sources.poems: is not in the mixture"),
        (Mixture(unit="trained_tokens"), {"mails": Size(3, 9, 0)}, "sources.mails: has no trained tokens"),
        (Mixture(stages={"late": Stage(5, {"mails": 1.0})}), {"mails": MAILS, "sums": SUMS}, "leaves nothing"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_by_name(mixture, sizes, message):
    with pytest.raises(ValueError, match=message):
        made({"mails": Source(), "sums": Source()}, mixture, **sizes)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"sources\.mails: two sources have this name"):
        recipe.resolve(Node("", members=(Node("mails"), Node("mails"))), {"mails": MAILS})


def test_shares_add_up_to_one_whatever_the_rules():
    draw = np.random.default_rng(0)
    for _ in range(50):
        inner = Mixture(unit=str(draw.choice(["examples", "tokens"])), temperature=float(draw.uniform(0.5, 4)))
        sources = {"tasks": Source(sources={"sums": Source(), "poems": Source()}, mixture=inner), "mails": Source()}
        outer = Mixture(unit=str(draw.choice(["examples", "tokens"])), cap=float(draw.integers(1, 500)))
        found = made(sources, outer, tasks__sums=SUMS, tasks__poems=POEMS, mails=MAILS)
        assert found.shares(0).sum() == pytest.approx(1)
        assert found.in_examples(found.shares(0)).sum() == pytest.approx(1)
