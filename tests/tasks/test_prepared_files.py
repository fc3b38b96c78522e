"""Files that a competition's prepare() may write: tables that cannot be read, links, and rows with carriage returns."""

import stat
from pathlib import Path

import pandas as pd
import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.tables import read_text_table, write_text_table

UNREADABLE = {
    "latin-1": "'key,note\\n1,M\\xfcnchen\\n'.encode('latin-1')",
    "utf-16": "'key,note\\n1,a\\n'.encode('utf-16')",
    "utf-16 without a mark": "'key,note\\n1,a\\n'.encode('utf-16-le')",
    "empty": "b''",
    "only blank lines": "b'\\n\\n\\n'",
    "ragged": "b'key,note\\n1,2\\n1,2,3,4\\n'",
    "a preamble": "b'Exported in 2024\\n\\nkey,note,sinks\\n1,2,3\\n'",
    "trailing commas": "b'key,note\\n0,a,\\n1,b,\\n'",
    "compressed": "__import__('gzip').compress(b'key,note\\n1,2\\n')",
    "an open quote": "b'key,note\\n1,\"2\\n'",
    "zeros": "bytes(100)",
}
WRITE = "(public / {name!r}).write_bytes({data})"


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_extra_tables_are_listed_by_name(tmp_path, write_competition, kind):
    change = WRITE.format(name="extra.csv", data=UNREADABLE[kind])
    task = prepare_task(write_competition(change), raw=None, reward="holdout", folder=tmp_path / "task")
    assert [(file.name, file.rows, file.columns) for file in task.files if file.name == "extra.csv"] == [("extra.csv", None, ())]


def test_long_cells_are_read(tmp_path, write_competition):
    """Such as whole documents: the csv module refuses cells of more than 131,072 characters."""
    change = "(public / 'extra.csv').write_text('text' + 50_000 * ' and text' + '\\n1\\n')"
    task = prepare_task(write_competition(change), raw=None, reward="grade", folder=tmp_path / "task")
    assert [file.rows for file in task.files if file.name == "extra.csv"] == [1]


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["train.csv", "sample_submission.csv"])
def test_unreadable_required_tables_are_refused_with_the_reason(tmp_path, write_competition, kind, name):
    with pytest.raises(ConfigError, match=rf"(?s)boats.*public/{name}, which is not a CSV table in UTF-8: .{{8,}}docs/competitions\.md"):
        prepare_task(write_competition(WRITE.format(name=name, data=UNREADABLE[kind])), raw=None, reward="grade", folder=tmp_path / "task")
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize("fields", ["", "id_column='', target='', judge=lambda submission, answers: 0.5, judge_version='mine'"])
def test_unreadable_answers_are_refused(tmp_path, write_competition, fields):
    change = f"(private / 'test.csv').write_bytes({UNREADABLE['utf-16']})"
    with pytest.raises(ConfigError, match=r"private/test\.csv"):
        prepare_task(write_competition(change, fields), raw=None, reward="grade", folder=tmp_path / "task")


def test_table_of_another_system_is_listed_by_name(tmp_path, write_competition):
    """macOS writes such files beside those that it copies to other file systems."""
    change = WRITE.format(name="._train.csv", data="b'\\x05\\x16\\x07 Mac OS X,ATTR\\n'")
    task = prepare_task(write_competition(change), raw=None, reward="grade", folder=tmp_path / "task")
    assert ("._train.csv", None) in [(file.name, file.rows) for file in task.files]


# ---------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path):
    """Files of the user outside the task's folder, readable only by him."""
    folder = tmp_path / "originals"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a.png").write_bytes(b"a picture")
    (folder / "pictures" / "again").symlink_to(folder / "notes.txt")
    (folder / "notes.txt").write_text("notes")
    for path in (folder / "notes.txt", folder / "pictures" / "a.png"):
        path.chmod(0o600)
    return folder


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.lstat().st_mode, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("reward", ["grade", "holdout"])
def test_links_become_copies_and_originals_stay(tmp_path, write_competition, outside, reward):
    (outside / "train.csv").write_text("key,size,note,sinks\n" + "".join(f"{n:04d}_02,1,a,{n % 2 == 0}\n" for n in range(60)))
    (outside / "train.csv").chmod(0o640)
    before = state(outside)
    change = f"""
    outside = Path({str(outside)!r})
    (public / 'train.csv').unlink()
    (public / 'train.csv').symlink_to(outside / 'train.csv')
    (public / 'pictures').symlink_to(outside / 'pictures')
    (public / 'notes.txt').hardlink_to(outside / 'notes.txt')
    (public / 'again.csv').symlink_to('train.csv')
    (private / 'notes.txt').symlink_to(public / 'notes.txt')
"""
    task = prepare_task(write_competition(change), raw=None, reward=reward, folder=tmp_path / "task")
    assert state(outside) == before
    assert not any(path.is_symlink() for path in task.folder.rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in task.public_dir.rglob("*") if path.is_file()} == {0o644}
    assert (task.public_dir / "pictures" / "a.png").read_bytes() == b"a picture"
    assert (task.public_dir / "pictures" / "again").read_text() == "notes"
    assert {"pictures/a.png", "notes.txt", "again.csv"} <= {file.name for file in task.files}
    for path in (outside / "notes.txt", outside / "train.csv"):
        path.unlink()
    assert prepare_task(write_competition(change), raw=None, reward=reward, folder=tmp_path / "task") == task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("(public / 'gone.csv').symlink_to('nowhere.csv')", r"public/gone\.csv.*nowhere\.csv"),
        ("(public / 'loop').symlink_to('loop')", "public/loop"),
        ("(public / 'above').symlink_to('..')", "answers"),
        ("(public / 'self').symlink_to('.')", r"public/self.*a folder that contains it"),
        ("(public / 'answers.csv').symlink_to(private / 'test.csv')", r"public/answers\.csv.*answers"),
        ("(public / 'private').symlink_to(private)", r"public/private.*answers"),
        ("import os; os.mkfifo(public / 'pipe')", "public/pipe.*neither a file nor a folder"),
        ("import os; os.mkfifo(f := Path(raw) / 'f'); (public / 'f').symlink_to(f)", "public/f.*neither a file nor a folder"),
        ("d = Path(raw); (d / 'back').symlink_to(d); (public / 'd').symlink_to(d)", "public/d/back.*a folder that contains it"),
        ("d = Path(raw); (d / 'gone').symlink_to(d / 'x'); (public / 'd').symlink_to(d)", "public/d/gone.*nothing can be found"),
    ],
)
def test_links_that_cannot_be_copied_are_refused(tmp_path, write_competition, change, message):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ConfigError, match=message):
        prepare_task(write_competition(change), raw=tmp_path / "raw", reward="grade", folder=tmp_path / "task")
    assert not (tmp_path / "task").exists()


