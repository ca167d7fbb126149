"""The losses against the closed-form optimum of a random token tree."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oreo_jax import losses

# Compiles in a third of the time; these functions run once or twice.
jit_quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

BETA = 0.5
BRANCHES = 3
DEPTH = 3
END = 0  # this token ends an answer; at the last depth every token does
LEVELS = ("token", "step", "response")


class Tree(NamedTuple):
  paths: tuple  # every answer, a tuple of tokens
  nodes: dict  # prefix -> row of the tables below
  ref: np.ndarray  # [nodes, BRANCHES] log-probabilities
  policy: np.ndarray  # [nodes, BRANCHES] probabilities, the optimum
  value: np.ndarray  # [nodes], the optimum
  rewards: np.ndarray  # [paths]


def grow_tree(seed) -> Tree:
  """A tree with its optimum, computed backwards from the leaves (float64)."""
  rng = np.random.default_rng(seed)
  nodes, paths, ref, policy, value = {}, [], {}, {}, {}
  reward = {}

  def visit(prefix):
    node = nodes.setdefault(prefix, len(nodes))
    logits = rng.normal(size=BRANCHES)
    ref[node] = logits - np.log(np.exp(logits).sum())
    q = np.zeros(BRANCHES)
    for token in range(BRANCHES):
      path = (*prefix, token)
      if token == END or len(path) == DEPTH:
        paths.append(path)
        reward[path] = q[token] = rng.uniform()
      else:
        q[token] = visit(path)
    value[node] = BETA * np.log(np.exp(ref[node] + q / BETA).sum())
    policy[node] = np.exp(ref[node] + (q - value[node]) / BETA)
    return value[node]

  visit(())

  def table(rows):
    return np.stack([rows[i] for i in range(len(nodes))])

  return Tree(
    paths=tuple(paths),
    nodes=nodes,
    ref=table(ref),
    policy=table(policy),
    value=table(value),
    rewards=np.asarray([reward[p] for p in paths]),
  )


def lay_out(tree, level, *, packed=False, gaps=False):
  """Arrays of all paths; `gaps` puts an observation after every action."""
  sequences = []
  for path, reward in zip(tree.paths, tree.rewards, strict=True):
    rows = []
    for t, token in enumerate(path):
      decision = {
        "token": True,
        "step": t in (0, 2),
        "response": t == 0,
      }[level]
      node = tree.nodes[path[:t]]
      rows.append((node, token, True, decision, 0.0))
      if gaps:
        rows.append((node, 1, False, False, 0.0))
    last = max(i for i, row in enumerate(rows) if row[2])
    rows[last] = (*rows[last][:4], reward)
    sequences.append(rows)
  if packed:  # three sequences a row
    grouped = [sequences[i : i + 3] for i in range(0, len(sequences), 3)]
  else:
    grouped = [[s] for s in sequences]
  length = max(sum(map(len, row)) for row in grouped) + 1
  shape = (len(grouped), length)
  node, token, segment = (np.zeros(shape, np.int32) for _ in range(3))
  action, decision = np.zeros(shape, bool), np.zeros(shape, bool)
  rewards = np.zeros(shape, np.float32)
  for b, row in enumerate(grouped):
    t = 0
    for k, sequence in enumerate(row):
      for cell in sequence:
        node[b, t], token[b, t], action[b, t], decision[b, t] = cell[:4]
        rewards[b, t], segment[b, t] = cell[4], k + 1
        t += 1
  return {
    "node": node,
    "token": token,
    "rewards": rewards,
    "action_mask": action,
    "decision_mask": decision,
    "segment_ids": segment if packed else None,
  }


def evaluate_arrays(loss, arrays, logps, ref_logps, values, **options):
  """Calls a loss on the arrays of `lay_out`."""
  masks = ("rewards", "action_mask", "decision_mask")
  return loss(
    logps,
    ref_logps,
    values,
    *(jnp.asarray(arrays[name]) for name in masks),
    beta=BETA,
    segment_ids=arrays["segment_ids"],
    **options,
  )


def evaluate(loss, tree, data, logits, values, **options):
  """Calls a loss with a tabular policy and value."""
  node, token = data["node"], data["token"]
  return evaluate_arrays(
    loss,
    data,
    jax.nn.log_softmax(logits)[node, token],
    jnp.asarray(tree.ref, jnp.float32)[node, token],
    values[node],
    **options,
  )


def descend(objective, params, *, steps=2500, lr=0.03):
  optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps))

  @jax.jit
  def run(params):
    def step(carry, _):
      params, state = carry
      grads = jax.grad(objective)(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(
      step, (params, optimizer.init(params)), None, length=steps
    )[0][0]

  with jax.numpy_dtype_promotion("standard"):  # optax needs it
    return run(params)


def start(tree):
  return {
    "logits": jnp.asarray(tree.ref, jnp.float32),
    "values": jnp.zeros(len(tree.nodes)),
  }


def check_optimum(tree, data, params):
  probs = np.asarray(jax.nn.softmax(params["logits"]))
  distance = 0.5 * np.abs(probs - tree.policy).sum(axis=1).max()
  nodes = data["node"][data["decision_mask"]]
  error = np.abs(np.asarray(params["values"]) - tree.value)[nodes].max()
  assert distance < 0.02, (distance, error)
  assert error < 0.02, (distance, error)


@pytest.mark.parametrize("level", LEVELS)
def test_oreo_reaches_the_optimum(level):
  tree = grow_tree(0)
  data = lay_out(tree, level, packed=True)
  params = descend(
    lambda p: evaluate(losses.oreo_loss, tree, data, **p).total, start(tree)
  )
  check_optimum(tree, data, params)


@pytest.mark.parametrize("single_step", [False, True])
def test_oreo_reaches_the_optimum_across_observations(single_step):
  tree = grow_tree(1)
  data = lay_out(tree, "token", gaps=True)
  loss = functools.partial(losses.oreo_loss, single_step=single_step)
  params = descend(lambda p: evaluate(loss, tree, data, **p).total, start(tree))
  check_optimum(tree, data, params)


@pytest.mark.parametrize("lambda_", [1.0, 0.6])
def test_dqo_reaches_the_optimum(lambda_):
  tree = grow_tree(2)
  data = lay_out(tree, "token", packed=True)
  loss = functools.partial(losses.dqo_loss, lambda_=lambda_)
  params = descend(lambda p: evaluate(loss, tree, data, **p).total, start(tree))
  check_optimum(tree, data, params)


@jit_quickly
def residual_losses(arrays, logps, ref_logps, values):
  """All value and policy losses that must vanish at the optimum."""
  call = functools.partial(
    evaluate_arrays, arrays=arrays, logps=logps, ref_logps=ref_logps
  )
  oreo = functools.partial(call, losses.oreo_loss, values=values)
  dqo = functools.partial(call, losses.dqo_loss, values=values)
  outs = {
    "sequence": oreo(),
    "token": oreo(reduction="token"),
    "single_step": oreo(single_step=True),
    "importance": oreo(importance_cap=2.7),
    **{f"lambda {x}": dqo(lambda_=x) for x in (0.0, 0.5, 1.0)},
  }
  return {name: (out.value, out.policy) for name, out in outs.items()}


@pytest.mark.parametrize("packed_and_gaps", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_no_residual_at_the_optimum(level, packed_and_gaps):
  tree = grow_tree(3)
  data = lay_out(tree, level, packed=packed_and_gaps, gaps=packed_and_gaps)
  node, token = data.pop("node"), data.pop("token")
  policy, ref, value = (
    jnp.asarray(x, jnp.float32)
    for x in (
      np.log(tree.policy)[node, token],
      tree.ref[node, token],
      tree.value[node],
    )
  )
  for name, out in residual_losses(data, policy, ref, value).items():
    assert max(out) < 1e-11, (name, out)
  # The same losses do see a policy that is not the optimum.
  for name, out in residual_losses(data, ref, ref, value).items():
    assert min(out) > 1e-3, (name, out)


@jit_quickly
def oreo_and_dqo(arrays, logps, ref_logps, values):
  """Losses and gradients of OREO and of DQO's special case."""
  dqo = functools.partial(losses.dqo_loss, lambda_=1.0, importance_cap=None)

  def total(loss, logps, values):
    return evaluate_arrays(
      loss, arrays, logps, ref_logps, values, alpha=0.2
    ).total

  return [
    jax.value_and_grad(functools.partial(total, loss), (0, 1))(logps, values)
    for loss in (losses.oreo_loss, dqo)
  ]


