"""Resource limits of one program: time, cores, memory, output."""

import dataclasses
import math

from discover_jax.exceptions import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CORE_BYTES = 1
"""Maximum size of a core dump. Not 0: if the host pipes core dumps to a handler, as Ubuntu's apport and systemd do, the kernel ignores a
limit of 0, and root on the host would parse data of a hostile process. With 1, the kernel writes no core dump."""


@dataclasses.dataclass(frozen=True)
class ResourceLimits:
    """The resource limits of one program. They are part of the cache key of its verdict.

    Attributes:
      seconds: wall time from the program's start.
      cores: CPU cores leased exclusively to it, if the machine has enough.
      memory_bytes: of all its processes together if there is a control group, otherwise of each process. Includes the interpreter, the
        preloaded packages (about 250 MiB) and the scratch folder.
      scratch_bytes: size of its working directory, which is in memory.
      result_bytes: maximum size of the submission as CSV, or of a returned value.
      stdout_bytes: how much of the standard output and error is kept: half from the beginning, half from the end.
      flood_bytes: a program that prints more than this is killed.
      file_bytes: maximum size of a file.
      processes: maximum number of processes and threads.

    Raises:
      ConfigError: a limit is not positive and finite.
    """

    seconds: float = 300.0
    cores: int = 2
    memory_bytes: int = 4 * GIB
    scratch_bytes: int = 1 * GIB
    result_bytes: int = 8 * MIB
    stdout_bytes: int = 64 * KIB
    flood_bytes: int = 1 * GIB
    file_bytes: int = 2 * GIB
    processes: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"ResourceLimits.{field.name} must be positive and finite; got {value!r}. The default is {field.default}."
                )
            if field.name != "seconds" and int(value) != value:
                raise ConfigError(f"ResourceLimits.{field.name} must be an integer; got {value!r}. The default is {field.default}.")


def resource_limits(seconds: float, cores: int, memory_gib: float, result_bytes: int = ResourceLimits.result_bytes) -> ResourceLimits:
    """The limits in the units of `config.execution`; the others keep their defaults.

    Args:
      result_bytes: see `tasks.submission_size`.
    """
    return ResourceLimits(seconds=seconds, cores=cores, memory_bytes=int(memory_gib * GIB), result_bytes=result_bytes)
