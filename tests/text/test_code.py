"""The program is the last fenced Python block of the answer that defines `run`, however it is fenced."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.text.code import entry_names, extract_program

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
        (f"```python\n{RUN}\n```\n```python\nprint(run())", RUN),
        (f"```\n{RUN}\n", RUN),
        (f"> ```python\n> {RUN.replace(chr(10), chr(10) + '> ')}", RUN),
        ("```python", None),
        ("```py", None),
    ],
)
@pytest.mark.parametrize("truncated", [True, False])
def test_unclosed_block_that_is_a_program(final, expected, truncated):
    assert extract_program(final, truncated) == expected


@pytest.mark.parametrize(
    ("final", "cut"),
    [
        ("```python\ndef run():\n    return (1 +", "def run():\n    return (1 +"),
        (
            "```python\ndef run():\n    '''\n    ```\n    x\n    ```\n    '''\n    return (1 +\n``",
            "def run():\n    '''\n    ```\n    x\n    ```\n    '''\n    return (1 +",
        ),
        ("```python\nx = 1\n", "x = 1"),
        ("```\nrun the command\n", None),
        (f"```python\na = 1\n```\n```python\n{RUN}, (", f"{RUN}, ("),
    ],
)
def test_unclosed_block_that_is_not_a_program_counts_only_if_the_budget_cut_it(final, cut):
    whole = extract_program(final, truncated=False)
    assert whole == ("a = 1" if "a = 1" in final else None)
    assert extract_program(final, truncated=True) == cut


@pytest.mark.parametrize(
    "example",
    [
        "```python\nprint(run().head())\n```",
        "```python\nfrom solution import run\nsubmission = run()\n```",
        "```python\n# Done.\n```",
        "```py\n>>> run()\n```",
        "```pycon\n>>> run()\n1\n```",
        "```python\ndef test_run():\n    assert run() == 1\n```",
        "```python\nif __name__ == '__main__':\n    print(run())\n```",
        "```bash\npython solution.py\n```",
        "```\nprint(run())\n```",
        "```text\nid,label\n```",
        "```python\n```",
        "```python\nrun(\n```",
        "```python\n!python solution.py\n```",
    ],
)
@pytest.mark.parametrize("label", ["python", ""])
def test_an_example_after_the_program_does_not_replace_it(example, label):
    program = f"```{label}\n{RUN}\n```"
    for final in (f"{program}\nUse it:\n\n{example}\n", f"{program}\n{example}\n{example}", f"{example}\n{program}"):
        assert extract_program(final, truncated=False) == RUN


@pytest.mark.parametrize(
    "better", ["def run():\n    return 2", "async def run():\n    return 2", "run = max", "if True:\n    def run():\n        return 2"]
)
def test_the_last_program_counts(better):
    assert extract_program(f"```python\n{RUN}\n```\nBetter:\n```python\n{better}\n```\n```python\nrun()\n```", False) == better


@pytest.mark.parametrize(
    "later",
    [
        "def run(",
        "def run():",
        "def run():\n    ...",
        "def run():\n    pass",
        'def run():\n    """Predicts."""',
        'def run():\n    """Predicts."""\n    raise NotImplementedError("later")',
        "def run(values): ...",
        "run = None",
        "run: object",
        "class run: pass",
        ">>> def run():\n...     return 2\n>>> run()\n2",
        "from solution import run",
        "from mymod import run\nrun()",
        "import run",
    ],
)
@pytest.mark.parametrize("label", ["python", "py", "pycon", ""])
def test_a_later_block_that_is_no_whole_program_does_not_replace_one(later, label):
    assert extract_program(f"```python\n{RUN}\n```\nIn short:\n```{label}\n{later}\n```\n", truncated=False) == RUN


def test_a_placeholder_counts_where_nothing_better_exists():
    for program in ("def run(): ...", "class run: pass", "def run(:\n    pass"):
        assert extract_program(f"```python\n{program}\n```", truncated=False) == program


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("label", ["python", ""])
@pytest.mark.parametrize(
    "after",
    [
        "Thanks for reading.",
        "\nThis predicts the mean, so it is fast.\n\n- It needs no data.\n  - None at all.\n\nThanks!",
        "~~~",
        "~~~\nThat is the program.",
        "\n1. It's short.\n2. `run` has no arguments.",
        "It prints:\n```text\n1\n```\nThanks.",
        "**Done**: it is fast.",
    ],
)
def test_prose_after_an_open_block_is_not_its_program(after, label, truncated):
    assert extract_program(f"```{label}\n{RUN}\n{after}", truncated) == RUN


@pytest.mark.parametrize(
    "code", ["def helper(:\n    return 2", "x = (1 +", "import", "print(run()", "    x = = 2", "for x in 3", "x + = 2", "else:"]
)
def test_code_after_an_open_block_is_not_dropped(code):
    assert extract_program(f"```python\n{RUN}\n{code}", truncated=False) is None
    assert extract_program(f"```python\n{RUN}\n{code}", truncated=True) == f"{RUN}\n{code}"
    assert extract_program(f"```python\n{RUN}\n{code}\nThanks for reading.", truncated=False) is None


def test_carriage_returns_end_lines():
    assert extract_program(f"Here:\n```python\n{RUN}\n```\n".replace("\n", "\r"), truncated=False) == RUN


def test_programs_of_other_functions():
    answer = "```python\ndef count(values):\n    return 0\n```\n```python\ndef helper():\n    print(count([]))\n```"
    assert extract_program(answer, False, ("count",)) == "def count(values):\n    return 0"
    unlabelled = answer.replace("python", "")
    assert extract_program(unlabelled, False, ("count",)) == "def count(values):\n    return 0"
    assert extract_program(unlabelled, False) is None
    assert entry_names("`count(values)` gets an int64 array and returns a number") == ("count",)
    assert entry_names("`run()` returns `centers` and `radii`") == ("run",)
    assert entry_names("") == ("run",)
    assert entry_names("`make()` and `use(x, y)`; `make(1)` is slow") == ("make", "use")


_DOCSTRING = "\n".join(
    [
        '"""Predicts.', "", "Example:", "", "```python", "print(run())", "```", "", "Output:", "```", "1", "```", '"""',
        "import math  # see ```math```", "", "def run():",
        "    r'''", "    ```", "    x = \"`\"", "    ```", "    ~~~python", "    y", "    ~~~", "    '''",
        "    return \"```\" + '```python'",
        ]
)  # fmt: skip
_PROGRAMS = {"plain": RUN, "fences in strings": _DOCSTRING, "escapes": 'x = "\\\\"  # it\'s\nY = """\\"""\n```\n"""\n' + RUN}


