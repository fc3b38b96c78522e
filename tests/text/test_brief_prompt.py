"""The brief prompt is a fixed format: the apprentice was trained on these very characters."""

from discover_jax.text.prompts import brief_text


def test_first_attempt():
    expected = "competition: spaceship-titanic\nmetric: accuracy, higher is better\nwrite run()"
    assert brief_text("spaceship-titanic", "accuracy", True, None) == expected


def test_later_attempt():
    assert brief_text("houses", "rmse", False, ("def run():\n    return 1", 0.80694)) == (
        "competition: houses\nmetric: rmse, lower is better\nprevious score: 0.8069\n"
        "```python\ndef run():\n    return 1\n```\nimprove run()"
    )
