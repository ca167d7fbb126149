"""Tasks: prompts, verifiers and, for the embedded ones, teachers."""

from collections.abc import Callable
from typing import Any

from oreo_jax.tasks.arithmetic import make_arithmetic
from oreo_jax.tasks.environment import AgentTask, Environment, Step
from oreo_jax.tasks.gsm8k import make_gsm8k
from oreo_jax.tasks.house import make_house
from oreo_jax.tasks.jsonl_task import make_jsonl
from oreo_jax.tasks.math_problems import make_math
from oreo_jax.tasks.maze import make_maze
from oreo_jax.tasks.reasoning_gym_task import ReasoningGymTask
from oreo_jax.tasks.task import Problem, Task

__all__ = [
  "TASKS",
  "AgentTask",
  "Environment",
  "Problem",
  "Step",
  "Task",
  "get_task",
]

# Light to import: tokenizers, data sets and graders load when first used.
TASKS: dict[str, Callable[..., Any]] = {
  "arithmetic": make_arithmetic,
  "gsm8k": make_gsm8k,
  "house": make_house,
  "jsonl": make_jsonl,
  "math": make_math,
  "maze": make_maze,
  "reasoning_gym": ReasoningGymTask,
}


def get_task(name: str, **options: Any) -> Task:
  """Builds a task by name.

  Args:
    name: a key of `TASKS`.
    **options: the task's own options, e.g. `variant="hard"` for `maze`.

  Raises:
    ValueError: for an unknown name or option.
  """
  if name not in TASKS:
    raise ValueError(
      f"unknown task {name!r}; --config.task.name is one of "
      f"{', '.join(sorted(TASKS))}"
    )
  try:
    return TASKS[name](**options)
  except TypeError as error:
    raise ValueError(f"bad options for task {name!r}: {error}") from error
