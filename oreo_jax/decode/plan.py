"""What a search does: its strategy, and the plan that stays fixed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.sampling import (
  ANCESTRAL,
  Sampler,
  Sampling,
  sampling_rows,
)
from oreo_jax.decode.scores import Score, by_value, needs_values
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.values import check_granularity
from oreo_jax.models import Params

_static = functools.partial(dataclasses.field, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Lookahead:
  """A tree of steps below each candidate, whose leaves judge it.

  See `lookahead.look_ahead` for the score.
  """

  depth: int  # d, steps from a beam to a leaf; 1: the candidates are leaves
  breadth: int  # k, steps that are tried behind each candidate
  prior_weight: float = 0.0  # of the log-probability of the steps

  def __post_init__(self):
    _at_least("depth", self.depth, 1)
    _at_least("breadth", self.breadth, 1)
    if not self.prior_weight >= 0:
      raise ValueError(
        f"prior_weight: expected 0 or more, got {self.prior_weight}"
      )


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How candidates are made and chosen; hashable, and static in a program.

  A question has B beams, partial answers; each proposes K steps, and of the
  B * K candidates those of highest score go on. The functions below make the
  strategies that have a name.
  """

  beams: int = 7  # B
  branches: int = 0  # K; 0: as many as beams
  max_steps: int = 20  # the search stops after as many
  max_step_tokens: int = 128  # a longer step is cut, and competes as it is
  score: Score = by_value  # what candidates are ranked by
  # A step is a whole answer: stops end no step, and there is one step.
  whole_answers: bool = False
  lookahead: Lookahead | None = None
  # Give back what was proposed in the last step as well: all whole answers.
  keep_candidates: bool = False

  def __post_init__(self):
    _at_least("beams", self.beams, 1)
    _at_least("branches", self.branches, 0)
    _at_least("max_steps", self.max_steps, 1)
    _at_least("max_step_tokens", self.max_step_tokens, 1)
    if self.keep_candidates and not self.whole_answers:
      raise ValueError(
        "keep_candidates: expected whole_answers with it, as of steps only "
        "those of the last one could be kept"
      )

  @property
  def proposals(self) -> int:
    """Returns K, steps that are proposed behind each beam."""
    return self.branches or self.beams

  @property
  def candidates(self) -> int:
    """Returns B * K, the candidates of a question."""
    return self.beams * self.proposals

  @property
  def rows(self) -> int:
    """Returns the most sequences of a question that are decoded together."""
    tree = self.lookahead
    below = 1 if tree is None else tree.breadth ** (tree.depth - 1)
    return self.candidates * below


def best_of(
  count: int, *, score: Score = by_value, keep_candidates: bool = False
) -> Strategy:
  """Returns best-of-N: one step of N whole answers, of which the best wins.

  Args:
    count: N.
    score: by the last, the least or the mean value, or another one.
    keep_candidates: give back all N answers, for votes.
  """
  return Strategy(
    beams=1,
    branches=count,
    max_steps=1,
    score=score,
    whole_answers=True,
    keep_candidates=keep_candidates,
  )


def best_of_actions(count: int, **settings: Any) -> Strategy:
  """Returns best-of-K actions: of K next steps it always takes the best.

  Args:
    count: K.
    **settings: others of `Strategy`.
  """
  return Strategy(beams=1, branches=count, **settings)


def look_ahead_search(
  depth: int, breadth: int, *, prior_weight: float = 0.0, **settings
) -> Strategy:
  """Returns the search that takes the step below which the best leaf lies.

  With depth 1 it is best-of-K actions. See `lookahead.look_ahead`.

  Args:
    depth: d, steps from the present one to a leaf.
    breadth: k, steps tried behind each node of the tree.
    prior_weight: of the log-probability of these steps.
    **settings: others of `Strategy`.
  """
  tree = Lookahead(depth, breadth, prior_weight)
  return Strategy(beams=1, branches=breadth, lookahead=tree, **settings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """What stays the same from step to step; see `make_plan`.

  Arrays are traced; the settings are static, and other ones compile anew.
  """

  policy: Params
  critic: Params | None
  stops: Stops | None
  key: jax.Array
  sampling: Sampling  # scalars: how every proposal is drawn
  config: ModelConfig = _static()
  critic_config: ModelConfig = _static()
  strategy: Strategy = _static()
  max_new_tokens: int = _static()
  eos_ids: tuple[int, ...] = _static()
  granularity: str = _static()
  # Layers that the critic does not have: it starts from what the policy's say.
  # `critic_config` is of the others.
  shared_layers: int = _static(default=0)

  @property
  def step_tokens(self) -> int:
    """Returns M, the room for the tokens of a step."""
    if self.strategy.whole_answers:
      return self.max_new_tokens
    return min(self.strategy.max_step_tokens, self.max_new_tokens)


def make_plan(
  policy: Params,
  critic: Params | None,
  key: jax.Array,
  config: ModelConfig,
  *,
  strategy: Strategy,
  stops: Stops | None,
  eos_ids: Sequence[int],
  max_new_tokens: int,
  sampler: Sampler = ANCESTRAL,
  granularity: str = "token",
  critic_config: ModelConfig | None = None,
) -> Plan:
  """Returns the plan of a search, after a look at its settings.

  Args:
    policy: proposes steps.
    critic: a value network, `init(..., head="value")`; None if the score takes
      no values. One of `models.share_trunk(critic, policy)` goes on from what
      the policy says of a token, and runs and caches its own layers alone.
    key: a `jax.random.key`.
    config: architecture of the policy.
    strategy: how candidates are made and chosen.
    stops: where a step ends, of `make_stops`; None only where steps are whole
      answers and the critic is of token level.
    eos_ids: tokens that end an answer.
    max_new_tokens: most tokens of an answer.
    sampler: how proposals are drawn.
    granularity: "token", "step" or "turn", what the critic was trained at.
    critic_config: architecture of the critic when it is another one.
  """
  check_granularity(granularity)
  if critic is None and needs_values(strategy.score):
    name = getattr(strategy.score, "__name__", repr(strategy.score))
    raise ValueError(f"critic: score={name} expects a value network, got None")
  if stops is None and (not strategy.whole_answers or granularity == "step"):
    raise ValueError(
      "stops: expected where a step ends, got None; only whole answers that a "
      "critic of token level judges do without"
    )
  critic_config, shared_layers = critic_config or config, 0
  if critic is not None and models.has_trunk(critic):
    if not models.stands_on(critic, policy):
      raise ValueError(
        "critic: expected one on the layers of this very policy, got one that "
        "shares those of other arrays; call models.share_trunk(critic, policy) "
        "with a whole critic"
      )
    layers = critic_config.num_layers
    critic, critic_config = models.layers_above(critic, critic_config)
    shared_layers = layers - critic_config.num_layers
  return Plan(
    policy=policy,
    critic=critic,
    stops=stops,
    key=key,
    sampling=jax.tree.map(np.squeeze, sampling_rows([sampler])),
    config=config,
    critic_config=critic_config,
    strategy=strategy,
    max_new_tokens=max_new_tokens,
    eos_ids=tuple(eos_ids),
    granularity=granularity,
    shared_layers=shared_layers,
  )


def _at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f"{name}: expected at least {least}, got {value}")
