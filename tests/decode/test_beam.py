"""Step beam search: against plain Python, greedy decoding and fresh values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from oracles import chain, tiny, turns
from oracles import search as oracle
from oracles import stops as stops_oracle

from oreo_jax import models
from oreo_jax.decode import (
  ANCESTRAL,
  DELIMITERS,
  GREEDY,
  Stops,
  Strategy,
  by_logp,
  by_value,
  generate,
  make_plan,
  make_stops,
  step_beam_search,
)
from oreo_jax.decode.admit import admit, empty_beams
from oreo_jax.decode.step import advance

KEY = jax.random.key(5)
VOCAB = 24
CONFIG = chain.model_config(VOCAB)
EOS = chain.EOS
# Tokens 1-8 end a step.
ENDS = np.isin(np.arange(VOCAB), np.arange(1, 9))
BEAMS = 3
LIMITS = {"max_steps": 4, "max_step_tokens": 3, "max_new_tokens": 9}
STOPS = Stops(ENDS.astype(np.int8)[None])  # one state
STRATEGY = Strategy(beams=BEAMS, max_steps=4, max_step_tokens=3)
OPTIONS = {"stops": STOPS, "eos_ids": (EOS,), "beams": BEAMS, **LIMITS}


TURNS = turns.Turns()


@pytest.fixture
def deterministic():
  """The search without chance."""
  with TURNS.taken(BEAMS):
    yield step_beam_search


def random_chain(seed):
  """A random policy with up to three ways at a fork, and random values."""
  rng = np.random.default_rng(seed)
  follow = {}
  for token in range(1, VOCAB):
    ways = rng.choice(np.arange(1, VOCAB), rng.integers(1, 4), replace=False)
    # A step may end with the end-of-sequence.
    if rng.random() < 0.25:
      ways[rng.integers(len(ways))] = EOS
    follow[token] = ways.tolist()
  # Well apart: the order must not hang on rounding.
  values = rng.permutation(VOCAB) / VOCAB
  return follow, values


def token_ends(answer):
  return bool(ENDS[answer[-1]])


def compare(
  search,
  follow,
  values,
  prompts,
  *,
  stops=STOPS,
  ends=token_ends,
  granularity="token",
  rank=lambda answer: answer.value,
  score=by_value,
):
  policy = chain.make_policy(
    CONFIG, chain.table_logits(VOCAB, follow, slope=0.5)
  )
  critic = chain.make_critic(CONFIG, values)
  options = {
    **OPTIONS,
    "stops": stops,
    "granularity": granularity,
    "score": score,
    "prompt_length": 3,
  }
  out = search(policy, critic, prompts, KEY, CONFIG, **options)
  results = []
  for row, prompt in enumerate(prompts):
    want = oracle.search(
      prompt,
      oracle.Rules(
        follow=follow,
        value=values,
        ends=ends,
        eos=EOS,
        beams=BEAMS,
        branches=BEAMS,
        granularity=granularity,
        rank=rank,
        **LIMITS,
      ),
    )
    length = out.answers.lengths[row]
    tokens = tuple(out.answers.tokens[row, :length].tolist())
    assert tokens == want.answer.tokens, (row, prompt)
    assert out.answers.finished[row] == want.answer.finished
    assert out.proposed[row] == want.proposed
    np.testing.assert_allclose(out.values[row], want.answer.value, atol=1e-5)
    results.append(want)
  return results


def test_search_matches_plain_python(deterministic):
  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]
  results = []
  for seed in range(12):
    results += compare(deterministic, *random_chain(seed), prompts)
  finished = [result.answer.finished for result in results]
  lengths = {len(result.answer.tokens) for result in results}
  # Both kinds of ends were seen, and the limits were reached.
  assert 10 < sum(finished) < len(finished) - 3
  assert max(lengths) == LIMITS["max_new_tokens"] and min(lengths) <= 2


def test_a_critic_of_step_level_is_read_between_steps(deterministic):
  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]
  results = []
  for seed in range(12):
    chain_of_seed = random_chain(seed)
    results += compare(
      deterministic, *chain_of_seed, prompts, granularity="step"
    )
  # Read at every token, other answers would have won.
  tokens = []
  for seed in range(12):
    tokens += compare(deterministic, *random_chain(seed), prompts)
  differ = [a.answer != b.answer for a, b in zip(results, tokens, strict=True)]
  assert sum(differ) > 5


def short_and_sure(candidates):
  """A score of one's own; -inf excludes what is longer than eight tokens."""
  score = candidates.values - 0.0913 * candidates.lengths.astype(jnp.float32)
  score += jnp.where(candidates.finished, 0.2371, 0.0)
  return jnp.where(candidates.lengths > 8, -jnp.inf, score)


