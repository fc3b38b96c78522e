"""The whole update, compared with torch's autograd on transformers' GptOssForCausalLM with the adapter merged into its weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.learning.logprobs import token_logprobs
from discover_jax.learning.losses import RatioLimits
from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.types import Rollout, StopReason

TEMPERATURE = 1.3
VOCAB = 61
LORA = LoraConfig(attention_rank=3, expert_rank=2, head_rank=4, alpha=5.0)
MATRICES = {
    **{f"self_attn.{name}_proj.weight": ("attention", name) for name in "qkvo"},
    **{f"mlp.experts.{name}_proj": ("experts", name) for name in ("gate_up", "down")},
}


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global torch, transformers
    torch = pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")
    transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reference():
    """A random gpt-oss in float32, with eager attention and experts, and a sliding window of 8, which is shorter than the rollouts."""
    config = transformers.GptOssConfig(
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=4096,
        initializer_range=0.15,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.3)
    return model.requires_grad_(False)


class Case(NamedTuple):
    model: Model
    frozen: dict
    lora: dict
    rollouts: list[Rollout]
    advantages: np.ndarray


@pytest.fixture(scope="module")
def case(reference, tmp_path_factory):
    """The same weights in JAX, an adapter whose B is not zero (otherwise A has no gradient), and rollouts with ratios around 1."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    reference.save_pretrained(folder)
    config, frozen = load_folder(folder)
    model = Model(config, LORA)
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda leaf: jax.device_put((0.15 * rng.normal(size=leaf.shape)).astype(leaf.dtype)), model.abstract_lora())
    rollouts = []
    for index, (prompt, length) in enumerate([(5, 14), (11, 20), (3, 1), (9, 7), (4, 22)]):
        tokens = rng.integers(3, VOCAB, prompt + length).astype(np.int32)
        chosen = np.arange(length) % 6 != 3  # some tokens are forced
        with torch.no_grad():
            logprobs = torch_logprobs(reference, torch_leaves(lora), tokens, prompt).numpy() + 0.3 * rng.normal(size=length)
        rollouts.append(
            Rollout(
                0,
                index,
                tokens[:prompt],
                tokens[prompt:],
                np.float32(np.where(chosen, logprobs, 0)),
                chosen,
                StopReason.MAX_TOKENS,
                TEMPERATURE,
            )
        )
    return Case(model, frozen, lora, rollouts, rng.normal(size=len(rollouts)).astype(np.float32))


def torch_leaves(lora):
    """Hugging Face name of a weight -> its A and B as torch leaves. Stacked pairs of layers are unstacked."""
    leaves = {"lm_head.weight": lora["head"]}
    for kind, layers in lora["pairs"].items():
        for name, (block, matrix) in MATRICES.items():
            of_pair = layers[block][matrix]
            for pair in range(of_pair["lora_a"].shape[0]):
                layer = 2 * pair + ("sliding", "full").index(kind)
                leaves[f"model.layers.{layer}.{name}"] = {part: array[pair] for part, array in of_pair.items()}
    return {
        name: {part: torch.tensor(np.asarray(array), requires_grad=True) for part, array in parts.items()} for name, parts in leaves.items()
    }


def torch_logprobs(reference, leaves, tokens, prompt):
    """Log-probabilities of the generated tokens of one unpacked rollout, with W + (alpha / rank) B A for every weight."""
    merged = {}
    for name, weight in reference.named_parameters():
        if name in leaves:
            a, b = leaves[name]["lora_a"], leaves[name]["lora_b"]
            product = LORA.alpha / a.shape[-2] * (b @ a)
            weight = weight + (product.transpose(-1, -2) if "experts" in name else product)  # experts are stored [E, in, out]
        merged[name] = weight
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = torch.func.functional_call(reference, merged, (), {"input_ids": ids[None, :-1], "use_cache": False}).logits[0]
    logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]][prompt - 1 :]


