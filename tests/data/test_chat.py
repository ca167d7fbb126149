"""Action masks of chats, under templates as real checkpoints have them."""

import numpy as np
import pytest
import tokenizers
import transformers
from oracles.templates import (
  CHAT,
  CHATML,
  LLAMA2,
  LLAMA3,
  PLAIN,
  QWEN,
  SHOUT,
  THINK,
  TOOLS,
  with_template,
)

from oreo_jax.data import (
  Trajectory,
  Turn,
  tokenize_prompt,
  tokenize_trajectories,
)
from oreo_jax.data import tokenize_trajectory as tokenize


def metaspace(template):
  """Word pieces with a blank put before every text, as Llama 2's."""
  backend = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      [
        ("<unk>", 0.0),
        ("▁", -3.0),
        *[(c, -4.0) for c in map(chr, range(33, 127))],
        ("▁It", -2.0),
        ("▁6", -2.0),
        ("\n", -4.0),
      ],
      0,
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Metaspace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )
  tokenizer.chat_template = template
  return tokenizer


def chat(turns, reward=1.0, **fields):
  return Trajectory(turns=tuple(turns), reward=reward, is_chat=True, **fields)


def actions(sequence, tokenizer):
  """Decodes each run of action tokens."""
  edges = np.flatnonzero(np.diff(sequence.action_mask, prepend=False))
  edges = [*edges, len(sequence.tokens)]
  return [
    tokenizer.decode(sequence.tokens[a:b])
    for a, b in zip(edges[0::2], edges[1::2], strict=False)
  ]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize(
  "template, expected",
  [
    (CHATML, [" It is 4.\n\nIndeed 4. <|im_end|>", "6<|im_end|>"]),
    (QWEN, [" It is 4.\n\nIndeed 4. <|im_end|>", "6<|im_end|>"]),
    (LLAMA3, ["It is 4.\n\nIndeed 4.<|eot_id|>", "6<|eot_id|>"]),
    (TOOLS, [" It is 4.\n\nIndeed 4. <|im_end|>", "6<|im_end|>"]),
    # The generation prompt ends before the blank.
    (LLAMA2, [" It is 4.\n\nIndeed 4. <|eos|>", " 6 <|eos|>"]),
    (PLAIN, [" It is 4.\n\nIndeed 4. ", "6<|eos|>"]),
  ],
)
def test_actions_decode_to_contents(template, expected, kind, pad_is_eos):
  tokenizer = with_template(template, kind=kind, pad_is_eos=pad_is_eos)
  sequence = tokenize(chat(CHAT), tokenizer)
  assert actions(sequence, tokenizer) == expected
  # The chat ends with its last action, and is the template's otherwise.
  whole = tokenizer.apply_chat_template(
    [turn.message() for turn in CHAT], tokenize=False
  )
  text = tokenizer.decode(sequence.tokens)
  if template is PLAIN:
    text = text.removesuffix("<|eos|>")
  assert whole.startswith(text)
  assert not whole[len(text) :].strip()
  assert np.flatnonzero(sequence.rewards).tolist() == [len(sequence.tokens) - 1]


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA3, TOOLS])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokens_and_context_are_what_sampling_sees(template, kind):
  tokenizer = with_template(template, kind=kind)
  turns = [turn._replace(content=turn.content.strip()) for turn in CHAT]
  sequence = tokenize(chat(turns), tokenizer)
  messages = [turn.message() for turn in turns]
  ids = tokenizer.apply_chat_template(messages)["input_ids"]
  assert sequence.tokens.tolist() == ids[: len(sequence.tokens)]
  prompt = tokenizer.apply_chat_template(
    messages[:3], add_generation_prompt=True
  )["input_ids"]
  assert sequence.tokens[: len(prompt)].tolist() == prompt
  assert tokenize_prompt(turns[:3], tokenizer).tolist() == prompt
  assert not sequence.action_mask[len(prompt) - 1]
  assert sequence.action_mask[len(prompt) :].all()


