"""Files that appear whole or not at all: the only place that renames.

A writer gets a temporary name beside the final one. The final name is taken in
one rename, after the data has reached the disk, so that a crash, a full disk or
a second process never leaves a torn file or folder under the name of a good
one. On several hosts one process writes; see `oreo_jax.hosts.is_chief`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

# Ends the temporary names; no reader of the package looks at such files.
PARTIAL = ".partial"

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def whole_file(path: PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path that takes the final name when the block ends.

  Folders above are made. If the block raises, the temporary file is removed
  and an older file of the final name stays as it was.

  Args:
    path: the final name.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + PARTIAL)
  try:
    yield partial
    _sync(partial)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that takes the final name when the block ends.

  An older folder (or file) of the final name is replaced; until the new one is
  whole it stays, and it stays for good if the block raises.

  Args:
    path: the final name.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + PARTIAL)
  remove(partial)  # left by a run that was cut off
  partial.mkdir(parents=True)
  try:
    yield partial
    for file in partial.rglob("*"):
      if file.is_file():
        _sync(file)
    # A folder that is not empty cannot be replaced in one call: the old one
    # is moved aside first, so that it is gone only once the new one is there.
    aside = path.with_name(path.name + ".replaced" + PARTIAL)
    remove(aside)
    if path.exists():
      path.rename(aside)
    partial.rename(path)
    remove(aside)
  finally:
    remove(partial)


def write_text(path: PathLike, text: str) -> None:
  """Writes a text file in UTF-8, whole or not at all."""
  with whole_file(path) as partial:
    partial.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
  """Writes plain JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    ValueError: if it is not JSON; the message names the file.
    FileNotFoundError: if it is not there.
  """
  path = pathlib.Path(path)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON ({error}): remove it and run the stage that writes "
      "it again"
    ) from error


def digest(path: PathLike) -> str:
  """Returns a hash of a file's content, or of a folder's names and contents.

  It is the identity of what a stage was made from: a file that was replaced by
  an equal one has the same digest, one byte more another.
  """
  path = pathlib.Path(path)
  total = hashlib.blake2b(digest_size=16)
  if path.is_dir():
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
      name = str(file.relative_to(path)).encode()
      total.update(len(name).to_bytes(8, "little") + name)
      total.update(digest(file).encode())
    return total.hexdigest()
  with path.open("rb") as stream:
    while block := stream.read(1 << 20):
      total.update(block)
  return total.hexdigest()


def remove(path: PathLike) -> None:
  """Removes a file or a folder with all it holds; absent ones are no error."""
  path = pathlib.Path(path)
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def set_aside(path: PathLike, reason: str) -> pathlib.Path:
  """Renames a file or folder to `<name>.<reason>`, over an older such one.

  Args:
    path: what stands in the way, and may be worth a look.
    reason: a word, such as "damaged".

  Returns:
    The new path.
  """
  path = pathlib.Path(path)
  aside = path.with_name(f"{path.name}.{reason}")
  remove(aside)
  return path.rename(aside)


def _sync(path: pathlib.Path) -> None:
  """Waits until a file's data is on disk; a rename may overtake it."""
  with path.open("rb") as stream:
    os.fsync(stream.fileno())
