"""How much of packed rows is padding, by the length of a row.

    python benchmarks/padding.py FILE TOKENIZER

FILE holds trajectories (JSONL), TOKENIZER is a directory of Hugging Face. For
every row length it prints the share of slots without a token over an epoch of
the loader, the least that any way of packing could reach, and the sequences
that are too long for a row. See docs/performance.md.
"""

import argparse

import numpy as np

from oreo_jax import data


def least_rows(slots: np.ndarray, row_length: int) -> int:
  """Returns a number of rows that no packing can go below.

  Martello and Toth's bound L2: for every k, sequences longer than row_length -
  k have no partner of at least k slots, two longer than half a row never share
  one, and the other ones of at least k slots need what room those leave.

  Args:
    slots: i[N], slots each sequence takes, in [1, row_length].
    row_length: slots of a row.
  """
  least = -(-int(slots.sum()) // row_length)
  for k in range(row_length // 2 + 1):
    alone = slots > row_length - k
    large = (slots > row_length / 2) & ~alone
    small = (slots <= row_length / 2) & (slots >= k)
    room = int((row_length - slots[large]).sum())
    more = max(0, -(-(int(slots[small].sum()) - room) // row_length))
    least = max(least, int(alone.sum()) + int(large.sum()) + more)
  return least


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("file", help="trajectories, JSONL")
  parser.add_argument("tokenizer", help="directory of a tokenizer")
  parser.add_argument(
    "--row_lengths", type=int, nargs="+", default=[256, 320, 384, 512, 1024]
  )
  parser.add_argument("--batch_size", type=int, default=4)
  options = parser.parse_args()
  tokenizer = data.make_tokenizer("hf", path=options.tokenizer)
  sequences = data.tokenize_trajectories(
    data.load_trajectories(options.file), tokenizer
  )
  slots = np.array([len(sequence.tokens) - 1 for sequence in sequences])
  print(f"{len(slots)} sequences of {slots.mean():.0f} slots in the mean")
  print("row length  padding  least possible  too long")
  for row_length in options.row_lengths:
    loader = data.make_loader(
      sequences,
      batch_size=options.batch_size,
      row_length=row_length,
      on_long="skip",
    )
    fitting = slots[slots <= row_length]
    room = least_rows(fitting, row_length) * row_length
    print(
      f"{row_length:10}  {1 - loader.fill():7.1%}"
      f"  {1 - fitting.sum() / room:14.1%}"
      f"  {loader.dropped / len(slots):8.1%}"
    )


if __name__ == "__main__":
  main()
