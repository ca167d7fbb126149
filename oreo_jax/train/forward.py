"""What the networks of a stage say of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from oreo_jax import losses, models
from oreo_jax.config import TrainConfig
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.head import token_logprobs
from oreo_jax.train.roles import (
  BASE,
  ROLES,
  full_configs,
  full_params,
  trunk_depth,
)
from oreo_jax.train.setup import Setup

# The extra of a batch that holds the trunk's states, [B, T, D], where they are
# kept (`trunk.keep_trunk`). The space keeps it apart from extras of the data.
TRUNK = "trunk states"
# The extra that holds the log-probabilities of the reference, [B, T], with
# train.reference=stored.
REF_LOGPS = "reference logps"


class Forward(NamedTuple):
  """What the networks say of a batch; all [B, T], f32.

  Losses read the properties, which say what an objective has to declare where
  a network was not run.
  """

  tokens: losses.TokenLogprobs | None  # None where the policy is not trained
  values: jax.Array | None  # None without a value network
  target_logps: jax.Array | None  # of the averaged policy, if there is one

  @property
  def policy(self) -> losses.TokenLogprobs:
    """What the policy says."""
    return _declared(self.tokens, "policy", "trains")

  @property
  def ref_logps(self) -> jax.Array:
    """Log-probabilities under the reference."""
    return _declared(self.policy.ref_logps, "reference", "reads")

  @property
  def critic(self) -> jax.Array:
    """The values of the states before the tokens."""
    return _declared(self.values, "critic", "trains")


Output = TypeVar("Output")


def _declared(output: Output | None, role: str, field: str) -> Output:
  if output is None:
    raise ValueError(
      f"the loss reads what the {role} says, which was not run: add {role!r} "
      f"to `{field}` of its Objective"
    )
  return output


def forward(
  params: Mapping[str, Any],
  averages: Mapping[str, Params] | None,
  ref: Params | None,
  batch: Batch,
  setup: Setup,
) -> Forward:
  """Runs policy, value network, reference and average over a packed batch.

  Args:
    params: `TrainState.params`.
    averages: `TrainState.averages`; without them nothing is said of the
      averaged policy.
    ref: the frozen base, if `needs_base(setup)`.
    batch: packed rows [B, T].
    setup: the stage's fixed part.
  """
  networks = full_params({**params, **(averages or {})}, ref, setup)
  configs = full_configs(setup)

  # Below the adapted layers all networks on the frozen base are the base, so
  # these layers are run once. (Without a base `full_params` has raised.)
  depth = trunk_depth(setup)
  shared = None
  if depth and TRUNK in batch.extras:
    shared = batch.extras[TRUNK]
  elif depth and ref is not None:
    shared = run_trunk(ref, batch, setup, depth)

  def hidden(name: str, weights: Params) -> jax.Array:
    start = shared if ROLES[name].trunk(setup) == BASE else None
    return models.apply(
      weights,
      batch.tokens,
      configs[name],
      positions=batch.positions,
      segment_ids=batch.segment_ids,
      start=start,
      start_layer=depth,
    ).hidden

  def logprobs(name: str, states: jax.Array, **options: Any):
    config = configs[name]
    return token_logprobs(
      states,
      models.head_matrix(networks[name], config),
      batch.targets,
      # The losses are about actions; the head is not run for a prompt.
      mask=batch.action_mask,
      chunk_size=setup.stage.loss_chunk,
      vocab_chunk=setup.stage.loss_vocab_chunk,
      keep_logits=setup.stage.loss_keep,
      logit_scale=config.logit_scale,
      **options,
    )

  # A policy that is not trained is the reference, and its log-ratio is 0:
  # nothing of it has to be run.
  tokens = policy_hidden = None
  if "policy" in networks:
    reference: dict[str, Any] = {}
    if "reference" in configs:
      if ref is None:
        raise ValueError("ref: the objective reads a reference, got None")
      reference["ref_hidden"] = hidden("reference", ref)
      reference["ref_head"] = models.head_matrix(ref, configs["reference"])
      if setup.train.kl != "k3":
        reference["kl_direction"] = setup.train.kl
    policy_hidden = hidden("policy", networks["policy"])
    tokens = logprobs("policy", policy_hidden, **reference)
    if REF_LOGPS in batch.extras:
      tokens = tokens._replace(ref_logps=batch.extras[REF_LOGPS])

  values = None
  if "critic" in networks:
    critic = networks["critic"]
    # A head on the policy's trunk reads what the policy has computed already.
    on_policy = ROLES["critic"].trunk(setup) == "policy"
    states = policy_hidden if on_policy else None
    if states is None:
      states = hidden("critic", critic)
    values = models.values(critic, states)

  target_logps = None
  if "target" in networks:
    states = hidden("target", networks["target"])
    target_logps = logprobs("target", states).logps
  return Forward(tokens, values, target_logps)


def stored_extras(
  setup: Setup, shape: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what a stage adds to the extras of its batches, as shapes.

  Args:
    setup: the stage's fixed part.
    shape: of the batch, (B, T).
  """
  extras: dict[str, jax.ShapeDtypeStruct] = {}
  if not isinstance(setup.stage, TrainConfig):
    return extras
  if setup.objective.needs_reference and setup.stage.reference == "stored":
    extras[REF_LOGPS] = jax.ShapeDtypeStruct(shape, jnp.float32)
  if setup.stage.keep_trunk and trunk_depth(setup):
    states = (*shape, setup.model.embed_dim)
    extras[TRUNK] = jax.ShapeDtypeStruct(states, jnp.bfloat16)
  return extras


def run_trunk(
  base: Params, batch: Batch, setup: Setup, depth: int
) -> jax.Array:
  """Runs the first layers of the frozen base over a packed batch: [B, T, D]."""
  return models.trunk(
    base,
    batch.tokens,
    setup.model,
    depth=depth,
    positions=batch.positions,
    segment_ids=batch.segment_ids,
  )