@pytest.mark.parametrize("program", _PROGRAMS.values(), ids=_PROGRAMS)
@pytest.mark.parametrize(
    "answer",
    [
        "```python\n{}\n```",
        "```python\n{}\n```\nIt prints:\n```\n0.8\n```\n",
        "```python\n{}```",
        "```python\n{} ```\nDone.",
        "```python\n{}",
        "```python\n{}\n```Done.",
        "```python\n{}\n``` This predicts the mean.\n\n```text\n1\n```",
        "```python\n{}\n```text\n1\n```",
        "```python\n{}\n```python\nrun()\n```",
        "```python\n{}\n\n```python\n# usage\n```",
        "```python\n{}# end```",
        "Code: ```python\n{}\n```",
        "I use a ```python block:\n```python\n{}\n```",
        "```text\nplan\n```python\n{}\n```",
        "```\n{}\n```",
        "```\n{}```",
        "````markdown\n```\n````\n```python\n{}\n```",
        "```markdown\n# Answer\n```python\n{}\n```\n```",
        "````markdown\n# Answer\n```python\n{}\n```\n````\nDone.",
        "~~~~\n```python\n{}\n```\n~~~~\n```python\nrun()\n```",
        "```code\n{}\n```",
        "```{{.python .numberLines}}\n{}\n```",
        "\t```python\n\t{}\n\t```",
    ],
)
def test_fences_within_a_program_and_glued_to_it(program, answer):
    if answer.startswith("\t"):
        program = program.replace("\n", "\n\t")
    found = extract_program(answer.format(program), truncated=False)
    assert found is not None
    expected = program.replace("\n\t", "\n") if answer.startswith("\t") else program
    assert found.removesuffix("# end```") == expected


@pytest.mark.parametrize(
    "mark",
    ["> {}", ">{}", ">> {}", "> > {}", "- {}", "* {}", "+ {}", "1. {}", "12) {}", "   1. {}", "- - {}", "> - {}", "- > {}", "\t- {}"],
)
def test_fences_in_lists_and_quotes(mark):
    follows = "".join(sign if sign in "> \t" else " " for sign in mark.removesuffix("{}")) + "{}"
    lines = f"```python\n{RUN}\n\nx = 2 > 1\n```".split("\n")
    marked = [mark.format(lines[0]), *(follows.format(line) for line in lines[1:])]
    assert extract_program("\n".join(["Steps:", "", *marked, "", "Done."]), truncated=False) == f"{RUN}\n\nx = 2 > 1"
    assert extract_program("\n".join(["Steps:", "", *marked[:-1], "", "Done."]), truncated=False) in (f"{RUN}\n\nx = 2 > 1", None)


