"""One answer, step by step, against a dense forward of the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from oracles import tiny

from oreo_jax import data, models
from oreo_jax.config import DataConfig
from oreo_jax.rollout import Codec
from oreo_jax.rollout.example import worked_example
from oreo_jax.tasks import Problem

TOKENIZER = data.make_tokenizer("byte")
CONFIG = dataclasses.replace(tiny.MODEL, vocab_size=len(TOKENIZER))
CODEC = Codec.make(TOKENIZER, DataConfig(), CONFIG.vocab_size)
PROBLEM = Problem("0", "1+1?")


def example(tokens, along, *, beta=0.5):
  policy, base = (tiny.draw_params(CONFIG, seed=seed) for seed in (1, 2))
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    found = worked_example(
      policy,
      base,
      PROBLEM,
      np.asarray(tokens, np.int32),
      along,
      0.0,
      CODEC,
      CONFIG,
      mesh,
      beta=beta,
    )
  return found, policy, base


def dense_logps(params, ids):
  hidden = models.apply(params, jnp.asarray([ids]), CONFIG).hidden
  logits = models.logits(params, hidden, CONFIG)[0, :-1]
  logps = jax.nn.log_softmax(logits)
  return np.asarray(logps)[np.arange(len(ids) - 1), ids[1:]]


def test_steps_are_cut_on_the_sampled_tokens():
  text = "a = 1\n\nb = 2\nso 3"
  tokens = TOKENIZER.encode(text)
  along = np.linspace(0.0, 1.0, len(tokens) + 1)
  shown, policy, base = example(tokens, along)
  assert [s["text"] for s in shown["steps"]] == ["a = 1\n", "\nb = 2\n", "so 3"]
  assert shown["start_value"] == 0.0
  ends = [6, 13, 17]
  np.testing.assert_allclose(
    [s["value"] for s in shown["steps"]], along[ends], rtol=1e-6
  )
  gains = [s["explicit_advantage"] for s in shown["steps"]]
  np.testing.assert_allclose(sum(gains), 1.0, rtol=1e-6)
  # The implicit advantage, from a forward of the whole text at once.
  (prompt,) = CODEC.prompts([PROBLEM])
  ids = np.concatenate([prompt, tokens])
  ratios = (dense_logps(policy, ids) - dense_logps(base, ids))[
    len(prompt) - 1 :
  ]
  want = [
    0.5 * ratios[a:b].sum() for a, b in zip([0, *ends], ends, strict=False)
  ]
  got = [s["implicit_advantage"] for s in shown["steps"]]
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_tokens_that_would_be_encoded_otherwise_stay_as_they_were_sampled():
  # Two halves of a character: text does not give these tokens back.
  tokens = [*"é\nz".encode()[:1], ord("\n"), ord("z")]
  shown, _, _ = example(tokens, np.arange(4.0))
  assert [s["value"] for s in shown["steps"]] == [2.0, 3.0]


def test_an_empty_answer_has_no_steps():
  # It used to end `evaluate` with an exception.
  shown, _, _ = example([], np.array([0.25]))
  assert shown["steps"] == [] and shown["start_value"] == 0.25
