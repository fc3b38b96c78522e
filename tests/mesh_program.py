"""Runs everything that uses devices on several meshes of eight simulated ones. `mesh_program.py FOLDER FAMILY` prints the differences."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.exceptions import ShardingError
from discover_jax.kernels.kernel_set import REFERENCE
from discover_jax.kernels.spread import row_devices
from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import abstract_train_state, adam, init_train_state
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families.dense import FIXED
from discover_jax.models.folder import load_folder
from discover_jax.models.sharding import fetch, make_mesh, shardings
from discover_jax.models.synthetic import write_synthetic
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.sampling.sampler import Sampler
from discover_jax.types import Prompt

SIZES = {"num_layers": 2, "width": 64, "num_heads": 8, "num_kv_heads": 4, "head_size": 16, "mlp_width": 128, "vocab_size": 96}
CONFIGS = {
    "gpt_oss": ModelConfig(**SIZES, num_experts=8, experts_per_token=2, sliding_window=16),
    "qwen2": ModelConfig(**SIZES, **FIXED, family="qwen2", rope_kind="plain", o_bias=False, tied=True),
    "llama": ModelConfig(**SIZES, **FIXED, family="llama", rope_kind="plain", qkv_bias=False, o_bias=False),
}
LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=4, alpha=8.0, mlp_rank=4)
# data, expert, tensor
ROUTED_MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2), (1, 2, 4), (2, 4, 1), (4, 1, 2)]
DENSE_MESHES = [(8, 1, 1), (1, 1, 4), (2, 2, 2), (2, 1, 4), (4, 1, 2)]
WRONG = {
    (1, 1, 8): r"'kv_heads'.*\b4\b.*'tensor'.*\b8\b",
    (1, 3, 1): r"'experts'.*\b8\b.*'expert'.*\b3\b",
    (4, 4, 1): r"config\.mesh\b.*\b4 x 4 x 1 = 16\b",
}
TOKENS = np.random.default_rng(0).integers(3, 96, (8, 20), dtype=np.int32)


def build(folder: Path, config: ModelConfig, mesh):
    """Weights from disk and an adapter that is not zero, sharded over the mesh."""
    model = Model(config, LORA, experts="packed", mesh=mesh)
    _, frozen = load_folder(folder, experts="packed", mesh=mesh)
    drawn = model.init_lora(jax.random.key(1))
    shaken = jax.jit(lambda lora: jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), lora))
    lora = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), shaken(drawn), drawn)
    for tree, declared in ((frozen, model.abstract_frozen()), (lora, model.abstract_lora())):
        if mesh is not None:
            jax.tree.map(
                lambda x, wanted: check(x.sharding.is_equivalent_to(wanted.sharding, x.ndim), f"layout of {wanted}"), tree, declared
            )
    return model, frozen, lora


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def results(folder: Path, config: ModelConfig, mesh):
    """The results of one mesh: logits, rollouts, the update's metrics and adapter, and the train state."""
    model, frozen, lora = build(folder, config, mesh)
    places, one = np.broadcast_to(np.arange(20, dtype=np.int32), (8, 20)), np.ones((8, 20), np.int32)
    logits = jax.jit(lambda frozen, lora: model.logits(frozen, lora, model.hidden(frozen, lora, TOKENS, places, one)))(frozen, lora)
    # With so few pages, rollouts must wait for each other, unless each has its own device.
    pages = max(7, 4 * row_devices(mesh))
    sampler = Sampler(model, slots=4, max_prompt_tokens=140, max_new_tokens=100, temperature=1.0, stop_ids=(3,), pages=pages)
    prompts = [Prompt(group, "seed", "", TOKENS.reshape(-1)[: 130 - 100 * group]) for group in range(2)]
    rollouts = sorted(sampler.sample(frozen, lora, prompts, 4, seed=5, step=2), key=lambda r: (r.group, r.index))
    rollouts += repeated(model, frozen, lora)
    optimizer = adam(1e-3, max_grad_norm=1.0)
    update = Update(model, optimizer, kl_coefficient=0.1, measure_kl=True)
    batches = pack(rollouts[:8], np.linspace(-1, 1, 8), row_tokens=240, rows=8)
    state, metrics = update.update(frozen, init_train_state(lora, optimizer), batches)
    return model, fetch(logits), rollouts, state, metrics


