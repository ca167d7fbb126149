"""Tools, calls, template arguments and weights: honoured or refused."""

import json

import numpy as np
import pytest
from oracles.templates import CALLING, CHATML, PLAIN, with_template

from oreo_jax.data import (
  Sampled,
  Trajectory,
  Turn,
  load_pairs,
  load_trajectories,
  make_tokenizer,
  save_pairs,
  save_trajectories,
  tokenize_prompt,
  tokenize_trajectories,
  tokenize_trajectory,
)
from oreo_jax.data.errors import (
  EmptyResponseError,
  MissingKeyError,
  TemplateError,
  UnsupportedKeyError,
)

TOOLS = [{"name": "add", "parameters": {"a": "int"}}]
CALL = {"name": "add", "arguments": {"a": 2}}
CHAT = [
  {"role": "user", "content": "2 + 2?"},
  {"role": "assistant", "content": None, "tool_calls": [CALL]},
  {"role": "tool", "content": "4", "name": "add"},
  {"role": "assistant", "content": "It is 4."},
]
ROW = {"conversations": CHAT, "tools": TOOLS, "reward": 1}


def load(row):
  (trajectory,) = load_trajectories([row])
  return trajectory


def actions(sequence, tokenizer):
  edges = np.flatnonzero(np.diff(sequence.action_mask, prepend=False))
  edges = [*edges, len(sequence.tokens)]
  return [
    tokenizer.decode(sequence.tokens[a:b])
    for a, b in zip(edges[0::2], edges[1::2], strict=False)
  ]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tools_and_calls_are_rendered(kind):
  tokenizer = with_template(CALLING, kind=kind)
  sequence = tokenize_trajectory(load(ROW), tokenizer)
  text = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
  assert tokenizer.decode(sequence.tokens) == text.rstrip("\n")
  assert '"parameters"' in text
  # The policy wrote the call, and not the text around it.
  call = f"<call>{json.dumps(CALL)}</call>"
  assert actions(sequence, tokenizer) == [
    call + "<|im_end|>",
    "It is 4.<|im_end|>",
  ]
  prompt = tokenize_prompt(
    load(ROW).turns[:1], tokenizer, template_args={"tools": TOOLS}
  )
  assert sequence.tokens[: len(prompt)].tolist() == prompt.tolist()


def test_a_call_may_follow_a_text():
  tokenizer = with_template(CALLING)
  row = {"prompt": CHAT[:1], "completion": [CHAT[1] | {"content": "Hm."}]}
  for truncated, end in ((False, "<|im_end|>"), (True, "")):
    sequence = tokenize_trajectory(
      load(row | {"truncated": truncated}), tokenizer
    )
    assert actions(sequence, tokenizer) == [
      f"Hm.\n<call>{json.dumps(CALL)}</call>{end}"
    ]


def test_sampled_calls_are_taken_as_they_are():
  tokenizer = with_template(CALLING)
  text = '<call> {"name": "add"}</call>'
  tokens = np.array([*tokenizer.encode(text), tokenizer.eos_token_id])
  turns = (Turn("user", "?"), Turn("assistant", "", extra={"tool_calls": []}))
  sequence = tokenize_trajectory(
    Trajectory(
      turns,
      1.0,
      is_chat=True,
      template_args={"tools": TOOLS},
      sampled=(Sampled(tokens),),
    ),
    tokenizer,
  )
  assert sequence.tokens[sequence.action_mask].tolist() == tokens.tolist()
  assert '"parameters"' in tokenizer.decode(sequence.tokens)


def test_template_arguments_are_passed():
  tokenizer = with_template(CALLING)
  row = {
    "prompt": CHAT[:1],
    "completion": [{"role": "assistant", "content": "4"}],
    "chat_template_kwargs": {"enable_thinking": False},
  }
  trajectory = load(row)
  assert trajectory.template_args == {"enable_thinking": False}
  prompt = tokenize_prompt(
    trajectory.turns[:1], tokenizer, template_args=trajectory.template_args
  )
  assert tokenizer.decode(prompt).endswith("assistant\n<think></think>")
  tokens = np.array([52, tokenizer.eos_token_id])
  sequence = tokenize_trajectory(
    Trajectory(
      trajectory.turns,
      1.0,
      is_chat=True,
      template_args=trajectory.template_args,
      sampled=(Sampled(tokens),),
    ),
    tokenizer,
  )
  assert sequence.tokens.tolist() == [*prompt, *tokens]


def test_turns_of_weight_zero_are_context():
  tokenizer = with_template(CHATML)
  messages = [
    {"role": "user", "content": "a", "weight": 0},
    {"role": "assistant", "content": "b", "weight": 0},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "weight": 1},
  ]
  row = {"messages": messages, "reward": 1, "turn_rewards": [1]}
  trajectory = load(row)
  assert trajectory.actions == [3]
  sequence = tokenize_trajectory(trajectory, tokenizer)
  assert actions(sequence, tokenizer) == ["d<|im_end|>"]
  # Otherwise the row is the same.
  for message in messages:
    message.pop("weight", None)
  both = tokenize_trajectory(
    load({"messages": messages, "reward": 1}), tokenizer
  )
  assert actions(both, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
  assert both.tokens.tolist() == sequence.tokens.tolist()


def test_nothing_to_learn_of_weight_zero_alone():
  messages = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "weight": 0},
  ]
  with pytest.raises(EmptyResponseError, match="no assistant turn"):
    load({"messages": messages, "reward": 1})


