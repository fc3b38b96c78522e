"""config.json of a GGUF file's model.

The keys of the metadata are those of llama.cpp (gguf-py/gguf/constants.py).
"""

import importlib.metadata
import math
from typing import Any

import numpy as np

from discover_jax.exceptions import WeightsError
from discover_jax.models.frequencies import plain_frequencies, scale_llama3
from discover_jax.models.gguf_file import GgufFile
from discover_jax.models.gguf_tensors import EMBEDDING, ROPE_FACTORS, dequantise

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Supported values of general.architecture, which equal Hugging Face's model_type, and the class in transformers."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of all published Llama 3.1 to 3.3 models."""
_ROPE_TOLERANCE = 1e-5
"""Relative error of factors, which the file stores in float32."""


def read_config(file: GgufFile) -> dict[str, Any]:
    """Content of config.json, without `tie_word_embeddings`, which depends on the tensors.

    Raises:
      WeightsError: the architecture or an option of it is not supported, or the metadata lacks a size.
    """
    family = file.get("general.architecture", str)
    if family not in ARCHITECTURES:
        raise WeightsError(f"{file.path} has the unsupported architecture {family!r}. Supported: {', '.join(ARCHITECTURES)}.")
    _check_options(file, family)
    width, heads = file.get(f"{family}.embedding_length", int), file.get(f"{family}.attention.head_count", int)
    if heads < 1 or width < 1:
        raise WeightsError(
            f"{file.path}: {family}.embedding_length is {width} and {family}.attention.head_count is {heads}; both must be at"
            " least 1. Download the file again."
        )
    head_size = file.get(f"{family}.attention.key_length", int, width // heads)
    for key in (f"{family}.attention.value_length", f"{family}.rope.dimension_count"):
        if (size := file.get(key, int, head_size)) != head_size:
            raise WeightsError(f"{file.path}: {key} is {size}, but the heads have size {head_size}. Only equal sizes are supported.")
    if EMBEDDING not in file.tensors:
        raise WeightsError(f"{file.path} lacks the tensor {EMBEDDING}. Download the file again, or convert the model again.")
    theta = file.get_float32(f"{family}.rope.freq_base", 10_000.0)
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "hidden_size": width,
        "intermediate_size": file.get(f"{family}.feed_forward_length", int),
        "num_hidden_layers": file.get(f"{family}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{family}.attention.head_count_kv", int, heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "max_position_embeddings": file.get(f"{family}.context_length", int),
        "rms_norm_eps": file.get_float32(f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, head_size, theta),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        # Without it, transformers 5.17 warns that the tokenizer splits words wrongly, whatever the model.
        "transformers_version": importlib.metadata.version("transformers"),
        "use_cache": True,
    }
    if family != "qwen2":
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config


def _check_options(file: GgufFile, family: str) -> None:
    """Raises WeightsError for options of the architecture that change the model and are not supported."""
    if experts := file.get(f"{family}.expert_count", int, 0):
        raise WeightsError(f"{file.path} is a mixture of {experts} experts. Only dense models of {family} are supported.")
    if window := file.get(f"{family}.attention.sliding_window", int, 0):
        raise WeightsError(f"{file.path} uses a sliding window of {window} tokens. Only full attention is supported for {family}.")
    if (scaling := file.get(f"{family}.rope.scaling.type", str, "none")) != "none":
        raise WeightsError(
            f"{file.path} uses the rope scaling {scaling!r}. Supported: none, and llama3 (stored as the tensor {ROPE_FACTORS})."
        )
    if file.has(f"{family}.rope.scale_linear") and (scale := file.get(f"{family}.rope.scale_linear", float)) != 1:
        raise WeightsError(f"{file.path} scales positions linearly by {scale:g}. Supported rope scalings: none and llama3.")


# ---------------------------------------------------------------------- llama3's rope scaling


def llama3_factors(head_size: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """(head_size / 2,) divisors of the rotary frequencies, as in transformers' `_compute_llama3_parameters`."""
    length, low, high = (scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    frequencies = plain_frequencies(head_size, theta)
    return frequencies / scale_llama3(frequencies, factor=scaling["factor"], length=length, low=low, high=high)


def recover_llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """`rope_scaling` of config.json whose factors are these; None if there is no such llama3 scaling.

    The factors rise from 1 to `factor`. In between, (1/f - 1/factor) / (1 - 1/factor) is linear in 1/wavelength, with slope
    length / (high - low) and offset -low / (high - low). Only length/low and length/high matter, so low is set to 1.

    Args:
      factors: (head_size / 2,), the tensor rope_freqs.weight.
    """
    factors = np.asarray(factors, np.float64)
    factor = round(float(factors.max()), 4)
    candidates = [_LLAMA3]
    inside = (factors > 1 + _ROPE_TOLERANCE) & (factors < factor * (1 - _ROPE_TOLERANCE))
    if inside.sum() > 1:
        inverse = 1 / (2 * math.pi * theta ** (np.arange(factors.size) / factors.size))
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(inverse[inside], smooth[inside], 1)
        if slope > 0 > offset:
            length = round(-slope / offset)
            high = round((1 - offset) / slope * length, 4)
            candidates.append({"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": length})
    for candidate in candidates:
        scaling = {"rope_type": "llama3", "factor": factor, **candidate}
        if np.allclose(llama3_factors(2 * factors.size, theta, scaling), factors, rtol=_ROPE_TOLERANCE, atol=0):
            return scaling
    return None


def _rope_scaling(file: GgufFile, head_size: int, theta: float) -> dict[str, Any] | None:
    if (tensor := file.tensors.get(ROPE_FACTORS)) is None:
        return None
    if tensor.type != "F32" or tensor.shape != (head_size // 2,):
        raise WeightsError(
            f"{file.path}: {ROPE_FACTORS} has type {tensor.type} and shape {tensor.shape}; expected F32, ({head_size // 2},)."
        )
    factors = dequantise(tensor.data, "F32")
    if (factors == 1).all():
        return None
    scaling = recover_llama3_scaling(factors, theta) if np.isfinite(factors).all() and (factors > 0).all() else None
    if scaling is None:
        raise WeightsError(
            f"{file.path}: no llama3 rope scaling gives the factors in {ROPE_FACTORS} ({', '.join(f'{f:.4g}' for f in factors[:3])}, ...,"
            f" {factors[-1]:.4g}). Supported rope scalings: none and llama3. Use the model's Hugging Face folder."
        )
    return scaling
