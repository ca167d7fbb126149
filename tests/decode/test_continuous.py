"""Slots that are refilled: the same answers as a static batch, and no waste."""

import collections

import jax
import numpy as np
import pytest
from oracles import tiny

from oreo_jax.decode import Sampler, continuous, generate, slots
from oreo_jax.decode.continuous import Usage, answer_requests
from oreo_jax.decode.schedule import Request, Schedule

KEY = jax.random.key(3)
EOS = (1,)
MOST = 24


@pytest.fixture(scope="module")
def params():
  return tiny.draw_params(scale=2.0)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 40, 13)
  return [rng.integers(4, tiny.MODEL.vocab_size, n) for n in lengths]


def requests_of(prompts, samples=3, **fields):
  return [
    Request(prompt, number, range(samples), max_new_tokens=MOST, **fields)
    for number, prompt in enumerate(prompts)
  ]


def run(params, requests, **options):
  """Returns {(problem, sample): (tokens, finished, logps)}."""
  options = {"slots": 8, "eos_ids": EOS} | options
  answers = {}
  for each in answer_requests(params, requests, KEY, tiny.MODEL, **options):
    problem = requests[each.request].problem
    place = problem, each.sample
    assert place not in answers
    answers[place] = each.tokens.tolist(), each.finished, each.logps
  return answers


def assert_same(got, want):
  assert got.keys() == want.keys()
  for place, (tokens, finished, logps) in want.items():
    assert got[place][:2] == (tokens, finished), place
    # Logits of this model go up to about 30, and products of other shapes add
    # up in another order.
    np.testing.assert_allclose(got[place][2], logps, atol=5e-5)


@pytest.fixture(scope="module")
def static(params, prompts):
  """What one static batch of all prompts gives."""
  out = generate(
    params,
    prompts,
    KEY,
    tiny.MODEL,
    max_new_tokens=MOST,
    eos_ids=EOS,
    num_samples=3,
  )
  rows = zip(out.tokens, out.lengths, out.finished, out.logps, strict=True)
  answers = {
    divmod(row, 3): (tokens[:n].tolist(), bool(finished), logps[:n])
    for row, (tokens, n, finished, logps) in enumerate(rows)
  }
  lengths = [len(tokens) for tokens, _, _ in answers.values()]
  assert min(lengths) == 1 and max(lengths) == MOST
  return answers


@pytest.mark.parametrize(
  "options",
  [
    {"slots": 1},
    {"slots": 8},
    {"slots": 8, "refill": 0.5, "most_steps": 3},
    {"slots": 12, "rows_per_prompt": 3},
    {"slots": 64},
  ],
)
def test_any_number_of_slots_gives_the_static_answers(
  options, params, prompts, static
):
  assert_same(run(params, requests_of(prompts), **options), static)


def test_order_and_restart_change_nothing(params, prompts, static):
  requests = requests_of(prompts)[::-1]
  assert_same(run(params, requests), static)
  # What was done before a kill is left out, and the rest is as it was.
  done = {(0, 0), (0, 1), (0, 2), (5, 1), (12, 2)}
  rest = [
    request._replace(
      samples=[i for i in range(3) if (request.problem, i) not in done]
    )
    for request in requests
  ]
  got = run(params, rest)
  assert_same(got, {k: v for k, v in static.items() if k not in done})


def test_requests_of_one_batch_have_settings_of_their_own(params, prompts):
  kinds = [
    {"sampler": Sampler(temperature=0.0)},
    {"sampler": Sampler(top_k=2), "max_new_tokens": 5},
    {"sampler": Sampler(min_p=0.2, repetition_penalty=1.5)},
  ]
  requests = [
    Request(
      prompt, number, [4], **{"max_new_tokens": MOST, **kinds[number % 3]}
    )
    for number, prompt in enumerate(prompts)
  ]
  together = run(params, requests)
  assert (
    max(len(t) for (n, _), (t, _, _) in together.items() if n % 3 == 1) == 5
  )
  alone = {}
  for request in requests[:6]:
    alone |= run(params, [request], slots=1)
  assert_same({k: together[k] for k in alone}, alone)


@pytest.mark.parametrize(
  ("slots", "groups"),
  # Fewer slots than batch shards, more, and more prompts than either.
  [(2, 8), (12, 16), (64, 16)],
)
def test_eight_devices_equal_one(slots, groups, params, prompts, static):
  mesh = tiny.mesh(data=2, fsdp=4)
  with jax.set_mesh(mesh):
    requests = requests_of(prompts)
    assert continuous.Queue(requests, slots, None).groups == groups
    placed = tiny.place(params, tiny.MODEL, mesh)
    assert_same(run(placed, requests, slots=slots), static)


def test_requests_that_cannot_be_answered_are_refused(params):
  for request, message in (
    (Request(np.zeros(0, int), 0, [0]), "request 0: expected a prompt"),
    (
      Request(np.ones(2, int), 0, [0], max_new_tokens=0),
      "request 0: expected max_new_tokens of at least 1, got 0",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      run(params, [request])


def test_slots_are_busy_and_prompts_read_once(params, prompts):
  usage = Usage()
  many = requests_of(prompts * 6, samples=4)
  many = [r._replace(problem=n) for n, r in enumerate(many)]
  answers = run(params, many, usage=usage, slots=16)
  assert usage.tokens == sum(len(tokens) for tokens, _, _ in answers.values())
  # A row waits for at most one more to end, and at the end of all for the last.
  assert usage.share > 0.85
  # Towards the end a prompt may be read again by a group that helps.
  assert len(many) <= usage.prompts_read < len(many) + 16


def test_refilling_compiles_nothing(params, prompts):
  def counts():
    return [
      f._cache_size()
      for f in (slots.turn, slots.take_rows, slots.empty_slots, slots.read_into)
    ]

  for each in (slots.turn, slots.take_rows, slots.empty_slots, slots.read_into):
    each.clear_cache()
  run(params, requests_of(prompts))
  rooms = {continuous.room_for(len(prompt)) for prompt in prompts}
  assert counts() == [1, 1, 1, len(rooms)]
  run(
    params, requests_of(prompts[:9], samples=5, sampler=Sampler(0.5, top_p=0.9))
  )
  assert counts() == [1, 1, 1, len(rooms)]


@pytest.mark.parametrize("share", [1, 2, 4])
def test_schedule_hands_out_every_sample_once(share):
  rng = np.random.default_rng(share)
  requests = [
    Request(np.ones(1, int), n, range(rng.integers(0, 9))) for n in range(11)
  ]
  schedule = Schedule(requests, 3, share)
  holds, seen, active = {}, collections.Counter(), {}
  while True:
    free = [row for row in range(3 * share) if row not in active]
    for each in schedule.assign(free):
      group = each.row // share
      if each.reads_prompt:
        # No one else answers the prompt that is read over.
        assert not any(row // share == group for row in active)
        holds[group] = each.request
      assert holds[group] == each.request
      seen[each.request, each.sample] += 1
      active[each.row] = each.request
    if not active:
      break
    row = int(rng.choice(list(active)))
    del active[row]
    schedule.freed(row)
  wanted = {(n, i) for n, r in enumerate(requests) for i in r.samples}
  assert seen == dict.fromkeys(wanted, 1) and schedule.waiting == 0
