"""Communication between three real processes on this machine."""

import os
import socket
import subprocess
import sys

import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.hosts.processes import ALONE, start

_PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from discover_jax.exceptions import ConfigError
from discover_jax.hosts import processes
from discover_jax.hosts.processes import least, start
from discover_jax.models.sharding import fetch, lay_out, mesh_of_run
index = int(sys.argv[2])
those = start(sys.argv[1], 3, index)
processes._PART_BYTES = 7  # messages go in many parts
texts = those.gather({"text": "\\ud800" * index * 10, "index": index})
assert texts == [{"text": "\\ud800" * each * 10, "index": each} for each in range(3)], texts
assert those.from_first(lambda: [index, None]) == [0, None]
assert those.first_then_others(lambda: f"mine {index}") == f"mine {index}"
assert least(those, index + 5) == 5 and least(those, None if index < 2 else 9) == 9 and least(those, None) is None
those.agree("nothing", 1, "")
try:
    those.agree("their number", index // 2, "Fix it.")
except ConfigError as error:
    assert re.search(r"their number.*\\b0\\b.*\\b0\\b.*\\b2\\b.*\\b1\\b.*Fix it\\.", str(error)), error
else:
    raise AssertionError("not refused")
mesh = mesh_of_run(3, 2, 1)
spread = NamedSharding(mesh, PartitionSpec("data", "expert"))
array = lay_out(np.arange(24).reshape(6, 4), spread)
assert not array.is_fully_addressable
told = fetch({"array": array, "host": np.ones(2), "number": jax.jit(lambda x: x.sum())(array)})
assert np.array_equal(told["array"], np.arange(24).reshape(6, 4)) and told["number"] == 276
print("agreed")
"""


@pytest.mark.slow
def test_three_processes_with_two_devices_each():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(3)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert all("agreed" in text for text in said)


def test_single_process_needs_no_communication():
    assert ALONE.leads
    assert ALONE.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert ALONE.from_first(lambda: 3) == ALONE.first_then_others(lambda: 3) == 3
    ALONE.agree("nothing", 1, "")


@pytest.mark.parametrize(("coordinator", "count", "index"), [("host", 2, 0), ("host:1", 0, 0), ("host:1", 2, 2), ("host:1", 2, -1)])
def test_contradictory_process_arguments_are_refused(coordinator, count, index):
    with pytest.raises(ConfigError, match=f"--coordinator={coordinator} --num_processes={count} --process_id={index}: give all three"):
        start(coordinator, count, index)
