"""A bigram policy, whose gradient has a closed form: dL/dlogits = slope (onehot(target) - p) / temperature.

`SLOPES` has each loss's slope in the token's log-probability.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.learning.losses import RatioLimits
from discover_jax.types import Rollout, StopReason

VOCAB = 7
TEMPERATURE = 1.7
LIMITS = RatioLimits(clip_low=0.1, clip_high=0.3, truncate=1.5)
SLOPES = {
    "importance_sampling": lambda ratio, a: -ratio * a,
    "truncated_importance_sampling": lambda ratio, a: -min(ratio, 1.5) * a,
    "ppo": lambda ratio, a: 0.0 if (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.9) else -ratio * a,
    "reinforce": lambda ratio, a: -a,
}


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A model whose logits of the next token are row `token` of frozen + lora."""

    mesh: None = None

    def abstract_lora(self):
        return {"table": jax.ShapeDtypeStruct((VOCAB, VOCAB), jnp.float32)}

    def hidden(self, frozen, lora, tokens_BT, positions_BT, segments_BT, routes_BTLX=None):
        return jax.nn.one_hot(tokens_BT, VOCAB)

    def logits(self, frozen, lora, hidden_xD):
        return hidden_xD @ (frozen if lora is None else frozen + lora["table"])


def make_rollouts(seed, count=9):
    rng = np.random.default_rng(seed)
    rollouts = []
    for index in range(count):
        prompt, length = rng.integers(1, 5), rng.integers(1, 12)
        chosen = rng.random(length) < 0.8
        chosen[0] = True
        rollouts.append(
            Rollout(
                group=0,
                index=index,
                prompt_tokens_P=rng.integers(0, VOCAB, prompt).astype(np.int32),
                tokens_T=rng.integers(0, VOCAB, length).astype(np.int32),
                logprobs_T=np.where(chosen, -rng.uniform(0.5, 3, length), 0).astype(np.float32),
                chosen_T=chosen,
                stop=StopReason.STOP_TOKEN,
                temperature=TEMPERATURE,
            )
        )
    return rollouts, rng.normal(size=count)


def by_hand(table, rollouts, advantages, reduction, loss_name="importance_sampling"):
    """The loss of importance sampling, the gradient of the named loss, and statistics; in float64, token by token.

    An advantage is a number per rollout, or an array with a number per token.
    """
    table = np.asarray(table, np.float64)
    tokens = sum(int(r.chosen_T.sum()) for r in rollouts)
    loss, gradient, gaps, entropies = 0.0, np.zeros_like(table), [], []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        weight = {"sum": 1.0, "token_mean": 1 / tokens, "sequence_mean": 1 / (len(rollouts) * rollout.chosen_T.sum())}[reduction]
        before = rollout.prompt_tokens_P[-1]
        of_token = np.broadcast_to(advantage, len(rollout.tokens_T))
        for token, logprob, chosen, a in zip(rollout.tokens_T, rollout.logprobs_T, rollout.chosen_T, of_token, strict=True):
            if chosen:
                p = np.exp(table[before] / TEMPERATURE)
                p /= p.sum()
                gap = np.log(p[token]) - logprob
                loss -= weight * np.exp(gap) * a
                gradient[before] += weight * SLOPES[loss_name](np.exp(gap), a) * (np.eye(VOCAB)[token] - p) / TEMPERATURE
                gaps.append(gap)
                entropies.append(-(p * np.log(p)).sum())
            before = token
    return loss, gradient, np.array(gaps), np.array(entropies)


def base_gaps(frozen, rollouts):
    """logp_sampler - logp_base of every token, 0 where it was forced, in float64."""
    table, gaps = np.asarray(frozen, np.float64) / TEMPERATURE, []
    for r in rollouts:
        before = np.concatenate([r.prompt_tokens_P[-1:], r.tokens_T[:-1]])
        logp = table[before, r.tokens_T] - np.log(np.exp(table[before]).sum(axis=1))
        gaps.append(np.where(r.chosen_T, r.logprobs_T - logp, 0.0))
    return gaps
