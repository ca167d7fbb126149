r"""Where a step of reasoning ends: the one definition that all code shares.

*A step ends with the first delimiter string that completes after a non-blank
character of that step.* A blank line therefore belongs to the step that
follows it, "\n\n" ends one step and not two, and whether a token ends a step
is known as soon as the token is: generation, search and the masks of training
all see the same ends.

Delimiters are strings of the text, and tokens do not respect them: ". " lies
across two tokens of a byte-level tokenizer, and one token may hold several
line breaks. The text is therefore read byte by byte by an automaton. Its state
is what the rest of a text needs to know of the step so far:

  matched    the longest end of the step that begins some delimiter
  non-blank  whether the step holds a character that is not blank

A token moves the automaton by all of its bytes at once. If a delimiter
completes inside the token, the token ends the step, and the bytes after the
delimiter already belong to the next step.

A delimiter lies inside its step: nothing of a step that has ended counts
towards the next delimiter. Blank are the blanks of ASCII. A special token has
no text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax.data.tokenizer import byte_characters

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# What ends a step, by the name that a configuration gives it.
DELIMITERS: dict[str, tuple[str, ...]] = {
  "lines": ("\n",),
  "sentences": ("\n", ". ", ".$ "),
}


class Stops(NamedTuple):
  """An automaton over token ids, a pytree that a jitted function may take.

  The table takes S * V bytes: 4 states and 0.6 MB for the delimiters
  "sentences" and 152,000 tokens. Beyond 63 states an entry takes two bytes.
  """

  # i8[S, V] or i16[S, V]: twice the next state, plus 1 if the token ends a
  # step. Both answers come from one look-up.
  table: np.ndarray

  @property
  def start(self) -> int:
    """Returns the state at the start of an answer."""
    return 0


def make_stops(
  tokenizer: PreTrainedTokenizerBase,
  delimiters: Sequence[str],
  vocab_size: int,
  *,
  anywhere: bool = False,
) -> Stops:
  """Builds the automaton of some delimiters over a tokenizer's vocabulary.

  Args:
    tokenizer: a fast tokenizer; see `token_texts` for the kinds.
    delimiters: the strings that end a step, such as `DELIMITERS["lines"]`.
    vocab_size: V, at least the ids that will be asked about; ids beyond the
      tokenizer's have no text.
    anywhere: a delimiter also counts behind blanks alone, as the stop string
      of a generation does.

  Raises:
    ValueError: for no delimiters, an empty one, a lone string, or a tokenizer
      whose texts cannot be told.
  """
  lone = isinstance(delimiters, str)
  if lone or not delimiters or not all(delimiters):
    raise ValueError(
      "delimiters: expected strings that are not empty, such as"
      f" {DELIMITERS['lines']!r}, got {delimiters!r}"
      " (--config.data.delimiters)"
    )
  next_state, ends = _byte_automaton(
    [mark.encode() for mark in delimiters], anywhere
  )
  texts = token_texts(tokenizer, vocab_size)
  return Stops(_token_table(next_state, ends, texts))


def no_stops(vocab_size: int) -> Stops:
  """Returns the automaton of no delimiter: no token ends a step."""
  return Stops(np.zeros((1, vocab_size), np.int8))


def advance(
  stops: Stops, state: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Reads one token a row, inside jit.

  Args:
    stops: the automaton.
    state: i32[R], the state of each row; `stops.start` at first.
    tokens: i32[R], the token each row reads.

  Returns:
    (state i32[R] after the token, ended bool[R]: the token ends a step).
  """
  entry = jnp.asarray(stops.table)[state, tokens].astype(jnp.int32)
  return entry // 2, entry % 2 == 1


def step_ends(stops: Stops, ids: Sequence[int] | np.ndarray) -> np.ndarray:
  r"""Returns bool[L]: which tokens of an answer end a step.

  Args:
    stops: the automaton.
    ids: the L tokens of the answer alone, without the prompt.

  Example:
    >>> from oreo_jax.data import make_tokenizer
    >>> tokenizer = make_tokenizer("byte")
    >>> stops = make_stops(tokenizer, DELIMITERS["lines"], len(tokenizer))
    >>> ids = tokenizer.encode("a\n\nb\n")
    >>> step_ends(stops, ids).astype(int).tolist()
    [0, 1, 0, 0, 1]
  """
  ids = np.asarray(ids, np.int64)
  state, ends = stops.start, []
  # Python integers are much faster to loop over than NumPy scalars.
  for entries in np.asarray(stops.table)[:, ids].T.tolist():
    state, ended = divmod(entries[state], 2)
    ends.append(ended)
  return np.array(ends, bool)


