"""The programs of a run, made from its config alone: no weights, no data.

Everything that has a shape is an abstract array with the sharding that the
real one would have. The step is the one that `train.loop.fit` runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oreo_jax import data, models, train
from oreo_jax.aot import topology
from oreo_jax.config import Config, ModelConfig
from oreo_jax.decode.admit import empty_beams, rows_dims
from oreo_jax.decode.generate import run_batch
from oreo_jax.decode.layout import Layout, make_layout
from oreo_jax.decode.plan import Strategy, make_plan
from oreo_jax.decode.sampling import Sampler, sampling_rows
from oreo_jax.decode.search import search_round
from oreo_jax.decode.stops import Stops
from oreo_jax.sharding import (
  batch_axes,
  batch_sharding,
  replicated,
  rows_that_divide,
  shardings_of,
)
from oreo_jax.train.checkpoint import abstract_like
from oreo_jax.train.flops import step_flops
from oreo_jax.train.forward import stored_extras
from oreo_jax.train.frozen import frozen_base
from oreo_jax.train.head import position_blocks
from oreo_jax.train.roles import needs_base
from oreo_jax.train.state import init_state, state_shardings

_LEAST_ROOM = 16  # tokens of a prompt


class Program(NamedTuple):
  """A function to compile and what it is called with."""

  lower: Callable[[], Any]  # traces and lowers it: a `jax.stages.Lowered`
  arguments: Mapping[str, Any]  # trees of abstract arrays, by what they are
  model_flops: float  # what the mathematics needs, for all chips together
  tokens: int  # that one call works through
  mesh: Mesh  # that it runs on
  # How often loops run whose end depends on data, from the outermost inwards.
  loop_lengths: tuple[int, ...] = ()


def train_program(config: Config, mesh: Mesh) -> Program:
  """Makes the training step of `config.train.objective`.

  Args:
    config: with its architecture and the size of its vocabulary.
    mesh: of devices that need not exist.
  """
  objective = train.get_objective(config.train.objective)
  config = objective.fit_rows(config)
  stage = objective.stage(config)
  loader = _full_rows(config, objective)
  # How far the schedules reach changes numbers in the program, not its shape.
  setup = train.make_setup(config, objective, 1000, loader.max_segments)
  policy = _abstract_policy(config, mesh)

  def fresh(base: Any) -> train.TrainState:
    return init_state(jax.random.key(0), setup, base)

  state = jax.eval_shape(fresh, policy)
  state = abstract_like(state, state_shardings(setup, state, mesh))
  reference = frozen_base(policy, setup) if needs_base(setup) else None
  rows = batch_sharding(mesh)
  batch = objective.batch(loader, 0)
  if isinstance(batch, data.Batch):
    stored = stored_extras(setup, batch.tokens.shape)
    batch = batch._replace(extras={**batch.extras, **stored})
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
  )
  step: Any = train.make_train_step(setup, state, mesh)  # jitted
  with jax.set_mesh(mesh):
    head_blocks = position_blocks(
      stage.batch_size // stage.grad_accum,
      config.data.row_length,
      config.model.vocab_size,
      stage.loss_chunk,
    )

  def lower() -> Any:
    with jax.set_mesh(mesh):
      return step.lower(state, reference, batch)

  return Program(
    lower,
    {
      **{f"weights of {name}": tree for name, tree in state.params.items()},
      **{f"averages of {name}": t for name, t in state.averages.items()},
      "optimiser": (state.step, state.opt_state),
      "reference": reference,
      "batch": batch,
    },
    sum(step_flops(setup, stage.batch_size, config.data.row_length).values()),
    stage.batch_size * config.data.row_length,
    mesh,
    # The output head skips blocks without an action: here every token is one.
    loop_lengths=(head_blocks,),
  )


def decode_program(config: Config, mesh: Mesh) -> Program:
  """Makes the sampling of `oreo collect`: prompts are read, answers grown.

  A prompt has the room that a row of training leaves beside a whole answer,
  and every answer is as long as it may be.

  Args:
    config: with its architecture and the size of its vocabulary.
    mesh: of training; the policy is laid out to sample. Its devices need not
      exist.
  """
  settings = config.collect
  layout = _sampling_layout(config, mesh, ("lm",))
  policy, model = layout.shapes(), layout.model
  count = max(settings.batch_size // settings.samples, 1)
  batch = _prompts(config, layout.mesh, count, settings.max_new_tokens)
  prompts, room = batch[0].shape
  rows = prompts * settings.samples
  sampler = Sampler.of(settings)

  def lower() -> Any:
    with jax.set_mesh(layout.mesh):
      return run_batch.lower(
        policy,
        *batch,
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        jax.eval_shape(lambda: sampling_rows([sampler] * rows)),
        config=model,
        eos_ids=(0,),  # any will do: which token ends an answer has no shape
        max_new_tokens=settings.max_new_tokens,
      )

  tokens = prompts * settings.samples * settings.max_new_tokens
  layers, head = _weights(policy, model)
  return Program(
    lower,
    {"weights of policy": policy, "batch": batch},
    # Attention left out. The head reads the answers alone.
    2.0 * (layers * (tokens + prompts * room) + head * tokens),
    tokens,
    layout.mesh,
    loop_lengths=(settings.max_new_tokens,),
  )


def search_program(config: Config, mesh: Mesh) -> Program:
  """Makes the beam search of `oreo evaluate`, with the largest budget as B.

  The critic is a network of its own, which reads what the policy proposes.
  Prompts are as those of `decode_program`, and the search is as long as it may
  be: all its steps, which together have room for one answer.

  Args:
    config: with its architecture and the size of its vocabulary.
    mesh: of training, as for `decode_program`.
  """
  settings = config.evaluate
  layout = _sampling_layout(config, mesh, ("lm", "value"))
  policy, critic = layout.shapes(), layout.shapes("value")
  model = layout.model
  beams = max(settings.budgets)
  count = max(settings.batch_size // beams**2, 1)
  batch = _prompts(config, layout.mesh, count, settings.max_new_tokens)
  prompts, room = batch[0].shape
  key = jax.eval_shape(lambda: jax.random.key(0))
  sampler = Sampler.of(settings)
  # Automata of the delimiters that a config can name have up to 4 states.
  table: Any = jax.ShapeDtypeStruct(
    (4, model.vocab_size), jnp.int8, sharding=replicated(layout.mesh)
  )
  plan = make_plan(
    policy,
    critic,
    key,
    model,
    strategy=Strategy(
      beams=beams,
      max_steps=settings.max_steps,
      max_step_tokens=settings.max_step_tokens,
    ),
    stops=Stops(table),
    eos_ids=(0,),  # any will do, as in `decode_program`
    max_new_tokens=settings.max_new_tokens,
    sampler=sampler,
    granularity=config.train.granularity,
  )
  with jax.set_mesh(layout.mesh):
    shapes = jax.eval_shape(lambda: empty_beams(plan, prompts, room))
  axes = batch_axes(layout.mesh)
  state = jax.tree.map(
    lambda x, dim: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=NamedSharding(layout.mesh, PartitionSpec(*(None,) * dim, axes)),
    ),
    shapes,
    rows_dims(shapes),
  )

  def lower() -> Any:
    with jax.set_mesh(layout.mesh):
      return search_round.lower(
        plan, state, jax.ShapeDtypeStruct((), jnp.int32)
      )

  step_tokens = min(
    -(-settings.max_new_tokens // settings.max_steps), plan.step_tokens
  )
  tokens = prompts * beams**2 * settings.max_steps * step_tokens
  layers, head = _weights(policy, model)
  return Program(
    lower,
    {
      "weights of policy": policy,
      "weights of critic": critic,
      "slots": state,
    },
    # Both networks read all, and the policy's head what it proposes.
    2.0 * (2 * layers + head) * tokens,
    tokens,
    layout.mesh,
    loop_lengths=(settings.max_steps, step_tokens),
  )


def _sampling_layout(
  config: Config, mesh: Mesh, heads: tuple[str, ...]
) -> Layout:
  """Lays weights out as the stages do, for the memory of `config.aot`."""
  return make_layout(
    config.model,
    mesh,
    config.sampling,
    heads=heads,
    memory=topology.memory_of(config, mesh.devices.size) or math.inf,
  )


def _prompts(
  config: Config, mesh: Mesh, count: int, max_new_tokens: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Returns the tokens and lengths of a batch of prompts, as shapes.

  Like `decode.batches`, it rounds their number up to the shards of the mesh.
  """
  count = rows_that_divide(count, mesh)
  room = max(config.data.row_length - max_new_tokens, _LEAST_ROOM)
  everywhere = replicated(mesh)
  return (
    jax.ShapeDtypeStruct((count, room), jnp.int32, sharding=everywhere),
    jax.ShapeDtypeStruct((count,), jnp.int32, sharding=everywhere),
  )


