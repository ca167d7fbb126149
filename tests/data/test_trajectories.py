import json
import logging

import pytest

from oreo_jax.data import (
  Pair,
  Trajectory,
  TrajectoryError,
  Turn,
  errors,
  load_pairs,
  load_trajectories,
  save_pairs,
  save_trajectories,
  split_by_problem,
)

GOOD = {"prompt": "1 + 1?", "response": "2", "reward": 1}
CHAT = (
  Turn("user", "hi"),
  Turn("assistant", "go"),
  Turn("tool", "moved"),
  Turn("assistant", "stop"),
)


def write_lines(path, *lines):
  data = b"\n".join(
    line if isinstance(line, bytes) else json.dumps(line).encode()
    for line in lines
  )
  path.write_bytes(data)
  return path


def test_reads_the_two_kinds(tmp_path):
  path = write_lines(
    tmp_path / "t.jsonl",
    GOOD | {"id": 7, "truncated": True},
    b"",
    {
      "conversations": [
        {"role": "user", "content": "hi"},
        {"from": "gpt", "value": "go"},
      ],
      "reward": -0.5,
      "problem": "p",
    },
  )
  first, second = load_trajectories(path)
  assert first == Trajectory.from_text(
    "1 + 1?", "2", 1.0, id="7", truncated=True, problem="1 + 1?"
  )
  assert first.source == f"{path}:1"
  assert second.turns == CHAT[:2]
  assert second.is_chat and second.reward == -0.5 and second.problem == "p"
  assert second.id == "t.jsonl:3"


BAD = [
  (b'{"prompt": ', errors.BrokenJsonError, "broken JSON"),
  (b"[1, 2]", errors.BrokenJsonError, "JSON object"),
  (b"[" * 100_000, errors.BrokenJsonError, "broken JSON"),
  (b'{"prompt": "\xff"}', errors.EncodingError, "UTF-8"),
  (
    b'{"prompt": "\\ud800", "response": "a", "reward": 1}',
    errors.EncodingError,
    "surrogate",
  ),
  ({"prompt": "a", "reward": 1}, errors.MissingKeyError, '"response"'),
  ({"response": "a", "reward": 1}, errors.MissingKeyError, '"prompt"'),
  ({"prompt": "a", "response": "b"}, errors.MissingKeyError, '"reward"'),
  (GOOD | {"prompt": 3}, errors.MissingKeyError, "expected text"),
  (GOOD | {"truncated": "no"}, errors.MissingKeyError, "truncated"),
  (GOOD | {"reward": "1"}, errors.BadRewardError, "finite number"),
  (GOOD | {"reward": True}, errors.BadRewardError, "finite number"),
  (GOOD | {"reward": None}, errors.BadRewardError, "finite number"),
  (GOOD | {"reward": float("nan")}, errors.BadRewardError, "nan"),
  (GOOD | {"reward": float("inf")}, errors.BadRewardError, "inf"),
  (GOOD | {"reward": 10**400}, errors.BadRewardError, "finite number"),
  (GOOD | {"response": None}, errors.MissingKeyError, '"response"'),
  ({"conversations": [], "reward": 1}, errors.EmptyResponseError, "assistant"),
  ({"conversations": "hi", "reward": 1}, errors.MissingKeyError, "list"),
  ({"conversations": ["hi"], "reward": 1}, errors.MissingKeyError, "object"),
  (
    {"conversations": [{"role": "user"}], "reward": 1},
    errors.MissingKeyError,
    '"content"',
  ),
  (
    {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
    errors.MissingKeyError,
    "both",
  ),
  (
    GOOD | {"turn_rewards": [1, 2]},
    errors.BadRewardError,
    "one an assistant turn",
  ),
  (GOOD | {"turn_rewards": [0.5]}, errors.BadRewardError, "sum"),
  (
    {"prompt": "a", "completion": "b", "label": 0.5},
    errors.BadRewardError,
    "label",
  ),
  ({"chosen": "a", "rejected": "b"}, errors.MissingKeyError, '"prompt"'),
  ({"chosen": "a b", "rejected": "a b"}, errors.MissingKeyError, "the same"),
]


@pytest.mark.parametrize("line, kind, message", BAD)
def test_bad_lines_name_place_and_fix(tmp_path, line, kind, message):
  path = write_lines(tmp_path / "t.jsonl", GOOD, line, GOOD)
  with pytest.raises(kind) as caught:
    load_trajectories(path)
  text = str(caught.value)
  assert message in text
  assert text.startswith(f"{path}:2: ")
  assert kind.fix in text and "--config.data.on_error=skip" in text
  assert len(text) < 500
  assert isinstance(caught.value, TrajectoryError | ValueError)
  assert len(load_trajectories(path, on_error="skip")) == 2


@pytest.mark.parametrize("response", ["", " \n"])
def test_blank_answers_are_failures_not_faults(tmp_path, response):
  path = write_lines(
    tmp_path / "t.jsonl",
    GOOD,
    GOOD | {"response": response, "reward": 0},
    {
      "conversations": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": response},
      ],
      "reward": 0,
    },
    {"prompt": "a", "completion": response, "label": False},
  )
  trajectories = load_trajectories(path)
  assert [t.response for t in trajectories[1:]] == [response] * 3
  assert sum(t.reward for t in trajectories) / len(trajectories) == 0.25
  save_trajectories(path, trajectories)
  assert load_trajectories(path) == trajectories


