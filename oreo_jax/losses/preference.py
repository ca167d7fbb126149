"""Preference losses: DPO (with IPO and cDPO) and KTO.

Both look at whole answers. `sequence_logps` sums token log-probabilities into
one number an answer, from one row an answer (`[B]`) or from packed rows
(`[B, S]`, slot k - 1 for segment k). In a packed row of pairs the segments
1, 3, 5, ... are chosen and 2, 4, 6, ... the rejected answers that go with
them; `split_pairs` takes them apart. All arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.segments import weighted_sum

_stop = jax.lax.stop_gradient


class SequenceLogps(NamedTuple):
  """Log-probabilities of whole answers."""

  logps: jax.Array  # f32[B] or f32[B, S], sum over the answer's tokens
  lengths: jax.Array  # f32, same shape: its tokens; 0 where there is no answer


class DpoLoss(NamedTuple):
  """A loss over pairs."""

  total: jax.Array  # f32[], mean over pairs
  metrics: dict[str, jax.Array]  # TRL's names; no gradient


class KtoLoss(NamedTuple):
  """A loss over unpaired answers."""

  total: jax.Array  # f32[], mean over answers
  metrics: dict[str, jax.Array]  # TRL's names; no gradient


def sequence_logps(
  logps: jax.Array,
  action_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  num_segments: int | None = None,
) -> SequenceLogps:
  """Sums token log-probabilities over the response tokens of every answer.

  Args:
    logps: f32[B, T].
    action_mask: bool[B, T], response tokens.
    segment_ids: i32[B, T] for packed rows, or None.
    num_segments: slots S a packed row has in the result, at least its largest
      segment id; default T. Sequences beyond it are dropped.

  Returns:
    A `SequenceLogps`, [B] without and [B, S] with `segment_ids`. Divide its
    `logps` by its `lengths` for means over tokens (TRL's IPO takes those).

  Example:
    >>> import jax.numpy as jnp
    >>> out = sequence_logps(
    ...   jnp.asarray([[-1.0, -2.0, -4.0]]), jnp.ones((1, 3), bool),
    ...   segment_ids=jnp.asarray([[1, 1, 2]]), num_segments=2)
    >>> out.logps.tolist(), out.lengths.tolist()
    ([[-3.0, -4.0]], [[2.0, 1.0]])
  """
  segments.check_shapes(
    logps=logps, action_mask=action_mask, segment_ids=segment_ids
  )
  mask = action_mask.astype(bool)
  logps = jnp.where(mask, logps.astype(jnp.float32), 0.0)
  lengths = mask.astype(jnp.float32)
  if segment_ids is None:
    return SequenceLogps(logps.sum(axis=1), lengths.sum(axis=1))
  slots = logps.shape[1] if num_segments is None else num_segments

  def sum_row(x: jax.Array, ids: jax.Array) -> jax.Array:
    # Slot 0 gathers the padding and is dropped.
    return jax.ops.segment_sum(x, ids, num_segments=slots + 1)[1:]

  sums = jax.vmap(sum_row)
  return SequenceLogps(sums(logps, segment_ids), sums(lengths, segment_ids))


def split_pairs(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Takes chosen and rejected answers of packed rows apart.

  Args:
    packed: [B, S], one number an answer, from `sequence_logps`.

  Returns:
    `(chosen, rejected)`, both [B, S // 2].

  Example:
    >>> import jax.numpy as jnp
    >>> chosen, rejected = split_pairs(jnp.asarray([[1, 2, 3, 4, 5]]))
    >>> chosen.tolist(), rejected.tolist()
    ([[1, 3]], [[2, 4]])
  """
  even = packed.shape[1] // 2 * 2
  return packed[:, 0:even:2], packed[:, 1:even:2]


def _logistic(
  margin: jax.Array, probs: float | jax.Array, beta: float
) -> jax.Array:
  scaled = beta * margin
  return -(
    probs * jax.nn.log_sigmoid(scaled)
    + (1.0 - probs) * jax.nn.log_sigmoid(-scaled)
  )


def _squared(
  margin: jax.Array, probs: float | jax.Array, beta: float
) -> jax.Array:
  goal = 1.0 / (2.0 * beta)
  return probs * jnp.square(margin - goal) + (1.0 - probs) * jnp.square(
    margin + goal
  )


_PAIR_LOSSES = {"sigmoid": _logistic, "ipo": _squared}


def dpo_loss(
  chosen_logps: jax.Array,
  rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  loss_type: str = "sigmoid",
  label_smoothing: float | jax.Array = 0.0,
  mask: jax.Array | None = None,
  num_pairs: jax.Array | None = None,
) -> DpoLoss:
  """Direct preference optimisation over pairs of answers.

  With `margin = (chosen - ref_chosen) - (rejected - ref_rejected)` and p the
  probability that the chosen answer is the better one:

    sigmoid: -p log sigmoid(beta * margin) - (1 - p) log sigmoid(-beta * margin)
    ipo:      p (margin - 1/(2 beta))^2 + (1 - p) (margin + 1/(2 beta))^2

  p is `1 - label_smoothing`: 1 by default, below it in conservative DPO (cDPO).

  Args:
    chosen_logps: f32[P], log pi of the chosen answers, summed over tokens; any
      shape, all arrays alike.
    rejected_logps: f32[P].
    ref_chosen_logps: f32[P], of the frozen reference. No gradient.
    ref_rejected_logps: f32[P]. No gradient.
    beta: temperature, > 0.
    loss_type: "sigmoid" or "ipo".
    label_smoothing: probability that a label is the wrong way round, one for
      all pairs or f32[P].
    mask: bool[P], pairs that count; None counts all. In packed rows: both
      `lengths` > 0.
    num_pairs: pairs of the whole batch, where these are a part of it; the
      parts' losses, gradients and metrics then add up.

  Returns:
    A `DpoLoss`; 0 with gradients of 0 if no pair counts.

  Raises:
    ValueError: if shapes disagree or `loss_type` is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> loss = dpo_loss(*[jnp.asarray([x]) for x in (-1.0, -3.0, -2.0, -2.0)],
    ...                 beta=0.5)
    >>> round(float(loss.total), 4), float(loss.metrics["rewards/margins"])
    (0.3133, 1.0)

  Source: arXiv 2305.18290, eq. 7; arXiv 2310.12036, eq. 17 (IPO).
  """
  _check_alike(
    chosen_logps=chosen_logps,
    rejected_logps=rejected_logps,
    ref_chosen_logps=ref_chosen_logps,
    ref_rejected_logps=ref_rejected_logps,
    mask=mask,
  )
  if loss_type not in _PAIR_LOSSES:
    raise ValueError(
      f"loss_type must be one of {sorted(_PAIR_LOSSES)}, got {loss_type!r}; "
      "cDPO is sigmoid with label_smoothing"
    )
  weights = _mean_weights(chosen_logps, mask, num_pairs)
  chosen = _log_ratios(chosen_logps, ref_chosen_logps, weights)
  rejected = _log_ratios(rejected_logps, ref_rejected_logps, weights)
  losses = _PAIR_LOSSES[loss_type](
    chosen - rejected, 1.0 - _stop(label_smoothing), beta
  )
  metrics = {
    "rewards/chosen": beta * weighted_sum(weights, chosen),
    "rewards/rejected": beta * weighted_sum(weights, rejected),
    "rewards/margins": beta * weighted_sum(weights, chosen - rejected),
    "rewards/accuracies": weighted_sum(weights, chosen > rejected),
    "logps/chosen": weighted_sum(weights, chosen_logps),
    "logps/rejected": weighted_sum(weights, rejected_logps),
  }
  return DpoLoss(weighted_sum(weights, losses), _stop(metrics))


def kto_z0(
  kl_logps: jax.Array,
  ref_kl_logps: jax.Array,
  *,
  mask: jax.Array | None = None,
) -> jax.Array:
  """KTO's reference point, an estimate of KL(pi || ref) from mismatched pairs.

    z0 = sg(max(0, mean(kl_logps - ref_kl_logps)))

  The answers are those of the same batch, rotated by one: the prompt of answer
  i is followed by answer i + 1.

  Args:
    kl_logps: f32[P], log pi of the mismatched answers, summed over tokens.
    ref_kl_logps: f32[P], of the reference.
    mask: bool[P], answers that count; None counts all.

  Returns:
    f32[], no gradient; 0 if no answer counts. One number serves the whole
    batch: compute it once, before splitting the batch into parts.

  Example:
    >>> import jax.numpy as jnp
    >>> float(kto_z0(jnp.asarray([-1.0, -2.0]), jnp.asarray([-2.0, -2.0])))
    0.5

  Source: arXiv 2402.01306, section 4.
  """
  _check_alike(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps, mask=mask)
  weights = _mean_weights(kl_logps, mask, None)
  log_ratios = _log_ratios(kl_logps, ref_kl_logps, weights)
  return _stop(jax.nn.relu(weighted_sum(weights, log_ratios)))


def kto_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  labels: jax.Array,
  z0: jax.Array,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  mask: jax.Array | None = None,
  num_sequences: jax.Array | None = None,
) -> KtoLoss:
  """Kahneman-Tversky optimisation over unpaired answers.

  With `r = logps - ref_logps`:

    desirable:   desirable_weight   * (1 - sigmoid(beta * (r - z0)))
    undesirable: undesirable_weight * (1 - sigmoid(beta * (z0 - r)))

  Args:
    logps: f32[P], log pi of the answers, summed over tokens; any shape, all
      arrays alike.
    ref_logps: f32[P], of the frozen reference. No gradient.
    labels: bool[P], True for desirable.
    z0: f32[], the reference point, from `kto_z0`. No gradient.
    beta: temperature, > 0.
    desirable_weight: weight of desirable answers.
    undesirable_weight: weight of undesirable answers.
    mask: bool[P], answers that count; None counts all. In packed rows:
      `lengths` > 0.
    num_sequences: answers of the whole batch, where these are a part of it;
      the parts' losses and gradients then add up.

  Returns:
    A `KtoLoss`; 0 with gradients of 0 if no answer counts. Metrics are sums
    and counts, as in TRL, except "kl", which is z0 times the share of the
    batch these answers are; `summarize_metrics` divides.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> loss = kto_loss(jnp.asarray([-1.0, -1.0]), jnp.asarray([-1.0, -3.0]),
    ...                 jnp.asarray([True, False]), jnp.asarray(0.0), beta=0.5)
    >>> round(float(loss.total), 4)
    0.6155

  Source: arXiv 2402.01306, eq. 8.
  """
  _check_alike(logps=logps, ref_logps=ref_logps, labels=labels, mask=mask)
  weights = _mean_weights(logps, mask, num_sequences)
  log_ratios = _log_ratios(logps, ref_logps, weights)
  desirable = labels.astype(bool)
  z0 = _stop(z0)
  sign = jnp.where(desirable, 1.0, -1.0)
  side = jnp.where(desirable, desirable_weight, undesirable_weight)
  # sigmoid(-x) is 1 - sigmoid(x), but loses no digits where sigmoid(x) is
  # close to 1.
  losses = side * jax.nn.sigmoid(-beta * sign * (log_ratios - z0))
  total = weighted_sum(weights, losses)

  counted = weights > 0.0
  metrics = {"kl": z0 * jnp.sum(weights)}
  for name, selected in (("chosen", desirable), ("rejected", ~desirable)):
    selected = (selected & counted).astype(jnp.float32)
    metrics[f"count/{name}"] = jnp.sum(selected)
    metrics[f"rewards/{name}_sum"] = beta * weighted_sum(selected, log_ratios)
    metrics[f"logps/{name}_sum"] = weighted_sum(selected, logps)
  return KtoLoss(total, _stop(metrics))


def _check_alike(**arrays: jax.Array | None) -> None:
  shapes = {k: jnp.shape(v) for k, v in arrays.items() if v is not None}
  if len(set(shapes.values())) > 1:
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(
      f"expected arrays of one shape, one number an answer, got {listed}; "
      "sequence_logps sums token log-probabilities into such"
    )


def _mean_weights(
  like: jax.Array, mask: jax.Array | None, total: jax.Array | None
) -> jax.Array:
  """Weights of a mean over what a mask selects of `total` answers or pairs."""
  mask = jnp.ones(like.shape, bool) if mask is None else mask.astype(bool)
  if total is None:
    total = mask.sum(dtype=jnp.float32)
  return jnp.where(mask, 1.0 / jnp.maximum(total, 1.0), 0.0)


def _log_ratios(
  logps: jax.Array, ref_logps: jax.Array, weights: jax.Array
) -> jax.Array:
  """Differences in float32, and 0 where the weight is 0."""
  ratios = logps.astype(jnp.float32) - _stop(ref_logps).astype(jnp.float32)
  return jnp.where(weights > 0.0, ratios, 0.0)