def _weights(policy: Any, model: ModelConfig) -> tuple[int, int]:
  """Returns the weights of all layers, and those of the head."""
  head = model.vocab_size * model.embed_dim
  embeddings = head if model.tie_embeddings else 2 * head
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(policy))
  return total - embeddings, head


def _abstract_policy(config: Config, mesh: Mesh) -> Any:
  shapes = models.abstract_params(config.model)
  axes = models.logical_axes(config.model)
  shardings = shardings_of(axes, shapes, mesh)
  return abstract_like(shapes, shardings)


def _full_rows(config: Config, objective: train.Objective) -> data.Loader:
  """Returns a loader of one batch of made-up answers that fill their rows."""
  stage = objective.stage(config)
  length = config.data.max_length or config.data.row_length + 1
  count = stage.batch_size * objective.group_size
  answers = [
    data.Trajectory(
      turns=(
        data.Turn("user", str(index // 2)),
        data.Turn("assistant", str(index)),
      ),
      # Some objectives want a right and a wrong answer to each problem.
      reward=float(index % 2),
      problem=str(index // 2),
    )
    for index in range(2 * count)
  ]

  def tokenize(chosen: list[data.Trajectory]) -> list[data.Tokenized]:
    mask = np.arange(length) > 0
    return [
      data.Tokenized(
        np.zeros(length, np.int32),
        mask,
        mask,
        np.where(np.arange(length) == length - 1, t.reward, 0).astype("f4"),
        id=t.id,
        problem=t.problem,
      )
      for t in chosen
    ]

  return data.make_loader(
    objective.sequences(answers, tokenize, config.train),
    batch_size=stage.batch_size,
    row_length=config.data.row_length,
    seed=0,
  )


# What `config.aot.what` may be.
PROGRAMS: Mapping[str, Callable[[Config, Mesh], Program]] = {
  "train": train_program,
  "decode": decode_program,
  "search": search_program,
}
