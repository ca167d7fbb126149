import collections
import functools
import logging

import numpy as np
import pytest
import tokenizers
import transformers
from oracles import templates

from oreo_jax import decode
from oreo_jax.data import (
  Trajectory,
  Turn,
  make_tokenizer,
  tokenize_prompt,
  tokenize_trajectories,
)
from oreo_jax.data import tokenize_trajectory as tokenize
from oreo_jax.data.errors import (
  EmptyResponseError,
  PromptLengthError,
  SequenceLengthError,
)

BYTE = make_tokenizer("byte")
TEXTS = [
  "There are 12 eggs. The cook takes 3.5 of them.\nSo 12 - 3.5 = 8.5\n",
  "Naïve “quotes” — and $x = 7.$ The end of the story, the eggs are gone.",
]


def wrap(tokenizer, **special):
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
  )


def trimming():
  """Byte-level BPE whose offsets leave out leading spaces, as GPT-2's do."""
  trained = make_tokenizer("bpe", texts=TEXTS * 50, vocab_size=400)
  backend = tokenizers.Tokenizer.from_str(trained.backend_tokenizer.to_str())
  backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  return wrap(backend, bos_token="<|bos|>", eos_token="<|eos|>")


def metaspace():
  """Word pieces that carry a leading blank, as SentencePiece does."""
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=90, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
  )
  backend.train_from_iterator(TEXTS * 50, trainer)
  return wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words():
  """One token a word; blanks other than line breaks are dropped."""
  names = ["[eos]", "\n", "go", "left", "right", "goal", "."]
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, "[eos]")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(" ", "removed"),
      tokenizers.pre_tokenizers.Split("\n", "isolated"),
    ]
  )
  return wrap(backend, eos_token="[eos]", pad_token="[eos]")


TOKENIZERS = {
  "byte": BYTE,
  "bpe": make_tokenizer("bpe", texts=TEXTS * 50, vocab_size=400),
  "trimming": trimming(),
  "metaspace": metaspace(),
}


def line_ends(tokenizer):
  """Marks tokens whose text ends with a line break, after anything said."""

  def step_ends(ids):
    ends, said = [], False
    for token in ids:
      text = tokenizer.decode([token])
      said = said or bool(text.strip())
      ends.append(said and text.endswith("\n"))
      said = said and not ends[-1]
    return np.array(ends, bool)

  return step_ends


def stop_ends(tokenizer, delimiters):
  """The definition of a step that generation and search use."""
  delimiters = decode.DELIMITERS.get(delimiters, delimiters)
  stops = decode.make_stops(tokenizer, delimiters, len(tokenizer))
  return functools.partial(decode.step_ends, stops)


def split_text(text, delimiters):
  """Cuts a text after each delimiter that follows something said."""
  steps, step = [], ""
  for character in text:
    step += character
    if step.strip() and step.endswith(tuple(delimiters)):
      steps.append(step)
      step = ""
  return [*steps, step] if step else steps


def split_steps(sequence, tokenizer):
  """Decodes the tokens from each decision to the next."""
  at = [*np.flatnonzero(sequence.decision_mask), len(sequence.tokens)]
  return [
    tokenizer.decode(sequence.tokens[a:b])
    for a, b in zip(at, at[1:], strict=False)
  ]


def test_bytes_by_hand():
  sequence = tokenize(
    Trajectory.from_text("ab", "c\nd", 0.5, id="7", problem="p"),
    BYTE,
    granularity="step",
    step_ends=lambda ids: ids == 10,
  )
  assert sequence.tokens.tolist() == [256, 97, 98, 99, 10, 100, 257]
  assert sequence.action_mask.tolist() == [False] * 3 + [True] * 4
  assert np.flatnonzero(sequence.decision_mask).tolist() == [3, 5, 6]
  assert sequence.rewards.tolist() == [0] * 6 + [0.5]
  assert (sequence.id, sequence.problem) == ("7", "p")
  assert [a.dtype.name for a in sequence[:4]] == [
    "int32",
    "bool",
    "bool",
    "float32",
  ]


