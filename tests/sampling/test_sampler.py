"""The sampler on Markov chains whose probabilities are known exactly, and on a small gpt-oss."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import LOGITS, STOP, Memory, by_key, check_frequencies, long_prompts, prompts_of, sampler_of
from scipy import special

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.sampling.decoding import SecondPhase
from discover_jax.types import Prompt, StopReason

LENGTHS = (700, 128, 1, 300, 512, 129)
RARE_STOP = LOGITS - 3.5 * (np.arange(5) == STOP)  # long rollouts of very different lengths


@functools.cache
def _with_room():
    """The rollouts of LENGTHS from a cache in which everything fits, by key."""
    sampler = sampler_of(Memory(), max_prompt_tokens=700, max_new_tokens=300, launch_steps=16)
    return by_key(sampler.sample(RARE_STOP, None, long_prompts(LENGTHS), 5, seed=4, step=1))


# On several devices: everything fits; rollouts wait on each device; the batch is halved once on each.
_ON_DEVICES = [(None, 9, 3), pytest.param(28, 8, 2, marks=pytest.mark.slow), (44, 16, 2)]
# Slow, because the case with 14 pages covers them by default.
_MILDER = [pytest.param(pages, 8, 1, marks=pytest.mark.slow) for pages in (None, 24, 16)]


@pytest.mark.parametrize(
    ("pages", "slots", "devices"),
    [*_MILDER, (14, 8, 1), pytest.param(14, 1, 1, marks=pytest.mark.slow), pytest.param(30, 30, 1, marks=pytest.mark.slow), *_ON_DEVICES],
    ids=lambda value: str(value),
)
def test_rollouts_do_not_depend_on_the_number_of_pages(pages, slots, devices, monkeypatch):
    """From a cache in which everything fits down to one that barely fits one rollout. Each token depends on the whole cache of its row."""
    free = _with_room()
    monkeypatch.setattr("discover_jax.sampling.sampler.row_devices", lambda mesh: devices)
    settings = {"max_prompt_tokens": 700, "max_new_tokens": 300, "launch_steps": 16, "slots": slots, "pages": pages}
    seen = []
    sampler = sampler_of(Memory(devices=devices), **settings)
    rollouts = list(sampler.sample(RARE_STOP, None, long_prompts(LENGTHS), 5, seed=4, step=1, on_progress=seen.append))
    assert sorted((r.group, r.index) for r in rollouts) == [(g, i) for g in range(6) for i in range(5)]
    for r in rollouts:
        np.testing.assert_allclose(r.logprobs_T, Memory.expected(RARE_STOP, r, 1.0), atol=1e-5)
        inputs_S = np.concatenate([r.prompt_tokens_P, r.tokens_T])[:-1]
        np.testing.assert_array_equal(r.routes_SLX, Memory._routes(inputs_S))  # across chunks, launches and pauses
    assert len({len(r.tokens_T) for r in rollouts}) > 3
    if pages is None:
        assert seen[-1].set_aside == 0
    else:
        assert seen[-1].pages <= pages
        assert (seen[-1].set_aside > 0) == (slots > 1)
    for key, r in by_key(rollouts).items():
        np.testing.assert_array_equal(r.tokens_T, free[key].tokens_T)


def test_routes_are_recorded_only_if_requested():
    without = list(sampler_of(record_routes=False).sample(LOGITS, None, prompts_of(2), 3, seed=0, step=0))
    assert {r.routes_SLX for r in without} == {None}
    recorded = list(sampler_of().sample(LOGITS, None, prompts_of(2), 3, seed=0, step=0))
    for r, other in zip(recorded, without, strict=True):
        np.testing.assert_array_equal(r.tokens_T, other.tokens_T)
        assert r.routes_SLX.shape == (len(r.prompt_tokens_P) + len(r.tokens_T) - 1, 2, 3)
        assert r.routes_SLX.dtype == np.uint8


def test_a_group_shares_its_prompts_pages():
    """The prompt fills five pages and part of a sixth. Six rollouts have up to 2 pages each. The prompt's sixth page is freed last."""
    seen = []
    sampler = sampler_of(Memory(), max_prompt_tokens=700, max_new_tokens=200, slots=6)
    list(sampler.sample(RARE_STOP, None, long_prompts([650]), 6, seed=0, step=0, on_progress=seen.append))
    assert 5 + 6 + 1 <= seen[-1].pages <= 5 + 6 * 2 + 1


