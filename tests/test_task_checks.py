"""Warnings about settings that do not suit the tasks of a run."""

import re
from types import SimpleNamespace

import pytest

from discover_jax.policy import APPRENTICE
from discover_jax.task_checks import brief_warning
from discover_jax.text.tokenizer import SentencePieceTokenizer

TASKS = {"table": SimpleNamespace(id="table", calls=False), "packing": SimpleNamespace(id="packing", calls=True)}


@pytest.mark.parametrize(
    ("style", "apprentice", "tasks", "said"),
    [
        ("brief", True, ["table"], None),
        ("brief", True, ["packing"], r"cannot solve packing\. Use a pretrained model"),
        ("brief", True, ["table", "packing"], r"cannot solve packing\."),
        ("brief", False, ["table"], r"set config\.prompt\.style = 'full'"),
        ("brief", False, ["packing"], r"set config\.prompt\.style = 'full'"),
        ("full", False, ["table", "packing"], None),
    ],
)
def test_a_model_that_cannot_know_its_task_is_named(style, apprentice, tasks, said):
    tokenizer = SentencePieceTokenizer(APPRENTICE / "tokenizer.model") if apprentice else object()
    found = brief_warning(style, [TASKS[name] for name in tasks], SimpleNamespace(tokenizer=tokenizer))  # pyright: ignore[reportArgumentType]
    assert (found is None) if said is None else re.search(said, found or "")