def test_skipped_lines_are_counted_and_logged(tmp_path, caplog):
  lines = [line for line, _, _ in BAD]
  path = write_lines(tmp_path / "t.jsonl", GOOD, *lines, GOOD)
  with caplog.at_level(logging.WARNING, logger="absl"):
    assert len(load_trajectories(path, on_error="skip")) == 2
  summary = caplog.messages[-1]
  assert f"skipped {len(BAD)} rows, kept 2" in summary
  for kind in {kind for _, kind, _ in BAD}:
    count = sum(other is kind for _, other, _ in BAD)
    assert f"{count} {kind.kind}" in summary
  # One example of each kind, not thousands of lines.
  assert len(caplog.messages) == 1 + len({kind for _, kind, _ in BAD})


def test_unusable_sources(tmp_path):
  with pytest.raises(ValueError, match=r"does not exist.*data\.path"):
    load_trajectories(tmp_path / "none.jsonl")
  empty = write_lines(tmp_path / "empty.jsonl", b"\n")
  with pytest.raises(ValueError, match="no usable row"):
    load_trajectories(empty)
  (tmp_path / "folder").mkdir()
  with pytest.raises(ValueError, match=r"has no \.jsonl"):
    load_trajectories(tmp_path / "folder")
  bad = tmp_path / "bad.parquet"
  bad.write_bytes(b"PAR1 but not really")
  with pytest.raises(ValueError, match="no readable Parquet"):
    load_trajectories(bad)
  with pytest.raises(ValueError, match=r"data\.on_error"):
    load_trajectories(empty, on_error="ignore")


def test_byte_order_mark_is_no_text(tmp_path):
  line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
  assert load_trajectories(write_lines(tmp_path / "t.jsonl", line))


TRAJECTORIES = [
  Trajectory.from_text("a\nb ", " c\u2028d\n", 0.25, id="1", problem="p"),
  Trajectory.from_text("é", "“”", 1.0, id="2", truncated=True),
  Trajectory(CHAT, 1.0, (0.25, 0.75), id="3", is_chat=True),
  Trajectory(CHAT, 0.0, id="4", is_chat=True, given=2, pair="pairs.jsonl:3"),
]


def test_saved_is_loaded(tmp_path):
  path = tmp_path / "deep" / "t.jsonl"
  save_trajectories(path, TRAJECTORIES)
  assert load_trajectories(path) == TRAJECTORIES
  assert [p.name for p in path.parent.iterdir()] == ["t.jsonl"]


