"""Files of a run directory that somebody altered: JSON that is nested too deeply, or has NaN, is damage, not a crash."""

import pytest

from discover_jax.exceptions import DiscoverError
from discover_jax.export_adapter import _read_run_config
from discover_jax.runs.disclosure import read_disclosure, read_isolation
from discover_jax.runs.metrics import read_metrics
from discover_jax.runs.workdir import _read_config
from discover_jax.tasks.prepared_folder import _RECORD, _read_record

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, f'{{"step": {DEEP}', '{"step": NaN, "isolation": {"isolated": true, "lines": []}, "config": {}, "kind": "train"}']
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metrics.jsonl", lambda folder: read_metrics(folder / "metrics.jsonl")),
        ("disclosure.json", read_disclosure),
        ("disclosure.json", read_isolation),
        ("config.json", _read_config),
        ("config.json", _read_run_config),
        (_RECORD, lambda folder: _read_record(folder, {})),
    ],
)
def test_damaged_json_is_refused(tmp_path, name, read, text):
    (tmp_path / name).write_text(text + "\n")
    with pytest.raises(DiscoverError, match=name.partition(".")[0] or _RECORD):
        read(tmp_path)
