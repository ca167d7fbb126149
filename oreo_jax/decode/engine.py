"""The door for Python: a checkpoint, prompts in, answers out.

policy, config = models.load_hf(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
engine = decode.Engine(policy, config, tokenizer)
for completion in engine.generate(["2 + 2 ="], n=4, max_new_tokens=64)[0]:
print(completion.text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from oreo_jax import data
from oreo_jax.config import ModelConfig
from oreo_jax.decode.batches import OnProgress, values_all
from oreo_jax.decode.continuous import Answer, Usage, answer_requests
from oreo_jax.decode.generate import Generation
from oreo_jax.decode.plan import Strategy, make_plan
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.decode.schedule import Request
from oreo_jax.decode.search import search
from oreo_jax.decode.stops import DELIMITERS, Stops, make_stops
from oreo_jax.models import Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# A text, the messages of a chat, or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | np.ndarray


class Completion(NamedTuple):
  """An answer to a prompt."""

  text: str  # without special tokens, and without the stop string
  tokens: np.ndarray  # i32[n], as they were drawn, the end-of-sequence too
  logps: np.ndarray  # f32[n], log pi of each token
  reason: str  # why it ended: "end" (of sequence), "stop" (string) or "length"
  # f32[n + 1], V after 0, 1, ..., n tokens; None unless it was asked for.
  values: np.ndarray | None = None
  score: float | None = None  # what a search chose it by


class Engine:
  """A policy, perhaps with a value network, that answers prompts."""

  def __init__(
    self,
    policy: Params,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    critic: Params | None = None,
    critic_config: ModelConfig | None = None,
    eos_ids: Sequence[int] | None = None,
    slots: int = 64,
  ):
    """Keeps what it is given; the weights are not copied.

    Args:
      policy: answers are drawn from it.
      config: its architecture.
      tokenizer: a fast tokenizer; not needed where prompts are token ids and
        no stop string is given. Without one a completion has no text.
      critic: a value network, for values and for searches that are guided. Of
        `models.share_trunk(critic, policy)` the layers that both have are held
        once, and run once in a search.
      critic_config: its architecture when it is another one.
      eos_ids: tokens that end an answer; by default the tokenizer's.
      slots: answers that grow at the same time.

    Raises:
      ValueError: if it is not known what ends an answer.
    """
    if eos_ids is None:
      if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(
          "eos_ids: expected the tokens that end an answer, as there is no "
          "tokenizer that names one"
        )
      eos_ids = (tokenizer.eos_token_id,)
    self.policy, self.config, self.tokenizer = policy, config, tokenizer
    self.critic, self.critic_config = critic, critic_config or config
    self.eos_ids = tuple(eos_ids)
    self.slots = slots
    self.usage = Usage()  # of all calls together
    self._stops: dict[tuple[tuple[str, ...], bool], Stops] = {}

  def tokens(self, prompt: Prompt) -> np.ndarray:
    """Returns i32[L], the tokens of a prompt.

    A text gets the beginning-of-sequence token where the tokenizer has one;
    messages go through the chat template, and the model's turn begins.
    """
    if isinstance(prompt, str):
      tokenizer = self._need_tokenizer("a prompt that is text")
      return data.tokenize_prompt(prompt, tokenizer)
    if len(prompt) and isinstance(prompt[0], Mapping):
      tokenizer = self._need_tokenizer("a prompt of messages")
      messages = cast(Sequence[Mapping[str, str]], prompt)
      turns = [data.Turn(each["role"], each["content"]) for each in messages]
      return data.tokenize_prompt(turns, tokenizer)
    return np.asarray(prompt, np.int32)

  def stream(
    self,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    sampler: Sampler | Sequence[Sampler] = ANCESTRAL,
    max_new_tokens: int | Sequence[int] = 256,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_text: Callable[[int, int, str], Any] | None = None,
  ) -> Iterator[tuple[int, int, Completion]]:
    """Yields (prompt's place, sample, completion) as answers end.

    What a sample is depends on the seed, the place of its prompt, its number
    and its tokens so far, and on nothing else.

    Args:
      prompts: texts, chats or token ids.
      n: samples a prompt.
      sampler: how tokens are drawn, for all or one a prompt.
      max_new_tokens: most tokens of an answer, for all or one a prompt.
      stop: strings that end an answer where they are complete.
      seed: of the draws.
      on_text: called with (prompt's place, sample, text so far) while an
        answer grows, every few tokens.

    Raises:
      ValueError: for arguments that do not fit together.
    """
    _check_list("prompts", prompts)
    _check_list("stop", stop)
    count = len(prompts)
    samplers = _one_a_prompt("sampler", sampler, count)
    limits = _one_a_prompt("max_new_tokens", max_new_tokens, count)
    requests = [
      Request(self.tokens(prompt), place, range(n), samplers[place], limit)
      for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]

    def growing(place: int, sample: int, tokens: np.ndarray) -> None:
      if on_text is not None:
        on_text(place, sample, self._text(tokens, stop))

    answers = answer_requests(
      self.policy,
      requests,
      jax.random.key(seed),
      self.config,
      eos_ids=self.eos_ids,
      slots=self.slots,
      stops=self._stops_of(tuple(stop)),
      most_steps=64 if on_text is None else 4,
      usage=self.usage,
      on_growing=None if on_text is None else growing,
    )
    for answer in answers:
      yield answer.request, answer.sample, self._completion(answer, stop)

  def generate(
    self,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    values: bool = False,
    **options: Any,
  ) -> list[list[Completion]]:
    """Returns n completions of each prompt.

    Args:
      prompts: texts, chats or token ids.
      n: samples a prompt.
      values: also read V along every answer, with the critic.
      **options: of `stream`.

    Returns:
      A list a prompt, in the order of prompts and samples.
    """
    if values and self.critic is None:
      raise ValueError("values: expected an engine with a critic, got none")
    completions = {
      (place, sample): completion
      for place, sample, completion in self.stream(prompts, n=n, **options)
    }
    rows = [
      [completions[place, sample] for sample in range(n)]
      for place in range(len(prompts))
    ]
    return self._with_values(prompts, rows) if values else rows

  def search(
    self,
    prompts: Sequence[Prompt],
    strategy: Strategy | None = None,
    *,
    sampler: Sampler = ANCESTRAL,
    max_new_tokens: int = 256,
    delimiters: Sequence[str] = DELIMITERS["lines"],
    granularity: str = "token",
    seed: int = 0,
    on_progress: OnProgress = lambda count: None,
  ) -> list[Completion]:
    """Searches for the best completion of each prompt.

    Args:
      prompts: texts, chats or token ids.
      strategy: such as `Strategy(beams=4)`, `best_of(8)` or
        `look_ahead_search(2, 3)`; by default a step beam search with 7 beams.
        Most are guided by the critic.
      sampler: how proposals are drawn.
      max_new_tokens: most tokens of an answer.
      delimiters: strings that end a step.
      granularity: "token", "step" or "turn", what the critic was trained at.
      seed: of the draws.
      on_progress: called with the prompts done since the last call.

    Returns:
      A completion a prompt, with the score it won by.

    Raises:
      ValueError: for arguments that do not fit together.
    """
    _check_list("prompts", prompts)
    _check_list("delimiters", delimiters)
    plan = make_plan(
      self.policy,
      self.critic,
      jax.random.key(seed),
      self.config,
      strategy=strategy or Strategy(),
      stops=self._stops_of(tuple(delimiters), anywhere=False),
      eos_ids=self.eos_ids,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      granularity=granularity,
      critic_config=self.critic_config,
    )
    result = search(
      plan,
      [self.tokens(prompt) for prompt in prompts],
      batch_size=max(self.slots, plan.strategy.rows),
      on_progress=on_progress,
    )
    answers = result.answers
    completions = []
    for place, tokens in enumerate(answers.answers()):
      length = answers.lengths[place]
      completions.append(
        Completion(
          self._text(tokens, ()),
          answers.tokens[place, :length],
          answers.logps[place, :length],
          "end" if answers.finished[place] else "length",
          score=float(result.scores[place]),
        )
      )
    return completions

  def _with_values(
    self, prompts: Sequence[Prompt], rows: list[list[Completion]]
  ) -> list[list[Completion]]:
    """Returns the completions with V along each of them."""
    assert self.critic is not None
    flat = [completion for row in rows for completion in row]
    if not flat:
      return rows
    lengths = np.array([len(each.tokens) for each in flat], np.int32)
    tokens, logps = (
      np.zeros((len(flat), lengths.max()), kind)
      for kind in (np.int32, np.float32)
    )
    for place, each in enumerate(flat):
      tokens[place, : lengths[place]] = each.tokens
      logps[place, : lengths[place]] = each.logps
    finished = np.array([each.reason == "end" for each in flat])
    along = iter(
      values_all(
        self.critic,
        [self.tokens(prompt) for prompt in prompts],
        Generation(tokens, lengths, finished, logps),
        self.critic_config,
        batch_size=self.slots,
      )
    )
    return [
      [
        each._replace(values=next(along)[: len(each.tokens) + 1])
        for each in row
      ]
      for row in rows
    ]

  def _completion(self, answer: Answer, stop: Sequence[str]) -> Completion:
    reason = "length"
    if answer.finished or answer.stopped:
      reason = "end" if answer.finished else "stop"
    text = self._text(answer.text_tokens, stop)
    return Completion(text, answer.tokens, answer.logps, reason)

  def _text(self, tokens: np.ndarray, stop: Sequence[str]) -> str:
    """Returns the text of tokens, up to where the first stop string begins."""
    if self.tokenizer is None:
      return ""
    text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
    begins = [text.find(string) for string in stop if string in text]
    return text[: min(begins, default=len(text))]

  def _stops_of(
    self, stop: tuple[str, ...], *, anywhere: bool = True
  ) -> Stops | None:
    """Returns the automaton of some stop strings, made once."""
    if not stop:
      return None
    if (stop, anywhere) not in self._stops:
      tokenizer = self._need_tokenizer("a stop string")
      self._stops[stop, anywhere] = make_stops(
        tokenizer, stop, self.config.vocab_size, anywhere=anywhere
      )
    return self._stops[stop, anywhere]

  def _need_tokenizer(self, reason: str) -> PreTrainedTokenizerBase:
    if self.tokenizer is None:
      raise ValueError(f"tokenizer: expected one for {reason}, got none")
    return self.tokenizer


def _check_list(name: str, values: Any) -> None:
  if isinstance(values, str):
    raise ValueError(f"{name}: expected a list of strings, got {values!r}")


def _one_a_prompt(name: str, value: Any, count: int) -> list[Any]:
  if not isinstance(value, Sequence):
    return [value] * count
  if len(value) != count:
    raise ValueError(
      f"{name}: expected one for all or one a prompt, {count} in all, got "
      f"{len(value)}"
    )
  return list(value)
