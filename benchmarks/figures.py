"""Measured figures: read from and append to measurements.csv, and keep the tables in docs current.

    python benchmarks/figures.py --check    # exit code 1 if a page differs from measurements.csv
    python benchmarks/figures.py --write    # update all pages
    python benchmarks/figures.py --show=decode_120b    # print the figures whose ids start with this

Each figure is stored once, in measurements.csv. A page shows figures in two ways:

    <!-- table: NAME -->          the table NAME of tables.md, with its placeholders filled, or of predictions.py, which computes it
    <!-- end -->
    <!-- figure: ID --><!-- end -->   one figure within a sentence

A placeholder is `{ID}` in tables.md and `ID` in a page. `ID:FORMAT` adds a Python format, `A/B` is the ratio of two figures and `A-B` their
difference. Without a format, a fraction is shown as a percentage, and any other number as stored, with thousands separators. Text between
the markers is overwritten.
"""

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import os
import re
import shlex
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

HERE = Path(__file__).parent
CSV, TEMPLATES = HERE / "measurements.csv", HERE / "tables.md"
PAGES = [HERE.parent / "README.md", HERE.parent / "BUILD_NOTES.md", *sorted((HERE.parent / "docs").glob("*.md"))]
PACKAGES = ("jax", "libtpu", "jax-triton", "triton", "torch", "transformers", "peft")
"""Packages whose versions are recorded if the benchmark imported them."""

_ID = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")
_EXPRESSION = re.compile(r"([a-z0-9_]+)(?:([/-])([a-z0-9_]+))?(?::(.+))?")
_PLACEHOLDER = re.compile(r"\{([^}]+)\}")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SPAN = re.compile(r"(<!-- figure: (\S+) -->).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured figure. Unknown columns are empty.

    Attributes:
      id: lower-case words joined by `_`: what was measured, the model, the sizes and the quantity.
      value: a decimal number.
      unit: such as `tokens/s`, `ms`, `GB`; `fraction` for values from 0 to 1.
      card: number and kind of the devices, such as `1 x H200`; for a CPU its cores and model.
      date: of the measurement, YYYY-MM-DD.
      versions: packages, such as `jax 0.11.2; triton 3.6.0`.
      command: the command that measured it, run in the repository's root; `published` for a figure published by others.
    """

    id: str
    value: str
    unit: str
    card: str
    date: str
    versions: str
    command: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Figure))


def read(path: Path = CSV) -> dict[str, Figure]:
    """All figures by id.

    Raises:
      ValueError: the columns differ from `COLUMNS`, an id is malformed or occurs twice, or a value is not a number.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name} must have the columns {','.join(COLUMNS)}; got {reader.fieldnames}.")
        rows = [Figure(**row) for row in reader]
    found: dict[str, Figure] = {}
    for row in rows:
        if not _ID.fullmatch(row.id):
            raise ValueError(f"{path.name}: an id has lower-case letters, digits and single underscores; got {row.id!r}.")
        if row.id in found:
            raise ValueError(f"{path.name} has the id {row.id} twice; remove one of the rows.")
        if not re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", row.value):
            raise ValueError(f"{path.name}: the value of {row.id} must be a decimal number; got {row.value!r}.")
        found[row.id] = row
    return found


def append(id: str, value: float, unit: str, command: str = "", *, devices: int = 1, path: Path = CSV) -> Figure:
    """Records a figure measured on this machine. Replaces a row with the same id; git keeps the old one.

    Args:
      id: see `Figure`.
      value: rounded to five digits.
      unit: see `Figure`.
      command: the command that measured it; by default this process's command line.
      devices: number of accelerators in use.
      path: the file.
    """
    text = f"{value}" if isinstance(value, int) else f"{Decimal(f'{value:.5g}'):f}"
    figure = Figure(
        id, text, unit, _card(devices), datetime.datetime.now(datetime.UTC).date().isoformat(), _versions(), command or _command()
    )
    rows = {**read(path), id: figure}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in rows.values())
    return figure