def test_default_system_message_is_context():
  tokenizer = with_template(QWEN)
  sequence = tokenize(chat(CHAT[:2]), tokenizer)
  context = tokenizer.decode(sequence.tokens[~sequence.action_mask])
  assert context.startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_moved_system_message_is_context():
  tokenizer = with_template(LLAMA2)
  sequence = tokenize(chat([Turn("system", "Be 6."), *CHAT]), tokenizer)
  assert actions(sequence, tokenizer)[1] == " 6 <|eos|>"
  assert tokenizer.decode(sequence.tokens).startswith(
    "<|bos|>[INST] <<SYS>>\nBe 6.\n<</SYS>>\n\nWhat"
  )


def test_observations_are_no_actions():
  tokenizer = with_template(TOOLS)
  turns = [
    Turn("system", "You act."),
    Turn("user", "Find the mug."),
    Turn("assistant", "open drawer\nthen look"),
    Turn("tool", "The drawer is open."),
    Turn("assistant", "take mug"),
    Turn("tool", "You have it."),
  ]
  sequence = tokenize(
    chat(turns, 1.25, turn_rewards=(0.25, 1.0)),
    tokenizer,
    granularity="step",
    step_ends=lambda ids: ids == tokenizer.encode("\n")[0],
  )
  assert actions(sequence, tokenizer) == [
    "open drawer\nthen look<|im_end|>",
    "take mug<|im_end|>",
  ]
  starts = np.flatnonzero(sequence.decision_mask)
  # The end token of each turn is a step of its own.
  assert [tokenizer.decode(sequence.tokens[i]) for i in starts] == [
    *["o", "t", "<|im_end|>"],
    *["t", "<|im_end|>"],
  ]
  paid = np.flatnonzero(sequence.rewards)
  assert sequence.rewards[paid].tolist() == [0.25, 1.0]
  assert tokenizer.decode(sequence.tokens[paid]) == "<|im_end|>" * 2
  # What was observed after the last action taught nothing, and is left out.
  assert paid[1] == len(sequence.tokens) - 1
  response = tokenize(chat(turns), tokenizer, granularity="response")
  assert response.decision_mask.sum() == 1
  assert response.decision_mask.argmax() == response.action_mask.argmax()


def test_truncated_turn_has_no_end():
  tokenizer = with_template(CHATML)
  sequence = tokenize(chat(CHAT, truncated=True), tokenizer)
  assert actions(sequence, tokenizer)[-1] == "6"
  assert actions(sequence, tokenizer)[0].endswith("<|im_end|>")
  assert sequence.rewards[-1] == 1.0


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize(
  "template, end",
  [
    (CHATML, "<|im_end|>"),
    (QWEN, "<|im_end|>"),
    (LLAMA3, "<|eot_id|>"),
    (LLAMA2, "  <|eos|>"),
    (THINK, "<|im_end|>"),
    (PLAIN, "<|eos|>"),
  ],
)
def test_empty_answer_is_to_end_at_once(template, end, kind):
  tokenizer = with_template(template, kind=kind)
  turns = [*CHAT[:3], Turn("assistant", "")]
  for granularity in ("step", "token"):
    sequence = tokenize(
      chat(turns, given=3),
      tokenizer,
      granularity=granularity,
      step_ends=lambda ids: np.zeros(len(ids), bool),
    )
    assert actions(sequence, tokenizer) == [end]
    assert sequence.decision_mask[-1] and sequence.rewards[-1] == 1.0


def test_given_turns_are_context():
  tokenizer = with_template(CHATML)
  sequence = tokenize(chat(CHAT, given=3), tokenizer)
  assert actions(sequence, tokenizer) == ["6<|im_end|>"]