def test_failed_save_keeps_the_old_file(tmp_path):
  path = tmp_path / "t.jsonl"
  save_trajectories(path, TRAJECTORIES[:1])

  def failing():
    yield TRAJECTORIES[1]
    raise RuntimeError("sampler died")

  with pytest.raises(RuntimeError):
    save_trajectories(path, failing())
  assert load_trajectories(path) == TRAJECTORIES[:1]
  assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_parquet_arrow_and_datasets(tmp_path):
  datasets = pytest.importorskip("datasets")
  rows = [GOOD | {"id": str(i)} for i in range(5)]
  data = datasets.Dataset.from_list(rows)
  expected = load_trajectories(rows)
  assert load_trajectories(data) == expected
  data.to_parquet(str(tmp_path / "t.parquet"))
  assert load_trajectories(tmp_path / "t.parquet") == expected
  data.save_to_disk(str(tmp_path / "saved"))
  assert load_trajectories(tmp_path / "saved") == expected
  arrow = next((tmp_path / "saved").glob("*.arrow"))
  assert load_trajectories(arrow) == expected
  both = tmp_path / "both"
  both.mkdir()
  data.to_parquet(str(both / "b.parquet"))
  save_trajectories(both / "a.jsonl", TRAJECTORIES)
  assert load_trajectories(both) == TRAJECTORIES + expected
  splits = datasets.DatasetDict({"train": data, "test": data})
  splits.save_to_disk(str(tmp_path / "splits"))
  with pytest.raises(ValueError, match=r"splits/train"):
    load_trajectories(tmp_path / "splits")
  assert load_trajectories(tmp_path / "splits" / "train") == expected
  bad = datasets.Dataset.from_list(rows + [GOOD | {"response": None}])
  bad.to_parquet(str(tmp_path / "bad.parquet"))
  with pytest.raises(errors.MissingKeyError, match=r"bad\.parquet:6: "):
    load_trajectories(tmp_path / "bad.parquet")


USER = [{"role": "user", "content": "sky?"}]


def said(text):
  return [{"role": "assistant", "content": text}]


def test_trl_types():
  rows = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": USER, "completion": said("blue")},
    {"prompt": "The sky is", "completion": " green.", "label": False},
    {"prompt": USER, "completion": said("blue"), "label": True},
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": USER, "chosen": said("blue"), "rejected": said("green")},
    {"chosen": "The sky is blue.", "rejected": "The sky is black."},
    {"chosen": USER + said("blue"), "rejected": USER + said("green")},
  ]
  loaded = load_trajectories(rows)
  assert [(t.prompt, t.response, t.reward) for t in loaded] == [
    ("The sky is", " blue.", 1.0),
    ("sky?", "blue", 1.0),
    ("The sky is", " green.", 0.0),
    ("sky?", "blue", 1.0),
    ("The sky is", " blue.", 1.0),
    ("The sky is", " green.", 0.0),
    ("sky?", "blue", 1.0),
    ("sky?", "green", 0.0),
    ("The sky is ", "blue.", 1.0),
    ("The sky is ", "black.", 0.0),
    ("sky?", "blue", 1.0),
    ("sky?", "green", 0.0),
  ]
  assert [t.is_chat for t in loaded] == [
    *[False, True, False, True],
    *[False, False, True, True] * 2,
  ]
  for (chosen, rejected), a, b in zip(
    load_pairs(rows[4:]), loaded[4::2], loaded[5::2], strict=True
  ):
    assert (chosen.turns, rejected.turns) == (a.turns, b.turns)
    assert (chosen.reward, rejected.reward) == (1.0, 0.0)
  assert [t.id for t in loaded[4:6]] == ["row 5/chosen", "row 5/rejected"]
  assert [t.pair for t in loaded] == [
    *[""] * 4,
    *[f"row {number}" for number in (5, 5, 6, 6, 7, 7, 8, 8)],
  ]


def test_trl_prompt_may_hold_earlier_answers():
  earlier = USER + said("hm") + USER
  (trajectory,) = load_trajectories(
    [{"prompt": earlier, "completion": said("blue")}]
  )
  assert trajectory.actions == [3]
  assert trajectory.given == 3


