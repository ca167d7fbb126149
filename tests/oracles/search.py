"""Step beam search over a Markov chain, in plain Python.

A policy is a table {token: [tokens that may follow, most likely first]}, a
value a table {token: V of a text that ends with it}. Nothing is drawn: the
j-th proposal of a beam takes the j-th way at every fork.
"""

import math
from typing import NamedTuple


class Answer(NamedTuple):
  tokens: tuple  # of the answer, end-of-sequence included
  value: float
  finished: bool


class Result(NamedTuple):
  answer: Answer
  proposed: int  # tokens of all proposals


def propose(prompt, text, way, *, follow, ends, eos, max_step_tokens, room):
  """Returns the new tokens of one proposal."""
  step = []
  answer = text[len(prompt) :]
  while len(step) < min(max_step_tokens, room):
    ways = follow[(text + tuple(step))[-1]]
    step.append(ways[way % len(ways)])
    if step[-1] == eos or ends(answer + tuple(step)):
      break
  return tuple(step)


def value_of(text, before, ended, *, value, eos, granularity):
  """Returns V of a text that grew by a step.

  A finished text is read before its end-of-sequence. At step level a step that
  was cut is read where it began: `before` is V there.
  """
  if text[-1] == eos:
    return value[text[-2]]
  if granularity == "step" and not ended:
    return before
  return value[text[-1]]


def rank_by_value(score, length, finished):
  del length, finished
  return score


def step_beam_search(
  prompt,
  *,
  follow,
  value,
  ends,
  eos,
  beams,
  max_steps,
  max_step_tokens,
  max_new_tokens,
  granularity="token",
  rank=rank_by_value,
):
  """Returns the winner and the number of tokens proposed.

  `ends` says of the tokens of an answer whether the last one ends a step.
  """
  prompt = tuple(prompt)
  # A beam is a text with its value.
  live, gone, proposed = [(prompt, value[prompt[-1]])], [], 0

  def key(entry):
    text, score = entry
    return rank(score, len(text) - len(prompt), text[-1] == eos)

  copies = beams  # the prompt stands in the beam B times at first
  for _ in range(max_steps):
    if not live:
      break
    candidates = {}
    for text, before in live:
      room = max_new_tokens - (len(text) - len(prompt))
      for way in range(beams):
        step = propose(
          prompt,
          text,
          way,
          follow=follow,
          ends=ends,
          eos=eos,
          max_step_tokens=max_step_tokens,
          room=room,
        )
        proposed += len(step) * copies
        grown = text + step
        candidates[grown] = value_of(
          grown,
          before,
          ends(grown[len(prompt) :]),
          value=value,
          eos=eos,
          granularity=granularity,
        )
    copies = 1
    ranked = sorted(candidates.items(), key=key, reverse=True)
    best = [entry for entry in ranked if key(entry) > -math.inf][:beams]
    live = []
    for text, score in best:
      finished = text[-1] == eos
      full = len(text) - len(prompt) == max_new_tokens
      if finished or full:
        gone.append((text, score))
      else:
        live.append((text, score))
  text, score = max(
    gone + live or [(prompt, value[prompt[-1]])],
    key=lambda entry: (entry[0][-1] == eos, key(entry)),
  )
  answer = Answer(text[len(prompt) :], score, text[-1] == eos)
  return Result(answer, proposed)
