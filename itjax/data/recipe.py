"""What share each source has at every step: from the weights, rates and stages of a config to numbers.

    config.sources            config.mixture, unit = tokens       shares of the tokens      at step 1,000
    mails   weight 0.5                                            mails       1/2           3/4
    tasks   sums, poems       rates = equal                       tasks/sums  1/4           1/8
                              stages.late: start 1,000,           tasks/poems 1/4           1/8
                                           weights mails 0.75

A share is always a share of the outermost mixture's unit. A nested mixture divides its own share by its own rules, in
its own unit; from one unit to another a source is converted by the mean of its examples.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from itjax.base.freeze import nearest
from itjax.base.schema import Mixture, Source
from itjax.data import mixture


class Size(NamedTuple):
    """What one pass over a source holds: the kept examples of its first edition."""

    examples: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Node:
    """A source, or several that share one weight. The root has no name, and its mixture is that of the run."""

    name: str
    weight: float | None = None
    scale: float = 1.0
    max_epochs: float | None = None
    mixture: Mixture = field(default_factory=Mixture)  # of the members
    members: tuple["Node", ...] = ()

    def leaves(self) -> Iterator["Node"]:
        if not self.members:
            yield self
        for member in self.members:
            yield from member.leaves()

    def groups(self) -> Iterator["Node"]:
        """Every node with members, outermost first."""
        if self.members:
            yield self
        for member in self.members:
            yield from member.groups()


# --- a config as a tree -----------------------------------------------------------------------------------------------


def tree(
    sources: Mapping[str, Source], run_mixture: Mixture, *, opened: Mapping[str, Sequence[str]], others: Sequence[str]
) -> Node:
    """The sources of a config as a tree whose leaves are what was opened.

    `opened` has the names of what each leaf of `sources` (`mails`, `tasks/sums`) was opened as: one, or one a file; the
    files of a source are a nested mixture. `others` are sources without settings: `config.files`.
    """
    named = _nodes(sources, "", opened)
    return Node("", mixture=run_mixture, members=(*(Node(name) for name in others), *named))


def _nodes(sources: Mapping[str, Source], prefix: str, opened: Mapping[str, Sequence[str]]) -> tuple[Node, ...]:
    return tuple(_node(f"{prefix}{name}", source, opened) for name, source in sources.items())


def _node(path: str, source: Source, opened: Mapping[str, Sequence[str]]) -> Node:
    node = Node(path, weight=source.weight, scale=source.scale, max_epochs=source.max_epochs, mixture=source.mixture)
    if source.sources:
        return dataclasses.replace(node, members=_nodes(source.sources, f"{path}/", opened))
    names = opened[path]
    if list(names) == [path]:
        return dataclasses.replace(node, mixture=Mixture())
    return dataclasses.replace(node, members=tuple(Node(name) for name in names))


def plain(names: Sequence[str], weights: Sequence[float | None]) -> Node:
    """Sources side by side with a weight or None each, as shares of the examples."""
    if len(names) != len(weights):
        raise ValueError(
            f"sources: {len(names)} sources and {len(weights)} weights; give one weight (or None) a source"
        )
    return Node("", members=tuple(Node(name, weight=weight) for name, weight in zip(names, weights, strict=True)))


# --- a tree and what is in the sources, as shares ---------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Shares of the sources `names` at any step. `resolve` makes it and checks it."""

    root: Node
    sizes: Mapping[str, Size]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def unit(self) -> str:
        return self.root.mixture.unit

    @property
    def exhausted(self) -> str:
        return self.root.mixture.exhausted

    @property
    def starts(self) -> tuple[int, ...]:
        """The steps, from 0, from which on other shares hold; the first is 0."""
        return tuple(
            sorted({0} | {stage.start for group in self.root.groups() for stage in group.mixture.stages.values()})
        )

    def stage(self, step: int) -> str:
        """Names of the stages in force; nothing before the first."""
        found = [(group.name, _stage(group.mixture, step)) for group in self.root.groups()]
        return ", ".join(f"{group}/{stage}" if group else stage for group, stage in found if stage)

    def shares(self, step: int, *, without: frozenset[int] = frozenset()) -> np.ndarray:
        """Of every source, in `unit`, adding up to 1. The share of a source in `without` goes to the others of its group.

        All 0 when nothing is left.
        """
        gone = frozenset(self.names[number] for number in without)
        found = self._inside(self.root, step, gone)
        return np.array([found.get(name, 0.0) for name in self.names])

    def in_examples(self, shares: np.ndarray) -> np.ndarray:
        """Shares of `unit` as shares of the examples."""
        if self.unit == "examples":
            return shares
        counts = shares / [self._mean(name, self.unit) for name in self.names]
        return counts / counts.sum()

    @property
    def limits(self) -> tuple[float | None, ...]:
        """Passes over each source at most; what a group says holds for each of its members that says nothing."""
        found = dict(_limits(self.root, None))
        return tuple(found[name] for name in self.names)

    @property
    def rule(self) -> str:
        """How the shares come about, in words."""
        words = [
            f"{group.name + ': ' if group.name else ''}{_rule(group)}"
            for group in self.root.groups()
            if not group.name or group.mixture != Mixture()
        ]
        return "; ".join(words)

    def key(self) -> str:
        """All settings that the order of examples depends on; what is in the sources is not in it."""
        return repr(self.root)

    def _inside(self, node: Node, step: int, gone: frozenset[str]) -> dict[str, float]:
        """Shares of the sources in a node, of the node's own share and in its mixture's unit."""
        unit, stage = node.mixture.unit, _stage(node.mixture, step)
        given = node.mixture.stages[stage].weights if stage else {}
        weights = [given.get(_within(node, member), member.weight) for member in node.members]
        drawn = [member for member, weight in zip(node.members, weights, strict=True) if weight != 0]
        rates = mixture.rates(
            [self._size(member, unit) for member in drawn],
            [weight for weight in weights if weight != 0],
            node.mixture,
            scales=[member.scale for member in drawn],
        )
        found: dict[str, float] = {}
        left = [
            (rate, inside)
            for rate, member in zip(rates.tolist(), drawn, strict=True)
            if (inside := self._member(member, step, gone, unit))
        ]
        total = 1.0 if len(left) == len(drawn) else sum(rate for rate, _ in left)
        for rate, inside in left:
            found |= {name: rate / total * share for name, share in inside.items()}
        return found

    def _member(self, member: Node, step: int, gone: frozenset[str], unit: str) -> dict[str, float]:
        """Shares of the sources in a member, of the member's share, in the unit of who asks. Nothing if all are gone."""
        if not member.members:
            return {} if member.name in gone else {member.name: 1.0}
        found, own = self._inside(member, step, gone), member.mixture.unit
        if own == unit or not found:
            return found
        amounts = {name: share * self._mean(name, unit) / self._mean(name, own) for name, share in found.items()}
        total = sum(amounts.values())
        return {name: amount / total for name, amount in amounts.items()}

    def _size(self, node: Node, unit: str) -> int:
        return sum(getattr(self.sizes[leaf.name], unit) for leaf in node.leaves())

    def _mean(self, name: str, unit: str) -> float:
        return getattr(self.sizes[name], unit) / self.sizes[name].examples


