"""Settings shared by all configs that run the apprentice, the small model, on a CPU."""

from typing import Any


def apprentice_on_cpu(config: Any) -> None:
    """Changes `config` in place: weights, prompt style, token budgets, batch shapes, learning rate and limits of programs."""
    config.model.weights = "apprentice"
    config.model.dtype = "float32"
    config.model.experts = "dense"
    config.model.remat = "none"
    config.prompt.style = "brief"
    config.sampling.max_prompt_tokens = 640
    config.sampling.max_new_tokens = 512
    config.sampling.slots = 64
    config.train.row_lengths = 1  # compiling a second length takes longer than computing the padding
    config.train.rows = 1  # more rows are no faster on a CPU, and would pad the last microbatch
    config.train.learning_rate = 2e-3
    config.execution.seconds = 60.0
    config.execution.cores = 1  # most of the apprentice's programs use one core most of the time
