"""Settings that the small model needs: its prompt, its lengths, a CPU's number format, and a learning rate that fits its size."""

from typing import Any


def apprentice_on_cpu(config: Any) -> None:
    """Sets, in place, what every run of the apprentice on a CPU shares."""
    config.model.weights = "apprentice"
    config.model.dtype = "float32"
    config.model.experts = "dense"
    config.model.remat = "none"
    config.prompt.style = "brief"
    config.sampling.max_prompt_tokens = 640
    config.sampling.max_new_tokens = 512
    config.sampling.slots = 64
    config.train.row_lengths = 1  # compiling for another length takes longer than padding costs
    config.train.rows = 1  # several at once gain nothing on a CPU, and the last microbatch would be padded
    config.train.learning_rate = 2e-3
    config.execution.seconds = 60.0
    config.execution.cores = 1  # most of its programs use one core for most of their time
