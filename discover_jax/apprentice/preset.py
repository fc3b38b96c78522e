"""Settings for the small model on a CPU: prompt style, lengths, number format and learning rate."""

from typing import Any


def apprentice_on_cpu(config: Any) -> None:
    """Sets in place what all runs of the apprentice on a CPU share."""
    config.model.weights = "apprentice"
    config.model.dtype = "float32"
    config.model.experts = "dense"
    config.model.remat = "none"
    config.prompt.style = "brief"
    config.sampling.max_prompt_tokens = 640
    config.sampling.max_new_tokens = 512
    config.sampling.slots = 64
    config.train.row_lengths = 1  # compiling for another length costs more than padding
    config.train.rows = 1  # more rows gain nothing on a CPU, and the last microbatch would be padded
    config.train.learning_rate = 2e-3
    config.execution.seconds = 60.0
    config.execution.cores = 1  # most of its programs mostly use one core