def test_a_turn_and_its_end_are_decisions():
  tokenizer = templates.with_template(templates.CHATML)
  turns = [Turn("user", "a"), Turn("assistant", "b\nc"), Turn("user", "d")]
  chat = Trajectory((*turns, Turn("assistant", "efg")), 1.0, is_chat=True)
  sequence = tokenize(chat, tokenizer, granularity="turn")
  decisions = np.flatnonzero(sequence.decision_mask)
  assert tokenizer.decode(sequence.tokens[decisions]) == (
    "b<|im_end|>e<|im_end|>"
  )
  # As step level does where no step ends within a turn.
  steps = tokenize(
    chat,
    tokenizer,
    granularity="step",
    step_ends=lambda ids: np.zeros(len(ids), bool),
  )
  np.testing.assert_array_equal(sequence.decision_mask, steps.decision_mask)


def test_truncated_has_no_end():
  sequence = tokenize(
    Trajectory.from_text("a", "bc", 1.0, truncated=True), BYTE
  )
  assert sequence.tokens.tolist() == [256, 97, 98, 99]
  assert sequence.rewards.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_special_tokens_are_not_doubled(granularity):
  options = {"granularity": granularity, "step_ends": lambda ids: ids == 10}
  sequence = tokenize(
    Trajectory.from_text("<|bos|>a", "b<|eos|>", 1.0), BYTE, **options
  )
  assert sequence.tokens.tolist() == [256, 97, 98, 257]
  # However the end token comes about, it is the same action.
  added = tokenize(Trajectory.from_text("a", "b", 1.0), BYTE, **options)
  for a, b in zip(sequence[:4], added[:4], strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_masks_cover_the_response(name, granularity):
  tokenizer = TOKENIZERS[name]
  for prompt, response in (TEXTS, TEXTS[::-1], (TEXTS[0], "8.5")):
    sequence = tokenize(
      Trajectory.from_text(prompt, response, 1.0),
      tokenizer,
      granularity=granularity,
      step_ends=line_ends(tokenizer),
    )
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert sequence.tokens[sequence.action_mask].tolist() == [
      *ids,
      tokenizer.eos_token_id,
    ]
    context = sequence.tokens[~sequence.action_mask]
    assert context[0] == tokenizer.bos_token_id
    assert context.tolist() == tokenize_prompt(prompt, tokenizer).tolist()
    assert (
      context[1:].tolist()
      == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )
    first = sequence.action_mask.argmax()
    assert sequence.action_mask[first:].all()
    assert not (sequence.decision_mask & ~sequence.action_mask).any()
    assert sequence.decision_mask[first]
    if granularity == "token":
      np.testing.assert_array_equal(
        sequence.decision_mask, sequence.action_mask
      )
    elif granularity == "response":
      assert sequence.decision_mask.sum() == 1


def test_a_step_ends_with_a_token():
  response = "Twelve eggs. The cook takes. The end."
  # The delimiter ". " ends within a token " The", which ends the step.
  for name in ("bpe", "trimming"):
    assert TOKENIZERS[name].tokenize(" The") == ["ĠThe"]
    sequence = tokenize(
      Trajectory.from_text("q", response, 1.0),
      TOKENIZERS[name],
      granularity="step",
      step_ends=stop_ends(TOKENIZERS[name], "sentences"),
    )
    assert split_steps(sequence, TOKENIZERS[name]) == [
      "Twelve eggs. The",
      " cook takes. The",
      " end.",
      "<|eos|>",
    ]
  sequence = tokenize(
    Trajectory.from_text("q", response, 1.0),
    BYTE,
    granularity="step",
    step_ends=stop_ends(BYTE, "sentences"),
  )
  assert split_steps(sequence, BYTE) == [
    "Twelve eggs. ",
    "The cook takes. ",
    "The end.",
    "<|eos|>",
  ]


@pytest.mark.parametrize("name", ["byte", "bpe", "trimming"])
def test_line_steps_decode_to_the_lines(name):
  tokenizer = TOKENIZERS[name]
  lines = ["Naïve “quotes”\n", "\t12 - 3.5 = 8.5 \n", "\n  So: 8.5"]
  sequence = tokenize(
    Trajectory.from_text("q", "".join(lines), 1.0),
    tokenizer,
    granularity="step",
    step_ends=stop_ends(tokenizer, "lines"),
  )
  assert split_steps(sequence, tokenizer) == [*lines, "<|eos|>"]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
  "response, expected",
  [
    # To stop is a step of its own, after a delimiter and without one.
    ("go\nleft", ["go\n", "left", "[eos]"]),
    ("go\nleft\n", ["go\n", "left\n", "[eos]"]),
    ("go left \n right", ["goleft\n", "right", "[eos]"]),
    ("go", ["go", "[eos]"]),
    # A step ends with the first delimiter after something was said.
    ("\n\ngo\n\nleft", ["\n\ngo\n", "\nleft", "[eos]"]),
  ],
)
def test_steps_of_words(response, expected, truncated):
  tokenizer = words()
  sequence = tokenize(
    Trajectory.from_text("goal .", response, 1.0, truncated=truncated),
    tokenizer,
    granularity="step",
    step_ends=line_ends(tokenizer),
  )
  steps = [step.replace(" ", "") for step in split_steps(sequence, tokenizer)]
  assert steps == (expected[:-1] if truncated else expected)


