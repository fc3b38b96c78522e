"""Prints the page of all settings, or writes it: `python -m discover_jax.config --write docs/settings.md`."""

import argparse
from pathlib import Path

from discover_jax.config.page import settings_page


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m discover_jax.config", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page to FILE instead of printing it")
    path = parser.parse_args().write
    if path is None:
        print(settings_page(), end="")
    else:
        path.write_text(settings_page())


if __name__ == "__main__":
    main()
