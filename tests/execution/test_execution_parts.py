"""Small parts of execution: limits, truncated output, links to the interpreter."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.execution import ResourceLimits, bubblewrap
from discover_jax.execution.output import HeadAndTail, normalised


@given(chunks=st.lists(st.binary(max_size=30), max_size=40), limit=st.integers(2, 50))
def test_head_and_tail_of_any_stream(chunks, limit):
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
    # Characters that move a terminal's cursor or change its colours are replaced.
    assert normalised("a\r\nb\rc\t\x1b[2J\x00\x9b", []) == "a\nb\nc\t\ufffd[2J\ufffd\ufffd"


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
