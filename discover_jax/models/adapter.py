"""Adapters in `peft`'s format: a folder with adapter_config.json and adapter_model.safetensors. Needs neither peft nor torch.

The format is that of peft 0.21 over transformers' GptOssForCausalLM. Linear layers (q, k, v, o, lm_head) have lora_A [r, in] and
lora_B [out, r], as in the adapter's tree. The experts' matrices are parameters [E, in, out], not layers; peft adapts them through
`target_parameters` (peft.tuners.lora.layer.ParamWrapper). One pair of matrices has the adapters of all experts of a layer:

    lora_A [E r, in]: row e r + i is row i of expert e's A,
    lora_B [out, r E]: column i E + e is column i of expert e's B. Here the expert is the fastest index.

gate_up_proj and down_proj belong to one module, so peft wraps it twice. The inner wrapper, `experts.base_layer`, has the tensors of
gate_up_proj; the outer one, `experts`, has those of down_proj.
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
from discover_jax.models.decoder import Model
from discover_jax.models.folder_writer import replace_file
from discover_jax.models.parameters import Tree
from discover_jax.published import check_regular, is_there, read_object, show

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ROOT = "base_model.model."
_WRAPPERS = {"gate_up": "mlp.experts.base_layer", "down": "mlp.experts"}
_MLP = ("gate", "up", "down")
_GROUPS = ("attention", "expert", "mlp", "head")
_BASE_HEAD = _ROOT + "lm_head.base_layer.weight"
"""A copy of the base model's head, which peft may save with the adapter."""
_FLOATS = ("F32", "BF16", "F16")
_MAX_NAMED, _MAX_LENGTH = 5, 60
"""Names that an error message lists before it only counts them, and characters of a name."""
_MOST_RANK, _MOST_ALPHA = 2**16, 2**32
"""Values that are believed: larger ones would exhaust the memory, or a float's range."""

# Fields of peft's LoraConfig that do not change what a trained adapter computes.
_IGNORED_FIELDS = {
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
    "target_modules",  # the tensors' names give the targets
    "target_parameters",
    "task_type",
}
_USED_FIELDS = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# Other values are unsupported: pissa, olora, corda, loftq and lora_ga also change the base weights, and mica uses another layer.
_ALLOWED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Target:
    """One adapted matrix.

    Attributes:
      group: "attention", "expert", "mlp" or "head", each with a rank in `LoraConfig`.
      node: path of its two leaves in the tree. Those of layers are stacks.
      index: index of its layer in the stack; None for the head.
      name: name of the linear layer or parameter, as the patterns in adapter_config.json match it.
      prefix: common prefix of its two tensors' names.
    """

    group: str
    node: tuple[str, ...]
    index: int | None
    name: str
    prefix: str

    @property
    def tensors(self) -> tuple[str, str]:
        return f"{self.prefix}.lora_A.weight", f"{self.prefix}.lora_B.weight"

    def leaves(self, tree: Tree) -> Tree:
        """lora_a and lora_b. For a layer, these are the stacks."""
        node = tree
        for key in self.node:
            node = node[key]
        return node

    def shapes(self, abstract: Tree) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_a and lora_b of this layer in the adapter's tree."""
        leaves = self.leaves(abstract)
        a, b = (leaves[name].shape if self.index is None else leaves[name].shape[1:] for name in ("lora_a", "lora_b"))
        return a, b


def _targets(config: ModelConfig) -> Iterator[_Target]:
    """All matrices that can have an adapter, layer by layer."""
    for layer in range(config.num_layers):
        kind, index = config.position(layer)
        inside, stack = f"model.layers.{layer}.", (config.stack, kind)
        for letter in "qkvo":
            name = f"{inside}self_attn.{letter}_proj"
            yield _Target("attention", (*stack, "attention", letter), index, name, _ROOT + name)
        if config.num_experts:
            for matrix, wrapper in _WRAPPERS.items():
                name = f"{inside}mlp.experts.{matrix}_proj"
                yield _Target("expert", (*stack, "experts", matrix), index, name, _ROOT + inside + wrapper)
        else:
            for matrix in _MLP:
                name = f"{inside}mlp.{matrix}_proj"
                yield _Target("mlp", (*stack, "mlp", matrix), index, name, _ROOT + name)
    yield _Target("head", ("head",), None, "lm_head", _ROOT + "lm_head")


def _rank(lora: LoraConfig, group: str) -> int:
    return getattr(lora, f"{group}_rank")


