"""Settings of the run as a whole: its size, devices, checkpoints and tracking."""

from typing import Any

from discover_jax.config.setting import Setting

RUN: dict[str, Any] = {
    "groups": Setting(16, "groups in a step; each has one parent", tier=1, low=1, high=4096),
    "group_size": Setting(
        8, "rollouts in a group; they share a prompt, and advantages compare them with each other", tier=1, low=2, high=4096
    ),
    "name": Setting("", "name of the run, shown in logs; the default run directory is `runs/NAME`"),
    "seed": Setting(0, "seed of every random draw of the run", low=0, high=2**31 - 1),
}

MESH: dict[str, Any] = {
    "data": Setting(1, "devices along the mesh axis that splits rollouts", tier=1, low=1, high=65_536),
    "expert": Setting(1, "devices along the mesh axis that splits experts", tier=1, low=1, high=65_536),
    "tensor": Setting(1, "devices along the mesh axis that splits heads and the vocabulary", tier=1, low=1, high=65_536),
}

CHECKPOINT: dict[str, Any] = {
    "keep": Setting(2, "number of latest checkpoints to keep", low=1, high=10_000),
    "every": Setting(0, "also keep each checkpoint whose step is a multiple of this; 0: keep no others", low=0, high=1_000_000),
}

_WANDB = ("tracking.wandb", ("online", "offline"))

TRACKING: dict[str, Any] = {
    "wandb": Setting(
        "off",
        "Weights & Biases (extra `tracking`). `online`: uploads metrics and settings; `offline`: writes them to the run directory for"
        " `wandb sync`. TensorBoard event files are always written",
        choices=("off", "online", "offline"),
    ),
    "project": Setting("discover_jax", "project at Weights & Biases", only_with=_WANDB),
    "entity": Setting("", "user or team at Weights & Biases; empty: the account's default", only_with=_WANDB),
}
