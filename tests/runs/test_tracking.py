"""Event files as TensorBoard reads them. W&B only on request, with clear errors, and in its offline mode if it is installed."""

import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

from discover_jax import config as settings
from discover_jax.exceptions import ConfigError, RunError
from discover_jax.runs.metrics import REQUIRED
from discover_jax.runs.tracking import EventFiles, WandbSettings, open_trackers
from discover_jax.runs.workdir import open_workdir

ROW = dict.fromkeys(REQUIRED, 0.5) | {"loss": float("nan"), "task/planes/reward_mean": 0.25, "outcome/ok": 3, "best/score": None}


def events(path: Path) -> list:
    """The events of a file, without an incomplete last one. A record: length (8 bytes), its checksum (4), the data, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, found = path.read_bytes(), []
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        if len(data) < length + 16:
            break
        for start, end in ((0, 8), (12, 12 + length)):
            assert struct.unpack("<I", data[end : end + 4]) == (masked_crc32c(data[start:end]),)
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[length + 16 :]
    return found


def shown(folder: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard shows: files in order of their names. A session start at a step drops earlier events from this step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    points: dict[tuple[str, int], list[float]] = {}
    for path in sorted(folder.iterdir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                points = {place: values for place, values in points.items() if place[1] < event.step}
            for value in event.summary.value:
                points.setdefault((value.tag, event.step), []).append(value.simple_value)
    return points


def config_of(**tracking):
    config = settings.default_config()
    config.name = "boats"
    config.tracking.update(tracking)
    return config


@pytest.fixture
def workdir(tmp_path):
    with open_workdir(tmp_path / "run", {}, "train") as workdir:
        yield workdir


def run(workdir, steps, *, leads=True, **tracking):
    config = config_of(**tracking)
    mode = config.tracking.wandb
    wandb = WandbSettings(mode, config.tracking.project, config.tracking.entity, config.name, "train", settings.flatten(config))
    with open_trackers(workdir, wandb if mode != "off" else None, leads=leads) as trackers:
        if leads:
            trackers.begin(steps[0])
            for step in steps:
                trackers.write(ROW | {"step": step, "reward/mean": step / 2})


def test_resumed_run_has_each_step_once(workdir):
    run(workdir, [0, 1, 2])
    run(workdir, [2, 3])
    assert len(list(workdir.tensorboard_dir.iterdir())) == 2
    points = shown(workdir.tensorboard_dir)
    assert all(len(values) == 1 for values in points.values())
    assert {step: values for (name, step), values in points.items() if name == "reward/mean"} == {n: [n / 2] for n in range(4)}
    named = {name for name, _ in points}
    assert named == ROW.keys() - {"step", "loss", "best/score"}  # neither the step nor metrics that are None or not finite


def test_rows_are_written_immediately_and_incomplete_ones_are_skipped(tmp_path):
    files = EventFiles(tmp_path / "tensorboard")
    files.begin(0)
    files.write(ROW | {"step": 0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    files.write(ROW | {"step": 1})
    assert {step for _, step in shown(path.parent)} == {0, 1}
    files.close(failed=True)
    path.write_bytes(path.read_bytes()[: len(whole) + 20])
    again = EventFiles(path.parent)
    again.begin(1)
    again.write(ROW | {"step": 1})
    again.close(failed=False)
    assert all(len(values) == 1 for values in shown(path.parent).values())
    assert {step for _, step in shown(path.parent)} == {0, 1}


def test_full_disk_is_reported(tmp_path):
    files = EventFiles(tmp_path / "tensorboard")
    files.begin(0)
    files._file._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(RunError, match="No space left on device"):
        files.write(ROW | {"step": 0})
    files.close(failed=True)


def test_other_processes_track_nothing(workdir):
    run(workdir, [0], leads=False, wandb="online")
    assert not workdir.tensorboard_dir.exists()


def test_tracking_does_not_import_torch():
    code = (
        "import sys; import pathlib, tempfile; from discover_jax.runs.tracking import EventFiles;"
        " EventFiles(pathlib.Path(tempfile.mkdtemp())).begin(0);"
        " assert 'torch' not in sys.modules; assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_wandb_is_an_error(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.tracking.wandb = 'online'.*pip install .* '\.\[tracking\]'"):
        run(workdir, [0], wandb="online")
    assert not workdir.tensorboard_dir.exists()
    run(workdir, [0])  # wandb was not requested


class Recorded:
    """Records what is logged to a W&B run. `step` is the next step that W&B accepts."""

    def __init__(self, step):
        self.step, self.rows, self.code = step, [], None

    def log(self, row, step, commit):
        self.rows.append((step, row))
        self.step = step + 1

    def finish(self, exit_code):
        self.code = exit_code


def imitation(monkeypatch, *, logged_in, steps_known=0):
    """Replaces the module wandb and records its calls in `calls`."""
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    module = types.ModuleType("wandb")
    calls, runs = [], []

    def init(**options):
        calls.append(options)
        runs.append(Recorded(steps_known if len(runs) else 0))
        return runs[-1]

    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **options: options
    module.setup = lambda **options: None
    module.login = logged_in if callable(logged_in) else lambda **options: logged_in
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module, calls, runs


def test_wandb_without_login(workdir, monkeypatch):
    imitation(monkeypatch, logged_in=False)
    with pytest.raises(ConfigError, match="wandb login"):
        run(workdir, [0], wandb="online")
    module, calls, _ = imitation(monkeypatch, logged_in=None)

    def refuse(**options):
        raise module.Error("401")

    module.login = refuse
    with pytest.raises(ConfigError, match=r"config\.tracking\.wandb.*\b401\b|\b401\b.*config\.tracking\.wandb"):
        run(workdir, [0], wandb="online")
    assert calls == []


def test_wandb_gets_metrics_and_settings_and_resumes_by_id(workdir, monkeypatch):
    _, calls, runs = imitation(monkeypatch, logged_in=True, steps_known=3)
    run(workdir, [0, 1, 2], wandb="online", project="boats")
    run(workdir, [2, 3], wandb="online", project="boats")
    first, second = calls
    assert first["id"] == second["id"] == (workdir.path / "wandb_id").read_text().strip() != ""
    assert (first["resume"], first["project"], first["entity"], first["mode"]) == ("allow", "boats", None, "online")
    assert first["config"]["tracking.project"] == "boats"
    assert first["settings"]["console"] == "off"
    assert first["settings"]["save_code"] is False
    assert [step for step, _ in runs[0].rows] == [0, 1, 2]
    assert [step for step, _ in runs[1].rows] == [3]  # it already has step 2
    expected = {name: value for name, value in ROW.items() if name not in ("step", "loss", "best/score")}
    assert runs[0].rows[2][1] == expected | {"reward/mean": 1.0}
    assert runs[0].code == 0
    with pytest.raises(TypeError):  # stands for any error of a run
        run(workdir, [4, "no step"], wandb="online")
    assert runs[2].code == 1


def test_real_wandb_offline(workdir, monkeypatch):
    """Reads W&B's own file; this mode sends nothing."""
    pytest.importorskip("wandb", reason="needs the extra `tracking`")
    monkeypatch.setenv("HOME", str(workdir.path / "home"))
    run(workdir, [0, 1], wandb="offline")
    (file,) = (workdir.path / "wandb").glob("offline-run-*/*.wandb")
    data = file.read_bytes()
    assert b"task/planes/reward_mean" in data
    assert (workdir.path / "wandb_id").read_text().strip() in file.name


def test_unknown_settings_are_refused_and_tracking_can_change_on_resume(tmp_path):
    config = config_of(project="boats")
    with pytest.raises(ConfigError, match=r"config\.tracking\.project"):
        settings.validate(config)
    for name in ("off", "offline"):
        with open_workdir(tmp_path / "run", settings.flatten(config_of(wandb=name)), "train"):
            pass
