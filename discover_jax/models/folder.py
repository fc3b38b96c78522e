"""Checkpoint folders in Hugging Face's layout: config.json and *.safetensors, experts in MXFP4 or dequantised."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.gpt_oss import Model
from discover_jax.models.mxfp4 import dequantise, quantise
from discover_jax.models.parameters import Tree

_SINGLE = {
    ("embedding",): "model.embed_tokens.weight",
    ("norm",): "model.norm.weight",
    ("head", "weight"): "lm_head.weight",
}
# Within a layer; {expert matrices} apart, since they come in two forms.
_LAYER = {
    ("attention", "norm"): "input_layernorm.weight",
    ("attention", "sinks"): "self_attn.sinks",
    **{("attention", name, kind): f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")},
    ("experts", "norm"): "post_attention_layernorm.weight",
    ("experts", "router", "weight"): "mlp.router.weight",
    ("experts", "router", "bias"): "mlp.router.bias",
    ("experts", "gate_up", "bias"): "mlp.experts.gate_up_proj_bias",
    ("experts", "down", "bias"): "mlp.experts.down_proj_bias",
}
_MATRICES = ("gate_up", "down")
_KINDS = ("sliding", "full")


@dataclasses.dataclass(frozen=True)
class _Folder:
    """Where each tensor of a folder lies."""

    path: Path
    file_of: dict[str, str]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, checked against the shape that the config demands."""
        if name not in self.file_of:
            raise WeightsError(
                f"{self.path} has no tensor {name!r} (it has {len(self.file_of)} others). The download is incomplete, or this is another"
                " architecture; fetch the folder again."
            )
        file = self.path / self.file_of[name]
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                found = tuple(opened.get_slice(name).get_shape())
                if found != shape:
                    raise WeightsError(
                        f"Tensor {name!r} in {file} has shape {found}; config.json demands {shape}. They do not belong together."
                    )
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"Tensor {name!r} cannot be read from {file}: {error}. The file is damaged or missing; fetch it again."
            ) from error


