"""Chat templates as real checkpoints have them, on tokenizers made here."""

from oreo_jax.data import Turn, make_tokenizer

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A default system message, and markers that only transformers understands.
QWEN = (
  "{% if messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
  "{% endif %}{% for m in messages %}"
  "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Strips the contents; a header of special tokens.
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
  " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Moves the system message into the first user turn; a blank before the end.
LLAMA2 = (
  "{% set ns = namespace(system='') %}{% for m in messages %}"
  "{% if m['role'] == 'system' %}"
  "{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
  "{% elif m['role'] == 'assistant' %}"
  "{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
  "{% else %}{{ bos_token + '[INST] ' + ns.system + m['content'] | trim"
  " + ' [/INST]' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
)
# Tool results wrapped into user turns.
TOOLS = (
  "{% for m in messages %}{% if m['role'] == 'tool' %}"
  "{{ '<|im_start|>user\n<tool_response>\n' + m['content']"
  " + '\n</tool_response><|im_end|>\n' }}"
  "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of earlier turns are dropped; those of the last are set out, and an
# answer without any gets an empty block.
THINK = (
  "{% for m in messages %}{% set c = m['content'] %}"
  "{% if m['role'] == 'assistant' %}{% set thought = '' %}"
  "{% if '</think>' in c %}"
  "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
  "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  "{{ '<|im_start|>assistant\n' }}"
  "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
  "{{ c + '<|im_end|>\n' }}"
  "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Lists tools, writes their calls after the content, and can turn thoughts off.
CALLING = (
  "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for t in tools %}"
  "{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.content %}{{ m.content }}{% endif %}"
  "{% for c in m.tool_calls or [] %}"
  "{{ '\n' if m.content else '' }}{{ '<call>' + c | tojson + '</call>' }}"
  "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
  "{% endif %}"
)
# No end token at all.
PLAIN = (
  "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content']"
  " + '\n\n' }}{% endfor %}"
)
SHOUT = (
  "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}"
  "{% endfor %}"
)
SPECIAL = [
  "<|im_start|>",
  "<|im_end|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
]
CHAT = [
  Turn("user", "What is 2 + 2?"),
  Turn("assistant", " It is 4.\n\nIndeed 4. "),
  Turn("user", "And\n3 + 3?\n"),
  Turn("assistant", "6"),
]


def with_template(template, *, kind="byte", pad_is_eos=False, texts=()):
  texts = texts or [turn.content for turn in CHAT] * 20
  tokenizer = make_tokenizer(kind, texts=texts, vocab_size=320)
  tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
  tokenizer.chat_template = template
  if pad_is_eos:
    tokenizer.pad_token = tokenizer.eos_token
  return tokenizer
