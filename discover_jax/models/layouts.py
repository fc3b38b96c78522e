"""Names of a checkpoint's tensors in each layout of gpt-oss.

A parameter's path is its position in the frozen tree (`Model.abstract_frozen`), such as ("embedding",). For a parameter of a layer, it is
the position within the layer, such as ("attention", "q", "weight"); the layer's number is passed separately.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

ParamPath = tuple[str, ...]

TensorEntry = tuple[str, tuple[ParamPath, ...], int | None]
"""A tensor on disk: its name, the parameters whose rows it concatenates, and their layer (None outside of layers)."""

LAYER_KINDS = ("sliding", "full")
"""Kind of the layers with an even and with an odd index, as keys in the frozen and the adapter's tree."""

MATRICES = ("gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and arrangement of the tensors on disk.

    Attributes:
      singles: name -> path, for tensors outside of layers.
      layers: name within a layer -> paths of the parameters whose rows the tensor concatenates.
      prefix: prefix of the names in a layer; contains `{layer}`.
      file: name of each file if there are several; contains `{number}` and `{count}`.
      transposed: the experts' matrices are dense and stored as [E, in, out]; the tree has [E, out, in].
    """

    name: str
    singles: Mapping[str, ParamPath]
    layers: Mapping[str, tuple[ParamPath, ...]]
    prefix: str
    file: str
    transposed: bool = False

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


_ATTENTION = {f"self_attn.{name}_proj.{kind}": (("attention", name, kind),) for name in "qkvo" for kind in ("weight", "bias")}
_HF_LAYERS = {
    "input_layernorm.weight": (("attention", "norm"),),
    **_ATTENTION,
    "self_attn.sinks": (("attention", "sinks"),),
    "post_attention_layernorm.weight": (("experts", "norm"),),
    "mlp.router.weight": (("experts", "router", "weight"),),
    "mlp.router.bias": (("experts", "router", "bias"),),
    **{f"mlp.experts.{matrix}_proj_bias": (("experts", matrix, "bias"),) for matrix in MATRICES},
}
_HF_SINGLES = {"model.embed_tokens.weight": ("embedding",), "model.norm.weight": ("norm",), "lm_head.weight": ("head", "weight")}
_HF = {"singles": _HF_SINGLES, "prefix": "model.layers.{layer}.", "file": "model-{number:05d}-of-{count:05d}.safetensors"}

HUGGINGFACE = Layout(
    "huggingface",
    layers=_HF_LAYERS
    | {f"mlp.experts.{matrix}_proj_{form}": (("experts", matrix, form),) for matrix in MATRICES for form in ("blocks", "scales")},
    **_HF,
)
HUGGINGFACE_DENSE = Layout(
    "huggingface, dequantised",
    layers=_HF_LAYERS | {f"mlp.experts.{matrix}_proj": (("experts", matrix, "weight"),) for matrix in MATRICES},
    transposed=True,
    **_HF,
)
ORIGINAL = Layout(
    "original",
    singles={"embedding.weight": ("embedding",), "norm.scale": ("norm",), "unembedding.weight": ("head", "weight")},
    layers={
        "attn.norm.scale": (("attention", "norm"),),
        **{f"attn.qkv.{kind}": tuple(("attention", name, kind) for name in "qkv") for kind in ("weight", "bias")},
        **{f"attn.out.{kind}": (("attention", "o", kind),) for kind in ("weight", "bias")},
        "attn.sinks": (("attention", "sinks"),),
        "mlp.norm.scale": (("experts", "norm"),),
        **{f"mlp.gate.{kind}": (("experts", "router", kind),) for kind in ("weight", "bias")},
        **{
            f"mlp.mlp{number}_weight.{form}": (("experts", matrix, form),)
            for number, matrix in enumerate(MATRICES, 1)
            for form in ("blocks", "scales")
        },
        **{f"mlp.mlp{number}_bias": (("experts", matrix, "bias"),) for number, matrix in enumerate(MATRICES, 1)},
    },
    prefix="block.{layer}.",
    file="model--{number:05d}-of-{count:05d}.safetensors",
)
LAYOUTS = {layout.name: layout for layout in (HUGGINGFACE, ORIGINAL)}
"""Layouts that can be written. Dequantised experts can only be read."""


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout to which these tensor names belong; None if they are not gpt-oss's."""
    names = set(names)
    if "embedding.weight" in names:
        return ORIGINAL
    if "model.embed_tokens.weight" not in names:
        return None
    return HUGGINGFACE_DENSE if any(name.endswith("mlp.experts.gate_up_proj") for name in names) else HUGGINGFACE


def paths_of(tree: dict[str, Any], kind: str = "sliding") -> dict[ParamPath, Any]:
    """The leaves of a frozen tree by path. A layer's parameter is the stack over all layers of `kind`, "sliding" or "full"."""
    flat: dict[ParamPath, Any] = {}

    def walk(node: Any, path: ParamPath) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, (*path, key))
        else:
            flat[path] = node

    walk({name: node for name, node in tree.items() if name != "pairs"}, ())
    walk(tree["pairs"][kind], ())
    return flat