def test_slots_are_used_until_the_tail():
    seen = []
    sampler = sampler_of(Memory(), max_prompt_tokens=128, max_new_tokens=300, slots=4, launch_steps=8, pages=16)
    list(sampler.sample(RARE_STOP, None, long_prompts([100] * 6), 8, seed=0, step=0, on_progress=seen.append))
    assert 0.9 <= seen[-1].utilisation <= 1
    assert seen[-1].finished == 48


def test_a_cache_too_small_for_one_rollout_is_refused():
    with pytest.raises(CapacityError, match=r"1,792.*config\.sampling\.cache_tokens"):
        sampler_of(Memory(), max_prompt_tokens=700, max_new_tokens=300, pages=8)


def test_every_rollout_comes_once_and_ends_at_a_stop_token_or_its_budget():
    rollouts = list(sampler_of().sample(LOGITS, None, prompts_of(5), 7, seed=0, step=0))
    assert collections.Counter((r.group, r.index) for r in rollouts) == {(g, i): 1 for g in range(5) for i in range(7)}
    ends = collections.Counter(r.stop for r in rollouts)
    assert set(ends) == {StopReason.STOP_TOKEN, StopReason.MAX_TOKENS}
    for r in rollouts:
        assert STOP not in r.tokens_T[:-1]
        assert (r.tokens_T[-1] == STOP) == (r.stop is StopReason.STOP_TOKEN)
        assert len(r.tokens_T) == 20 if r.stop is StopReason.MAX_TOKENS else len(r.tokens_T) <= 20
        assert r.chosen_T.all()
        assert len(r.logprobs_T) == len(r.tokens_T) == len(r.chosen_T)
        np.testing.assert_array_equal(r.prompt_tokens_P, prompts_of(5)[r.group].tokens_P)


@functools.cache
def _usual():
    """The rollouts of five prompts with the usual slots and launches, by key."""
    return by_key(sampler_of().sample(LOGITS, None, prompts_of(5), 7, seed=3, step=2))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"slots": 35}, marks=pytest.mark.slow),
        {"slots": 3},
        {"launch_steps": 1},
        pytest.param({"launch_steps": 64}, marks=pytest.mark.slow),
        {"slots": 1},
    ],
)
def test_draws_do_not_depend_on_slots_and_launches(settings):
    expected = _usual()
    got = by_key(sampler_of(**settings).sample(LOGITS, None, prompts_of(5), 7, seed=3, step=2))
    assert got.keys() == expected.keys()
    for key, rollout in got.items():
        np.testing.assert_array_equal(rollout.tokens_T, expected[key].tokens_T)
        np.testing.assert_allclose(rollout.logprobs_T, expected[key].logprobs_T, atol=1e-6)


def test_draws_depend_on_seed_step_group_and_index():
    sampler = sampler_of()

    def draw(**change):
        arguments = {"seed": 0, "step": 0} | change
        return [tuple(r.tokens_T) for r in by_key(sampler.sample(LOGITS, None, prompts_of(1), 8, **arguments)).values()]

    assert draw() == draw()
    assert draw() != draw(seed=1)
    assert draw() != draw(step=1)
    assert len(set(draw())) > 4  # the members of a group differ


def test_frequencies_and_log_probabilities_match_the_chain():
    temperature = 0.7
    rollouts = list(sampler_of(temperature=temperature).sample(LOGITS, None, prompts_of(4), 250, seed=1, step=0))
    check_frequencies(rollouts, temperature)


