"""Exports the adapter of a checkpoint to a folder that `peft` can load (see docs/adapters.md).

    python -m discover_jax.export_adapter --run=RUNDIR --out=DIR [--step=N] [--base=NAME]

It uses the CPU and only reads the run directory, so it can be used during a run.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import optax

from discover_jax.exceptions import DiscoverError, RunError, WeightsError
from discover_jax.learning.train_state import abstract_train_state, adam
from discover_jax.models.adapter import save_peft
from discover_jax.models.config import LoraConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.folder import read_config
from discover_jax.models.parameters import Tree
from discover_jax.policy import weights_folder
from discover_jax.records import parse_json
from discover_jax.runs.checkpoints import Checkpoints


def export_adapter(run: Path, out: Path, *, step: int | None = None, base: str = "") -> tuple[int, LoraConfig]:
    """Writes the adapter of a checkpoint to the folder `out`, see `save_peft`.

    Args:
      run: directory of a training run.
      out: the folder to write.
      step: number of the checkpoint, the name of its folder in checkpoints/; None for the latest.
      base: name of the base model for adapter_config.json; empty for the folder of the weights that the run used.

    Returns:
      The step, and the adapter's ranks and alpha.

    Raises:
      RunError: `run` is not a run directory, or the checkpoint is missing or has no adapter.
      WeightsError: the base model's config.json cannot be read, or `out` cannot be written.
    """
    config = _read_run_config(run)
    try:
        folder = weights_folder(config)
        lora = LoraConfig(**config.lora)
        optimizer = adam(max_grad_norm=config.train.max_grad_norm)  # this setting determines the shape of its state in the checkpoint
        shape = config.model.shape
    except (AttributeError, TypeError) as error:
        raise RunError(
            f"{run / 'config.json'} lacks a setting ({error}): another version of discover_jax wrote it. Export with that version."
        ) from error
    if folder is None and not base:
        raise RunError(
            f"{run} used random weights, which are not stored, so the adapter has no base model. To export it anyway, set --base=NAME."
        )
    try:
        sizes = SHAPES[shape] if folder is None else read_config(folder)
    except WeightsError as error:
        raise WeightsError(
            f"Cannot read the sizes of the model from {folder}, the weights that {run} used: {error}\nExport on a machine that has these"
            " weights. If their path is relative, use the working directory of the run."
        ) from error
    lora = lora.of_model(sizes)
    step, adapter = _restore_adapter(run, step, Model(sizes, lora).abstract_lora(), optimizer)
    save_peft(out, adapter, sizes, lora, base or str(folder))
    return step, lora


def _restore_adapter(run: Path, step: int | None, abstract_lora: Tree, optimizer: optax.GradientTransformation) -> tuple[int, Tree]:
    """The step and the adapter of a checkpoint; of the latest one if `step` is None."""
    if not (run / "checkpoints").is_dir():
        raise RunError(f"{run} has no checkpoints yet. Wait until the run has finished its first step.")
    checkpoints = Checkpoints(run / "checkpoints", keep=1, every=0, read_only=True)
    try:
        if step is None:
            step = checkpoints.latest()
        if step is None:
            raise RunError(f"{run} has no complete checkpoint yet. Wait until the run has finished its first step.")
        train_state, _ = checkpoints.restore(step, abstract_train_state(abstract_lora, optimizer))
    finally:
        checkpoints.close()
    assert train_state is not None, "restore() raises an error if there is none"
    return step, train_state.lora


def _read_run_config(run: Path) -> Any:
    """The settings of a run, as a ConfigDict."""
    try:
        flat = parse_json((run / "config.json").read_text())["config"]
        config = ml_collections.ConfigDict()
        for name, value in flat.items():
            *groups, key = name.split(".")
            node: Any = config
            for group in groups:
                if group not in node:
                    node[group] = ml_collections.ConfigDict()
                node = node[group]
            node[key] = value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{run} is not a run directory: cannot read its config.json ({error!r}). Set --run to a run directory.") from error
    return config


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a training run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--step", type=int, help="number of a checkpoint in RUN/checkpoints (default: the latest)")
    parser.add_argument(
        "--base",
        default="",
        help="base model in adapter_config.json, such as openai/gpt-oss-120b (default: the folder of the run's weights)",
    )
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns about read-only use
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be busy with this very run
    try:
        step, lora = export_adapter(arguments.run, arguments.out, step=arguments.step, base=arguments.base)
    except DiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(
        f"Exported checkpoint {step} of {arguments.run} to {arguments.out}: ranks {lora.attention_rank} (attention), {lora.expert_rank}"
        f" (experts), {lora.mlp_rank} (MLP), {lora.head_rank} (head); alpha {lora.alpha:g}."
    )


if __name__ == "__main__":
    main()
