"""Models whose probabilities are known exactly, and samplers of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from discover_jax.models.cache import Pool, copy_page
from discover_jax.sampling.sampler import Sampler
from discover_jax.types import Prompt

STOP = 0


@dataclasses.dataclass(frozen=True)
class Chain:
    """A model whose next token depends only on the last one. `frozen` is the table of logits [V, V]; the cache only counts tokens."""

    vocab: int = 5
    width: int = 1
    dtype: type = jnp.float32

    @property
    def config(self):
        return self

    mesh = None
    routes = jax.ShapeDtypeStruct((2, 3), jnp.uint8)

    @staticmethod
    def _routes(tokens):
        """Expert numbers that identify the token and the layer."""
        return (tokens[..., None, None] + np.arange(2, dtype=np.int32)[:, None] * 10 + np.zeros(3, np.int32)).astype(np.uint8)

    def init_pool(self, pages, page_size):
        return Pool(*(jnp.zeros((1, pages, 1, page_size, 1)) for _ in range(2)))

    def abstract_pool(self, pages, page_size):
        return jax.eval_shape(lambda: self.init_pool(pages, page_size))

    def init_rings(self, batch):
        return tuple(jnp.zeros((1, batch, 1, 1, 1)) for _ in range(2))

    def cast(self, lora):
        return lora

    def lay_out(self, frozen, lora):
        return frozen, lora

    def copy_page(self, pool, source, target):
        return copy_page(pool, source, target)

    def prefill(self, frozen, lora, tokens_BC, counts_B, cache):
        last_B = jnp.take_along_axis(tokens_BC, counts_B[:, None] - 1, axis=1)
        return last_B.astype(jnp.float32), dataclasses.replace(cache, lengths_B=cache.lengths_B + counts_B), self._routes(tokens_BC)

    def decode(self, frozen, lora, tokens_B, cache):
        return tokens_B[:, None].astype(jnp.float32), dataclasses.replace(cache, lengths_B=cache.lengths_B + 1), self._routes(tokens_B)

    def decode_drafts(self, frozen, lora, tokens_BT, counts_B, cache):
        return tokens_BT[..., None].astype(jnp.float32), cache, (), self._routes(tokens_BT)

    def keep_drafts(self, cache, new, kept_B):
        return dataclasses.replace(cache, lengths_B=cache.lengths_B + kept_B)

    def decode_logits(self, frozen, lora, hidden_BD):
        return frozen[hidden_BD[:, 0].astype(jnp.int32)]


@dataclasses.dataclass(frozen=True)
class Memory(Chain):
    """A chain whose state is the sum over all tokens so far, each times a factor of its position, modulo V. It is read from the cache.

    Every token is written to its page, so a lost, swapped or overwritten page changes the state. Pages store token + 1; 0 means empty. Rows
    and pages are split equally over `devices`; a row must not use a page of another device.
    """

    devices: int = 1

    def _state(self, cache, lengths_B):
        stored_BS = cache.pool.keys_LPKsH[0, cache.pages_BM, 0, :, 0].reshape(len(cache.pages_BM), -1)
        positions_S, rows = jnp.arange(stored_BS.shape[1]), len(cache.pages_BM)
        seen_BS = positions_S < lengths_B[:, None]
        here_BM = cache.pages_BM * self.devices // cache.pool.pages == (jnp.arange(rows) * self.devices // rows)[:, None]
        broken_B = (seen_BS & ((stored_BS < 1) | ~jnp.repeat(here_BM, cache.pool.page_size, axis=1))).any(axis=1)
        state_B = jnp.where(seen_BS, (stored_BS - 1) * (1 + positions_S % 7), 0).sum(axis=1) % self.vocab
        return jnp.where(broken_B, jnp.nan, state_B)[:, None]

    def prefill(self, frozen, lora, tokens_BC, counts_B, cache):
        size = cache.pool.page_size
        pages_Bm = jnp.take_along_axis(cache.pages_BM, (cache.lengths_B[:, None] + jnp.arange(0, tokens_BC.shape[1], size)) // size, 1)
        pages_Bm = jnp.where(jnp.arange(0, tokens_BC.shape[1], size) < counts_B[:, None], pages_Bm, cache.pool.pages)
        values = (tokens_BC + 1.0).reshape(len(tokens_BC), -1, 1, size, 1)
        keys = cache.pool.keys_LPKsH.at[0, pages_Bm].set(values, mode="drop")
        cache = dataclasses.replace(cache, pool=Pool(keys, cache.pool.values_LPKsH), lengths_B=cache.lengths_B + counts_B)
        state_R1 = self._state(cache, cache.lengths_B)  # read from the pages of each device
        return jnp.where(jnp.all(state_R1 == state_R1[0]), state_R1[:1], jnp.nan), cache, self._routes(tokens_BC)

    def decode(self, frozen, lora, tokens_B, cache):
        size, lengths_B = cache.pool.page_size, cache.lengths_B
        pages_B = jnp.take_along_axis(cache.pages_BM, lengths_B[:, None] // size, 1, mode="clip")[:, 0]
        pages_B = jnp.where(lengths_B > 0, pages_B, cache.pool.pages)
        keys = cache.pool.keys_LPKsH.at[0, pages_B, :, lengths_B % size].set(tokens_B[:, None, None] + 1.0, mode="drop")
        cache = dataclasses.replace(cache, pool=Pool(keys, cache.pool.values_LPKsH), lengths_B=lengths_B + 1)
        return self._state(cache, cache.lengths_B), cache, self._routes(tokens_B)

    def decode_drafts(self, frozen, lora, tokens_BT, counts_B, cache):
        """One token after another. The results of those that are not read are NaN."""

        def read(pool, token_of_row):
            t, tokens_B = token_of_row
            on_B = (t < counts_B) & (cache.lengths_B > 0)
            one = dataclasses.replace(cache, pool=pool, lengths_B=jnp.where(on_B, cache.lengths_B + t, 0))
            hidden_B1, one, _ = self.decode(frozen, lora, tokens_B, one)
            return one.pool, jnp.where(on_B[:, None], hidden_B1, jnp.nan)

        pool, hidden_TB1 = jax.lax.scan(read, cache.pool, (jnp.arange(tokens_BT.shape[1]), tokens_BT.T))
        return hidden_TB1.swapaxes(0, 1), dataclasses.replace(cache, pool=pool), (), self._routes(tokens_BT)

    @staticmethod
    def expected(table, rollout, temperature):
        """Log-probabilities of a rollout's tokens, computed only from the tokens."""
        tokens = np.concatenate([rollout.prompt_tokens_P, rollout.tokens_T]).astype(np.int64)
        sums = np.cumsum(tokens * (1 + np.arange(len(tokens)) % 7)) % len(table)
        before = sums[len(rollout.prompt_tokens_P) - 1 : -1]
        return special.log_softmax(table.astype(np.float64) / temperature, axis=1)[before, rollout.tokens_T]


