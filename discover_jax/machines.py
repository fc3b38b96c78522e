"""Machines that a dry run can be made for: the one it runs on, and others that are known by name.

A GPU or TPU that is not there can still be compiled for, as long as its compiler is installed (the extra `cuda` or `tpu`). Without it
the CPU's compiler stands in, and the machine says so.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from discover_jax.exceptions import ConfigError

GPU_FRACTION = 0.9
"""Part of a GPU's memory that jax takes for arrays when nothing else is said; jax's own default is 0.75."""
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name of the same


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler asks of a GPU, from the vendor's data sheets: bytes, counts, and bytes per second."""

    kind: str
    memory: int
    compute_capability: int
    cores: int
    bandwidth: float
    cache: int
    clock_ghz: float
    shared_memory: int = 233_472
    shared_memory_of_block: int = 232_448
    fpus_of_core: int = 128

    def target(self) -> str:
        """The description of the target that XLA takes, in protobuf's text form."""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.compute_capability} }}
              core_count: {self.cores} fpus_per_core: {self.fpus_of_core} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory} memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared_memory} shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory_of_block}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
        """


_MIB, _GIB = 1 << 20, 1 << 30
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 81_920 * _MIB, 8, 108, 2.04e12, 40 * _MIB, 1.41, 167_936, 166_912, 64),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 81_559 * _MIB, 9, 132, 3.35e12, 50 * _MIB, 1.98),
    "h200": _Gpu("NVIDIA H200", 143_771 * _MIB, 9, 132, 4.8e12, 50 * _MIB, 1.98),
    "b200": _Gpu("NVIDIA B200", 183_359 * _MIB, 10, 148, 8.0e12, 126 * _MIB, 1.965),
}


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """Bytes that the compiler gives to programs on one device, and devices of a chip."""

    memory: int
    devices_of_chip: int = 1


# The memory is what libtpu 0.0.52 names when a program is too large.
_TPUS = {
    "v5e": _Tpu(int(15.75 * _GIB)),
    "v5p": _Tpu(int(95.73 * _GIB)),
    "v6e": _Tpu(int(31.24 * _GIB)),
    "tpu7x": _Tpu(int(94.74 * _GIB), 2),
}
_SLICE = re.compile(rf"({'|'.join(_TPUS)}):(\d+(?:x\d+){{1,2}})")

NAMES = f"{', '.join(_GPUS)} (as many as config.mesh asks for), or a slice of TPUs such as v5e:2x4 ({', '.join(_TPUS)})"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: for people: "8 x NVIDIA H200".
      devices: of jax; those of a machine that is not there can only be compiled for.
      memory: bytes that arrays and programs may take on one device.
      note: where `memory` comes from.
      platform: as kernels are chosen by: "cpu", "gpu", "tpu".
      exact: whether the compiler is the machine's own; if not, figures are estimates.
      options: for the compiler.
    """

    name: str
    devices: Sequence[Any]
    memory: int
    note: str
    platform: str
    exact: bool
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def take_gpu_memory() -> None:
    """Lets jax take `GPU_FRACTION` of each GPU, unless the environment says otherwise. To be called before jax first looks for devices."""
    if not any(name in os.environ for name in _FRACTION_NAMES):
        os.environ[_FRACTION_NAMES[0]] = str(GPU_FRACTION)


def device_memory() -> int | None:
    """Bytes that arrays may take on one of this process's devices; None where it sets no limit, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def find_machine(name: str, devices: int) -> Machine:
    """The machine of that name with at least so many devices; an empty name means the one that this runs on.

    For another machine this process gives up its accelerators, so jax must not have looked for devices before.

    Raises:
      ConfigError: the name is not known, or the machine has too few devices.
    """
    if not name:
        return _this_machine(devices)
    jax.config.update("jax_platforms", "cpu")
    if name in _GPUS:
        return _gpus(_GPUS[name], devices)
    if match := _SLICE.fullmatch(name):
        return _tpus(name, _TPUS[match[1]], math.prod(map(int, match[2].split("x"))), devices)
    raise ConfigError(f"--machine={name!r} is not known; allowed: {NAMES}, or nothing for the machine that this runs on.")


def _this_machine(needed: int) -> Machine:
    devices = jax.devices()
    if len(devices) < needed:
        raise ConfigError(
            f"config.mesh asks for {needed} devices, and {len(devices)} are here. Name another machine with --machine: {NAMES}."
        )
    platform = jax.default_backend()
    limit = device_memory()
    if limit is not None:
        note = f"as jax has it; {_FRACTION_NAMES[0]} changes that" if platform == "gpu" else "as jax has it"
    else:
        limit, note = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the host's, which other processes need as well"
    return Machine(f"{len(devices)} x {devices[0].device_kind}, which are here", devices, limit, note, platform, exact=True)


def _gpus(gpu: _Gpu, count: int) -> Machine:
    fraction = float(next((os.environ[name] for name in _FRACTION_NAMES if os.environ.get(name)), GPU_FRACTION))
    note = f"{fraction:.0%} of {gpu.memory / 1e9:.1f} GB; {_FRACTION_NAMES[0]} changes that"
    hosts, each = -(-count // 8), min(count, 8)
    try:
        topology = topologies.get_topology_desc("", "cuda", target_config=gpu.target(), topology=f"1x{hosts}x{each}")
        devices, exact = topology.devices, True
    except NotImplementedError:  # no plugin for this platform
        devices, exact = _cpus(count), False
    # Tuning would measure kernels on the device.
    options = {"xla_gpu_autotune_level": 0} if exact else {}
    return Machine(f"{count} x {gpu.kind}", devices, int(fraction * gpu.memory), note, "gpu", exact, options)


def _tpus(name: str, tpu: _Tpu, chips: int, needed: int) -> Machine:
    count = chips * tpu.devices_of_chip
    if count < needed:
        raise ConfigError(f"config.mesh asks for {needed} devices, and {name} has {count}. Name a larger slice, or lower the mesh.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody answers where there is no TPU
    try:
        devices, exact = topologies.get_topology_desc(name, "tpu").devices, True
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise ConfigError(f"--machine={name!r} is no slice that the TPU's compiler knows: {error}") from error
        devices, exact = _cpus(count), False
    note = f"of {count} devices, {needed} in use" if count > needed else "what the compiler gives to programs"
    return Machine(name, devices, tpu.memory, note, "tpu", exact)


def _cpus(count: int) -> Sequence[Any]:
    """That many imitated devices; jax can only make them before it first looks."""
    # Refused once jax has looked for devices; then those that it found must do, and `make_mesh` says if they do not.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")
