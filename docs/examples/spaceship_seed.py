"""A plain program for Spaceship Titanic, to start from: logistic regression on numbers and categories."""

import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NUMBERS = ["Age", "RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]
CATEGORIES = ["HomePlanet", "CryoSleep", "Destination", "VIP"]


def features(table):
    numbers = table[NUMBERS].fillna(0.0)
    categories = pd.get_dummies(table[CATEGORIES].astype(str)).astype(float)
    return numbers.join(categories)


def run():
    train = pd.read_csv("data/train.csv")
    test = pd.read_csv("data/test.csv")
    x_train, x_test = features(train).align(features(test), join="left", axis=1, fill_value=0.0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(x_train, train["Transported"])
    return pd.DataFrame({"PassengerId": test["PassengerId"], "Transported": model.predict(x_test)})
