"""What was sampled is what is trained on."""

import json

import numpy as np
import pytest
from oracles.templates import (
  CHAT,
  CHATML,
  LLAMA2,
  LLAMA3,
  THINK,
  with_template,
)

from oreo_jax.data import (
  Sampled,
  Trajectory,
  Turn,
  load_trajectories,
  make_tokenizer,
  save_trajectories,
  tokenize_prompt,
  tokenize_trajectories,
)
from oreo_jax.data import tokenize_trajectory as tokenize
from oreo_jax.data.errors import SampledTokensError

BPE = make_tokenizer("bpe", texts=["ab ab ab"] * 50, vocab_size=262)
A, B, AB = BPE.convert_tokens_to_ids(["a", "b", "ab"])


def sampled(*tokens, logps=None):
  return Sampled(np.array(tokens, np.int32), logps)


def chat(turns, *turns_sampled, **fields):
  return Trajectory(
    turns=tuple(turns),
    reward=1.0,
    is_chat=True,
    sampled=turns_sampled,
    **fields,
  )


@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_sampled_tokens_are_trained_on(granularity):
  assert BPE.encode("ab") == [AB]
  options = {"granularity": granularity, "step_ends": lambda ids: ids == A}
  sequence = tokenize(
    Trajectory.from_text(
      "ab", "ab", 1.0, sampled=(sampled(A, B, BPE.eos_token_id),)
    ),
    BPE,
    **options,
  )
  bos, eos = BPE.bos_token_id, BPE.eos_token_id
  assert sequence.tokens.tolist() == [bos, AB, A, B, eos]
  assert sequence.action_mask.tolist() == [False, False, True, True, True]
  expected = {"token": [2, 3, 4], "step": [2, 3, 4], "response": [2]}
  assert (
    np.flatnonzero(sequence.decision_mask).tolist() == expected[granularity]
  )
  assert sequence.rewards.tolist() == [0, 0, 0, 0, 1]


def test_what_was_not_sampled_is_no_action():
  # A sampler that stopped for another reason wrote no end token.
  for truncated in (False, True):
    sequence = tokenize(
      Trajectory.from_text(
        "ab", "ab", 1.0, truncated=truncated, sampled=(sampled(A, B),)
      ),
      BPE,
    )
    assert sequence.tokens.tolist() == [BPE.bos_token_id, AB, A, B]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, THINK])
def test_answer_of_a_chat_follows_the_prompt_that_was_sampled_from(template):
  tokenizer = with_template(template, kind="bpe", texts=["ab 6 \n"] * 50)
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
  prompt = tokenize_prompt(CHAT[:3], tokenizer).tolist()
  # Blanks and thoughts that the template would rewrite are kept as sampled.
  for text in ("ab", " ab ", "<think>ab</think>ab"):
    tokens = [a, b] if text == "ab" else tokenizer.encode(text)
    answer = chat(
      [*CHAT[:3], Turn("assistant", text)], sampled(*tokens, end), given=3
    )
    sequence = tokenize(answer, tokenizer)
    assert sequence.tokens.tolist() == [*prompt, *tokens, end]
    assert np.flatnonzero(~sequence.action_mask).tolist() == list(
      range(len(prompt))
    )


def test_tokens_of_several_turns_are_spliced_in():
  tokenizer = with_template(CHATML, kind="bpe", texts=["ab go"] * 50)
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  a, b, ab = tokenizer.convert_tokens_to_ids(["a", "b", "ab"])
  turns = [CHAT[0], Turn("assistant", "ab"), CHAT[2], Turn("assistant", "abab")]
  text_alone = tokenize(
    Trajectory(tuple(turns), 1.0, is_chat=True), tokenizer
  ).tokens.tolist()
  first = text_alone.index(ab)
  cases = [
    ((a, b, end), (ab, a, b, end), 1),
    # The end token of the first turn was not sampled: it is context.
    ((a, b), (ab, a, b, end), 0),
  ]
  for ours, theirs, learned in cases:
    sequence = tokenize(
      chat(turns, sampled(*ours), sampled(*theirs)), tokenizer
    )
    tokens = sequence.tokens.tolist()
    assert tokens == [
      *text_alone[:first],
      *(a, b, end),
      *text_alone[first + 2 : -3],
      *theirs,
    ]
    assert sequence.tokens[sequence.action_mask].tolist() == [*ours, *theirs]
    assert sequence.action_mask[first + 2] == bool(learned)


def test_tokens_of_another_tokenizer_are_refused():
  wrong = Trajectory.from_text(
    "ab", "ab", 1.0, sampled=(sampled(A, A),), source="f.jsonl:3"
  )
  with pytest.raises(
    SampledTokensError, match=r"f\.jsonl:3.*'aa'.*'ab'.*remove the key"
  ):
    tokenize(wrong, BPE)
  good = Trajectory.from_text("ab", "ab", 1.0)
  assert len(tokenize_trajectories([wrong, good], BPE, on_error="skip")) == 1


