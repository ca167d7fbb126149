"""What an environment is: text in, text out, a turn at a time.

An environment plays one problem at a time: `reset` says what there is to see
and what is wanted, and each `step` answers one action of the policy. It never
sees a model or a token. A task whose problems are played this way is an
`AgentTask`; `environment_pool` plays many at once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self, runtime_checkable

from oreo_jax.tasks.task import Problem, Task


class Step(NamedTuple):
  """What an environment answers to an action.

  Attributes:
    observation: what the policy is told.
    reward: what this action earned.
    done: the episode is over; no further action is taken.
  """

  observation: str
  reward: float = 0.0
  done: bool = False


@runtime_checkable
class Environment(Protocol):
  """Plays one problem at a time.

  What it says must be a function of the problem and the actions since `reset`
  alone: not of the clock, a global random state, or what was played before.
  Then episodes do not depend on how many are played at once or where, and one
  whose worker process was lost is restored by playing its actions again.

  A class that names this one as its base needs `reset` and `step` only.
  """

  def reset(self, problem: Problem) -> str:
    """Begins a problem, whatever was played before.

    Returns:
      The first observation, which says what is wanted.
    """
    ...

  def step(self, action: str) -> Step:
    """Takes one action.

    Args:
      action: what the policy said, which may be any text. One that makes no
        sense here is answered by an observation such as "nothing happens",
        never by an exception.
    """
    ...

  def actions(self) -> list[str] | None:
    """Returns the actions that are possible now, None if nobody knows them."""
    return None

  def copy(self) -> Self | None:
    """Returns an independent copy in the same state, None if that cannot be.

    Whatever happens to one of the two, the other does not change. A lookahead
    tries actions on a copy.
    """
    return None

  def close(self) -> None:
    """Gives back what the environment holds, such as files and processes."""
    return None


@runtime_checkable
class AgentTask(Task, Protocol):
  """A task whose problems are played in an environment, turn by turn.

  The demonstrations of such a task are conversations: the first turn is the
  user's and holds what `Environment.reset` returned; then the assistant's
  actions and the observations on them take turns. The last is an action.

  Attributes:
    max_turns: actions an episode may have by the rules of the task.
  """

  max_turns: int

  def make_environment(self) -> Environment:
    """Makes an environment for the problems of this task.

    Worker processes get this bound method pickled, and with it the task: what
    is large should be read when it is first needed, and not be pickled.
    """
    ...