LIMITS = RatioLimits(clip_low=0.1, clip_high=0.15, truncate=1.2)
TORCH_LOSSES = {
    "importance_sampling": lambda logp, sampler, a: -torch.exp(logp - sampler) * a,
    "truncated_importance_sampling": lambda logp, sampler, a: -torch.exp(logp - sampler).clamp(max=1.2).detach() * a * logp,
    "ppo": lambda logp, sampler, a: -torch.minimum(torch.exp(logp - sampler) * a, torch.exp(logp - sampler).clamp(0.9, 1.15) * a),
    "reinforce": lambda logp, sampler, a: -a * logp,
}


def torch_loss(reference, leaves, case, loss="importance_sampling", advantages=None):
    """Sum of a loss over chosen tokens. An advantage is a number per rollout, or an array with a number per token."""
    total = torch.zeros(())
    for rollout, advantage in zip(case.rollouts, case.advantages if advantages is None else advantages, strict=True):
        tokens = np.concatenate([rollout.prompt_tokens_P, rollout.tokens_T])
        logp = torch_logprobs(reference, leaves, tokens, len(rollout.prompt_tokens_P))
        of_token = torch.tensor(np.broadcast_to(np.float32(advantage), rollout.tokens_T.shape).copy())
        total = total + TORCH_LOSSES[loss](logp, torch.tensor(rollout.logprobs_T), of_token)[torch.tensor(rollout.chosen_T)].sum()
    return total


@pytest.fixture(scope="module")
def update(case):
    return Update(case.model, adam(), chunk_tokens=20)


@pytest.fixture(scope="module")
def batches(case):
    """Several microbatches. Some rows have several rollouts."""
    batches = pack(case.rollouts, case.advantages, row_tokens=48, rows=1)
    assert len(batches) > 1
    assert max(batch.segments_BT.max() for batch in batches) > 1
    return batches


def assert_close(ours, theirs, tolerance):
    """Checks that the relative Euclidean distance of each pair of leaves is at most `tolerance`."""
    ours, theirs = jax.tree_util.tree_leaves_with_path(ours), jax.tree_util.tree_leaves_with_path(theirs)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        norm = np.linalg.norm(b)
        assert norm > 1e-4, path  # a comparison of zeros would prove nothing
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * norm, path


def as_numpy(leaves, of):
    return {name: {part: of(leaf).detach().numpy().astype(np.float64) for part, leaf in parts.items()} for name, parts in leaves.items()}


def renamed(tree):
    """A tree of the adapter in the order and form of `torch_leaves`, as numpy."""
    return as_numpy(torch_leaves(tree), lambda leaf: leaf)


def test_gradient_equals_torch(reference, case, update, batches):
    """Covers packing, segments, temperature, loss, and every matrix of the adapter."""
    leaves = torch_leaves(case.lora)
    loss = torch_loss(reference, leaves, case)
    loss.backward()
    gradient, metrics = update.gradient(case.frozen, case.lora, batches)
    expected = as_numpy(leaves, lambda leaf: leaf.grad)
    assert_close(renamed(gradient), expected, 1e-5)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(expected))), rel=1e-5)
    assert metrics["ratio/min"] < 0.8 < 1.2 < metrics["ratio/max"]