def test_temperatures_are_spread_over_a_group():
    """Each rollout records its temperature and has log-probabilities at that temperature."""
    rollouts = list(sampler_of(temperature=0.8, temperature_spread=0.5).sample(LOGITS, None, prompts_of(3), 5, seed=1, step=0))
    expected = np.linspace(0.4, 1.2, 5)
    for r in rollouts:
        assert r.temperature == pytest.approx(expected[r.index])
        before = np.concatenate([r.prompt_tokens_P[-1:], r.tokens_T[:-1]])
        log_softmax = special.log_softmax(LOGITS.astype(np.float64) / expected[r.index], axis=1)
        np.testing.assert_allclose(r.logprobs_T, log_softmax[before, r.tokens_T], atol=1e-5)
    alone = list(sampler_of(temperature=0.8, temperature_spread=0.5).sample(LOGITS, None, prompts_of(3), 1, seed=1, step=0))
    assert [r.temperature for r in alone] == pytest.approx([0.8] * 3)


def test_finished_rollouts_come_before_longer_ones_finish():
    """Their programs can then run while other rollouts are sampled."""
    seen = []
    sampler = sampler_of(launch_steps=1)
    rollouts = list(sampler.sample(LOGITS, None, prompts_of(2), 4, seed=0, step=0, on_progress=seen.append))
    lengths = [len(r.tokens_T) for r in rollouts]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    assert seen[-1].finished == seen[-1].total == 8
    assert seen[-1].tokens == sum(lengths)
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)


def test_later_steps_compile_nothing():
    sampler = sampler_of.__wrapped__()  # its own: others may have compiled functions of later steps
    list(sampler.sample(LOGITS, None, prompts_of(5), 7, seed=0, step=0))
    compiled = sampler.compilations
    for step in range(1, 4):
        list(sampler.sample(LOGITS, None, prompts_of(5), 7, seed=0, step=step))
    assert sampler.compilations == compiled


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"temperature": 0.0}, {"stop_ids": ()}, {"max_new_tokens": 0}, {"temperature_spread": 1.0}]
)
def test_invalid_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        sampler_of(**change)


def test_prompts_that_do_not_fit_are_refused_at_the_call():
    with pytest.raises(CapacityError, match=r"\b17\b.*max_prompt_tokens"):
        sampler_of().sample(LOGITS, None, prompts_of(1, 17), 1, seed=0, step=0)
    with pytest.raises(CapacityError, match=r"group 0 .*\b0 "):
        sampler_of().sample(LOGITS, None, prompts_of(1, 0), 1, seed=0, step=0)
    assert list(sampler_of().sample(LOGITS, None, [], 3, seed=0, step=0)) == []


PHASE = SecondPhase(after=6, opening=(3, 4), forced=(2, 2, 1, 3, 4))


def _first_opening(tokens):
    """Index after the first consecutive (3, 4), or None."""
    return next((t + 2 for t in range(len(tokens) - 1) if tuple(tokens[t : t + 2]) == (3, 4)), None)


def test_a_second_phase_is_forced_only_on_rollouts_that_have_not_begun_their_answer():
    free = by_key(sampler_of().sample(LOGITS, None, prompts_of(8), 6, seed=2, step=0))
    forced = by_key(sampler_of(second_phase=PHASE).sample(LOGITS, None, prompts_of(8), 6, seed=2, step=0))
    seen = collections.Counter()
    for key, r in forced.items():
        before = free[key].tokens_T
        begun = _first_opening(before[:6]) is not None
        if len(before) <= 6 or begun:
            seen["free"] += 1
            np.testing.assert_array_equal(r.tokens_T, before)
            assert r.chosen_T.all()
            continue
        seen["forced"] += 1
        np.testing.assert_array_equal(r.tokens_T[:6], before[:6])
        assert tuple(r.tokens_T[6:11]) == PHASE.forced
        np.testing.assert_array_equal(np.flatnonzero(~r.chosen_T), np.arange(6, 11))
        assert (r.logprobs_T[6:11] == 0).all()
        assert len(r.tokens_T) > 11
        # The next tokens are sampled from the distribution after the forced tokens.
        table = special.log_softmax(LOGITS, axis=1)
        np.testing.assert_allclose(r.logprobs_T[11:], table[r.tokens_T[10:-1], r.tokens_T[11:]], atol=1e-5)
    assert min(seen["free"], seen["forced"]) > 5