def _open(path: Path) -> tuple[ModelConfig, _Folder]:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise WeightsError(
            f"No weights at {str(path)!r}: it has no config.json. Set config.model.weights to a folder with config.json and *.safetensors,"
            " or to 'apprentice' for the small model that ships with the project."
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path / 'config.json'} cannot be read: {error}. Fetch the folder again.") from error
    index = path / "model.safetensors.index.json"
    try:
        if index.exists():
            file_of = dict(json.loads(index.read_text())["weight_map"])
        else:
            file_of = {}
            for file in sorted(path.glob("*.safetensors")):
                with safetensors.safe_open(file, framework="numpy") as opened:
                    file_of |= dict.fromkeys(opened.keys(), file.name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"The tensors of {path} cannot be listed: {error}. A file is damaged or missing; fetch the folder again."
        ) from error
    if not file_of:
        raise WeightsError(f"{path} has a config.json but no *.safetensors; fetch the weights too.")
    return ModelConfig.from_hf(config), _Folder(path, file_of)


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of the model in a folder.

    Raises:
      WeightsError: there is no readable config.json of a gpt-oss model.
    """
    return _open(Path(path))[0]


def load_folder(path: str | Path, *, dtype: Any = jnp.float32, experts: str = "dense") -> tuple[ModelConfig, Tree]:
    """Reads a folder as the frozen tree of `Model(config, dtype=dtype, experts=experts)`.

    Raises:
      WeightsError: a file or tensor is missing, damaged, or of another shape or type; the message names it.
    """
    config, folder = _open(Path(path))
    model = Model(config, LoraConfig(0, 0, 0), dtype=dtype, experts=experts)
    packed_on_disk = any(name.endswith("gate_up_proj_blocks") for name in folder.file_of)

    def leaf(path: tuple[str, ...], struct: jax.ShapeDtypeStruct) -> jax.Array:
        if path in _SINGLE:
            return jnp.asarray(folder.read(_SINGLE[path], struct.shape), struct.dtype)
        _, kind, *inside = path  # pairs, sliding or full, ...
        layers = range(_KINDS.index(kind), config.num_layers, 2)
        prefixes = [f"model.layers.{layer}." for layer in layers]
        place, shape = tuple(inside), struct.shape[1:]
        if place in _LAYER:
            return jnp.asarray(np.stack([folder.read(prefix + _LAYER[place], shape) for prefix in prefixes]), struct.dtype)
        read = _matrix_reader(folder, packed_on_disk)
        return jnp.stack([read(prefix, inside[1], inside[2], shape, struct.dtype) for prefix in prefixes])

    return config, _map_with_path(leaf, model.abstract_frozen())


def _matrix_reader(folder: _Folder, packed_on_disk: bool) -> Callable[..., jax.Array]:
    """A function (prefix, matrix, form wanted, shape wanted, dtype) -> array, for the form on disk."""

    def packed(prefix: str, matrix: str, form: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        name = f"{prefix}mlp.experts.{matrix}_proj_"
        if form != "weight":
            array = folder.read(name + form, shape)
            if array.dtype != np.uint8:
                raise WeightsError(f"Tensor {name + form!r} of {folder.path} is {array.dtype}; MXFP4 is uint8.")
            return jnp.asarray(array)
        blocks = folder.read(name + "blocks", (*shape[:-1], shape[-1] // 32, 16))
        scales = folder.read(name + "scales", (*shape[:-1], shape[-1] // 32))
        return dequantise(jnp.asarray(blocks), jnp.asarray(scales), dtype)

    def plain(prefix: str, matrix: str, form: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        name = f"{prefix}mlp.experts.{matrix}_proj"
        if form != "weight":
            raise WeightsError(
                f"{folder.path} holds dequantised experts ({name}); they are not packed again, which would lose digits. Set"
                " config.model.experts='dense', or use the MXFP4 checkpoint."
            )
        experts, out, into = shape
        return jnp.asarray(folder.read(name, (experts, into, out)).swapaxes(1, 2), dtype)  # on disk [E, in, out]

    return packed if packed_on_disk else plain


def _map_with_path(function: Callable[[tuple[str, ...], Any], Any], tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(tuple(key.key for key in path), leaf), tree)


def _tensors(config: ModelConfig, frozen: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint by its Hugging Face name: bfloat16, and experts as MXFP4 `blocks` and `scales`."""

    def bf16(array: jax.Array) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(array, dtype=ml_dtypes.bfloat16))

    for path, name in _SINGLE.items():
        yield name, bf16(_at(frozen, path))
    for layer in range(config.num_layers):
        tree, pair = frozen["pairs"][_KINDS[layer % 2]], layer // 2
        for path, name in _LAYER.items():
            yield f"model.layers.{layer}.{name}", bf16(_at(tree, path)[pair])
        for matrix in _MATRICES:
            arrays = tree["experts"][matrix]
            blocks, scales = (arrays["blocks"][pair], arrays["scales"][pair]) if "blocks" in arrays else quantise(arrays["weight"][pair])
            name = f"model.layers.{layer}.mlp.experts.{matrix}_proj_"
            yield name + "blocks", np.asarray(blocks)
            yield name + "scales", np.asarray(scales)


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def save_folder(path: str | Path, config: ModelConfig, frozen: Tree) -> None:
    """Writes config.json and model.safetensors, each replaced at once, in bfloat16 with experts in MXFP4.

    Args:
      path: the folder; made if it is not there. Other files in it stay.
      frozen: of a `Model` of that config, packed or dense; dense experts are rounded to the nearest MXFP4.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save(dict(_tensors(config, frozen)), metadata={"format": "pt"})
    for name, content in (("model.safetensors", data), ("config.json", json.dumps(config.to_hf(), indent=2).encode() + b"\n")):
        temporary = path / (name + ".writing")
        temporary.write_bytes(content)
        temporary.replace(path / name)