@pytest.mark.slow  # tests/learning/test_losses.py has the formulas by hand
@pytest.mark.parametrize("loss", ["ppo", "truncated_importance_sampling", "reinforce"])
def test_gradients_of_the_other_losses_equal_torch(reference, case, batches, loss):
    leaves = torch_leaves(case.lora)
    value = torch_loss(reference, leaves, case, loss)
    value.backward()
    update = Update(case.model, adam(), loss=loss, limits=LIMITS, chunk_tokens=20)
    gradient, metrics = update.gradient(case.frozen, case.lora, batches)
    assert_close(renamed(gradient), as_numpy(leaves, lambda leaf: leaf.grad), 1e-5)
    assert metrics["loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert metrics.get("ratio/limited_frac", 0.5) == pytest.approx(0.5, abs=0.4)  # limits act on some tokens and not on others


def test_kl_shaping_equals_torch(reference, case, update, batches):
    """The base model is the model without its adapter, at the sampler's temperature."""
    gaps = []
    for rollout in case.rollouts:
        tokens = np.concatenate([rollout.prompt_tokens_P, rollout.tokens_T])
        with torch.no_grad():
            base = torch_logprobs(reference, {}, tokens, len(rollout.prompt_tokens_P)).numpy()
        gaps.append(rollout.logprobs_T - base)
    mean = np.concatenate([gap[r.chosen_T] for gap, r in zip(gaps, case.rollouts, strict=True)]).mean()
    leaves = torch_leaves(case.lora)
    torch_loss(reference, leaves, case, advantages=[a + 0.3 * (mean - g) for a, g in zip(case.advantages, gaps, strict=True)]).backward()
    shaping = Update(case.model, adam(), chunk_tokens=20, kl_coefficient=0.3)
    (shaped,), metrics = shaping.shape(case.frozen, [batches])
    assert metrics["kl_base/mean"] == pytest.approx(mean, rel=1e-4)
    assert abs(mean) > 0.01  # the adapter of this case is far from zero
    gradient, _ = update.gradient(case.frozen, case.lora, shaped)  # the same function as `shaping`'s, and already compiled
    assert_close(renamed(gradient), as_numpy(leaves, lambda leaf: leaf.grad), 1e-5)


def test_adam_step_equals_torch(reference, case, update, batches):
    """The report's settings. Adam divides a gradient by its size, so only entries far above rounding error are compared one by one."""
    leaves = torch_leaves(case.lora)
    torch_loss(reference, leaves, case).backward()
    before = as_numpy(leaves, lambda leaf: leaf)
    gradients = as_numpy(leaves, lambda leaf: leaf.grad)
    torch.optim.Adam(jax.tree.leaves(leaves), lr=4e-5, betas=(0.9, 0.95), eps=1e-8).step()
    theirs = as_numpy(leaves, lambda leaf: leaf)

    state = init_train_state(jax.tree.map(jnp.array, case.lora), adam())  # a copy, since the update frees it
    state, _ = update.update(case.frozen, state, batches)
    compared = total = 0
    for a, b, start, gradient in zip(*map(jax.tree.leaves, (renamed(state.lora), theirs, before, gradients)), strict=True):
        clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(a[clear], b[clear], rtol=0, atol=1e-7)  # the step is 4e-5, and float32 near 0.5 resolves 6e-8
        assert np.abs(a - start).max() == pytest.approx(4e-5, rel=5e-3)
        compared, total = compared + clear.sum(), total + clear.size
    assert compared > 0.8 * total


@pytest.mark.slow  # test_update.py has packings of a smaller model
def test_packing_microbatches_and_order_do_not_change_the_gradient(case, update, batches):
    expected = renamed(update.gradient(case.frozen, case.lora, batches)[0])
    for row_tokens, rows in ((48, 1), (30, 5)):  # the same shape in another order; one microbatch with one rollout per row
        packed = pack(case.rollouts[::-1], case.advantages[::-1], row_tokens=row_tokens, rows=rows)
        gradient, _ = update.gradient(case.frozen, case.lora, packed)
        assert_close(renamed(gradient), expected, 1e-5)
    one_by_one = [pack([r], [a], row_tokens=48, rows=1) for r, a in zip(case.rollouts, case.advantages, strict=True)]
    parts = [renamed(update.gradient(case.frozen, case.lora, batch)[0]) for batch in one_by_one]
    assert_close(jax.tree.map(lambda *leaves: sum(leaves), *parts), expected, 1e-5)


def test_no_leak_between_rollouts_of_a_row(case):
    """A change of every token of one rollout changes its log-probabilities, but not those of the other rollouts in the row."""
    (batch,) = pack(case.rollouts, case.advantages, row_tokens=128, rows=1)
    assert batch.segments_BT.max() == len(case.rollouts)
    run = jax.jit(lambda batch: token_logprobs(case.model, case.frozen, case.lora, batch, chunk_tokens=32)[0])
    before = np.asarray(run(batch))
    for segment in range(1, len(case.rollouts) + 1):
        hit = batch.segments_BT == segment
        changed = type(batch)(**vars(batch) | {"tokens_BT": np.where(hit, (batch.tokens_BT + 7) % VOCAB, batch.tokens_BT)})
        after = np.asarray(run(changed))
        others = (batch.segments_BT > 0) & ~hit
        np.testing.assert_array_equal(after[others], before[others])
        assert np.abs(after[hit] - before[hit]).min() > 0
