# ruff: noqa: E501 -- programs in text have long lines
"""What the attention kernel costs, from the shapes it is called with."""

import numpy as np
import pytest

from oreo_jax.aot import costs, groups, hlo

ROWS, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 64, 8


def program(phase, blocks, most, name="splash_mha_{}_segmented_no_residuals.1"):
  """Returns a program with one call of a kernel, as a TPU's compiler has it."""
  name = name.format(phase)
  table = (most, blocks) if phase == "dkv" else (blocks, most)
  tables = f"s8[1,{table[0]},{table[1]}]"
  query = f"bf16[{ROWS},{HEADS},{LENGTH},{WIDTH}]"
  key = f"bf16[{ROWS},{KV_HEADS},{LENGTH},{WIDTH}]"
  result = key if phase == "dkv" else query
  lanes, sublanes = f"s32[{ROWS},{LENGTH},128]", f"s32[{ROWS},8,{LENGTH}]"
  segments = (sublanes, lanes) if phase == "dkv" else (lanes, sublanes)
  shapes = [tables, tables, query, key, key, *segments]
  if phase != "fwd":
    sums = f"f32[{ROWS},{HEADS},8,{LENGTH}]"
    shapes += [sums, query, sums]
  # The places of the queries, which all rows share.
  shapes.append(f"s32[8,{LENGTH}]" if phase == "dkv" else f"s32[{LENGTH},128]")
  parameters = "\n".join(
    f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)
  )
  operands = ", ".join(f"%p{i}" for i in range(len(shapes)))
  return f"""HloModule m
ENTRY %main (p0: {tables}) -> {result} {{
{parameters}
  ROOT %{name} = {result} custom-call({operands}), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"block": "{{16}}"
}}}}, metadata={{op_name="pallas_call"}}
}}
"""


def count(text):
  return costs.count(hlo.parse(text), groups.Slices([0]))


def computed_pairs(blocks, window):
  """Counts block pairs in which some query sees some key, from the mask."""
  query, key = np.indices((LENGTH, LENGTH))
  mask = (key <= query) & (query - key < window)
  size = LENGTH // blocks
  return int(mask.reshape(blocks, size, blocks, size).any((1, 3)).sum())


@pytest.mark.parametrize(
  ("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)]
)
@pytest.mark.parametrize("window", [LENGTH, 17])
def test_every_pair_of_blocks_that_is_seen_is_computed(phase, products, window):
  blocks = 4
  # 17 tokens reach into the block before one's own.
  most = min(blocks, 2 if window == 17 else blocks)
  counted = count(program(phase, blocks, most))
  block = LENGTH // blocks
  pairs = computed_pairs(blocks, window)
  product = 2 * block * block * WIDTH
  assert counted.flops == ROWS * HEADS * pairs * products * product
  assert counted.uncounted_kernels == 0


def test_causal_attention_nears_half_of_the_square_as_blocks_shrink():
  square = ROWS * HEADS * 2 * (2 * LENGTH**2 * WIDTH)
  shares = [
    count(program("fwd", blocks, blocks)).flops / square
    for blocks in (1, 2, 8, 64)
  ]
  assert shares == [1.0, 0.75, 0.5625, 0.5078125]  # (1 + 1 / blocks) / 2


def grid_bytes(phase, blocks):
  """Walks the kernel's grid and adds up every block that is fetched."""
  size = LENGTH // blocks
  lanes, sublanes = 128 * 4, 8 * 4  # bytes a token of the tables of segments
  if phase == "fwd":
    of_query = ((2 * WIDTH, "head"), (lanes, "row"), (lanes, "none"))
    of_key = ((2 * WIDTH, "kv"), (2 * WIDTH, "kv"), (sublanes, "row"))
  else:
    sums = ((sublanes, "head"), (2 * WIDTH, "head"), (sublanes, "head"))
    of_query = (
      (2 * WIDTH, "head"),
      (sublanes, "row"),
      *sums,
      (sublanes, "none"),
    )
    of_key = ((2 * WIDTH, "kv"), (2 * WIDTH, "kv"), (lanes, "row"))
  steps = []
  for row in range(ROWS):
    if phase == "fwd":
      steps += [
        (row, head, q, k)
        for head in range(HEADS)
        for q in range(blocks)
        for k in range(q + 1)
      ]
    else:
      steps += [
        (row, head, q, k)
        for k in range(blocks)
        for head in range(HEADS)
        for q in range(k, blocks)
      ]
  total = 0
  for side, place in ((of_query, 2), (of_key, 3)):
    for width, shared in side:
      before = None
      for step in steps:
        row, head = step[:2]
        where = {
          "head": (row, head),
          "kv": (row, head // (HEADS // KV_HEADS)),
          "row": (row,),
          "none": (),
        }[shared]
        block = (*where, step[place])
        total += (block != before) * size * width
        before = block
  return total


@pytest.mark.parametrize("phase", ["fwd", "dkv"])
@pytest.mark.parametrize("blocks", [4, 8])
def test_blocks_are_fetched_as_the_grid_walks(phase, blocks):
  counted = count(program(phase, blocks, blocks))
  heads = KV_HEADS if phase == "dkv" else HEADS
  written = ROWS * heads * LENGTH * WIDTH * 2
  fetched = grid_bytes(phase, blocks)
  # A block that is there from the step before is not fetched again. The count
  # leaves that out where a row of the grid ends and the next begins.
  assert fetched <= counted.hbm_bytes - written < 1.1 * fetched


def test_a_single_row_has_no_dimension_of_its_own():
  text = program("fwd", 4, 4)
  both = count(text)
  row = count(text.replace(f"[{ROWS},", "["))
  assert row.flops == both.flops / ROWS
  assert row.hbm_bytes == both.hbm_bytes / ROWS


def test_a_kernel_that_is_not_known_is_named():
  counted = count(program("fwd", 4, 4, name="something_else.3"))
  assert counted.flops == 0.0 and counted.uncounted_kernels == 1
  assert counted.hbm_bytes > 0
