"""One step of a run without a task: rollouts are sampled and one update is taken, on weights of a published shape; what it takes.

    python benchmarks/rehearsal.py --shape=gpt-oss-120b                     # random weights, drawn on the device
    python benchmarks/rehearsal.py --folder=DIR                             # a checkpoint's, published or synthetic
    python benchmarks/rehearsal.py --shape=gpt-oss-20b --layers=2 ...       # a rehearsal of the rehearsal

Prints one JSON object: bytes of weights, adapter and optimiser, seconds and the device's peak memory after each phase (the peak never
falls, so a phase that needs less than the one before shows that one's), tokens a second, and the log-probability gap between sampler and
update, which says whether both compute the same model. Advantages are made up: +1 and -1 in turn.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig
from discover_jax.models.folder import load_folder, read_config
from discover_jax.models.gpt_oss import Model
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling.sampler import Sampler
from discover_jax.types import Prompt


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class _Clock:
    """Seconds since the last look, and the device's peak so far (None where the backend does not tell)."""

    def __init__(self):
        self._started = time.monotonic()

    def look(self, tree: Any) -> dict[str, Any]:
        jax.block_until_ready(tree)
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"seconds": round(seconds, 2), "peak_bytes": stats.get("peak_bytes_in_use"), "in_use_bytes": stats.get("bytes_in_use")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a rollout")
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch, each of one prompt and its rollout")
    arguments = parser.parse_args()
    config = read_config(arguments.folder) if arguments.folder else shape_of(arguments.shape, arguments.layers)
    model = Model(config, LoraConfig(), dtype=arguments.dtype, experts="packed")
    out: dict[str, Any] = vars(arguments) | {
        "folder": str(arguments.folder),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    clock = _Clock()
    if arguments.folder:
        frozen = load_folder(arguments.folder, dtype=arguments.dtype, experts="packed")[1]
    else:
        frozen = model.init_frozen(jax.random.key(0))
    out["weights"] = clock.look(frozen) | {"bytes": _bytes(frozen)}
    optimizer = adam(4e-5)
    state = init_train_state(model.init_lora(jax.random.key(1)), optimizer)
    out["adapter"] = clock.look(state) | {"bytes": _bytes(state.lora), "optimiser_bytes": _bytes(state.opt_state)}

    total = arguments.groups * arguments.group_size
    # The last id stops, so that almost every rollout spends its budget.
    sampler = Sampler(
        model,
        slots=total,
        max_prompt_tokens=arguments.prompt,
        max_new_tokens=arguments.new,
        temperature=1.0,
        stop_ids=(config.vocab_size - 1,),
    )
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(group, "seed", "", rng.integers(0, config.vocab_size - 1, arguments.prompt).astype(np.int32))
        for group in range(arguments.groups)
    ]
    for name in ("sample_with_compilation", "sample"):
        rollouts = list(sampler.sample(frozen, state.lora, prompts, arguments.group_size, seed=0, step=0))
        out[name] = clock.look(()) | {"tokens": sum(len(r.tokens_T) for r in rollouts)}
    out["sample"]["tokens_per_s"] = round(out["sample"]["tokens"] / out["sample"]["seconds"], 2)

    update = Update(model, optimizer)
    advantages = [1.0 if i % 2 else -1.0 for i in range(total)]
    batches = pack(rollouts, advantages, row_tokens=arguments.prompt + arguments.new, rows=arguments.rows)
    for name in ("update_with_compilation", "update"):
        state, metrics = update.update(frozen, state, batches)
        out[name] = clock.look(state) | {"tokens": sum(r.prompt_tokens_P.size + r.tokens_T.size for r in rollouts)}
        # Of the first update: the second one's adapter is another than the sampler's.
        out.setdefault("logprob_gap", {key: value for key, value in metrics.items() if key.startswith("logprob_gap")})
    out["update"]["tokens_per_s"] = round(out["update"]["tokens"] / out["update"]["seconds"], 2)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
