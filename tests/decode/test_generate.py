"""Generation: exact against the full forward pass and against tables."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chain, tiny

from oreo_jax import models
from oreo_jax.decode import (
  ANCESTRAL,
  GREEDY,
  generate,
  generate_all,
)
from oreo_jax.decode.sampling import draw

KEY = jax.random.key(0)
PROMPTS = [[3], [1, 5, 2, 9, 4], [7, 7], [2, 8, 1]]
NEW = 8


@pytest.fixture(scope="module")
def params():
  return tiny.draw_params(scale=2.0)


def check_against_full_forward(params, prompts, out):
  """Every token is the argmax of the whole text run at once."""
  texts = [
    [*prompt, *answer[:length]]
    for prompt, answer, length in zip(
      prompts, out.tokens, out.lengths, strict=True
    )
  ]
  width = max(map(len, texts))
  tokens = np.zeros((len(texts), width), np.int32)
  segments = np.zeros_like(tokens)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = text
    segments[row, : len(text)] = 1
  hidden = models.apply(params, tokens, tiny.MODEL, segment_ids=segments).hidden
  logits = models.logits(params, hidden, tiny.MODEL)
  logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  for row, prompt in enumerate(prompts):
    at = np.arange(out.lengths[row]) + len(prompt) - 1
    chosen = out.tokens[row, : out.lengths[row]]
    np.testing.assert_array_equal(logps[row, at].argmax(axis=-1), chosen)
    np.testing.assert_allclose(
      out.logps[row, : out.lengths[row]], logps[row, at, chosen], atol=1e-5
    )


def test_greedy_with_cache_is_the_argmax_of_the_full_forward(params):
  out = generate(
    params,
    PROMPTS,
    KEY,
    tiny.MODEL,
    max_new_tokens=NEW,
    eos_ids=(),
    sampler=GREEDY,
  )
  assert out.lengths.tolist() == [NEW] * 4 and not out.finished.any()
  assert len(np.unique(out.tokens)) > 3
  check_against_full_forward(params, PROMPTS, out)
  # The same on eight devices.
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    split = generate(
      tiny.place(params, tiny.MODEL, mesh),
      PROMPTS,
      KEY,
      tiny.MODEL,
      max_new_tokens=NEW,
      eos_ids=(),
      sampler=GREEDY,
    )
  np.testing.assert_array_equal(split.tokens, out.tokens)
  np.testing.assert_allclose(split.logps, out.logps, atol=1e-5)


# A walk in a circle: t -> t + 1, token 0 ends, token 11 goes on to 3.
CIRCLE = {t: [t - 1 if t > 1 else chain.EOS] for t in range(1, 12)}
CIRCLE[3] = [11]
CHAIN = chain.model_config(12)


@pytest.fixture(scope="module")
def circle():
  return chain.make_policy(CHAIN, chain.table_logits(12, CIRCLE))


def walk(prompt, limit):
  """What greedy decoding of CIRCLE gives, by hand."""
  answer, last = [], prompt[-1]
  while len(answer) < limit:
    last = CIRCLE[last][0]
    answer.append(last)
    if last == chain.EOS:
      break
  return answer


def test_stops_at_the_end_of_sequence_or_at_the_limit(circle):
  prompts = [[2], [9, 1], [5, 5, 3]]
  out = generate(
    circle,
    prompts,
    KEY,
    CHAIN,
    max_new_tokens=4,
    eos_ids=(chain.EOS,),
    num_samples=2,
    prompt_length=5,
  )
  # Prompt-major, the samples of one prompt side by side; nothing is random.
  assert out.tokens.tolist() == [
    [1, 0, 0, 0],
    [1, 0, 0, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
    [11, 10, 9, 8],
    [11, 10, 9, 8],
  ]
  assert out.lengths.tolist() == [2, 2, 1, 1, 4, 4]
  assert out.finished.tolist() == [True] * 4 + [False] * 2
  assert [a.tolist() for a in out.answers()] == (
    [[1]] * 2 + [[]] * 2 + [[11, 10, 9, 8]] * 2
  )
  assert not np.any(out.logps[0, 2:])


def test_loop_is_traced_once_for_one_shape(circle, monkeypatch):
  module = importlib.import_module("oreo_jax.decode.grow")
  traces = []

  def counted(*args):
    traces.append(args)
    return draw(*args)

  monkeypatch.setattr(module, "draw", counted)
  for prompts in ([[2], [3, 3]], [[5, 5, 5], [1]]):
    generate(
      circle,
      prompts,
      KEY,
      CHAIN,
      max_new_tokens=3,
      eos_ids=(chain.EOS,),
      prompt_length=3,
    )
  assert len(traces) == 1


def test_all_answers_come_in_the_order_of_the_prompts(circle):
  rng = np.random.default_rng(0)
  prompts = [
    rng.integers(1, 12, size).tolist() for size in rng.integers(1, 20, 11)
  ]
  done = []
  out = generate_all(
    circle,
    prompts,
    KEY,
    CHAIN,
    max_new_tokens=4,
    eos_ids=(chain.EOS,),
    num_samples=2,
    slots=8,
    on_progress=done.append,
  )
  for row in range(22):
    want = walk(prompts[row // 2], 4)
    assert out.tokens[row, : out.lengths[row]].tolist() == want
    assert out.finished[row] == (want[-1] == chain.EOS)
  assert done == [1] * 22


def test_samples_follow_the_softmax(params):
  # 6,000 draws of one token, against the full forward pass.
  prompt, count = [4, 9], 6000
  out = generate(
    params,
    [prompt],
    jax.random.key(11),
    tiny.MODEL,
    max_new_tokens=1,
    eos_ids=(),
    sampler=ANCESTRAL,
    num_samples=count,
  )
  hidden = models.apply(params, jnp.asarray([prompt]), tiny.MODEL).hidden
  logits = models.logits(params, hidden[:, -1], tiny.MODEL)[0]
  want = np.asarray(jax.nn.softmax(logits)) * count
  counts = np.bincount(out.tokens[:, 0], minlength=tiny.VOCAB)
  common = want > 5
  assert common.sum() >= 4
  rest = [counts[~common].sum()], [max(want[~common].sum(), 1e-9)]
  counts = np.concatenate([counts[common], rest[0]])
  want = np.concatenate([want[common], rest[1]])
  statistic = np.sum((counts - want) ** 2 / np.maximum(want, 1.0))
  # The 99.9th percentile of chi-square with 11 degrees of freedom.
  assert statistic < 31.3


def test_prompts_must_fit_and_must_not_be_empty(params):
  options = {"max_new_tokens": 2, "eos_ids": ()}
  with pytest.raises(ValueError, match="at least one token"):
    generate(params, [[1], []], KEY, tiny.MODEL, **options)
  with pytest.raises(ValueError, match="at least one, got none"):
    generate_all(params, [], KEY, tiny.MODEL, **options)
  with pytest.raises(ValueError, match="prompt 1 has 3 tokens, room is 2"):
    generate(
      params, [[1], [1, 2, 3]], KEY, tiny.MODEL, prompt_length=2, **options
    )