def add_record(parser: argparse.ArgumentParser) -> None:
    """Adds --record, which `record` reads."""
    parser.add_argument("--record", default="", metavar="PREFIX", help="append the results to measurements.csv, with ids PREFIX_...")


def record(prefix: str, values: Mapping[str, tuple[float, str]], *, devices: int = 1) -> None:
    """Appends (value, unit) pairs, keyed by the rest of the id. Does nothing if the prefix is empty."""
    for name, (value, unit) in values.items() if prefix else ():
        append(f"{prefix}_{name}", value, unit, devices=devices)


def _card(devices: int) -> str:
    kind = ""
    if "jax" in sys.modules:
        import jax

        kind = "" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    elif "torch" in sys.modules:
        import torch

        kind = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if kind:
        return f"{devices} x {kind.removeprefix('NVIDIA ')}"
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'an unknown CPU'}"


def _versions() -> str:
    imported = [name for name in PACKAGES if name.replace("-", "_") in sys.modules]
    return "; ".join(f"{name} {importlib.metadata.version(name)}" for name in imported)


def _command() -> str:
    script, *rest = sys.argv
    rest = [argument for argument in rest if not argument.startswith(("--record", "--json"))]
    return shlex.join(["python", os.path.relpath(script, HERE.parent), *rest])


# ---------------------------------------------------------------------- pages


def shown(expression: str, figures: Mapping[str, Figure]) -> str:
    """The text of a placeholder.

    Raises:
      ValueError: the expression is malformed, or names a figure that does not exist.
    """
    match = _EXPRESSION.fullmatch(expression)
    names = [name for name in (match[1], match[3]) if name] if match else []
    if not match or (missing := [name for name in names if name not in figures]):
        raise ValueError(f"The placeholder {expression!r} " + (f"names {missing}, not in {CSV.name}." if match else "is malformed."))
    first, *rest = (figures[name] for name in names)
    if not rest:
        value, plain = Decimal(first.value), ".0%" if first.unit == "fraction" else ","
    else:
        other = Decimal(rest[0].value)
        value, plain = (Decimal(first.value) / other, ".2f") if match[2] == "/" else (Decimal(first.value) - other, ",")
    return format(value, match[4] or plain)


def templates() -> dict[str, str]:
    """The tables of tables.md by name."""
    parts = re.split(r"^## (\w+)\n", TEMPLATES.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def filled(page: str, figures: Mapping[str, Figure]) -> str:
    """The page with current tables and figures.

    Raises:
      ValueError: a marker names a table or a figure that does not exist.
    """
    known = templates()

    def table(match: re.Match[str]) -> str:
        if match[2] in known:
            text = _PLACEHOLDER.sub(lambda placeholder: shown(placeholder[1], figures), known[match[2]])
        else:
            import predictions  # which reads figures from here

            if match[2] not in predictions.TABLES:
                raise ValueError(f"There is no table {match[2]!r}; there are {sorted([*known, *predictions.TABLES])}.")
            text = predictions.TABLES[match[2]]()
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return _SPAN.sub(lambda match: f"{match[1]}{shown(match[2], figures)}{match[3]}", _TABLE.sub(table, page))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit code 1 if a page is not current")
    parser.add_argument("--write", action="store_true", help="update all pages")
    parser.add_argument("--show", metavar="PREFIX", help="print the figures whose ids start with this")
    arguments = parser.parse_args()
    if not (arguments.check or arguments.write or arguments.show is not None):
        parser.error("give --check, --write or --show")
    figures = read()
    if arguments.show is not None:
        for figure in figures.values():
            if figure.id.startswith(arguments.show):
                print(f"{figure.id} = {figure.value} {figure.unit} ({figure.card}, {figure.date}, {figure.versions}) {figure.command}")
    stale = {page: text for page in PAGES if (text := filled(page.read_text(), figures)) != page.read_text()}
    for page, text in stale.items():
        if arguments.write:
            page.write_text(text)
        print(
            f"{page.relative_to(HERE.parent)}: "
            + ("written" if arguments.write else "not current; run python benchmarks/figures.py --write")
        )
    return 1 if arguments.check and not arguments.write and stale else 0


if __name__ == "__main__":
    sys.exit(main())
