"""The real SmolLM2-135M: logits, greedy tokens, and where its steps end.

Runs where torch is installed and OREO_SMOLLM2 names the directory that
scripts/convert_smollm2.py makes.
"""

import functools
import os

import jax
import numpy as np
import pytest
from oracles import stops as oracle

torch = pytest.importorskip("torch", reason="needs torch (CPU is enough)")
transformers = pytest.importorskip("transformers")
PATH = os.environ.get("OREO_SMOLLM2", "")
if not PATH:
  pytest.skip(
    "OREO_SMOLLM2 is not set: the directory of scripts/convert_smollm2.py",
    allow_module_level=True,
  )

from oreo_jax import decode
from oreo_jax.models import apply, load_hf, logits

pytestmark = pytest.mark.slow
NEW_TOKENS = 32
STORY = (
  "A farmer has 17 sheep, 4 cows and some hens. Every morning she collects "
  "eggs before she walks to the market in the next village. "
)
QUESTIONS = (
  "What is 7 + 8?",
  "Name three rivers.",
  "How many legs do 12 hens and 4 cows have together?",
  "Write a haiku about rain.",
  "Translate 'good morning' into French.",
  "Ann has 3 apples and buys 5 more. How many has she now?",
  "Why is the sky blue?",
  "List the first six prime numbers.",
)


@functools.cache
def theirs():
  return transformers.AutoModelForCausalLM.from_pretrained(
    PATH, dtype=torch.float32
  ).eval()


@functools.cache
def ours():
  return load_hf(PATH)


@functools.cache
def prompts():
  """Sixteen prompts of 4 to 150 tokens, half of them chats."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(PATH)
  rows = [
    tokenizer.apply_chat_template(
      [{"role": "user", "content": STORY * (i % 4) + question}],
      add_generation_prompt=True,
      return_dict=False,
    )
    for i, question in enumerate(QUESTIONS)
  ]
  rows += [
    tokenizer(STORY * (i % 3) + question)["input_ids"]
    for i, question in enumerate(QUESTIONS)
  ]
  return [np.asarray(row) for row in rows]


def their_logits(tokens):
  with torch.no_grad():
    return theirs()(torch.tensor(tokens)[None]).logits[0].numpy()


def test_logits_equal_transformers():
  params, config = ours()
  length = max(map(len, prompts()))

  @jax.jit
  def run(tokens, segments):
    hidden = apply(params, tokens, config, segment_ids=segments).hidden
    return logits(params, hidden, config)

  worst = 0.0
  for row in prompts():
    tokens = np.full((1, length), 17, np.int32)  # padding is not zero
    segments = np.zeros((1, length), np.int32)
    tokens[0, : len(row)], segments[0, : len(row)] = row, 1
    got = np.asarray(run(tokens, segments))[0, : len(row)]
    want = their_logits(row)
    worst = max(worst, np.abs(got - want).max() / want.std())
  print(f"largest difference: {worst:.2e} standard deviations")
  assert worst <= 1e-4


def test_greedy_tokens_equal_transformers():
  params, config = ours()
  rows = prompts()
  eos = theirs().config.eos_token_id
  longest = max(map(len, rows))
  ids = np.full((len(rows), longest), eos)
  mask = np.zeros_like(ids)
  for i, row in enumerate(rows):
    ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
  with torch.no_grad():
    generated = (
      theirs()
      .generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
      )[:, longest:]
      .numpy()
    )
  result = decode.generate(
    params,
    rows,
    jax.random.key(0),
    config,
    max_new_tokens=NEW_TOKENS,
    eos_ids=(eos,),
    sampler=decode.GREEDY,
  )
  equal = 0
  for i, row in enumerate(rows):
    got = result.tokens[i, : result.lengths[i]]
    want = generated[i, : len(got)]
    different = np.flatnonzero(got != want)
    if not len(different):
      assert len(got) == NEW_TOKENS or got[-1] == eos
      equal += 1
      continue
    # Only a tie may part them, and then the rest is another text.
    first = different[0]
    scores = their_logits(np.concatenate([row, want[:first]]))[-1]
    gap = float(scores[want[first]] - scores[got[first]])
    print(f"row {i}, token {first}: {want[first]} or {got[first]}, {gap:.1e}")
    assert 0 <= gap < 1e-3
  print(f"{equal} of {len(rows)} rows equal over {NEW_TOKENS} tokens")


@pytest.mark.parametrize(
  "delimiters",
  [
    decode.DELIMITERS["lines"],
    decode.DELIMITERS["sentences"],
    ("\n\n",),
    ("####", "</s>", "é", " and"),
  ],
)
def test_steps_end_where_the_text_says(delimiters):
  tokenizer = transformers.AutoTokenizer.from_pretrained(PATH)
  stops = decode.make_stops(tokenizer, delimiters, len(tokenizer))
  rng = np.random.default_rng(0)
  answers = [rng.integers(0, len(tokenizer), 24) for _ in range(300)]
  answers += [
    # Steps that end inside a token, across tokens, and in half a character.
    np.asarray(tokenizer(text)["input_ids"])
    for text in (
      *(STORY + question + "\n\n \n" for question in QUESTIONS),
      "One. Two!  Three?\n\n\nFour... 5.5 #### 6 and 7</s> caf\u00e9\u00e9 "
      "\U0001f600. \u4f60\u597d\u3002\n",
    )
  ]
  ended = 0
  for ids in answers:
    want = oracle.step_ends(
      lambda some: tokenizer.decode(some, skip_special_tokens=True),
      ids.tolist(),
      delimiters,
    )
    ends = decode.step_ends(stops, ids)
    assert ends.tolist() == want, tokenizer.decode(ids)
    ended += ends.sum()
  assert ended > 10
