"""One training step, from a batch to the next state.

`train_step` is pure. Reading order: what is known of the whole batch, one
backward pass a micro-batch over the sum of the losses, one update a network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from oreo_jax import losses, memory
from oreo_jax.config import ConfigError
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.sharding import (
  batch_sharding,
  batch_shards,
  constrain_batch,
  micro_batches,
  replicated,
)
from oreo_jax.train.forward import forward
from oreo_jax.train.objective import Metrics
from oreo_jax.train.roles import ROLES, learning_rates, optimizers
from oreo_jax.train.setup import Setup
from oreo_jax.train.state import TrainState, state_shardings

# Axes that split rows and not weights: each index has a copy of all weights.
_COPIES = ("dcn_data", "data")

# (params, other arrays that are the same for all rows, rows) -> losses, metrics
# and gradients, summed over the rows.
Sums = Callable[[dict[str, Any], Any, Batch], Any]


def train_step(
  state: TrainState, ref: Params | None, batch: Batch, *, setup: Setup
) -> tuple[TrainState, Metrics]:
  """Does one update of every network of the stage.

  Args:
    state: the current state.
    ref: the frozen reference policy, also the base below adapters; None for
      objectives that need neither.
    batch: packed rows [B, T], B divisible by `stage.grad_accum`; for KTO a
      `KtoBatch`.
    setup: what is fixed during the stage.

  Returns:
    The next state and scalar metrics of the batch *before* the update. Losses,
    gradients and metrics are those of the whole batch, however it is divided
    into micro-batches or over devices.
  """
  objective = setup.objective
  # What sums and means over the whole batch are divided by.
  rows, totals = objective.prepare(state.params, ref, batch, setup)
  action_tokens = jnp.maximum(jnp.sum(rows.action_mask, dtype=jnp.float32), 1.0)

  def loss_of(
    params: dict[str, Any], fixed: Any, micro: Batch
  ) -> tuple[jax.Array, Metrics]:
    averages, ref, totals, action_tokens = fixed
    out = forward(params, averages, ref, micro, setup)
    loss, metrics = objective.loss(params, out, micro, totals, setup)
    if out.tokens is not None:
      entropy = jnp.sum(jnp.where(micro.action_mask, out.tokens.entropy, 0.0))
      metrics = metrics | {"policy/entropy": entropy / action_tokens}
    return loss, metrics

  gradient = jax.value_and_grad(loss_of, has_aux=True)
  accumulated = _over_micro_batches(gradient, setup.stage.grad_accum)
  fixed = (state.averages, ref, totals, action_tokens)
  (loss, metrics), grads = accumulated(state.params, fixed, rows)
  if "log_alpha" in state.params:
    grads["log_alpha"] = jax.grad(losses.alpha_loss)(
      state.params["log_alpha"], metrics["policy/kl"], setup.train.kl_target
    )
    metrics["policy/alpha"] = jnp.exp(state.params["log_alpha"])
  state, norms = _update(state, grads, setup)
  metrics = losses.summarize_metrics(metrics)
  metrics = metrics | norms | learning_rates(setup, state.step - 1)
  metrics["batch/tokens"] = jnp.sum(rows.segment_ids > 0, dtype=jnp.float32)
  metrics["batch/action_tokens"] = jnp.sum(rows.action_mask, dtype=jnp.float32)
  return state, {"loss": loss, **metrics}


def _over_micro_batches(gradient: Sums, parts: int) -> Sums:
  """Returns the same function of a batch that goes through it in parts.

  Args:
    gradient: of the summed loss.
    parts: how many micro-batches.
  """
  if parts == 1:
    return gradient

  def scan(params: dict[str, Any], fixed: Any, batch: Batch) -> Any:
    micro = micro_batches(batch, parts)

    def body(total: Any, rows: Batch) -> tuple[Any, None]:
      # Inside the scan a micro-batch would otherwise lie as the compiler likes,
      # which may be all of it on every device.
      rows = jax.tree.map(constrain_batch, rows)
      sums = gradient(params, fixed, rows)
      return jax.tree.map(jnp.add, total, sums), None

    # The scan starts from zeros, so it has to know beforehand what a
    # micro-batch gives: which metrics there are is up to the loss.
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, params, fixed, first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zero, micro)
    return total

  return _by_copy_of_weights(scan)


def _by_copy_of_weights(sums: Sums) -> Sums:
  """Has each group of devices with all weights add up what its own rows give.

  Where the rows are split over axes that weights are not split over, the
  groups' sums are added once, at the end. The partitioner would do so after
  every micro-batch, and between slices that is the slowest thing a step does.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = () if mesh.empty else tuple(a for a in _COPIES if mesh.shape[a] > 1)
  if not axes:
    return sums

  def own_rows(params: dict[str, Any], fixed: Any, batch: Batch) -> Any:
    total = sums(params, fixed, batch)
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), total)

  return jax.shard_map(
    own_rows,
    in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axes)),
    out_specs=PartitionSpec(),
    axis_names=set(axes),
    check_vma=False,
  )


