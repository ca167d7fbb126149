"""Reads records from a file, a folder or the hub: (place, object) pairs.

Every reader is lazy and yields one pair a record. The place is `file:line`, or
`file:number` where a file has rows instead of lines. A line that is no JSON
object gives an error in the object's stead, so that the caller decides whether
one bad line ends the reading.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from oreo_jax.data.errors import (
  BrokenJsonError,
  EncodingError,
  TrajectoryError,
)

# A place, and the object that stands there or what is wrong with it.
Record = tuple[str, Mapping[str, Any] | TrajectoryError]

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
# First words of file names, and names of splits on the hub.
SPLIT_NAMES = {
  "train": "train",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "dev": "validation",
  "test": "test",
}


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
  """Yields the records of a file or a folder, one after the other.

  Args:
    path: a file of JSON lines, a `.parquet` or `.arrow` file, a folder of such
      files, or one that `datasets` saved and that has no splits.

  Raises:
    ValueError: there is no such file, it cannot be read at all, or the folder
      has splits.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    yield from _read_folder(path)
  elif path.is_file():
    yield from _read_file(path)
  else:
    raise ValueError(f"{path} does not exist; set --config.data.path")


def read_splits(
  path: str, subset: str | None = None
) -> dict[str, Iterator[Record]]:
  """Returns the records of a data set by the name of their split.

  Args:
    path: a `.jsonl`, `.json`, `.parquet` or `.arrow` file; a folder with a file
      or several a split (`train.jsonl`, `test-00000-of-00001.parquet`) or one
      that `datasets` saved; otherwise a name on the hub.
    subset: the configuration, for names on the hub that have several.

  Returns:
    Records by `train`, `validation`, `test` or another name that the data set
    gives its split; a data set without splits has the one name `all`.

  Raises:
    ValueError: there is no such data set, or nothing in it can be read.
  """
  local = pathlib.Path(path).expanduser()
  if local.is_dir():
    return _read_split_folder(local)
  if not local.is_file():
    if local.suffix in SUFFIXES or path.startswith((".", "/", "~")):
      raise ValueError(
        f"{path}: no such file or directory; set --config.task.options.path"
      )
    return _read_hub(path, subset)
  if local.suffix not in SUFFIXES:
    raise ValueError(
      f"{local}: expected a file that ends in {', '.join(SUFFIXES)}; set"
      " --config.task.options.path"
    )
  return {"all": _read_file(local)}


def check_object(row: Any, place: str) -> None:
  """Raises a BrokenJsonError unless the row is an object with keys."""
  if not isinstance(row, Mapping):
    raise BrokenJsonError(
      place, f"expected a JSON object, got {type(row).__name__}"
    )


def _read_file(path: pathlib.Path) -> Iterator[Record]:
  if path.suffix == ".parquet":
    return _number(path, _parquet_rows(path))
  if path.suffix == ".arrow":
    return _number(path, _arrow_rows(path))
  return _read_json_lines(path)


def _read_json_lines(path: pathlib.Path) -> Iterator[Record]:
  """Yields an object or an error for every line that is not blank."""
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      place = f"{path}:{number}"
      try:
        # Some editors begin a file with a byte order mark.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as error:
        yield place, EncodingError(place, f"invalid UTF-8 ({error.reason})")
        continue
      if not text.strip():
        continue
      try:
        row = json.loads(text)
        check_object(row, place)
      except BrokenJsonError as error:
        yield place, error
      except (ValueError, RecursionError) as error:
        yield place, BrokenJsonError(place, f"broken JSON ({error})")
      else:
        yield place, row


def _parquet_rows(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
  """Yields the rows of a Parquet file; one batch is in memory at a time."""
  import pyarrow
  import pyarrow.parquet

  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches():
        yield from batch.to_pylist()
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} is no readable Parquet file: {error}") from error


def _arrow_rows(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
  """Yields the rows of an Arrow file, whether a stream or of random access."""
  import pyarrow

  try:
    with pyarrow.memory_map(str(path)) as source:
      try:
        batches = iter(pyarrow.ipc.open_stream(source))
      except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        batches = map(reader.get_batch, range(reader.num_record_batches))
      for batch in batches:
        yield from batch.to_pylist()
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} is no readable Arrow file: {error}") from error


def _read_folder(path: pathlib.Path) -> Iterator[Record]:
  """Yields the records of all files of a folder, in the order of their names.

  A folder that `datasets` saved is read through `datasets`.
  """
  if (path / "dataset_dict.json").is_file():
    splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
    raise ValueError(
      f"{path} holds several splits; set --config.data.path to one of "
      + ", ".join(str(path / split) for split in splits)
    )
  if (path / "state.json").is_file():
    yield from _number(path, _load_saved(path))
    return
  files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
  if not files:
    raise ValueError(
      f"{path} has no {', '.join(SUFFIXES)} file; set --config.data.path"
    )
  for file in files:
    yield from _read_file(file)


def _read_split_folder(path: pathlib.Path) -> dict[str, Iterator[Record]]:
  """Returns the records of the files whose names begin with a split's."""
  if (path / "dataset_dict.json").is_file():
    return _name_splits(str(path), _load_saved(path))
  if (path / "state.json").is_file():
    return {"all": _number(path, _load_saved(path))}
  named_files = []
  for file in sorted(path.iterdir()):
    word = file.name.replace("-", ".").split(".")[0].lower()
    if file.suffix in SUFFIXES and word in SPLIT_NAMES:
      named_files.append((word, _read_file(file)))
  if not named_files:
    raise ValueError(
      f"{path}: expected files such as train.jsonl or test.parquet; set"
      " --config.task.options.path"
    )
  return _join_splits(named_files)


def _load_saved(path: pathlib.Path) -> Any:
  import datasets

  return datasets.load_from_disk(str(path))


def _read_hub(name: str, subset: str | None) -> dict[str, Iterator[Record]]:
  import datasets

  try:
    loaded = datasets.load_dataset(name, subset)
  except Exception as error:  # network, authentication, unknown name, ...
    raise ValueError(
      f"cannot load the data set {name!r} from the hub "
      f"({type(error).__name__}: {error}); give a local file or directory "
      "with --config.task.options.path"
    ) from error
  return _name_splits(name, loaded)


def _name_splits(
  name: str, loaded: Mapping[str, Iterable[Mapping[str, Any]]]
) -> dict[str, Iterator[Record]]:
  """Returns the splits of a `datasets.DatasetDict` under our names."""
  return _join_splits(
    (split, _number(f"{name}/{split}", rows)) for split, rows in loaded.items()
  )


def _join_splits(
  named: Iterable[tuple[str, Iterator[Record]]],
) -> dict[str, Iterator[Record]]:
  """Joins, in order, the records whose names mean the same split."""
  splits: dict[str, list[Iterator[Record]]] = {}
  for name, records in named:
    splits.setdefault(SPLIT_NAMES.get(name, name), []).append(records)
  return {
    split: itertools.chain.from_iterable(streams)
    for split, streams in splits.items()
  }


def _number(
  name: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]
) -> Iterator[Record]:
  """Yields the rows of a file or data set that has rows instead of lines."""
  for number, row in enumerate(rows, start=1):
    yield f"{name}:{number}", row