@pytest.mark.parametrize("content", ["", "i", "6", "user", "ant\n", "<|im"])
def test_content_that_occurs_elsewhere(content):
  # Answers that are parts of the text around them must not be mistaken.
  turns = [
    Turn("user", f"{content}6 assistant\n"),
    Turn("assistant", "6"),
    Turn("user", content),
    Turn("assistant", content + "6"),
  ]
  for template in (CHATML, QWEN, LLAMA3, THINK):
    tokenizer = with_template(template)
    end = "<|eot_id|>" if template is LLAMA3 else "<|im_end|>"
    sequence = tokenize(chat(turns), tokenizer)
    assert actions(sequence, tokenizer) == [f"6{end}", f"{content}6{end}"]


def test_added_thought_block_is_context():
  tokenizer = with_template(THINK)
  sequence = tokenize(chat(CHAT), tokenizer)
  assert actions(sequence, tokenizer)[1] == "6<|im_end|>"
  assert tokenizer.decode(sequence.tokens).endswith(
    "<think>\n\n</think>\n\n6<|im_end|>"
  )


def test_thoughts_written_as_the_template_does_are_actions():
  tokenizer = with_template(THINK)
  thought = "<think>\n2 and 2\n</think>\n\n4"
  sequence = tokenize(chat([CHAT[0], Turn("assistant", thought)]), tokenizer)
  assert actions(sequence, tokenizer) == [thought + "<|im_end|>"]


@pytest.mark.parametrize(
  "template, turns",
  [
    # The thoughts of the first answer are gone in the second.
    (
      THINK,
      [CHAT[0], Turn("assistant", "<think>\nx\n</think>\n\n4"), *CHAT[2:]],
    ),
    # The template changes the white space inside the answer.
    (THINK, [CHAT[0], Turn("assistant", "<think>x</think>4")]),
    (SHOUT, [CHAT[0], Turn("assistant", "four")]),
  ],
)
def test_rewritten_turns_are_an_error(template, turns):
  with pytest.raises(ValueError, match=r"f:3.*rewrites the assistant turns"):
    tokenize(chat(turns, source="f:3"), with_template(template))
  kept = tokenize_trajectories(
    [chat(turns), chat(CHAT[:2])], with_template(template), on_error="skip"
  )
  assert len(kept) == (template is THINK)


def test_template_missing_or_refusing():
  tokenizer = with_template(None)
  with pytest.raises(ValueError, match=r"f:3.*no chat template"):
    tokenize(chat(CHAT, source="f:3"), tokenizer)
  with pytest.raises(ValueError, match="no chat template"):
    tokenize_prompt(CHAT[:1], tokenizer)
  tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(ValueError, match=r"f:3.*roles must alternate"):
    tokenize(chat(CHAT, source="f:3"), tokenizer)


def test_token_across_the_edge_of_an_action_is_split():
  tokenizer = with_template(CHATML, kind="bpe", texts=["a\n\n\nb"] * 50)
  header, answer = "<|im_start|>assistant\n", "\n\n4"
  # In the whole text the last character of the one and the first of the other
  # are one token.
  assert len(tokenizer.tokenize("\n" + answer)) == 3
  sequence = tokenize(chat([CHAT[0], Turn("assistant", answer)]), tokenizer)
  assert actions(sequence, tokenizer) == [answer + "<|im_end|>"]
  context = tokenizer.decode(sequence.tokens[~sequence.action_mask])
  assert context.endswith(header)


def test_blanks_of_word_pieces_stay_with_their_token():
  tokenizer = metaspace(LLAMA2)
  turns = [turn._replace(content=turn.content.strip()) for turn in CHAT]
  sequence = tokenize(chat(turns), tokenizer)
  pieces = tokenizer.convert_ids_to_tokens(sequence.tokens)
  joined = "".join(pieces)
  assert "▁[/INST]▁It▁is▁4.\n\nIndeed▁4.▁</s>" in joined
  first = pieces[int(sequence.action_mask.argmax())]
  assert first == "▁It"
  found = [a.strip() for a in actions(sequence, tokenizer)]
  assert found == ["It is 4.\n\nIndeed 4. </s>", "6 </s>"]