@pytest.mark.parametrize("level", LEVELS)
def test_dqo_with_monte_carlo_returns_is_oreo(level):
  tree = grow_tree(4)
  data = lay_out(tree, level, packed=True, gaps=True)
  shape = data.pop("node").shape
  del data["token"]
  keys = jax.random.split(jax.random.key(0), 3)
  oreo, dqo = oreo_and_dqo(data, *(jax.random.normal(k, shape) for k in keys))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
    dqo,
    oreo,
  )


def test_response_oreo_and_soft_dpo_share_their_minimiser():
  tree = grow_tree(5)
  data = lay_out(tree, "response")
  oreo = descend(
    lambda p: evaluate(losses.oreo_loss, tree, data, **p).total, start(tree)
  )
  first, second = np.triu_indices(len(tree.paths), k=1)
  gap = tree.rewards[first] - tree.rewards[second]
  probs = jnp.asarray(1.0 / (1.0 + np.exp(-gap)), jnp.float32)

  def answers(log_probs):
    return losses.sequence_logps(
      log_probs[data["node"], data["token"]], jnp.asarray(data["action_mask"])
    ).logps

  ref = answers(jnp.asarray(tree.ref, jnp.float32))

  def preference(params):
    logps = answers(jax.nn.log_softmax(params["logits"]))
    return losses.dpo_loss(
      logps[first],
      logps[second],
      ref[first],
      ref[second],
      beta=BETA,
      label_smoothing=1.0 - probs,
    ).total

  dpo = descend(preference, {"logits": start(tree)["logits"]})

  def distribution(params):
    return np.exp(answers(jax.nn.log_softmax(params["logits"])))

  np.testing.assert_allclose(distribution(oreo).sum(), 1.0, rtol=1e-5)
  difference = np.abs(distribution(oreo) - distribution(dpo)).sum() / 2
  moved = np.abs(distribution(oreo) - np.exp(ref)).sum() / 2
  assert difference < 0.005 < 0.1 < moved, (difference, moved)
  check_optimum(tree, data, {**dpo, "values": oreo["values"]})


def test_token_level_blames_the_bad_step():
  """Two good steps, then a bad one: 0.25 -> 0.5 -> 1 in value, reward 0."""
  # Each of three steps succeeds with 0.5, so that good steps double the value.
  values = jnp.asarray([[0.25, 0.5, 1.0]])
  logps = jnp.log(jnp.full((1, 3), 0.5))
  mask = jnp.ones((1, 3), bool)

  def push(decisions):
    """Descent direction of the log-probability of each step."""
    loss = functools.partial(losses.policy_loss, beta=1.0)
    grads = jit_quickly(jax.grad(loss))(
      logps, logps, values, jnp.zeros((1,)), mask, decisions
    )
    return -grads[0]

  # -2 * (V_t - R) / 3 decision points against -2 * V_0 for the whole response.
  np.testing.assert_allclose(push(mask), [-1 / 6, -1 / 3, -2 / 3], rtol=1e-6)
  response = jnp.asarray([[True, False, False]])
  np.testing.assert_allclose(push(response), [-0.5] * 3, rtol=1e-6)