def test_a_score_of_ones_own_decides(deterministic):
  def rank(answer):
    length = len(answer.tokens)
    if length > 8:
      return -np.inf
    return answer.value - 0.0913 * length + 0.2371 * answer.finished

  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]
  for seed in range(6):
    compare(
      deterministic,
      *random_chain(seed),
      prompts,
      rank=rank,
      score=short_and_sure,
    )


# Pieces of delimiters, which complete across tokens and across cut steps.
PIECES = [".", " ", "$", "\n", ". b", "a.", " .$ ", "a\n\nb", *"abcdefghijklm"]


def test_steps_end_where_the_text_says(deterministic):
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {name: id for id, name in enumerate(["<eos>", *PIECES])}
    )
  )
  backend.decoder = tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<eos>"
  )
  delimiters = DELIMITERS["sentences"]

  def ends(answer):
    return stops_oracle.step_ends(tokenizer.decode, answer, delimiters)[-1]

  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]
  results = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    follow, values = random_chain(seed)
    # Many ways lead to the pieces of delimiters.
    for ways in follow.values():
      for place, way in enumerate(ways):
        piece = int(rng.integers(1, 9))
        if way != EOS and piece not in ways and rng.random() < 0.7:
          ways[place] = piece
    results += compare(
      deterministic,
      follow,
      values,
      prompts,
      stops=make_stops(tokenizer, delimiters, VOCAB),
      ends=ends,
    )
  texts = [tokenizer.decode(result.answer.tokens) for result in results]
  assert sum(". " in text or ".$ " in text for text in texts) > 5


# Token 9 starts the question. The likelier first step, 10 1, leads to a wrong
# end (13); the other, 11 2, to a right one (14). V knows from the step on.
FORK = {
  9: [10, 11],
  10: [1],
  11: [2],
  1: [13],
  2: [14],
  13: [EOS],
  14: [EOS],
}
FORK_VALUES = np.zeros(VOCAB)
FORK_VALUES[[1, 13]] = 0.1
FORK_VALUES[[2, 14]] = 0.9
# Read at the end-of-sequence, every answer would look the same.
FORK_VALUES[EOS] = 5.0


@pytest.fixture(scope="module")
def fork():
  logits = chain.table_logits(VOCAB, FORK, slope=0.3)
  return chain.make_policy(CONFIG, logits), chain.make_critic(
    CONFIG, FORK_VALUES
  )


def test_beam_finds_what_greedy_misses(fork):
  policy, critic = fork
  greedy = generate(
    policy,
    [[9]],
    KEY,
    CONFIG,
    max_new_tokens=9,
    eos_ids=(EOS,),
    sampler=GREEDY,
  )
  assert greedy.answers()[0].tolist() == [10, 1, 13]
  out = step_beam_search(
    policy,
    critic,
    [[9]] * 6,
    jax.random.key(7),
    CONFIG,
    prompt_length=3,
    **OPTIONS,
  )
  # Nine proposals a question: all take the likelier way once in 50 times.
  assert [a.tolist() for a in out.answers.answers()] == [[11, 2, 14]] * 6
  assert out.answers.finished.all()
  np.testing.assert_allclose(out.values, 0.9, atol=1e-5)
  # First 9 steps of 2 tokens; then the two different texts, not 3 copies,
  # propose 3 steps of 2 tokens each.
  assert set(out.proposed.tolist()) == {9 * 2 + 2 * 3 * 2}


def test_ranked_by_the_policy_alone_the_likelier_answer_wins(fork):
  policy, _ = fork
  out = step_beam_search(
    policy, None, [[9]] * 6, KEY, CONFIG, score=by_logp, **OPTIONS
  )
  assert [a.tolist() for a in out.answers.answers()] == [[10, 1, 13]] * 6
  np.testing.assert_allclose(out.scores, out.answers.logps.sum(axis=1))
  assert np.isnan(out.values).all()
  with pytest.raises(ValueError, match="critic: score=by_value expects"):
    step_beam_search(policy, None, [[9]], KEY, CONFIG, **OPTIONS)


def test_a_critic_of_response_level_is_refused(fork):
  with pytest.raises(ValueError, match="granularity: .*'response'"):
    step_beam_search(
      *fork, [[9]], KEY, CONFIG, granularity="response", **OPTIONS
    )


