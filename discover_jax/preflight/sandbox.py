"""The sandbox canary of one host, without data: a probe tries to break out of a sandbox beside the run directory."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from discover_jax.exceptions import DiscoverError
from discover_jax.execution import bubblewrap, canary, memory
from discover_jax.execution.executor import BACKENDS
from discover_jax.execution.leases import lease_cores, lease_uids
from discover_jax.execution.limits import resource_limits
from discover_jax.execution.sandbox_spec import SandboxSpec
from discover_jax.files import storage_remedy
from discover_jax.preflight.findings import Finding, Level


def check_sandbox(config: Any, folder: Path | None) -> Finding:
    """Runs the canary as the run does before its first program.

    Args:
      config: validated.
      folder: on the file system of the run directory, since programs read their data from there; None: in a temporary folder.
    """
    backend = config.execution.backend
    if backend == "ray":
        return Finding("sandbox", Level.SKIPPED, "programs run on a ray cluster; the doctor without --distributed checks its nodes")
    if BACKENDS[backend] != "bubblewrap":
        return Finding("sandbox", Level.WARNING, f"execution.backend = {backend!r}: programs run WITHOUT ISOLATION", "none")
    settings = config.execution
    try:
        with contextlib.ExitStack() as held:
            place = held.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", dir=folder))
            os.chmod(place, 0o755)
            public, private = Path(place) / "public", Path(place) / "private"
            for each in (public, private):
                each.mkdir(mode=0o755)
                (each / "file").write_text("1")
                (each / "file").chmod(0o644)
            host = bubblewrap.inspect_host()
            uid = held.enter_context(lease_uids(1))[0] if host.root else None
            cores = lease_cores(sorted(os.sched_getaffinity(0)), settings.cores, 1)[0]
            limits = resource_limits(settings.seconds, settings.cores, settings.memory_gib)
            spec = SandboxSpec("bubblewrap", host, memory.find_cgroups(), public.resolve(), limits, 0, cores, uid, ())
            canary.check(spec, canary.hidden_paths(host, public.resolve(), []))
    except DiscoverError as error:
        return Finding("sandbox", Level.FIX, str(error))
    except OSError as error:
        return Finding("sandbox", Level.FIX, f"Cannot prepare the sandbox: {error}. {storage_remedy(error)}")
    return Finding("sandbox", Level.OK, f"the canary could not escape ({host.version})")
