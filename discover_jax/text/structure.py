"""The structure of programs: equality up to names, layout and comments, and the distance between two programs.

Programs are parsed, never run. A program that cannot be parsed, or whose tree cannot be read, is compared as text: programs are untrusted,
and no text may end the run.
"""

import ast
import collections
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator

_SKIPPED_FIELDS = ("ctx", "type_comment", "kind", "type_ignores")


def parses(code: str) -> bool:
    """Whether the program has valid syntax and Python's parser has room for it. Takes up to 5 us per character."""
    return _parse(code) is not None


def top_level_names(code: str) -> frozenset[str]:
    """The functions, classes and variables that a program defines outside of functions and classes; none if it is not valid.

    Imports do not count: `from solution import run` uses a program.
    """
    return _names(code, lambda definition: True)


def implemented_names(code: str) -> frozenset[str]:
    """Those of the functions and variables among `top_level_names` that are more than a placeholder.

    Placeholders are functions of `...`, `pass`, `raise NotImplementedError` and constants such as a docstring, and variables that are a
    constant or have no value. Classes do not count.
    """
    return _names(code, _is_implemented)


def structure_key(code: str) -> str:
    """A key that is equal for programs with the same structure.

    It ignores layout, comments, docstrings, the order of imports and keyword arguments, and the names of the program's own variables,
    functions and arguments. Constants and other names (modules, methods) count.
    """
    labels = _labels(code)
    text = (
        "\n".join(line.strip() for line in code.splitlines())
        if labels is None
        else "\n".join(f"{depth} {label}" for depth, label in labels)
    )
    return hashlib.sha256(f"{labels is None}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


def structure_parts(code: str) -> collections.Counter[str]:
    """Counts of the parts of a program's tree. A part is a node's kind, its names and constants, and the kinds of its children."""
    labels = _labels(code)
    return collections.Counter(code.split() if labels is None else (label for _, label in labels))


def structure_distance(first: collections.Counter[str], second: collections.Counter[str]) -> float:
    """The distance of two programs, from 0 (the same parts) to 1 (no common part).

    1 - 2 |A n B| / (|A| + |B|) over the multisets of `structure_parts`: Dice's dissimilarity.
    """
    total = first.total() + second.total()
    return 1.0 - 2.0 * (first & second).total() / total if total else 0.0


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about dubious escapes and comparisons in the program
            return ast.parse(code)
    except Exception:  # invalid syntax, null bytes, too deep; which exceptions there are depends on Python's version
        return None


def _names(code: str, counts: Callable[[ast.stmt], bool]) -> frozenset[str]:
    """The names of the definitions outside of functions and classes that count."""
    names: set[str] = set()
    waiting: list[ast.AST] = [*getattr(_parse(code), "body", ())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names |= {node.name} if counts(node) else set()
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name) and counts(node)}
        else:  # the statements within if, try, with and loops
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)]
    return frozenset(names)


def _is_implemented(definition: ast.stmt) -> bool:
    if isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return not all(_is_placeholder(statement) for statement in definition.body)
    return isinstance(definition, ast.Assign | ast.AnnAssign) and not isinstance(definition.value, ast.Constant | type(None))


def _is_placeholder(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def _labels(code: str) -> list[tuple[int, str]] | None:
    """(depth, label) of each node of the program's tree; None if it must be compared as text.

    A label is the node's kind, its own names and constants, and the kinds of its children.
    """
    tree = _parse(code)
    if tree is None:
        return None
    try:
        names = _own_names(tree)
        return [(depth, _label(node, children, names)) for node, depth, children in _nodes(tree)]
    except Exception:  # a tree of valid syntax that this module does not foresee, such as a constant without `repr`
        return None


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, int, list[ast.AST]]]:
    """All nodes with depth and children, parents first, in the order of `_children`. Not recursive, since programs can be deep."""
    stack: list[tuple[ast.AST, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        children = _children(node)
        yield node, depth, children
        stack += reversed([(child, depth + 1) for child in children])


def _own_names(tree: ast.Module) -> dict[str, str]:
    """New names for the program's own names, numbered in order of appearance. `run` keeps its name, which every program must use."""
    names: dict[str, str] = {}
    for node, _, _ in _nodes(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.alias) and node.asname:
            name = node.asname
        else:
            continue
        if name != "run":
            names.setdefault(name, f"_{len(names)}")
    return names


def _label(node: ast.AST, children: list[ast.AST], names: dict[str, str]) -> str:
    return " ".join([type(node).__name__, *_values(node, names), "(", *(type(child).__name__ for child in children), ")"])


def _children(node: ast.AST) -> list[ast.AST]:
    """The children of a node, without docstrings. Children whose order has no meaning are sorted."""
    children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if ast.get_docstring(node, clean=False) is not None:
            children.remove(node.body[0])
        imports = [child for child in children if isinstance(child, ast.Import | ast.ImportFrom)]
        others = [child for child in children if not isinstance(child, ast.Import | ast.ImportFrom)]
        children = [*sorted(imports, key=_imported), *others]
    elif isinstance(node, ast.ImportFrom | ast.Import):
        children = sorted(children, key=lambda child: child.name if isinstance(child, ast.alias) else "")
    elif isinstance(node, ast.Call):
        keywords = sorted((child for child in children if isinstance(child, ast.keyword)), key=lambda keyword: keyword.arg or "")
        children = [*(child for child in children if not isinstance(child, ast.keyword)), *keywords]
    return children


def _imported(node: ast.Import | ast.ImportFrom) -> tuple[str, list[str]]:
    module = f"{'.' * node.level}{node.module or ''}" if isinstance(node, ast.ImportFrom) else ""
    return module, sorted(alias.name for alias in node.names)


def _values(node: ast.AST, names: dict[str, str]) -> list[str]:
    """The names and constants of the node itself."""
    found = []
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED_FIELDS or value is None or isinstance(value, ast.AST | list):
            continue
        own = field in ("id", "name", "asname") or (field == "arg" and isinstance(node, ast.arg))
        found.append(f"{field}={names.get(value, value) if own and isinstance(value, str) else _constant(value)}")
    if isinstance(node, ast.Global | ast.Nonlocal):
        found += [names.get(name, name) for name in node.names]
    return found


def _constant(value: object) -> str:
    """Python refuses to write integers of thousands of digits in base 10."""
    if isinstance(value, int) and value.bit_length() > sys.int_info.str_digits_check_threshold:
        return hex(value)
    return repr(value)
