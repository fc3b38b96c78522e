"""The experts' kernels of the update: in Triton's interpreter, they match the reference's output and derivatives for any routing."""

import pytest
from triton_interpreter import needs_interpreter, results_of


@pytest.mark.slow  # run it after changing the kernels
@needs_interpreter
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_interpreted_kernels_match_the_reference_derivatives(options):
    found = results_of("interpreted_experts_update.py", *options)[-1]
    assert len(found) == (4 if options else 2)
    for case, errors in found.items():
        assert errors.pop("unpacked") == 0.0
        assert errors.pop("unpacked gates and ups") == 0.0
        assert len(errors) == (3 if "no adapter" in case else 7)
        assert 0 < max(errors.values()) < (0.02 if case == "bfloat16" else 1e-5), (case, errors)
