"""Draws and filters against a NumPy oracle, and rows against themselves."""

import os
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import chain, tiny

from oreo_jax.decode import GREEDY, Sampler, generate
from oreo_jax.decode.sampling import (
  Sampling,
  draw,
  filter_logits,
  penalize,
  row_keys,
  sampling_rows,
)

KEY = jax.random.key(7)
VOCAB = 61
# One setting each, all together, and pairs of which the order matters.
SAMPLERS = (
  Sampler(),
  Sampler(0.0),
  Sampler(0.7),
  Sampler(top_k=3),
  Sampler(top_k=1),
  Sampler(top_k=999),
  Sampler(top_p=0.6),
  Sampler(top_p=1e-6),
  Sampler(min_p=0.2),
  Sampler(min_p=1.0),
  Sampler(repetition_penalty=1.8),
  Sampler(repetition_penalty=0.6),
  Sampler(0.0, repetition_penalty=3.0),
  Sampler(1.7, top_k=9, top_p=0.7),
  Sampler(0.4, top_p=0.95, min_p=0.1),
  Sampler(2.5, 20, 0.9, 0.05, 1.3),
)


def probabilities(logits, sampler, text=()):
  """What a token is drawn from: one row, in float64, by definition."""
  logits = np.array(logits, np.float64)
  for token in set(text):
    factor = sampler.repetition_penalty
    logits[token] *= 1 / factor if logits[token] > 0 else factor
  if sampler.temperature == 0:
    return np.eye(len(logits))[int(np.argmax(logits))]
  stays = np.ones(len(logits), bool)
  if sampler.top_k:
    stays &= [np.sum(logits > x) < sampler.top_k for x in logits]

  def softmax():
    odds = np.exp((logits - logits.max()) / sampler.temperature) * stays
    return odds / odds.sum()

  if sampler.top_p < 1:
    p = softmax()
    stays &= [p[logits > x].sum() < sampler.top_p for x in logits]
  p = softmax()
  stays &= p >= sampler.min_p * p.max()
  return softmax()


def make_logits(rows, vocab=VOCAB, seed=0, ties=False):
  logits = np.random.default_rng(seed).normal(0, 2, (rows, vocab))
  return (np.round(logits) if ties else logits).astype(np.float32)


