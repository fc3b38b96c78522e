"""The check for a first run on a TPU finds wrong kernels, and reports parts that fail or take too long."""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.kernel_set import REFERENCE
from discover_jax.kernels.packed_attention import windowed_attention_reference
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = ModelConfig(2, 32, 2, 1, 16, 4, 2, 32, 61, sliding_window=16)
SMALL = {"tokens": 2, "prompts": (130, 3), "packed": 24}


@pytest.fixture(scope="module")
def check():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("tpu_check", BENCHMARKS / "tpu_check.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def _wrong(function):
    return lambda *arguments, **options: 1.02 * function(*arguments, **options)


@pytest.mark.slow
def test_wrong_kernels_are_found(check):
    """The model's own references stand for right kernels. One wrong kernel decodes, another is of the update."""
    wrong = {"paged_attention": _wrong(paged_attention_reference), "windowed_attention": _wrong(windowed_attention_reference)}
    kernels = dataclasses.replace(REFERENCE, **wrong, kernels=frozenset(wrong))
    found = check.compare(Model(SIZES, LoraConfig(4, 2, 4), jnp.float32, kernels=kernels), **SMALL)
    assert not found["passed"]
    assert min(found["decode_error"], found["gradient_error"]) > found["bound"]
    assert [name for name, used in found["kernels"].items() if used] == list(wrong)


@pytest.mark.slow
def test_equal_kernels_pass(check):
    found = check.compare(Model(SIZES, LoraConfig(4, 2, 4), jnp.float32), **SMALL)
    assert (found["passed"], found["decode_error"], found["gradient_error"], found["same_routes"]) == (True, 0, 0, 1)


def test_the_commands_have_flags_that_the_benchmarks_know(check, tmp_path):
    arguments = argparse.Namespace(shape="gpt-oss-20b", layers=4, data=1, expert=2)
    for script, *words in check.commands(arguments, tmp_path).values():
        source = (BENCHMARKS / script).read_text()
        known = set(re.findall(r'add_argument\(\s*"(--\w+)"', source)) | ({"--data", "--expert"} if "add_mesh(" in source else set())
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, script


def test_a_part_that_fails_or_hangs_does_not_lose_the_others(check, monkeypatch, tmp_path):
    texts = {"parity": "import sys; print('no such chip'); sys.exit(3)", "decode": "import time; time.sleep(60)"}
    texts["update"] = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text("[2]")'
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    monkeypatch.setattr(check, "commands", lambda _, folder: {name: [f"{name}.py", str(folder / f"{name}.json")] for name in texts})
    monkeypatch.setattr(sys, "argv", ["tpu_check.py", f"--out={tmp_path / 'all.json'}", "--limit=6"])
    assert check.main() == 1
    report = json.loads((tmp_path / "all.json").read_text())
    assert {name: (part["passed"], part["code"]) for name, part in report.items()} == {
        "parity": (False, 3),
        "decode": (False, None),
        "update": (True, 0),
    }
    assert "no such chip" in report["parity"]["output"]
    assert report["update"]["result"] == [2]
