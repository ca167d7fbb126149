"""DPO, IPO, cDPO and KTO: tables worked by hand, oracle, packed answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cases
from oracles import preference as oracle
from oracles.oreo import gradient

from oreo_jax import losses

# Answers 2i and 2i + 1 are a pair; pairs stand together in a packed row.
PAIRED = ((2, 3), (0, 1, 6, 7), (), (4, 5))
SLOTS = 4


def to_jax(x):
  x = np.asarray(x)
  return jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype)


def pairs(seed, count=5, size=2.0):
  """chosen, rejected and their reference, [P] each."""
  rng = np.random.default_rng(seed)
  return [-10 + size * rng.normal(size=count) for _ in range(4)]


DPO = {
  "dpo": {},
  "cdpo": {"label_smoothing": 0.2},
  "ipo": {"loss_type": "ipo"},
  "smooth ipo": {"loss_type": "ipo", "label_smoothing": 0.3},
}


def dpo_reference(option, chosen, rejected, ref_chosen, ref_rejected, beta):
  up = [float(x - y) for x, y in zip(chosen, ref_chosen, strict=True)]
  down = [float(x - y) for x, y in zip(rejected, ref_rejected, strict=True)]
  options = dict(DPO[option])
  if options.pop("loss_type", None):
    return oracle.ipo_loss(up, down, beta=beta, **options)
  return oracle.dpo_loss(up, down, beta=beta, **options)


@pytest.mark.parametrize("size", [0.0, 1.0, 400.0])
@pytest.mark.parametrize("option", DPO)
def test_dpo_matches_oracle(option, size):
  """Also for policy = reference (size 0) and for saturated margins."""
  arrays = pairs(1, size=size)
  given = [to_jax(x) for x in arrays]
  rounded = [np.asarray(x, np.float64) for x in given]

  def total(*arrays):
    return losses.dpo_loss(*arrays, beta=0.1, **DPO[option]).total

  loss, got = jax.value_and_grad(total, (0, 1, 2, 3))(*given)
  np.testing.assert_allclose(
    loss, dpo_reference(option, *rounded, 0.1), rtol=3e-5
  )
  for i in (0, 1):
    expected = gradient(
      lambda x, i=i: dpo_reference(
        option, *rounded[:i], x, *rounded[i + 1 :], 0.1
      ),
      rounded[i],
      np.ones(5, bool),
      step=1e-3,
    )
    np.testing.assert_allclose(got[i], expected, rtol=1e-3, atol=1e-6)
  np.testing.assert_array_equal(got[2], 0)
  np.testing.assert_array_equal(got[3], 0)


# beta 1/2 and log ratios 1 and -1, then 0 and 2: margins 2 and -2.
DPO_HAND = ([-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0], [-2.0, -3.0])
DPO_TABLE = [
  # log(1 + exp(-1)) = 0.3132617, log(1 + exp(1)) = 1.3132617.
  ({}, (0.3132617 + 1.3132617) / 2),
  (
    {"label_smoothing": 0.25},
    (0.75 * 0.3132617 + 0.25 * 1.3132617) / 2
    + (0.75 * 1.3132617 + 0.25 * 0.3132617) / 2,
  ),
  # (2 - 1)^2 and (-2 - 1)^2.
  ({"loss_type": "ipo"}, (1 + 9) / 2),
  # Only the first pair, with a certain label and with one of 3 in 4.
  ({"mask": [True, False]}, 0.3132617),
  (
    {"mask": [True, False], "label_smoothing": [0.25, 0.9]},
    0.75 * 0.3132617 + 0.25 * 1.3132617,
  ),
]


@pytest.mark.parametrize("options, expected", DPO_TABLE)
def test_dpo_worked_by_hand(options, expected):
  options = {
    k: jnp.asarray(v) if isinstance(v, list) else v for k, v in options.items()
  }
  got = losses.dpo_loss(*map(jnp.asarray, DPO_HAND), beta=0.5, **options)
  np.testing.assert_allclose(got.total, expected, rtol=1e-6)


def test_dpo_reports_rewards_under_their_usual_names():
  metrics = losses.dpo_loss(*map(jnp.asarray, DPO_HAND), beta=0.5).metrics
  for name, expected in {
    "rewards/chosen": 0.25,  # beta * mean(1, 0)
    "rewards/rejected": 0.25,  # beta * mean(-1, 2)
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.5,
  }.items():
    np.testing.assert_allclose(metrics[name], expected, atol=1e-7, err_msg=name)


# beta 1/2, z0 1, log ratios 3, 1, -1 of two good answers and a bad one:
# sigmoid(1) = 0.7310586, sigmoid(0) = 0.5, and sigmoid(1/2 * (1 + 1)).
KTO_TABLE = [
  ({}, ((1 - 0.7310586) + 0.5 + (1 - 0.7310586)) / 3),
  (
    {"desirable_weight": 2.0, "undesirable_weight": 0.5},
    (2 * (1 - 0.7310586) + 2 * 0.5 + 0.5 * (1 - 0.7310586)) / 3,
  ),
  ({"mask": [False, True, True]}, (0.5 + (1 - 0.7310586)) / 2),
]


@pytest.mark.parametrize("options, expected", KTO_TABLE)
def test_kto_worked_by_hand(options, expected):
  options = {
    k: jnp.asarray(v) if isinstance(v, list) else v for k, v in options.items()
  }
  got = losses.kto_loss(
    jnp.asarray([-1.0, -2.0, -5.0]),
    jnp.asarray([-4.0, -3.0, -4.0]),
    jnp.asarray([True, True, False]),
    jnp.float32(1.0),
    beta=0.5,
    **options,
  )
  np.testing.assert_allclose(got.total, expected, rtol=1e-6)


@pytest.mark.parametrize("labels", ["mixed", "all good", "all bad"])
@pytest.mark.parametrize("z0", [0.0, 0.7, 500.0])
def test_kto_matches_oracle(z0, labels):
  logps, ref_logps, *_ = pairs(2, count=6)
  good = {
    "mixed": np.array([True, False, False, True, True, False]),
    "all good": np.ones(6, bool),
    "all bad": np.zeros(6, bool),
  }[labels]
  weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}

  def total(logps, ref_logps, z0):
    return losses.kto_loss(
      logps, ref_logps, jnp.asarray(good), z0, beta=0.2, **weights
    ).total

  loss, got = jax.value_and_grad(total, (0, 1, 2))(
    to_jax(logps), to_jax(ref_logps), jnp.float32(z0)
  )

  def reference(logps):
    return oracle.kto_loss(logps - ref_logps, good, z0, beta=0.2, **weights)

  np.testing.assert_allclose(loss, reference(logps), rtol=2e-5, atol=1e-7)
  expected = gradient(reference, logps, np.ones(6, bool))
  np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-6)
  np.testing.assert_array_equal(got[1], 0)
  assert float(got[2]) == 0


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_kto_z0_is_a_mean_cut_at_zero_without_gradient(shift):
  logps, ref_logps, *_ = pairs(3)
  mask = np.array([True, True, False, True, False])
  loss, got = jax.value_and_grad(losses.kto_z0, (0, 1))(
    to_jax(logps + shift), to_jax(ref_logps), mask=jnp.asarray(mask)
  )
  expected = oracle.kto_z0(list((logps + shift - ref_logps)[mask]))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert (shift > 0) == (expected > 0)
  for x in got:
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("option", DPO)
def test_no_pairs_give_zero_and_finite_gradients(option):
  arrays = [to_jax(x) for x in pairs(4)]
  mask = jnp.zeros(5, bool)
  loss, got = jax.value_and_grad(
    lambda x: (
      losses.dpo_loss(x, *arrays[1:], beta=0.1, mask=mask, **DPO[option]).total
    )
  )(arrays[0])
  assert float(loss) == 0
  np.testing.assert_array_equal(got, 0)


def test_no_answers_give_zero_and_finite_gradients():
  logps, ref_logps, *_ = (to_jax(x) for x in pairs(5))
  mask = jnp.zeros(5, bool)
  assert float(losses.kto_z0(logps, ref_logps, mask=mask)) == 0
  loss, got = jax.value_and_grad(
    lambda x: (
      losses.kto_loss(
        x, ref_logps, mask, jnp.float32(0), beta=0.1, mask=mask
      ).total
    )
  )(logps)
  assert float(loss) == 0
  np.testing.assert_array_equal(got, 0)


def test_masked_entries_may_hold_anything():
  """Empty slots of packed rows: their content reaches neither loss."""
  arrays = pairs(6)
  mask = np.array([True, True, False, True, False])
  selected = [to_jax(x[mask]) for x in arrays]
  dirty = [to_jax(np.where(mask, x, np.nan)) for x in arrays]
  mask = jnp.asarray(mask)
  labels = jnp.asarray([True, False, True, True, False])
  np.testing.assert_allclose(
    losses.dpo_loss(*dirty, beta=0.1, mask=mask).total,
    losses.dpo_loss(*selected, beta=0.1).total,
    rtol=1e-6,
  )
  z0 = losses.kto_z0(dirty[2], dirty[3], mask=mask)
  np.testing.assert_allclose(z0, losses.kto_z0(*selected[2:]), rtol=1e-6)

  def kto(x):
    return losses.kto_loss(x, dirty[1], labels, z0, beta=0.1, mask=mask).total

  loss, got = jax.value_and_grad(kto)(dirty[0])
  expected = losses.kto_loss(
    selected[0], selected[1], labels[mask], z0, beta=0.1
  )
  np.testing.assert_allclose(loss, expected.total, rtol=1e-6)
  assert np.all(np.isfinite(got))


def sums(laid_out, num_segments=None):
  ids = laid_out["segment_ids"]
  return losses.sequence_logps(
    to_jax(laid_out["logps"]),
    to_jax(laid_out["action_mask"]),
    segment_ids=None if ids is None else to_jax(ids),
    num_segments=num_segments,
  )


@pytest.mark.parametrize("gap", [0, 1])
def test_sequence_logps_match_oracle(gap):
  sequences = cases.trajectories(31)
  for laid_out, slots in (
    (cases.unpacked(sequences, segment_ids=False), None),
    (cases.packed(sequences, rows=PAIRED, gap=gap), SLOTS),
    (cases.packed(sequences, rows=PAIRED), None),
  ):
    out = sums(laid_out, slots)
    expected = oracle.log_ratios(
      laid_out["logps"],
      np.zeros_like(laid_out["logps"]),
      laid_out["action_mask"],
      laid_out["segment_ids"],
    )
    logps, lengths = np.asarray(out.logps), np.asarray(out.lengths)
    for (b, k), value in expected.items():
      index = b if laid_out["segment_ids"] is None else (b, k - 1)
      np.testing.assert_allclose(logps[index], value, rtol=1e-5, atol=1e-7)
    assert lengths.sum() == laid_out["action_mask"].sum()
    np.testing.assert_array_equal(logps[lengths == 0], 0)


def evaluate(loss):
  """A loss and its gradient, jitted."""
  return jax.jit(
    jax.value_and_grad(loss),
    compiler_options={"xla_backend_optimization_level": 0},
  )


def packed_loss(name, laid_out, logps):
  """DPO or KTO from packed rows as the module's text describes."""
  ids, mask = to_jax(laid_out["segment_ids"]), to_jax(laid_out["action_mask"])
  own, ref = (
    losses.sequence_logps(x, mask, segment_ids=ids, num_segments=SLOTS)
    for x in (logps, to_jax(laid_out["ref_logps"]))
  )
  if name == "kto":
    labels = jnp.broadcast_to(jnp.arange(SLOTS) % 2 == 0, own.logps.shape)
    z0 = jnp.float32(0.1)
    mask = own.lengths > 0
    return losses.kto_loss(
      own.logps, ref.logps, labels, z0, beta=0.3, mask=mask
    )
  up, down = losses.split_pairs(own.lengths)
  return losses.dpo_loss(
    *losses.split_pairs(own.logps),
    *losses.split_pairs(ref.logps),
    beta=0.3,
    mask=(up > 0) & (down > 0),
    **DPO[name],
  )


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "kto"])
def test_packed_answers_equal_a_row_each(name):
  sequences = cases.trajectories(32)
  packed = cases.packed(sequences, rows=PAIRED, gap=1)
  single = cases.unpacked(sequences, segment_ids=False)
  mask = to_jax(single["action_mask"])
  ref = losses.sequence_logps(to_jax(single["ref_logps"]), mask).logps

  def unpacked_loss(logps):
    own = losses.sequence_logps(logps, mask).logps
    if name == "kto":
      labels = jnp.arange(8) % 2 == 0
      return losses.kto_loss(own, ref, labels, jnp.float32(0.1), beta=0.3)
    pair = own[0::2], own[1::2], ref[0::2], ref[1::2]
    return losses.dpo_loss(*pair, beta=0.3, **DPO[name])

  expected, expected_grad = evaluate(lambda x: unpacked_loss(x).total)(
    to_jax(single["logps"])
  )
  got, grad = evaluate(lambda x: packed_loss(name, packed, x).total)(
    to_jax(packed["logps"])
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  for x, y in zip(
    cases.gather(grad, packed), cases.gather(expected_grad, single), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
  # And both equal the oracle.
  ratios = oracle.log_ratios(
    single["logps"], single["ref_logps"], single["action_mask"]
  )
  ratios = [ratios[b, 1] for b in range(8)]
  if name == "kto":
    reference = oracle.kto_loss(ratios, [True, False] * 4, 0.1, beta=0.3)
  else:
    reference = dpo_reference(
      name, ratios[0::2], ratios[1::2], [0.0] * 4, [0.0] * 4, 0.3
    )
  np.testing.assert_allclose(got, reference, rtol=2e-5)


def test_bad_input_is_refused():
  arrays = [to_jax(x) for x in pairs(7)]
  with pytest.raises(ValueError):
    losses.dpo_loss(*arrays[:3], arrays[3][:-1], beta=0.1)
  with pytest.raises(ValueError, match="loss_type"):
    losses.dpo_loss(*arrays, beta=0.1, loss_type="square")
  with pytest.raises(ValueError):
    losses.kto_loss(
      arrays[0], arrays[1], jnp.ones(4, bool), jnp.float32(0), beta=0.1
    )
