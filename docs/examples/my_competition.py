"""Your own competition: is a tumour malignant? (scikit-learn's breast cancer table)

python -m discover_jax.main --config=configs/quickstart.py --config.task.competition=docs/examples/my_competition.py --workdir=runs/mine
"""

from pathlib import Path

from sklearn.datasets import load_breast_cancer
from sklearn.metrics import balanced_accuracy_score

from discover_jax.tasks.competition import Competition, Metric


def prepare(raw: Path | None, public: Path, private: Path) -> None:
    """Writes the four tables. `raw` is config.task.raw: None here, since the data come with scikit-learn."""
    data = load_breast_cancer(as_frame=True)
    table = data.frame.rename(columns=lambda name: name.replace(" ", "_"))
    table["malignant"] = table.pop("target") == 0
    table = table.sample(frac=1, random_state=0).reset_index(drop=True)
    table.insert(0, "id", [f"t{number:03d}" for number in range(len(table))])
    train, test = table.iloc[:250], table.iloc[250:]
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns="malignant").to_csv(public / "test.csv", index=False)
    test[["id"]].assign(malignant=False).to_csv(public / "sample_submission.csv", index=False)
    test.to_csv(private / "test.csv", index=False)


COMPETITION = Competition(
    id="tumours",
    description=(
        "Thirty numbers describe the cell nuclei in a picture of breast tissue: mean, error and worst value of radius, texture, perimeter,"
        " area, smoothness and so on. Predict `malignant`, True or False."
    ),
    id_column="id",
    target="malignant",
    metric=Metric("balanced accuracy", higher_is_better=True, function=balanced_accuracy_score),
    failure_reward=0.0,  # reward of a failed program; below the sample submission's
    prepare=prepare,
)
