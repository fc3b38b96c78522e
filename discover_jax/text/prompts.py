"""Prompts: what one group of rollouts is asked, built from the task and the parent program."""


def brief_text(competition_id: str, metric: str, higher_is_better: bool, previous: tuple[str, float] | None) -> str:
    """The short user message that the apprentice was trained on; the corpus and the search must use this very function.

    Args:
      competition_id: id of the competition.
      metric: name of the metric.
      higher_is_better: its direction.
      previous: code and score (in the metric's own direction) of the parent program; None for a first attempt.
    """
    head = f"competition: {competition_id}\nmetric: {metric}, {'higher' if higher_is_better else 'lower'} is better\n"
    if previous is None:
        return head + "write run()"
    code, score = previous
    return f"{head}previous score: {score:.4f}\n```python\n{code}\n```\nimprove run()"
