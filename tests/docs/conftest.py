"""Puts this folder and the report tests' synthetic run on the import path."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "report")]
