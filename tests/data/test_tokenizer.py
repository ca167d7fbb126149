import pathlib
import subprocess
import sys

import pytest

from oreo_jax.data import load_tokenizer, make_tokenizer, save_tokenizer

TEXTS = ["Twelve eggs — naïve “quotes”.\n\n\tx = 3.5  \n"] * 20


def encode(tokenizer, text):
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_bytes_are_their_own_tokens():
  tokenizer = make_tokenizer("byte")
  text = "".join(map(chr, range(128))) + "é—𝄞"
  assert encode(tokenizer, text) == list(text.encode())
  assert tokenizer.decode(list(text.encode())) == text
  assert len(tokenizer) == 259
  assert (
    tokenizer.bos_token_id,
    tokenizer.eos_token_id,
    tokenizer.pad_token_id,
  ) == (256, 257, 258)


def test_bpe_merges_and_gives_the_text_back():
  tokenizer = make_tokenizer("bpe", texts=TEXTS, vocab_size=280)
  assert len(tokenizer) == 280
  ids = encode(tokenizer, TEXTS[0])
  assert len(ids) < len(TEXTS[0].encode())
  # Also what it was not trained on.
  for text in (TEXTS[0], "日本 zebra\r\n", " a  b"):
    assert tokenizer.decode(encode(tokenizer, text)) == text
  again = make_tokenizer("bpe", texts=TEXTS, vocab_size=280)
  assert encode(again, TEXTS[0]) == ids


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saved_is_loaded(tmp_path, kind):
  tokenizer = make_tokenizer(kind, texts=TEXTS, vocab_size=300)
  tokenizer.chat_template = "{{ messages[0]['content'] }}"
  save_tokenizer(tokenizer, tmp_path / "tokenizer")
  for again in (
    load_tokenizer(tmp_path / "tokenizer"),
    make_tokenizer("hf", path=tmp_path / "tokenizer"),
  ):
    assert encode(again, TEXTS[0]) == encode(tokenizer, TEXTS[0])
    assert again.chat_template == tokenizer.chat_template
    assert again.is_fast
    for name in ("bos", "eos", "pad"):
      name = f"{name}_token_id"
      assert getattr(again, name) == getattr(tokenizer, name)


def test_half_a_tokenizer_never_has_its_name(tmp_path, monkeypatch):
  tokenizer, place = make_tokenizer("byte"), tmp_path / "tokenizer"

  def cut_off(folder):
    (pathlib.Path(folder) / "tokenizer.json").write_text("{")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(tokenizer, "save_pretrained", cut_off)
    save_tokenizer(tokenizer, place)
  assert not place.exists()
  save_tokenizer(tokenizer, place)
  assert encode(load_tokenizer(place), "ab") == encode(tokenizer, "ab")
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_bad_requests(tmp_path):
  with pytest.raises(ValueError, match=r"data\.tokenizer"):
    make_tokenizer("words")
  with pytest.raises(ValueError, match=r"data\.tokenizer_vocab"):
    make_tokenizer("bpe", texts=TEXTS, vocab_size=100)
  with pytest.raises(ValueError, match=r"data\.tokenizer_path"):
    load_tokenizer(tmp_path / "none")
  with pytest.raises(ValueError, match=r"data\.tokenizer_path"):
    load_tokenizer(tmp_path)


def test_reading_data_needs_neither_jax_nor_transformers():
  code = (
    "import sys, oreo_jax.data; heavy = {'jax', 'torch', 'transformers',"
    " 'tokenizers', 'datasets', 'pyarrow'} & set(sys.modules);"
    " sys.exit(str(heavy) if heavy else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
