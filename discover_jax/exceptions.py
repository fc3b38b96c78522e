"""All exceptions of the project.

Each one also derives from the matching built-in type, so that `except ValueError` works. Its message says what happened, what was given,
what is allowed and what to do. All can be pickled, since workers send them to the main process.
"""


class DiscoverError(Exception):
    """Base class of all errors of the project."""


class ConfigError(DiscoverError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(DiscoverError, ValueError):
    """A data file is missing, altered, or not what the task expects."""


class WeightsError(DiscoverError, ValueError):
    """A checkpoint folder lacks a tensor, or has one of another shape, type or architecture."""


class TokenizerError(DiscoverError, ValueError):
    """A tokenizer file is missing or lacks a token that the chat format needs."""


class SandboxError(DiscoverError, RuntimeError):
    """The host cannot isolate programs as the config requires. Never caused by a program."""


class ShardingError(DiscoverError, ValueError):
    """Two logical axes of an array map to the same mesh axis, or an axis is not divisible by its mesh axis."""


class RunError(DiscoverError, RuntimeError):
    """The run directory cannot be used: another config, a damaged journal, no space left."""


class HostError(DiscoverError, RuntimeError):
    """The processes of a run on several hosts did not come together or do not share the run directory, or one was lost."""


class TemporaryError(HostError):
    """A host cannot be reached or was lost. Starting the same command again may succeed."""


class CapacityError(DiscoverError, ValueError):
    """A prompt or a rollout is longer than the context that the sampler or the update was built for."""


class LearningError(DiscoverError, ValueError):
    """Rewards, advantages, rollouts or gradients are not finite or differ in length, so no valid update exists."""


class GradingError(DiscoverError, RuntimeError):
    """The grader itself failed on a submission. Never caused by a program."""