def test_public_may_itself_be_a_link(tmp_path, write_competition):
    """A prepare() that links its whole folder of tables."""
    change = "import shutil; shutil.move(public, Path(raw) / 'mine'); public.symlink_to(Path(raw) / 'mine')"
    (tmp_path / "raw").mkdir()
    task = prepare_task(write_competition(change), raw=tmp_path / "raw", reward="holdout", folder=tmp_path / "task")
    assert not task.public_dir.is_symlink()
    assert len(pd.read_csv(tmp_path / "raw" / "mine" / "train.csv")) == 100


# ---------------------------------------------------------------------- carriage returns


@pytest.mark.parametrize("cell", ["a\rb", "\r", "a\r", "a\r\nb", "a\nb", 'a"\rb,c', ""])
def test_tables_keep_their_cells(tmp_path, cell):
    table = pd.DataFrame({"key": ["x", cell, "y"], "note\r": [cell, "1", ""]})
    write_text_table(table, tmp_path / "table.csv")
    assert read_text_table((tmp_path / "table.csv").read_bytes()).equals(table.astype("str"))


def test_rows_without_a_carriage_return_are_written_as_before(tmp_path):
    table = pd.DataFrame({"key": ["a, b", 'say "x"', "", "line\nbreak"], "y": ["1", "2.50", "NA", ""]})
    write_text_table(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == table.to_csv(index=False, lineterminator="\n").encode()


CARRIAGE_RETURN = """
    import csv
    train['{column}'] = [f'{{text}}\\r' + str(n) for n, text in enumerate(train['{column}'])]
    test['{column}'] = [f'{{text}}\\r' + str(n) for n, text in enumerate(test['{column}'])]
    train.to_csv(public / 'train.csv', index=False, quoting=csv.QUOTE_ALL)
    test.drop(columns='sinks').to_csv(public / 'test.csv', index=False, quoting=csv.QUOTE_ALL)
    test[['key']].assign(sinks=test['sinks']).to_csv(public / 'sample_submission.csv', index=False, quoting=csv.QUOTE_ALL)
    test.to_csv(private / 'test.csv', index=False, quoting=csv.QUOTE_ALL)
"""


@pytest.mark.parametrize("reward", ["grade", "holdout"])
@pytest.mark.parametrize("column", ["key", "sinks"])
def test_carriage_returns_in_ids_and_labels_are_refused(tmp_path, write_competition, column, reward):
    with pytest.raises(ConfigError, match=rf"carriage return into column '{column}' of public/\w+\.csv"):
        prepare_task(write_competition(CARRIAGE_RETURN.format(column=column)), raw=None, reward=reward, folder=tmp_path / "task")


def test_carriage_returns_in_other_columns_survive_holding_out(tmp_path, write_competition):
    path = write_competition(CARRIAGE_RETURN.format(column="note"))
    task = prepare_task(path, raw=None, reward="holdout", holdout_folds=2, folder=tmp_path / "task")
    for shown in task.public_dirs:
        train, test = (read_text_table((shown / name).read_bytes()) for name in ("train.csv", "test.csv"))
        assert len(train) + len(test) == 140
        assert train["note"].str.contains("\r").all()
        assert test["note"].str.contains("\r").all()


def test_modes_of_linked_folders_stay(tmp_path, write_competition, outside):
    (outside / "pictures").chmod(0o700)
    change = f"(public / 'p').symlink_to({str(outside / 'pictures')!r})"
    task = prepare_task(write_competition(change), raw=None, reward="grade", folder=tmp_path / "task")
    assert stat.S_IMODE((outside / "pictures").stat().st_mode) == 0o700
    assert stat.S_IMODE((task.public_dir / "p").stat().st_mode) == 0o755
