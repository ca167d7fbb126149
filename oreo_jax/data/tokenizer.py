"""Tokenizers: bytes, byte-pair encoding trained on texts, or a checkpoint's.

All are `transformers` fast tokenizers with the tokens BOS, EOS and padding;
nothing is downloaded, and no code of a checkpoint is run.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from oreo_jax import files

if TYPE_CHECKING:
  from tokenizers import Tokenizer
  from tokenizers.models import Model
  from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
KINDS = ("byte", "bpe", "hf")


def make_tokenizer(
  kind: str,
  *,
  texts: Iterable[str] = (),
  vocab_size: int = 4096,
  path: str | os.PathLike[str] = "",
) -> PreTrainedTokenizerBase:
  """Makes a tokenizer.

  Args:
    kind: "byte" (256 bytes and the special tokens, nothing to train), "bpe"
      (byte-pair encoding trained on `texts`), or "hf" (read from `path`).
    texts: training texts of "bpe".
    vocab_size: tokens of "bpe", special ones included.
    path: directory of "hf".

  Returns:
    The tokenizer.
  """
  if kind == "byte":
    return byte_tokenizer()
  if kind == "bpe":
    return train_bpe(texts, vocab_size=vocab_size)
  if kind == "hf":
    return load_tokenizer(path)
  raise ValueError(
    f"tokenizer kind is {kind!r}, expected one of {KINDS}"
    " (--config.data.tokenizer)"
  )


def byte_tokenizer() -> PreTrainedTokenizerFast:
  """Returns the tokenizer whose token b is byte b; BOS, EOS, PAD follow."""
  import tokenizers

  vocab = {char: byte for byte, char in enumerate(byte_characters())}
  model = tokenizers.models.BPE(vocab=vocab, merges=[])
  return _wrap(_byte_level(model, split_words=False))


def train_bpe(
  texts: Iterable[str], *, vocab_size: int
) -> PreTrainedTokenizerFast:
  """Returns a byte-level byte-pair tokenizer trained on texts."""
  import tokenizers

  if vocab_size < 256 + 3:
    raise ValueError(
      f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need 259"
      " (--config.data.tokenizer_vocab)"
    )
  tokenizer = _byte_level(tokenizers.models.BPE(), split_words=True)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - 3,
    initial_alphabet=byte_characters(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return _wrap(tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
  """Reads a tokenizer from a directory, or from a .gguf file."""
  import transformers

  path = pathlib.Path(path)
  where = {}
  if path.suffix == ".gguf" and path.is_file():
    where = {"gguf_file": path.name}
  elif not path.is_dir():
    raise ValueError(
      f"{str(path)!r} is no tokenizer directory; set"
      " --config.data.tokenizer_path"
    )
  try:
    return transformers.AutoTokenizer.from_pretrained(
      str(path.parent if where else path),
      local_files_only=True,
      trust_remote_code=False,
      **where,
    )
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f"no tokenizer can be read from {path}: {error}; set"
      " --config.data.tokenizer_path"
    ) from error


def save_tokenizer(
  tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike[str]
) -> None:
  """Writes a tokenizer, with its chat template, to a new directory.

  Under a temporary name until whole: another process may look for it.
  """
  with files.whole_folder(path) as partial:
    tokenizer.save_pretrained(str(partial))


def byte_characters() -> list[str]:
  """Returns the printable character that stands for each byte, in order."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  characters, unprintable = [], 0
  for byte in range(256):
    if byte in printable:
      characters.append(chr(byte))
    else:
      characters.append(chr(256 + unprintable))
      unprintable += 1
  return characters


def _byte_level(model: Model, *, split_words: bool) -> Tokenizer:
  """Returns a byte-level tokenizer around a model."""
  import tokenizers

  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=split_words
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
  """Adds the special tokens and the interface of `transformers`."""
  import transformers

  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    clean_up_tokenization_spaces=False,
  )
