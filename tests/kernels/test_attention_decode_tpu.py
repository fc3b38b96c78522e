"""The TPU kernels of the cache, interpreted on a CPU and compared with the references: attention to pages, and writing of pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu

from discover_jax.kernels import attention_decode_tpu, pages, pages_tpu
from discover_jax.kernels.attention import prefill_attention_reference
from discover_jax.kernels.attention_decode_pallas import Pages, rows_of_core
from discover_jax.kernels.attention_decode_tpu import attend_pages, choose_pages
from discover_jax.kernels.fallback import warn_reference

SIMULATED = pltpu.InterpretParams(uninitialized_memory="nan")
"""Simulates memories and copies. What nothing has written is NaN."""
LAYERS = 2


def _problem(counts, tokens=1, heads=6, kv_heads=2, size=64, page=128, spare=1, dtype=jnp.float32):
    """Pools with NaN in unused places, scattered pages, and a table whose unused entries are not pages. `counts` include the tokens."""
    rng = np.random.default_rng(sum(counts) + len(counts))
    used = [-(-count // page) for count in counts]
    table = np.full((len(counts), max(used) + spare), 2**31 - 1, np.int32)
    keys, values = np.full((2, LAYERS, sum(used) + 2, kv_heads, page, size), np.nan, np.float32)
    for row, own in enumerate(np.split(rng.permutation(sum(used) + 2), np.cumsum(used))[:-1]):
        table[row, : used[row]] = own
        for j, number in enumerate(own):
            filled = min(page, counts[row] - j * page)
            keys[:, number, :, :filled], values[:, number, :, :filled] = rng.normal(size=(2, LAYERS, kv_heads, filled, size))
    q = 3 * rng.normal(size=(len(counts), tokens, heads, size))
    q, keys, values = (x.astype(dtype) for x in (q, keys, values))
    return q, keys, values, np.int32(1), table, np.array(counts, np.int32) - tokens, rng.normal(size=heads).astype(np.float32)


def _compare(problem, tolerance, interpret=SIMULATED, **options):
    got = jax.jit(functools.partial(attend_pages, interpret=interpret, **options))(*problem)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(prefill_attention_reference)(*problem)
    expected = np.where((problem[5] + problem[0].shape[1] > 0)[:, None, None, None], np.asarray(expected), 0)
    assert got.dtype == problem[2].dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=tolerance)


def test_rows_of_any_lengths_agree_with_the_reference():
    """Groups of two pages: rows that fill no page, a page, or several groups, one token, and no tokens; three query heads per key head."""
    _compare(_problem([300, 1, 0, 128, 400]), 1e-5, chosen=Pages(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "chosen"),
    [
        ({"counts": [1]}, Pages(1, 2)),
        ({"counts": [0, 0]}, Pages(1, 2)),
        ({"counts": [30, 1, 17, 0, 70], "heads": 7, "kv_heads": 1, "size": 128, "page": 16}, Pages(2, 3)),
        ({"counts": [128, 1, 77, 127], "heads": 16, "spare": 0}, Pages(1, 8)),  # rings
        ({"counts": [600, 129], "heads": 28, "kv_heads": 4, "size": 128}, Pages(3, 2)),
        ({"counts": [1500, 256, 3], "heads": 5, "kv_heads": 1, "page": 256}, Pages(4, 3)),
        ({"counts": [2000, 700, 33, 1, 0, 129], "heads": 64, "kv_heads": 8, "dtype": jnp.bfloat16}, None),
        ({"counts": [2000, 700, 33, 1, 0, 129], "heads": 12, "kv_heads": 2, "size": 128, "dtype": jnp.bfloat16}, None),
    ],
    ids=str,
)
def test_heads_pages_and_buffers(problem, chosen):
    _compare(_problem(**problem), 2e-2 if "dtype" in problem else 1e-5, chosen=chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "tokens", "size", "together"), [([40, 168, 300], 40, 64, 16), ([33, 7, 200], 7, 128, 8), ([256, 384], 128, 64, 32)]
)
def test_tokens_of_a_prompt_see_earlier_ones(counts, tokens, size, together):
    _compare(_problem(counts, tokens, size=size), 1e-5, tokens=together, chosen=Pages(2, 2))


@pytest.mark.slow
def test_a_chunk_may_exceed_the_pages_of_a_row():
    """Only by padding, whose output is undefined."""
    q, keys, values, layer, table, lengths, sinks = _problem([160, 200], 32, spare=0)
    problem = (jnp.pad(q, [(0, 0), (0, 96), (0, 0), (0, 0)]), keys, values, layer, table, lengths, sinks)
    got = jax.jit(functools.partial(attend_pages, interpret=SIMULATED, tokens=16, chosen=Pages(2, 2)))(*problem)
    expected = prefill_attention_reference(q, *problem[1:])
    np.testing.assert_allclose(got[:, :32], expected, atol=1e-5)


@pytest.mark.slow
def test_a_simulated_tpu_finds_no_races(capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    _compare(_problem([300, 1, 0, 128, 400]), 1e-5, interpret, chosen=Pages(1, 3))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("needed", [[3, 1, 1, 1, 4], [1, 1], [8], [1], [1, 1, 1, 1, 1, 9], [9, 1, 1]])
def test_cores_have_whole_rows_and_about_half_of_the_groups(needed):
    """Every group is on one core."""
    groups, of_core = np.array(needed), jax.jit(lambda groups, core: rows_of_core(core, len(needed), lambda row: groups[row]))
    (first, own), (second, rest) = ([int(number) for number in of_core(groups, core)] for core in (0, 1))
    assert first == 0 <= second <= len(needed)
    assert own == sum(needed[:second])
    assert rest == sum(needed[second:])
    assert abs(own - rest) <= 2 * max(needed)


def test_a_group_fits_the_table_and_the_chip():
    for columns, heads, tokens in ((1, 64, 1), (68, 64, 1), (68, 64, 16), (3, 12, 1)):
        chosen = choose_pages(columns, 2 * 8 * 128 * 64 * 2, heads * tokens, 128, tokens)
        assert 1 <= chosen.pages <= columns
        assert chosen.buffers >= 2
        assert chosen.buffers * chosen.pages * 2 * 8 * 128 * 128 * 2 < 16 * 2**20


def test_a_step_of_gpt_oss_moves_little_more_than_the_least():
    """128 rows with about 8,192 tokens. A pair of layers reads whole pages. Writing a token moves a page's tiles to the chip and back."""
    counts = np.random.default_rng(0).integers(6_000, 10_400, 128)
    token = 2 * 8 * 64 * 2
    pages = int((-(-counts // 128)).sum())
    moved = (pages + len(counts)) * 128 * token + 2 * len(counts) * 2 * 128 * token
    assert moved < 1.08 * (int(counts.sum()) + len(counts) * 128) * token


def _pools(size, places, dtype=jnp.float32):
    rng = np.random.default_rng(size)
    return rng, [rng.normal(size=(LAYERS, 7, 2, places, size)).astype(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    ("size", "places"), [(64, 128), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((128, 16), (64, 256), (128, 48)))]
)
def test_tokens_are_written_where_the_reference_writes_them(size, places):
    """Several groups of rows, numbers that are not pages, and a NaN that must stay in its row."""
    rng, pools = _pools(size, places)
    rows = np.array([3, 7, 0, 5, 9, 6, 1, 2, 4, 7], np.int32), rng.integers(0, places, 10).astype(np.int32)
    new = rng.normal(size=(2, 10, 2, size)).astype(np.float32)
    new[:, 2] = np.nan
    _compare_written(pools, rows, new)


def _compare_written(pools, rows, new, **options):
    arguments = (*pools, np.int32(1), *rows, *new)
    got = jax.jit(functools.partial(pages_tpu.put_tokens, interpret=SIMULATED, **options))(*arguments)
    for found, expected in zip(got, jax.jit(functools.partial(pages.write_token, **options))(*arguments), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tokens_of_a_row_are_written_to_one_page(monkeypatch):
    """Two rows with three tokens each, around the ends of tiles and of a page; one is not written."""
    monkeypatch.setattr(pages_tpu, "AT_ONCE", 2)  # the kernel repeats its code for each of them
    rng, pools = _pools(128, 32)
    rows = np.array([3, 7, 3, 5, 5, 1], np.int32), np.array([14, 15, 16, 30, 31, 0], np.int32)
    _compare_written(pools, rows, rng.normal(size=(2, 6, 2, 128)).astype(np.float32), tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "places"), [(64, 128), (128, 16)])
def test_pages_are_written_and_copied_as_by_the_reference(size, places):
    rng, pools = _pools(size, places, jnp.bfloat16)
    new = [jnp.asarray(rng.normal(size=(3, 2 * places, 2, size)), jnp.bfloat16) for _ in range(2)]
    own = jnp.array([[3, 7], [0, 5], [9, 1]])
    got = jax.jit(functools.partial(pages_tpu.put_pages, interpret=SIMULATED))(*pools, jnp.int32(1), own, *new)
    for found, expected in zip(got, jax.jit(pages.write_pages)(*pools, jnp.int32(1), own, *new), strict=True):
        np.testing.assert_array_equal(found, expected)
    copy = jax.jit(functools.partial(pages_tpu.put_copy, interpret=SIMULATED))
    for source, target in ((1, 3), (1, 7), (2, 2)):
        got = copy(*pools, jnp.int32(source), jnp.int32(target))
        for found, expected in zip(got, jax.jit(pages.copy_page)(*pools, jnp.int32(source), jnp.int32(target)), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("given", "said"), [({"size": 32}, "head size is 32"), ({"page": 64}, "pages have 64"), ({"dtype": jnp.float16}, "float16")]
)
def test_what_the_kernels_do_not_support_uses_the_references_and_is_logged(monkeypatch, given, said):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    warn_reference.cache_clear()
    q, keys, values, layer, table, lengths, sinks = _problem([20, 3], **given)
    for _ in range(2):
        jax.eval_shape(attention_decode_tpu.paged_attention, q[:, 0], keys, values, layer, table, lengths + 1, sinks)
    jax.eval_shape(attention_decode_tpu.prefill_attention, q, keys, values, layer, table, lengths, sinks)
    jax.eval_shape(pages_tpu.write_token, keys, values, layer, table[:, 0], lengths, q[:, 0, :2], q[:, 0, :2])
    jax.eval_shape(pages_tpu.copy_page, keys, values, layer, layer)
    warn_reference.cache_clear()
    names = ["paged_attention", "prefill_attention", "write_token", "copy_page"]
    assert [line.split()[2] for line in lines] == names
    assert all(said in line for line in lines)
