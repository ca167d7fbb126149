"""Every strategy against plain Python, and slots that are refilled."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import chain, turns
from oracles import search as oracle

from oreo_jax.decode import (
  Stops,
  Strategy,
  best_of,
  best_of_actions,
  by_logp,
  by_mean_value,
  by_min_value,
  look_ahead_search,
  majority_vote,
  make_plan,
  mixture,
  search,
  vote_weights,
)

KEY = jax.random.key(5)
VOCAB = 24
CONFIG = chain.model_config(VOCAB)
EOS = chain.EOS
ENDS = np.isin(np.arange(VOCAB), np.arange(1, 9))  # tokens that end a step
STOPS = Stops(ENDS.astype(np.int8)[None])  # one state
LIMITS = {"max_steps": 4, "max_step_tokens": 3}
MAX_NEW_TOKENS = 9
PROMPTS = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def random_chain(seed):
  """A random policy with up to three ways at a fork, and random values."""
  rng = np.random.default_rng(seed)
  follow = {}
  for token in range(1, VOCAB):
    ways = rng.choice(np.arange(1, VOCAB), rng.integers(1, 4), replace=False)
    if rng.random() < 0.25:
      ways[rng.integers(len(ways))] = EOS
    follow[token] = ways.tolist()
  # Two scores are alike where they are of one text, and nowhere else.
  return follow, 0.9137 * rng.permutation(VOCAB) / VOCAB


def plan_of(policy, critic, strategy, **options):
  return make_plan(
    policy,
    critic,
    KEY,
    CONFIG,
    strategy=strategy,
    stops=STOPS,
    eos_ids=(EOS,),
    max_new_tokens=MAX_NEW_TOKENS,
    **options,
  )


TURNS = turns.Turns()


def run(strategy, *, seeds=6, granularity="token", **rules):
  """Yields (searched, plain) for the questions of random chains."""
  for seed in range(seeds):
    follow, values = random_chain(seed)
    plan = plan_of(
      chain.make_policy(CONFIG, chain.table_logits(VOCAB, follow, slope=0.5)),
      chain.make_critic(CONFIG, values),
      strategy,
      granularity=granularity,
    )
    # Four slots for six questions: two wait until others are done.
    with TURNS.taken(strategy.proposals):
      searched = search(plan, PROMPTS, slots=4)
    tree = strategy.lookahead
    plain = [
      oracle.search(
        prompt,
        oracle.Rules(
          follow=follow,
          value=values,
          ends=lambda answer: bool(ENDS[answer[-1]]),
          eos=EOS,
          beams=strategy.beams,
          branches=strategy.proposals,
          max_steps=strategy.max_steps,
          max_step_tokens=strategy.max_step_tokens,
          max_new_tokens=MAX_NEW_TOKENS,
          granularity=granularity,
          whole_answers=strategy.whole_answers,
          depth=tree.depth if tree else 1,
          prior_weight=tree.prior_weight if tree else 0.0,
          **rules,
        ),
      )
      for prompt in PROMPTS
    ]
    yield searched, plain


def check(searched, plain):
  for row, want in enumerate(plain):
    tokens = searched.answers.tokens[row, : searched.answers.lengths[row]]
    assert tuple(tokens.tolist()) == want.answer.tokens, row
    assert searched.answers.finished[row] == want.answer.finished
    assert searched.proposed[row] == want.proposed
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(searched.values[row], want.answer.value, **close)
    np.testing.assert_allclose(searched.scores[row], want.score, **close)
    np.testing.assert_allclose(
      searched.answers.logps[row].sum(), want.answer.logp, **close
    )
  return [want.answer.tokens for want in plain]


@pytest.mark.parametrize(
  "beams, branches", [(2, 3), slow(3, 2), slow(4, 1)], ids=str
)
def test_beams_and_branches(beams, branches):
  strategy = Strategy(beams=beams, branches=branches, **LIMITS)
  for searched, plain in run(strategy, seeds=4):
    check(searched, plain)


SCORES = {
  "min": (by_min_value, lambda answer: min(answer.values)),
  "logp": (by_logp, lambda answer: answer.logp),
  "mixture": (
    mixture(0.25),
    lambda answer: answer.value + 0.25 * answer.logp,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["token", "step"])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_a_beam(name, granularity):
  score, rank = SCORES[name]
  strategy = Strategy(beams=2, branches=3, score=score, **LIMITS)
  for searched, plain in run(
    strategy, seeds=3, granularity=granularity, rank=rank
  ):
    check(searched, plain)


@pytest.mark.parametrize("granularity", [slow("token"), "step"])
def test_best_of_n_and_votes(granularity):
  strategy = best_of(3, keep_candidates=True)
  voted = set()
  for searched, plain in run(strategy, granularity=granularity):
    check(searched, plain)
    answers = searched.candidates.answers()
    for row, want in enumerate(plain):
      mine = answers[row * 3 : row * 3 + 3]
      finals = [int(a[-1]) if len(a) else None for a in mine]
      finished = searched.candidates.finished[row * 3 : row * 3 + 3]
      ended = [w.tokens[: len(w.tokens) - w.finished] for w in want.last]
      assert [tuple(a.tolist()) for a in mine] == ended
      assert finished.tolist() == [w.finished for w in want.last]
      scores = searched.candidate_scores[row]
      np.testing.assert_allclose(
        scores, [w.value for w in want.last], atol=1e-5
      )
      # The heaviest group of equal ends among those that finished, by hand.
      for weights in (np.ones(3), vote_weights(scores)):
        elected = majority_vote(finals, weights, finished)
        groups = {}
        for final, weight, done in zip(finals, weights, finished, strict=True):
          if done and final is not None:
            groups[final] = groups.get(final, 0.0) + weight
        if groups:
          heaviest = max(groups.values())
          assert groups[finals[elected]] == pytest.approx(heaviest)
          voted.add(len(groups))
  assert voted >= {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["token", "step"])
@pytest.mark.parametrize(
  "score, rank",
  [
    (by_min_value, lambda answer: min(answer.values)),
    (by_mean_value, lambda answer: np.mean(answer.values)),
  ],
  ids=["min", "mean"],
)
def test_best_of_n_by_all_states(score, rank, granularity):
  strategy = best_of(3, score=score, keep_candidates=True)
  for searched, plain in run(
    strategy, seeds=4, granularity=granularity, rank=rank
  ):
    for row, want in enumerate(plain):
      scores = [rank(answer) for answer in want.last]
      np.testing.assert_allclose(
        searched.candidate_scores[row], scores, atol=1e-5
      )
      np.testing.assert_allclose(searched.scores[row], want.score, atol=1e-5)


@pytest.mark.slow
def test_best_of_k_actions():
  strategy = best_of_actions(3, **LIMITS)
  assert strategy == Strategy(beams=1, branches=3, **LIMITS)
  for searched, plain in run(strategy):
    check(searched, plain)


@pytest.mark.parametrize(
  "depth, prior_weight",
  [
    (2, 0.5),
    *(slow(d, w) for d in (1, 2, 3) for w in (0.0, 0.5) if (d, w) != (2, 0.5)),
  ],
)
def test_lookahead(depth, prior_weight):
  strategy = look_ahead_search(depth, 3, prior_weight=prior_weight, **LIMITS)
  chosen = []
  for searched, plain in run(strategy, seeds=3):
    chosen += check(searched, plain)
  near = [
    want.answer.tokens
    for _, plain in run(best_of_actions(3, **LIMITS), seeds=3)
    for want in plain
  ]
  # Deeper trees choose other answers; a tree of one step is best-of-K.
  assert (chosen == near) == (depth == 1 and not prior_weight)


@pytest.mark.slow
def test_lookahead_of_several_beams():
  strategy = dataclasses.replace(
    look_ahead_search(2, 2, prior_weight=0.5, **LIMITS), beams=2
  )
  for searched, plain in run(strategy, seeds=3):
    check(searched, plain)


def test_what_a_strategy_refuses():
  with pytest.raises(ValueError, match="prior_weight: expected 0 or more"):
    look_ahead_search(2, 2, prior_weight=-1.0)
  with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
    look_ahead_search(0, 2)
  with pytest.raises(ValueError, match="keep_candidates: "):
    Strategy(keep_candidates=True)
  with pytest.raises(ValueError, match="stops: expected where a step ends"):
    make_plan(
      None,
      None,
      KEY,
      CONFIG,
      strategy=Strategy(score=by_logp),
      stops=None,
      eos_ids=(EOS,),
      max_new_tokens=4,
    )
  assert mixture(0.5) == mixture(0.5) and hash(mixture(1)) == hash(mixture(1.0))
