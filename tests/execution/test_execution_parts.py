"""Small parts of execution: limits, truncated output, links to the interpreter."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.execution import ResourceLimits, bubblewrap
from discover_jax.execution.output import HeadAndTail, normalised, without_host_paths


@given(chunks=st.lists(st.binary(max_size=30), max_size=40), limit=st.integers(2, 50))
def test_head_and_tail_of_any_stream(chunks, limit):
    chunks = [chunk.replace(b"\r", b"") for chunk in chunks]
    kept, whole = HeadAndTail(limit), b"".join(chunks)
    for chunk in chunks:
        kept.add(chunk)
    half = limit // 2
    assert kept.total == len(whole)
    if len(whole) <= 2 * half:
        assert kept.text() == whole.decode("utf-8", "replace")
    else:
        head, tail = whole[:half].decode("utf-8", "replace"), whole[len(whole) - half :].decode("utf-8", "replace")
        assert kept.text() == f"{head}\n... {len(whole) - 2 * half} bytes left out ...\n{tail}"


def test_normalised_text():
    text = "/a/b/lib/x.py:3: <f at 0x7f00deadbeef> /sandbox/solution.py 0xff"
    assert normalised(text, ["/a", None, "/a/b", "/sandbox"]) == "lib/x.py:3: <f at 0x...> solution.py 0xff"
    # Progress bars are as on a terminal; other control characters are replaced.
    assert normalised("a\r\nb\rc\t\x1b[1m\x00\x07", []) == "a\nc\t\ufffd\ufffd"


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_a_progress_bar_keeps_what_was_printed_before(sizes):
    """2,000 updates of a bar are one line, in whichever pieces they arrive."""
    bar = "".join(f"\r{n // 20:3}%|{'█' * (n // 200):<10}| {n}/2000" for n in range(2001))
    data = f"fold 1: 0.81\n{bar}\nfold 2: 0.82\n{bar}\nmean 0.815\n".encode()
    kept, start = HeadAndTail(1000), 0
    for size in sizes:
        kept.add(data[start : start + size])
        start += size
    kept.add(data[start:])
    whole = "100%|██████████| 2000/2000"
    assert normalised(kept.text(), []) == f"fold 1: 0.81\n{whole}\nfold 2: 0.82\n{whole}\nmean 0.815\n"
    assert kept.total == len(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("36 35 0:5 /home/ann/run/public /sandbox/data ro", "36 35 0:5 data /sandbox/data ro"),
        ("/ann/run/public /run/public/x", "data data/x"),  # file systems mounted at /home and at /home/ann
        ("/public ann/run public", "/public ann/run public"),
    ],
)
def test_host_paths_are_replaced_in_whole_or_from_a_file_systems_root_on(text, expected):
    assert without_host_paths(text, [("/home/ann/run/public", "data")]) == expected


def test_data_of_every_scikit_learn_below_the_roots_are_masked(tmp_path):
    """Another Python's, for example of the system or of conda, shows the labels of bundled competitions as well."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    masked = [
        "lib/python3/dist-packages",
        "local/lib/python3.9/site-packages",
        "envs/a/lib64/python3.12/site-packages",
        "pkgs/scikit-learn-1.0/lib/python3.8/site-packages",
        "deps",  # pip install --target
    ]
    for place in masked:
        (root / place / "sklearn" / "datasets" / "data").mkdir(parents=True)
    (root / "moved" / "sk").mkdir(parents=True)
    (root / "moved" / "sk" / "datasets" / "data").mkdir(parents=True)
    (root / "linked").mkdir()
    (root / "linked" / "sklearn").symlink_to("../moved/sk")
    (outside / "sklearn" / "datasets" / "data").mkdir(parents=True)
    (root / "away").symlink_to(outside)
    (root / "empty" / "sklearn").mkdir(parents=True)
    found = set(bubblewrap._masked((str(root),)))
    assert found == {str(root / place / "sklearn" / "datasets" / "data") for place in masked} | {str(root / "moved/sk/datasets/data")}


def test_masked_folders_are_those_of_this_environment_too():
    import sklearn

    roots = tuple(str(folder) for folder in Path(sklearn.__file__).resolve().parents[2:3])
    assert str(Path(sklearn.__file__).resolve().parent / "datasets" / "data") in bubblewrap._masked(roots)


@pytest.mark.parametrize("values", [{"seconds": 0}, {"seconds": math.nan}, {"seconds": math.inf}, {"cores": -1}, {"memory_bytes": 1.5}])
def test_limits_are_checked(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        ResourceLimits(**values)


def test_links_on_the_way_to_the_interpreter(tmp_path):
    """A chain venv/python -> outside/python3 -> real/python: only the link outside the bound folders must be created again."""
    for name in ("venv", "outside", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "real" / "python").touch()
    (tmp_path / "outside" / "python3").symlink_to("../real/python")
    (tmp_path / "venv" / "python").symlink_to(tmp_path / "outside" / "python3")
    links = bubblewrap._links(str(tmp_path / "venv" / "python"), [str(tmp_path / "venv"), str(tmp_path / "real")])
    assert links == ((str(tmp_path / "outside" / "python3"), "../real/python"),)


def test_escape_sequences_within_a_path_do_not_hide_it():
    assert normalised("/sand\x1b[mbox/a.py", ["/sandbox"]) == "a.py"
    assert "/home" not in without_host_paths("/ho\x1b[1mme/user\x1b[m/run", [("/home/user/run", "RUN")])


def test_the_processes_of_slots_and_graders_import_little():
    """There may be a hundred of them, and each would wait for these packages."""
    heavy = {"numpy", "pandas", "jax", "discover_jax.execution.executor"}
    code = f"import sys, discover_jax.execution.worker, discover_jax.execution.grading; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
