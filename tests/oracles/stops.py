"""Where steps end, by decoding every beginning of an answer."""

import itertools


def count_ends(text, delimiters):
  """Returns how many steps end in a text."""
  count, start = 0, 0
  for end in range(1, len(text) + 1):
    step = text[start:end]
    if step.strip(" \t\n\r\v\f") and any(map(step.endswith, delimiters)):
      count, start = count + 1, end
  return count


def step_ends(decode, ids, delimiters):
  """Returns a bool a token: more steps have ended with it than before it.

  Args:
    decode: from a list of token ids to the text.
    ids: of the answer.
    delimiters: strings that end a step.
  """
  counts = [
    count_ends(decode(ids[:size]), delimiters) for size in range(len(ids) + 1)
  ]
  return [after > before for before, after in itertools.pairwise(counts)]