def resolve(root: Node, sizes: Mapping[str, Size]) -> Recipe:
    """The recipe for the sources that have examples; the others of the tree are left out of it.

    Raises ValueError for names that are unknown, and for weights that leave nothing to others.
    """
    names = [leaf.name for leaf in root.leaves()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources.{twice[0]}: two sources have this name; give each its own")
    if missing := [name for name in sizes if name not in names]:
        raise ValueError(f"sources.{missing[0]}: is not in the mixture.{nearest(missing[0], names)}")
    for group in root.groups():
        _check_stages(group)
    kept = _pruned(root, sizes)
    if kept is None:
        raise ValueError("sources: there are none with an example; give files or sources, or see why rows are dropped")
    recipe = Recipe(kept, {name: size for name, size in sizes.items() if size.examples})
    for unit in {group.mixture.unit for group in kept.groups()}:
        for name, size in recipe.sizes.items():
            if not getattr(size, unit):
                raise ValueError(f"sources.{name}: has no {unit.replace('_', ' ')}; remove it, or choose another unit")
    for start in recipe.starts:
        recipe.shares(start)
    return recipe


def _pruned(node: Node, sizes: Mapping[str, Size]) -> Node | None:
    if not node.members and node.name:
        return node if node.name in sizes and sizes[node.name].examples else None
    members = tuple(kept for member in node.members if (kept := _pruned(member, sizes)))
    return dataclasses.replace(node, members=members) if members else None


def _check_stages(group: Node) -> None:
    known = [_within(group, member) for member in group.members]
    place = f"sources.{group.name.replace('/', '.sources.')}.mixture" if group.name else "mixture"
    for name, stage in group.mixture.stages.items():
        for source in stage.weights:
            if source not in known:
                raise ValueError(
                    f"config.{place}.stages.{name}.weights.{source}: no such source.{nearest(source, known)} "
                    f"Known: {', '.join(known)}"
                )


def _within(group: Node, member: Node) -> str:
    """The member's name as its group's config says it: `sums` of `tasks/sums`."""
    return member.name.removeprefix(f"{group.name}/") if group.name else member.name


def _stage(rules: Mixture, step: int) -> str:
    """The stage with the latest start that is not after the step."""
    begun = {name: stage.start for name, stage in rules.stages.items() if stage.start <= step}
    return max(begun, key=lambda name: begun[name], default="")


def _limits(node: Node, outer: float | None) -> Iterator[tuple[str, float | None]]:
    limit = outer if node.max_epochs is None else node.max_epochs
    if not node.members:
        yield node.name, limit
    for member in node.members:
        yield from _limits(member, limit)


def _rule(group: Node) -> str:
    rules, given = group.mixture, sum(member.weight is not None for member in group.members)
    if given == len(group.members):
        words = "weights given"
    else:
        words = f"{given} of {len(group.members)} weights given, the rest " if given else ""
        words += _RULES[rules.rates](rules)
    return f"{words}, in {len(rules.stages)} stage{'s' * (len(rules.stages) != 1)}" if rules.stages else words


def _proportional(rules: Mixture) -> str:
    words = f"by size in {rules.unit.replace('_', ' ')}"
    words += f", at most {rules.cap:,.0f} each" if rules.cap is not None else ""
    return words + (f", to the power 1/{rules.temperature:g}" if rules.temperature != 1 else "")


def _unimax(rules: Mixture) -> str:
    return f"UniMax: {rules.budget:,.0f} {rules.unit.replace('_', ' ')} in all, at most {rules.max_epochs:g} passes"


_RULES: Mapping[str, Any] = {"proportional": _proportional, "unimax": _unimax, "equal": lambda rules: "equal"}
