"""Every error that the project raises on purpose.

Each one mixes in the standard type that fits, so that `except ValueError` keeps working, and carries one message that says
what happened, what was given, what is allowed and what to do. All can be pickled, since workers send them to the main process.
"""


class DiscoverError(Exception):
    """Base of all errors of the project: catch this to catch them all."""


class ConfigError(DiscoverError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(DiscoverError, ValueError):
    """A data file is missing, altered, or not what the task expects."""


class WeightsError(DiscoverError, ValueError):
    """A checkpoint folder lacks a tensor, or holds one of another shape, type or architecture."""


class TokenizerError(DiscoverError, ValueError):
    """A tokenizer file is missing or does not know a token that the chat format needs."""


class SandboxError(DiscoverError, RuntimeError):
    """The host cannot run programs in isolation as the config demands. Never the program's own fault."""


class ShardingError(DiscoverError, ValueError):
    """Two logical axes of one array fall on the same mesh axis, or an axis does not divide."""


class RunError(DiscoverError, RuntimeError):
    """The run folder cannot be used: another config, a broken journal, no space left."""


class HostError(DiscoverError, RuntimeError):
    """The processes of a run on several hosts did not come together, do not see the same folder, or one of them was lost."""


class CapacityError(DiscoverError, ValueError):
    """A prompt or a rollout is longer than the context that the sampler or the update was built for."""


class LearningError(DiscoverError, ValueError):
    """Rewards, advantages, rollouts or gradients from which no sound update can be computed: not finite, or of unequal lengths."""


class GradingError(DiscoverError, RuntimeError):
    """The grading of a submission failed by itself, which is the task's fault and never the program's."""
