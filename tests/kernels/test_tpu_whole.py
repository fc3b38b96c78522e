"""The whole jitted sampler and update compile for TPU slices that this machine does not have."""

import re

import pytest
from tpu_compiler import compiled, needs_libtpu

from discover_jax.kernels.kernel_set import OPERATIONS, PLATFORMS

FUNCTIONS = {"sampler": {"prefill", "decode", "put", "set aside", "shrink"}, "update": {"base", "gradient", "apply"}}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "case",
    [
        ("v5p:2x2x1", "gpt-oss-20b", "1", "4"),
        ("v5p:2x2x2", "gpt-oss-120b", "1", "8"),
        ("v6e:4x4", "gpt-oss-120b", "1", "16"),
        ("tpu7x:2x2x1", "qwen2.5-coder-1.5b", "8", "1"),
    ],
    ids=lambda case: "-".join(case[:2]),
)
@pytest.mark.parametrize("part", FUNCTIONS)
def test_every_function_of_a_step_compiles(case, part):
    """One repeat of the layers' pattern, with the prompts and rollouts of the default config.

    A sampler takes 1 (1.5B) to 2.4 minutes (20b) of a core, an update about 5 to 15 minutes, most of them for the gradient (estimated
    from whole models). The limit of 50 minutes is for machines with other work.
    """
    functions = FUNCTIONS[part]
    printed = compiled("tpu_whole_program.py", *case, *sorted(functions), seconds=3000)
    assert set(re.findall(r"^compiled (.+): [\d.]+ GB $", printed, re.MULTILINE)) == functions
    kernels = dict(re.findall(r"^kernel of (\w+) on tpu: (.+)$", printed, re.MULTILINE))
    assert set(kernels) == set(OPERATIONS)
    for operation, kernel in kernels.items():
        assert kernel.startswith("reference, because") == (operation not in PLATFORMS["tpu"].functions)
