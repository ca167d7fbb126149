"""One reader of files, folders and the hub: places, order, splits, errors."""

import itertools
import json

import pytest

from oreo_jax.data.errors import BrokenJsonError, EncodingError
from oreo_jax.data.records import SUFFIXES, read_records, read_splits

ROWS = [{"prompt": f"say {i}", "n": i, "tags": ["a", str(i)]} for i in range(5)]


def write_lines(path, rows=ROWS):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return path


@pytest.fixture
def sources(tmp_path):
  """The same rows as every kind of file and as a folder that was saved."""
  datasets = pytest.importorskip("datasets")
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.Table.from_pylist(ROWS)
  # Two batches, so that rows are numbered across them.
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
  with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
    writer.write_table(table, max_chunksize=3)
  with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
    writer.write_table(table, max_chunksize=3)
  datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
  names = ("a.parquet", "a.arrow", "b.arrow", "saved")
  return [
    write_lines(tmp_path / "a.jsonl"),
    write_lines(tmp_path / "a.json"),
    *(tmp_path / name for name in names),
  ]


def test_every_local_source_gives_the_same_records(sources):
  for source in sources:
    expected = [(f"{source}:{i}", row) for i, row in enumerate(ROWS, start=1)]
    assert list(read_records(source)) == expected, source
    splits = read_splits(str(source))
    assert list(splits) == ["all"], source
    assert list(splits["all"]) == expected, source


def test_places_count_blank_lines_and_a_bad_line_is_an_error(tmp_path):
  path = tmp_path / "t.jsonl"
  path.write_bytes(
    b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a"\n[1]\n{"a": "\xff"}\n'
    + b"[" * 100_000
    + b'\n{"a": 2}'
  )
  records = list(read_records(path))
  assert [place for place, _ in records] == [
    f"{path}:{line}" for line in (1, 4, 5, 6, 7, 8)
  ]
  rows = [row for _, row in records]
  assert rows[0] == {"a": 1} and rows[-1] == {"a": 2}
  assert [type(row) for row in rows[1:-1]] == [
    *[BrokenJsonError, BrokenJsonError, EncodingError, BrokenJsonError]
  ]
  for place, error in records[1:-1]:
    assert error.place == place and str(error).startswith(f"{place}: ")
  assert rows[2].problem == "expected a JSON object, got list"


def test_reading_is_lazy(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  write_lines(folder / "a.jsonl")
  (folder / "b.parquet").write_bytes(b"PAR1 but not really")
  records = read_records(folder)
  assert [row for _, row in itertools.islice(records, 5)] == ROWS
  with pytest.raises(ValueError, match=r"b\.parquet is no readable Parquet"):
    next(records)


def test_a_folder_is_one_stream_or_splits(tmp_path):
  write_lines(tmp_path / "test.jsonl", ROWS[:1])
  write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[1:2])
  write_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[2:3])
  write_lines(tmp_path / "dev.jsonl", ROWS[3:4])
  write_lines(tmp_path / "other.jsonl", ROWS[4:])
  (tmp_path / "README.md").write_text("no rows")
  numbers = [row["n"] for _, row in read_records(tmp_path)]
  assert numbers == [3, 4, 0, 1, 2]  # by file name
  splits = read_splits(str(tmp_path))
  assert {name: [row["n"] for _, row in splits[name]] for name in splits} == {
    "validation": [3],
    "test": [0],
    "train": [1, 2],
  }


def test_a_saved_dataset_dict(tmp_path):
  datasets = pytest.importorskip("datasets")
  datasets.DatasetDict(
    {
      "train": datasets.Dataset.from_list(ROWS[:2]),
      "valid": datasets.Dataset.from_list(ROWS[2:3]),
      "dev": datasets.Dataset.from_list(ROWS[3:4]),
      "extra": datasets.Dataset.from_list(ROWS[4:]),
    }
  ).save_to_disk(tmp_path / "saved")
  splits = read_splits(str(tmp_path / "saved"))
  assert {name: list(splits[name]) for name in splits} == {
    "train": [
      (f"{tmp_path}/saved/train:1", ROWS[0]),
      (f"{tmp_path}/saved/train:2", ROWS[1]),
    ],
    # Two names of one split are joined.
    "validation": [
      (f"{tmp_path}/saved/valid:1", ROWS[2]),
      (f"{tmp_path}/saved/dev:1", ROWS[3]),
    ],
    "extra": [(f"{tmp_path}/saved/extra:1", ROWS[4])],
  }
  with pytest.raises(ValueError, match=r"several splits.*saved/train"):
    next(read_records(tmp_path / "saved"))
  train = list(read_records(tmp_path / "saved" / "train"))
  assert [row for _, row in train] == ROWS[:2]


def test_a_hub_name_goes_to_datasets(monkeypatch):
  datasets = pytest.importorskip("datasets")
  asked = []

  def load_dataset(name, subset):
    asked.append((name, subset))
    return datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS[:1]))

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  splits = read_splits("some/set", "main")
  assert list(splits["test"]) == [("some/set/test:1", ROWS[0])]
  assert asked == [("some/set", "main")]

  def refuse(name, subset):
    raise ConnectionError("no network")

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  with pytest.raises(ValueError, match=r"some/set.*no network.*options\.path"):
    read_splits("some/set")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_files_name_the_flag(tmp_path, suffix):
  path = tmp_path / f"none{suffix}"
  with pytest.raises(ValueError, match=r"does not exist.*config\.data\.path"):
    next(read_records(path))
  with pytest.raises(ValueError, match=r"no such file.*options\.path"):
    read_splits(str(path))


def test_unusable_sources(tmp_path):
  with pytest.raises(ValueError, match=r"has no \.jsonl.*data\.path"):
    next(read_records(tmp_path))
  with pytest.raises(ValueError, match=r"expected files such as"):
    read_splits(str(tmp_path))
  for name in ("bad.parquet", "bad.arrow"):
    (tmp_path / name).write_bytes(b"not really")
    with pytest.raises(ValueError, match=rf"{name} is no readable"):
      next(read_records(tmp_path / name))
  (tmp_path / "empty.arrow").write_bytes(b"")
  with pytest.raises(ValueError, match=r"empty\.arrow is no readable"):
    next(read_records(tmp_path / "empty.arrow"))
