"""Every type of tensor in a GGUF file has the values that another implementation gives."""

import math

import gguf
import numpy as np
import pytest
from gguf_files import TYPES, permute

from discover_jax.models import gguf_tensors
from discover_jax.models.gguf_file import StoredTensor

pytestmark = pytest.mark.usefixtures("torch", "transformers")


def _random_blocks(kind, rows, columns):
    """Random bytes of a type, with finite float16 scales."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for offset in scales.get(kind.name, (0,)):
        blocks[:, offset : offset + 2] = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _five_bits_by_hand(data, kind):
    """Values of Q5_0 or Q5_1 blocks, bit by bit: scale, (minimum,) 32 fifth bits, 32 nibbles; values i and i + 16 share a byte."""
    start = 2 if kind == TYPES.Q5_0 else 4
    out = []
    for block in data.reshape(-1, start + 20):
        scale, *minimum = block[:start].copy().view(np.float16).astype(np.float32)
        fifth = int.from_bytes(block[start : start + 4].tobytes(), "little")
        nibbles = block[start + 4 :]
        quants = [int(nibbles[i % 16]) >> (4 * (i // 16)) & 15 | (fifth >> i & 1) << 4 for i in range(32)]
        out += [scale * np.float32(q) + minimum[0] if minimum else scale * np.float32(q - 16) for q in quants]
    return np.array(out, np.float32).reshape(data.shape[0], -1)


def _expected_values(data, kind):
    """Values of stored rows by another implementation than the package gguf."""
    import torch
    from transformers.integrations.gguf import dequant as torch_dequant

    if kind.name in ("F32", "F16"):
        return data.astype(np.float32)
    if kind.name == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    if kind.name in ("Q5_0", "Q5_1"):
        return _five_bits_by_hand(data, kind)
    return torch_dequant.dequantize(torch.from_numpy(data.copy()), int(kind)).reshape(data.shape[0], -1).numpy()


@pytest.mark.parametrize("name", gguf_tensors.TYPES)
def test_every_type_is_dequantised(name, monkeypatch, torch):
    monkeypatch.setattr(gguf_tensors, "_CHUNK", 3 * 512)  # several chunks, the last one smaller
    kind, shape = TYPES[name], (7, 512)
    if name in ("F32", "F16", "BF16"):
        data = gguf.quantize(np.random.default_rng(0).standard_normal(shape, np.float32), kind)
    else:
        data = _random_blocks(kind, *shape)
    values = gguf_tensors.read(StoredTensor("blk.0.ffn_up.weight", name, shape, data))
    assert values.shape == shape
    expected = torch.from_numpy(_expected_values(data, kind)).to(torch.bfloat16).float().numpy()
    assert np.isfinite(expected).all()
    # Two float32 orders of operations may round to neighbouring values of bfloat16.
    np.testing.assert_allclose(values.astype(np.float32), expected, rtol=2**-7, atol=1e-6)
    assert (values.astype(np.float32) == expected).mean() > 0.99


def test_noise_bounds_hold_for_types_that_gguf_can_write():
    values = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    for name in ("F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
        error = gguf.dequantize(gguf.quantize(values, TYPES[name]), TYPES[name]) - values
        assert math.sqrt(np.mean(error**2) / np.mean(values**2)) < gguf_tensors._NOISE[name], name


def test_restore_order_undoes_llama_cpps_permutation():
    rows = np.arange(6 * 16 * 3).reshape(96, 3)
    permuted = permute(rows, 6)
    assert not np.array_equal(permuted, rows)
    np.testing.assert_array_equal(gguf_tensors.restore_order(permuted, 6), rows)
