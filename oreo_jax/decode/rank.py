"""Choosing among whole answers: best-of-N by value, and votes."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode.batches import OnProgress, values_all
from oreo_jax.decode.continuous import generate_all
from oreo_jax.decode.generate import Generation
from oreo_jax.decode.prompts import Prompts
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.values import (
  check_granularity,
  check_reduction,
  readable_states,
  reduce_values,
)
from oreo_jax.models import Params


class BestOfN(NamedTuple):
  """What `best_of_n` returns, on the host."""

  answers: Generation  # Q * N rows, those of one question side by side
  values: np.ndarray  # f32[Q, N], what each answer is ranked by
  choice: np.ndarray  # i64[Q], the winner of each question, 0..N-1


def best_of_n(
  policy: Params,
  critic: Params,
  prompts: Prompts,
  key: jax.Array,
  config: ModelConfig,
  *,
  num_samples: int,
  eos_ids: Sequence[int],
  max_new_tokens: int,
  sampler: Sampler = ANCESTRAL,
  reduction: str = "final",
  granularity: str = "token",
  stops: Stops | None = None,
  batch_size: int = 512,
  prompt_length: int | None = None,
  critic_config: ModelConfig | None = None,
) -> BestOfN:
  """Samples N answers a question and picks the one of highest value.

  Args:
    policy: what answers are sampled from.
    critic: a value network.
    prompts: token ids of each question, ragged.
    key: a `jax.random.key`.
    config: architecture of the policy.
    num_samples: N.
    eos_ids: tokens that end an answer.
    max_new_tokens: most tokens of an answer.
    sampler: how tokens are drawn.
    reduction: "final" ranks by V of the last state, "min" and "mean" by V
      over the states of the answer.
    granularity: "token", "step" or "turn", what the critic was trained at.
    stops: where a step ends; needed at step level.
    batch_size: answers sampled together, and judged together.
    prompt_length: room for the prompt; fix it over calls to compile once.
    critic_config: architecture of the critic when it is another one.

  Returns:
    A BestOfN. Its answers and values serve the votes too.
  """
  # Before anything is sampled.
  check_reduction(reduction)
  check_granularity(granularity)
  answers = generate_all(
    policy,
    prompts,
    key,
    config,
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
    sampler=sampler,
    num_samples=num_samples,
    slots=batch_size,
  )
  values = rank_all(
    critic,
    prompts,
    answers,
    critic_config or config,
    reduction=reduction,
    granularity=granularity,
    stops=stops,
    batch_size=batch_size,
    prompt_length=prompt_length,
  )
  return BestOfN(answers, values, np.argmax(values, axis=1))


def rank_all(
  critic: Params,
  prompts: Prompts,
  answers: Generation,
  config: ModelConfig,
  *,
  reduction: str = "final",
  granularity: str = "token",
  stops: Stops | None = None,
  batch_size: int = 512,
  prompt_length: int | None = None,
  on_progress: OnProgress = lambda count: None,
) -> np.ndarray:
  """Judges answers that were sampled before, in batches.

  The first n columns serve best-of-n of every n up to N.

  Args:
    critic: a value network.
    prompts: token ids of Q questions.
    answers: N of each question, question-major.
    config: architecture of the critic.
    reduction: as in `best_of_n`.
    granularity: "token", "step" or "turn", what the critic was trained at.
    stops: where a step ends; needed at step level.
    batch_size: answers judged together.
    prompt_length: room for the prompt; by default each batch has its own.
    on_progress: called with the prompts done.

  Returns:
    f32[Q, N], what each answer is ranked by; the highest is the best.

  Raises:
    ValueError: for a critic of response level, which cannot judge answers.
  """
  check_reduction(reduction)
  readable = readable_states(answers, granularity=granularity, stops=stops)
  values = values_all(
    critic,
    prompts,
    answers,
    config,
    batch_size=batch_size,
    prompt_length=prompt_length,
    on_progress=on_progress,
  )
  return reduce_values(values, readable, reduction).reshape(len(prompts), -1)


def vote_weights(
  values: np.ndarray, *, reward_scale: float = 1.0, reward_offset: float = 0.0
) -> np.ndarray:
  """Turns values into the weights of votes.

  V was trained on `reward * reward_scale + reward_offset`. Undone, it is an
  expected reward, and an answer that is expected to be wrong weighs little.
  Below zero, no one is expected to be right: such a vote weighs nothing.

  Args:
    values: f32[...].
    reward_scale: of the training, `train.reward_scale`; not 0.
    reward_offset: of the training, `train.reward_offset`.

  Returns:
    f64[...], none negative.

  Example:
    >>> vote_weights([-1.0, 0.0, 0.5], reward_scale=2.0, reward_offset=-1.0)
    array([0.  , 0.5 , 0.75])
  """
  if reward_scale == 0:
    raise ValueError(
      "reward_scale: expected a number other than 0"
      " (--config.train.reward_scale)"
    )
  rewards = (np.asarray(values, np.float64) - reward_offset) / reward_scale
  return np.maximum(rewards, 0.0)


def majority_vote(
  answers: Sequence[Hashable],
  weights: Sequence[float] | np.ndarray | None = None,
  finished: Sequence[bool] | np.ndarray | None = None,
) -> int:
  """Returns the index of the first voter of the heaviest group.

  Equal answers vote together. Only finished answers that are not empty vote:
  a text that was cut off can end in anything. If there is no voter, the first
  answer that is not empty is elected, else the first of all.

  Args:
    answers: the final answers of one question; "" and None are empty.
    weights: of the votes, of `vote_weights`; equal by default, and where no
      voter has a weight above 0. Negative ones count as 0.
    finished: which answers ended by themselves; all by default.

  Example:
    >>> majority_vote(["4", "5", "4"]), majority_vote(["4", "5"], [0.1, 0.9])
    (0, 1)
    >>> majority_vote(["4", "4", "5"], finished=[False, False, True])
    2
  """
  answers = list(answers)
  count = len(answers)
  if not count:
    raise ValueError("answers: expected at least one, got none")
  given = [answer is not None and answer != "" for answer in answers]
  ended = [True] * count if finished is None else [bool(x) for x in finished]
  heavy = [1.0] * count if weights is None else [float(x) for x in weights]
  if not len(ended) == len(heavy) == count:
    raise ValueError(
      f"majority_vote: expected {count} weights and finished, one an answer,"
      f" got {len(heavy)} and {len(ended)}"
    )
  voters = [i for i in range(count) if given[i] and ended[i]]
  if not voters:
    return given.index(True) if any(given) else 0
  if not any(heavy[i] > 0 for i in voters):
    heavy = [1.0] * count
  totals: dict[Hashable, float] = collections.defaultdict(float)
  firsts: dict[Hashable, int] = {}
  for i in voters:
    totals[answers[i]] += max(heavy[i], 0.0)
    firsts.setdefault(answers[i], i)
  return firsts[max(totals, key=totals.__getitem__)]
