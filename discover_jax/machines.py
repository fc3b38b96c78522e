"""The machines that a dry run supports: this one, and others by name.

A dry run can compile for a GPU or TPU that this machine does not have if its compiler is installed (the extra `cuda` or `tpu`). Otherwise
it uses formulas, and the report says so.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from discover_jax.exceptions import ConfigError

GPU_FRACTION = 0.9
"""Default fraction of a GPU's memory that jax uses for arrays; jax's own default is 0.75."""
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name


class Schedule(NamedTuple):
    """Fractions of the vendor's FLOP/s that the update's products reach in the compiler's schedule, for gpt-oss-120b's sizes
    (benchmarks/tpu_schedule.py).

    Attributes:
      plain: of a plain product, by XLA's own estimate.
      experts, experts_gradient: of a forward pass over the experts, and of a forward and a backward pass with full rematerialisation.
      attention, attention_gradient: the same of attention, for pairs of blocks of 512 queries and keys, with heads of 64.
    """

    plain: float
    experts: float
    experts_gradient: float
    attention: float
    attention_gradient: float


@dataclasses.dataclass(frozen=True)
class TpuPeaks:
    """The vendor's figures of one device of a TPU, and what the compiler's schedule says of our kernels. `costs_tpu` uses them.

    Attributes:
      product: dense bfloat16 FLOP/s.
      bandwidth: bytes/s of the memory.
      link: bytes/s of one link to another chip, in one direction.
      unpack: seconds in which decoding unpacks a byte of MXFP4, see `_UNPACK`.
      schedule: of the update's kernels.
      torus: chips along each dimension of the slice; empty if unknown.
      devices_of_chip: jax devices per chip.
    """

    product: float
    bandwidth: float
    link: float
    unpack: float
    schedule: Schedule
    torus: tuple[int, ...] = ()
    devices_of_chip: int = 1

    def links(self, devices: int) -> int:
        """Links by which a device receives in a group of consecutive devices: one per dimension that the group spans, at least one."""
        spanned, links = self.devices_of_chip, 0
        for chips in self.torus:
            if spanned < devices and chips > 1:
                spanned, links = spanned * chips, links + 1
        return max(links, 1)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Speeds of a device and its links. `costs` predicts a run's speed from them.

    Attributes:
      platform: as in `kernels.kernel_set`: "gpu", "tpu".
      product: FLOP/s of a large bfloat16 matrix product.
      copy: bytes/s, read and written, of a large copy within the device's memory.
      link: bytes/s to a device from other devices of its node or TPU slice.
      network: bytes/s to a device from other nodes.
      latency, network_latency: seconds of a small collective, including its kernel launch, within a node and between nodes.
      node: devices per node; 0 if all links are equal.
      assumed: names of the values above that were not measured in this project.
      tpu: further figures of a TPU; None for other devices.
    """

    platform: str
    product: float
    copy: float
    link: float
    network: float
    latency: float
    network_latency: float
    node: int
    assumed: tuple[str, ...]
    tpu: TpuPeaks | None = None