def repeated(model: Model, frozen, lora):
    """Rollouts that repeat themselves: on a mesh with drafts, without a mesh without them."""
    drafts, seen = 3 * (model.mesh is not None), []
    settings = {"slots": 4, "max_prompt_tokens": 140, "max_new_tokens": 60, "temperature": 0.02, "stop_ids": (3,), "draft_tokens": drafts}
    prompts = [Prompt(group, "seed", "", np.resize(TOKENS[0, :7], 120 - 100 * group)) for group in range(2)]
    rollouts = list(Sampler(model, **settings).sample(frozen, lora, prompts, 4, seed=5, step=3, on_progress=seen.append))
    check((seen[-1].accepted > 20) == bool(drafts), f"{seen[-1].accepted} draft tokens were accepted")
    return sorted(rollouts, key=lambda r: (r.group, r.index))


def compare(name: str, one: tuple, many: tuple) -> None:
    check(np.abs(one[1] - many[1]).max() < 1e-4, f"{name}: logits")
    for a, b in zip(one[2], many[2], strict=True):
        check(np.array_equal(a.tokens_T, b.tokens_T), f"{name}: tokens of rollout {a.group}, {a.index}")
        check(np.array_equal(a.routes_SLX, b.routes_SLX), f"{name}: experts of rollout {a.group}, {a.index}")
        check(np.abs(a.logprobs_T - b.logprobs_T).max() < 1e-4, f"{name}: log-probabilities of rollout {a.group}, {a.index}")
    for key, value in one[4].items():
        check(abs(value - many[4][key]) <= 1e-3 * max(1.0, abs(value)), f"{name}: {key} {value} {many[4][key]}")
    for a, b in zip(jax.tree.leaves(fetch(one[3].opt_state)), jax.tree.leaves(fetch(many[3].opt_state)), strict=True):
        check(np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-12, f"{name}: moments of the optimiser")


def main(root: Path, config: ModelConfig) -> None:
    write_synthetic(root / "weights", config, seed=2)
    for shape, message in WRONG.items():
        if shape[1] == 3 and not config.num_experts:
            continue
        try:
            model, _, _ = build(root / "weights", config, make_mesh(*shape))
            Sampler(model, slots=4, max_prompt_tokens=8, max_new_tokens=8, temperature=1.0, stop_ids=(3,))
        except ShardingError as error:
            check(re.search(message, str(error)) is not None, f"{shape}: {error}")
        else:
            raise AssertionError(f"{shape} was not refused")
    one = results(root / "weights", config, None)
    check(sum(len(r.tokens_T) for r in one[2]) > 200, "rollouts are long enough")
    checkpoints = Checkpoints(root / "checkpoints", keep=20, every=0)
    checkpoints.save(0, one[3], {"mesh": "none"})
    for number, shape in enumerate(ROUTED_MESHES if config.num_experts else DENSE_MESHES, start=1):
        mesh = make_mesh(*shape)
        many = results(root / "weights", config, mesh)
        compare(str(shape), one, many)
        if shape[1] > 1 and config.num_experts:
            leaf = many[3].lora["pairs"]["full"]["experts"]["gate_up"]["lora_a"]
            check(leaf.addressable_shards[0].data.shape[1] == config.num_experts // shape[1], f"{shape}: experts are spread")
        # Written on this mesh, and read on the one before and without a mesh; and vice versa.
        checkpoints.save(number, many[3], {"mesh": list(shape)})
        for wanted in (
            abstract_train_state(dataclasses.replace(many[0], mesh=None, kernels=REFERENCE).abstract_lora(), adam(1e-3, max_grad_norm=1.0)),
            one[3],
        ):
            restored, host = checkpoints.restore(number, wanted)
            check(host == {"mesh": list(shape)}, f"{shape}: host's part")
            for a, b in zip(jax.tree.leaves(fetch(restored)), jax.tree.leaves(fetch(many[3])), strict=True):
                check(np.array_equal(a, b), f"{shape}: restored elsewhere")
        restored, _ = checkpoints.restore(number - 1, many[3])
        check(shardings(restored) == shardings(many[3]), f"{shape}: layout of what was restored")
        print(f"{shape} agrees", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), CONFIGS[sys.argv[2]])