def _to_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts' matrices [E, r, in] and [E, out, r] as [E r, in] and [out, r E]; returns [r, in] and [out, r] unchanged."""
    if a.ndim == 2:
        return a, b
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _from_peft(a: np.ndarray, b: np.ndarray, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_to_peft`; `shapes` are those in the adapter's tree."""
    if len(shapes[0]) == 2:
        return a, b
    experts, out, rank = shapes[1]
    return a.reshape(shapes[0]), b.reshape(out, rank, experts).transpose(2, 0, 1)


def _peft_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = shapes
    return (a, b) if len(a) == 2 else ((a[0] * a[1], a[2]), (b[1], b[2] * b[0]))


# ---------------------------------------------------------------------- writing


def save_peft(path: str | Path, lora_tree: Tree, model_config: ModelConfig, lora_config: LoraConfig, base_name: str) -> None:
    """Writes an adapter as a folder that `peft.PeftModel.from_pretrained(GptOssForCausalLM, path)` loads. Weights stay in float32.

    Args:
      path: the folder; created if missing. An adapter in it is replaced; other files are kept.
      lora_tree: the adapter's tree of a `Model` of these two configs.
      base_name: the base model in adapter_config.json: a folder, or a name on the Hub.

    Raises:
      WeightsError: the tree does not match the configs, all ranks are 0, or the folder cannot be written.
    """
    lora_config = lora_config.of_model(model_config)
    _check_tree(lora_tree, model_config, lora_config)
    tree = jax.device_get(lora_tree)
    arrays: dict[str, np.ndarray] = {}
    for target in _targets(model_config):
        if not _rank(lora_config, target.group):
            continue
        leaves = target.leaves(tree)
        a, b = (leaves[name] if target.index is None else leaves[name][target.index] for name in ("lora_a", "lora_b"))
        arrays |= zip(target.tensors, map(np.ascontiguousarray, _to_peft(a, b)), strict=True)
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"Cannot write an adapter to {path}: {error}. Choose another folder.") from error
    content = json.dumps(_peft_config(lora_config, base_name), indent=2) + "\n"
    replace_file(path / WEIGHTS, functools.partial(safetensors.numpy.save_file, arrays, metadata={"format": "pt"}))
    replace_file(path / CONFIG, lambda file: file.write_text(content))


def _check_tree(lora_tree: Tree, model_config: ModelConfig, lora_config: LoraConfig) -> None:
    expected = _named_shapes(Model(model_config, lora_config).abstract_lora())
    if not expected:
        raise WeightsError("All ranks of this adapter are 0, so there is nothing to save. Set at least one rank above 0.")
    given = _named_shapes(lora_tree)
    if names := [name for name in expected | given if expected.get(name) != given.get(name)]:
        differences = "; ".join(
            f"{name}: expected {expected.get(name, 'no array')}, got {given.get(name, 'no array')}" for name in names[:_MAX_NAMED]
        )
        raise WeightsError(
            f"The adapter does not match {lora_config} on this model. {len(names)} arrays differ: {differences}. Pass the configs of the"
            " model whose `init_lora` created the adapter."
        )


def _named_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _peft_config(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    # `r` is the experts' rank if they have one. rank_pattern works for parameters too, but peft 0.21 wrongly warns that it does not.
    rank = lora.expert_rank or lora.mlp_rank or lora.attention_rank or lora.head_rank
    modules = [f"{letter}_proj" for letter in "qkvo"] if lora.attention_rank else []
    ranks = dict.fromkeys(modules, lora.attention_rank)
    if lora.mlp_rank:
        modules += [f"{matrix}_proj" for matrix in _MLP]
        ranks |= dict.fromkeys((f"{matrix}_proj" for matrix in _MLP), lora.mlp_rank)
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
    """Ranks and alpha of a folder's adapter. `load_peft` needs a `Model` with these values.

    Raises:
      WeightsError: see `load_peft`.
    """
    return _open_adapter(Path(path), model_config)[0]


def load_peft(path: str | Path, model: Model) -> Tree:
    """Reads a folder written by `save_peft` or by peft's `save_pretrained`. Returns a tree like `model.init_lora`'s, on the model's mesh.

    Raises:
      WeightsError: the folder is damaged; ranks, alpha or shapes do not match the model; or the adapter uses an unsupported feature
        (rsLoRA, DoRA, biases, saved modules, other targets, targets in only some layers). The message names it.
    """
    path = Path(path)
    lora, tensors = _open_adapter(path, model.config)
    if lora != model.lora:
        raise WeightsError(
            f"{path} has an adapter with {lora}, but the model has {model.lora}. Build the model with"
            " lora=read_lora_config(path, model_config), or set config.lora to these values."
        )
    abstract = model.abstract_lora()
    parts: dict[tuple[str, ...], tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for target in _targets(model.config):
        if not _rank(lora, target.group):
            continue
        stored_a, stored_b = (tensors.read(name) for name in target.tensors)
        a, b = _from_peft(stored_a, stored_b, target.shapes(abstract))
        stack_a, stack_b = parts.setdefault(target.node, ([], []))
        stack_a.append(a)
        stack_b.append(b)

    def leaf(path: tuple[Any, ...], struct: jax.ShapeDtypeStruct) -> jax.Array:
        *node, name = (key.key for key in path)
        matrices = parts[tuple(node)][("lora_a", "lora_b").index(name)]
        value = np.stack(matrices) if node[0] == model.config.stack else matrices[0]
        return jax.device_put(np.ascontiguousarray(value, struct.dtype), struct.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


@dataclasses.dataclass(frozen=True)
class _StoredTensors:
    """The tensors of an adapter's file; `headers` has their names, shapes and types."""

    file: Path
    headers: dict[str, tuple[tuple[int, ...], str]]

    def read(self, name: str) -> np.ndarray:
        try:
            with safetensors.safe_open(self.file, framework="numpy") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"Cannot read tensor {name!r} of {self.file}: {error}. Copy the folder again.") from error


def _open_adapter(path: Path, model_config: ModelConfig) -> tuple[LoraConfig, _StoredTensors]:
    """Reads the config and the headers, and checks all names, shapes and types before any weight is read."""
    content = _read_config(path / CONFIG)
    tensors = _read_headers(path / WEIGHTS)
    targets = list(_targets(model_config))
    known = {name: target for target in targets for name in target.tensors}
    if others := sorted(tensors.headers.keys() - known.keys() - {_BASE_HEAD}):
        raise WeightsError(
            f"{tensors.file} has {len(others)} tensors of unsupported targets: {', '.join(others[:_MAX_NAMED])}. Allowed targets in"
            f" {model_config.num_layers} layers: q_proj, k_proj, v_proj, o_proj, the experts' gate_up_proj and down_proj, and lm_head."
            " Train without the other targets, or load the adapter with its own base model."
        )
    present = {known[name].group for name in tensors.headers.keys() & known.keys()}
    if not present:
        raise WeightsError(f"{tensors.file} does not contain an adapter. Save it again.")
    lora = _lora_config(path / CONFIG, content, [target for target in targets if target.group in present])
    _check_tensors(tensors, lora, model_config)
    if _BASE_HEAD in tensors.headers:
        logging.warning("%s: ignoring %s, peft's copy of the base model's head", tensors.file, _BASE_HEAD)
    return lora, tensors


def _read_config(file: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
      WeightsError: it cannot be read, or it has a feature other than plain LoRA.
    """
    try:
        content = read_object(file)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"Cannot read {file}: {error}. Use a folder that `peft` saved, with {CONFIG} and {WEIGHTS}, or copy it again."
        ) from error
    problems = [] if content.get("peft_type") == "LORA" else [f"peft_type = {show(content.get('peft_type'))} (allowed: 'LORA')"]
    if (init := content.get("init_lora_weights", True)) not in _ALLOWED_INITS:
        problems.append(f"init_lora_weights = {show(init)} (it changes the base weights or the layer; convert it to plain LoRA with peft)")
    others = [
        name for name in sorted(content.keys() - _IGNORED_FIELDS - _USED_FIELDS) if content[name] not in (None, False, "none", [], {})
    ]
    problems += [f"{name[:_MAX_LENGTH]} = {show(content[name])}" for name in others[:_MAX_NAMED]]
    if len(others) > _MAX_NAMED:
        problems.append(f"{len(others) - _MAX_NAMED} more")
    if problems:
        raise WeightsError(
            f"{file} needs unsupported features: {'; '.join(problems)}. Only plain LoRA is supported: base + (alpha / rank) B A, with all"
            " other weights frozen. Train a plain LoRA adapter, or merge this one into the base weights with peft."
        )
    return content


def _read_headers(file: Path) -> _StoredTensors:
    if not is_there(file):
        raise WeightsError(f"{file.parent} has no {file.name}. Save the adapter with safetensors; adapter_model.bin is not supported.")
    try:
        check_regular(file)
        with safetensors.safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return _StoredTensors(file, {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"Cannot read {file}: {error}. The file is damaged or truncated; copy the folder again.") from error


def _lora_config(file: Path, content: dict[str, Any], targets: list[_Target]) -> LoraConfig:
    """The rank of each group of targets, and the alpha that all share.

    Raises:
      WeightsError: targets of a group differ in rank, targets differ in alpha, or a value is not a number of a possible size.
    """
    ranks: dict[str, dict[int, str]] = {group: {} for group in _GROUPS}
    alphas: dict[float, str] = {}
    for target in targets:
        rank, alpha = _value_of(file, content, target, "r", "rank_pattern"), _value_of(file, content, target, "lora_alpha", "alpha_pattern")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= _MOST_RANK:
            raise WeightsError(
                f"{file} has {show(rank)} among the ranks ({target.name}); it must be an integer from 1 to {_MOST_RANK:,}. Copy the folder"
                " again."
            )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MOST_ALPHA:
            raise WeightsError(
                f"{file} has {show(alpha)} among the alphas ({target.name}); it must be a number of at most {_MOST_ALPHA:,}. Copy the"
                " folder again."
            )
        ranks[target.group].setdefault(rank, target.name)
        alphas.setdefault(alpha, target.name)
    for what, found in [*((f"ranks of {group} targets", ranks[group]) for group in _GROUPS), ("alphas", alphas)]:
        if len(found) > 1:
            shown = ", ".join(f"{value} ({name})" for value, name in list(found.items())[:_MAX_NAMED])
            raise WeightsError(
                f"{file} has different {what}: {shown}. Use one rank for all attention projections, one for the experts' matrices, one for"
                " the head, and one alpha for all targets."
            )
    sizes = {f"{group}_rank": next(iter(found), 0) for group, found in ranks.items()}
    return LoraConfig(**sizes, alpha=float(next(iter(alphas))))


def _value_of(file: Path, content: dict[str, Any], target: _Target, default: str, patterns: str) -> Any:
    """A target's rank or alpha: that of the first matching pattern, or the default (peft.utils.other.get_pattern_key)."""
    found = content.get(patterns)
    if found is not None and not isinstance(found, dict):
        raise WeightsError(f"{file} has {patterns} = {show(found)}; it must be an object of numbers by pattern. Copy the folder again.")
    for pattern, value in (found or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", target.name)
        except (re.error, OverflowError, RecursionError) as error:
            raise WeightsError(
                f"{file} has the pattern {show(pattern)} in {patterns}, which is invalid ({error}). It must be a regular expression."
            ) from error
        if matches:
            return value
    return content.get(default)


def _check_tensors(tensors: _StoredTensors, lora: LoraConfig, model_config: ModelConfig) -> None:
    abstract = Model(model_config, lora).abstract_lora()
    missing, wrong = [], []
    for target in _targets(model_config):
        if not _rank(lora, target.group):
            continue
        for name, shape in zip(target.tensors, _peft_shapes(target.shapes(abstract)), strict=True):
            found = tensors.headers.get(name)
            if found is None:
                missing.append(name)
            elif found[0] != shape:
                wrong.append(f"{name} has shape {found[0]}; expected {shape}")
            elif found[1] not in _FLOATS:
                wrong.append(f"{name} has type {found[1]}; allowed: {', '.join(_FLOATS)}")
    head = (model_config.vocab_size, model_config.width)
    if _BASE_HEAD in tensors.headers and tensors.headers[_BASE_HEAD][0] != head:
        wrong.append(f"{_BASE_HEAD} has shape {tensors.headers[_BASE_HEAD][0]}; expected {head}")
    if missing:
        raise WeightsError(
            f"{tensors.file} lacks {len(missing)} tensors: {', '.join(missing[:_MAX_NAMED])}. An adapter must have q_proj, k_proj, v_proj"
            " and o_proj in every layer or in none, and likewise gate_up_proj and down_proj. Train it with all of them."
        )
    if wrong:
        raise WeightsError(
            f"{tensors.file} has {len(wrong)} tensors with a wrong shape or type: {'; '.join(wrong[:_MAX_NAMED])}. The adapter belongs to a"
            f" model of other sizes, or {CONFIG} belongs to another adapter. Use an adapter that was trained on this base model."
        )
