"""Extras bring what they promise, in the versions of the constraints."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from discover_jax.extras import install_command

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def required(extra: str) -> dict[str, Requirement]:
    """Requirements of an extra, with those of the extras that it names."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "discover_jax":
            for name in requirement.extras:
                found |= required(name)
        else:
            found[requirement.name] = requirement
    return found


def test_cuda_brings_the_plugin_and_the_kernels():
    assert required("cuda").keys() == {"jax", "jax-triton", "triton"}
    assert required("cuda")["jax"].extras == {"cuda13"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("given", "wrong"), [("cuda,harmony", ""), ("gpu", "gpu"), ("cuda,harmnoy", "harmnoy"), ("cuda, harmony", " harmony")]
)
def test_make_refuses_unknown_extras(given, wrong):
    done = subprocess.run(["make", "-n", "install", f"EXTRAS={given}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == bool(wrong), done.stderr
    assert (f"unknown: ['{wrong}']" in done.stderr) == bool(wrong)


def test_the_older_extra_of_the_kernels_still_exists():
    assert required("kernels").keys() == {"jax-triton", "triton"}


@pytest.mark.parametrize("constraints", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_satisfy_the_extras(constraints):
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(), re.MULTILINE))
    for extra in EXTRAS:
        for name, requirement in required(extra).items():
            if name in pins:
                assert requirement.specifier.contains(pins[name]), (extra, name)


@pytest.mark.parametrize("constraints", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_what_the_tests_need_has_a_pin_or_an_upper_bound(constraints):
    pins = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", constraints.read_text(), re.MULTILINE)}
    for extra in ("dev", "parity"):
        for name, requirement in required(extra).items():
            bounded = canonicalize_name(name) in pins or "<" in str(requirement.specifier)
            assert bounded, f"a new version of {name} can break the tests at any time"


def test_documents_need_no_other_extra_for_the_kernels():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "launch" / "Dockerfile.cuda"]:
        assert "cuda,kernels" not in page.read_text(), page


def test_messages_name_an_installation_of_this_folder():
    """Not of a package called discover_jax, which others could publish."""
    words = shlex.split(install_command("cuda").split("`")[1])
    assert words[:3] == ["pip", "install", "-c"]
    assert (ROOT / words[3]).is_file()
    assert words[4:] == ["-e", ".[cuda]"]
    for file in (ROOT / "discover_jax").rglob("*.py"):
        assert "install 'discover_jax[" not in file.read_text(), file


def test_messages_name_extras_that_exist():
    used = {name for file in (ROOT / "discover_jax").rglob("*.py") for name in re.findall(r"install_command\('(\w+)'\)", file.read_text())}
    assert used
    assert used <= EXTRAS.keys()
