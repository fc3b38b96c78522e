"""A run in which every text tries to become markup or a script."""

import json
from pathlib import Path

from synthetic_run import DISCLOSURE, attempt, write_run

from discover_jax.types import Outcome

ATTACK = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><!--<script>@@data@@${window.pwned = 3}"
REQUEST = '<img src="https://example.org/pixel"><link rel=stylesheet href="//example.org/a.css"><iframe src="https://example.org"></iframe>'


def write_hostile_run(folder: Path) -> Path:
    """Two steps: a parent, a child that changes it, a failure, and a child with feedback. Programs, output, errors, feedback, config and
    disclosure contain the attacks."""
    code = f'x = """{ATTACK}"""\n# {REQUEST}\ndef run():\n    return 1\n'
    attempts = [
        attempt(0, 0, 0, "seed", code, 0.7, stdout=ATTACK + REQUEST),
        attempt(1, 0, 0, "0000-000-000", code.replace("return 1", f"return '{ATTACK}'"), 0.75, stdout="javascript:window.pwned=4"),
        attempt(1, 0, 1, "0000-000-000", code, None, outcome=Outcome.EXCEPTION, detail=ATTACK + REQUEST),
        attempt(1, 0, 2, "0000-000-000", "x = 1", 0.6, feedback=ATTACK + REQUEST, metrics={ATTACK: 1.0}),
    ]
    disclosure = json.loads(json.dumps(DISCLOSURE).replace("native", "native <b>"))
    competition = disclosure["competitions"][0]
    competition["metric"]["name"] = f"accuracy {ATTACK}"
    competition["reward"]["text"] = competition["leaderboard"]["note"] = competition["leaderboard"]["source"] = ATTACK + REQUEST
    competition["leaderboard"]["thresholds"] = {f"Kaggle {ATTACK}": 0.7957}
    disclosure["isolation"]["lines"] = [ATTACK]
    run = write_run(folder, attempts, disclosure=disclosure)
    config = json.loads((run / "config.json").read_text())
    config["config"] |= {"name": f"run {ATTACK}", "task.raw": ATTACK, "a.setting.of.another.version": REQUEST}
    (run / "config.json").write_text(json.dumps(config))
    return run
