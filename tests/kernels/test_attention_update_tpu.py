"""The TPU kernels of the update's attention, interpreted on a CPU and compared with the references, and compiled for TPUs without one."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import compiled, needs_libtpu, of_all_chips

from discover_jax.kernels import attention_update_pallas, attention_update_tpu
from discover_jax.kernels.attention_update_pallas import Blocks, _seen_pairs, reach
from discover_jax.kernels.attention_update_tpu import attend
from discover_jax.kernels.fallback import warn_reference
from discover_jax.kernels.kernel_set import OPERATIONS, find_kernel, kernel_set
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference


def _problem(lengths_of_rows, tokens, heads=4, kv_heads=2, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(tokens)
    q, k, v, d_out = (rng.normal(size=(len(lengths_of_rows), tokens, n, size)) for n in (heads, kv_heads, kv_heads, heads))
    segments = np.zeros((len(lengths_of_rows), tokens), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        segments[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    real = (segments > 0)[..., None, None]
    q, k, v, d_out = (jax.device_put(x.astype(dtype)) for x in (2 * q, k, v, d_out * real))
    return q, k, v, jax.device_put(segments), jax.device_put(rng.normal(size=heads).astype(np.float32)), d_out, real


def _output_and_gradients(attend, problem):
    """The output and the gradients of queries, keys, values and sinks. Padding's output is 0."""
    q, k, v, segments, sinks, d_out, real = problem

    @jax.jit
    def both(q, k, v, sinks):
        out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, segments, sinks), q, k, v, sinks)
        return jnp.where(real, out, 0), *pull(d_out)

    return [np.asarray(x, np.float32) for x in both(q, k, v, sinks)]


def _compare(problem, window, block, tolerance, interpret: bool | pltpu.InterpretParams = True):
    """With the windowed reference, which has a gradient of the sinks; full attention is a window of the whole row."""
    reference = functools.partial(windowed_attention_reference, window=window or problem[0].shape[1])
    got = _output_and_gradients(functools.partial(attend, window=window, block=block, interpret=interpret), problem)
    for found, expected in zip(got, _output_and_gradients(reference, problem), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))
        assert np.abs(expected).max() > 0.05


ROWS = [([[37]], 37), ([[1, 1, 5, 20], [30]], 33), ([[1], [0]], 1), ([[70, 10, 90], [5, 160]], 190)]
_CASES = [
    (1, None, 8),  # several segments in a block, blocks that segments exclude, and a last block that is not full
    pytest.param(2, None, 8, marks=pytest.mark.slow),  # one token, and a row of padding
    pytest.param(1, 20, 8, marks=pytest.mark.slow),  # a window of several blocks
    *(pytest.param(row, window, block, marks=pytest.mark.slow) for row in (0, 3) for window in (None, 1, 33) for block in (8, 128)),
]


@pytest.mark.parametrize(("row", "window", "block"), _CASES)
def test_the_kernels_agree_with_the_references(row, window, block):
    _compare(_problem(*ROWS[row]), window, block, 1e-5)


def test_three_heads_of_one_key_head_with_a_window_across_the_edges_of_blocks():
    _compare(_problem(*ROWS[1], heads=3, kv_heads=1), 4, 8, 1e-5)


@pytest.mark.parametrize("window", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_rows_whose_gradients_of_keys_do_not_fit_use_two_kernels(monkeypatch, window):
    monkeypatch.setattr(attention_update_pallas, "ROW_MEMORY", 0)
    names = []
    monkeypatch.setattr(attention_update_pallas, "_call", lambda *a, call=attention_update_pallas._call: names.append(a[1]) or call(*a))
    _compare(_problem(*ROWS[1], heads=3, kv_heads=1), window, 8, 1e-5)
    assert names == ["attention_forward", "attention_backward_queries", "attention_backward_keys"]


@pytest.mark.parametrize(("size", "tokens", "fits"), [(64, 34_304, True), (64, 50_000, False), (128, 20_480, True), (128, 34_304, False)])
def test_longest_rows_whose_gradients_of_keys_fit(size, tokens, fits):
    """Bytes in bfloat16: two sums of 4, and two results of 2 in two buffers."""
    assert attention_update_pallas._row_fits(size, tokens, 2) == fits == (16 * size * tokens <= 45 * 2**20)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 1, 8), (16, 2, 64), (12, 2, 128), (7, 7, 64))],
)
def test_groups_of_heads_and_head_sizes(heads, kv_heads, size):
    _compare(_problem([[9, 12], [20]], 25, heads, kv_heads, size), None, 16, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 9])
def test_bfloat16_within_its_rounding(window):
    _compare(_problem([[9, 12], [24]], 25, size=64, dtype=jnp.bfloat16), window, 16, 2e-2)


def test_full_attention_has_the_rounding_points_of_its_reference():
    """In one block the order of sums is the same too, so that nearly all numbers are equal."""
    problem = _problem([[9, 12], [24]], 25, size=64, dtype=jnp.bfloat16)
    got = _output_and_gradients(functools.partial(attend, block=32, interpret=True), problem)
    expected = _output_and_gradients(packed_attention_reference, problem)
    for found, number in zip(got[:4], expected[:4], strict=True):
        assert np.mean(found == number) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("window", "memory"), [(None, 45 * 2**20), (100, 45 * 2**20), (None, 0), (100, 0)])