def test_advance_is_one_step_of_the_search(fork):
  policy, critic = fork
  plan = make_plan(
    policy,
    critic,
    KEY,
    CONFIG,
    strategy=STRATEGY,
    stops=STOPS,
    eos_ids=(EOS,),
    max_new_tokens=LIMITS["max_new_tokens"],
  )
  tokens = jnp.asarray([[9]] * 6, jnp.int32)
  numbers = jnp.arange(6, dtype=jnp.int32)
  state = admit(
    plan,
    empty_beams(plan, slots=6, room=1),
    numbers,
    tokens,
    jnp.ones(6, jnp.int32),
    numbers,
  )
  assert state.active.all()
  texts = []
  for _ in range(3):
    state = jax.jit(advance)(state, plan)
    texts.append(state.tokens[0, : state.lengths[0]].tolist())
  # The better of the two steps leads, its end follows, and then it has left.
  assert texts[:2] == [[11, 2], [11, 2, 14, EOS]]
  # A third step was none: no question was left to take it.
  assert not state.active.any() and (state.steps == 2).all()
  out = step_beam_search(policy, critic, tokens, KEY, CONFIG, **OPTIONS)
  np.testing.assert_array_equal(out.values, state.winners.values)
  np.testing.assert_array_equal(out.proposed, state.proposed)


def test_finished_answers_compete_by_value(deterministic):
  # A quick answer (12) against a longer one that is worth more (15), and
  # against one still worth more that never ends (16, 3, 16, 3, ...).
  follow = {
    9: [12, 15, 16],
    12: [EOS],
    15: [1],
    1: [17],
    17: [EOS],
    16: [3],
    3: [16],
  }
  values = np.zeros(VOCAB)
  values[[12, 1, 17, 3]] = 0.5, 0.6, 0.7, 0.9
  results = compare(deterministic, follow, values, [[9]] * 6)
  assert results[0].answer.tokens == (15, 1, 17, EOS)


def random_models():
  config = CONFIG
  policy = tiny.draw_params(config, scale=1.5)
  return policy, tiny.draw_params(config, head="value", seed=1)


def fresh_values(critic, prompts, answers):
  """V at the last token before the end-of-sequence, by a plain forward."""
  values = []
  for prompt, answer in zip(prompts, answers, strict=True):
    text = np.zeros((1, 12), np.int32)
    size = len(prompt) + len(answer)
    text[0, :size] = [*prompt, *answer]
    hidden = models.apply(critic, jnp.asarray(text), CONFIG).hidden
    values.append(float(models.values(critic, hidden)[0, size - 1]))
  return values


def test_values_are_those_of_a_fresh_forward():
  policy, critic = random_models()
  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11]]
  out = step_beam_search(
    policy, critic, prompts, KEY, CONFIG, prompt_length=3, **OPTIONS
  )
  want = fresh_values(critic, prompts, out.answers.answers())
  np.testing.assert_allclose(out.values, want, atol=1e-4)
  assert out.answers.finished.any()
  assert np.ptp(out.values) > 0.1


@functools.cache
def greedy_options():
  return {
    **OPTIONS,
    "beams": 1,
    "sampler": GREEDY,
    "max_steps": 9,
    "eos_ids": (EOS, 20),
  }


def test_one_beam_at_temperature_zero_is_greedy():
  policy, critic = random_models()
  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11], [5], [6], [7]]
  searched = step_beam_search(
    policy, critic, prompts, KEY, CONFIG, prompt_length=3, **greedy_options()
  ).answers
  want = generate(
    policy,
    prompts,
    KEY,
    CONFIG,
    max_new_tokens=9,
    eos_ids=(EOS, 20),
    sampler=GREEDY,
  )
  np.testing.assert_array_equal(searched.tokens, want.tokens)
  np.testing.assert_array_equal(searched.lengths, want.lengths)
  np.testing.assert_array_equal(searched.finished, want.finished)
  np.testing.assert_allclose(searched.logps, want.logps, atol=1e-5)
  assert searched.finished.any() and not searched.finished.all()


@pytest.mark.slow
def test_devices_change_nothing():
  policy, critic = random_models()
  prompts = [[1], [9, 2], [4, 4, 3], [14], [20, 21], [11], [5], [6]]
  plain = step_beam_search(
    policy, critic, prompts, KEY, CONFIG, prompt_length=3, **OPTIONS
  )
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    split = step_beam_search(
      tiny.place(policy, CONFIG, mesh),
      tiny.place(critic, CONFIG, mesh, head="value"),
      prompts,
      KEY,
      CONFIG,
      prompt_length=3,
      **OPTIONS,
    )
  np.testing.assert_array_equal(split.answers.tokens, plain.answers.tokens)
  np.testing.assert_allclose(split.values, plain.values, atol=1e-5)


def test_a_beam_of_none_is_refused(fork):
  with pytest.raises(ValueError, match="beams: expected at least 1"):
    step_beam_search(
      *fork, [[9]], KEY, CONFIG, **{**OPTIONS, "beams": 0}, sampler=ANCESTRAL
    )
