"""The value of its parent that a program can read: the file in the sandbox, the cache, and values that try to break the next program."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_problem import Squares

from discover_jax.execution import Executor, sandbox_spec, values
from discover_jax.execution import cache as cache_module
from discover_jax.execution.cache import VerdictCache
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.types import PARENT_OUTPUT, Evaluation, Outcome, Program

pytestmark = pytest.mark.sandbox

READS = f"import os\ndef run():\n    return open('{PARENT_OUTPUT}').read() if os.path.exists('{PARENT_OUTPUT}') else 'no file'\n"


@dataclasses.dataclass(frozen=True)
class Says(Squares):
    """The feedback is what the program returns. With `fresh`, it must return the same in a new sandbox."""

    fingerprint: str = "says"

    def evaluate(self, program: Program) -> Evaluation:
        said = program.call("run")
        return Evaluation(float(not self.fresh or program.call("run", fresh=True) == said), said)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    public: Path = folder / "public"
    public.mkdir()
    (public / "problem.md").write_text("run()")
    for path in (folder, public):
        path.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_spec, "PRELOAD", ())
        limits = ResourceLimits(seconds=20.0, cores=1, memory_bytes=500 * MIB)
        with Executor([Says(public, fresh=True), Says(public, "once")], limits, workers=1, cache_dir=folder / "cache") as executor:
            yield executor


def said(executor: Executor, parent_output: bytes) -> str:
    verdict = executor.submit(READS, 0, parent_output).result(timeout=60)
    assert (verdict.outcome, verdict.grade.score) == (Outcome.OK, 1.0), verdict
    return verdict.grade.feedback


def test_the_same_program_reads_the_value_of_each_parent(executor):
    array = values.encode([np.array([[0.1, 1 / 3]]), 2], 1000)
    assert said(executor, array) == f"[[[0.1, {1 / 3}]], 2]"
    assert said(executor, b'"other"\n') == '"other"'
    assert said(executor, b"") == "no file"
    assert executor.submit(READS, 0, array).result().execution.cached


def _array(dtype: str, shape: str) -> bytes:
    """The header of an array as a value."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b'{"array":0}\n\x93NUMPY\x01\x00' + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "value",
    [
        b"noise",
        b"[" * 10**6 + b"]" * 10**6 + b"\n",
        b"[" + b"[]," * ((4 * MIB - 4) // 3 - 1) + b"[]]\n",
        _array("'<f8'", "(1000000000000,)"),
        _array("'<f8'", "(100000000000, 0)"),
        _array("'|O'", "(1,)") + b"cos\nsystem\n",
        b"9" * 10**5 + b"\n",
        b"\xff\xfe\n",
    ],
    ids=["noise", "deep", "many lists", "huge array", "many empty rows", "pickle", "long integer", "no text"],
)
def test_hostile_values_do_not_break_the_next_program(executor, value):
    assert len(value) <= 4 * MIB
    text = executor.submit(READS.replace(".read()", ".read(20)"), 1, value).result(timeout=60)
    assert text.outcome is Outcome.OK, text
    assert text.grade.feedback in ("no file", "[[], [], [], [], [],")


def test_keys_hash_settings_and_program_and_the_value_only_if_there_is_one(tmp_path):
    cache = VerdictCache(tmp_path / "cache", {"task": "t"})
    settings = hashlib.sha256(json.dumps({"format": cache_module._FORMAT, "task": "t"}, sort_keys=True).encode()).hexdigest()
    assert cache.key("p") == cache.key("p", b"") == hashlib.sha256(f"{settings}\np".encode()).hexdigest()
    digest = hashlib.sha256(b"v").hexdigest()
    keys = [cache.key("p"), cache.key("p", b"v"), cache.key("p", b"w"), cache.key(f"{digest}\np"), cache.key(f" {digest}\np")]
    assert len(set(keys)) == len(keys)
