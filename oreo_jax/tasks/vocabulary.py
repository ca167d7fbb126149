"""Tokenizers for embedded tasks: a fixed list of words or characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def make_word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
  """Makes a tokenizer with one token a word and one for a line break.

  Spaces only separate words and are no tokens. Any sequence of tokens decodes
  to a text that encodes to the same sequence; any text whose words are
  separated by single spaces or line breaks survives the round trip.

  Args:
    words: the vocabulary, without spaces or line breaks inside a word.

  Returns:
    A tokenizer with ids pad 0, eos 1, unk 2, line break 3, then `words`; it has
    no beginning-of-sequence token.
  """
  from tokenizers import Regex, decoders, pre_tokenizers

  splitter = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(" ", "removed"),
      pre_tokenizers.Split("\n", "isolated"),
    ]
  )
  # Words are joined with spaces, then those around line breaks are removed.
  joiner = decoders.Sequence(
    [
      decoders.WordPiece(prefix="##", cleanup=False),
      decoders.Fuse(),
      decoders.Replace(Regex(" ?\n ?"), "\n"),
    ]
  )
  return _wrap(words, splitter, joiner)


def make_character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
  """Makes a tokenizer with one token a character and one for a line break.

  Any text of these characters survives the round trip.

  Args:
    characters: the vocabulary, without the line break.

  Returns:
    A tokenizer with ids pad 0, eos 1, unk 2, line break 3, then `characters`;
    it has no beginning-of-sequence token.
  """
  from tokenizers import Regex, decoders, pre_tokenizers

  splitter = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
  return _wrap(list(characters), splitter, decoders.Fuse())


def _wrap(
  words: Sequence[str], splitter: Any, joiner: Any
) -> PreTrainedTokenizerFast:
  """Makes a tokenizer of words from the `tokenizers` that split and join."""
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  vocabulary = {
    token: index for index, token in enumerate([PAD, EOS, UNK, "\n", *words])
  }
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
  tokenizer.pre_tokenizer = splitter
  tokenizer.decoder = joiner
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=EOS,
    unk_token=UNK,
    clean_up_tokenization_spaces=False,
  )
