"""The program is the last fenced Python block of the answer."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.text.code import extract_program

RUN = "def run():\n    return 1"


@pytest.mark.parametrize(
    "language", ["python", "Python", "PYTHON", "py", "python3", "{python}", 'python title="a.py"', " python", "python "]
)
def test_block_marked_as_python(language):
    assert extract_program(f"Here:\n\n```{language}\n{RUN}\n```\nDone.", truncated=False) == RUN


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        ("", None),
        ("no code", None),
        (RUN, None),
        ("`def run(): pass`", None),
        ("```python\n```", None),
        ("```python\n\n  \n```", None),
        ("```json\n{}\n```", None),
        ("```\nPassengerId,Transported\n```", None),
        (f"```\n{RUN}\n```", RUN),
        (f"```python\na = 1\n```\ntext\n```python\n{RUN}\n```", RUN),
        (f"```python\n{RUN}\n```\noutput:\n```\n0.81\n```", RUN),
        (f"```python\n{RUN}\n```\n```\ndef run(): other\n```", RUN),
        (f"```python\n{RUN}\n```\n```text\nend\n```", RUN),
        (f"```python\r\n{RUN}\r\n```\r\n".replace("\n    ", "\r\n    "), RUN),
        (f"~~~python\n{RUN}\n~~~", RUN),
        (f"```python\n{RUN}\n~~~\n```", RUN + "\n~~~"),
        (f"````python\n{RUN}\n```\nx = 2\n````", RUN + "\n```\nx = 2"),
        (f"```python\n{RUN}\n`````", RUN),
        ("````markdown\n```python\nexample\n```\n````", None),
        ("1. Code:\n   ```python\n   def run():\n       return 1\n   ```", RUN),
        (f"```python\n# first try\n```python\n{RUN}\n```", RUN),
        ("```python\n\n\nx = 1\n\n```", "x = 1"),
        ("```python\nx = '''\n\x0c\u2028'''\n```", "x = '''\n\x0c\u2028'''"),
    ],
)
def test_blocks(final, expected):
    assert extract_program(final, truncated=False) == expected
    assert extract_program(final, truncated=True) == expected


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (f"```python\n{RUN}", RUN),
        (f"```python\n{RUN}\n", RUN),
        (f"```python\n{RUN}\n``", RUN),
        (f"```python\na = 1\n```\n```python\n{RUN}", RUN),
        ("```python", None),
        ("```py", None),
        (f"```\n{RUN}\n", RUN),
    ],
)
def test_unclosed_block_counts_only_if_the_budget_cut_it(final, expected):
    assert extract_program(final, truncated=True) == expected
    assert extract_program(final, truncated=False) == ("a = 1" if "a = 1" in final else None)


@given(
    before=st.text(alphabet="ab \n", max_size=20),
    lines=st.lists(st.text(alphabet="abc =()#'\"\\:", min_size=1), min_size=1),
    after=st.text("ab \n"),
)
def test_any_code_without_a_fence_round_trips(before, lines, after):
    code = "\n".join(lines)
    expected = code if code.strip() else None
    assert extract_program(f"{before}\n```python\n{code}\n```\n{after}", truncated=False) == expected


@given(st.text(alphabet="`~ \npython def run", max_size=80), st.booleans())
def test_any_text_is_accepted(final, truncated):
    program = extract_program(final, truncated)
    assert program is None or (program.strip() and "".join(program.split()) in "".join(final.split()))


@pytest.mark.parametrize("count", [100_000])
@pytest.mark.parametrize(
    "answer",
    ["~{}`", "`{}~", "~~~{spaces}`", "{spaces}```", "```\n{lines}x\n```", "```\n{spaces}x\n```", "```{spaces}python\nx\n```", "\r{lines}"],
)
def test_answers_take_linear_time(answer, count):
    """A quadratic search would take minutes."""
    text = answer.format(answer[0] * count, spaces=" " * count, lines="\n" * count)
    before = time.process_time()
    extract_program(text, truncated=True)
    assert time.process_time() - before < 2.0
