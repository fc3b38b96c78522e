"""Adapters in the format of `peft`: a folder with adapter_config.json and adapter_model.safetensors, without using peft or torch.

The format is that of peft 0.21 over transformers' GptOssForCausalLM. Linear layers (q, k, v, o, lm_head) have lora_A [r, in] and
lora_B [out, r], as here. The experts' matrices are not layers but parameters [E, in, out], which peft adapts through `target_parameters`
(peft.tuners.lora.layer.ParamWrapper): one pair of matrices serves all experts of a layer,

    lora_A [E r, in]: row e r + i is row i of expert e's A,
    lora_B [out, r E]: column i E + e is column i of expert e's B, so that here the experts are the faster index.

Both matrices belong to one module, so peft wraps it twice. The tensors of gate_up_proj are the inner wrapper's, `experts.base_layer`, and
those of down_proj the outer one's, `experts`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from safetensors import SafetensorError

from discover_jax.exceptions import WeightsError
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.folder import replace_file
from discover_jax.models.gpt_oss import Model
from discover_jax.models.parameters import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ROOT = "base_model.model."
_WRAPPERS = {"gate_up": "mlp.experts.base_layer", "down": "mlp.experts"}
_GROUPS = ("attention", "expert", "head")
_COPY_OF_HEAD = _ROOT + "lm_head.base_layer.weight"
_KINDS = ("sliding", "full")
_FLOATS = ("F32", "BF16", "F16")
_SHOWN = 5

# Fields of peft's LoraConfig that do not change the product of a trained adapter.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # peft sets it to false for these layers
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",  # used only in training
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # used only with use_qalora
    "revision",
    "target_modules",  # the names of the tensors give the targets
    "target_parameters",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# The others (pissa, olora, corda, loftq, lora_ga) change the base weights, too, and mica is another layer.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Target:
    """One adapted matrix.

    Attributes:
      group: "attention", "expert" or "head", each with a rank in `LoraConfig`.
      place: where its two leaves lie: in the tree of a layer, or in the whole tree.
      layer: or None for the head.
      name: of the linear layer or of the parameter, as the patterns in adapter_config.json match it.
      prefix: of the names of its two tensors.
    """

    group: str
    place: tuple[str, ...]
    layer: int | None
    name: str
    prefix: str

    @property
    def tensors(self) -> tuple[str, str]:
        return f"{self.prefix}.lora_A.weight", f"{self.prefix}.lora_B.weight"

    def leaves(self, tree: Tree) -> Tree:
        """lora_a and lora_b, those of a layer as the stack over pairs that it is part of."""
        node = tree if self.layer is None else tree["pairs"][_KINDS[self.layer % 2]]
        for key in self.place:
            node = node[key]
        return node

    def shapes(self, abstract: Tree) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two matrices as they are here."""
        leaves = self.leaves(abstract)
        a, b = (leaves[name].shape if self.layer is None else leaves[name].shape[1:] for name in ("lora_a", "lora_b"))
        return a, b


def _targets(config: ModelConfig) -> Iterator[_Target]:
    """All that an adapter may hold, layer by layer."""
    for layer in range(config.num_layers):
        inside = f"model.layers.{layer}."
        for letter in "qkvo":
            name = f"{inside}self_attn.{letter}_proj"
            yield _Target("attention", ("attention", letter), layer, name, _ROOT + name)
        for matrix, wrapper in _WRAPPERS.items():
            yield _Target("expert", ("experts", matrix), layer, f"{inside}mlp.experts.{matrix}_proj", _ROOT + inside + wrapper)
    yield _Target("head", ("head",), None, "lm_head", _ROOT + "lm_head")


def _rank(lora: LoraConfig, group: str) -> int:
    return getattr(lora, f"{group}_rank")