def token_texts(
  tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[bytes]:
  """Returns the bytes that each token adds to a text that it continues.

  The tokenizer's decoder says how a token becomes text:

    byte-level (GPT-2, Llama 3, Qwen): every character of the token stands for
      a byte; a token with other characters (an added one) stands for itself,
      as in the decoder of `tokenizers`;
    with byte fallback (Llama 2, Gemma): the token <0xNN> is the byte NN;
    all others (Metaspace, WordPiece, WordLevel, none): the token is decoded
      behind another one and the text of that one taken away. A token "▁foo" is
      thus " foo", as it is inside a text. What a decoder takes away again once
      a further token follows is not seen: behind a line break, the words of
      the embedded tasks count with a blank that the text does not have.

  Bytes are taken one by one, also where they are not UTF-8. The decoders
  BPEDecoder and CTC are refused: there a token's text depends on the one in
  front.

  Args:
    tokenizer: a fast tokenizer.
    vocab_size: how many ids, from 0 on; special tokens and ids that the
      tokenizer does not have add nothing.
  """
  if not getattr(tokenizer, "is_fast", False):
    raise ValueError(
      "tokenizer: expected a fast tokenizer (one with a tokenizer.json), got"
      f" {type(tokenizer).__name__} (--config.data.tokenizer_path)"
    )
  backend = tokenizer.backend_tokenizer
  added = backend.get_added_tokens_decoder()
  special = {id for id, token in added.items() if token.special}
  special |= set(tokenizer.all_special_ids)
  names = {
    id: name
    for id in range(vocab_size)
    if id not in special and (name := backend.id_to_token(id)) is not None
  }
  kinds = _decoder_kinds(backend)
  for kind in ("BPEDecoder", "CTC"):
    if kind in kinds:
      raise ValueError(
        "tokenizer: expected a decoder that gives each token a text of its"
        f" own, got {kind} (--config.data.tokenizer_path)"
      )
  if "ByteLevel" in kinds:
    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    texts = {
      id: bytes(byte_of[char] for char in name)
      if all(char in byte_of for char in name)
      else name.encode()
      for id, name in names.items()
    }
  else:
    texts = _decoded_texts(backend, names)
    if "ByteFallback" in kinds:
      for id, name in names.items():
        if len(name) == 6 and name.startswith("<0x") and name[-1] == ">":
          texts[id] = bytes.fromhex(name[3:5])
  return [texts.get(id, b"") for id in range(vocab_size)]


def _decoder_kinds(backend) -> set[str]:
  """Returns the types of all decoders that are chained in a tokenizer."""
  if backend.decoder is None:
    return set()
  waiting, kinds = [json.loads(backend.decoder.__getstate__())], set()
  while waiting:
    decoder = waiting.pop()
    kinds.add(decoder["type"])
    waiting += decoder.get("decoders", [])
  return kinds


def _decoded_texts(backend, names: dict[int, str]) -> dict[int, bytes]:
  """Returns what each token adds behind another token, by decoding both."""
  alone = dict(
    zip(names, backend.decode_batch([[id] for id in names]), strict=True)
  )
  # The token in front is a word, so that no decoder joins it with the next.
  front = next(
    (id for id, text in alone.items() if text.isascii() and text.isalnum()),
    None,
  )
  if front is None:
    raise ValueError(
      "tokenizer: expected a token that is a plain word or letter, found none"
      " (--config.data.tokenizer_path)"
    )
  pairs = backend.decode_batch([[front, id] for id in names])
  before = alone[front]
  texts = {}
  for (id, name), text in zip(names.items(), pairs, strict=True):
    if not text.startswith(before):
      raise ValueError(
        f"tokenizer: expected {before!r} and token {id} ({name!r}) to decode"
        f" to a text that starts with {before!r}, got {text!r}"
        " (--config.data.tokenizer_path)"
      )
    texts[id] = text[len(before) :].encode()
  return texts


def _byte_automaton(
  delimiters: Sequence[bytes], anywhere: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (next_state i64[S, 256], ends bool[S, 256]), state 0 the start."""
  beginnings = {mark[:size] for mark in delimiters for size in range(len(mark))}
  start = (b"", anywhere)
  numbers = {start: 0}
  waiting = [start]
  rows = []
  while len(rows) < len(numbers):
    matched, filled = waiting[len(rows)]
    row = []
    for byte in range(256):
      text = matched + bytes([byte])
      now_filled = filled or not text[-1:].isspace()
      ends = now_filled and text.endswith(tuple(delimiters))
      # A delimiter that completes in a step of blanks ends nothing, but its
      # end may begin another one, so matching goes on.
      longest = next(
        text[skip:]
        for skip in range(len(text) + 1)
        if text[skip:] in beginnings
      )
      state = start if ends else (longest, now_filled)
      if state not in numbers:
        numbers[state] = len(numbers)
        waiting.append(state)
      row.append((numbers[state], ends))
    rows.append(row)
  table = np.array(rows, np.int64)
  return table[..., 0], table[..., 1].astype(bool)


def _token_table(
  next_state: np.ndarray, ends: np.ndarray, texts: Sequence[bytes]
) -> np.ndarray:
  """Runs every token from every state; returns the table of `Stops`."""
  states, vocab_size = len(next_state), len(texts)
  if states > np.iinfo(np.int16).max // 2:
    raise ValueError(
      f"delimiters: expected few and short strings, got {states} states"
      " (--config.data.delimiters)"
    )
  lengths = np.array([len(text) for text in texts], np.int64)
  # The longest first: those that have a byte at a place are then a slice, and
  # all tokens are moved by their byte at that place together.
  order = np.argsort(-lengths, kind="stable")
  state = np.repeat(np.arange(states)[:, None], vocab_size, axis=1)
  ended = np.zeros((states, vocab_size), bool)
  for place in range(int(lengths.max(initial=0))):
    longer = order[: int(np.sum(lengths > place))]
    byte = np.array([texts[id][place] for id in longer])
    before = state[:, longer]
    ended[:, longer] |= ends[before, byte]
    state[:, longer] = next_state[before, byte]
  small = 2 * states <= np.iinfo(np.int8).max
  return (2 * state + ended).astype(np.int8 if small else np.int16)
