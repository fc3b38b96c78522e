import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests of this folder share


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")


@pytest.fixture(scope="session")
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def qwen(torch, transformers, tmp_path_factory):
    """A GGUF file to import, and its model."""
    from gguf_files import random_model, write_model

    model = random_model("qwen2")
    return write_model(tmp_path_factory.mktemp("qwen") / "model.gguf", model, "qwen2"), model
