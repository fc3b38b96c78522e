"""Names and arrangement of a checkpoint's tensors on disk. Each family of models declares its layouts.

A parameter's path is its position in the frozen tree (`Model.abstract_frozen`), such as ("embedding",). For a parameter of a layer, it is
the position within the layer, such as ("attention", "q", "weight"); the layer's number is passed separately.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from discover_jax.models.config import ModelConfig

ParamPath = tuple[str, ...]

TensorEntry = tuple[str, tuple[ParamPath, ...], int | None]
"""A tensor on disk: its name, the parameters whose rows it concatenates, and their layer (None outside of layers)."""

MATRICES = ("gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and arrangement of the tensors on disk.

    Attributes:
      singles: name -> path, for tensors outside of layers.
      layers: name within a layer -> paths of the parameters whose rows the tensor concatenates.
      prefix: prefix of the names in a layer; contains `{layer}`.
      file: name of each file if there are several; contains `{number}` and `{count}`.
      marker: name of a tensor that only this layout of the family has, of those not listed before it.
      transposed: the experts' matrices are dense and stored as [E, in, out]; the tree has [E, out, in].
      writable: whether folders can be written in this layout.
    """

    name: str
    singles: Mapping[str, ParamPath]
    layers: Mapping[str, tuple[ParamPath, ...]]
    prefix: str
    file: str
    marker: str
    transposed: bool = False
    writable: bool = True

    def tensors(self, num_layers: int) -> Iterable[TensorEntry]:
        """Every tensor of a model, in the order of the layers."""
        singles: list[TensorEntry] = [(name, (path,), None) for name, path in self.singles.items()]
        yield singles[0]
        for layer in range(num_layers):
            for name, paths in self.layers.items():
                yield self.prefix.format(layer=layer) + name, paths, layer
        yield from singles[1:]

    def is_transposed(self, path: ParamPath) -> bool:
        """Whether this parameter's last two axes are swapped on disk."""
        return self.transposed and path[0] == "experts" and path[1] in MATRICES and path[-1] == "weight"


HF_FILE = "model-{number:05d}-of-{count:05d}.safetensors"
HF_PREFIX = "model.layers.{layer}."
HF_EMBEDDING = "model.embed_tokens.weight"
HF_NAME = "huggingface"
"""Name of the layout that `transformers` reads, in every family."""


def paths_of(tree: dict[str, Any], config: ModelConfig, kind: str = "") -> dict[ParamPath, Any]:
    """The leaves of a frozen tree by path. A layer's parameter is the stack over all layers of a kind, by default the pattern's first."""
    flat: dict[ParamPath, Any] = {}

    def walk(node: Any, path: ParamPath) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, (*path, key))
        else:
            flat[path] = node

    walk({name: node for name, node in tree.items() if name != config.stack}, ())
    walk(tree[config.stack][kind or config.pattern[0]], ())
    return flat
