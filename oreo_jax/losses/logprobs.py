"""Token log-probabilities and exact KL straight from hidden states.

The logits of a batch, `[B, T, V]`, are often the largest array of a training
step. `head.py` makes them in blocks, forward and backward; here is what a
caller sees of it. Nothing cuts along B, so a batch sharded over B keeps its
sharding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from oreo_jax.losses.head import Sums, head_gradients, head_sums
from oreo_jax.losses.head_blocks import Inputs, Logits, Plan

# Below this many positions of all rows together, a block of them does too
# little with the columns of the head that it reads. With a mask the positions
# are cut into about so many blocks, so that few of the last one are idle.
_FEWEST_POSITIONS = 512
_MASKED_BLOCKS = 8


class TokenLogprobs(NamedTuple):
  """What a language-model head says of the tokens of a batch."""

  logps: jax.Array  # f32[B, T], log pi(tokens[t] | ...)
  ref_logps: jax.Array | None  # f32[B, T], of the reference; no gradient
  kl: jax.Array | None  # f32[B, T], exact KL over the vocabulary
  entropy: jax.Array  # f32[B, T], of pi; no gradient


def token_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  ref_hidden: jax.Array | None = None,
  ref_head: jax.Array | None = None,
  chunk_size: int = 128,
  vocab_chunk: int = 8192,
  keep_logits: int = 0,
  vocab_axes: tuple[str, ...] = (),
  logit_scale: float = 1.0,
  kl_direction: str = "reverse",
) -> TokenLogprobs:
  """Log-probabilities of `tokens`, with the exact KL to a reference.

  With `logits = logit_scale * hidden @ head` and `pi = softmax(logits)`:

    logps[b, t] = log pi(tokens[b, t])
    kl[b, t]    = sum_v pi(v) (log pi(v) - log ref(v))    "reverse"
                = sum_v ref(v) (log ref(v) - log pi(v))   "forward"

  The log-softmax runs in float32 whatever the inputs' dtype. The reference is
  a constant: no gradient reaches `ref_hidden` or `ref_head`, nor
  `logit_scale`. The gradient with respect to `head` is summed over positions
  in float32.

  Args:
    hidden: [B, T, D], final hidden states, any float dtype; `hidden[:, t]`
      predicts `tokens[:, t]`.
    head: [D, V], the unembedding; cast to the dtype of `hidden`.
    tokens: i32[B, T] in [0, V).
    mask: bool[B, T], the positions that are asked for; None: all. The others
      give 0 and get no gradient. They are sorted to the end of their row, and
      blocks of nothing else are not computed.
    ref_hidden: [B, T, D'] of the frozen reference; together with `ref_head`.
    ref_head: [D', V].
    chunk_size: positions of T whose logits exist at once. T need not be a
      multiple of it.
    vocab_chunk: columns of V whose logits exist at once. No array of more than
      B * chunk_size * vocab_chunk elements is made, forward or backward,
      besides those of the size of an argument and logits that are kept.
    keep_logits: up to so many logits, B * T * V, are kept for the backward
      pass, in float32 and as many of the reference; more are made again.
    logit_scale: factor on the logits, of the reference too.
    kl_direction: "reverse" (the paper's) or "forward".
    vocab_axes: for calls inside a `jax.shard_map`: the mesh axes that V is
      split over, first the one of the largest blocks. `head`, `ref_head` and
      V are then this device's columns, and `tokens` are still those of the
      whole vocabulary. The arrays have to be marked as varying over all axes
      of the mesh in use (`jax.lax.pcast`).

  Returns:
    A `TokenLogprobs` of f32[B, T]; `ref_logps` and `kl` are None without a
    reference.

  Raises:
    ValueError: if shapes disagree or only half of the reference is given.

  Example:
    >>> import jax.numpy as jnp
    >>> out = token_logprobs(
    ...   jnp.ones((1, 1, 1)), jnp.log(jnp.asarray([[0.25, 0.75]])),
    ...   jnp.asarray([[1]]), ref_hidden=jnp.ones((1, 1, 1)),
    ...   ref_head=jnp.log(jnp.asarray([[0.5, 0.5]])))
    >>> round(float(out.logps[0, 0]), 4), round(float(out.kl[0, 0]), 4)
    (-0.2877, 0.1308)
  """
  _check(hidden, head, tokens, mask, ref_hidden, ref_head)
  if kl_direction not in ("reverse", "forward"):
    raise ValueError(
      f'kl_direction must be "reverse" or "forward", got {kl_direction!r}'
    )
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  if vocab_chunk < 1:
    raise ValueError(f"vocab_chunk must be at least 1, got {vocab_chunk}")
  (batch, length), vocab = tokens.shape, head.shape[1]
  count = blocks_of_positions(
    batch, length, chunk_size, masked=mask is not None
  )
  positions = -(-length // count)
  plan = Plan(
    positions=positions,
    columns=_columns_of(vocab, vocab_chunk),
    forward_kl=kl_direction == "forward",
    axes=vocab_axes,
    keeps=batch * count * positions * vocab <= keep_logits,
  )

  def pad(x: jax.Array) -> jax.Array:
    end = count * positions - length
    return jnp.pad(x, ((0, 0), (0, end)) + ((0, 0),) * (x.ndim - 2))

  hidden, tokens, mask, ref_hidden = jax.tree.map(
    pad, (hidden, tokens, mask, ref_hidden)
  )
  scale = jnp.asarray(logit_scale, jnp.float32)
  inputs = Inputs(
    hidden,
    head,
    tokens.astype(jnp.int32),
    *jax.lax.stop_gradient((scale, ref_hidden, ref_head)),
  )
  outputs = _outputs(plan, inputs, mask)
  return jax.tree.map(lambda x: x[:, :length], outputs)


def blocks_of_positions(
  rows: int, length: int, chunk_size: int, *, masked: bool
) -> int:
  """Returns into how many blocks the positions of a batch are cut.

  Args:
    rows: B.
    length: T.
    chunk_size: the most positions of a block.
    masked: whether there is a mask, so that not all blocks need be computed.
  """
  if masked:
    fewest = max(-(-_FEWEST_POSITIONS // rows), -(-length // _MASKED_BLOCKS))
    chunk_size = min(chunk_size, fewest)
  # Blocks are of nearly equal size: a last one of a few positions would cost as
  # much as a full one.
  return -(-length // chunk_size)


def _columns_of(vocab: int, vocab_chunk: int) -> int:
  """Returns the columns of a block: at most `vocab_chunk`, and not far less."""
  fewest = -(-vocab // vocab_chunk)
  for count in range(fewest, 2 * fewest + 1):
    if vocab % count == 0:
      return vocab // count
  # Blocks that do not tile the vocabulary overlap and have to be masked.
  return -(-vocab // fewest)


class _Order(NamedTuple):
  """Where the positions of a row are put: those of the mask first."""

  mask: jax.Array  # bool[B, T], sorted
  forth: jax.Array  # i32[B, T], which position comes to each place
  back: jax.Array  # i32[B, T], to which place each position comes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outputs(
  plan: Plan, inputs: Inputs, mask: jax.Array | None
) -> TokenLogprobs:
  """Has a derivative of its own, which needs few of the logits, or none."""
  order = _order(mask)
  plan = plan._replace(keeps=False)  # there is no backward pass
  sums, _ = head_sums(_sorted(inputs, order, plan), plan)
  return _restored(_outputs_of(sums, plan), order)


def _order(mask: jax.Array | None) -> _Order | None:
  if mask is None:
    return None
  forth = jnp.argsort(~mask, axis=1, stable=True)
  return _Order(
    jnp.take_along_axis(mask, forth, axis=1),
    forth,
    jnp.argsort(forth, axis=1),
  )


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
  """Reorders the positions of [B, T, ...]."""
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _sorted(inputs: Inputs, order: _Order | None, plan: Plan) -> Inputs:
  """Puts the positions of the mask first, and counts their blocks."""
  if order is None:
    return inputs
  hidden, tokens, ref_hidden = jax.tree.map(
    lambda x: _taken(x, order.forth),
    (inputs.hidden, inputs.tokens, inputs.ref_hidden),
  )
  most = jnp.max(jnp.sum(order.mask, axis=1, dtype=jnp.int32))
  return inputs._replace(
    hidden=hidden,
    tokens=tokens,
    ref_hidden=ref_hidden,
    used=-(-most // plan.positions),
  )


def _restored(outputs: TokenLogprobs, order: _Order | None) -> TokenLogprobs:
  """Puts outputs where they belong, and 0 at all other positions."""
  if order is None:
    return outputs
  return jax.tree.map(
    lambda x: _taken(jnp.where(order.mask, x, 0.0), order.back), outputs
  )


def _outputs_of(sums: Sums, plan: Plan) -> TokenLogprobs:
  log_mass = jnp.log(sums.mass)
  logps = (sums.target - sums.top) - log_mass
  entropy = log_mass - sums.spread / sums.mass
  ref = sums.ref
  if ref is None:
    return TokenLogprobs(logps, None, None, entropy)
  ref_log_mass = jnp.log(ref.mass)
  ref_logps = (ref.target - ref.top) - ref_log_mass
  # log pi(v) - log ref(v) = (x - y) - shift
  shift = (sums.top - ref.top) + (log_mass - ref_log_mass)
  if plan.forward_kl:
    kl = ref.ratio / ref.mass + shift
  else:
    kl = ref.ratio / sums.mass - shift
  return TokenLogprobs(logps, ref_logps, kl, entropy)


def _outputs_forward(
  plan: Plan, marked: Any, marked_mask: Any
) -> tuple[TokenLogprobs, Any]:
  # `Inputs`, where every array has a mark whether its gradient is asked for.
  inputs, mask = jax.tree.map(lambda x: x.value, (marked, marked_mask))
  order = _order(mask)
  inputs = _sorted(inputs, order, plan)
  sums, kept = head_sums(inputs, plan)
  # A frozen head, as that under adapters, has no gradient. The mark is handed
  # on as structure, because what is an array here is traced in a loop.
  trained = () if marked.head.perturbed else None
  outputs = _restored(_outputs_of(sums, plan), order)
  return outputs, (inputs, order, sums, kept, trained)


def _outputs_backward(
  plan: Plan,
  residuals: tuple[
    Inputs, _Order | None, Sums, Logits | None, tuple[()] | None
  ],
  grads: TokenLogprobs,
) -> tuple[Inputs, None]:
  inputs, order, sums, kept, trained = residuals
  logps_grad, kl_grad = (
    None if grad is None or isinstance(grad, SymbolicZero) else grad
    for grad in (grads.logps, grads.kl)
  )
  zero: Any = None
  nothing: Any = Inputs(*(zero,) * len(inputs))
  if logps_grad is None:
    if kl_grad is None:
      return nothing, None
    logps_grad = jnp.zeros_like(kl_grad)
  if order is not None:
    logps_grad, kl_grad = jax.tree.map(
      lambda x: jnp.where(order.mask, _taken(x, order.forth), 0.0),
      (logps_grad, kl_grad),
    )
  hidden_grad, head_grad = head_gradients(
    inputs, sums, kept, logps_grad, kl_grad, plan, with_head=trained is not None
  )
  hidden_grad = hidden_grad.astype(inputs.hidden.dtype)
  if order is not None:
    hidden_grad = _taken(hidden_grad, order.back)
  return nothing._replace(hidden=hidden_grad, head=head_grad), None


_outputs.defvjp(_outputs_forward, _outputs_backward, symbolic_zeros=True)


def _check(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  mask: jax.Array | None,
  ref_hidden: jax.Array | None,
  ref_head: jax.Array | None,
) -> None:
  if (ref_hidden is None) != (ref_head is None):
    raise ValueError(
      "ref_hidden and ref_head belong together: give both for the reference's "
      "log-probabilities and the KL, or neither"
    )
  if mask is not None and (mask.shape != tokens.shape or mask.dtype != bool):
    raise ValueError(
      f"expected mask as bool{list(tokens.shape)}, the shape of tokens, got "
      f"{mask.dtype}{list(mask.shape)}"
    )
  pairs = [("", hidden, head), ("ref_", ref_hidden, ref_head)]
  for prefix, states, matrix in pairs:
    if states is None or matrix is None:
      continue
    fits = (
      states.ndim == 3
      and matrix.ndim == 2
      and states.shape[:2] == tokens.shape
      and states.shape[2] == matrix.shape[0]
    )
    if not fits:
      raise ValueError(
        f"expected {prefix}hidden [B, T, D], {prefix}head [D, V] and tokens "
        f"[B, T], got {states.shape}, {matrix.shape} and {tokens.shape}; a "
        "head stored as [V, D] must be transposed"
      )
  if ref_head is not None and ref_head.shape[1] != head.shape[1]:
    raise ValueError(
      f"head and ref_head must share the vocabulary, got {head.shape[1]} and "
      f"{ref_head.shape[1]} columns"
    )
