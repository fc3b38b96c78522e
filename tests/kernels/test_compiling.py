"""The kernels of dense models, and those that gpt-oss shares with them, compile for every card, without it, and fit its shared memory."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest
from recorded_launches import compile_for, record

from discover_jax.kernels.projections import Stack
from discover_jax.kernels.triton_call import SHARED_KIB

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra `parity` or `kernels`)")

CARDS = (80, 89, 90, 100, 120)
MODELS = {
    "qwen2.5-0.5b": (896, 14, 2, 64),
    "qwen2.5-1.5b": (1536, 12, 2, 128),
    "qwen2.5-7b": (3584, 28, 4, 128),
    "llama-3.1-8b": (4096, 32, 8, 128),
    "gpt-oss": (2880, 64, 8, 64),
}
"""Width, query heads, key/value heads and head size."""
PARTS = {
    "decode": ["attend", "merge", "attend"],
    "forward": ["forward"],
    "backward": ["backward_queries", "backward_keys"],
    "projections": ["project"],
    "prefill": ["attend_chunk", "attend_window"],
}
"""Kernels in the order in which `_launches` first calls them."""
TENSOR_MEMORY = 512
"""Columns of a Blackwell GPU's tensor memory."""
ROWS, PAGE, COLUMNS, TOKENS, RANK = 128, 128, 64, 4096, 32
CHUNKS = ((1, 512), (4, 1))
"""Rows and tokens of chunks of prompts: a long one, and rows of one token."""
WINDOW = 128


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _launches(monkeypatch, model, card, window=None):
    """Decoding over many pages and over one; the update forward and backward; projections in decoding; chunks of prompts."""
    from discover_jax.kernels import attention_decode, attention_update, projections_decode

    width, heads, kv_heads, size = MODELS[model]
    for module in (attention_update, projections_decode):
        monkeypatch.setattr(module, "compute_capability", lambda: card)
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
    launches += record(monkeypatch, attention_update, update, *rows, _shape(1, TOKENS, dtype=jnp.int32), sinks)
    outs = [n * size for n in (heads, kv_heads, kv_heads)]
    stacks = [Stack(_shape(2, out, width), _shape(2, out), _shape(2, RANK, width), _shape(2, out, RANK)) for out in outs]
    project = functools.partial(projections_decode.project, scale=1.0)
    launches += record(monkeypatch, projections_decode, project, _shape(ROWS, width), stacks, _shape(dtype=jnp.int32))
    return launches + _prefill_launches(monkeypatch, model, card)


def _prefill_launches(monkeypatch, model, card):
    from discover_jax.kernels import attention_prefill

    _, heads, kv_heads, size = MODELS[model]
    monkeypatch.setattr(attention_prefill, "compute_capability", lambda: card)
    pool, sinks, number, launches = _shape(2, 100, kv_heads, PAGE, size), _shape(heads), _shape(dtype=jnp.int32), []
    for batch, tokens in CHUNKS:
        q, lengths = _shape(batch, tokens, heads, size), _shape(batch, dtype=jnp.int32)
        pages = (pool, pool, number, _shape(batch, COLUMNS, dtype=jnp.int32), lengths)
        launches += record(monkeypatch, attention_prefill, attention_prefill.prefill_attention, q, *pages, sinks)
        ring, new = _shape(batch, kv_heads, WINDOW, size), _shape(batch, tokens, kv_heads, size)
        arguments = (q, ring, ring, new, new, lengths, number, sinks)
        launches += record(monkeypatch, attention_prefill, attention_prefill.prefill_windowed_attention, *arguments)
    return launches


@pytest.mark.parametrize(
    ("model", "card", "part"),
    [
        # A few seconds of compiling are in the default run.
        pytest.param(*case, marks=[] if case[:2] == ("qwen2.5-1.5b", 89) and case[2] != "backward" else pytest.mark.slow)
        for case in itertools.product(MODELS, CARDS, PARTS)
    ],
)
def test_kernels_fit_the_shared_memory(monkeypatch, tmp_path, model, card, part):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = _launches(monkeypatch, model, card)
    assert list(dict.fromkeys(launch.name for launch in launches)) == list(dict.fromkeys(itertools.chain(*PARTS.values())))
    for launch in launches:
        if launch.name in PARTS[part]:
            compiled = compile_for(card, launch)
            assert compiled.target.arch == card
            assert compiled.shared <= SHARED_KIB[card] * 1024, launch
            assert getattr(compiled, "tmem_size", 0) <= TENSOR_MEMORY, launch


@pytest.mark.parametrize("card", CARDS)
def test_gpt_oss_launches_are_those_measured(monkeypatch, card):
    """The launches of docs/performance.md's figures, on every card. On small cards, projections have fewer iterations in flight."""
    full, window = (_launches(monkeypatch, "gpt-oss", card, window) for window in (None, 128))
    found = [
        (launch.name, *(launch.constants.get(name) for name in ("BLOCK", "M", "N", "BM", "BN")), launch.stages, launch.warps)
        for launch in (*full[:3], *full[6:7], *full[3:6], *window[3:6])
    ]
    stages = {launch.constants["STAGES"] == launch.stages for launch in full + window if launch.name != "merge"}
    assert stages == {True}
    assert found == [
        ("attend", 64, COLUMNS, None, None, None, 2, 1),
        ("merge", None, None, 64, None, None, 1, 1),
        ("attend", 128, 1, None, None, None, 1, 2),
        ("project", None, 128, 128, None, None, 3 if SHARED_KIB[card] > 99 else 2, 8),
        ("forward", None, None, 64, 128, 64, 4, 4),
        ("backward_queries", None, None, 64, 64, 64, 3, 4),
        ("backward_keys", None, None, 64, 64, 64, 3, 4),
        ("forward", None, None, 64, 64, 64, 2, 4),
        ("backward_queries", None, None, 64, 64, 64, 2, 4),
        ("backward_keys", None, None, 64, 64, 64, 2, 4),
    ]
