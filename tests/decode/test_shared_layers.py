"""A critic that goes on from the policy's first layers: the same search."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chain, tiny

from oreo_jax import models
from oreo_jax.config import SamplingConfig
from oreo_jax.decode import (
  Stops,
  Strategy,
  best_of,
  by_mean_value,
  look_ahead_search,
  make_plan,
  search,
)
from oreo_jax.decode.admit import empty_beams
from oreo_jax.decode.layout import make_layout

KEY = jax.random.key(5)
VOCAB = 24
LAYERS, DEPTH = 4, 3
CONFIG = dataclasses.replace(
  tiny.MODEL, vocab_size=VOCAB, num_layers=LAYERS, tie_embeddings=False
)
ENDS = np.isin(np.arange(VOCAB), np.arange(1, 9))  # tokens that end a step
STOPS = Stops(ENDS.astype(np.int8)[None])  # one state
LIMITS = {"max_steps": 4, "max_step_tokens": 4}
MAX_NEW_TOKENS = 11
PROMPTS = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11, 3, 3, 8, 1]]


def slow(*values, **options):
  return pytest.param(*values, marks=pytest.mark.slow, **options)


@functools.cache
def networks(depth=DEPTH, seed=0):
  """A policy, and a critic with the same embedding and first layers."""
  policy = tiny.draw_params(CONFIG, scale=1.5, seed=seed)
  critic = tiny.draw_params(CONFIG, head="value", seed=seed + 1)
  layers = jax.tree.map(
    lambda x, y: jnp.concatenate([x[:depth], y[depth:]]),
    policy["layers"],
    critic["layers"],
  )
  embedding = policy["embedding"] + 0  # another array of the same numbers
  return policy, {**critic, "layers": layers, "embedding": embedding}


def plan_of(policy, critic, strategy, config=CONFIG, **options):
  return make_plan(
    policy,
    critic,
    KEY,
    config,
    strategy=strategy,
    stops=STOPS,
    eos_ids=(chain.EOS, 10),
    max_new_tokens=MAX_NEW_TOKENS,
    **options,
  )


def assert_same_search(got, want):
  for name in ("tokens", "lengths", "finished"):
    np.testing.assert_array_equal(
      getattr(got.answers, name), getattr(want.answers, name)
    )
  np.testing.assert_array_equal(got.proposed, want.proposed)
  for name in ("values", "scores"):
    np.testing.assert_allclose(
      getattr(got, name), getattr(want, name), rtol=0, atol=2e-5
    )


STRATEGIES = [
  Strategy(beams=2, branches=3, **LIMITS),
  slow(best_of(3, score=by_mean_value, keep_candidates=True)),
  slow(look_ahead_search(2, 2, prior_weight=0.1, **LIMITS)),
  slow(dataclasses.replace(look_ahead_search(3, 2, **LIMITS), beams=2)),
]


@pytest.mark.parametrize("granularity", ["token", slow("step")])
@pytest.mark.parametrize(
  "strategy", STRATEGIES, ids=["beam", "best_of", "tree", "beams_of_trees"]
)
def test_a_search_is_the_same(strategy, granularity):
  policy, critic = networks()
  # Four slots for six questions: two wait until others are done.
  run = functools.partial(search, prompts=PROMPTS, slots=4)
  plans = [
    plan_of(policy, each, strategy, granularity=granularity)
    for each in (models.share_trunk(critic, policy), critic)
  ]
  assert [plan.shared_layers for plan in plans] == [DEPTH, 0]
  shared, whole = (run(plan) for plan in plans)
  assert_same_search(shared, whole)
  # Some answers have several steps, some have ended by themselves.
  assert 0 < whole.answers.finished.sum() < len(PROMPTS)
  assert whole.answers.lengths.max() > LIMITS["max_step_tokens"]
  if strategy.keep_candidates:
    np.testing.assert_array_equal(
      shared.candidates.tokens, whole.candidates.tokens
    )
    np.testing.assert_allclose(
      shared.candidate_scores, whole.candidate_scores, rtol=0, atol=2e-5
    )


@pytest.mark.slow
def test_values_are_those_of_the_whole_critic():
  policy, critic = networks()
  plan = plan_of(policy, models.share_trunk(critic, policy), STRATEGIES[0])
  found = search(plan, PROMPTS, slots=4)
  seen = set()
  for row, prompt in enumerate(PROMPTS):
    answers = found.answers
    read = int(answers.lengths[row] - answers.finished[row])
    seen.add((read == 0, bool(answers.finished[row])))
    text = [*prompt, *answers.tokens[row, :read].tolist()]
    hidden = models.apply(critic, jnp.asarray([text]), CONFIG).hidden
    want = models.values(critic, hidden)[0, -1]
    np.testing.assert_allclose(found.values[row], want, rtol=0, atol=2e-5)
  assert {(False, False), (False, True)} <= seen


@pytest.mark.parametrize("tensor", [1, slow(2)])
def test_a_search_on_eight_devices_is_the_same(tensor):
  policy, critic = networks()
  strategy = STRATEGIES[0]
  one = search(plan_of(policy, critic, strategy), PROMPTS, slots=6)
  training = tiny.mesh(data=2, fsdp=4)
  layout = make_layout(
    CONFIG, training, SamplingConfig(tensor=tensor), heads=("lm", "value")
  )
  placed = layout.place(tiny.place(policy, CONFIG, training))
  beside = layout.place(
    tiny.place(critic, CONFIG, training, head="value"), beside=placed
  )
  with jax.set_mesh(layout.mesh):
    plan = plan_of(placed, beside, strategy, layout.model)
    assert plan.shared_layers == DEPTH
    many = search(plan, PROMPTS, slots=6)
  assert_same_search(many, one)


def size(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_weights_and_caches_are_held_once():
  policy, critic = networks()
  strategy = STRATEGIES[0]
  shared = models.share_trunk(critic, policy)
  trunk = shared["trunk"]
  assert trunk["embedding"] is policy["embedding"]
  for ours, theirs in zip(
    *map(jax.tree.leaves, (trunk["layers"], policy["layers"])), strict=True
  ):
    assert ours is theirs
  own = {name: x for name, x in shared.items() if name != "trunk"}
  a_layer = size(critic["layers"]) // LAYERS
  assert (
    size(critic) - size(own) == DEPTH * a_layer + policy["embedding"].nbytes
  )
  states = [
    empty_beams(plan_of(policy, each, strategy), 5, 7)
    for each in (shared, critic)
  ]
  for name in ("critic_prompts", "critic_cache"):
    ours, whole = (getattr(state, name) for state in states)
    for x, y in zip(*map(jax.tree.leaves, (ours, whole)), strict=True):
      if x.ndim > 1:
        assert x.nbytes * LAYERS == y.nbytes * (LAYERS - DEPTH)


@pytest.mark.slow
def test_weights_in_eight_bits_are_shared_too():
  policy, critic = networks()
  settings = SamplingConfig(weights="int8")
  layout = make_layout(CONFIG, tiny.mesh(), settings)
  placed = layout.place(tiny.place(policy, CONFIG, tiny.mesh()))
  critic = tiny.place(critic, CONFIG, tiny.mesh(), head="value")
  whole, shared = (layout.place(critic, beside=each) for each in (None, placed))
  plans = [
    plan_of(placed, each, STRATEGIES[0], layout.model)
    for each in (shared, whole)
  ]
  assert [plan.shared_layers for plan in plans] == [DEPTH, 0]
  assert_same_search(*(search(plan, PROMPTS, slots=6) for plan in plans))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
  "depth, want", [(1, 1), (DEPTH, DEPTH), (LAYERS, LAYERS - 1)]
)
def test_as_many_layers_are_shared_as_are_alike_but_the_last(
  depth, want, apart
):
  (policy, critic), _ = arranged(networks(depth), apart)
  assert models.common_layers(critic, policy) == depth
  own, config = models.layers_above(models.share_trunk(critic, policy), CONFIG)
  assert models.count_layers(own) == config.num_layers == LAYERS - want


def test_nothing_is_shared_where_the_first_layer_or_embedding_differs():
  policy, critic = networks()
  flipped = critic["layers"]["up"]["kernel"].at[0, 0, 0].add(1e-3)
  layers = {**critic["layers"], "up": {"kernel": flipped}}
  for other in (
    {**critic, "layers": layers},
    {**critic, "embedding": critic["embedding"].at[0, 0].add(1e-3)},
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), critic),
  ):
    assert models.common_layers(other, policy) == 0
    assert models.share_trunk(other, policy) is other
    assert plan_of(policy, other, STRATEGIES[0]).shared_layers == 0


def arranged(params, apart):
  """Returns (networks, their config), stacked or with layers apart."""
  if not apart:
    return params, CONFIG
  both = [models.unstack_layers(each, CONFIG) for each in params]
  return [each for each, _ in both], both[0][1]


@pytest.mark.parametrize("apart", [False, True])
def test_packed_rows_are_read_the_same(apart):
  (policy, critic), config = arranged(networks(), apart)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 9)).astype(np.int32)
  segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9], np.int32)
  ours, theirs = (
    models.values(
      each, models.apply(each, tokens, config, segment_ids=segments).hidden
    )
    for each in (models.share_trunk(critic, policy), critic)
  )
  np.testing.assert_allclose(
    ours[segments > 0], theirs[segments > 0], rtol=0, atol=2e-5
  )
  assert np.ptp(theirs) > 0.1


def test_a_critic_on_another_policy_is_refused():
  policy, critic = networks()
  shared = models.share_trunk(critic, policy)
  other = {**policy, "embedding": policy["embedding"] + 0}
  with pytest.raises(ValueError, match="layers of this very policy"):
    plan_of(other, shared, STRATEGIES[0])
  with pytest.raises(ValueError, match="take `layers_above` of them"):
    models.prefill(
      shared, jnp.ones((1, 2), jnp.int32), CONFIG, lengths=jnp.array([2])
    )
  own, _ = models.layers_above(shared, CONFIG)
  with pytest.raises(ValueError, match="num_layers: expected 1, the layers of"):
    models.prefill(
      own, jnp.ones((1, 2), jnp.int32), CONFIG, lengths=jnp.array([2])
    )
