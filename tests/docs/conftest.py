"""The tests here import each other's parts by name, and the made-up run of the report's tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "report")]
