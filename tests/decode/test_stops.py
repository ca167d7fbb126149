"""Where steps end: against the decoded text, for every kind of tokenizer."""

import doctest
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import stops as oracle
from tokenizers import decoders

from oreo_jax.data import make_tokenizer
from oreo_jax.decode import DELIMITERS, make_stops, step_ends
from oreo_jax.decode.stops import advance, token_texts
from oreo_jax.tasks.vocabulary import (
  make_character_tokenizer,
  make_word_tokenizer,
)

SENTENCES = DELIMITERS["sentences"]
DELIMITER_SETS = [
  DELIMITERS["lines"],
  SENTENCES,
  ("\n\n",),
  (";", "é", "a\na"),
  ("aab", "ab.", ".a"),
]


def wrap(vocabulary, decoder, *, added=()):
  """A fast tokenizer of some token strings; token 0 is the end, special."""
  names = dict.fromkeys(["<eos>", "<unk>", *vocabulary])
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {name: id for id, name in enumerate(names)}, unk_token="<unk>"
    )
  )
  backend.decoder = decoder
  wrapped = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
  )
  wrapped.add_tokens([tokenizers.AddedToken(name) for name in added])
  return wrapped


def text_of(tokenizer, *, front=()):
  """Returns what tells the text that ids add to the tokens `front`."""

  def decode(ids):
    return tokenizer.decode([*front, *ids], skip_special_tokens=True)

  return lambda ids: decode(ids).removeprefix(decode([]))


def compare(tokenizer, delimiters, ids, *, front=()):
  """Checks the ends of one answer, in NumPy and under jit."""
  vocab_size = len(tokenizer) + 3
  stops = make_stops(tokenizer, delimiters, vocab_size)
  want = oracle.step_ends(text_of(tokenizer, front=front), ids, delimiters)
  ends = step_ends(stops, ids)
  assert ends.tolist() == want, tokenizer.decode(ids)
  return stops, ends


def scanned_ends(stops, rows):
  """The ends of [R, L] tokens by `advance` inside one jitted scan."""

  @jax.jit
  def run(stops, rows):
    state = jnp.full(rows.shape[0], stops.start, jnp.int32)
    return jax.lax.scan(
      lambda state, tokens: advance(stops, state, tokens), state, rows.T
    )[1].T

  return np.asarray(run(stops, jnp.asarray(rows, jnp.int32)))


SYLLABLES = st.text(alphabet="ab.$;é \n", min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(
  names=st.lists(SYLLABLES, min_size=1, max_size=12, unique=True),
  delimiters=st.one_of(
    st.sampled_from(DELIMITER_SETS),
    st.lists(
      st.text(alphabet="ab. \n", min_size=1, max_size=4), min_size=1, max_size=3
    ),
  ),
  data=st.data(),
)
def test_random_vocabularies(names, delimiters, data):
  # "q" is the plain word that the texts of others are told by.
  tokenizer = wrap([*names, "q"], decoders.Fuse())
  ids = data.draw(
    st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=30)
  )
  compare(tokenizer, delimiters, ids)


@settings(max_examples=200, deadline=None)
@given(
  ids=st.lists(
    st.one_of(
      st.sampled_from([*b"\n. $;a", *"é".encode()]), st.integers(0, 258)
    ),
    min_size=1,
    max_size=40,
  ),
  delimiters=st.sampled_from(DELIMITER_SETS),
)
def test_bytes_whether_or_not_they_are_text(ids, delimiters):
  compare(make_tokenizer("byte"), delimiters, ids)


TEXT = (
  "We add 3 and 4.5 first. Then x = 7.\n\nSo $x = 7.$ Done; naïve.\n"
  " It is 8. \n \n. $ .$  end.é "
)


@pytest.fixture(scope="module")
def bpe():
  return make_tokenizer("bpe", texts=[TEXT, TEXT.upper()] * 20, vocab_size=350)


