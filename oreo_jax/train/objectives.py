"""From a batch and the models to a loss: one function an objective.

Each takes what the networks say of a (micro-)batch and the counts of the whole
batch, so that the losses of micro-batches add up to the whole batch's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax import losses, models
from oreo_jax.config import SftConfig, TrainConfig
from oreo_jax.data import construct
from oreo_jax.data.loader import Loader
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.sharding import constrain_batch, micro_batches
from oreo_jax.train.state import Setup, full_params


class Forward(NamedTuple):
  """What the networks say of a batch; all [B, T], f32."""

  tokens: losses.TokenLogprobs | None  # None where the policy is not trained
  values: jax.Array | None
  ema_logps: jax.Array | None


class Counts(NamedTuple):
  """Selected tokens and sequences of the whole batch."""

  actions: losses.Count
  decisions: losses.Count
  positive: jax.Array  # f32[], sequences of positive reward


class KtoBatch(NamedTuple):
  """Answers, and the same prompts with the answers rotated by one."""

  rows: Batch
  mismatched: Batch


class Objective(NamedTuple):
  """A loss, what it reads and how its data is made.

  Attributes:
    loss: (params, out, rows, whole, setup) -> (loss, metrics) of a micro-batch.
    needs_reference: whether the frozen reference is run.
    needs_critic: whether there is a value network.
    whole: (params, ref, batch, setup) -> (rows, whole): what has to be known
      of the whole batch before it is divided into micro-batches.
    sequences: (trajectories, tokenize, config) -> what the loader packs.
    batch: (loader, step) -> batch.
  """

  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  needs_reference: bool
  needs_critic: bool
  whole: Callable[..., tuple[Batch, Any]]
  sequences: Callable[..., Sequence[Any]]
  batch: Callable[..., Any]


def forward(
  params: dict[str, Any],
  ema: Params | None,
  ref: Params | None,
  batch: Batch,
  setup: Setup,
) -> Forward:
  """Runs policy, value network and reference over a packed batch."""
  packed = {"positions": batch.positions, "segment_ids": batch.segment_ids}
  whole = full_params(params, ref, setup)
  config = setup.policy

  def hidden(weights, config):
    return models.apply(weights, batch.tokens, config, **packed).hidden

  if not setup.trains_policy:
    # Its log-ratio to the reference is 0: nothing of it has to be run.
    critic = whole["critic"]
    trunk = hidden(critic, setup.critic)
    return Forward(None, models.values(critic, trunk), None)
  policy = whole["policy"]
  needs_reference = OBJECTIVES[setup.objective].needs_reference
  reference = {}
  if needs_reference:
    reference = {
      "ref_hidden": hidden(ref, models.without_adapters(config)),
      "ref_head": models.head_matrix(ref, config),
    }
    if setup.train.kl != "k3":
      reference["kl_direction"] = setup.train.kl
  policy_hidden = hidden(policy, config)
  head = {"chunk_size": setup.stage.loss_chunk}
  head["logit_scale"] = config.logit_scale
  tokens = losses.token_logprobs(
    policy_hidden,
    models.head_matrix(policy, config),
    batch.targets,
    **reference,
    **head,
  )
  values = None
  if setup.critic is not None:
    critic = whole["critic"]
    trunk = (
      policy_hidden
      if setup.critic_kind == "shared"
      else hidden(critic, setup.critic)
    )
    values = models.values(critic, trunk)
  ema_logps = None
  if ema is not None:
    averaged = full_params({**params, "policy": ema}, ref, setup)["policy"]
    ema_logps = losses.token_logprobs(
      hidden(averaged, config),
      models.head_matrix(averaged, config),
      batch.targets,
      **head,
    ).logps
  return Forward(tokens, values, ema_logps)


def sft(params, out: Forward, rows: Batch, whole: Counts, setup: Setup):
  """Mean negative log-likelihood of the response tokens."""
  del params, setup
  loss = losses.sft_loss(
    out.tokens.logps,
    rows.action_mask,
    segment_ids=rows.segment_ids,
    action_count=whole.actions,
  )
  return loss, {"policy/nll": jax.lax.stop_gradient(loss)}


def oreo(params, out: Forward, rows: Batch, whole: Counts, setup: Setup):
  """Value loss, policy loss and KL penalty in one sum."""
  t = setup.train
  learned = setup.learns_alpha
  loss = losses.oreo_loss(
    out.tokens.logps,
    out.tokens.ref_logps,
    *_states(out, rows),
    **_soft_bellman(rows, whole, t),
    kl=None if t.kl == "k3" else out.tokens.kl,
    alpha=jnp.exp(params["log_alpha"]) if learned else t.alpha,
    clip_log=t.clip_log or None,
    target_logps=out.ema_logps,
    importance_cap=math.e if t.importance_weights else None,
    hinge=t.hinge,
    positive_count=whole.positive,
    single_step=t.single_step,
  )
  return loss.total, loss.metrics


def value(params, out: Forward, rows: Batch, whole: Counts, setup: Setup):
  """The value loss of a policy that is the reference: D_t is 0."""
  del params
  nothing = jnp.zeros_like(out.values)
  loss = losses.oreo_loss(
    nothing,
    nothing,
    *_states(out, rows),
    **_soft_bellman(rows, whole, setup.train),
    single_step=setup.train.single_step,
  )
  kept = ("value/", "reward/")
  return loss.value, {
    k: v for k, v in loss.metrics.items() if k.startswith(kept)
  }


def dqo(params, out: Forward, rows: Batch, whole: Counts, setup: Setup):
  """Soft actor-critic with the Q-function read off the policy."""
  del params
  t = setup.train
  loss = losses.dqo_loss(
    out.tokens.logps,
    out.tokens.ref_logps,
    *_states(out, rows),
    **_soft_bellman(rows, whole, t),
    lambda_=t.dqo_lambda,
    kl=None if t.kl == "k3" else out.tokens.kl,
    alpha=t.alpha,
  )
  return loss.total, loss.metrics


def _states(out: Forward, rows: Batch):
  return out.values, rows.rewards, rows.action_mask, rows.decision_mask


def _soft_bellman(
  rows: Batch, whole: Counts, config: TrainConfig
) -> dict[str, Any]:
  """Arguments that the losses of the soft Bellman equation share."""
  return {
    "beta": config.beta,
    "segment_ids": rows.segment_ids,
    "reduction": config.reduction,
    "reward_scale": config.reward_scale,
    "reward_offset": config.reward_offset,
    "decision_count": whole.decisions,
    "action_count": whole.actions,
  }


def dpo(params, out: Forward, rows: Batch, whole: jax.Array, setup: Setup):
  """Pairs stand side by side in a row: segments 2k - 1 and 2k."""
  del params
  t = setup.train
  policy = _answers(out.tokens.logps, rows, setup)
  reference = _answers(out.tokens.ref_logps, rows, setup)
  chosen, rejected = losses.split_pairs(policy.logps)
  ref_chosen, ref_rejected = losses.split_pairs(reference.logps)
  loss = losses.dpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    beta=t.beta,
    loss_type=t.dpo_variant,
    label_smoothing=t.label_smoothing,
    mask=losses.split_pairs(policy.lengths)[0] > 0,
    num_pairs=whole,
  )
  return loss.total, loss.metrics


class KtoWhole(NamedTuple):
  """What KTO has to know of the whole batch."""

  z0: jax.Array  # f32[], the reference point
  answers: jax.Array  # f32[], their number


def kto(params, out: Forward, rows: Batch, whole: KtoWhole, setup: Setup):
  """Answers of reward above one half are desirable."""
  del params
  t = setup.train
  policy = _answers(out.tokens.logps, rows, setup)
  loss = losses.kto_loss(
    policy.logps,
    _answers(out.tokens.ref_logps, rows, setup).logps,
    _answers(rows.rewards, rows, setup).logps > 0.5,
    whole.z0,
    beta=t.beta,
    desirable_weight=t.desirable_weight,
    undesirable_weight=t.undesirable_weight,
    mask=policy.lengths > 0,
    num_sequences=whole.answers,
  )
  return loss.total, loss.metrics


def _answers(per_token: jax.Array, rows: Batch, setup: Setup):
  return losses.sequence_logps(
    per_token,
    rows.action_mask,
    segment_ids=rows.segment_ids,
    num_segments=setup.max_segments or None,
  )


def _count(params, ref, batch: Batch, setup: Setup) -> tuple[Batch, Counts]:
  del params, ref, setup
  return batch, Counts(
    actions=losses.count_mask(batch.action_mask, batch.segment_ids),
    decisions=losses.count_mask(batch.decision_mask, batch.segment_ids),
    positive=losses.count_positive(
      batch.rewards, batch.decision_mask, batch.segment_ids
    ),
  )


def _count_text(params, ref, batch: Batch, setup: Setup):
  """For SFT: prompts can be learned too, as in pre-training."""
  stage = setup.stage
  if isinstance(stage, SftConfig) and stage.on_prompts:
    batch = batch._replace(action_mask=batch.segment_ids > 0)
  return _count(params, ref, batch, setup)


def _count_pairs(params, ref, batch: Batch, setup: Setup):
  rows, counts = _count(params, ref, batch, setup)
  return rows, counts.actions.sequences / 2.0


def _mismatched_kl(params, ref, batch: KtoBatch, setup: Setup):
  """One reference point for the whole batch, so no micro-batch is special."""
  rows, counts = _count(params, ref, batch.rows, setup)

  def answers(micro):
    micro = jax.tree.map(constrain_batch, micro)
    out = forward(params, None, ref, micro, setup)
    sides = (out.tokens.logps, out.tokens.ref_logps)
    return tuple(_answers(side, micro, setup) for side in sides)

  parts = micro_batches(batch.mismatched, setup.stage.grad_accum)
  policy, reference = jax.lax.map(answers, parts)
  z0 = losses.kto_z0(policy.logps, reference.logps, mask=policy.lengths > 0)
  return rows, KtoWhole(z0, counts.actions.sequences)


def _all(trajectories, tokenize, config):
  del config
  return tokenize(trajectories)


def _correct(trajectories, tokenize, config):
  del config
  return tokenize(construct.select_correct(trajectories))


def _pairs(trajectories, tokenize, config: TrainConfig):
  pairs = construct.preference_pairs(
    trajectories, max_pairs=config.pairs, seed=config.seed
  )
  # Marked, as `tokenize` may drop some: each takes its pairs along.
  marked = [
    dataclasses.replace(side, id=f"{side.id} #{index}")
    for index, side in enumerate(side for pair in pairs for side in pair)
  ]
  found = {sequence.id: sequence for sequence in tokenize(marked)}
  sides = zip(marked[::2], marked[1::2], strict=True)
  return [
    (found[chosen.id], found[rejected.id])
    for chosen, rejected in sides
    if chosen.id in found and rejected.id in found
  ]


def _plain_batch(loader: Loader, step: int) -> Batch:
  return loader.batch(step)


def _kto_batch(loader: Loader, step: int) -> KtoBatch:
  return KtoBatch(loader.batch(step), loader.mismatched(step))


OBJECTIVES: dict[str, Objective] = {
  "sft": Objective(sft, False, False, _count_text, _all, _plain_batch),
  "rejection": Objective(sft, False, False, _count, _correct, _plain_batch),
  "oreo": Objective(oreo, True, True, _count, _all, _plain_batch),
  "value": Objective(value, False, True, _count, _all, _plain_batch),
  "dqo": Objective(dqo, True, True, _count, _all, _plain_batch),
  "dpo": Objective(dpo, True, False, _count_pairs, _pairs, _plain_batch),
  "kto": Objective(kto, True, False, _mismatched_kl, _all, _kto_batch),
}