CHAIN = Chain()
LOGITS = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
LOGITS[:, STOP] -= 1.0


@functools.cache
def sampler_of(model=CHAIN, **settings):
    """A sampler; the same one for equal arguments, since each compiles its own functions."""
    defaults = {"slots": 8, "max_prompt_tokens": 16, "max_new_tokens": 20, "temperature": 1.0, "stop_ids": (STOP,), "launch_steps": 4}
    return Sampler(model, **(defaults | settings))


def prompts_of(count, length=3):
    return [Prompt(group, "seed", "", np.full(length, 1 + group % 4, np.int32)) for group in range(count)]


def by_key(rollouts):
    return {(r.group, r.index): r for r in rollouts}


def long_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(group, "seed", "", rng.integers(1, 5, length).astype(np.int32)) for group, length in enumerate(lengths)]


def check_frequencies(rollouts, temperature):
    """Rollouts of LOGITS have the chain's log-probabilities, and the next tokens of each state its frequencies (chi-square)."""
    from scipy import stats  # a second that only the workers of these tests need

    expected = np.log(special.softmax(LOGITS.astype(np.float64) / temperature, axis=1))
    counts = np.zeros((5, 5))
    for r in rollouts:
        before = np.concatenate([r.prompt_tokens_P[-1:], r.tokens_T[:-1]])
        np.testing.assert_allclose(r.logprobs_T, expected[before, r.tokens_T], atol=1e-5)
        np.add.at(counts, (before, r.tokens_T), 1)
    for state in range(1, 5):
        assert counts[state].sum() > 500
        assert stats.chisquare(counts[state], np.exp(expected[state]) * counts[state].sum()).pvalue > 1e-4
