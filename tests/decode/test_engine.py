"""The Python door: texts in, completions out."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import decode, models
from oreo_jax.data import make_tokenizer, tokenize_prompt
from oreo_jax.decode import GREEDY, Engine, Sampler

TOKENIZER = make_tokenizer("byte")
CONFIG = dataclasses.replace(tiny.MODEL, vocab_size=len(TOKENIZER))
# Answers of this model are bytes at random; these end one.
EOS = (TOKENIZER.eos_token_id, *range(200, 220))
PROMPTS = ["2 + 2 =", "a", "What is it, then? Think."]
MOST = 40


@pytest.fixture(scope="module")
def engine():
  return Engine(
    tiny.draw_params(CONFIG),
    CONFIG,
    TOKENIZER,
    critic=tiny.draw_params(CONFIG, head="value"),
    eos_ids=EOS,
    slots=4,
  )


@pytest.fixture(scope="module")
def free(engine):
  """Four completions a prompt, without a stop string."""
  return engine.generate(PROMPTS, n=4, max_new_tokens=MOST, values=True)


def test_completions_are_those_of_generate(engine, free):
  out = decode.generate(
    engine.policy,
    [tokenize_prompt(prompt, TOKENIZER) for prompt in PROMPTS],
    jax.random.key(0),
    CONFIG,
    max_new_tokens=MOST,
    eos_ids=EOS,
    num_samples=4,
  )
  assert [len(row) for row in free] == [4, 4, 4]
  flat = [each for row in free for each in row]
  for row, each in enumerate(flat):
    length = out.lengths[row]
    assert each.tokens.tolist() == out.tokens[row, :length].tolist()
    np.testing.assert_allclose(each.logps, out.logps[row, :length], atol=1e-5)
    assert each.reason == ("end" if out.finished[row] else "length")
    assert each.text == TOKENIZER.decode(
      out.answers()[row], skip_special_tokens=True
    )
  assert {each.reason for each in flat} == {"end", "length"}
  # One shape of everything, whatever the number of prompts and samples.
  assert engine.usage.tokens >= sum(len(each.tokens) for each in flat)


def test_values_are_those_of_a_fresh_forward(engine, free):
  for prompt, row in zip(PROMPTS, free, strict=True):
    start = tokenize_prompt(prompt, TOKENIZER)
    for each in row[:2]:
      text = np.concatenate([start, each.tokens])[None]
      hidden = models.apply(engine.critic, text, CONFIG).hidden
      want = models.values(engine.critic, hidden)[0, len(start) - 1 :]
      np.testing.assert_allclose(each.values, want, atol=1e-5)


def test_stop_strings_cut_where_the_text_says(engine, free):
  # Draws do not depend on what stops an answer, so the oracle is the text of
  # the answer that went on. The stops are pairs of characters in these texts.
  flat = [each for row in free for each in row]
  pairs = [
    each.text[i : i + 2] for each in flat for i in range(4, len(each.text) - 1)
  ]
  stop = [pair for pair in pairs if pair.isascii()][::9][:4]
  assert len(stop) == 4
  stop.append("never is this said")
  cut = [
    each
    for row in engine.generate(PROMPTS, n=4, max_new_tokens=MOST, stop=stop)
    for each in row
  ]
  reasons = set()
  for before, after in zip(flat, cut, strict=True):
    ends = [
      count
      for count in range(1, len(before.tokens) + (before.reason != "end"))
      if any(s in TOKENIZER.decode(before.tokens[:count]) for s in stop)
    ]
    if not ends:
      assert after.tokens.tolist() == before.tokens.tolist()
      continue
    reasons.add(after.reason)
    assert after.reason == "stop"
    assert after.tokens.tolist() == before.tokens[: ends[0]].tolist()
    begin = min(before.text.find(s) for s in stop if s in before.text)
    assert after.text == before.text[:begin]
  assert reasons == {"stop"}


def test_texts_grow_while_they_are_drawn(engine):
  grown = {}

  def on_text(place, sample, text):
    assert text.startswith(grown.get((place, sample), ""))
    grown[place, sample] = text

  stream = engine.stream(
    PROMPTS, n=2, max_new_tokens=MOST, sampler=GREEDY, on_text=on_text
  )
  ended = {(place, sample): each for place, sample, each in stream}
  assert len(ended) == 6 and grown
  for place, text in grown.items():
    assert ended[place].text.startswith(text)


@pytest.mark.parametrize(
  "strategy",
  [
    decode.Strategy(beams=2, max_steps=4, max_step_tokens=5),
    decode.best_of(3),
    decode.look_ahead_search(2, 2, max_steps=3, max_step_tokens=4),
  ],
)
def test_searches_are_those_of_the_plan(engine, strategy):
  options = {"max_new_tokens": 12, "seed": 2}
  together = engine.search(PROMPTS, strategy, **options)
  plan = decode.make_plan(
    engine.policy,
    engine.critic,
    jax.random.key(2),
    CONFIG,
    strategy=strategy,
    stops=decode.make_stops(TOKENIZER, ["\n"], len(TOKENIZER)),
    eos_ids=EOS,
    max_new_tokens=12,
  )
  prompts = [tokenize_prompt(prompt, TOKENIZER) for prompt in PROMPTS]
  want = decode.search(plan, prompts, slots=1)
  for place, each in enumerate(together):
    length = want.answers.lengths[place]
    assert each.tokens.tolist() == want.answers.tokens[place, :length].tolist()
    assert each.score == pytest.approx(want.scores[place], abs=1e-5)
    assert each.text == TOKENIZER.decode(
      want.answers.answers()[place], skip_special_tokens=True
    )
  bare = Engine(engine.policy, CONFIG, TOKENIZER, eos_ids=EOS)
  with pytest.raises(ValueError, match="critic: score=by_value expects"):
    bare.search(PROMPTS, strategy)


def test_each_prompt_may_have_its_own_settings(engine):
  rows = engine.generate(
    PROMPTS,
    sampler=[GREEDY, Sampler(0.7), Sampler(top_k=3)],
    max_new_tokens=[3, 5, 9],
  )
  alone = engine.generate(PROMPTS[:1], sampler=GREEDY, max_new_tokens=3)
  assert rows[0][0].tokens.tolist() == alone[0][0].tokens.tolist()
  for (each,), most in zip(rows, (3, 5, 9), strict=True):
    assert len(each.tokens) <= most


def test_prompts_may_be_token_ids():
  policy = tiny.draw_params(CONFIG)
  bare = Engine(policy, CONFIG, eos_ids=EOS)
  named = Engine(policy, CONFIG, TOKENIZER, eos_ids=EOS)
  ids = tokenize_prompt(PROMPTS[0], TOKENIZER)
  one, two = (
    engine.generate([prompt], max_new_tokens=6)[0][0]
    for engine, prompt in ((bare, ids), (named, PROMPTS[0]))
  )
  assert one.tokens.tolist() == two.tokens.tolist()
  assert one.text == "" and two.text


def test_what_does_not_fit_is_refused(engine):
  policy = tiny.draw_params(CONFIG)
  with pytest.raises(ValueError, match="eos_ids: expected the tokens"):
    Engine(policy, CONFIG)
  bare = Engine(policy, CONFIG, eos_ids=EOS)
  with pytest.raises(ValueError, match="tokenizer: expected one for a prompt"):
    bare.generate(["text"])
  with pytest.raises(ValueError, match="tokenizer: expected one for a stop"):
    bare.generate([[1, 2]], stop=["x"])
  with pytest.raises(ValueError, match="prompts: expected a list of strings"):
    engine.generate("text")
  with pytest.raises(ValueError, match="stop: expected a list of strings"):
    engine.generate(["text"], stop="x")
  with pytest.raises(ValueError, match="expected an engine with a critic"):
    bare.generate([[1, 2]], values=True)
  with pytest.raises(ValueError, match="sampler: .* 2 in all, got 1"):
    engine.generate(["a", "b"], sampler=[GREEDY])


def test_searches_and_samples_with_an_int8_cache(engine):
  config = dataclasses.replace(CONFIG, cache_dtype="int8")
  small = Engine(
    engine.policy, config, TOKENIZER, critic=engine.critic, eos_ids=EOS, slots=3
  )
  strategy = decode.Strategy(beams=2, max_steps=4, max_step_tokens=5)
  options = {"max_new_tokens": 12}
  together = small.search(PROMPTS, strategy, **options)
  for prompt, each in zip(PROMPTS[:1], together, strict=False):
    (alone,) = small.search([prompt], strategy, **options)
    assert alone.tokens.tolist() == each.tokens.tolist()
    assert alone.score == pytest.approx(each.score, abs=1e-4)
  # Rounding to 8 bits moves log-probabilities, and not by much.
  (exact,), (rounded,) = (
    each.generate(PROMPTS[:1], sampler=GREEDY, max_new_tokens=12)[0]
    for each in (engine, small)
  )
  same = exact.tokens[:1] == rounded.tokens[:1]
  assert same.all()
  assert 0 < abs(exact.logps[0] - rounded.logps[0]) < 0.05
