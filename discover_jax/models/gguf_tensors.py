"""Tensors of GGUF files: names, order of rows, and dequantisation.

Names and order follow llama.cpp's convert_hf_to_gguf.py, which this module reverses.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from discover_jax.exceptions import WeightsError
from discover_jax.models.gguf_file import GgufFile, StoredTensor

_NOISE = {
    "F32": 0.0,
    "F16": 0.001,
    "BF16": 0.004,
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_1": 0.06,
    "Q5_0": 0.06,
    "Q4_K": 0.12,
    "Q4_1": 0.12,
    "Q4_0": 0.12,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.12,
    "Q3_K": 0.25,
    "Q2_K": 0.45,
}
"""Supported types, and a bound of the relative error (root mean square of the error over that of the values) that each one's rounding
causes. On normal values, Q8_0 has 0.006, Q5_0 0.044, Q5_1 0.039, Q4_0 0.09, Q4_1 0.08."""

TYPES = tuple(_NOISE)
"""Types that `dequantise` supports, the most accurate first."""

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"

_CHUNK = 1 << 22
"""Values that are dequantised at a time: 16 MB in float32."""
_MAX_NAMED = 5
"""Names that an error message lists."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A tensor of the Hugging Face folder.

    Attributes:
      source: its name in the GGUF file.
      heads: heads whose rows llama.cpp permuted; 0 if the order of rows is the same.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int = 0


# ---------------------------------------------------------------------- names


def targets(config: dict[str, Any]) -> list[Target]:
    """The tensors of a model without its head, in the order in which they are written.

    Args:
      config: content of config.json, see `gguf_config`.
    """
    width, mlp_width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    permuted = config["model_type"] == "llama"  # ggml rotates neighbouring values for this architecture, and halves for the others
    layer = [
        ("attn_norm.weight", "input_layernorm.weight", (width,), 0),
        ("attn_q.weight", "self_attn.q_proj.weight", (heads * head_size, width), heads * permuted),
        ("attn_k.weight", "self_attn.k_proj.weight", (kv_heads * head_size, width), kv_heads * permuted),
        ("attn_v.weight", "self_attn.v_proj.weight", (kv_heads * head_size, width), 0),
        ("attn_output.weight", "self_attn.o_proj.weight", (width, heads * head_size), 0),
        ("ffn_norm.weight", "post_attention_layernorm.weight", (width,), 0),
        ("ffn_gate.weight", "mlp.gate_proj.weight", (mlp_width, width), 0),
        ("ffn_up.weight", "mlp.up_proj.weight", (mlp_width, width), 0),
        ("ffn_down.weight", "mlp.down_proj.weight", (width, mlp_width), 0),
    ]
    if config["model_type"] == "qwen2":
        layer += [
            ("attn_q.bias", "self_attn.q_proj.bias", (heads * head_size,), 0),
            ("attn_k.bias", "self_attn.k_proj.bias", (kv_heads * head_size,), 0),
            ("attn_v.bias", "self_attn.v_proj.bias", (kv_heads * head_size,), 0),
        ]
    if config["model_type"] == "qwen3":
        layer += [
            ("attn_q_norm.weight", "self_attn.q_norm.weight", (head_size,), 0),
            ("attn_k_norm.weight", "self_attn.k_norm.weight", (head_size,), 0),
        ]
    return [
        Target(HF_EMBEDDING, EMBEDDING, (config["vocab_size"], width)),
        *(
            Target(f"model.layers.{index}.{name}", f"blk.{index}.{source}", shape, permuted_heads)
            for index in range(config["num_hidden_layers"])
            for source, name, shape, permuted_heads in layer
        ),
        Target("model.norm.weight", "output_norm.weight", (width,)),
    ]