def _update(
  state: TrainState, grads: dict[str, Any], setup: Setup
) -> tuple[TrainState, Metrics]:
  """Applies one optimiser a role; returns the norms of the gradients too."""
  params, opt_state, norms = {}, {}, {}
  for name, optimizer in optimizers(setup).items():
    if "moments" in setup.stage.offload:
      # One role after the other, so that moments of one alone are fetched.
      grads, _ = jax.lax.optimization_barrier((grads, params))
    old = state.params[name], state.opt_state[name]
    updates, moments = optimizer.update(grads[name], old[1], old[0])
    new = optax.apply_updates(old[0], updates), moments
    if ROLES[name].waits and setup.frozen_steps:
      # Keep the old values: a zero gradient would still let Adam's moments
      # move them.
      keep = functools.partial(jnp.where, state.step < setup.frozen_steps)
      both = jax.tree.map(keep, memory.fetch(old), memory.fetch(new))
      new = memory.put_back(both, old)
    params[name], opt_state[name] = new
    norms[f"grad_norm/{name}"] = optax.tree.norm(grads[name])
  averages = {
    name: optax.incremental_update(
      params[ROLES[name].average_of], mean, 1.0 - setup.train.ema_decay
    )
    for name, mean in state.averages.items()
  }
  return TrainState(state.step + 1, params, opt_state, averages), norms


def make_train_step(
  setup: Setup, state: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles `train_step` for a mesh.

  The state is donated: its buffers become the next state's. The reference is
  an argument of its own and never donated.

  Args:
    setup: what is fixed during the stage.
    state: the (abstract) state, for its shardings.
    mesh: the device mesh.

  Returns:
    A jitted function (state, ref, batch) -> (state, metrics). The reference
    keeps the shardings its arrays have.

  Raises:
    ConfigError: if a micro-batch does not divide over the mesh.
  """
  micro_batch = setup.stage.batch_size // setup.stage.grad_accum
  if micro_batch % batch_shards(mesh):
    size = setup.objective.group_size
    shared = f", rows of {size} answers each" if size > 1 else ""
    raise ConfigError(
      f"a micro-batch of {micro_batch} rows (batch_size / grad_accum{shared}) "
      f"does not divide over {batch_shards(mesh)} shards of the mesh: change "
      "--config.<stage>.batch_size, --config.<stage>.grad_accum or "
      "--config.mesh.*"
    )
  shardings = state_shardings(setup, state, mesh)
  rows = batch_sharding(mesh)
  return jax.jit(
    functools.partial(train_step, setup=setup),
    in_shardings=(shardings, None, rows),
    out_shardings=(shardings, replicated(mesh)),
    donate_argnums=0,
    compiler_options=_compiler_options(mesh),
  )


def _compiler_options(mesh: Mesh) -> dict[str, str] | None:
  """Returns what the compiler is told beside the program."""
  if mesh.devices.flat[0].platform != "tpu":
    return None
  # By default a product with a gathered weight of some MiB becomes a loop that
  # multiplies with one piece while the next arrives ("windowed einsum"). Each
  # turn adds to all outputs in memory, which takes longer than what it hides.
  # Without it the whole weight is gathered beside the arithmetic before.
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