def test_special_tokens_may_stand_in_the_text_or_not():
  tokens = sampled(A, BPE.bos_token_id, B, BPE.eos_token_id)
  for text in ("ab", "a<|bos|>b"):
    sequence = tokenize(
      Trajectory.from_text("q", text, 1.0, sampled=(tokens,)), BPE
    )
    assert sequence.tokens[sequence.action_mask].tolist() == [*tokens.tokens]


def test_an_end_token_need_not_be_special():
  tokenizer = make_tokenizer("byte")
  tokenizer.add_tokens(["<end>"])
  end = tokenizer.convert_tokens_to_ids("<end>")
  for truncated in (False, True):
    answer = Trajectory.from_text(
      "q", "ab", 1.0, sampled=(sampled(97, 98, end),), truncated=truncated
    )
    if truncated:
      with pytest.raises(SampledTokensError, match="'ab<end>'"):
        tokenize(answer, tokenizer)
      continue
    sequence = tokenize(
      answer,
      tokenizer,
      granularity="step",
      step_ends=lambda ids: np.zeros(len(ids), bool),
    )
    assert sequence.tokens[sequence.action_mask].tolist() == [97, 98, end]
    assert np.flatnonzero(sequence.decision_mask).tolist() == [2, 4]


def test_saved_is_loaded(tmp_path):
  path = tmp_path / "t.jsonl"
  logps = np.array([-0.1, -2.5], np.float32)
  trajectories = [
    Trajectory.from_text(
      "q", "ab", 1.0, id="1", sampled=(sampled(A, B, logps=logps),)
    ),
    Trajectory.from_text("q", "ab", 1.0, id="2", sampled=(sampled(A, B),)),
    Trajectory.from_text("q", "ab", 1.0, id="3"),
    chat(CHAT, sampled(1), sampled(), id="4", truncated=True),
  ]
  save_trajectories(path, trajectories)
  assert load_trajectories(path) == trajectories
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[0]["tokens"] == [[A, B]]
  # As few digits as tell the numbers apart: the files are large.
  assert rows[0]["logps"] == [[-0.1, -2.5]]
  assert trajectories[0] != trajectories[1]
  assert hash(trajectories[0].sampled) == hash(trajectories[1].sampled)


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"tokens": [1, 2]}, "1 lists, one an assistant turn"),
    ({"tokens": [[1], [2]]}, "1 lists, one an assistant turn"),
    ({"tokens": 7}, "1 lists, one an assistant turn"),
    ({"tokens": [[1.5]]}, "whole numbers"),
    ({"tokens": [[True]]}, "whole numbers"),
    ({"tokens": [["a"]]}, "whole numbers"),
    ({"tokens": [[[1]]]}, "whole numbers"),
    ({"tokens": [[1, -1]]}, r"holds -1, expected ids from 0"),
    ({"tokens": [[2**31]]}, r"holds 2147483648, expected ids"),
    ({"logps": [[-1.0]]}, 'without "tokens"'),
    ({"tokens": [[1]], "logps": [[-1.0], [0.0]]}, '"logps" needs 1 lists'),
    ({"tokens": [[1]], "logps": [[-1.0, 0.0]]}, "each of the 1 tokens"),
    ({"tokens": [[1]], "logps": [[float("nan")]]}, "finite"),
    ({"tokens": [[1]], "logps": [["a"]]}, "finite"),
  ],
)
def test_bad_tokens_name_the_row(tmp_path, keys, message):
  path = tmp_path / "t.jsonl"
  good = {"prompt": "a", "response": "b", "reward": 1}
  path.write_text(json.dumps(good) + "\n" + json.dumps(good | keys))
  with pytest.raises(SampledTokensError, match=message) as caught:
    load_trajectories(path)
  assert str(caught.value).startswith(f"{path}:2: ")
  assert len(load_trajectories(path, on_error="skip")) == 1


def test_saved_numbers_are_exact(tmp_path):
  path = tmp_path / "t.jsonl"
  logps = -np.random.default_rng(0).exponential(size=500).astype(np.float32)
  logps[:2] = [-1e-20, -1e20]
  trajectory = Trajectory.from_text(
    "q", "a" * 500, 1.0, id="1", sampled=(sampled(*[97] * 500, logps=logps),)
  )
  save_trajectories(path, [trajectory])
  assert load_trajectories(path) == [trajectory]


def test_ids_beyond_the_tokenizer_spell_nothing():
  # The vocabulary of a model may be larger than that of its tokenizer.
  tokens = sampled(A, 100_000, B, 100_001)
  sequence = tokenize(
    Trajectory.from_text("q", "ab", 1.0, sampled=(tokens,)), BPE
  )
  assert sequence.tokens[sequence.action_mask].tolist() == [*tokens.tokens]


def test_one_list_an_action():
  with pytest.raises(ValueError, match="2 assistant turns"):
    chat(CHAT, sampled(1))