def test_trl_types_are_written(tmp_path):
  path = tmp_path / "t.jsonl"

  def rows():
    return [json.loads(line) for line in path.read_text().splitlines()]

  plain = Trajectory.from_text("a", "b", 0.0)
  chat = Trajectory(CHAT, 1.0, is_chat=True)
  completion = [turn.message() for turn in CHAT[1:]]
  save_trajectories(path, [plain, chat], trl_type="prompt_completion")
  assert rows() == [
    {"prompt": "a", "completion": "b"},
    {"prompt": [CHAT[0].message()], "completion": completion},
  ]
  save_trajectories(path, [plain, chat], trl_type="unpaired_preference")
  assert [row["label"] for row in rows()] == [False, True]
  again = load_trajectories(path)
  assert [(t.turns, t.reward) for t in again] == [
    (plain.turns, 0.0),
    (chat.turns, 1.0),
  ]
  better = Trajectory.from_text("a", "c", 1.0)
  save_pairs(path, [Pair(better, plain)])
  assert rows() == [{"prompt": "a", "chosen": "c", "rejected": "b"}]
  with pytest.raises(ValueError, match="two\\s+prompts"):
    save_pairs(path, [Pair(Trajectory.from_text("x", "c", 1.0), plain)])
  with pytest.raises(ValueError, match="trl_type"):
    save_trajectories(path, [plain], trl_type="sft")


def test_split_by_problem():
  data = [
    Trajectory.from_text(f"q{i}", f"a{j}", 1.0)
    for i in range(400)
    for j in range(3)
  ]
  kept, held = split_by_problem(data, fraction=0.25, seed=0)
  problems = [{t.problem for t in side} for side in (kept, held)]
  assert not problems[0] & problems[1]
  assert len(kept) + len(held) == len(data)
  assert 0.2 < len(problems[1]) / 400 < 0.3
  # More data moves no problem to the other side, and neither does its order.
  more = [Trajectory.from_text(f"r{i}", "a", 1.0) for i in range(50)]
  again = split_by_problem([*more, *data[::-1]], fraction=0.25, seed=0)
  assert problems[1] <= {t.problem for t in again[1]}
  assert not problems[0] & {t.problem for t in again[1]}
  # A larger share holds out a superset.
  larger = split_by_problem(data, fraction=0.5, seed=0)[1]
  assert problems[1] <= {t.problem for t in larger}
  other = split_by_problem(data, fraction=0.25, seed=1)[1]
  assert {t.problem for t in other} != problems[1]
  assert split_by_problem(data, fraction=0.0) == (data, [])
  assert split_by_problem(data, fraction=1.0) == ([], data)
  with pytest.raises(ValueError, match="fraction"):
    split_by_problem(data, fraction=2.0)


def test_blanks_make_no_other_problem():
  spellings = ["{}", " {}", "{}\n", "{}  of  two", "{} of two", "{}\tof two"]
  data = [
    Trajectory.from_text(spelling.format(f"q{i}"), "a", 1.0)
    for i in range(100)
    for spelling in spellings
  ]
  sides = split_by_problem(data, fraction=0.5, seed=0)
  keys = [{" ".join(t.prompt.split()) for t in side} for side in sides]
  assert not keys[0] & keys[1]
  assert len(keys[0]) + len(keys[1]) == 200
  assert min(map(len, keys)) > 60


def test_split_is_the_same_on_every_machine():
  data = [Trajectory.from_text(f"q{i}", "a", 1.0) for i in range(12)]
  held = split_by_problem(data, fraction=0.3, seed=0)[1]
  assert [t.prompt for t in held] == ["q2", "q8", "q10", "q11"]


@pytest.mark.parametrize(
  "turns, fields, message",
  [
    (CHAT[:1], {"is_chat": True}, "no assistant"),
    (CHAT, {"is_chat": True, "given": 4}, "no assistant"),
    (CHAT, {}, "is_chat"),
    (CHAT, {"is_chat": True, "turn_rewards": (1.0,)}, "turn_rewards"),
    (CHAT, {"is_chat": True, "turn_rewards": (1.0, 1.0)}, "sum"),
  ],
)
def test_impossible_trajectories(turns, fields, message):
  with pytest.raises(ValueError, match=message):
    Trajectory(turns, 1.0, id="x", **fields)
