"""Continuous batching: slots that are refilled as answers end.

A static batch ends with its longest answer, and until then most of its rows
compute nothing that is asked for. Here the number of rows is fixed too, but a
row whose answer has ended begins the next one while the others go on.

What is compiled: `slots.turn`, `slots.take_rows` and `slots.empty_slots` once
for (slots, rows a prompt, room of a prompt, most tokens), and `slots.read_into`
once for each prompt length in use: 16, 32, 64, ... tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode import slots as device
from oreo_jax.decode.batches import OnProgress
from oreo_jax.decode.generate import Generation
from oreo_jax.decode.prompts import Prompts, pad_prompts
from oreo_jax.decode.sampling import ANCESTRAL, Sampler, sampling_rows
from oreo_jax.decode.schedule import Assignment, Request, Schedule
from oreo_jax.decode.stops import Stops
from oreo_jax.hosts import to_host
from oreo_jax.models import Params
from oreo_jax.sharding import rows_that_divide

# Called with (request, sample, i32[n] its tokens so far).
OnGrowing = Callable[[int, int, np.ndarray], Any]

_SHORTEST = 16  # room of a prompt; the others are its doubles


class Answer(NamedTuple):
  """One answer, as soon as it has ended."""

  request: int  # its place among the requests
  sample: int  # which sample of the request
  tokens: np.ndarray  # i32[n], the end-of-sequence included
  logps: np.ndarray  # f32[n], log pi of each token
  finished: bool  # the last token is an end-of-sequence
  stopped: bool  # the last token completes a stop string

  @property
  def text_tokens(self) -> np.ndarray:
    """Returns the tokens without the end-of-sequence."""
    return self.tokens[: len(self.tokens) - self.finished]


@dataclasses.dataclass
class Usage:
  """What slots were used for."""

  tokens: int = 0  # of answers
  slot_steps: int = 0  # tokens that all slots together could have been given
  prompts_read: int = 0
  turns: int = 0

  @property
  def share(self) -> float:
    """Returns the share of the slot-steps that gave a token."""
    return self.tokens / max(self.slot_steps, 1)


def room_for(length: int) -> int:
  """Returns the room a prompt is read in: 16, 32, 64, ... tokens."""
  return max(_SHORTEST, 1 << (int(length) - 1).bit_length())


def answer_requests(
  policy: Params,
  requests: Sequence[Request],
  key: jax.Array,
  config: ModelConfig,
  *,
  eos_ids: Sequence[int],
  slots: int,
  stops: Stops | None = None,
  rows_per_prompt: int | None = None,
  refill: float = 1 / 32,
  most_steps: int = 64,
  usage: Usage | None = None,
  on_growing: OnGrowing | None = None,
) -> Iterator[Answer]:
  """Yields answers as they end.

  A token's draw is a function of the key, the numbers of its problem and its
  sample, and its place in the answer. So the answers are the same for any
  number of slots and any order of requests, and after a restart that leaves
  out what is done, up to what rounding can turn over: products of other shapes
  may round otherwise.

  On several hosts every process calls it with the same arguments, and gets the
  same answers in the same order.

  Args:
    policy: the model, on the mesh in force.
    requests: what to answer.
    key: a `jax.random.key`.
    config: the policy's architecture.
    eos_ids: tokens that end an answer.
    slots: R, answers that grow at the same time; more where the mesh has more
      batch shards.
    stops: strings that end an answer, of `make_stops`.
    rows_per_prompt: slots that share a prompt and its cache. By default 1
      where there are as many prompts as slots: then no slot waits for another.
    refill: share of the slots that are free before they are refilled.
    most_steps: tokens a slot is given before the host looks again.
    usage: is added to.
    on_growing: called after every turn for each answer that has not ended.

  Raises:
    ValueError: for a request without a prompt or without room for an answer.
  """
  _check(requests)
  if not requests:
    return
  usage = Usage() if usage is None else usage
  queue = Queue(requests, slots, rows_per_prompt)
  limit = max(request.max_new_tokens for request in requests)
  state = device.empty_slots(
    key,
    config=config,
    groups=queue.groups,
    rows_per_group=queue.share,
    room=room_for(max(len(request.prompt) for request in requests)),
    slots=limit,
  )
  refilled_at = max(int(queue.rows * refill), 1)
  steps = 0
  while True:
    assigned = queue.refill()
    if not queue.active:
      return
    for batch in queue.prompts_to_read(assigned):
      usage.prompts_read += int(np.sum(batch[2] < queue.groups))
      state = device.read_into(policy, state, *batch, config=config)
    # With answers waiting, the turn ends when enough slots are free for them;
    # without, when none is active.
    waiting = queue.schedule.waiting
    enough = max(len(queue.active) - refilled_at, 0) if waiting else 0
    state, report = device.turn(
      policy,
      state,
      queue.begin(assigned),
      key,
      stops,
      np.int32(most_steps),
      np.int32(enough),
      config=config,
      eos_ids=tuple(eos_ids),
    )
    active, now = to_host(report)
    usage.slot_steps += (int(now) - steps) * queue.rows
    usage.turns += 1
    steps = int(now)
    ended = [row for row in queue.active if not active[row]]
    for start in range(0, len(ended), refilled_at):
      some = ended[start : start + refilled_at]
      index = np.array(some + some[:1] * (refilled_at - len(some)), np.int32)
      taken = to_host(device.take_rows(state, index))
      for place, row in enumerate(some):
        answer = queue.ended(row, taken, place)
        usage.tokens += len(answer.tokens)
        yield answer
    if on_growing is not None:
      rows = to_host(device.take_rows(state, np.arange(queue.rows)))
      for row, each in queue.active.items():
        on_growing(
          each.request, each.sample, rows.tokens[row, : rows.lengths[row]]
        )


def generate_all(
  policy: Params,
  prompts: Prompts,
  key: jax.Array,
  config: ModelConfig,
  *,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  sampler: Sampler = ANCESTRAL,
  num_samples: int = 1,
  slots: int = 512,
  on_progress: OnProgress = lambda count: None,
) -> Generation:
  """Continues every prompt; as `generate`, with slots that are refilled.

  Args:
    policy: what tokens are drawn from.
    prompts: token ids, ragged.
    key: of the draws, as in `generate`.
    config: the policy's architecture.
    max_new_tokens: most tokens of an answer.
    eos_ids: tokens that end an answer.
    sampler: how tokens are drawn.
    num_samples: answers a prompt.
    slots: answers that grow at the same time.
    on_progress: called with the number of answers that have ended.

  Returns:
    A Generation of len(prompts) * num_samples rows, prompt-major.
  """
  if not len(prompts):
    raise ValueError("prompts: expected at least one, got none")
  requests = [
    Request(
      np.asarray(prompt, np.int32),
      problem,
      range(num_samples),
      sampler,
      max_new_tokens,
    )
    for problem, prompt in enumerate(prompts)
  ]
  count = len(requests) * num_samples
  tokens = np.zeros((count, max_new_tokens), np.int32)
  logps = np.zeros((count, max_new_tokens), np.float32)
  lengths, finished = np.zeros(count, np.int32), np.zeros(count, bool)
  answers = answer_requests(
    policy, requests, key, config, eos_ids=eos_ids, slots=slots
  )
  for answer in answers:
    row = answer.request * num_samples + answer.sample
    lengths[row] = len(answer.tokens)
    tokens[row, : lengths[row]] = answer.tokens
    logps[row, : lengths[row]] = answer.logps
    finished[row] = answer.finished
    on_progress(1)
  return Generation(tokens, lengths, finished, logps)


def _check(requests: Sequence[Request]) -> None:
  for place, request in enumerate(requests):
    if not len(request.prompt):
      raise ValueError(
        f"request {place}: expected a prompt of at least one token, got none"
      )
    if request.max_new_tokens < 1:
      raise ValueError(
        f"request {place}: expected max_new_tokens of at least 1, got"
        f" {request.max_new_tokens}"
      )


class Queue:
  """The host's side of the slots: what each row is doing."""

  def __init__(
    self, requests: Sequence[Request], slots: int, share: int | None
  ):
    samples = sum(len(request.samples) for request in requests)
    mesh = jax.sharding.get_abstract_mesh()
    slots = max(min(slots, samples), 1)
    if share is None:
      share = max(slots // len(requests), 1)
    self.share = share
    self.groups = rows_that_divide(-(-slots // share), mesh)
    self.rows = self.groups * share
    self.reads = rows_that_divide(max(self.groups // 32, 1), mesh)
    self.requests = requests
    self.schedule = Schedule(requests, self.groups, share)
    self.active: dict[int, Assignment] = {}
    self._begin = device.Begin(
      np.zeros(self.rows, bool),
      np.zeros(self.rows, np.int32),
      np.zeros(self.rows, np.int32),
      sampling_rows([requests[0].sampler] * self.rows),
      np.zeros(self.rows, np.int32),
      np.zeros(self.rows, np.int32),
    )

  def refill(self) -> list[Assignment]:
    """Gives free rows something to do."""
    free = [row for row in range(self.rows) if row not in self.active]
    assigned = list(self.schedule.assign(free))
    self.active.update({each.row: each for each in assigned})
    return assigned

  def prompts_to_read(
    self, assigned: Sequence[Assignment]
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens [A, W], lengths [A], groups [A]) until all are read."""
    by_room: dict[int, list[Assignment]] = {}
    for each in assigned:
      if each.reads_prompt:
        room = room_for(len(self.requests[each.request].prompt))
        by_room.setdefault(room, []).append(each)
    for room, those in sorted(by_room.items()):
      for start in range(0, len(those), self.reads):
        some = those[start : start + self.reads]
        filled = some + [some[0]] * (self.reads - len(some))
        groups = np.full(self.reads, self.groups, np.int32)
        groups[: len(some)] = [each.row // self.share for each in some]
        prompts = [self.requests[each.request].prompt for each in filled]
        yield (*pad_prompts(prompts, room), groups)

  def begin(self, assigned: Sequence[Assignment]) -> device.Begin:
    """Returns what begins, as arrays."""
    begin = self._begin._replace(begins=np.zeros(self.rows, bool))
    for each in assigned:
      request = self.requests[each.request]
      row = each.row
      begin.begins[row] = True
      begin.problems[row] = request.problem
      begin.samples[row] = each.sample
      begin.limits[row] = request.max_new_tokens
      begin.fed[row] = request.prompt[-1]
      for setting, new in zip(
        begin.sampling, sampling_rows([request.sampler]), strict=True
      ):
        setting[row] = new[0]
    return begin

  def ended(self, row: int, taken: Any, place: int) -> Answer:
    """Notes that a row has ended, and returns its answer.

    Args:
      row: that has ended.
      taken: a `slots.Ended` on the host.
      place: of the row in it.
    """
    assignment = self.active.pop(row)
    self.schedule.freed(row)
    count = int(taken.lengths[place])
    return Answer(
      assignment.request,
      assignment.sample,
      taken.tokens[place, :count],
      taken.logps[place, :count],
      bool(taken.finished[place]),
      bool(taken.stopped[place]),
    )
