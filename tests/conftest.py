"""What all tests share."""

import os

# Most of these tests' time is compilation of small programs that run once. The whole-run tests in test_main take XLA as users have it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