def test_step_ends_is_asked_about_the_response_alone():
  asked = []

  def step_ends(ids):
    asked.append(ids.tolist())
    return np.array([True, False, True])

  sequence = tokenize(
    Trajectory.from_text("ab", "cde", 1.0),
    BYTE,
    granularity="step",
    step_ends=step_ends,
  )
  assert asked == [[99, 100, 101]]
  assert np.flatnonzero(sequence.decision_mask).tolist() == [3, 4, 6]
  with pytest.raises(ValueError, match=r"step_ends returned.*bool\[3\]"):
    tokenize(
      Trajectory.from_text("ab", "cde", 1.0),
      BYTE,
      granularity="step",
      step_ends=lambda ids: np.zeros(2, bool),
    )


def test_pad_equal_to_eos_changes_nothing():
  tokenizer = words()
  assert tokenizer.pad_token_id == tokenizer.eos_token_id
  sequence = tokenize(Trajectory.from_text("goal", "go", 1.0), tokenizer)
  assert sequence.tokens.tolist() == [5, 2, 0]
  assert sequence.action_mask.tolist() == [False, True, True]


def test_many_equal_one_by_one():
  trajectories = [
    Trajectory.from_text(TEXTS[i % 2], f"{i}\n{TEXTS[1 - i % 2]}", float(i))
    for i in range(30)
  ]
  options = {"granularity": "step", "step_ends": line_ends(BYTE)}
  many = tokenize_trajectories(trajectories, BYTE, **options)
  for trajectory, sequence in zip(trajectories, many, strict=True):
    alone = tokenize(trajectory, BYTE, **options)
    for a, b in zip(alone[:4], sequence[:4], strict=True):
      np.testing.assert_array_equal(a, b)


