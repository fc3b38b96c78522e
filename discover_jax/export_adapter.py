"""Writes the adapter of a run's checkpoint as a folder for `peft` (see docs/adapters.md).

    python -m discover_jax.export_adapter --run=RUNDIR --out=DIR [--step=N] [--base=NAME]

It only reads the run, on the CPU, so it may be called while the run goes on.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections

from discover_jax.exceptions import DiscoverError, RunError, WeightsError
from discover_jax.learning.train_state import abstract_train_state, adam
from discover_jax.models.adapter import save_peft
from discover_jax.models.config import SHAPES, LoraConfig
from discover_jax.models.folder import read_config
from discover_jax.models.gpt_oss import Model
from discover_jax.policy import weights_folder
from discover_jax.runs.checkpoints import Checkpoints


def export_adapter(run: Path, out: Path, *, step: int | None = None, base: str = "") -> tuple[int, LoraConfig]:
    """Writes the adapter of a checkpoint.

    Args:
      run: folder of a training run.
      out: see `save_peft`.
      step: number of the checkpoint, as the folders in checkpoints/ are named; None for the latest.
      base: what adapter_config.json names as the base model; empty for the folder of weights that the run used.

    Returns:
      The step, and the adapter's ranks and alpha.

    Raises:
      RunError: no run, no such checkpoint, or one without an adapter.
      WeightsError: the base's config.json is not there, or `out` cannot be written.
    """
    config = _read_run(run)
    try:
        folder = weights_folder(config)
        lora = LoraConfig(**config.lora)
        optimizer = adam(max_grad_norm=config.train.max_grad_norm)  # its state's shape, which the checkpoint holds, depends on that alone
        shape = config.model.shape
    except (AttributeError, TypeError) as error:
        raise RunError(
            f"{run / 'config.json'} lacks a setting ({error}): another version made this run. Export it with the version that made it."
        ) from error
    if folder is None and not base:
        raise RunError(
            f"{run} trained on random weights that exist nowhere else, so there is no base model to name. Give a name by --base=NAME if you"
            " want the adapter all the same."
        )
    try:
        sizes = SHAPES[shape] if folder is None else read_config(folder)
    except WeightsError as error:
        raise WeightsError(
            f"The sizes of the model are read from the weights that {run} used, and these cannot be: {error}\nExport where the weights are,"
            " or from the same working folder if their path is relative."
        ) from error
    if not (run / "checkpoints").is_dir():
        raise RunError(f"{run} has no checkpoints yet. Wait for the run's first step to end.")
    checkpoints = Checkpoints(run / "checkpoints", keep=1, every=0, read_only=True)
    try:
        if step is None:
            step = checkpoints.latest()
        if step is None:
            raise RunError(f"{run} has no complete checkpoint yet. Wait for the run's first step to end.")
        train_state, _ = checkpoints.restore(step, abstract_train_state(Model(sizes, lora).abstract_lora(), optimizer))
    finally:
        checkpoints.close()
    assert train_state is not None, "restore() refuses a checkpoint without one"
    save_peft(out, train_state.lora, sizes, lora, base or str(folder))
    return step, lora


def _read_run(run: Path) -> Any:
    """The settings of a run, as a ConfigDict."""
    try:
        flat = json.loads((run / "config.json").read_text())["config"]
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
        raise RunError(
            f"{run} is not a run directory: its config.json cannot be read ({error!r}). Give a run directory as --run."
        ) from error
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--step", type=int, help="number of a checkpoint in RUN/checkpoints (the latest)")
    parser.add_argument("--base", default="", help="the base model's name for adapter_config.json, as openai/gpt-oss-120b (its folder)")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of what reading only entails
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be busy with this very run
    try:
        step, lora = export_adapter(arguments.run, arguments.out, step=arguments.step, base=arguments.base)
    except DiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(
        f"checkpoint {step} of {arguments.run}: ranks {lora.attention_rank} (attention), {lora.expert_rank} (experts), {lora.head_rank}"
        f" (head), alpha {lora.alpha:g}: {arguments.out}"
    )


if __name__ == "__main__":
    main()