@pytest.mark.parametrize("delimiters", DELIMITER_SETS)
def test_trained_bpe(bpe, delimiters):
  rng = np.random.default_rng(0)
  compare(bpe, delimiters, bpe.encode(TEXT))
  rows = rng.integers(0, len(bpe), (40, 25))
  ends = [compare(bpe, delimiters, row.tolist())[1] for row in rows]
  stops = make_stops(bpe, delimiters, len(bpe))
  np.testing.assert_array_equal(scanned_ends(stops, rows), ends)


def test_sentence_ends_lie_across_the_tokens_of_a_bpe(bpe):
  # No token holds ". ": a mask over tokens could only see the line breaks.
  names = [bpe.decode([id]) for id in range(len(bpe))]
  assert not any(". " in name for name in names)
  ids = bpe.encode("We add. Then x.\nSo $x = 7.$ Done.")
  ends = step_ends(make_stops(bpe, SENTENCES, len(bpe)), ids)
  cuts = [0, *(np.flatnonzero(ends) + 1), len(ids)]
  steps = [
    bpe.decode(ids[start:end]) for start, end in itertools.pairwise(cuts)
  ]
  # A token that begins with the blank of ". " goes with the step it ends.
  assert steps == ["We add. Then", " x.\n", "So $x = 7.$ Done", "."]


def test_delimiters_inside_a_token():
  tokenizer = wrap(["a", "a\nb\n\nc", "\n", "b. c", "\n\n"], decoders.Fuse())
  stops = make_stops(tokenizer, SENTENCES, len(tokenizer))
  a, lines, newline, sentence, blank = range(2, 7)

  def ends(*ids):
    return step_ends(stops, ids).astype(int).tolist()

  # What follows the last delimiter of a token begins the next step.
  assert ends(lines, newline) == [1, 1]
  assert ends(a, newline, newline, a, newline) == [0, 1, 0, 0, 1]
  assert ends(a, blank, newline, a, blank) == [0, 1, 0, 0, 1]
  assert ends(blank, newline, sentence, newline) == [0, 0, 1, 1]


def test_special_tokens_and_padded_ids_have_no_text(bpe):
  stops = make_stops(bpe, ("..",), 400)
  dot = bpe.encode(".")[0]
  eos, beyond = bpe.eos_token_id, 399
  assert step_ends(stops, [dot, eos, beyond, dot]).tolist() == [
    False,
    False,
    False,
    True,
  ]


PIECES = ["▁", "▁a", "a", ".", "▁.$", "$", "b.▁c", "▁▁", ";", "é", "\n"]
FALLBACK = decoders.Sequence(
  [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ]
)


@settings(max_examples=100, deadline=None)
@given(
  ids=st.lists(st.integers(2, 15), min_size=1, max_size=30),
  delimiters=st.sampled_from([*DELIMITER_SETS, (" a", ".  ")]),
)
@pytest.mark.parametrize(
  "decoder, names",
  [
    (decoders.Metaspace(), PIECES),
    (FALLBACK, [*PIECES, "<0x0A>", "<0x2E>", "<0x20>"]),
    # Added tokens pass through the decoder like others.
    (FALLBACK, [*PIECES[:-1], ("\n\n",), ("x. y",), ("<0x0A>",)]),
  ],
)
def test_sentencepiece(decoder, names, ids, delimiters):
  added = [name[0] for name in names if isinstance(name, tuple)]
  names = [name for name in names if not isinstance(name, tuple)]
  tokenizer = wrap(names, decoder, added=added)
  # The blank in front of a text is taken away, but answers follow a prompt.
  front = tokenizer.convert_tokens_to_ids(["a"])
  ids = [min(id, len(tokenizer) - 1) for id in ids]
  compare(tokenizer, delimiters, ids, front=front)


