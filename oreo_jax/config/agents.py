"""Settings of tasks that are played in an environment, turn by turn."""

import dataclasses

from oreo_jax.settings import Section, positive


@dataclasses.dataclass(unsafe_hash=True)
class AgentConfig(Section):
  """Playing episodes: how long they may be, and where environments run."""

  max_turns: int = 0  # actions of an episode; 0: as many as the task allows
  max_action_tokens: int = positive(32)  # a longer action is cut and played so
  # Tokens of the first observation; an episode with more of them is not played.
  max_prompt_tokens: int = positive(128)
  max_tokens: int = positive(512)  # of an episode behind its first observation
  # Processes that environments run in; 0: in this one. An engine that holds one
  # game a process needs as many as episodes are played at a time.
  workers: int = 0
  timeout_s: float = positive(60.0)  # that a worker may take for one action
