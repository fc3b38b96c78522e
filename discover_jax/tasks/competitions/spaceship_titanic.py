"""spaceship-titanic: Kaggle's competition, split again as MLE-bench does, from the user's own copy of train.csv."""

from pathlib import Path

import pandas as pd

from discover_jax.tasks.competition import Competition, Threshold
from discover_jax.tasks.metrics import ACCURACY
from discover_jax.tasks.raw import read_raw
from discover_jax.tasks.tables import read_table

_DESCRIPTION = """\
The liner Spaceship Titanic hit an anomaly in spacetime on its first voyage, and about half of the people on board ended up in another
dimension. From the records that were saved, predict for each passenger whether that happened: `Transported`, True or False.

Columns:
- PassengerId: `gggg_pp`: gggg is the party with which the passenger travels, often a family, and pp the number within the party.
- HomePlanet: planet that the passenger set out from.
- CryoSleep: whether the passenger spends the voyage in suspended animation, and so stays in the cabin.
- Cabin: `deck/num/side`, where side is P (port) or S (starboard).
- Destination: planet of arrival.
- Age: in years.
- VIP: whether the passenger paid for special service.
- RoomService, FoodCourt, ShoppingMall, Spa, VRDeck: money spent at each of these places on board.
- Name: first and last name.
- Transported: the target.
Values are missing in most columns."""


def _prepare(raw: Path | None, public: Path, private: Path) -> None:
    """MLE-bench's split: a tenth of the rows, drawn at random and unstratified, becomes the test."""
    from sklearn.model_selection import train_test_split

    data = read_raw(
        raw,
        "train.csv",
        sha256="17336d553f49ebdf6ecb266d2b5d3746e5dd308445f7c7864141c4f28d2a88d0",
        contents="train.csv of Kaggle's Spaceship Titanic, 8,693 rows and 14 columns",
        origin="Download it with your own Kaggle account from https://www.kaggle.com/competitions/spaceship-titanic/data.",
    )
    train, test = map(pd.DataFrame, train_test_split(read_table(data), test_size=0.1, random_state=0))
    train.to_csv(public / "train.csv", index=False, lineterminator="\n")
    test.drop(columns="Transported").to_csv(public / "test.csv", index=False, lineterminator="\n")
    test.loc[:, ["PassengerId", "Transported"]].assign(Transported=False).to_csv(
        public / "sample_submission.csv", index=False, lineterminator="\n"
    )
    test.to_csv(private / "test.csv", index=False, lineterminator="\n")


COMPETITION = Competition(
    id="spaceship-titanic",
    description=_DESCRIPTION,
    id_column="PassengerId",
    target="Transported",
    metric=ACCURACY,
    prepare=_prepare,
    # MLE-bench's own checksums of the prepared files.
    prepared_md5={
        "public/train.csv": "564a1614ecef9d9611cec4efdce4c412",
        "public/test.csv": "8186bd4048aece25f1ed45708f8f34e1",
        "public/sample_submission.csv": "5414b5da6ebcff454de1c9ed39b73774",
        "private/test.csv": "1cb99c65efecaba968128577722a83ef",
    },
    sample_score=0.50345,
    # Section 6.2 of the report, 2,288 submissions.
    thresholds_source="from the report, not from a leaderboard on this machine",
    thresholds=(
        Threshold("Kaggle median", 0.7957),
        Threshold("Kaggle 75th percentile", 0.8027),
        Threshold("Kaggle best", 0.82815),
    ),
    thresholds_note=(
        "Kaggle scores its public leaderboard on its own 4,277 hidden rows; here the score is on the 870 rows that MLE-bench splits from"
        " the training table. So the comparison is only indicative."
    ),
)
