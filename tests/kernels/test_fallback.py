"""Why kernels refuse arguments."""

import jax
import jax.numpy as jnp
import pytest

from discover_jax.kernels.fallback import attention_refusal, experts_update_refusal

BOTH = (jnp.bfloat16, jnp.float32)


def _arrays(*dtypes, size=64):
    return [jax.ShapeDtypeStruct((2, 3, size), dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    ("arrays", "dtypes", "reason"),
    [
        (_arrays("bfloat16", "bfloat16"), BOTH[:1], ""),
        (_arrays("float32", "float32"), BOTH, ""),
        (_arrays("float32", "float32"), BOTH[:1], "keys and values are float32, float32; the kernel supports bfloat16"),
        (_arrays("bfloat16", "float32"), BOTH[:1], "keys and values are bfloat16, float32; the kernel supports bfloat16"),
        (
            _arrays("bfloat16", "float32"),
            BOTH,
            "keys and values are bfloat16, float32; the kernel supports bfloat16 or float32, the same for all",
        ),
        (_arrays("bfloat16", "bfloat16", size=96), BOTH, "the head size is 96; the kernel supports 64 or 128"),
    ],
)
def test_attention_needs_one_supported_type_and_head_size(arrays, dtypes, reason):
    assert attention_refusal("keys and values", arrays, dtypes, (64, 128)) == reason


@pytest.mark.parametrize(
    ("dtype", "with_adapters", "layer", "said"),
    [
        ("bfloat16", (True, True), None, ""),
        ("bfloat16", (False, False), None, ""),
        ("float32", (True, True), None, "activations are float32"),
        ("bfloat16", (True, True), jnp.int32(0), "one layer"),
        ("bfloat16", (True, False), None, "only one"),
    ],
)
def test_experts_of_the_update_need_one_layer_and_adapters_of_both_matrices(dtype, with_adapters, layer, said):
    (x,) = _arrays(dtype)
    matrices = [{"bias": x} | ({"lora_a": x, "lora_b": x} if adapted else {}) for adapted in with_adapters]
    reason = experts_update_refusal(x, matrices, layer)
    assert said in reason
    assert bool(reason) == bool(said)