# Achieved fractions of the data sheets' figures. Measured: 790 of 989 TFLOP/s and 4.2 of 4.8 TB/s on an H200, 3.01 of 3.35 TB/s on an H100
# (docs/performance.md). Other devices are assumed to reach the same. The fraction of links is typical of NCCL with large messages.
_PRODUCT, _COPY, _LINK = 0.8, 0.88, 0.85
# Latency of a small collective in a loop. On two H200s, the gather and the sum of a decoding layer (128 rows) took 13.7 us each. The others
# are assumed: NCCL's own tests show 6 to 20 us within a node and 20 to 50 us over InfiniBand.
_NVLINK_LATENCY, _NETWORK_LATENCY, _ICI_LATENCY = 15e-6, 40e-6, 5e-6


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """A GPU's properties from the vendor's data sheets.

    Attributes:
      kind: jax's name of the device.
      memory, cache, shared_memory, shared_memory_of_block: sizes in bytes, for XLA's compiler.
      compute_capability, cores, clock_ghz, fpus_of_core: for XLA's compiler.
      bandwidth: bytes/s of the memory.
      flops: dense bfloat16 FLOP/s.
      nvlink: bytes/s by NVLink, in one direction.
      network: bytes/s by the network of the vendor's own node of eight (DGX).
      measured: fields of `Speeds` that were measured; they replace those computed from the data sheet.
    """

    kind: str
    memory: int
    compute_capability: int
    cores: int
    bandwidth: float
    cache: int
    clock_ghz: float
    flops: float
    nvlink: float
    network: float
    shared_memory: int = 233_472
    shared_memory_of_block: int = 232_448
    fpus_of_core: int = 128
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def speeds(self, node: int) -> Speeds:
        reached = {"product": _PRODUCT * self.flops, "copy": _COPY * self.bandwidth, "link": _LINK * self.nvlink}
        reached |= {"network": _LINK * self.network, "latency": _NVLINK_LATENCY, "network_latency": _NETWORK_LATENCY}
        return Speeds("gpu", **(reached | self.measured), node=node, assumed=tuple(reached.keys() - self.measured.keys()), tpu=None)

    def target(self) -> str:
        """XLA's description of the target, in protobuf's text format."""
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
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 81_920 * _MIB, 8, 108, 2.04e12, 40 * _MIB, 1.41, 312e12, 300e9, 25e9, 167_936, 166_912, 64),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 81_559 * _MIB, 9, 132, 3.35e12, 50 * _MIB, 1.98, 989e12, 450e9, 50e9, measured={"copy": 3.01e12}),
    "h200": _Gpu(
        *("NVIDIA H200", 143_771 * _MIB, 9, 132, 4.8e12, 50 * _MIB, 1.98, 989e12, 450e9, 50e9),
        measured={"product": 790e12, "copy": 4.2e12, "latency": _NVLINK_LATENCY},
    ),
    "b200": _Gpu("NVIDIA B200", 183_359 * _MIB, 10, 148, 8.0e12, 126 * _MIB, 1.965, 2250e12, 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """A TPU's properties. The speeds are per chip, from Cloud TPU's documentation.

    Attributes:
      memory: bytes that the compiler allows an executable on one device.
      flops: dense bfloat16 FLOP/s.
      bandwidth: bytes/s of the memory.
      link: bytes/s of one link, in one direction.
      kind: jax's name of the device.
      unpack, schedule: see `TpuPeaks`, for one device.
      devices_of_chip: jax devices per chip.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    kind: str
    unpack: float
    schedule: Schedule
    devices_of_chip: int = 1

    def speeds(self, torus: tuple[int, ...] = ()) -> Speeds:
        # An axis of the mesh may use only one link, so only one link per device counts, except in `costs_tpu`.
        chip = {"product": _PRODUCT * self.flops, "copy": _COPY * self.bandwidth, "link": _LINK * self.link}
        reached = {name: value / self.devices_of_chip for name, value in chip.items()} | {"latency": _ICI_LATENCY}
        each = self.devices_of_chip
        peaks = TpuPeaks(self.flops / each, self.bandwidth / each, self.link / each, self.unpack, self.schedule, torus, each)
        return Speeds("tpu", **reached, network=0.0, network_latency=0.0, node=0, assumed=tuple(reached), tpu=peaks)


# Seconds of a core per byte of MXFP4, from the bundles that the compiler (libtpu 0.0.42.1) schedules for decoding's kernel of experts with
# 32 rows, at 1.75 GHz: 1.93 (v5p) and 1.33 times (v6e) as long as reading it at the vendor's bandwidth. The two cores of a v5p chip share
# the work. Not known for v5e and TPU7x: their cores are taken to need as many seconds as the v5p's and the v6e's.
_UNPACK_V5P, _UNPACK_V6E = 2 * 1.93 / 2765e9, 1.33 / 1638e9
# By benchmarks/tpu_schedule.py. The v5e has the v5p's matrix units, of 128 x 128. The TPU7x has units of 256 x 256, as the v6e.
_SCHEDULE_V5P = Schedule(plain=0.948, experts=0.789, experts_gradient=0.820, attention=0.351, attention_gradient=0.507)
_SCHEDULE_V6E = Schedule(plain=0.839, experts=0.543, experts_gradient=0.527, attention=0.104, attention_gradient=0.159)
# The memory is the limit in libtpu 0.0.52's error for an executable that is too large.
_TPUS = {
    "v5e": _Tpu(int(15.75 * _GIB), 197e12, 819e9, 50e9, "TPU v5 lite", _UNPACK_V5P, _SCHEDULE_V5P),
    "v5p": _Tpu(int(95.73 * _GIB), 459e12, 2765e9, 100e9, "TPU v5", _UNPACK_V5P / 2, _SCHEDULE_V5P),
    "v6e": _Tpu(int(31.24 * _GIB), 918e12, 1638e9, 100e9, "TPU v6 lite", _UNPACK_V6E, _SCHEDULE_V6E),
    "tpu7x": _Tpu(int(94.74 * _GIB), 2307e12, 7370e9, 100e9, "TPU7x", _UNPACK_V6E, _SCHEDULE_V6E, 2),
}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# Cloud TPU's names of slices. Those of v5p and TPU7x count cores, and a chip has two cores.
_SLICES = {f"{tpu}-{chips}": f"{tpu}:{shape}" for tpu in ("v5e", "v6e") for chips, shape in _FLAT.items()}
_SLICES |= {
    f"{tpu}-{2 * 4 * n}": f"{tpu}:{shape}"
    for n, shape in {1: "2x2x1", 2: "2x2x2", 4: "2x2x4", 8: "2x4x4", 16: "4x4x4"}.items()
    for tpu in ("v5p", "tpu7x")
}
_SLICE = re.compile(rf"({'|'.join(_TPUS)}):(\d+(?:x\d+){{1,2}})")
_NODES = re.compile(rf"(?:(\d+)x)?({'|'.join(_GPUS)})x(\d+)")
NODE = 8
"""GPUs per node by default."""

NAMES = (
    f"{', '.join(_GPUS)} (the number of GPUs follows from config.mesh), h200x8 (one node of eight), 2xh200x8 (two such nodes), or a TPU"
    f" slice such as v5e:2x4 or v5p-16 (TPU kinds: {', '.join(_TPUS)})"
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: for display, such as "8 x NVIDIA H200".
      devices: jax devices. Those of another machine support only compilation.
      memory: bytes available to arrays and executables on one device.
      note: source of `memory`.
      platform: as in `kernels.kernel_set`: "cpu", "gpu", "tpu".
      exact: whether the compiler is the machine's own; otherwise nothing can be compiled for it.
      options: compiler options.
      speeds: speeds of each device, if known.
    """

    name: str
    devices: Sequence[Any]
    memory: int
    note: str
    platform: str
    exact: bool
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    speeds: Speeds | None = None

    @property
    def large_tiles(self) -> bool:
        """See `has_large_tiles`."""
        return has_large_tiles(self.name)


def has_large_tiles(kind: str) -> bool:
    """Whether these are TPUs whose compiler lays out bfloat16 matrices in tiles of 16 rows instead of 8, and copies them for it.

    Args:
      kind: of devices, as jax names it, or a text that has it.
    """
    return "tpu7x" in kind.lower()


def take_gpu_memory() -> None:
    """Lets jax use `GPU_FRACTION` of each GPU, unless the environment sets a fraction. Call it before jax initialises its devices."""
    if not any(name in os.environ for name in _FRACTION_NAMES):
        os.environ[_FRACTION_NAMES[0]] = str(GPU_FRACTION)


def device_memory() -> int | None:
    """Bytes available to arrays on one of this process's devices; None if there is no limit, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def find_machine(name: str, devices: int) -> Machine:
    """The machine of this name, with at least `devices` devices. An empty name means this machine.

    For another machine, this process restricts jax to the CPU, so call this before jax initialises its devices.

    Raises:
      ConfigError: the name is unknown, or the machine has too few devices.
    """
    if not name:
        return _this_machine(devices)
    jax.config.update("jax_platforms", "cpu")
    if name in _GPUS:
        nodes = -(-devices // NODE)
        return _gpus(_GPUS[name], nodes, -(-devices // nodes))
    if match := _NODES.fullmatch(name):
        nodes, each = int(match[1] or 1), int(match[3])
        _check_count(name, nodes * each, devices)
        return _gpus(_GPUS[match[2]], nodes, each)
    if match := _SLICE.fullmatch(_SLICES.get(name, name)):
        tpu, torus = _TPUS[match[1]], tuple(map(int, match[2].split("x")))
        _check_count(name, math.prod(torus) * tpu.devices_of_chip, devices)
        return _tpus(match[0], tpu, torus, devices)
    raise ConfigError(f"--machine={name!r} is unknown; allowed: {NAMES}. Omit --machine for this machine.")


def machine_of_slice(name: str) -> Machine:
    """A TPU slice by Cloud TPU's name, such as "v5p-16", for predictions only: its devices are None, and nothing can be compiled for it."""
    kind, shape = _SLICES[name].split(":")
    tpu, torus = _TPUS[kind], tuple(map(int, shape.split("x")))
    devices = [None] * (math.prod(torus) * tpu.devices_of_chip)
    return Machine(name, devices, tpu.memory, "the compiler's limit", "tpu", exact=False, speeds=tpu.speeds(torus))


def speeds_of(name: str, node: int = NODE) -> Speeds | None:
    """Speeds of a device by its name for --machine ("h200", "v5p") or in jax ("NVIDIA H200"); None if unknown. `node`: GPUs per node."""
    for known, device in {**_GPUS, **_TPUS}.items():
        if name in (known, device.kind):
            return device.speeds(node) if isinstance(device, _Gpu) else device.speeds()
    return None


def memory_of(name: str) -> int:
    """Bytes that a device of this TPU slice gives to an executable.

    Raises:
      ConfigError: the name is unknown.
    """
    if match := _SLICE.fullmatch(_SLICES.get(name, name)):
        return _TPUS[match[1]].memory
    raise ConfigError(f"{name!r} is not a TPU slice; allowed: names such as v5e:2x4 or v5p-16 (TPU kinds: {', '.join(_TPUS)}).")


def _check_count(name: str, count: int, needed: int) -> None:
    if not 0 < needed <= count:
        raise ConfigError(f"config.mesh asks for {needed} devices, but {name} has {count}. Choose a larger machine or a smaller mesh.")


def _this_machine(needed: int) -> Machine:
    devices = jax.devices()
    if len(devices) < needed:
        raise ConfigError(
            f"config.mesh asks for {needed} devices, but this machine has {len(devices)}. Choose a smaller mesh, or another machine with"
            f" --machine: {NAMES}."
        )
    platform = jax.default_backend()
    limit = device_memory()
    if limit is not None:
        note = f"jax's limit; {_FRACTION_NAMES[0]} changes it" if platform == "gpu" else "jax's limit"
    else:
        limit, note = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the host's memory, shared with other processes"
    kind, speeds = devices[0].device_kind, speeds_of(devices[0].device_kind, jax.local_device_count())
    return Machine(f"{len(devices)} x {kind}, this machine", devices, limit, note, platform, exact=True, speeds=speeds)


def _gpus(gpu: _Gpu, nodes: int, each: int) -> Machine:
    fraction = float(next((os.environ[name] for name in _FRACTION_NAMES if os.environ.get(name)), GPU_FRACTION))
    note = f"{fraction:.0%} of {gpu.memory / 1e9:.1f} GB; {_FRACTION_NAMES[0]} changes it"
    count = nodes * each
    try:
        topology = topologies.get_topology_desc("", "cuda", target_config=gpu.target(), topology=f"1x{nodes}x{each}")
        devices, exact = topology.devices, True
    except NotImplementedError:  # this platform's plugin is not installed
        devices, exact = _cpus(count), False
    # Autotuning would run kernels on a device.
    options = {"xla_gpu_autotune_level": 0} if exact else {}
    return Machine(f"{count} x {gpu.kind}", devices, int(fraction * gpu.memory), note, "gpu", exact, options, gpu.speeds(each))


def _tpus(name: str, tpu: _Tpu, torus: tuple[int, ...], needed: int) -> Machine:
    count = math.prod(torus) * tpu.devices_of_chip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the query would not return without a TPU
    try:
        devices, exact = topologies.get_topology_desc(name, "tpu").devices, True
    except RuntimeError as error:
        if "lockfile" in str(error):
            raise ConfigError(
                f"--machine={name!r}: the TPU compiler (libtpu) is in use by another process of this machine ({error}). Wait until it ends."
                " If it only compiles, as a dry run does, you may set ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment of both."
            ) from error
        if "not installed" not in str(error):
            raise ConfigError(f"--machine={name!r} is not a slice that the TPU compiler supports: {error}. Choose another.") from error
        devices, exact = _cpus(count), False
    note = f"{needed} of {count} devices in use" if count > needed else "the compiler's limit"
    return Machine(name, devices, tpu.memory, note, "tpu", exact, speeds=tpu.speeds(torus))


def _cpus(count: int) -> Sequence[Any]:
    """Simulated CPU devices."""
    # jax rejects this once its devices are initialised. Then the existing ones are used, and `make_mesh` raises if there are too few.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")
