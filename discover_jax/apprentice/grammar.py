"""The grammar of the apprentice's corpus: the choices of a program, and the code that each choice writes.

A program fills a fixed skeleton. Each slot of the skeleton has a table of options, each option is a template with named settings, and each
setting has a grid of values. Options and values range from bad to good, because finding the good ones is the task of the discovery loop.
Code for columns that only some competitions have is guarded, so that it does nothing in others.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to fill a slot.

    Attributes:
      template: code with `{setting}` as the placeholder for a setting's value. It may have several lines, or be empty.
      settings: allowed values of each setting, as source text.
      imports: imports that the code needs, as (module, name).
      seconds: time measured on two slow cores with 7,800 rows and the slowest values; see `programs.seconds`.
    """

    template: str
    settings: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    imports: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


def _values(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOTHING = Option("")
ALL_ROWS = Option("A, b, B = X[:n], y, X[n:]")
PLAIN = (NOTHING, ALL_ROWS)
"""Options that skip their slot's step."""

SPENDING = '["RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]'


def _guarded(column: str, code: str) -> str:
    return f'if "{column}" in X:\n    {code}'


# Added columns. A program has up to `programs.MAX_FEATURES` of them, in this order.
FEATURES: dict[str, Option] = {
    "deck": Option(_guarded("Cabin", 'X["deck"] = X["Cabin"].str[0]')),
    "side": Option(_guarded("Cabin", 'X["side"] = X["Cabin"].str[-1]')),
    "number": Option(
        _guarded("Cabin", 'X["number"] = X["Cabin"].str.split("/").str[1].astype(float) // {width}'),
        {"width": _values("1 20 50 100 300 600")},
    ),
    "size": Option(_guarded("PassengerId", 'X["size"] = X.groupby(X["PassengerId"].str[:4])["PassengerId"].transform("size")')),
    "alone": Option(_guarded("PassengerId", 'X["alone"] = ~X["PassengerId"].str[:4].duplicated(keep=False)')),
    "family": Option(_guarded("Name", 'X["family"] = X.groupby(X["Name"].str.split().str[-1])["Name"].transform("size")')),
    "total": Option(_guarded("Spa", f'X["total"] = X[{SPENDING}].sum(axis=1)')),
    "thrift": Option(_guarded("Spa", f'X["thrift"] = X[{SPENDING}].sum(axis=1) <= {{limit}}'), {"limit": _values("0 100 700 1500")}),
    "luxury": Option(_guarded("Spa", 'X["luxury"] = X["Spa"] + X["VRDeck"] + X["RoomService"]')),
    "child": Option(_guarded("Age", 'X["child"] = X["Age"] < {age}'), {"age": _values("5 12 13 18 25 40")}),
    "route": Option(_guarded("HomePlanet", 'X["route"] = X["HomePlanet"] + X["Destination"]')),
    "missing": Option('X["missing"] = X.isna().sum(axis=1)'),
    "zeros": Option('X["zeros"] = (X == 0).sum(axis=1)'),
    "mean": Option('X["mean"] = X.mean(axis=1, numeric_only=True)'),
    "spread": Option('X["spread"] = X.std(axis=1, numeric_only=True)'),
    "noise": Option('X["noise"] = np.random.RandomState({seed}).rand(len(X))', {"seed": _values("0 1 2 3 4")}),
}

_COLUMNS = _values('"HomePlanet" "CryoSleep" "Destination" "Age" "VIP" "RoomService" "FoodCourt" "ShoppingMall" "Spa" "VRDeck"')

_PREPROCESSING = "sklearn.preprocessing"


def _scaler(name: str, arguments: str = "", settings: dict[str, tuple[str, ...]] | None = None) -> Option:
    return Option(f"X = {name}({arguments}).fit_transform(X)", settings or {}, ((_PREPROCESSING, name),), 0.05)


def _category(expression: str, settings: dict[str, tuple[str, ...]] | None = None) -> Option:
    return Option(f"for c in cat:\n    X[c] = {expression}", settings or {})


# Slots in the order of the program. A program has exactly one option for each.
SLOTS: dict[str, dict[str, Option]] = {
    "drop": {
        "none": NOTHING,
        "one": Option('X = X.drop(columns=[{column}], errors="ignore")', {"column": _COLUMNS}),
        "two": Option('X = X.drop(columns=[{first}, {second}], errors="ignore")', {"first": _COLUMNS[:5], "second": _COLUMNS[5:]}),
    },
    "fill": {
        "median": Option("X[num] = X[num].fillna(X[num].median())"),
        "mean": Option("X[num] = X[num].fillna(X[num].mean())"),
        "max": Option("X[num] = X[num].fillna(X[num].max())"),
        "previous": Option("X[num] = X[num].ffill()"),
        "constant": Option("X[num] = X[num].fillna({value})", {"value": _values("-1000 -1 0 1 100")}),
        "quantile": Option("X[num] = X[num].fillna(X[num].quantile({q}))", {"q": _values("0.1 0.25 0.75 0.9")}),
    },
    "numbers": {
        "none": NOTHING,
        "log": Option("X[num] = np.log1p(X[num].clip(lower=0))"),
        "sqrt": Option("X[num] = np.sqrt(X[num].clip(lower=0))"),
        "rank": Option("X[num] = X[num].rank(pct=True)"),
        "positive": Option("X[num] = X[num] > 0"),
        "median": Option("X[num] = X[num] > X[num].median()"),
        "above": Option("X[num] = X[num] > X[num].quantile({q})", {"q": _values("0.2 0.4 0.6 0.7 0.8")}),
        "clip": Option("X[num] = X[num].clip(upper=X[num].quantile({q}), axis=1)", {"q": _values("0.5 0.7 0.8 0.9 0.95 0.99")}),
        "floor": Option("X[num] = X[num] // {width}", {"width": _values("2 3 4 5 8")}),
    },
    "encode": {
        "codes": _category('X[c].astype("category").cat.codes'),
        "factorize": _category("pd.factorize(X[c])[0]"),
        "count": _category("X[c].map(X[c].value_counts())"),
        "target": _category("X[c].map(pd.Series(y).groupby(X[c][:n]).mean())"),
        "isna": _category("X[c].isna()"),
        "onehot": Option("X = pd.get_dummies(X, columns=cat, dummy_na={missing})", {"missing": _values("True False")}),
    },
    "scale": {
        "none": NOTHING,
        "standard": _scaler("StandardScaler"),
        "minmax": _scaler("MinMaxScaler"),
        "maxabs": _scaler("MaxAbsScaler"),
        "robust": _scaler("RobustScaler", "quantile_range=({low}, 75)", {"low": _values("5 10 25 40")}),
        "quantile": _scaler(
            "QuantileTransformer",
            "n_quantiles={n}, output_distribution={shape}",
            {"n": _values("5 10 30 100 300"), "shape": _values('"uniform" "normal"')},
        ),
        "rows": _scaler("Normalizer", "norm={norm}", {"norm": _values('"l1" "l2" "max"')}),
    },
    "select": {
        "none": NOTHING,
        "percentile": Option(
            "X = SelectPercentile(percentile={p}).fit(X[:n], y).transform(X)",
            {"p": _values("40 50 60 70 80 90")},
            (("sklearn.feature_selection", "SelectPercentile"),),
            0.05,
        ),
        "pca": Option(
            "X = PCA({part}).fit_transform(X)", {"part": _values("0.7 0.8 0.9 0.95 0.99")}, (("sklearn.decomposition", "PCA"),), 0.05
        ),
        "project": Option(
            "X = GaussianRandomProjection({k}, random_state={seed}).fit_transform(X)",
            {"k": _values("8 12 16 24 32"), "seed": _values("0 1 2 3 4 5")},
            (("sklearn.random_projection", "GaussianRandomProjection"),),
        ),
        "clusters": Option(
            "X = np.hstack([X, KMeans({k}, n_init=1, random_state=0).fit_transform(X)])",
            {"k": _values("2 3 5 8 12 20")},
            (("sklearn.cluster", "KMeans"),),
            0.3,
        ),
    },
    "rows": {
        "all": ALL_ROWS,
        "every": Option("A, b, B = X[:n:{k}], y[::{k}], X[n:]", {"k": _values("2 3 4 5 6")}),
    },
    "shift": {
        "none": NOTHING,
        "class": Option("P[:, 1] += {by}", {"by": _values("-0.2 -0.15 -0.1 -0.05 -0.02 0.02 0.05 0.1 0.15 0.2")}),
    },
}

MANY = "[(str(i), m) for i, m in enumerate(models)]"
_ENSEMBLE = "sklearn.ensemble"

# How the models' predictions are combined into P, an array of probabilities [rows of test, classes].
COMBINE: dict[str, Option] = {
    "mean": Option("P = np.mean([proba(m, A, b, B) for m in models], axis=0)"),
    "product": Option("P = np.prod([proba(m, A, b, B) for m in models], axis=0)"),
    "max": Option("P = np.max([proba(m, A, b, B) for m in models], axis=0)"),
    "weights": Option(
        "P = sum(w * proba(m, A, b, B) for w, m in zip([{first}, {second}, {third}], models))",
        {name: _values("0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9") for name in ("first", "second", "third")},
    ),
    "vote": Option(f"P = proba(VotingClassifier({MANY}), A, b, B)", {}, ((_ENSEMBLE, "VotingClassifier"),)),
    "stack": Option(
        f"P = proba(StackingClassifier({MANY}, cv={{folds}}), A, b, B)", {"folds": _values("2 3")}, ((_ENSEMBLE, "StackingClassifier"),)
    ),
}


def _model(module: str, name: str, arguments: str, seconds: float, **settings: str) -> Option:
    return Option(f"{name}({arguments})", {key: _values(text) for key, text in settings.items()}, ((module, name),), seconds)


_SEED = "random_state={seed}"
_SEEDS = "0 1 2 3 4 5 6 7 8 9"
_LINEAR = "sklearn.linear_model"
_SVM = "sklearn.svm"
_BAYES = "sklearn.naive_bayes"
_NEIGHBORS = "sklearn.neighbors"
_ANALYSIS = "sklearn.discriminant_analysis"

MODELS: dict[str, Option] = {
    "logistic": _model(
        _LINEAR,
        "LogisticRegression",
        "C={c}, max_iter={steps}",
        0.4,
        c="0.001 0.01 0.03 0.1 0.3 1 3 10 100",
        steps="10 20 50 100 200",
    ),
    "ridge": _model(_LINEAR, "RidgeClassifier", "alpha={alpha}", 0.05, alpha="0.01 0.1 1 10 100 1000"),
    "sgd": _model(
        _LINEAR,
        "SGDClassifier",
        "loss={loss}, alpha={alpha}, max_iter={steps}, " + _SEED,
        0.2,
        loss='"hinge" "log_loss" "modified_huber"',
        alpha="0.00001 0.0001 0.001 0.01 0.1",
        steps="5 10 20 40",
        seed=_SEEDS,
    ),
    "linear_svm": _model(_SVM, "LinearSVC", "C={c}, max_iter={steps}, random_state=0", 0.4, c="0.001 0.01 0.1 1 10", steps="20 50 100 200"),
    "svm": _model(
        _SVM,
        "SVC",
        "C={c}, kernel={kernel}, max_iter={steps}",
        1.0,
        c="0.01 0.1 0.3 1 3 10 30",
        kernel='"rbf" "poly" "sigmoid"',
        steps="500 1000 2000 4000",
    ),
    "neighbors": _model(
        _NEIGHBORS,
        "KNeighborsClassifier",
        "{k}, weights={weights}, p={p}",
        0.5,
        k="1 2 3 5 7 9 12 15",
        weights='"uniform" "distance"',
        p="1 2",
    ),
    "centroid": _model(_NEIGHBORS, "NearestCentroid", "shrink_threshold={t}", 0.05, t="None 0.1 0.3 1 2"),
    "gaussian": _model(_BAYES, "GaussianNB", "var_smoothing={v}", 0.05, v="1e-9 1e-6 1e-3 1e-2 0.1 1"),
    "bernoulli": _model(_BAYES, "BernoulliNB", "alpha={alpha}, binarize={t}", 0.05, alpha="0.1 1 10 100", t="0 0.1 0.2 0.5 1 5"),
    "linear_analysis": _model(
        _ANALYSIS, "LinearDiscriminantAnalysis", 'solver="lsqr", shrinkage={s}', 0.1, s='"auto" 0.01 0.1 0.3 0.5 0.9'
    ),
    "tree": _model(
        "sklearn.tree",
        "DecisionTreeClassifier",
        "max_depth={depth}, min_samples_leaf={leaf}, " + _SEED,
        0.15,
        depth="2 3 4 5 6 8 10 15 None",
        leaf="1 2 5 10 20 50 100",
        seed=_SEEDS,
    ),
    "forest": _model(
        _ENSEMBLE,
        "RandomForestClassifier",
        "{n}, max_depth={depth}, min_samples_leaf={leaf}, max_features={part}, " + _SEED,
        0.9,
        n="5 10 20 30 40",
        depth="2 3 4 6 8 12 None",
        leaf="1 2 5 10 20",
        part='0.2 0.4 0.6 "sqrt"',
        seed=_SEEDS,
    ),
    "extra": _model(
        _ENSEMBLE,
        "ExtraTreesClassifier",
        "{n}, max_depth={depth}, min_samples_leaf={leaf}, " + _SEED,
        0.5,
        n="5 10 20 40 60",
        depth="3 4 6 8 12 None",
        leaf="1 2 5 10 20",
        seed=_SEEDS,
    ),
    "histogram": _model(
        _ENSEMBLE,
        "HistGradientBoostingClassifier",
        "max_iter={n}, learning_rate={rate}, max_leaf_nodes={leaves}, l2_regularization={l2}, " + _SEED,
        0.7,
        n="5 10 20 40 60 80",
        rate="0.01 0.03 0.05 0.1 0.2 0.3 0.6",
        leaves="2 4 6 8 12 16 24",
        l2="0 0.1 1 10 100",
        seed=_SEEDS,
    ),
    "boosting": _model(
        _ENSEMBLE,
        "GradientBoostingClassifier",
        "n_estimators={n}, learning_rate={rate}, max_depth={depth}, subsample={part}, max_features={width}, " + _SEED,
        1.0,
        n="5 10 20 30 50",
        rate="0.03 0.1 0.2 0.3 0.6 1.0",
        depth="2 3 4",
        part="0.3 0.5 0.8",
        width='0.3 0.5 "sqrt"',
        seed=_SEEDS,
    ),
    "adaboost": _model(
        _ENSEMBLE,
        "AdaBoostClassifier",
        "n_estimators={n}, learning_rate={rate}, " + _SEED,
        0.8,
        n="5 10 20 30",
        rate="0.1 0.3 0.5 1.0 1.5",
        seed=_SEEDS,
    ),
    "xgboost": _model(
        "xgboost",
        "XGBClassifier",
        "n_estimators={n}, max_depth={depth}, learning_rate={rate}, subsample={part}, n_jobs=2, " + _SEED,
        0.6,
        n="5 10 20 40 80",
        depth="2 3 4 5 6 8",
        rate="0.03 0.1 0.2 0.3 0.6 1.0",
        part="0.3 0.5 0.7 0.9 1.0",
        seed=_SEEDS,
    ),
    "network": _model(
        "sklearn.neural_network",
        "MLPClassifier",
        "({width},), alpha={alpha}, learning_rate_init={rate}, max_iter={steps}, " + _SEED,
        0.9,
        width="2 4 8 16 32 64",
        alpha="0.0001 0.01 0.1 1 10",
        rate="0.001 0.003 0.01 0.03",
        steps="5 10 15 20",
        seed=_SEEDS,
    ),
    "constant": _model("sklearn.dummy", "DummyClassifier", "strategy={s}", 0.0, s='"prior" "most_frequent"'),
}

# A model may be bagged. {model} in the template is the placeholder for the model's code.
BAGGED = Option(
    "BaggingClassifier({model}, {n}, max_samples={part}, random_state=0)",
    {"n": _values("2 3 4 6"), "part": _values("0.5 0.6 0.7 0.8 0.9")},
    ((_ENSEMBLE, "BaggingClassifier"),),
)
