"""What a command does: one module a stage, and one table of them.

From a row of the table follow the command and its line in the usage, what
`--overwrite` removes, and whether the stage is done. `workspace` knows a run's
folder, `fitting` is the training that `sft` and `train` share, and `branch` is
what rounds and comparisons are made of.
"""

from oreo_jax.stages.aot import AOT
from oreo_jax.stages.collect import COLLECT
from oreo_jax.stages.compare import COMPARE
from oreo_jax.stages.evaluate import EVALUATE
from oreo_jax.stages.export import EXPORT
from oreo_jax.stages.generate import GENERATE
from oreo_jax.stages.iterate import ITERATE
from oreo_jax.stages.page import REPORT
from oreo_jax.stages.run import RUN
from oreo_jax.stages.sft import SFT
from oreo_jax.stages.stage import Stage
from oreo_jax.stages.train import TRAIN
from oreo_jax.stages.workspace import Workspace

STAGES: dict[str, Stage] = {
  stage.name: stage
  for stage in (
    SFT,
    COLLECT,
    TRAIN,
    EVALUATE,
    REPORT,
    RUN,
    ITERATE,
    COMPARE,
    EXPORT,
    GENERATE,
    AOT,
  )
}

__all__ = ["STAGES", "Stage", "Workspace"]
