"""Writes a run's report: `python -m discover_jax.report --workdir=DIR`, or `--compare A B C` for several runs on one page."""

import argparse
import sys
from pathlib import Path

from discover_jax.exceptions import DiscoverError
from discover_jax.report.page import COMPARISON, NAME, write_report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m discover_jax.report", description=(__doc__ or "").strip())
    parser.add_argument("--workdir", type=Path, help="run directory; main and search also write its report after each step")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="run directories to show on one page; without --workdir, the first is the main one",
    )
    parser.add_argument("--out", type=Path, help=f"file to write (default: DIR/{NAME}, or DIR/{COMPARISON} for a comparison)")
    arguments = parser.parse_args()
    folders = [*([arguments.workdir] if arguments.workdir else []), *arguments.compare]
    if not folders:
        parser.error("give a run directory by --workdir, or several by --compare")
    try:
        path = write_report(folders[0], folders[1:], arguments.out)
    except DiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