@pytest.mark.parametrize(
  "template, row, message",
  [
    (CHATML, ROW, 'ignores "tools"'),
    (CHATML, ROW | {"tools": None}, 'ignores the "tool_calls" of turn 2'),
    (
      CALLING,
      ROW | {"chat_template_kwargs": {"enable_thoughts": False}},
      "no variable 'enable_thoughts'",
    ),
    # Without an end token nobody can tell where the calls end.
    (
      PLAIN.replace("'\n\n'", "m.get('tool_calls', '') | string + '\n\n'"),
      {
        "conversations": [CHAT[0], CHAT[1] | {"content": "a"}],
        "reward": 1,
      },
      "where turn 2, which has tool_calls, ends",
    ),
  ],
)
def test_templates_that_cannot_honour_a_row(template, row, message):
  tokenizer = with_template(template)
  with pytest.raises(TemplateError, match=message) as caught:
    tokenize_trajectory(load(row), tokenizer)
  assert str(caught.value).startswith("row 1")
  assert not tokenize_trajectories([load(row)], tokenizer, on_error="skip")


PLAIN_ROW = {"prompt": "a", "response": "b", "reward": 1}


@pytest.mark.parametrize(
  "row, kind, message",
  [
    (PLAIN_ROW | {"tools": TOOLS}, UnsupportedKeyError, "'tools' are for"),
    (
      PLAIN_ROW | {"chat_template_kwargs": {"x": 1}},
      UnsupportedKeyError,
      "plain text",
    ),
    (ROW | {"tools": 3}, MissingKeyError, "list of objects"),
    (ROW | {"tools": ["add"]}, MissingKeyError, "list of objects"),
    (ROW | {"tools": "[{"}, MissingKeyError, "no JSON"),
    (
      ROW | {"chat_template_kwargs": [1]},
      MissingKeyError,
      "expected an object",
    ),
    (
      ROW | {"chat_template_kwargs": {"tokenize": True}},
      UnsupportedKeyError,
      "may not set tokenize",
    ),
    (
      ROW | {"conversations": [CHAT[0], CHAT[3] | {"weight": 0.5}]},
      UnsupportedKeyError,
      "'assistant' is 0.5",
    ),
    (
      ROW | {"conversations": [CHAT[0] | {"weight": 1}, CHAT[3]]},
      UnsupportedKeyError,
      "'user' is 1",
    ),
    (
      ROW | {"conversations": [CHAT[0], CHAT[3] | {"content": None}]},
      MissingKeyError,
      '"content" is missing',
    ),
  ],
)
def test_rows_that_cannot_be_honoured(row, kind, message):
  with pytest.raises(kind, match=message) as caught:
    load_trajectories([PLAIN_ROW, row])
  assert str(caught.value).startswith("row 2: ")
  assert len(load_trajectories([PLAIN_ROW, row], on_error="skip")) == 1


def test_saved_is_loaded(tmp_path):
  path = tmp_path / "t.jsonl"
  weighed = [*CHAT[:3], CHAT[3] | {"weight": 0}, CHAT[0], CHAT[3]]
  rows = [
    ROW | {"id": "1", "chat_template_kwargs": {"enable_thinking": False}},
    ROW | {"id": "2", "conversations": weighed},
    ROW | {"id": "3", "tools": json.dumps(TOOLS)},
  ]
  trajectories = load_trajectories(rows)
  assert trajectories[2].template_args == {"tools": TOOLS}
  assert len(trajectories[1].actions) == 2
  save_trajectories(path, trajectories)
  assert load_trajectories(path) == trajectories
  written = [json.loads(line) for line in path.read_text().splitlines()]
  assert written[0]["tools"] == TOOLS
  assert written[0]["chat_template_kwargs"] == {"enable_thinking": False}
  assert written[1]["conversations"][3]["weight"] == 0
  assert written[1]["conversations"][1]["tool_calls"] == [CALL]
  preference = {
    "prompt": CHAT[:1],
    "chosen": [CHAT[3]],
    "rejected": [CHAT[3] | {"content": "5"}],
    "tools": TOOLS,
  }
  pairs = load_pairs([preference])
  save_pairs(path, pairs)
  assert json.loads(path.read_text()) == preference
  assert pairs[0].rejected.template_args == {"tools": TOOLS}


def test_null_is_nothing():
  # Tables have every column in every row and message.
  message = {"tool_calls": None, "weight": None, "name": None}
  messages = [CHAT[0] | message, CHAT[3] | message]
  row = {
    "messages": messages,
    "reward": 1,
    "tools": None,
    "chat_template_kwargs": None,
  }
  trajectory = load(row)
  assert trajectory.template_args is None
  assert [turn.extra for turn in trajectory.turns] == [None, None]
  tokenizer = make_tokenizer("byte")
  tokenizer.chat_template = CHATML
  assert len(tokenize_trajectory(trajectory, tokenizer).tokens)
