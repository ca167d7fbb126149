"""Search over a Markov chain, in plain Python.

A policy is a table {token: [tokens that may follow, most likely first]}, a
value a table {token: V of a text that ends with it}. Nothing is drawn: the
j-th proposal of a text takes the j-th way at every fork (`oracles.turns`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from oracles import turns


class Rules(NamedTuple):
  """What a search goes by; the names are those of the library."""

  follow: dict
  value: list
  ends: Callable  # of the tokens of an answer: whether the last ends a step
  eos: int
  beams: int
  branches: int
  max_steps: int
  max_step_tokens: int
  max_new_tokens: int
  granularity: str = "token"
  rank: Callable = lambda answer: answer.value  # of an `Answer`
  whole_answers: bool = False
  depth: int = 1  # of the lookahead, `branches` wide
  prior_weight: float = 0.0


class Answer(NamedTuple):
  tokens: tuple  # of the answer, end-of-sequence included
  values: tuple  # V at all states where it may be read
  logp: float
  finished: bool

  @property
  def value(self):
    return self.values[-1]


class Result(NamedTuple):
  answer: Answer
  score: float
  proposed: int  # tokens of all proposals
  last: list  # all candidates of the last step, copies included


def judged(rules, prompt, text, logp):
  """Returns a text as an Answer; V is read anew along all of it."""
  tokens = text[len(prompt) :]
  finished = bool(tokens) and tokens[-1] == rules.eos
  values = [rules.value[prompt[-1]]]
  for place in range(1, len(tokens) + 1 - finished):
    before_eos = finished and place == len(tokens) - 1
    if rules.granularity == "token" or rules.ends(tokens[:place]) or before_eos:
      values.append(rules.value[tokens[place - 1]])
  return Answer(tokens, tuple(values), logp, finished)


def propose(rules, prompt, text, way):
  """Returns the new tokens of one proposal, and their log-probability."""
  step, logp = (), 0.0
  answer = text[len(prompt) :]
  room = rules.max_new_tokens - len(answer)
  if not rules.whole_answers:
    room = min(room, rules.max_step_tokens)
  while len(step) < room:
    ways = rules.follow[(text + step)[-1]]
    place = way % len(ways)
    step += (ways[place],)
    logp += turns.way_logp(place)
    if step[-1] == rules.eos:
      break
    if not rules.whole_answers and rules.ends(answer + step):
      break
  return step, logp


def best_leaf(rules, prompt, text, logp, prior, depth):
  """Returns the score of the best leaf at or below a text."""
  answer = judged(rules, prompt, text, logp)
  room = rules.max_new_tokens - len(answer.tokens)
  if depth == rules.depth or answer.finished or not room:
    return prior + rules.rank(answer)
  scores = []
  for way in range(rules.branches):
    step, new = propose(rules, prompt, text, way)
    scores.append(
      best_leaf(
        rules,
        prompt,
        text + step,
        logp + new,
        prior + rules.prior_weight * new,
        depth + 1,
      )
    )
  return max(scores)


def search(prompt, rules):
  """Returns the winner of a search, and what it took."""
  prompt = tuple(prompt)
  live, gone, proposed, last = [(prompt, 0.0)], [], 0, []
  copies = rules.beams  # the prompt stands in the beam B times at first
  for step_number in range(rules.max_steps):
    if not live:
      break
    candidates, last = {}, []
    for text, logp in live:
      for way in range(rules.branches):
        step, new = propose(rules, prompt, text, way)
        proposed += len(step) * copies
        grown, total = text + step, logp + new
        score = best_leaf(
          rules, prompt, grown, total, rules.prior_weight * new, 1
        )
        candidates.setdefault(grown, (grown, total, score))
        last.append(judged(rules, prompt, grown, total))
    copies = 1
    ranked = sorted(candidates.values(), key=lambda c: c[2], reverse=True)
    best = [c for c in ranked if c[2] > -math.inf][: rules.beams]
    live = []
    for text, logp, score in best:
      answer = judged(rules, prompt, text, logp)
      full = len(answer.tokens) == rules.max_new_tokens
      if answer.finished or full or step_number == rules.max_steps - 1:
        gone.append((answer, score))
      else:
        live.append((text, logp))
  if not gone:
    return Result(judged(rules, prompt, prompt, 0.0), -math.inf, proposed, last)
  answer, score = max(gone, key=lambda c: (c[0].finished, c[1]))
  return Result(answer, score, proposed, last)
