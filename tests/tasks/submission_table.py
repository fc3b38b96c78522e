"""The table of submissions that MLE-bench accepts and rejects, for a competition about sinking boats."""

import numpy as np
import pandas as pd

ROWS = 870
KEYS = [f"{n:04d}_01" for n in range(ROWS)]
TRUTH = np.array([n * 7 % 11 < 5 for n in range(ROWS)])
# Correct except in every seventh row; the score is counted by hand below.
GUESS = np.where(np.arange(ROWS) % 7 == 0, ~TRUTH, TRUTH)
GUESS_SCORE = round((ROWS - 125) / ROWS, 5)
# The rows of the answers are shuffled, as after a random split.
ORDER = np.random.RandomState(1).permutation(ROWS)
TABLE = pd.DataFrame({"key": np.array(KEYS)[ORDER], "sinks": TRUTH[ORDER]})


def submission(values=GUESS, keys=KEYS, names=("key", "sinks")):
    return pd.DataFrame({names[0]: keys, names[1]: values}).to_csv(index=False).encode()


def shuffled():
    order = np.random.RandomState(0).permutation(ROWS)
    return submission(GUESS[order], np.array(KEYS)[order])


VALID = {
    "booleans": submission(),
    "quoted": ('"key","sinks"\n' + "".join(f'"{k}","{g}"\n' for k, g in zip(KEYS, GUESS, strict=True))).encode(),
    "lower case": submission([str(g).lower() for g in GUESS]),
    "upper case": submission([str(g).upper() for g in GUESS]),
    "integers": submission(GUESS.astype(int)),
    "floats": submission(GUESS.astype(float)),
    "shuffled": shuffled(),
    "extra columns": pd.DataFrame({"p": 0.3, "sinks": GUESS, "key": KEYS, "note": None}).to_csv().encode(),
    "windows lines and a byte order mark": b"\xef\xbb\xbf" + submission().replace(b"\n", b"\r\n"),
    "blank lines": b"\n\n" + submission().replace(b"\n", b"\n\n"),
}
INVALID = {
    "missing rows": (submission(GUESS[:-1], KEYS[:-1]), "869 rows; it must have 870"),
    "extra rows": (submission([*GUESS, True], [*KEYS, "9999_01"]), "871 rows; it must have 870"),
    "empty": (b"", "0 rows"),
    "header only": (b"key,sinks\n", "0 rows"),
    "target missing": (submission(names=("key", "Sinks")), "no column 'sinks'.*: key, Sinks"),
    "id missing": (submission(names=("id", "sinks")), "no column 'key'"),
    "duplicate id": (submission(keys=[KEYS[0], *KEYS[:-1]]), "1 repeated; 1 missing, such as '0869_01'"),
    "unknown id": (submission(keys=["x", *KEYS[1:]]), "1 unknown, such as 'x'; 1 missing, such as '0000_01'"),
    "missing id": (submission(keys=[None, *KEYS[1:]]), "column 'key'"),
    "not a number": (submission([np.nan, *GUESS[1:]]), "1 of the 870 predictions in column 'sinks' are missing"),
    "infinite": (submission([np.inf, *GUESS[1:].astype(float)]), "infinite"),
    "probabilities": (submission(GUESS * 0.8 + 0.1), "accuracy cannot be computed"),
    "yes and no": (submission(np.where(GUESS, "yes", "no")), "accuracy cannot be computed"),
    "mixed types": (submission([1, *GUESS[1:]]), "accuracy cannot be computed"),
    "undecodable": (submission().replace(b"True", b"\xff\xfe"), "not UTF-8"),
    "unterminated quote": (submission() + b'"', "not a CSV"),
    "ragged": (submission() + b"a,b,c,d\n", "not a CSV"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "zeros": (b"\0" * 1000, ""),
    "too wide": (b"," * 1_000_000 + b"\n", "1,000,001 columns; at most 1,024"),
    "too wide below the header": (b"key,sinks\n" + b"1," * 1_000_000, "columns; at most 1,024"),
    "endless field": (b'key,sinks\n"' + b"x" * 1_000_000, "not a CSV"),
}
