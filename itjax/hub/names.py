"""Where each of our parameters lies in a published folder: one table per family.

Ours are stacked: `layers/attn/q/kernel` leads with a dimension of layers, and that of an expert with one of experts behind
it. Theirs is a tensor per layer (and expert), of two dimensions (outputs, inputs).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors that hold it.

    `name` has the fields {layer} and {expert} where there is one tensor for each. What remains of our shape behind those
    dimensions is (inputs..., outputs...): the first `contract` of them are inputs.
    """

    path: str  # ours: "layers/attn/q/kernel"
    name: str  # theirs: "model.layers.{layer}.self_attn.q_proj.weight"
    contract: int = 0  # of a kernel: how many dimensions are inputs; 0: a vector or a table, which only takes our shape
    experts: bool = False  # ours leads, behind the layers, with experts; theirs too where `name` has no {expert}
    flip: bool = True  # theirs is (outputs, inputs)
    part: slice | None = None  # of their dimension of outputs, where one tensor holds several parameters
