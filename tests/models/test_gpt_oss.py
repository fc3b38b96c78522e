"""Self-consistency of the model: cached decoding, packed sequences, adapters, rematerialisation; and published constants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.exceptions import CapacityError, ConfigError, ShardingError
from discover_jax.models.cache import Cache, copy_page, put_pages, take_pages
from discover_jax.models.config import REMAT, LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families.gpt_oss import GPT_OSS_20B, GPT_OSS_120B
from discover_jax.models.frequencies import yarn_frequencies, yarn_ramp
from discover_jax.models.sharding import make_mesh, spec_for

CONFIG = ModelConfig(
    num_layers=4,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    num_experts=4,
    experts_per_token=2,
    mlp_width=32,
    vocab_size=97,
    sliding_window=8,
    eos_id=1,
    pad_id=0,
)
MODEL = Model(CONFIG, LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=8.0))


@pytest.fixture(scope="module")
def frozen(random_weights):
    return random_weights(MODEL.abstract_frozen())


@pytest.fixture(scope="module")
def lora():
    """An adapter with an effect. (A new one has B = 0.)"""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype)), MODEL.abstract_lora())


def _tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _full(model, frozen, lora, tokens_BT, positions_BT, segments_BT):
    return model.logits(frozen, lora, model.hidden(frozen, lora, tokens_BT, positions_BT, segments_BT))


def _logits(*arguments):
    """The logits of all tokens, in NumPy. Slices of a JAX array would be compiled."""
    padded, rows, length = _padded_logits(*arguments)
    return np.asarray(padded)[:rows, :length]


def _padded_logits(model, frozen, lora, tokens_BT, positions_BT=None, segments_BT=None):
    """The logits with further rows and tokens, and the numbers of true ones. They change nothing, and so one shape is compiled for most
    tests."""
    rows, length = tokens_BT.shape
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(length), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = np.ones_like(positions_BT)
    padding = (0, max(0, 3 - rows)), (0, max(0, 50 - length))
    padded = (np.pad(np.asarray(each, np.int32), padding) for each in (tokens_BT, positions_BT, segments_BT))
    return _full(model, frozen, lora, *padded), rows, length


_prefill = jax.jit(MODEL.prefill)
_decode = jax.jit(MODEL.decode)
_logits_of = jax.jit(MODEL.logits)
_init_cache = jax.jit(MODEL.init_cache, static_argnums=(0, 1, 2))
_copy_page, _put_pages, _take_pages = jax.jit(copy_page), jax.jit(put_pages), jax.jit(take_pages)


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cached_decoding_equals_the_full_forward(frozen, lora, adapted):
    """Rows are shorter and longer than the window, and are decoded well past it."""
    lora = lora if adapted else None
    tokens_BT = _tokens(3, 40)
    expected = _logits(MODEL, frozen, lora, tokens_BT)
    lengths_B = np.array([1, 7, 19])
    hidden_BD, cache, _ = _prefill(frozen, lora, tokens_BT[:, :20], lengths_B, _init_cache(3, 40, 4))
    for step in range(20):
        at_B = np.asarray(lengths_B) + step
        got = np.asarray(_logits_of(frozen, lora, hidden_BD))
        np.testing.assert_allclose(got, expected[np.arange(3), at_B - 1], atol=1e-4, rtol=0)
        hidden_BD, cache, _ = _decode(frozen, lora, tokens_BT[np.arange(3), at_B], cache)
    assert cache.lengths_B.tolist() == [21, 27, 39]


@pytest.mark.parametrize(
    ("length", "chunk", "page_size"),
    [(37, 8, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((37, 20, 20), (40, 40, 8), (5, 12, 12), (33, 16, 16)))],
)
def test_prompts_read_in_chunks_give_equal_logits(frozen, lora, length, chunk, page_size):
    """Chunks are longer and shorter than the window, and pages are in random order. Decoding continues token by token."""
    tokens_1T = _tokens(1, 50, seed=length)
    expected = _logits(MODEL, frozen, lora, tokens_1T)[0]
    cache = _init_cache(1, 60, page_size)
    cache = dataclasses.replace(cache, pages_BM=jax.device_put(np.random.default_rng(0).permutation(cache.pool.pages)[None]))
    hidden_BD = None
    for first in range(0, length, chunk):
        part = tokens_1T[:, first : min(first + chunk, length)]
        padded = np.pad(part, ((0, 0), (0, chunk - part.shape[1])), constant_values=3)
        hidden_BD, cache, _ = _prefill(frozen, lora, padded, np.array([part.shape[1]]), cache)
    assert cache.lengths_B.tolist() == [length]
    for position in range(length, 50):
        np.testing.assert_allclose(np.asarray(_logits_of(frozen, lora, hidden_BD))[0], expected[position - 1], atol=1e-4, rtol=0)
        hidden_BD, cache, _ = _decode(frozen, lora, tokens_1T[:, position], cache)


def test_replaying_routes_gives_equal_outputs(frozen, lora):
    """Routes come from chunked prefill and from decoding. Replaying them equals free routing; changing one changes later tokens."""
    tokens_1T = _tokens(1, 30, seed=5)
    cache, read = _init_cache(1, 60, 4), []  # the shapes of another test, whose compiled functions are used
    for first, count in ((0, 8), (8, 3)):
        padded = np.pad(tokens_1T[:, first : first + count], ((0, 0), (0, 8 - count)))
        _, cache, routes = _prefill(frozen, lora, padded, np.array([count]), cache)
        read.append(np.asarray(routes)[:, :count])
    for position in range(11, 30):
        _, cache, routes = _decode(frozen, lora, tokens_1T[:, position], cache)
        read.append(np.asarray(routes)[:, None])
    routes_1TLX = np.concatenate(read, axis=1)
    assert routes_1TLX.shape == (1, 30, *MODEL.routes.shape)
    assert routes_1TLX.dtype == MODEL.routes.dtype == np.uint8
    positions, ones = np.arange(30)[None], np.ones((1, 30), np.int32)
    hidden = jax.jit(MODEL.hidden)
    free = hidden(frozen, lora, tokens_1T, positions, ones)
    np.testing.assert_allclose(hidden(frozen, lora, tokens_1T, positions, ones, routes_1TLX), free, atol=1e-4)
    # Another expert in the last layer at the last token changes only that token; in the first layer at position 7, it changes later ones.
    for position, layer in ((29, 3), (7, 0)):
        others = set(range(CONFIG.num_experts)) - set(routes_1TLX[0, position, layer].tolist())
        replayed = routes_1TLX.copy()
        replayed[0, position, layer, 1] = min(others)
        other = hidden(frozen, lora, tokens_1T, positions, ones, replayed)
        changed = np.abs(np.asarray(other) - np.asarray(free)).max(axis=(0, 2)) > 1e-3
        assert not changed[:position].any()
        assert changed[position]


def test_rows_share_and_copy_pages(frozen):
    """Two rows continue a prompt that fills one page and part of another. Then they do so from pages moved to another pool."""
    tokens_1T = _tokens(1, 6)
    _, read, _ = _prefill(frozen, None, np.pad(tokens_1T, ((0, 0), (0, 2))), np.array([6]), _init_cache(1, 16, 4))
    assert read.pages_BM.tolist() == [[0, 1, 2, 3]]
    pool = _copy_page(read.pool, np.int32(1), np.int32(3))
    # Pages 4 and 9 are invalid.
    elsewhere = _put_pages(_init_cache(1, 16, 4).pool, np.array([2, 0, 4]), _take_pages(pool, np.array([0, 3, 9])))
    np.testing.assert_array_equal(_copy_page(pool, np.int32(0), np.int32(4)).keys_LPKsH, pool.keys_LPKsH)
    larger = _put_pages(_init_cache(1, 24, 4).pool, np.array([5, 0, 6]), _take_pages(pool, np.array([0, 3, 9])))
    for to, first in ((larger.keys_LPKsH, pool.keys_LPKsH), (larger.values_LPKsH, pool.values_LPKsH)):
        moved = np.zeros_like(to)
        moved[:, [5, 0]] = np.asarray(first)[:, [0, 3]]
        np.testing.assert_array_equal(to, moved)
    ring_k, ring_v = (jax.device_put(np.repeat(ring, 2, axis=1)) for ring in (read.ring_k_LBKWH, read.ring_v_LBKWH))
    for pages, pages_BM in ((pool, [[0, 1], [0, 3]]), (elsewhere, [[2, 0], [2, 0]])):
        rows = Cache(pages, ring_k, ring_v, jax.device_put(np.array(pages_BM, np.int32)), jax.device_put(np.array([6, 6], np.int32)))
        tokens_B = np.array([5, 7]) if pages is pool else np.array([5, 5])
        hidden_BD, after, _ = _decode(frozen, None, tokens_B, rows)
        for row, token in enumerate(tokens_B):
            expected = _logits(MODEL, frozen, None, np.concatenate([tokens_1T, [[token]]], axis=1))[0, -1]
            np.testing.assert_allclose(np.asarray(_logits_of(frozen, None, hidden_BD))[row], expected, atol=1e-4, rtol=0)
        assert after.lengths_B.tolist() == [7, 7]


def test_empty_rows_write_no_page(frozen):
    cache = _init_cache(2, 8, 4)
    _, cache, _ = _prefill(frozen, None, _tokens(2, 4), np.array([4, 4]), cache)
    emptied = dataclasses.replace(cache, lengths_B=jax.device_put(np.array([4, 0], np.int32)))
    _, after, _ = _decode(frozen, None, np.array([5, 6]), emptied)
    changed = np.flatnonzero((np.asarray(after.pool.keys_LPKsH) != np.asarray(cache.pool.keys_LPKsH)).any(axis=(0, 2, 3, 4)))
    assert changed.tolist() == [1]


@pytest.mark.parametrize(("chunk", "capacity"), [(6, 16), (12, 8)])
def test_invalid_chunk_sizes_are_refused(frozen, chunk, capacity):
    with pytest.raises(CapacityError, match=rf"\b{chunk} tokens.*pages"):
        MODEL.prefill(frozen, None, _tokens(1, chunk), jnp.array([4]), _init_cache(1, capacity, 4))


def test_packed_sequences_do_not_see_each_other(frozen, lora):
    first, second = _tokens(1, 15, seed=1), _tokens(1, 11, seed=2)
    packed = np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1)
    positions = np.concatenate([np.arange(15), np.arange(11), np.zeros(4, int)])[None]
    segments = np.repeat([1, 2, 0], [15, 11, 4])[None]
    got = _logits(MODEL, frozen, lora, packed, positions, segments)
    np.testing.assert_allclose(got[:, :15], _logits(MODEL, frozen, lora, first), atol=1e-4, rtol=0)
    np.testing.assert_allclose(got[:, 15:26], _logits(MODEL, frozen, lora, second), atol=1e-4, rtol=0)
    assert np.isfinite(got).all()


def test_a_new_adapter_has_no_effect_and_a_trained_one_does(frozen, lora):
    tokens_BT = _tokens(2, 20)
    base = _logits(MODEL, frozen, None, tokens_BT)
    np.testing.assert_array_equal(_logits(MODEL, frozen, MODEL.init_lora(jax.random.key(1)), tokens_BT), base)
    assert np.abs(_logits(MODEL, frozen, lora, tokens_BT) - base).max() > 0.1


def test_unmerged_adapter_equals_merged_weights(frozen, lora):
    """Merges W + alpha / rank B A here for every target."""

    def merge(base, adapter):
        merged = dict(base)
        for name, value in adapter.items():
            if isinstance(value, dict):
                merged[name] = merge(base[name], value)
        if "lora_a" in adapter:
            rank = adapter["lora_a"].shape[-2]
            merged["weight"] = np.asarray(base["weight"]) + 8.0 / rank * np.asarray(adapter["lora_b"]) @ np.asarray(adapter["lora_a"])
        return merged

    tokens_BT = _tokens(2, 20)
    expected = _logits(MODEL, merge(frozen, lora), None, tokens_BT)
    np.testing.assert_allclose(_logits(MODEL, frozen, lora, tokens_BT), expected, atol=2e-3, rtol=1e-4)


def test_targets_of_rank_0_have_no_adapter():
    model = Model(CONFIG, LoraConfig(attention_rank=4, expert_rank=0, head_rank=0))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.abstract_lora())}
    assert len(names) == 2 * 4 * 2  # two kinds of layers, four projections, A and B
    assert all("attention" in name for name in names)


@pytest.mark.slow
def test_remat_changes_memory_but_not_gradients(frozen, lora):
    tokens_BT, gradients, sizes = _tokens(1, 200), [], []
    for remat in REMAT:
        model = dataclasses.replace(MODEL, remat=remat)

        def loss(lora, model=model):
            padded, rows, length = _padded_logits(model, frozen, lora, tokens_BT)
            return jnp.sum(jnp.sin(padded[:rows, :length]))

        compiled = jax.jit(jax.grad(loss)).lower(lora).compile()
        gradients.append(compiled(lora))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    for recomputed in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradients[0], recomputed)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.9 * sizes[0]


def test_published_sizes_have_the_published_parameter_counts():
    """116.8 B and 20.9 B parameters (model card), counted in abstract trees without creating arrays."""
    for config, billions in ((GPT_OSS_120B, 116.8), (GPT_OSS_20B, 20.9)):
        tree = Model(config, dtype=jnp.bfloat16, experts="dense").abstract_frozen()
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e9 == pytest.approx(billions, abs=0.05)
    packed = Model(GPT_OSS_120B, dtype=jnp.bfloat16, experts="packed").abstract_frozen()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(packed))
    assert size == pytest.approx(65_248_815_744, rel=1e-3)  # the published checkpoint
    attention = Model(GPT_OSS_120B, LoraConfig(32, 0, 0)).abstract_lora()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(attention)) / 1e6 == pytest.approx(23.9, abs=0.05)


def test_yarn_has_the_published_constants():
    low, high = yarn_ramp(GPT_OSS_120B)
    assert (low, high) == (pytest.approx(8.0928, abs=1e-4), pytest.approx(17.3980, abs=1e-4))
    frequencies, factor = yarn_frequencies(GPT_OSS_120B)
    assert factor == pytest.approx(1.346574, abs=1e-6)
    assert frequencies[8] == pytest.approx(150_000 ** (-16 / 64), rel=1e-6)  # below the ramp: unchanged
    assert frequencies[18] == pytest.approx(150_000 ** (-36 / 64) / 32, rel=1e-6)  # above it: divided by 32


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_heads": 3}, {"experts_per_token": 5}, {"head_size": 15}])
def test_invalid_sizes_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)


def test_sharding_errors_name_axes_and_devices():
    with pytest.raises(ShardingError, match=r"'heads'.*'vocab'.*'tensor'"):
        spec_for(("heads", "vocab"))
    with pytest.raises(ShardingError, match="colour"):
        spec_for(("colour",))
    with pytest.raises(ShardingError, match="devices"):
        make_mesh(data=len(jax.devices()) + 1)