def test_an_opening_is_recognised_after_a_false_start():
    """3, 3, 4: the first token of the opening comes twice. The chain writes such openings."""
    logits = np.full((5, 5), -40.0, np.float32)
    for now, then in ((1, 3), (3, 4), (4, 4)):
        logits[now, then] = 0.0
    logits[3, 3] = 0.0
    sampler = sampler_of(second_phase=SecondPhase(8, (3, 4), (1, 3, 4)))
    for r in sampler.sample(logits, None, [Prompt(0, "seed", "", np.full(3, 1, np.int32))], 40, seed=0, step=0):
        begun = _first_opening(r.tokens_T[:8]) is not None
        assert r.chosen_T.all() == begun


@functools.cache
def _usual_with_phase():
    """The rollouts of four prompts with a second phase and the usual slots and launches, by key."""
    return by_key(sampler_of(second_phase=PHASE).sample(LOGITS, None, prompts_of(4), 5, seed=1, step=3))


@pytest.mark.parametrize(
    "settings",
    [{"launch_steps": 64, "slots": 3}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"launch_steps": 1}, {"slots": 64}))],
)
def test_a_second_phase_depends_on_neither_slots_nor_launches(settings):
    got = by_key(sampler_of(second_phase=PHASE, **settings).sample(LOGITS, None, prompts_of(4), 5, seed=1, step=3))
    for key, r in _usual_with_phase().items():
        np.testing.assert_array_equal(got[key].tokens_T, r.tokens_T)
        np.testing.assert_array_equal(got[key].chosen_T, r.chosen_T)
        np.testing.assert_allclose(got[key].logprobs_T, r.logprobs_T, atol=1e-6)


def test_invalid_second_phases_are_refused():
    for change, setting in (
        ({"after": 0}, "after"),
        ({"opening": (3, 3), "forced": (3, 3)}, "opening"),
        ({"forced": (1, 2)}, "forced"),
    ):
        with pytest.raises(ConfigError, match=rf"^{setting}\b"):
            dataclasses.replace(PHASE, **change)
    with pytest.raises(ConfigError, match=r"max_new_tokens.*\b12\b"):
        sampler_of(max_new_tokens=11, second_phase=PHASE)
    with pytest.raises(ConfigError, match="second_phase"):
        sampler_of(second_phase=dataclasses.replace(PHASE, forced=(STOP, 3, 4)))


def test_log_probabilities_equal_a_full_forward_of_gpt_oss(random_weights):
    """Prompts of different lengths around the sliding window, longer rollouts, refilled slots, and an adapter that is not zero."""
    config = ModelConfig(2, 32, 2, 1, 16, 4, 2, 32, 61, sliding_window=16, eos_id=1, pad_id=0)
    model = Model(config, LoraConfig(4, 2, 4))
    frozen = random_weights(model.abstract_frozen())
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), model.abstract_lora())
    prompts = [Prompt(g, "seed", "", rng.integers(2, 61, n).astype(np.int32)) for g, n in enumerate((3, 15, 16, 17, 40))]
    sampler = sampler_of(model, slots=4, max_prompt_tokens=40, max_new_tokens=24, stop_ids=(1,), launch_steps=8)

    @functools.partial(jax.jit)
    def logprobs(tokens_1T):
        positions = jnp.arange(tokens_1T.shape[1])[None]
        hidden = model.hidden(frozen, lora, tokens_1T, positions, jnp.ones_like(positions))
        return jax.nn.log_softmax(model.logits(frozen, lora, hidden))[0]

    rollouts = list(sampler.sample(frozen, lora, prompts, 2, seed=0, step=0))
    assert len(rollouts) == 10
    for r in rollouts:
        tokens = np.zeros((1, 64), np.int32)  # padding at the end does not matter to a causal model, and one shape is compiled
        start, end = len(r.prompt_tokens_P), len(r.prompt_tokens_P) + len(r.tokens_T)
        tokens[0, :end] = np.concatenate([r.prompt_tokens_P, r.tokens_T])
        expected = np.asarray(logprobs(tokens))[np.arange(start - 1, end - 1), r.tokens_T]
        np.testing.assert_allclose(r.logprobs_T, expected, atol=1e-4)