def make_text(rows, length=12, vocab=VOCAB, seed=1):
  """Returns tokens with repeats, and which count; the others are rubbish."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  tokens[:, 1] = tokens[:, 0]
  inside = np.arange(length)[None] < rng.integers(2, length, rows)[:, None]
  return tokens, inside


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_filters_match_the_oracle(sampler, ties):
  rows = 40
  logits = make_logits(rows, ties=ties)
  tokens, inside = make_text(rows)
  sampling = sampling_rows([sampler] * rows)
  scores = penalize(
    jnp.asarray(logits), sampling.repetition_penalty, tokens, inside
  )
  want = np.stack(
    [
      probabilities(logits[row], sampler, tokens[row, inside[row]])
      for row in range(rows)
    ]
  )
  if sampler.temperature == 0:
    keys = row_keys(KEY, np.arange(rows), np.arange(rows))
    position = np.zeros(rows, np.int32)
    drawn, _ = jax.jit(draw)(keys, position, logits, sampling, tokens, inside)
    np.testing.assert_array_equal(drawn, want.argmax(axis=1))
    return
  got = np.asarray(jax.nn.softmax(filter_logits(scores, sampling)))
  np.testing.assert_array_equal(got > 0, want > 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_excluded_and_zero_logits_are_no_trouble():
  # Fewer tokens than k are possible, and both zeros are one number.
  logits = np.array(
    [
      [-np.inf, 2.0, -np.inf, 1.0, -np.inf],
      [0.0, -0.0, -1.0, -2.0, -3.0],
      [-5.0, -4.0, -3e38, -np.inf, -4.0],
    ],
    np.float32,
  )
  for sampler in (
    Sampler(top_k=1),
    Sampler(top_k=4),
    Sampler(top_p=0.99),
    Sampler(0.01, 3, 0.5, 0.5),
  ):
    out = filter_logits(jnp.asarray(logits), sampling_rows([sampler] * 3))
    got = np.asarray(jax.nn.softmax(out))
    want = [probabilities(row, sampler) for row in logits]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def mixed_batch(vocab=VOCAB):
  """Returns the arguments of `draw` for rows that share no setting."""
  rows = 3 * len(SAMPLERS)
  return (
    row_keys(KEY, np.arange(rows) // 3, np.arange(rows) % 3),
    (5 * np.arange(rows) % 7).astype(np.int32),
    make_logits(rows, vocab),
    sampling_rows(SAMPLERS * 3),
    *make_text(rows, vocab=vocab),
  )


def take(arguments, index):
  return jax.tree.map(lambda x: x[index], arguments)


def check_rows(got, batch, index):
  """Checks that rows are bit by bit those of the batch."""
  for ours, theirs in zip(got, batch, strict=True):
    np.testing.assert_array_equal(ours, np.asarray(theirs)[index])


def test_a_row_depends_on_nothing_else_in_its_batch():
  # With this vocabulary XLA's own sums depend on how many rows there are.
  arguments = mixed_batch(1031)
  run = jax.jit(draw)
  batch = run(*arguments)
  rows = len(batch[0])
  shuffled = np.random.default_rng(3).permutation(rows)
  check_rows(run(*take(arguments, shuffled)), batch, shuffled)
  for index in (slice(0, 7), slice(11, 16)):
    check_rows(run(*take(arguments, index)), batch, index)
  # Alone or in pairs, where what no row asks for is skipped, as in the mixture.
  for row in range(len(SAMPLERS)):
    index = slice(row, row + 1)
    check_rows(run(*take(arguments, index)), batch, index)
    index = slice(row, row + 2)
    check_rows(run(*take(arguments, index)), batch, index)


def test_rows_and_vocabulary_may_lie_on_several_devices():
  arguments = mixed_batch(64)
  want = jax.jit(draw)(*arguments)
  mesh = tiny.mesh(data=2, tensor=4)

  def place(x, *axes):
    axes = axes or ("data", *[None] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

  keys, positions, logits, *rest = arguments
  placed = (keys, positions, place(logits, "data", "tensor"))
  compiled = jax.jit(draw).lower(*placed, *jax.tree.map(place, rest)).compile()
  got = compiled(*placed, *jax.tree.map(place, rest))
  # To the bit: even sums over devices are in the order that is written down.
  check_rows(got, want, slice(None))
  # No logits cross devices: what does is narrower than a device's share.
  kinds = "|".join(["all-gather", "all-reduce", "all-to-all"])
  shapes = re.findall(rf"= (.*) (?:{kinds})\(", compiled.as_text())
  widths = re.findall(r"\[\d+,(\d+)", " ".join(shapes))
  assert shapes and max(map(int, widths)) < 16


def test_draws_are_those_of_jax_with_the_key_of_row_and_position():
  keys, positions, logits, sampling, tokens, inside = mixed_batch()
  drawn, logps = draw(
    keys, positions, jnp.asarray(logits), sampling, tokens, inside
  )
  scores = penalize(
    jnp.asarray(logits), sampling.repetition_penalty, tokens, inside
  )
  filtered = filter_logits(scores, sampling)
  for row, token in enumerate(drawn.tolist()):
    key = jax.random.fold_in(KEY, row // 3)
    key = jax.random.fold_in(jax.random.fold_in(key, row % 3), positions[row])
    is_greedy = sampling.temperature[row] == 0
    want = (
      scores[row].argmax()
      if is_greedy
      else jax.random.categorical(key, filtered[row])
    )
    assert token == want
  # The log-probability is the model's own, whatever the settings.
  logits = logits.astype(np.float64)
  model = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  want = np.take_along_axis(model, np.asarray(drawn)[:, None], axis=1)[:, 0]
  np.testing.assert_allclose(logps, want, atol=1e-5)


@pytest.mark.parametrize(
  "sampler",
  [
    Sampler(),
    Sampler(top_k=3),
    Sampler(0.5, top_p=0.8),
    Sampler(1.5, min_p=0.3, repetition_penalty=1.5),
  ],
)
def test_draws_follow_the_filtered_softmax(sampler):
  row = np.array([2.0, 1.5, 0.0, -1.0, 0.5, 1.0], np.float32)
  text = np.array([0, 3, 0], np.int32)
  count = 20_000
  # Positions of a few rows, as in decoding, rather than one row each.
  rows, positions = np.divmod(np.arange(count, dtype=np.int32), 500)
  tokens, _ = jax.jit(draw)(
    row_keys(jax.random.key(3), rows // 10, rows % 10),
    positions,
    np.tile(row, (count, 1)),
    sampling_rows([sampler] * count),
    np.tile(text, (count, 1)),
  )
  want = probabilities(row, sampler, text)
  counts = np.bincount(np.asarray(tokens), minlength=6)
  possible = want > 0
  assert not counts[~possible].any()
  expected = want[possible] * count
  statistic = np.sum((counts[possible] - expected) ** 2 / expected)
  # The 99.9th percentile of chi-square with 5 degrees of freedom.
  assert statistic < 20.5


def test_keys_are_distinct_and_those_of_the_problem_and_the_sample():
  problems, samples = np.divmod(np.arange(600, dtype=np.int32), 20)
  keys = row_keys(KEY, problems, samples)
  data = np.asarray(jax.random.key_data(keys))
  assert len(np.unique(data, axis=0)) == 600
  some = np.array([417, 3, 44])
  alone = row_keys(KEY, problems[some], samples[some])
  np.testing.assert_array_equal(jax.random.key_data(alone), data[some])


def test_other_settings_are_not_traced_again():
  traces = []

  def counted(*arguments):
    traces.append(arguments)
    return draw(*arguments)

  run = jax.jit(counted)
  arguments = take(mixed_batch(), slice(0, 4))
  for sampler in SAMPLERS:
    sampling = sampling_rows([sampler] * 4)
    run(*arguments[:3], sampling, *arguments[4:])
  assert len(traces) == 1


def primitives(jaxpr):
  """Returns the names of what always runs: branches are not looked into."""
  names = set()
  for equation in jaxpr.eqns:
    names.add(equation.primitive.name)
    if equation.primitive.name != "cond":
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        names |= primitives(inner)
  return names


def test_costly_work_stands_in_branches():
  jaxpr = jax.make_jaxpr(draw)(*take(mixed_batch(), slice(0, 4))).jaxpr
  always = primitives(jaxpr)
  assert {"cond", "reduce_max", "exp"} <= always
  assert not always & {"random_bits", "while", "scan", "sort", "scatter"}


def test_settings_of_rows_are_a_tree_of_arrays():
  rows = sampling_rows([GREEDY, Sampler(0.5, 3, 0.9, 0.1, 1.2)])
  want = Sampling(
    *(
      np.array(column, np.int32 if field == "top_k" else np.float32)
      for field, *column in (
        ("temperature", 0.0, 0.5),
        ("top_k", 0, 3),
        ("top_p", 1.0, 0.9),
        ("min_p", 0.0, 0.1),
        ("repetition_penalty", 1.0, 1.2),
      )
    )
  )
  for got, expected in zip(jax.tree.leaves(rows), want, strict=True):
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == expected.dtype


@pytest.mark.parametrize(
  ("wrong", "expected"),
  [
    ({"temperature": -1.0}, "at least 0, got -1.0"),
    ({"temperature": float("nan")}, "finite number at least 0, got nan"),
    ({"top_k": -1}, "at least 0, got -1"),
    ({"top_k": 0.9}, "a whole number at least 0, got 0.9"),
    ({"top_p": 0.0}, "above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "above 0 and at most 1, got 1.5"),
    ({"min_p": 1.5}, "at least 0 and at most 1, got 1.5"),
    ({"repetition_penalty": 0.0}, "above 0, got 0.0"),
  ],
)
def test_a_setting_that_cannot_work_is_named(wrong, expected):
  with pytest.raises(ValueError) as caught:
    Sampler(**wrong)
  assert f"sampler.{next(iter(wrong))}: expected " in str(caught.value)
  assert expected in str(caught.value)


def test_generation_penalizes_what_prompt_and_answer_hold():
  # Every token is followed by the best one that did not occur yet.
  order = [5, 4, 3, 2, 1]
  config = chain.model_config(8)
  likes = np.zeros((8, 8))
  likes[:, order] = [9.0, 8.0, 7.0, 6.0, 5.0]
  out = generate(
    chain.make_policy(config, likes),
    [[4, 6, 6, 6], [6]],
    KEY,
    config,
    max_new_tokens=4,
    eos_ids=(),
    sampler=Sampler(0.0, repetition_penalty=1e3),
    num_samples=2,
  )
  assert out.tokens.tolist() == [[5, 3, 2, 1]] * 2 + [[5, 4, 3, 2]] * 2


def test_filters_are_those_of_transformers():
  torch = pytest.importorskip("torch", reason="needs torch (CPU is enough)")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  transformers = pytest.importorskip("transformers")
  settings = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
  )
  model = transformers.LlamaForCausalLM(settings)
  logits, (tokens, _) = make_logits(40), make_text(40)
  for sampler in (s for s in SAMPLERS if s.temperature > 0):
    processors = model._get_logits_processor(
      transformers.GenerationConfig(
        do_sample=True,
        temperature=float(sampler.temperature),
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        min_p=sampler.min_p,
        repetition_penalty=sampler.repetition_penalty,
      ),
      input_ids_seq_length=tokens.shape[1],
    )
    scores = processors(
      torch.tensor(tokens, dtype=torch.long), torch.tensor(logits)
    )
    want = torch.softmax(scores, dim=-1).numpy()
    rows = sampling_rows([sampler] * 40)
    penalized = penalize(
      jnp.asarray(logits),
      rows.repetition_penalty,
      tokens,
      np.ones(tokens.shape, bool),
    )
    got = np.asarray(jax.nn.softmax(filter_logits(penalized, rows)))
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
