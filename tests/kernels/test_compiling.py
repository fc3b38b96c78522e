"""Attention's kernels compile for every card, without the card, and their shared memory fits it: dense models, and gpt-oss's attention."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest
from recorded_launches import compile_for, record

from discover_jax.kernels.triton_call import SHARED_KIB

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")

CARDS = (80, 89, 90, 100, 120)
HEADS = {
    "qwen2.5-0.5b": (14, 2, 64),
    "qwen2.5-1.5b": (12, 2, 128),
    "qwen2.5-7b": (28, 4, 128),
    "llama-3.1-8b": (32, 8, 128),
    "gpt-oss": (64, 8, 64),
}
"""Query heads, key/value heads and head size."""
PARTS = {"decode": ["attend", "merge", "attend"], "forward": ["forward"], "backward": ["backward_queries", "backward_keys"]}
TENSOR_MEMORY = 512
"""Columns of a Blackwell GPU's tensor memory."""
ROWS, PAGE, COLUMNS, TOKENS = 32, 128, 64, 4096


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _launches(monkeypatch, model, card, window=None):
    """Decoding over many pages and over one; the update forward and backward."""
    from discover_jax.kernels import attention_decode, attention_update

    heads, kv_heads, size = HEADS[model]
    monkeypatch.setattr(attention_update, "compute_capability", lambda: card)
    pool, sinks = _shape(2, 100, kv_heads, PAGE, size), _shape(heads)
    launches = []
    for columns in (COLUMNS, 1):
        numbers = (_shape(dtype=jnp.int32), _shape(ROWS, columns, dtype=jnp.int32), _shape(ROWS, dtype=jnp.int32))
        arguments = (_shape(ROWS, heads, size), pool, pool, *numbers, sinks)
        launches += record(monkeypatch, attention_decode, attention_decode.paged_attention, *arguments)

    def update(q, k, v, segments, sinks):
        attend = attention_update.packed_attention if window is None else attention_update.windowed_attention
        options = {} if window is None else {"window": window}
        out, pull = jax.vjp(lambda *x: attend(*x, segments, sinks, **options), q, k, v)
        return pull(out)

    rows = [_shape(1, TOKENS, n, size) for n in (heads, kv_heads, kv_heads)]
    return launches + record(monkeypatch, attention_update, update, *rows, _shape(1, TOKENS, dtype=jnp.int32), sinks)


@pytest.mark.parametrize(
    ("model", "card", "part"),
    [
        # A few seconds of compiling are in the default run.
        pytest.param(*case, marks=[] if case[:2] == ("qwen2.5-1.5b", 89) and case[2] != "backward" else pytest.mark.slow)
        for case in itertools.product(HEADS, CARDS, PARTS)
    ],
)
def test_kernels_fit_the_shared_memory(monkeypatch, tmp_path, model, card, part):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = _launches(monkeypatch, model, card)
    assert [launch.name for launch in launches] == list(itertools.chain(*PARTS.values()))
    for launch in launches:
        if launch.name in PARTS[part]:
            compiled = compile_for(card, launch)
            assert compiled.target.arch == card
            assert compiled.shared <= SHARED_KIB[card] * 1024, launch
            assert getattr(compiled, "tmem_size", 0) <= TENSOR_MEMORY, launch


@pytest.mark.parametrize("card", CARDS)
def test_gpt_oss_launches_are_those_measured(monkeypatch, card):
    """The launches of docs/performance.md's figures, on every card."""
    full, window = (_launches(monkeypatch, "gpt-oss", card, window) for window in (None, 128))
    found = [
        (launch.name, *(launch.constants.get(name) for name in ("BLOCK", "BM", "BN", "STAGES")), launch.warps, launch.stages)
        for launch in (*full, *window[3:])
    ]
    assert found == [
        ("attend", 64, None, None, 2, 1, 2),
        ("merge", None, None, None, None, 1, 1),
        ("attend", 128, None, None, 1, 2, 1),
        ("forward", None, 128, 64, 4, 4, 4),
        ("backward_queries", None, 64, 64, 3, 4, 3),
        ("backward_keys", None, 64, 64, 3, 4, 3),
        ("forward", None, 64, 64, 2, 4, 2),
        ("backward_queries", None, 64, 64, 2, 4, 2),
        ("backward_keys", None, 64, 64, 2, 4, 2),
    ]
