"""Trains the apprentice from scratch: tokenizer, corpus and weights in one command.

    python -m discover_jax.apprentice.train --out=DIR [--minutes=8 | --steps=N] [--seed=0]

Writes DIR/config.json, DIR/model.safetensors (experts in MXFP4) and DIR/tokenizer.model. The folder has the format of gpt-oss's own and is
read by `discover_jax.models.folder.load_folder`. After the first save it is always complete, so an interrupted run leaves a valid model.

Training the weights in this package took 8 minutes on one H200; BUILD_NOTES.md has the figures. A CPU runs the same code, a few hundred
times slower. With --steps, the result depends only on the seed, up to the device's rounding. With --minutes, the learning rate follows
the clock.
"""

import argparse
import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from discover_jax.apprentice.batches import batch_stream
from discover_jax.apprentice.tokenizer import END, PAD, train_tokenizer
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder_writer import save_folder
from discover_jax.models.mxfp4 import fake_quantise
from discover_jax.text.tokenizer import SentencePieceTokenizer, Tokenizer

PEAK_LEARNING_RATE = 2e-3
WARMUP = 0.02
DECAY = 0.6
"""Fractions of the run: the learning rate rises during WARMUP at the start and falls to zero during DECAY at the end."""
WEIGHT_DECAY = 0.05
CLIP = 1.0

SYNC_STEPS = 20
"""The host waits for the device every SYNC_STEPS steps, so that measured times include the device's work."""
LOG_SECONDS = 10.0
SAVE_SECONDS = 120.0


# The model


def apprentice_config(tokenizer: Tokenizer) -> ModelConfig:
    """A small model with gpt-oss's architecture: 4.2 M parameters with a vocabulary of 2,048."""
    return ModelConfig(
        num_layers=6,
        width=192,
        num_heads=8,
        num_kv_heads=2,
        head_size=32,
        num_experts=4,
        experts_per_token=2,
        mlp_width=192,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.special(END),
        pad_id=tokenizer.special(PAD),
    )


# The step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """The training state: float32 weights with the structure of `Model.init_frozen`, and the optimiser state."""

    weights: Any
    opt_state: Any


def optimizer() -> optax.GradientTransformation:
    """AdamW with a learning rate of 1; the step scales its updates."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), tree)),
        optax.scale(-1.0),
    )


def init_learner(model: Model, seed: int) -> Learner:
    weights = model.init_frozen(jax.random.key(seed))
    return Learner(weights, optimizer().init(weights))


def rounded(weights: Any) -> Any:
    """The weights as `save_folder` stores them, experts in MXFP4 and the rest in bfloat16. The gradient is that of the identity."""

    def round_leaf(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if [key.key for key in path[-2:]] in (["gate_up", "weight"], ["down", "weight"]):
            return fake_quantise(leaf)
        stored = jax.lax.stop_gradient(leaf.astype(jnp.bfloat16).astype(leaf.dtype))
        return stored + (leaf - jax.lax.stop_gradient(leaf))

    return jax.tree_util.tree_map_with_path(round_leaf, weights)


def _is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of the frozen tree is a matrix of a projection or an expert; not a bias, a norm's scale or the embedding."""
    return path[-1].key == "weight"


