"""A training run small enough for several processes of one test machine."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(folder, *, steps, checkpoint_every):
  """Returns the words of an `oreo train` on rows that it writes to `folder`."""
  rows = [
    {"prompt": f"{i} + 1?", "response": f"{i + j}", "reward": int(j == 1)}
    for i in range(40)
    for j in (1, 2)
  ]
  path = pathlib.Path(folder) / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return [
    "train",
    f"--config={ROOT / 'configs' / 'trajectories.py'}:tiny",
    f"--workdir={pathlib.Path(folder) / 'run'}",
    f"--config.data.path={path}",
    "--config.data.tokenizer=byte",
    "--config.data.row_length=32",
    "--config.data.held_out=0.0",
    "--config.train.epochs=1e5",
    f"--config.train.max_steps={steps}",
    "--config.train.batch_size=4",
    "--config.train.log_every=1",
    f"--config.train.checkpoint_every={checkpoint_every}",
  ]


def saved_steps(folder):
  """Returns the training steps that the run has checkpoints of."""
  checkpoints = pathlib.Path(folder) / "run" / "oreo" / "checkpoints"
  if not checkpoints.is_dir():
    return []
  return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
