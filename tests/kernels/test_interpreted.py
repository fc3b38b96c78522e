"""The kernels of prompts, of routing and of a decoding layer in Triton's interpreter. Their own files run more cases, as slow tests."""

from triton_interpreter import needs_interpreter, results_of

ROUNDING = {"float32": 1e-5, "bfloat16": 1.2e-2}


@needs_interpreter
def test_few_cases_of_prompts_and_routing():
    errors, same, differences = results_of("interpreted_few.py")[-3:]
    assert len(errors) == 5
    for name, error in errors.items():
        assert error < ROUNDING["bfloat16" if "bfloat16" in name else "float32"], name  # false for NaN
    assert len(same) == 7
    assert all(same.values()), same
    assert len(differences) == 4
    for name, difference in differences.items():
        assert difference < 1.1e-6, name  # false for NaN