def test_a_quote_ends_its_block():
    answer = "> ```python\n> " + RUN.replace("\n", "\n> ") + "\n\nNo more:\n```\n1\n```"
    assert extract_program(answer, truncated=False) == RUN


@pytest.mark.parametrize(
    "label",
    [
        "python3.11",
        "python3.12.1",
        "python-3.11",
        "py3.11",
        "Python 3.11",
        "ipython",
        "ipython3",
        "pycon",
        "solution.py",
        "src/main.py",
        "a-b.PY",
        "python:solution.py",
        "python solution.py",
        "python filename=solution.py",
        "file=solution.py",
        "title: main.py",
        "python,linenos",
        "python-repl",
        "python {.line-numbers}",
        "{.python}",
        "PYTHON3",
        "py:percent",
        "/workspace/solution.py",
    ],
)
def test_labels_of_python(label):
    assert extract_program(f"```{label}\n{RUN}\n```\n```\ndef run(): other\n```", truncated=False) == RUN


@pytest.mark.parametrize(
    "label", ["ruby", "text", "bash", "json", "diff", "pyth", "cpp", "solution.pyc", "notpython", "output", "pytb", "c.python"]
)
def test_blocks_of_other_languages_count_only_if_nothing_else_is_a_program(label):
    assert extract_program(f"```python\n{RUN}\n```\n```{label}\ndef run(): other\n```", truncated=False) == RUN
    assert extract_program(f"```{label}\ndef run\n  1\nend\n```", truncated=False) is None
    assert extract_program(f"```{label}\nrun()\n```", truncated=False) is None
    assert extract_program(f"```{label}\ndef run(): other", truncated=False) in (None, "def run(): other")


def test_an_interactive_session_is_read_as_what_was_typed():
    answer = "```pycon\n>>> import math\n>>> def run():\n...     return math.pi\n...\n>>> run()\n3.14\n```"
    assert extract_program(answer, truncated=False) == "import math\ndef run():\n    return math.pi\n\nrun()"
    assert (
        extract_program("```python\n" + answer.partition("\n")[2], truncated=False)
        == "import math\ndef run():\n    return math.pi\n\nrun()"
    )


def test_an_indented_program():
    indented = "    " + RUN.replace("\n", "\n    ")
    assert extract_program(f"```python\n{indented}\n```", truncated=False) == RUN


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A program with a wrong syntax stays as its fences mark it, so that the model learns of the error.
        ("```python\ndef run(:\n    return 1\n```\n```\n1\n```", "def run(:\n    return 1"),
        ("```python\ndef run():\n    x = (\n```\nText with ``` in it.", "def run():\n    x = ("),
        (
            '```python\ndef run():\n    """\n    ```python\n    run()\n    ```\n    """\n    x = (\n```',
            'def run():\n    """\n    ```python\n    run()\n    ```\n    """\n    x = (',
        ),
        # A string that is never closed does not swallow what follows.
        (f'```python\n"""\nx\n```\n\n```python\n{RUN}\n```', RUN),
        (f'```python\nx = """\n```\n\nFixed:\n```python\n"""Docs."""\n{RUN}\n```', f'"""Docs."""\n{RUN}'),
        # Nothing becomes a program that is none.
        ("def run():\n    return 1\n```", None),
        ("Use ```run()``` to start.", None),
        ("`run()` is ```python", None),
        ("> def run(): pass", None),
        ("```\nclass A:\n    def run(self):\n        return 1\n```", None),
        ("```diff\n-def run():\n+def run():\n```", None),
        ("```\nfrom solution import run\n```", None),
        ("~~~~\n```python\nrun()\n```\n~~~~", None),
    ],
)
def test_answers_without_a_valid_program(answer, expected):
    assert extract_program(answer, truncated=False) == expected


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
    [
        "```python\ndef run(): (\n{lines}" * 5,
        "~~~x\ndef run(): (\n" * 3000,
        "```\ndef run():\n  '''\n" * 3000,
        "> " * 1000 + "```\n{lines}",
        "```py\n{lines}def run(): 1\n```\n" * 5,
        "> ```py\n" * 3000 + "{lines}",
        "```python\n# ```" * 5000 + "\ndef run(): 1",
        "~{}`",
        "`{}~",
        "~~~{spaces}`",
        "{spaces}```",
        "```\n{lines}x\n```",
        "```\n{spaces}x\n```",
        "```{spaces}python\nx\n```",
        "\r{lines}",
    ],
)
def test_answers_take_linear_time(answer, count):
    """A quadratic search would take minutes."""
    text = answer.format(answer[0] * count, spaces=" " * count, lines="\n" * count)
    before = time.process_time()
    extract_program(text, truncated=True)
    assert time.process_time() - before < 2.0
