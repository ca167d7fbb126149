"""`oreo generate`: a look at what a policy answers, from the shell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from oreo_jax import decode, models
from oreo_jax.config import Config, ConfigError, GenerateConfig, ModelConfig
from oreo_jax.decode.layout import Layout
from oreo_jax.models import Params
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace


def run(workspace: Workspace, say: Say) -> None:
  """Answers one prompt, and shows a lone sample while it grows."""
  settings = workspace.config.generate
  prompt: decode.Prompt = settings.prompt
  if not prompt:
    raise ConfigError("--prompt=TEXT is needed (--config.generate.prompt)")
  if workspace.config.data.chat:
    prompt = [{"role": "user", "content": settings.prompt}]
  layout = workspace.layout("lm", "value")
  with jax.set_mesh(layout.mesh):
    engine = _engine(workspace, layout)
    delimiters = decode.DELIMITERS[workspace.config.data.delimiters]
    STRATEGIES[settings.strategy](engine, prompt, settings, delimiters, say)


def _engine(workspace: Workspace, layout: Layout) -> decode.Engine:
  """Returns the checkpoint's models, or those that training left here."""
  config = workspace.config
  objective = config.train.objective
  trained = workspace.record_path(objective).exists() and not config.init
  roles = workspace.roles(objective) if trained else []
  policy, model = (
    workspace.load_model(objective, "policy")
    if "policy" in roles
    else (workspace.start_policy(), config.model)
  )
  layout = layout.of(model)
  policy = layout.place(policy)
  critic, critic_model = _critic(workspace, objective, roles)
  if critic is not None and critic_model is not None:
    critic_layout = layout.of(critic_model)
    critic_model = critic_layout.model
    same = critic_model == layout.model
    critic = critic_layout.place(critic, beside=policy if same else None)
  return decode.Engine(
    policy,
    layout.model,
    workspace.tokenizer,
    critic=critic,
    critic_config=critic_model,
    eos_ids=workspace.codec.end_ids,
    slots=config.generate.samples,
  )


def _critic(
  workspace: Workspace, objective: str, roles: Sequence[str]
) -> tuple[Params | None, ModelConfig | None]:
  config = workspace.config
  if config.generate.value:
    return models.load_hf(
      config.generate.value,
      mesh=workspace.mesh,
      head="value",
      dtype=config.model.dtype,
      param_dtype=config.model.param_dtype,
    )
  if "critic" in roles:
    return workspace.load_model(objective, "critic")
  return None, None


# (engine, prompt, settings, delimiters of steps, say).
Strategy = Callable[
  [decode.Engine, decode.Prompt, GenerateConfig, tuple[str, ...], Say], None
]


def _sample(
  engine: decode.Engine,
  prompt: decode.Prompt,
  settings: GenerateConfig,
  unused_delimiters: tuple[str, ...],
  say: Say,
) -> None:
  """Says the samples as they end; a lone one while it grows."""
  alone = settings.samples == 1
  said = ""

  def on_text(unused_place: int, unused_sample: int, text: str) -> None:
    nonlocal said
    # The last character may be half of one whose other bytes are to come.
    if text.startswith(said) and not text.endswith("\ufffd"):
      say(text[len(said) :], end="")
      said = text

  stream = engine.stream(
    [prompt],
    n=settings.samples,
    sampler=decode.Sampler.of(settings),
    max_new_tokens=settings.max_new_tokens,
    stop=settings.stop,
    seed=settings.seed,
    on_text=on_text if alone else None,
  )
  for _, sample, completion in stream:
    if alone and completion.text.startswith(said):
      say(completion.text[len(said) :])
    else:
      say(f"--- {sample + 1}: {_how(completion)}\n{completion.text}")


def _how(completion: decode.Completion) -> str:
  count = len(completion.tokens)
  logp = float(completion.logps.sum())
  return f"{count} tokens, log-probability {logp:.1f}, {completion.reason}"


def _searched(
  make: Callable[[GenerateConfig], decode.Strategy],
) -> Strategy:
  """Returns what answers by a search."""

  def run_search(
    engine: decode.Engine,
    prompt: decode.Prompt,
    settings: GenerateConfig,
    delimiters: tuple[str, ...],
    say: Say,
  ) -> None:
    if engine.critic is None:
      raise ConfigError(
        f"--strategy={settings.strategy} is guided by a value network: name "
        "its directory with --value=DIR, or a --workdir that has one"
      )
    (best,) = engine.search(
      [prompt],
      make(settings),
      sampler=dataclasses.replace(
        decode.Sampler.of(settings), temperature=settings.search_temperature
      ),
      max_new_tokens=settings.max_new_tokens,
      delimiters=delimiters,
      seed=settings.seed,
    )
    say(best.text)
    say(f"--- {_how(best)}, score {best.score:.3f}")

  return run_search


STRATEGIES: Mapping[str, Strategy] = {
  "sample": _sample,
  "beam": _searched(lambda s: decode.Strategy(beams=s.budget)),
  "best_of_n": _searched(lambda s: decode.best_of(s.budget)),
  "best_of_k": _searched(lambda s: decode.best_of_actions(s.budget)),
  "lookahead": _searched(lambda s: decode.look_ahead_search(s.depth, s.budget)),
}


def _leaves(unused_config: Config) -> tuple[str, ...]:
  return ()


GENERATE = Stage(
  name="generate",
  summary="answers --prompt=TEXT, to look at a policy",
  run=run,
  leaves=_leaves,
)