def test_a_simulated_tpu_finds_no_races(window, memory, capfd, monkeypatch):
    """The simulator has the chip's memories and copies, two cores, and NaN where nothing was written. It prints the races."""
    monkeypatch.setattr(attention_update_pallas, "ROW_MEMORY", memory)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    _compare(_problem([[150, 120]], 300, 2, 1, 64), window, 128, 1e-5, interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 128])
def test_long_rows(window):
    _compare(_problem([[700, 1300], [1900]], 2000, 4, 2, 64, jnp.bfloat16), window, 512, 2e-2)


@pytest.mark.slow
def test_a_sink_of_minus_1e30_is_no_sink():
    q, k, v, segments, sinks, *rest = _problem([[9, 12], []], 25)
    problem = (q, k, v, segments, jnp.full_like(sinks, -1e30), *rest)
    found, expected = (
        _output_and_gradients(function, problem)
        for function in (functools.partial(attend, block=16, interpret=True), functools.partial(windowed_attention_reference, window=25))
    )
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("window", "pairs"), [(None, 10), (1, 4), (8, 7), (9, 7), (10, 9), (100, 10)])
def test_blocks_that_no_query_may_see_are_not_in_the_grid(window, pairs):
    blocks = Blocks(8, 4, window)
    queries, keys = blocks.pairs()
    assert len(queries) == pairs
    seen = {(i, j) for i in range(4) for j in range(4) if i >= j and (window is None or (i - j) * 8 - 7 < window)}
    assert set(zip(queries.tolist(), keys.tolist(), strict=True)) == seen


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_the_grid_has_only_pairs_in_which_a_query_sees_a_key(window, by_keys):
    """Rows with several segments, one of them as long as the row, and with padding."""
    blocks, lengths = Blocks(8, 5, window), [[13, 3, 17, 2], [40], [5], []]
    rows = [np.repeat(range(len(row) + 1), [*row, 40 - sum(row)]) for row in lengths]
    places = np.arange(40)
    expected, first_BT = [], np.zeros((len(rows), 40), np.int32)
    for number, row in enumerate(rows):
        same = (row[:, None] == row) & (places[:, None] >= places) & (row < len(lengths[number]))[:, None]
        same &= places[:, None] - places < (window or 40)
        pairs = {(t // 8, s // 8) for t, s in zip(*np.nonzero(same), strict=True)} | {(i, i) for i in range(5)}  # outputs of padding are 0
        expected.append(sorted(pairs, key=lambda pair: pair[::-1] if by_keys else pair))
        first_BT[number] = np.where(same.any(1), same.argmax(1), places + 1)
    found = jax.jit(lambda first_BT: _seen_pairs(reach(first_BT, blocks)[0], blocks, by_keys=by_keys))(first_BT)
    assert found.counts_B.tolist() == [len(pairs) for pairs in expected]
    assert int(found.steps) == max(map(len, expected))
    listed = np.stack([found.i_BP, found.j_BP], -1).reshape(len(rows), -1, 2)
    for number, pairs in enumerate(expected):
        assert listed[number, : len(pairs)].tolist() == list(map(list, pairs))
        assert (listed[number, len(pairs) :] == pairs[-1]).all()  # so that no other block is written


def test_the_platform_has_these_kernels_and_the_log_names_them(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    find_kernel.cache_clear()
    kernel_set.cache_clear()
    found = kernel_set("tpu")
    kernel_set.cache_clear()
    assert found.kernels >= {"packed_attention", "windowed_attention"}
    assert found.packed_attention is attention_update_tpu.packed_attention
    said = dict(line.removeprefix("kernel of ").split(" on tpu: ") for line in lines)
    assert said["packed_attention"] == "attention_update_tpu.packed_attention"
    assert {name for name in OPERATIONS if not said[name].startswith("reference, because ")} == found.kernels


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_other_platforms_do_not_import_them(platform):
    names = "[name for name in sys.modules if name.endswith(('_tpu', '_pallas')) and 'discover_jax' in name]"
    code = f"import sys; from discover_jax.kernels.kernel_set import kernel_set; kernel_set({platform!r}); print({names})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout == "[]\n"


@pytest.mark.parametrize(
    ("size", "dtypes", "said"),
    [(32, ("float32",) * 3, "32"), (64, ("bfloat16", "bfloat16", "float32"), "float32"), (64, ("float16",) * 3, "float16")],
)
def test_what_the_kernels_do_not_support_uses_the_reference_and_is_logged(monkeypatch, size, dtypes, said):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    warn_reference.cache_clear()
    q, k, v, segments, sinks, *_ = _problem([[5]], 5, size=size)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
    jax.eval_shape(functools.partial(attention_update_tpu.windowed_attention, window=4), q, k, v, segments, sinks)
    warn_reference.cache_clear()
    (line,) = lines
    assert "windowed_attention on tpu" in line
    assert said in line


@pytest.mark.slow
@needs_libtpu
@of_all_chips
def test_they_compile_for_tpus_and_memory_is_bounded(topology):
    """One layer of gpt-oss with the longest row of the report's third run: less than 1.5 GiB, where the scores would take 150 GB."""
    printed = compiled("tpu_compile_program.py", topology, "attention", seconds=900)
    temporaries = [int(line.split()[-1]) for line in printed.splitlines() if line.startswith("temporaries")]
    assert len(temporaries) == 8
    assert max(temporaries) < 1.5 * 2**30
