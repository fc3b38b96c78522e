"""The decoder's module without arrays, and binding trees of arrays to it."""

import dataclasses
import functools
from typing import Any

from flax import nnx

from discover_jax.kernels.kernel_set import KernelSet
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.layers import Decoder
from discover_jax.models.parameters import Frozen, Lora, Tree


@dataclasses.dataclass(frozen=True)
class Declared:
    """A model's nnx module without arrays, split into graph and states."""

    graph: nnx.GraphDef
    frozen: nnx.State
    lora: nnx.State


@functools.cache
def declared(config: ModelConfig, lora: LoraConfig, dtype: Any, kernels: KernelSet, form: str) -> Declared:
    """The module of a model. `form` is that of the experts' matrices, see `Model.experts`."""
    module = Decoder(config, lora, dtype, kernels, form=form)
    return Declared(*nnx.split(module, Frozen, Lora))


def bind(declared: Declared, frozen: Tree, lora: Tree | None) -> Decoder:
    """The module with these arrays. Parameters that are not in the trees stay declarations."""

    def bound(state: nnx.State, tree: Tree | None) -> nnx.State:
        bound = nnx.map_state(lambda _, variable: variable.copy(), state)
        if tree:
            nnx.replace_by_pure_dict(bound, tree)
        return bound

    return nnx.merge(declared.graph, bound(declared.frozen, frozen), bound(declared.lora, lora))


def split_matrices(tree: Tree, names: tuple[str, ...]) -> tuple[Tree, Tree]:
    """The tree of layers without the nodes of these names, and a tree with only those nodes."""
    rest: Tree = {}
    matrices: Tree = {}
    for name, node in tree.items():
        if name in names:
            matrices[name] = node
        elif isinstance(node, dict):
            rest[name], matrices[name] = split_matrices(node, names)
        else:
            rest[name] = node
    return rest, matrices


def join(first: Tree, second: Tree) -> Tree:
    """The union of two trees without common leaves."""
    shared = {name: join(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **shared}
