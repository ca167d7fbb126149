import pytest

from oreo_jax import files


def test_a_file_keeps_its_old_text_when_the_writer_fails(tmp_path):
  path = tmp_path / "deep" / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(RuntimeError), files.whole_file(path) as partial:
    partial.write_text("torn")
    raise RuntimeError
  assert files.read_json(path) == {"a": 1}
  assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "model"
  with files.whole_folder(path) as partial:
    (partial / "weights").write_text("old")
  with pytest.raises(RuntimeError), files.whole_folder(path) as partial:
    (partial / "weights").write_text("torn")
    assert (path / "weights").read_text() == "old"
    raise RuntimeError
  assert (path / "weights").read_text() == "old"
  with files.whole_folder(path) as partial:
    (partial / "other").write_text("new")
  assert [p.name for p in path.iterdir()] == ["other"]
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_left_by_a_cut_off_run_does_not_leak_into_the_next(tmp_path):
  (tmp_path / "model.partial").mkdir()
  (tmp_path / "model.partial" / "stale").write_text("x")
  with files.whole_folder(tmp_path / "model") as partial:
    (partial / "fresh").write_text("x")
  assert [p.name for p in (tmp_path / "model").iterdir()] == ["fresh"]


def test_broken_json_names_the_file_and_the_cure(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("{")
  with pytest.raises(ValueError, match=r"a\.json is not JSON .* again"):
    files.read_json(path)


def test_a_digest_is_of_content_and_of_names(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_text("1")
  assert files.digest(tmp_path / "a") == files.digest(tmp_path / "b")
  (tmp_path / "b" / "x").write_text("2")
  assert files.digest(tmp_path / "a") != files.digest(tmp_path / "b")
  (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
  (tmp_path / "b" / "y").write_text("1")
  assert files.digest(tmp_path / "a") != files.digest(tmp_path / "b")


def test_removing_what_is_not_there_is_no_error(tmp_path):
  files.remove(tmp_path / "nothing")
