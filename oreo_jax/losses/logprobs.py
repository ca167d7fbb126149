"""Token log-probabilities and exact KL straight from hidden states.

The logits of a batch, `[B, T, V]`, are often the largest array of a training
step. Here they exist for one chunk of T at a time, in the forward pass and,
recomputed, in the backward pass. Nothing cuts along B, so a batch sharded over
B keeps its sharding; V may be sharded too, as nothing gathers along it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite stand-in for a logit of minus infinity: its probability is 0 in
# float32, yet differences, products and squares of it stay finite.
_LOWEST_LOGIT = -1e9


class TokenLogprobs(NamedTuple):
  """What a language-model head says of the tokens of a batch."""

  logps: jax.Array  # f32[B, T], log pi(tokens[t] | ...)
  ref_logps: jax.Array | None  # f32[B, T], of the reference; no gradient
  kl: jax.Array | None  # f32[B, T], exact KL over the vocabulary
  entropy: jax.Array  # f32[B, T], of pi; no gradient


def _log_softmax(
  hidden: jax.Array, head: jax.Array, logit_scale: float
) -> jax.Array:
  # float32 from here on: a bfloat16 log-softmax loses the differences between
  # policy and reference that all our losses are made of.
  logits = jnp.einsum(
    "bcd,dv->bcv",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  logits = jnp.maximum(logits * logit_scale, _LOWEST_LOGIT)
  return jax.nn.log_softmax(logits, axis=-1)


def _pick(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
  # A masked sum takes the place of a gather: its gradient needs no scatter, and
  # each device sums the part of a sharded vocabulary that it holds.
  vocab = jnp.arange(log_probs.shape[-1], dtype=tokens.dtype)
  chosen = tokens[..., None] == vocab[None, None, :]
  return jnp.where(chosen, log_probs, 0.0).sum(axis=-1)


def token_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  *,
  ref_hidden: jax.Array | None = None,
  ref_head: jax.Array | None = None,
  chunk_size: int = 128,
  logit_scale: float = 1.0,
  kl_direction: str = "reverse",
) -> TokenLogprobs:
  """Log-probabilities of `tokens`, with the exact KL to a reference.

  With `logits = logit_scale * hidden @ head` and `pi = softmax(logits)`:

    logps[b, t] = log pi(tokens[b, t])
    kl[b, t]    = sum_v pi(v) (log pi(v) - log ref(v))    "reverse"
                = sum_v ref(v) (log ref(v) - log pi(v))   "forward"

  The log-softmax runs in float32 whatever the inputs' dtype. The reference is
  a constant: no gradient reaches `ref_hidden` or `ref_head`. The gradient
  with respect to `head` is summed over chunks in float32.

  Args:
    hidden: [B, T, D], final hidden states, any float dtype; `hidden[:, t]`
      predicts `tokens[:, t]`.
    head: [D, V], the unembedding; cast to the dtype of `hidden`.
    tokens: i32[B, T] in [0, V).
    ref_hidden: [B, T, D'] of the frozen reference; together with `ref_head`.
    ref_head: [D', V].
    chunk_size: positions of T whose logits exist at once; when it is smaller
      than T no array of B * T * V elements is made, forward or backward. T
      need not be a multiple of it. For `T <= chunk_size` the logits are kept
      for the backward pass, not recomputed.
    logit_scale: factor on the logits, of the reference too.
    kl_direction: "reverse" (the paper's) or "forward".

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
  _check(hidden, head, tokens, ref_hidden, ref_head)
  if kl_direction not in ("reverse", "forward"):
    raise ValueError(
      f'kl_direction must be "reverse" or "forward", got {kl_direction!r}'
    )
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  ref_hidden, ref_head = jax.lax.stop_gradient((ref_hidden, ref_head))

  def chunk_outputs(
    head: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    ref_hidden: jax.Array | None,
  ) -> TokenLogprobs:
    log_probs = _log_softmax(hidden, head, logit_scale)
    probs = jnp.exp(log_probs)
    entropy = jax.lax.stop_gradient(-(probs * log_probs).sum(axis=-1))
    logps = _pick(log_probs, tokens)
    if ref_hidden is None or ref_head is None:
      return TokenLogprobs(logps, None, None, entropy)
    ref_log_probs = _log_softmax(ref_hidden, ref_head, logit_scale)
    log_ratios = log_probs - ref_log_probs
    if kl_direction == "reverse":
      kl = (probs * log_ratios).sum(axis=-1)
    else:
      kl = -(jnp.exp(ref_log_probs) * log_ratios).sum(axis=-1)
    return TokenLogprobs(logps, _pick(ref_log_probs, tokens), kl, entropy)

  length = tokens.shape[1]
  # Cast to the dtype of `hidden` only inside the loop, so that the gradient of
  # the head, which the loop sums over chunks, is summed in float32.
  head = head.astype(jnp.float32)
  if length <= chunk_size:
    return chunk_outputs(head, hidden, tokens, ref_hidden)

  num_chunks = -(-length // chunk_size)
  padding = num_chunks * chunk_size - length

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], num_chunks * chunk_size)[:, :length]

  # The checkpoint keeps the chunk's inputs alone and recomputes its logits in
  # the backward pass. `prevent_cse` guards checkpoints outside of loops; a scan
  # needs no guard, and XLA optimises better without.
  body = jax.checkpoint(chunk_outputs, prevent_cse=False)
  chunks = jax.tree.map(split, (hidden, tokens, ref_hidden))
  _, outputs = jax.lax.scan(
    lambda carry, xs: (carry, body(head, *xs)), None, chunks
  )
  return jax.tree.map(join, outputs)


def _check(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  ref_hidden: jax.Array | None,
  ref_head: jax.Array | None,
) -> None:
  if (ref_hidden is None) != (ref_head is None):
    raise ValueError(
      "ref_hidden and ref_head belong together: give both for the reference's "
      "log-probabilities and the KL, or neither"
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