def reply_loss(model: Model, weights: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-probability of reply tokens, in nats.

    Returns:
      The loss, and metrics: `loss` and `wrong`, the fraction of reply tokens that are not the most likely ones.
    """
    hidden_BTD = model.hidden(weights, None, batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"])
    logits_BTV = model.logits(weights, None, hidden_BTD)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets_BT"])
    wrong_BT = logits_BTV.argmax(axis=-1) != batch["targets_BT"]
    mask_BT = batch["mask_BT"]
    count = mask_BT.sum()
    loss = jnp.sum(mask_BT * losses_BT) / count
    return loss, {"loss": loss, "wrong": jnp.sum(mask_BT * wrong_BT) / count}


@functools.partial(jax.jit, static_argnames="model", donate_argnames="learner")
def train_step(
    model: Model, learner: Learner, batch: dict[str, jax.Array], learning_rate: jax.Array
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step on a batch (the arrays of `batches.Batch`), with a straight-through gradient for the rounding of the weights."""

    def loss_of(weights: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reply_loss(model, rounded(weights), batch)

    gradient, metrics = jax.grad(loss_of, has_aux=True)(learner.weights)
    changes, opt_state = optimizer().update(gradient, learner.opt_state, learner.weights)
    weights = optax.apply_updates(learner.weights, jax.tree.map(lambda change: learning_rate * change, changes))
    return Learner(weights, opt_state), metrics | {"grad_norm": optax.tree.norm(gradient)}


def learning_rate_at(progress: float) -> float:
    """Warm-up, plateau, then linear decay to zero. `progress` is the finished fraction of the run, from 0 to 1."""
    return PEAK_LEARNING_RATE * min(1.0, progress / WARMUP + 1e-3, max(0.0, 1.0 - progress) / DECAY)


# The run


def train(out: Path, *, minutes: float, steps: int | None, seed: int, rows: int, row_tokens: int, workers: int, dtype: Any) -> None:
    """Trains for `steps` or, if `steps` is None, until `minutes` after the call. The module's docstring lists the files that it writes."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = out / "tokenizer.model"
    train_tokenizer(tokenizer_path, seed=seed)
    config = apprentice_config(SentencePieceTokenizer(tokenizer_path))
    model = Model(config, dtype=dtype, experts="dense", remat="none", kernels=kernel_set(jax.default_backend()))
    with batch_stream(tokenizer_path, rows=rows, row_tokens=row_tokens, seed=seed, workers=workers) as next_batch:
        learner = init_learner(model, seed)
        print(f"{sum(leaf.size for leaf in jax.tree.leaves(learner.weights)):,} parameters on {jax.devices()[0].device_kind}", flush=True)
        step, logged_step, waited = 0, 0, 0.0
        begun = logged_time = saved_time = time.monotonic()
        while True:
            if steps is not None:
                progress = step / steps
            else:
                progress = (time.monotonic() - begun) / max(1e-9, start + 60.0 * minutes - begun) if step else 0.0
            if progress >= 1.0:
                break
            before = time.monotonic()
            batch = next_batch()
            waited += time.monotonic() - before
            learner, metrics = train_step(model, learner, vars(batch), jnp.float32(learning_rate_at(progress)))
            step += 1
            if step == 1:  # start the clock after compilation, so that the warm-up is not skipped
                jax.block_until_ready(metrics)
                begun = logged_time = time.monotonic()
                logged_step, waited = 1, 0.0
            if step % SYNC_STEPS and step != steps:
                continue
            metrics = {name: float(value) for name, value in metrics.items()}
            now = time.monotonic()
            if now - logged_time >= LOG_SECONDS or step == steps:
                speed = (step - logged_step) * rows * row_tokens / (now - logged_time)
                waiting = waited / (now - logged_time)
                print(
                    f"step {step}  {progress:.0%}  loss {metrics['loss']:.4f} nats/token  wrong {metrics['wrong']:.4f}"
                    f"  gradient {metrics['grad_norm']:.2f}  {speed:,.0f} tokens/s  waited {waiting:.0%} for the corpus",
                    flush=True,
                )
                logged_step, logged_time, waited = step, now, 0.0
            if now - saved_time >= SAVE_SECONDS:
                save_folder(out, config, learner.weights)
                saved_time = time.monotonic()
    save_folder(out, config, learner.weights)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{step} steps in {time.monotonic() - start:.0f} s; {out}: {size / 1e6:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=8.0, help="duration of the command, without the last save (8)")
    length.add_argument("--steps", type=int, help="number of steps, for reproducible weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="rows per step (64)")
    parser.add_argument("--row_tokens", type=int, default=512, help="tokens per row; the longest document has about 450 (512)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that draw the corpus")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    arguments = parser.parse_args()
    train(
        arguments.out,
        minutes=arguments.minutes,
        steps=arguments.steps,
        seed=arguments.seed,
        rows=arguments.rows,
        row_tokens=arguments.row_tokens,
        workers=arguments.workers,
        dtype=jnp.dtype(arguments.dtype),
    )


if __name__ == "__main__":
    main()