def test_bytes_of_a_character_are_put_together():
  tokenizer = wrap(["a", "<0xC3>", "<0xA9>", "<0x0A>"], FALLBACK)
  a, high, low, newline = range(2, 6)
  stops = make_stops(tokenizer, ("é", "\n"), len(tokenizer))
  ids = [high, low, low, high, a, high, low, high, newline]
  # "é", then a lone byte, a lone byte, "a", "é", a lone byte, line break.
  want = [0, 1, 0, 0, 0, 0, 1, 0, 1]
  assert step_ends(stops, ids).astype(int).tolist() == want


@settings(max_examples=100, deadline=None)
@given(
  ids=st.lists(st.integers(0, 9), min_size=1, max_size=30),
  delimiters=st.sampled_from([*DELIMITER_SETS, (" a b", "bb")]),
)
@pytest.mark.parametrize(
  "tokenizer",
  [
    make_character_tokenizer("ab. ;$"),
    wrap(["a", "##b", "##b.", ".", "\n", ";"], decoders.WordPiece("##")),
    wrap(["a", "b", "a.", ";", "\n"], None),
  ],
  ids=["characters", "wordpiece", "none"],
)
def test_other_decoders(tokenizer, ids, delimiters):
  front = tokenizer.convert_tokens_to_ids(["a"])
  ids = [id % len(tokenizer) for id in ids]
  compare(tokenizer, delimiters, ids, front=front)


@settings(max_examples=200, deadline=None)
@given(
  ids=st.lists(st.integers(0, 9), min_size=1, max_size=30),
  # Behind a line break a word counts with a blank that the text does not have,
  # so no delimiter here begins with a blank or goes on behind a line break.
  delimiters=st.sampled_from([*DELIMITER_SETS[:3], (";", "a. b"), ("b a",)]),
)
def test_words_of_the_embedded_tasks(ids, delimiters):
  tokenizer = make_word_tokenizer(["a", "b", "a.", ";", ".$", ". x"])
  front = tokenizer.convert_tokens_to_ids(["a"])
  compare(tokenizer, delimiters, ids, front=front)


@pytest.mark.parametrize("added", ["\n\n", "<think>. x", "</think>\n", "é"])
def test_added_tokens_of_a_byte_level_tokenizer(added):
  tokenizer = make_tokenizer("byte")
  tokenizer.add_tokens([tokenizers.AddedToken(added)])
  new = len(tokenizer) - 1
  rng = np.random.default_rng(0)
  for _ in range(30):
    ids = rng.choice([*b"\n. $a", new, tokenizer.eos_token_id], 20).tolist()
    compare(tokenizer, SENTENCES, ids)


def test_table_is_compact():
  tokenizer = make_tokenizer("byte")
  few = make_stops(tokenizer, SENTENCES, 300).table
  assert few.shape == (4, 300) and few.dtype == np.int8
  many = make_stops(tokenizer, ("a" * 100, "b" * 20), 300).table
  assert many.dtype == np.int16
  ids = list(b"a" * 250)
  ends = np.flatnonzero(
    step_ends(make_stops(tokenizer, ("a" * 100,), 300), ids)
  )
  assert ends.tolist() == [99, 199]


@pytest.mark.parametrize("bad", ["lines", "", (), ("\n", "")])
def test_no_delimiters_are_refused(bad):
  with pytest.raises(ValueError, match=r"delimiters: .*data\.delimiters"):
    make_stops(make_tokenizer("byte"), bad, 300)


def test_odd_tokenizers_are_refused():
  with pytest.raises(ValueError, match="tokenizer: expected a fast tokenizer"):
    token_texts(object(), 3)
  with pytest.raises(ValueError, match="got BPEDecoder"):
    token_texts(wrap(["a</w>", "b"], decoders.BPEDecoder()), 4)
  with pytest.raises(ValueError, match="a plain word or letter"):
    token_texts(wrap(["\n", ". "], decoders.Fuse()), 4)


def test_examples_in_the_documentation():
  module = importlib.import_module("oreo_jax.decode.stops")
  result = doctest.testmod(module)
  assert result.attempted and not result.failed
