"""A published model of a dense family against transformers: set DISCOVER_JAX_MODEL to its Hugging Face folder. Nothing is downloaded."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder

FOLDER = os.environ.get("DISCOVER_JAX_MODEL", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="DISCOVER_JAX_MODEL names no folder with a published model")]
QUESTIONS = (
    "Write a Python function that returns the n-th prime number.",
    "What is the difference between precision and recall? Answer in one paragraph.",
    "Fix this line: `df.groupby('a').mean()['b'` and say what was wrong.",
)
NEW, LENGTH, PAGE = 64, 256, 16
"""Tokens of a continuation; places of a prompt and its continuation."""


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global torch, transformers
    torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
    transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    return [np.asarray(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), np.int32) for chat in chats]


@pytest.fixture(scope="module")
def expected(prompts):
    """Float32 logits of each prompt, bfloat16 logits of the first, and greedy continuations, all by transformers."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        exact = [reference(torch.tensor(prompt[None], dtype=torch.long)).logits[0].numpy() for prompt in prompts]
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.0}
        greedy = [
            reference.generate(torch.tensor(prompt[None], dtype=torch.long), **options)[0, len(prompt) :].numpy() for prompt in prompts
        ]
        rounded = reference.to(torch.bfloat16)(torch.tensor(prompts[0][None], dtype=torch.long)).logits[0].float().numpy()
    return exact, rounded, greedy


def _load(dtype):
    config, frozen = load_folder(Path(FOLDER))
    return Model(config, dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), frozen)


def _logits(model, frozen, prompt):
    tokens_1T = jnp.asarray(prompt[None])
    hidden_1TD = jax.jit(model.hidden)(frozen, None, tokens_1T, jnp.arange(len(prompt))[None], jnp.ones_like(tokens_1T))
    return np.asarray(model.logits(frozen, None, hidden_1TD)[0], np.float32)


def test_logits_and_greedy_continuations_equal_transformers(prompts, expected):
    exact, _, greedy = expected
    model, frozen = _load(jnp.float32)
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    with jax.default_matmul_precision("highest"):
        for prompt, logits_TV, continuation in zip(prompts, exact, greedy, strict=True):
            np.testing.assert_allclose(_logits(model, frozen, prompt), logits_TV, atol=2e-3, rtol=1e-4)
            cache = model.init_cache(1, LENGTH, page_size=PAGE)
            for start in range(0, len(prompt), PAGE):
                chunk_1C = np.zeros((1, PAGE), np.int32)
                part = prompt[start : start + PAGE]
                chunk_1C[0, : len(part)] = part
                hidden_1D, cache, _ = prefill(frozen, None, chunk_1C, jnp.full(1, len(part), jnp.int32), cache)
            found = []
            for _ in range(NEW):
                found.append(int(jnp.argmax(model.logits(frozen, None, hidden_1D)[0])))
                hidden_1D, cache, _ = decode(frozen, None, jnp.asarray(found[-1:], jnp.int32), cache)
            assert found == continuation.tolist()


def test_bfloat16_logits_are_as_close_as_those_of_transformers(prompts, expected):
    exact, rounded, _ = expected
    model, frozen = _load(jnp.bfloat16)
    found = _logits(model, frozen, prompts[0])
    ours, theirs = (np.linalg.norm(logits_TV - exact[0]) for logits_TV in (found, rounded))
    assert ours < 1.2 * theirs
