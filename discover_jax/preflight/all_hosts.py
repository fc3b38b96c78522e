"""The preflight of a run on several hosts: `python -m discover_jax.doctor --distributed ...`, with the flags of the run.

All hosts start it as they start the run. It takes less than three minutes once all are there, loads no weights, and leaves nothing behind.
Process 0 prints one table. The exit code, the same on all hosts, is 0 if the run may start (warnings are allowed), 2 if something must be
changed, and 3 if something temporary is in the way, such as a host that did not appear.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from discover_jax.exceptions import TemporaryError
from discover_jax.hosts.exit_codes import USER_ERROR
from discover_jax.hosts.meeting import Meeting, meet
from discover_jax.hosts.processes import JOIN_SECONDS, place_of
from discover_jax.models.config import ModelConfig
from discover_jax.models.families import SHAPES
from discover_jax.models.folder import read_config
from discover_jax.policy import weights_folder
from discover_jax.preflight import one_host, ports, shared_folder
from discover_jax.preflight.devices import Child, Mode, look
from discover_jax.preflight.findings import Finding, Level, conclusion, exit_code, from_row, lines_of
from discover_jax.preflight.judge_devices import findings_of, judge_bandwidth, judge_mesh
from discover_jax.preflight.sandbox import check_sandbox
from discover_jax.untrusted_text import printable

MEET_SECONDS = JOIN_SECONDS
"""Time limit for all hosts to appear: the run's own."""
_HOST_SECONDS = 60.0
"""Time limit for what each host finds out about itself."""
_DEVICES_SECONDS = 100.0
"""Time limit for devices, all-reduce and dry run. A larger dry run is left unfinished, with a warning."""


class _Report:
    """The findings so far, in process 0; other processes only collect their own.

    Attributes:
      by_host: findings of each process.
      of_all: findings about all of them together.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.by_host, self.of_all = names, [[] for _ in names], []

    def add(self, rows_of_hosts: Sequence[Sequence[Sequence[str]]]) -> None:
        """Adds the findings of each process, as rows."""
        for found, rows in zip(self.by_host, rows_of_hosts, strict=True):
            found += [from_row(row) for row in rows]

    @property
    def findings(self) -> list[Finding]:
        """All of them."""
        return [finding for found in [*self.by_host, self.of_all] for finding in found]

    def show(self) -> None:
        """Prints the table."""
        print(printable("\n".join([*lines_of(self.names, self.by_host, self.of_all), conclusion(self.findings)])), flush=True)


def run(config: Any, workdir: Path, coordinator: str, count: int, index: int) -> int:
    """Checks all hosts together. All processes must call this alike.

    Args:
      config: validated.
      workdir: the run directory, which need not exist.
      coordinator, count, index: flags of the command line, as for `processes.start`.

    Returns:
      The exit code, the same in all processes unless one was lost.

    Raises:
      TemporaryError: hosts did not appear.
      ConfigError: jax cannot detect the processes, or they contradict each other.
    """
    # Forked before this process uses jax. The sizes are known without reading weights.
    child = Child(functools.partial(_look, config, (coordinator, count, index)))
    try:
        jax.config.update("jax_platforms", "cpu")  # the devices are the child's
        with meet(*place_of(coordinator, count, index), MEET_SECONDS) as meeting:
            report = _Report(meeting.names)
            try:
                _check(config, workdir, meeting, child, report)
            except TemporaryError as error:
                if meeting.index:
                    raise
                report.of_all.append(Finding("hosts", Level.TEMPORARY, str(error)))
                report.show()
                return exit_code(report.findings)
            if meeting.index == 0:
                report.show()
            code = meeting.from_first("the conclusion", exit_code(report.findings), _HOST_SECONDS)
            if meeting.index:
                print(f"Exit code {code}. The table of all hosts is in the output of {meeting.names[0]}.", flush=True)
            return code
    finally:
        child.close()


def _look(config: Any, place: tuple[str, int, int], mode: Mode, tell: Any) -> None:
    """What the child does."""
    look(config, _sizes(config), *place, mode, tell)


def _sizes(config: Any) -> ModelConfig | None:
    """The model's sizes; None if they cannot be read, which the check of the weights reports."""
    folder = weights_folder(config)
    if folder is None:
        return SHAPES[config.model.shape]
    return read_config(folder) if (folder / "config.json").exists() else None


def _check(config: Any, workdir: Path, meeting: Meeting, child: Child, report: _Report) -> None:
    """All checks, in order. Each host's findings are exchanged, so that process 0 has them even if a later check loses a host."""
    all_facts = meeting.gather("each host", one_host.facts(config, workdir), _HOST_SECONDS)
    report.add([facts["findings"] for facts in all_facts])
    if any("invalid" in facts for facts in all_facts):
        return
    report.add([[finding.row() for finding in found] for found in one_host.compare(all_facts)])
    with shared_folder.probe_folder(meeting, workdir) as folder:
        found = [shared_folder.check_shared(folder, workdir), shared_folder.check_locks(folder, meeting)]
        found.append(check_sandbox(config, folder))
        report.add(meeting.gather("the sandbox", [finding.row() for finding in found], _HOST_SECONDS))
    rows = meeting.gather("ports", [ports.check_ports(meeting).row()], _HOST_SECONDS)
    report.add(rows)
    open_to_all = all(from_row(row).level is Level.OK for each in rows for row in each)
    mode = Mode.ALONE if meeting.count == 1 else Mode.TOGETHER if open_to_all else Mode.APART
    began = time.monotonic()
    results = child.results(mode, began + _DEVICES_SECONDS)
    all_results = meeting.gather("devices", results, _DEVICES_SECONDS + 20)
    report.add([[finding.row() for finding in findings_of(each, _DEVICES_SECONDS)] for each in all_results])
    report.of_all.append(judge_mesh((config.mesh.data, config.mesh.expert, config.mesh.tensor), all_results, meeting.names))
    report.of_all.append(judge_bandwidth(all_results, _DEVICES_SECONDS))


def tell_failure(reason: str, coordinator: str, count: int, index: int) -> None:
    """Tells the other processes that this host has no valid config.

    Args:
      reason: why.
      coordinator, count, index: as for `run`.
    """
    with meet(*place_of(coordinator, count, index), MEET_SECONDS) as meeting:
        found = Finding("config", Level.FIX, reason, "invalid")
        all_facts = meeting.gather("each host", {"findings": [found.row()], "invalid": True}, _HOST_SECONDS)
        if meeting.index == 0:
            report = _Report(meeting.names)
            report.add([facts["findings"] for facts in all_facts])
            report.show()
        meeting.from_first("the conclusion", USER_ERROR, _HOST_SECONDS)
