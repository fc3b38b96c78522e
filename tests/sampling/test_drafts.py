"""Sampling with drafts yields what sampling without them yields."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import LOGITS, STOP, Chain, Memory, by_key, check_frequencies, long_prompts, prompts_of, sampler_of

from discover_jax.exceptions import ConfigError
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.sampling.decoding import SecondPhase
from discover_jax.sampling.drafts import LONGEST, SHORTEST, propose
from discover_jax.types import Prompt, StopReason

RARE_STOP = LOGITS - 3.5 * (np.arange(5) == STOP)


def _check_equal(got, expected, atol=1e-5):
    got, expected = by_key(got), by_key(expected)
    assert got.keys() == expected.keys()
    for key, one in got.items():
        other = expected[key]
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)
        np.testing.assert_array_equal(one.chosen_T, other.chosen_T)
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=atol)
        assert one.stop is other.stop
        if other.routes_SLX is not None:
            np.testing.assert_array_equal(one.routes_SLX, other.routes_SLX)


def _drafted(tokens, count):
    """`propose` for one row by its definition: None without a match."""
    for n in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):  # the match is tokens[end - n : end]
            if tokens[end - n : end] == tokens[-n:]:
                after = list(tokens)
                for i in range(count):
                    after.append(after[end + i])
                return after[len(tokens) :]
    return None


@pytest.mark.parametrize(("vocab", "count"), [(2, 1), (3, 4), (6, 3), (30, 5)])
def test_a_draft_follows_the_last_of_the_longest_matches(vocab, count):
    rng = np.random.default_rng(vocab)
    lengths = np.array([1, 2, 3, 4, 7, 20, 39, 40])
    history = rng.integers(0, vocab, (len(lengths), 40)).astype(np.int32)
    history[5, 13:20] = history[5, 2:9]  # a match longer than chance gives
    history[7, 20:] = 1  # the row repeats itself
    drafts, found = jax.jit(propose, static_argnums=2)(history, lengths, count)
    for row, length in enumerate(lengths):
        expected = _drafted(history[row, :length].tolist(), count)
        assert found[row] == (expected is not None)
        if expected is not None:
            np.testing.assert_array_equal(drafts[row], expected)


LENGTHS = (300, 128, 1, 127)


@functools.cache
def _plain():
    sampler = sampler_of(Memory(), max_prompt_tokens=300, max_new_tokens=200, slots=8)
    return list(sampler.sample(RARE_STOP, None, long_prompts(LENGTHS), 3, seed=4, step=1))


@pytest.mark.parametrize(
    ("drafts", "settings"),
    [
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(15, {}, marks=pytest.mark.slow),
        pytest.param(4, {"launch_steps": 1}, marks=pytest.mark.slow),
        pytest.param(1, {"slots": 3}, marks=pytest.mark.slow),
        (2, {"launch_steps": 1, "pages": 10}),  # rollouts are set aside
        (5, {"pages": 24, "devices": 2}),
    ],
    ids=str,
)
def test_rollouts_are_those_without_drafts(drafts, settings, monkeypatch):
    """Each token depends on the whole cache of its row. Rows cross the ends of pages, end, wait, and are sampled on several devices."""
    devices = settings.get("devices", 1)
    monkeypatch.setattr("discover_jax.sampling.sampler.row_devices", lambda mesh: devices)
    given = {"max_prompt_tokens": 300, "max_new_tokens": 200, "slots": 8} | {k: v for k, v in settings.items() if k != "devices"}
    seen = []
    sampler = sampler_of(Memory(devices=devices), draft_tokens=drafts, **given)
    _check_equal(sampler.sample(RARE_STOP, None, long_prompts(LENGTHS), 3, seed=4, step=1, on_progress=seen.append), _plain())
    last = seen[-1]
    assert last.passes + last.accepted == last.tokens
    assert last.passes < last.passes + last.accepted
    assert 0 < last.accepted < last.drafted <= drafts * last.passes
    assert (last.set_aside > 0) == (settings.get("pages") == 10)


_NO_PHASE = pytest.param(None, marks=pytest.mark.slow)  # rollouts that end before the second phase cover it


@pytest.mark.parametrize("phase", [_NO_PHASE, SecondPhase(after=6, opening=(3, 4), forced=(2, 2, 1, 3, 4))])
def test_ends_and_forced_tokens_are_those_without_drafts(phase):
    """Stop tokens, the end of the budget and the start of a second phase fall into drafts."""
    settings = {"max_new_tokens": 24, "second_phase": phase}
    draw = {"seed": 1, "step": 3}
    plain = list(sampler_of(Memory(), **settings).sample(LOGITS, None, prompts_of(6, 12), 8, **draw))
    seen = []
    _check_equal(
        sampler_of(Memory(), draft_tokens=6, **settings).sample(LOGITS, None, prompts_of(6, 12), 8, **draw, on_progress=seen.append), plain
    )
    assert {r.stop for r in plain} == set(StopReason)
    assert seen[-1].accepted > 20


def test_a_row_that_repeats_itself_takes_few_passes():
    """A cycle of three tokens: the first passes find no match; from then on each draft is accepted. The last draft fits the budget."""
    logits = np.full((5, 5), -40.0, np.float32)
    for now, then in ((1, 2), (2, 3), (3, 1)):
        logits[now, then] = 0.0
    seen = []
    sampler = sampler_of(Chain(), slots=1, max_new_tokens=100, draft_tokens=7, launch_steps=32)
    prompts = [Prompt(0, "seed", "", np.array([1], np.int32))]
    (rollout,) = sampler.sample(logits, None, prompts, 1, seed=0, step=0, on_progress=seen.append)
    np.testing.assert_array_equal(rollout.tokens_T, [2, 3, 1] * 33 + [2])
    no_match = SHORTEST + 2  # a period and the tokens of the shortest match
    assert seen[-1].passes == no_match - 1 + -(-(100 - no_match + 1) // 8)
    assert seen[-1].drafted == seen[-1].accepted


@pytest.mark.parametrize(("slots", "all_of_them"), [(8, True), (9, False)])
def test_drafts_are_for_small_batches(slots, all_of_them):
    """8 rows with 15 draft tokens are 128 tokens a pass, the limit. Larger batches have none."""
    seen = []
    sampler = sampler_of(Chain(), slots=slots, draft_tokens=15)
    list(sampler.sample(LOGITS, None, prompts_of(2), 8, seed=0, step=0, on_progress=seen.append))
    assert (seen[-1].passes > 0) == all_of_them
    assert (seen[-1].passes + seen[-1].accepted == seen[-1].tokens) == all_of_them


def test_a_batch_size_is_launched_either_with_drafts_or_without(monkeypatch):
    """Few rollouts fit the cache, so when the last one begins, few are live, and the batch is halved at once."""
    sampler, plain, drafting = sampler_of(Memory(), slots=16, max_prompt_tokens=128, max_new_tokens=128, pages=6, draft_tokens=15), [], []

    def recorded(launch, sizes):
        return lambda frozen, lora, pool, rows, *rest: sizes.append(len(rows.alive_B)) or launch(frozen, lora, pool, rows, *rest)

    monkeypatch.setattr(sampler, "_launch", recorded(sampler._launch, plain))
    monkeypatch.setattr(sampler, "_draft_launch", recorded(sampler._draft_launch, drafting))
    assert len(list(sampler.sample(RARE_STOP, None, prompts_of(1, 128), 16, seed=0, step=0))) == 16
    assert set(plain) == {16}
    assert set(drafting) == {8}


def test_later_steps_compile_nothing():
    sampler = sampler_of.__wrapped__(draft_tokens=7)  # its own: others may have compiled functions of later steps
    list(sampler.sample(LOGITS, None, prompts_of(5), 7, seed=0, step=0))
    compiled = sampler.compilations
    list(sampler.sample(LOGITS, None, prompts_of(5), 7, seed=0, step=1))
    assert sampler.compilations == compiled


@pytest.mark.parametrize("count", [-1, 16])
def test_invalid_lengths_are_refused(count):
    with pytest.raises(ConfigError, match="draft_tokens"):
        sampler_of(draft_tokens=count)


def test_frequencies_are_those_of_the_chain():
    """Of each state, the next tokens, both where drafts were accepted and where they were not."""
    temperature, seen = 0.7, []
    sampler = sampler_of(temperature=temperature, draft_tokens=7)
    rollouts = list(sampler.sample(LOGITS, None, prompts_of(4), 150, seed=1, step=0, on_progress=seen.append))
    assert seen[-1].accepted > 600
    check_frequencies(rollouts, temperature)


GPT_OSS = ModelConfig(2, 32, 2, 1, 16, 4, 2, 32, 61, sliding_window=16, eos_id=1, pad_id=0)
DENSE = dataclasses.replace(
    GPT_OSS, num_experts=0, experts_per_token=0, sliding_window=0, pattern=("full",), family="qwen2", sinks=False, o_bias=False, tied=True
)


def _model(config, dtype, random_weights):
    """A model whose logits are large, so that it repeats itself, with an adapter that is not zero."""
    model = Model(config, LoraConfig(attention_rank=4, expert_rank=2, head_rank=4, mlp_rank=2), dtype=dtype)
    frozen = random_weights(model.abstract_frozen())
    rng = np.random.default_rng(0)
    return model, frozen, jax.tree.map(lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype)), model.abstract_lora())


def _long_repeats(count):
    """Prompts that repeat a text, so that there are matches from the first token on."""
    rng = np.random.default_rng(0)
    return [Prompt(g, "seed", "", np.resize(rng.integers(2, 61, 9), 20 + 50 * g).astype(np.int32)) for g in range(count)]


@pytest.mark.parametrize("config", [GPT_OSS, pytest.param(DENSE, marks=pytest.mark.slow)], ids=["gpt-oss", "dense"])
def test_rollouts_of_real_models_are_those_without_drafts(config, random_weights):
    """float32, past the end of a page and of the window, with routes."""
    model, *weights = _model(config, jnp.float32, random_weights)
    settings = {"slots": 4, "max_prompt_tokens": 130, "max_new_tokens": 60, "stop_ids": (1,), "temperature": 0.4, "launch_steps": 8}
    plain, seen = list(sampler_of(model, **settings).sample(*weights, _long_repeats(3), 2, seed=0, step=0)), []
    drafting = sampler_of(model, **settings, draft_tokens=5)
    _check_equal(drafting.sample(*weights, _long_repeats(3), 2, seed=0, step=0, on_progress=seen.append), plain, atol=1e-4)
    assert seen[-1].accepted > 10
    assert max(len(r.tokens_T) for r in plain) == 60


@pytest.mark.slow
def test_the_log_probability_gap_in_bfloat16_is_that_without_drafts(random_weights):
    """With the sampler's routes, the trainer's log-probabilities differ from the sampler's by rounding."""
    model, *weights = _model(GPT_OSS, jnp.bfloat16, random_weights)
    settings = {"slots": 4, "max_prompt_tokens": 130, "max_new_tokens": 60, "stop_ids": (1,), "temperature": 0.4, "launch_steps": 8}

    @jax.jit
    def logprobs(tokens_1T, routes_1TLX):
        positions = jnp.arange(tokens_1T.shape[1])[None]
        hidden = model.hidden(*weights, tokens_1T, positions, jnp.ones_like(positions), routes_1TLX)
        return jax.nn.log_softmax(model.logits(*weights, hidden) / np.float32(0.4))[0]

    mean = {}
    for drafts in (0, 5):
        gaps = []
        for r in sampler_of(model, **settings, draft_tokens=drafts).sample(*weights, _long_repeats(3), 2, seed=0, step=0):
            tokens = np.concatenate([r.prompt_tokens_P, r.tokens_T])[:-1]
            padded = np.pad(tokens, (0, 192 - len(tokens)))[None]
            routes = np.pad(r.routes_SLX, ((0, 192 - len(tokens)), (0, 0), (0, 0)))[None]
            places = len(r.prompt_tokens_P) - 1 + np.arange(len(r.tokens_T))
            gaps.append(np.abs(np.asarray(logprobs(padded, routes))[places, r.tokens_T] - r.logprobs_T))
        mean[drafts] = np.concatenate(gaps).mean()
    assert mean[5] < 1.2 * mean[0] + 1e-3
