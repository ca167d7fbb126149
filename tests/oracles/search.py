"""Step beam search over a Markov chain, in plain Python.

A policy is a table {token: [tokens that may follow, most likely first]}, a
value a table {token: V of a text that ends with it}. Nothing is drawn: the
j-th proposal of a beam takes the j-th way at every fork.
"""

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


def value_of(text, *, value, eos):
  """A finished text is read before its end-of-sequence."""
  return value[text[-2] if text[-1] == eos else text[-1]]


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
):
  """Returns the winner and the number of tokens proposed.

  `ends` says of the tokens of an answer whether the last one ends a step.
  """
  live, gone, proposed = [tuple(prompt)], [], 0
  copies = beams  # the prompt stands in the beam B times at first
  for _ in range(max_steps):
    if not live:
      break
    candidates = {}
    for text in live:
      room = max_new_tokens - (len(text) - len(prompt))
      for way in range(beams):
        step = propose(
          tuple(prompt),
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
        candidates[grown] = value_of(grown, value=value, eos=eos)
    copies = 1
    best = sorted(candidates, key=candidates.get, reverse=True)[:beams]
    live = []
    for text in best:
      finished = text[-1] == eos
      full = len(text) - len(prompt) == max_new_tokens
      if finished or full:
        gone.append((text, candidates[text], finished))
      else:
        live.append(text)
  gone += [(text, value_of(text, value=value, eos=eos), False) for text in live]
  text, score, finished = max(gone, key=lambda entry: (entry[2], entry[1]))
  return Result(Answer(text[len(prompt) :], score, finished), proposed)
