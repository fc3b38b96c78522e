"""What one program may use: time, cores, memory, output."""

import dataclasses
import math

from discover_jax.exceptions import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CORE_BYTES = 1
"""Of a core dump. Not 0: where core dumps go to a program of the host (core_pattern begins with a pipe, as Ubuntu's apport and systemd's
have it), the kernel ignores a limit of 0, and the host's root would parse what a hostile process left; at 1 it makes none at all."""


@dataclasses.dataclass(frozen=True)
class ResourceLimits:
    """The bounds of one program. Part of the key under which results are cached: another limit is another result.

    Attributes:
      seconds: wall time, counted from the program's own start.
      cores: CPU cores leased to it alone, as long as the machine has that many.
      memory_bytes: of all its processes together where a cgroup can be had; of each process otherwise. The interpreter and the
        preloaded packages (about 250 MiB) count too, and so does what lies in the scratch folder.
      scratch_bytes: size of its working directory, which lies in memory.
      result_bytes: longest submission, as CSV.
      stdout_bytes: how much of the standard output and error is kept: half from the head, half from the tail.
      flood_bytes: a program that prints more than this is ended.
      file_bytes: longest file.
      processes: processes and threads at once.

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
                    f"ResourceLimits.{field.name} = {value!r}: every limit must be positive and finite; default {field.default}."
                )
            if field.name != "seconds" and int(value) != value:
                raise ConfigError(f"ResourceLimits.{field.name} = {value!r}: must be a whole number; default {field.default}.")


def resource_limits(seconds: float, cores: int, memory_gib: float) -> ResourceLimits:
    """The limits in the units of `config.execution`; all others keep their defaults."""
    return ResourceLimits(seconds=seconds, cores=cores, memory_bytes=int(memory_gib * GIB))