def check_tensors(file: GgufFile, config: dict[str, Any]) -> None:
    """Checks the names, shapes and types of all tensors.

    Raises:
      WeightsError: a tensor is missing, unknown, or has a wrong shape or an unsupported type. The message names the first few.
    """
    expected = {target.source: target.shape for target in targets(config)}
    allowed = (
        expected | {HEAD: expected[EMBEDDING]} | ({ROPE_FACTORS: (config["head_dim"] // 2,)} if config["model_type"] == "llama" else {})
    )
    family = config["model_type"]
    if missing := sorted(expected.keys() - file.tensors.keys()):
        raise WeightsError(
            f"{file.path} lacks {len(missing)} of the {len(expected)} tensors of a {family} model with {config['num_hidden_layers']}"
            f" layers: {_few(missing)}. Download the file again, or convert the model again."
        )
    if unknown := sorted(file.tensors.keys() - allowed.keys()):
        raise WeightsError(
            f"{file.path} has {len(unknown)} tensors that a {family} model does not have: {_few(unknown)}. Ignoring them would change the"
            " model. Use a file of a plain dense model."
        )
    if wrong := [f"{t.name} has {t.shape}, expected {allowed[t.name]}" for t in file.tensors.values() if t.shape != allowed[t.name]]:
        raise WeightsError(f"{file.path} has {len(wrong)} tensors whose shapes contradict its metadata: {_few(wrong)}.")
    if unsupported := [f"{t.name} is {t.type}" for t in file.tensors.values() if t.type not in TYPES]:
        raise WeightsError(
            f"{file.path} has {len(unsupported)} tensors of an unsupported type: {_few(unsupported)}. Supported: {', '.join(TYPES)}. Use a"
            " file in another quantisation, such as Q4_K_M or Q8_0."
        )


def _few(names: list[str]) -> str:
    return "; ".join(names[:_MAX_NAMED]) + ("; ..." if len(names) > _MAX_NAMED else "")


# ---------------------------------------------------------------------- values


def dequantise(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of a stored tensor in float32.

    Args:
      rows: (..., columns) of a float type, or (..., bytes of a row).
      type_name: one of `TYPES`.
    """
    import gguf

    return gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name])


def restore_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation of a head's rows.

    Hugging Face's rotary embedding pairs row i of a head with row i + size/2; ggml's, for llama, pairs rows 2i and 2i + 1.
    llama.cpp's converter therefore stores the halves interleaved.

    Args:
      rows: (heads * size, ...), the rows of all heads.
    """
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read(tensor: StoredTensor, heads: int = 0) -> np.ndarray:
    """A tensor in bfloat16, with its rows in the order of Hugging Face. Memory: the result, and twice that for permuted rows.

    Args:
      heads: see `Target`.
    """
    values = np.empty(tensor.shape, ml_dtypes.bfloat16)
    for rows in _chunks(tensor.shape):
        values[rows] = dequantise(tensor.data[rows], tensor.type)
    return restore_order(values, heads) if heads else values


def is_tied(head: StoredTensor, embedding: StoredTensor) -> tuple[bool, float]:
    """Whether a head is a second copy of the embedding, and their relative distance: root mean square of the difference over that of the
    head.

    They are copies if rounding to their types explains the distance. Matrices trained separately differ by about 1.
    """
    difference, square = 0.0, 0.0
    for rows in _chunks(head.shape):
        first, second = dequantise(head.data[rows], head.type), dequantise(embedding.data[rows], embedding.type)
        difference += float(np.square(first - second).sum(dtype=np.float64))
        square += float(np.square(first).sum(dtype=np.float64))
    distance = math.sqrt(difference / square) if square else math.inf if difference else 0.0
    return distance <= _NOISE[head.type] + _NOISE[embedding.type], distance


def is_better(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether the first tensor's type is more accurate."""
    return TYPES.index(first.type) < TYPES.index(second.type)


def _chunks(shape: tuple[int, ...]) -> list[slice]:
    """Ranges of rows with about `_CHUNK` values each."""
    step = max(1, _CHUNK // math.prod(shape[1:]))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
