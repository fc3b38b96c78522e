"""Prompts of a built-in competition match golden/ to the byte: first and later attempts, in both styles, and those that ask for edits. So
does one of a problem.

After an intended change, `python tests/text/test_golden_prompts.py` writes them again. Read the difference before you commit it.
"""

import dataclasses
import re
import tempfile
from pathlib import Path

import pytest

from discover_jax.policy import APPRENTICE
from discover_jax.tasks.prepare import AnyTask, prepare_task
from discover_jax.text.harmony import Harmony
from discover_jax.text.prompts import PromptSettings, build_prompt
from discover_jax.text.tokenizer import load_tokenizer
from discover_jax.types import SEED, Attempt, Outcome, Prompt, State, StopReason

GOLDEN = Path(__file__).with_name("golden")
CODE = """import pandas as pd
from sklearn.linear_model import Ridge


def run():
    train, test = pd.read_csv("data/train.csv"), pd.read_csv("data/test.csv")
    features = [name for name in test if name != "id"]
    model = Ridge(alpha=1.0).fit(train[features], train["progression"])
    for number, weight in enumerate(model.coef_):
        print(f"weight of {features[number]}: {weight:.6f}")
    return test[["id"]].assign(progression=model.predict(test[features]))"""
PARENT = State(
    id="0003-001-004",
    parent_id="seed",
    code=CODE,
    value=-3.97,
    score=53.16842,
    stdout="".join(f"weight of s{number}: {number / 7:.6f}\n" for number in range(1, 41)) + "CV RMSE 55.1 +- 3.2\n",
    step=3,
    adapter_step=3,
    task="diabetes",
)
# A traceback from a sandbox, longer than the part that prompts show.
DETAIL = (
    "Traceback (most recent call last):\n"
    '  File "program.py", line 9, in run\n    model.fit(train[features], train["progresion"])\n'
    + "".join(
        f'  File "pandas/core/frame.py", line {line}, in __getitem__\n    indexer = self.columns.get_loc(key)\n'
        for line in range(4100, 4107)
    )
    + "KeyError: 'progresion'"
)
FAILURES = tuple(
    Attempt(
        id=f"0004-002-{index:03d}",
        parent_id=PARENT.id,
        task="diabetes",
        step=4,
        group=2,
        index=index,
        code=CODE.replace("progression", "progresion"),
        outcome=outcome,
        detail=detail,
        stdout="",
        score=None,
        private_score=None,
        reward=-7.0,
        adapter_step=4,
        tokens=300,
        stop=StopReason.STOP_TOKEN,
    )
    for index, (outcome, detail) in enumerate([(Outcome.TIMEOUT, "It ran for more than 300 seconds."), (Outcome.EXCEPTION, DETAIL)])
)
FULL = PromptSettings(
    style="full",
    max_tokens=20_000,
    packages=("numpy 2.3.1", "pandas 2.3.0", "scikit-learn 1.7.0"),
    ideas_shown=2,
    stdout_chars=400,
    error_chars=500,
)
BRIEF = PromptSettings(style="brief", max_tokens=20_000)
EDITS = dataclasses.replace(FULL, answer="edits")
PACKING = dataclasses.replace(
    PARENT,
    code="import numpy as np\n\n\ndef run():\n    return np.full((26, 2), 0.5), np.full(26, 0.5 / 26)",
    value=0.5,
    score=0.5,
    stdout="no overlap\n",
    task="circle-packing-26",
    feedback="circle 0 could be larger by 1e-9",
)
PACKING_FAILURE = dataclasses.replace(FAILURES[0], outcome=Outcome.INVALID_SUBMISSION, detail="circles 3 and 4 overlap")
PROMPTS = {
    "first_full": (SEED, (), FULL),
    "later_full": (PARENT, FAILURES, FULL),
    "first_brief": (SEED, (), BRIEF),
    "later_brief": (PARENT, FAILURES, BRIEF),
    "later_edits": (PARENT, FAILURES, EDITS),
    "problem_edits": (PACKING, (PACKING_FAILURE,), EDITS),
}


def task_of(name: str, folder: Path) -> AnyTask:
    return prepare_task(PROMPTS[name][0].task or "diabetes", raw=None, reward="grade", folder=folder)


def built(name: str, task: AnyTask, chat: Harmony) -> Prompt:
    """The prompt of that name. Its ideas are those of the third turn: the last two of the list."""
    parent, failures, settings = PROMPTS[name]
    return build_prompt(task, parent, failures, settings, chat, group=1, step=4)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_match_the_golden_files(name, tmp_path):
    chat = Harmony(load_tokenizer(APPRENTICE), date="2025-08-05")
    prompt = built(name, task_of(name, tmp_path / "task"), chat)
    assert prompt.text.encode() == (GOLDEN / f"{name}.txt").read_bytes()
    # The model reads the text that people see; special tokens have no text.
    assert chat.tokenizer.decode(prompt.tokens_P.tolist()) == re.sub(r"<\|\w+\|>", "", prompt.text)


def test_golden_later_prompt_is_complete():
    """Reads the file itself, to catch a golden file that was rewritten after a mistake."""
    text = (GOLDEN / "later_full.txt").read_text()
    assert CODE in text
    assert "Previous score: 53.16842 (root mean squared error, lower is better)" in text
    assert "[...]\n" in text.split("The end of what it printed:")[1][:20]
    assert "CV RMSE 55.1 +- 3.2\n```" in text
    assert "The last attempt to improve it failed:\n\n```\n[...]\n" in text
    assert "KeyError: 'progresion'\n```" in text
    assert "It ran for more than" not in text  # only the last of two failures is shown
    assert "Consider: tuning by cross-validation on the training rows, thresholds on predicted probabilities." in text
    assert "meaningful improvement" in text
    first = (GOLDEN / "first_full.txt").read_text()
    assert "Previous score" not in first
    assert "failed:" not in first


def test_golden_prompts_that_ask_for_edits_are_complete():
    later, edits, problem = ((GOLDEN / f"{name}.txt").read_text() for name in ("later_full", "later_edits", "problem_edits"))
    request = "# Competition: diabetes"
    assert later.partition(request)[2].removesuffix("the whole new program.<|end|><|start|>assistant") == edits.partition(request)[
        2
    ].removesuffix("edits of your last program.<|end|><|start|>assistant")
    for text in (edits, problem):
        assert "Answer with edits of your last program. It must define" in text
        assert "code block is executed" not in text
        assert "=======\n    total = math.fsum(values)\n>>>>>>> REPLACE\n" in text
    assert "# Problem: circle-packing-26" in problem
    assert "invalid solution\ncircles 3 and 4 overlap" in problem
    assert "What the checker says about it:\n\n```\ncircle 0 could be larger by 1e-9\n```" in problem
    assert "submission" not in problem


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for each in PROMPTS:
            prepared = task_of(each, Path(folder) / each)
            (GOLDEN / f"{each}.txt").write_bytes(built(each, prepared, Harmony(load_tokenizer(APPRENTICE))).text.encode())