def test_long_sequences(caplog):
  trajectories = [
    Trajectory.from_text("a" * 4, "b", 1.0, source="f.jsonl:1", id="x"),
    Trajectory.from_text("a" * 40, "b", 1.0, source="f.jsonl:2", id="y"),
    Trajectory.from_text("a", "b" * 40, 1.0, source="f.jsonl:3", id="z"),
  ]
  with pytest.raises(
    PromptLengthError, match=r"f\.jsonl:2 \(id y\).*41 tokens.*max_length"
  ):
    tokenize_trajectories(trajectories, BYTE, max_length=20)
  with pytest.raises(SequenceLengthError, match=r"f\.jsonl:3.*43 tokens"):
    tokenize_trajectories(trajectories, BYTE, max_length=20, on_error="skip")
  kept = tokenize_trajectories(
    trajectories, BYTE, max_length=20, on_error="skip", on_long="skip"
  )
  assert [sequence.id for sequence in kept] == ["x"]
  skipped = collections.Counter()
  caplog.clear()
  with caplog.at_level(logging.WARNING, logger="absl"):
    tokenize_trajectories(
      trajectories * 2,
      BYTE,
      max_length=20,
      on_error="skip",
      on_long="skip",
      skipped=skipped,
    )
  assert skipped == {"prompt length": 2, "sequence length": 2}
  assert "skipped 4 rows, kept 2" in caplog.messages[-1]
  # One example of each kind is shown.
  assert sum("f.jsonl:" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_empty_answer_is_to_end_at_once(granularity):
  sequence = tokenize(
    Trajectory.from_text("ab", "", 0.5),
    BYTE,
    granularity=granularity,
    step_ends=line_ends(BYTE),
  )
  assert sequence.tokens.tolist() == [256, 97, 98, 257]
  for array in (sequence.action_mask, sequence.decision_mask):
    assert array.tolist() == [False, False, False, True]
  assert sequence.rewards.tolist() == [0, 0, 0, 0.5]


def test_answer_cut_off_before_its_first_token_is_dropped_and_counted():
  cut = Trajectory.from_text("a", "", 0.0, truncated=True, id="x", source="f:1")
  skipped = collections.Counter(before=1)
  sequences = tokenize_trajectories(
    [cut, Trajectory.from_text("a", "b", 1.0), cut], BYTE, skipped=skipped
  )
  assert len(sequences) == 1
  assert skipped == {"before": 1, "no action": 2}
  with pytest.raises(EmptyResponseError, match=r"f:1.*before its first token"):
    tokenize(cut, BYTE)


def test_prompt_needs_a_token():
  empty = Trajectory.from_text("", "go", 1.0, id="e")
  assert len(tokenize(empty, BYTE).tokens) == 4
  with pytest.raises(PromptLengthError, match="no BOS"):
    tokenize(empty, words())


def test_unknown_options():
  trajectory = Trajectory.from_text("a", "b", 1.0)
  with pytest.raises(ValueError, match="granularity"):
    tokenize(trajectory, BYTE, granularity="word")
  with pytest.raises(ValueError, match="step_ends is None"):
    tokenize(trajectory, BYTE, granularity="step")
  no_eos = wrap(tokenizers.Tokenizer.from_str(BYTE.backend_tokenizer.to_str()))
  with pytest.raises(ValueError, match="no EOS"):
    tokenize(trajectory, no_eos)
  assert (
    len(
      tokenize(
        Trajectory.from_text("a", "b", 1.0, truncated=True), no_eos
      ).tokens
    )
    == 2
  )


@pytest.mark.parametrize("delimiters", ["lines", "sentences", (";", "é")])
def test_random_texts_decode_to_their_steps(delimiters):
  rng = np.random.default_rng(0)
  letters = list("ab .\n;$\\é—𝄞7 ")
  step_ends = stop_ends(BYTE, delimiters)
  for _ in range(100):
    prompt, response = (
      "".join(rng.choice(letters, rng.integers(0, 30))) for _ in range(2)
    )
    sequence = tokenize(
      Trajectory.from_text(prompt, response, 1.0),
      BYTE,
      granularity="step",
      step_ends=step_ends,
    )
    marks = decode.DELIMITERS.get(delimiters, delimiters)
    assert split_steps(sequence, BYTE) == [
      *split_text(response, marks),
      "<|eos|>",
    ]
    context = sequence.tokens[~sequence.action_mask]
    assert BYTE.decode(context) == f"<|bos|>{prompt}"
