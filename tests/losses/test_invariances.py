"""What must not change a loss or its gradients.

Padding, packing, order, parts of a batch, jit and the number of devices. All
losses run in one compiled function: `loss[name]`, and their gradients by the
`logps` and `values` that they are given.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import cases

from oreo_jax import losses

# Answers 2i and 2i + 1 are a pair and stand together in a row.
PACKING = ((2, 3), (0, 1, 6, 7), (), (4, 5))
OTHER_PACKING = ((6, 7), (4, 5), (0, 1), (2, 3))
SLOTS = 4
FLOATS = (*cases.FIELDS, "labels")
NAMES = (
  "oreo, exact KL",
  "oreo, options",
  "oreo, single step",
  "dqo",
  "sft",
  "dpo",
  "ipo",
  "kto",
)


def to_jax(x):
  x = np.asarray(x)
  return jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype)


def batch_of(sequences, rows, **kwargs):
  """Packed arrays; `labels` and `pair` say which answers are good."""
  batch = cases.packed(sequences, rows=rows, **kwargs)
  batch["labels"] = np.zeros((cases.ROWS, SLOTS), bool)
  for b, row in enumerate(rows):
    for k, index in enumerate(row):
      batch["labels"][b, k] = index % 3 == 0
  return batch


def preference_parts(batch, logps):
  """Sums of every slot and which slots and pairs there are."""
  ids, mask = batch["segment_ids"], batch["action_mask"]
  own, ref, other = (
    losses.sequence_logps(x, mask, segment_ids=ids, num_segments=SLOTS)
    for x in (logps, batch["ref_logps"], batch["target_logps"])
  )
  up, down = losses.split_pairs(own.lengths > 0)
  return own.logps, ref.logps, other.logps, own.lengths > 0, up & down


def totals(logps, values, batch, counts):
  """All losses, stacked in the order of NAMES."""
  arrays = [
    logps,
    batch["ref_logps"],
    values,
    batch["rewards"],
    batch["action_mask"],
    batch["decision_mask"],
  ]
  ids = {"segment_ids": batch["segment_ids"]}
  both = {k: counts.get(k) for k in ("decision_count", "action_count")}
  positive = {"positive_count": counts.get("positive_count")}
  action = {"action_count": counts.get("action_count")}
  oreo = functools.partial(
    losses.oreo_loss, *arrays, beta=0.3, **ids, **both, **positive
  )
  own, ref, other, present, pairs = preference_parts(batch, logps)
  dpo = functools.partial(
    losses.dpo_loss,
    *losses.split_pairs(own),
    *losses.split_pairs(ref),
    beta=0.3,
    mask=pairs,
    num_pairs=counts.get("num_pairs"),
  )
  z0 = counts.get("z0")
  kto = losses.kto_loss(
    own,
    ref,
    batch["labels"],
    losses.kto_z0(other, ref, mask=present) if z0 is None else z0,
    beta=0.3,
    mask=present,
    num_sequences=counts.get("num_sequences"),
  )
  by_name = {
    "oreo, exact KL": oreo(kl=batch["kl"] + 0.1 * logps, alpha=0.2).total,
    "oreo, options": oreo(
      alpha=0.2,
      clip_log=0.5,
      target_logps=batch["target_logps"],
      importance_cap=math.e,
      hinge=0.4,
      reduction="token",
      reward_scale=2.0,
      reward_offset=-1.0,
    ).total,
    "oreo, single step": oreo(single_step=True, hinge=0.4).total,
    "dqo": losses.dqo_loss(
      *arrays, beta=0.3, lambda_=0.7, alpha=0.1, **ids, **both
    ).total,
    "sft": losses.sft_loss(logps, arrays[4], **ids, **action),
    "dpo": dpo().total,
    "ipo": dpo(loss_type="ipo", label_smoothing=0.1).total,
    "kto": kto.total,
  }
  return jnp.stack([by_name[name] for name in NAMES])


def evaluate(batch, counts):
  """Losses [N] and their gradients by logps and values, [N, B, T] each."""
  out, pull = jax.vjp(
    lambda *x: totals(*x, batch, counts), batch["logps"], batch["values"]
  )
  return out, *jax.vmap(pull)(jnp.eye(len(NAMES), dtype=jnp.float32))


FAST = {"xla_backend_optimization_level": 0}
compiled = jax.jit(evaluate, compiler_options=FAST)


def run(batch, counts=None):
  arrays = {k: to_jax(v) for k, v in batch.items() if k != "where"}
  return compiled(arrays, counts or {})


@functools.cache
def packed_batch(granularity="step", seed=41):
  """A packed batch and its losses and gradients."""
  sequences = cases.trajectories(seed, granularity, per_token=True)
  batch = batch_of(sequences, PACKING)
  return sequences, batch, run(batch)


def assert_same(batch, got, other_batch, expected, rtol=2e-5):
  """Losses, and gradients sequence by sequence; none in padding."""
  np.testing.assert_allclose(got[0], expected[0], rtol=rtol)
  padding = np.asarray(batch["segment_ids"]) == 0
  for which, x, y in zip(
    ("logps", "values"), got[1:], expected[1:], strict=True
  ):
    for i, name in enumerate(NAMES):
      np.testing.assert_array_equal(np.asarray(x[i])[padding], 0)
      for mine, theirs in zip(
        cases.gather(x[i], batch),
        cases.gather(y[i], other_batch),
        strict=True,
      ):
        np.testing.assert_allclose(
          mine, theirs, rtol=1e-4, atol=1e-6, err_msg=f"{name} by {which}"
        )


@pytest.mark.parametrize("garbage", [0.0, 80.0, np.nan, np.inf, -np.inf])
def test_content_of_padding(garbage):
  sequences, batch, expected = packed_batch()
  other = batch_of(sequences, PACKING, seed=1)
  for name in cases.FIELDS:
    noise = garbage
    if np.isfinite(garbage):
      noise = garbage * np.random.default_rng(1).normal(size=other[name].shape)
    other[name] = np.where(other["segment_ids"] > 0, other[name], noise)
  got = run(other)
  assert_same(other, got, batch, expected)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_content_of_prompts_and_observations(granularity):
  """Log-probabilities, values and KL of tokens that are no actions."""
  sequences, batch, expected = packed_batch(granularity)
  rng = np.random.default_rng(0)
  other = dict(batch)
  for name in ("logps", "ref_logps", "values", "kl", "target_logps"):
    noise = 30 * rng.normal(size=batch[name].shape)
    noise[:, ::3] = np.nan
    other[name] = np.where(batch["action_mask"], batch[name], noise)
  assert_same(other, run(other), batch, expected)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@pytest.mark.parametrize("gap", [0, 1])
def test_packing(gap, granularity):
  """Pairs alone in their rows, or several in one, with and without gaps."""
  sequences, batch, expected = packed_batch(granularity)
  other = batch_of(sequences, OTHER_PACKING, seed=2, gap=gap)
  assert_same(other, run(other), batch, expected)
  both = batch_of(sequences, PACKING, seed=3, gap=gap)
  assert_same(both, run(both), batch, expected)


def test_order_of_rows():
  _, batch, expected = packed_batch()
  order = np.random.default_rng(5).permutation(cases.ROWS)
  other = {k: v[order] for k, v in batch.items() if k != "where"}
  place = np.argsort(order)
  other["where"] = [(i, place[b], span) for i, b, span in batch["where"]]
  assert_same(other, run(other), batch, expected)


def test_names_of_segments():
  """Any increasing positive ids do where no slot is asked for."""
  _, batch, expected = packed_batch()
  ids = batch["segment_ids"]
  other = {**batch, "segment_ids": np.where(ids > 0, 3 * ids + 5, 0)}
  got = run(other)
  without_slots = [
    i for i, name in enumerate(NAMES) if name not in ("dpo", "ipo", "kto")
  ]
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(x)[without_slots],
      np.asarray(y)[without_slots],
      rtol=1e-5,
      atol=1e-7,
    )


def counts_of(batch):
  """What the parts of a batch must know of the whole."""
  arrays = {k: to_jax(v) for k, v in batch.items() if k != "where"}
  ids = arrays["segment_ids"]
  _, ref, other, present, pairs = preference_parts(arrays, arrays["logps"])
  return {
    "decision_count": losses.count_mask(arrays["decision_mask"], ids),
    "action_count": losses.count_mask(arrays["action_mask"], ids),
    "positive_count": losses.count_positive(
      arrays["rewards"], arrays["decision_mask"], ids
    ),
    "num_pairs": jnp.sum(pairs, dtype=jnp.float32),
    "num_sequences": jnp.sum(present, dtype=jnp.float32),
    "z0": losses.kto_z0(other, ref, mask=present),
  }


def part_of(batch, rows, seed):
  """The batch with every other row turned into padding."""
  noise = batch_of([], (), seed=seed)
  stays = np.isin(np.arange(cases.ROWS), rows)[:, None]
  return {
    name: np.where(stays, batch[name], noise[name])
    for name in batch
    if name != "where"
  }


@pytest.mark.parametrize(
  "parts",
  [((0,), (1, 2, 3, 4, 5, 6, 7)), ((1, 2), (3,), (0, 4, 5, 6), (7,))],
)
def test_unequal_parts_add_up_to_the_whole(parts):
  _, batch, expected = packed_batch()
  counts = counts_of(batch)
  outputs = [
    run(part_of(batch, rows, seed), counts) for seed, rows in enumerate(parts)
  ]
  got = [
    sum(np.asarray(x, np.float64) for x in same)
    for same in zip(*outputs, strict=True)
  ]
  assert_same(batch, got, batch, expected)


def test_counts_of_parts_add_up():
  _, batch, _ = packed_batch()
  ids, mask = to_jax(batch["segment_ids"]), to_jax(batch["decision_mask"])
  expected = losses.count_mask(mask, ids)
  cut = [losses.count_mask(mask[i:j], ids[i:j]) for i, j in ((0, 3), (3, 8))]
  added = jax.tree.map(lambda *x: sum(map(float, x)), *cut)
  assert tuple(added) == tuple(map(float, expected))


@pytest.mark.parametrize("per_token", [False, True])
def test_positive_sequences_are_counted(per_token):
  """Of all rows, packed or not, and of parts that add up."""
  sequences = cases.trajectories(42, "step", per_token=per_token)
  expected = sum(float(x["rewards"].sum()) > 0 for x in sequences)
  assert 0 < expected < len(sequences)
  for batch in (batch_of(sequences, PACKING), cases.unpacked(sequences)):
    arrays = [
      to_jax(batch[name])
      for name in ("rewards", "decision_mask", "segment_ids")
    ]
    assert float(losses.count_positive(*arrays)) == expected
    cut = [
      losses.count_positive(*(x[i:j] for x in arrays))
      for i, j in ((0, 3), (3, 8))
    ]
    assert float(sum(cut)) == expected


def test_a_row_with_one_reward_counts_each_of_its_sequences():
  mask = jnp.asarray([[True, True, True, False], [True, False, False, False]])
  ids = jnp.asarray([[1, 1, 2, 3], [1, 1, 1, 0]])
  # The third sequence of row 0 has no decision point; row 1 is negative.
  got = losses.count_positive(jnp.asarray([1.0, -1.0]), mask, ids)
  assert float(got) == 2


def test_rows_cut_into_smaller_arrays():
  """The same with parts of their own shape, as a training step has them."""
  _, batch, _ = packed_batch()
  names = (
    "logps",
    "ref_logps",
    "values",
    "rewards",
    "action_mask",
    "decision_mask",
  )
  counts = {k: v for k, v in counts_of(batch).items() if k.endswith("_count")}

  @functools.partial(jax.jit, compiler_options=FAST)
  def oreo(arrays, ids):
    return losses.oreo_loss(
      *arrays, beta=0.3, alpha=0.1, hinge=0.4, segment_ids=ids, **counts
    )

  def rows(span):
    arrays = [to_jax(batch[name][span]) for name in names]
    return oreo(arrays, to_jax(batch["segment_ids"][span]))

  expected, *cut = (rows(slice(*x)) for x in ((0, 8), (0, 1), (1, 8)))
  for x, a, b in zip(*map(jax.tree.leaves, (expected, *cut)), strict=True):
    np.testing.assert_allclose(a + b, x, rtol=1e-5, atol=1e-6)


def test_jit_changes_nothing():
  _, batch, expected = packed_batch()
  arrays = {k: to_jax(v) for k, v in batch.items() if k != "where"}
  got = totals(arrays["logps"], arrays["values"], arrays, {})
  np.testing.assert_allclose(got, expected[0], rtol=1e-5)


def test_eight_devices_equal_one():
  """The batch sharded over its rows."""
  _, batch, expected = packed_batch()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharded = {
    k: jax.device_put(to_jax(v), NamedSharding(mesh, P("data")))
    for k, v in batch.items()
    if k != "where"
  }
  assert len(sharded["logps"].sharding.device_set) == 8
  got = compiled(sharded, {})
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