def _pack(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[r, in] and [out, r] as they are; experts' [E, r, in] and [E, out, r] as [E r, in] and [out, r E]."""
    if a.ndim == 2:
        return a, b
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _unpack(a: np.ndarray, b: np.ndarray, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """The reverse of `_pack`, for matrices that are of these shapes here."""
    if len(shapes[0]) == 2:
        return a, b
    experts, out, rank = shapes[1]
    return a.reshape(shapes[0]), b.reshape(out, rank, experts).transpose(2, 0, 1)


def _packed_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = shapes
    return (a, b) if len(a) == 2 else ((a[0] * a[1], a[2]), (b[1], b[2] * b[0]))


# ---------------------------------------------------------------------- writing


def save_peft(path: str | Path, lora_tree: Tree, model_config: ModelConfig, lora_config: LoraConfig, base_name: str) -> None:
    """Writes an adapter as a folder that `peft.PeftModel.from_pretrained(GptOssForCausalLM, path)` loads. Float32, nothing is rounded.

    Args:
      path: the folder; made if it is not there. An adapter that it holds is replaced; other files stay.
      lora_tree: of a `Model` of these two configs.
      base_name: what adapter_config.json names as the base model: a folder or a name on the Hub.

    Raises:
      WeightsError: the tree is not of these configs, all ranks are 0, or the folder cannot be written.
    """
    _check_tree(lora_tree, model_config, lora_config)
    tree = jax.device_get(lora_tree)
    arrays: dict[str, np.ndarray] = {}
    for target in _targets(model_config):
        if not _rank(lora_config, target.group):
            continue
        leaves = target.leaves(tree)
        a, b = (leaves[name] if target.layer is None else leaves[name][target.layer // 2] for name in ("lora_a", "lora_b"))
        arrays |= zip(target.tensors, map(np.ascontiguousarray, _pack(a, b)), strict=True)
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be used for an adapter: {error}. Choose another folder.") from error
    content = json.dumps(_peft_config(lora_config, base_name), indent=2) + "\n"
    replace_file(path / WEIGHTS, functools.partial(safetensors.numpy.save_file, arrays, metadata={"format": "pt"}))
    replace_file(path / CONFIG, lambda file: file.write_text(content))


def _check_tree(lora_tree: Tree, model_config: ModelConfig, lora_config: LoraConfig) -> None:
    wanted = _named_shapes(Model(model_config, lora_config).abstract_lora())
    if not wanted:
        raise WeightsError("All ranks of this adapter are 0, so there is nothing to save. Set at least one rank above 0.")
    given = _named_shapes(lora_tree)
    if names := [name for name in wanted | given if wanted.get(name) != given.get(name)]:
        differences = "; ".join(f"{name} is {given.get(name, 'missing')}, not {wanted.get(name, 'there')}" for name in names[:_SHOWN])
        raise WeightsError(
            f"The adapter is not one of {lora_config} on this model; {len(names)} arrays differ: {differences}. Give the configs of the"
            " model whose `init_lora` made it."
        )


def _named_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _peft_config(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    # `r` is the experts' rank, if they have one: rank_pattern works for parameters too, but peft 0.21 warns that it does not.
    rank = lora.expert_rank or lora.attention_rank or lora.head_rank
    modules = [f"{letter}_proj" for letter in "qkvo"] if lora.attention_rank else []
    ranks = dict.fromkeys(modules, lora.attention_rank)
    if lora.head_rank:
        modules.append("lm_head")
        ranks["lm_head"] = lora.head_rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {},
        "target_modules": modules,
        "target_parameters": [f"mlp.experts.{matrix}_proj" for matrix in _WRAPPERS] if lora.expert_rank else None,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# ---------------------------------------------------------------------- reading


def read_lora_config(path: str | Path, model_config: ModelConfig) -> LoraConfig:
    """Ranks and alpha of a folder's adapter, for the `Model` that `load_peft` reads it into.

    Raises:
      WeightsError: see `load_peft`.
    """
    return _open(Path(path), model_config)[0]


def load_peft(path: str | Path, model: Model) -> Tree:
    """Reads a folder that `save_peft` or peft's own `save_pretrained` wrote, as a tree of `model.init_lora`, laid out over its mesh.

    Raises:
      WeightsError: the folder is damaged, the adapter is none of this model's (other ranks, alpha or shapes), or it is of a kind that
        these models do not have: rsLoRA, DoRA, biases, saved modules, other targets, targets in some layers only. The message names it.
    """
    path = Path(path)
    lora, arrays = _open(path, model.config)
    if lora != model.lora:
        raise WeightsError(
            f"{path} holds an adapter with {lora}, and the model has {model.lora}. Build the model with"
            " lora=read_lora_config(path, model_config), or set config.lora to these values."
        )
    abstract = model.abstract_lora()
    parts: dict[tuple[str, ...], tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for target in _targets(model.config):
        if not _rank(lora, target.group):
            continue
        place = target.place if target.layer is None else ("pairs", _KINDS[target.layer % 2], *target.place)
        stored_a, stored_b = (arrays.read(name) for name in target.tensors)
        a, b = _unpack(stored_a, stored_b, target.shapes(abstract))
        stack_a, stack_b = parts.setdefault(place, ([], []))
        stack_a.append(a)
        stack_b.append(b)

    def leaf(path: tuple[Any, ...], struct: jax.ShapeDtypeStruct) -> jax.Array:
        *place, name = (key.key for key in path)
        matrices = parts[tuple(place)][("lora_a", "lora_b").index(name)]
        value = np.stack(matrices) if place[0] == "pairs" else matrices[0]
        return jax.device_put(np.ascontiguousarray(value, struct.dtype), struct.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """The tensors of a folder: name -> (shape, type)."""

    file: Path
    headers: dict[str, tuple[tuple[int, ...], str]]

    def read(self, name: str) -> np.ndarray:
        try:
            with safetensors.safe_open(self.file, framework="numpy") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"Tensor {name!r} cannot be read from {self.file}: {error}. Copy the folder again.") from error


def _open(path: Path, model_config: ModelConfig) -> tuple[LoraConfig, _Arrays]:
    """Reads the config, lists the tensors, and checks all names, shapes and types, before any value is read."""
    content = _read_config(path / CONFIG)
    arrays = _list(path / WEIGHTS)
    targets = list(_targets(model_config))
    known = {name: target for target in targets for name in target.tensors}
    if others := sorted(arrays.headers.keys() - known.keys() - {_COPY_OF_HEAD}):
        raise WeightsError(
            f"{arrays.file} adapts {len(others)} tensors that have no adapter here, such as {', '.join(others[:_SHOWN])}. Possible targets"
            f" of the {model_config.num_layers} layers are q_proj, k_proj, v_proj, o_proj, the experts' gate_up_proj and down_proj, and"
            " lm_head. Train without the others, or read it with the model that it was made for."
        )
    present = {known[name].group for name in arrays.headers.keys() & known.keys()}
    if not present:
        raise WeightsError(f"{arrays.file} does not contain an adapter. Save it again.")
    lora = _lora_config(path / CONFIG, content, [target for target in targets if target.group in present])
    _check_tensors(arrays, lora, model_config)
    if _COPY_OF_HEAD in arrays.headers:
        logging.warning("%s: the copy of the base's head that peft saved along (%s) is not used", arrays.file, _COPY_OF_HEAD)
    return lora, arrays


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{file} cannot be read: {error}. Give a folder as `peft` saves it, with {CONFIG} and {WEIGHTS}, or copy it again."
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds no JSON object. Copy the folder again.")
    problems = [] if content.get("peft_type") == "LORA" else [f"peft_type = {content.get('peft_type')!r} (allowed: 'LORA')"]
    if (init := content.get("init_lora_weights", True)) not in _INITS:
        problems.append(f"init_lora_weights = {init!r} (it changes the base weights or the layer; convert it to plain LoRA with peft)")
    for name in sorted(content.keys() - _WITHOUT_EFFECT - _READ):
        if content[name] not in (None, False, "none", [], {}):
            problems.append(f"{name} = {content[name]!r}")
    if problems:
        raise WeightsError(
            f"{file} needs unsupported features: {'; '.join(problems)}. Only plain LoRA is supported: base + (alpha / rank) B A, with all"
            " other weights frozen. Train such an adapter, or merge this one into the base weights with peft."
        )
    return content


def _list(file: Path) -> _Arrays:
    if not file.exists():
        raise WeightsError(f"{file.parent} has no {file.name}; adapter_model.bin is not read. Save the adapter with safetensors.")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return _Arrays(file, {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read: {error}. The file is damaged or truncated; copy the folder again.") from error


def _lora_config(file: Path, content: dict[str, Any], targets: list[_Target]) -> LoraConfig:
    """The ranks of the targets that are there, and their one alpha, by peft's rules (peft.utils.other.get_pattern_key)."""

    def value_of(target: _Target, default: str, patterns: str) -> Any:
        try:
            for pattern, value in (content.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", target.name):
                    return value
        except (re.error, AttributeError) as error:
            raise WeightsError(f"{file} has {patterns} = {content[patterns]!r}, which cannot be read ({error}).") from error
        return content.get(default)

    ranks: dict[str, dict[Any, str]] = {group: {} for group in _GROUPS}
    alphas: dict[Any, str] = {}
    for target in targets:
        ranks[target.group].setdefault(value_of(target, "r", "rank_pattern"), target.name)
        alphas.setdefault(value_of(target, "lora_alpha", "alpha_pattern"), target.name)
    for what, found in [*((f"ranks of {group} targets", ranks[group]) for group in _GROUPS), ("alphas", alphas)]:
        if len(found) > 1:
            shown = ", ".join(f"{value} ({name})" for value, name in list(found.items())[:_SHOWN])
            raise WeightsError(
                f"{file} gives different {what}: {shown}. Here all attention projections share a rank, all experts' matrices another, the"
                " head has its own, and all share one alpha. Train an adapter with these constraints."
            )
        for value, name in found.items():
            allowed = isinstance(value, int | float) if what == "alphas" else isinstance(value, int) and value > 0
            if not allowed or isinstance(value, bool):
                raise WeightsError(f"{file} gives {name} {value!r} among the {what}; it must be a number above 0. Copy the folder again.")
    sizes = {f"{group}_rank": next(iter(found), 0) for group, found in ranks.items()}
    return LoraConfig(**sizes, alpha=float(next(iter(alphas))))


def _check_tensors(arrays: _Arrays, lora: LoraConfig, model_config: ModelConfig) -> None:
    abstract = Model(model_config, lora).abstract_lora()
    missing, wrong = [], []
    for target in _targets(model_config):
        if not _rank(lora, target.group):
            continue
        for name, shape in zip(target.tensors, _packed_shapes(target.shapes(abstract)), strict=True):
            found = arrays.headers.get(name)
            if found is None:
                missing.append(name)
            elif found[0] != shape:
                wrong.append(f"{name} has shape {found[0]}, and {shape} is demanded")
            elif found[1] not in _FLOATS:
                wrong.append(f"{name} is {found[1]}, and must be {' or '.join(_FLOATS)}")
    if _COPY_OF_HEAD in arrays.headers and arrays.headers[_COPY_OF_HEAD][0] != (model_config.vocab_size, model_config.width):
        shape = (model_config.vocab_size, model_config.width)
        wrong.append(f"{_COPY_OF_HEAD} has shape {arrays.headers[_COPY_OF_HEAD][0]}, and the base's head {shape}")
    if missing:
        raise WeightsError(
            f"{arrays.file} lacks {len(missing)} tensors, such as {', '.join(missing[:_SHOWN])}. An adapter has q_proj, k_proj, v_proj and"
            " o_proj of every layer or none of them, likewise both of the experts' matrices. Train it with all of them."
        )
    if wrong:
        raise WeightsError(
            f"{arrays.file} has {len(wrong)} tensors that do not fit: {'; '.join(wrong[:_SHOWN])}. The adapter belongs to a model of other"
            f" sizes, or {CONFIG} to another adapter. Give the folder that was trained on this base."
        )
