# ruff: noqa: E501 -- programs in text have long lines
"""Counting in the text of a program: written by hand, and compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oreo_jax.aot import costs, groups, hlo, traffic

# An outer loop of 3 runs whose body has an inner loop that counts 0, 2, 4, 6
# (a windowed product), and a reduction outside both. The inner loop says
# nothing of its length, the outer one does.
NESTED = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/oreo_jax/models/decoder.py"
2 "/usr/lib/jax/_src/api.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %permute = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(f)/dot" stack_frame_id=2}
  %done = f32[8,4]{1,0:T(8,128)} collective-permute-done(%permute)
  ROOT %t = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%next, %done)
}

%inner_condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%outer_body (r: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %k = s32[] get-tuple-element(%r), index=0
  %one = s32[] constant(1)
  %after = s32[] add(%k, %one)
  %y = f32[8,4]{1,0:T(8,128)} get-tuple-element(%r), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%zero, %y)
  %inner = (s32[], f32[8,4]{1,0:T(8,128)}) while(%start), condition=%inner_condition, body=%inner_body
  %z = f32[8,4]{1,0:T(8,128)} get-tuple-element(%inner), index=1
  %gather = f32[8,16]{1,0:T(8,128)S(1)} all-gather(%z), channel_id=2, replica_groups=[1,4]<=[4], dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(f)/x" stack_frame_id=1}
  %product = f32[8,8]{1,0:T(8,128)S(1)} dot(%gather, %gather), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %u = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%after, %z)
}

%outer_condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %l = s32[] get-tuple-element(%s), index=0
  %other = s32[] constant(999)
  ROOT %before = pred[] compare(%l, %other), direction=LT
}

ENTRY %main (m: f32[8,4]) -> f32[8,4] {
  %m = f32[8,4]{1,0:T(8,128)} parameter(0)
  %nought = s32[] constant(0)
  %first = (s32[], f32[8,4]{1,0:T(8,128)}) tuple(%nought, %m)
  %outer = (s32[], f32[8,4]{1,0:T(8,128)}) while(%first), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %w = f32[8,4]{1,0:T(8,128)} get-tuple-element(%outer), index=1
  ROOT %total = f32[8,4]{1,0:T(8,128)} all-reduce(%w), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%sum
}
"""


@pytest.fixture(scope="module")
def nested():
  return hlo.parse(NESTED)


def test_collectives_count_as_often_as_their_loops_run(nested):
  counted = costs.count(nested, groups.Slices([0, 0, 1, 1]))
  by_kind = {c.kind: c for c in counted.collectives}
  array = 8 * 4 * 4  # f32[8,4]

  permute = by_kind["collective-permute"]
  assert permute.times == 3 * 4  # 0, 2, 4, 6: steps of two
  assert permute.sent == 12 * array
  assert permute.line == "models/decoder.py:7"  # not the library's frame
  assert permute.crosses_slices  # from 1 to 2

  gather = by_kind["all-gather"]
  assert gather.times == 3 and gather.devices == 4
  assert gather.sent == 3 * (4 * array) * 3 / 4

  reduce = by_kind["all-reduce"]
  assert reduce.times == 1 and reduce.devices == 2
  assert reduce.sent == 2 * array / 2
  assert not reduce.crosses_slices  # {0,1} and {2,3} are the slices
  assert counted.flops == 3 * 2 * 8 * 8 * 16
  assert counted.unknown_loops == ()


def test_bytes_count_outside_the_chips_own_memory_alone(nested):
  # A permute reads and writes its array, 12 times; the gather only reads, as
  # it writes to S(1), 3 times; the reduction does both once.
  counted = costs.count(nested, groups.Slices([0] * 4))
  assert counted.hbm_bytes == (12 * 2 + 3 + 2) * 8 * 4 * 4 + _counters()


def _counters():
  # The sums and tests of the loops' counters, s32[] each: two reads and a
  # write. (Conditions are not counted.)
  return (12 + 3) * 3 * 4


def test_a_loop_that_data_ends_is_named_and_has_the_length_it_is_given():
  text = NESTED.replace("direction=LT", "direction=NE")
  module = hlo.parse(text)
  slices = groups.Slices([0] * 4)
  counted = costs.count(module, slices)
  assert counted.unknown_loops == ("inner",)
  lengths = [c.times for c in counted.collectives]
  assert max(lengths) == 3
  counted = costs.count(module, slices, loop_lengths=(5,))
  assert max(c.times for c in counted.collectives) == 15


def test_loops_inside_loops_that_data_ends_have_lengths_of_their_own():
  text = NESTED.replace("direction=LT", "direction=NE")
  text = text.replace(""", backend_config={"known_trip_count":{"n":"3"}}""", "")
  module = hlo.parse(text)
  counted = costs.count(module, groups.Slices([0] * 4), loop_lengths=(5, 7))
  times = {c.kind: c.times for c in counted.collectives}
  assert times["collective-permute"] == 5 * 7
  assert times["all-gather"] == 5
  assert times["all-reduce"] == 1


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing\n")


@pytest.mark.parametrize(
  ("attributes", "members"),
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_are_read_in_every_way_of_writing(attributes, members):
  members_read = groups._members(attributes + ", dimensions={0}", 4)
  np.testing.assert_array_equal(sorted(members_read.tolist()), members)


@pytest.mark.parametrize(
  ("line", "flops"),
  [
    # A plain product, 2 x 256 x 64 x 32, over a batch of 2.
    (
      "%c = bf16[2,256,64] convolution(%l, %r), window={size=1}, "
      "dim_labels=0bf_oi0->0bf",
      2 * (2 * 256 * 64 * 32),
    ),
    # One product a batch entry: dilation lets each meet its own alone.
    (
      "%c = bf16[2,2,512,256] convolution(%q, %k), window={size=2x2 "
      "lhs_dilate=2x2}, dim_labels=01bf_01oi->01bf",
      2 * 2 * 2 * 512 * 256 * 8,
    ),
    # Reversed over padding: heads of the weights are outputs.
    (
      "%c = bf16[32,2,8] convolution(%a, %b), window={size=2 pad=1_1 "
      "rhs_reversal=1}, dim_labels=fb0_0oi->b0f",
      2 * (32 * 2 * 8) * 512,
    ),
  ],
)
def test_a_matrix_product_of_a_tpu_is_counted(line, flops):
  text = f"""HloModule m
ENTRY %main (l: bf16[2,256,32]) -> bf16[2] {{
  %l = bf16[2,256,32] parameter(0)
  %r = bf16[64,32,1] parameter(1)
  %q = bf16[2,2,512,8] parameter(2)
  %k = bf16[2,2,256,8] parameter(3)
  %a = bf16[512,32,1] parameter(4)
  %b = bf16[2,8,512] parameter(5)
  ROOT {line}
}}
"""
  counted = costs.count(hlo.parse(text), groups.Slices([0]))
  assert counted.flops == flops


def test_a_scanned_product_counts_once_a_layer():
  # XLA's own count has the body of the loop once.
  layers, rows, width = 6, 16, 32

  def forward(x, weights):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

  compiled = (
    jax.jit(forward)
    .lower(jnp.zeros((rows, width)), jnp.zeros((layers, width, width)))
    .compile()
  )
  counted = costs.count(hlo.parse(compiled.as_text()), groups.Slices([0]))
  assert counted.flops == layers * 2 * rows * width * width
  # Each run slices its own layer of the weights: to read all of them in each
  # would be `layers` times the weights, beside all else.
  weights = layers * width * width * 4
  assert weights <= counted.hbm_bytes < layers * weights


def test_a_kernel_whose_attributes_have_lines_does_not_end_a_computation():
  text = """HloModule m
ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  %k = f32[4,4] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{256}"
}}, metadata={op_name="pallas_call"}
  ROOT %d = f32[4,4] dot(%k, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
  counted = costs.count(hlo.parse(text), groups.Slices([0]))
  assert counted.flops == 2 * 4 * 4 * 4
  assert counted.uncounted_kernels == 1


def test_one_collective_spread_over_fusions_counts_once():
  text = """HloModule m
%f.1 (p: f32[2]) -> f32[8] {
  %p = f32[2] parameter(0)
  ROOT %g = f32[8] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}
%f.2 (q: f32[2]) -> f32[8] {
  %q = f32[2] parameter(0)
  ROOT %h = f32[8] all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}
%f.3 (r: f32[2]) -> f32[8] {
  %r = f32[2] parameter(0)
  ROOT %k = f32[8] all-gather(%r), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}
%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x1 = f32[2] get-tuple-element(%t), index=1
  %b = f32[8] fusion(%x1), kind=kCustom, calls=%f.2
  ROOT %u = (s32[], f32[2]) tuple(%i, %x1)
}
%condition (v: (s32[], f32[2])) -> pred[] {
  %v = (s32[], f32[2]) parameter(0)
  ROOT %c = pred[] constant(true)
}
ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2] parameter(0)
  %async-collective-start.4 = f32[8] fusion(%x), kind=kCustom, calls=%f.1
  %zero = s32[] constant(0)
  %first = (s32[], f32[2]) tuple(%zero, %x)
  %w = (s32[], f32[2]) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"9"}}
  ROOT %async-collective-done.4 = f32[8] fusion(%x), kind=kCustom, calls=%f.3
}
"""
  counted = costs.count(hlo.parse(text), groups.Slices([0] * 4))
  assert [(c.sent, c.times) for c in counted.collectives] == [(24.0, 1.0)]


def test_collectives_of_one_channel_all_count():
  # Those of a `shard_map` have the same channel.
  text = """HloModule m
ENTRY %main (x: f32[2]) -> f32[32] {
  %x = f32[2] parameter(0)
  %g = f32[8] all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %h = f32[32] all-gather(%g), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
  counted = costs.count(hlo.parse(text), groups.Slices([0] * 4))
  assert [c.sent for c in counted.collectives] == [24.0, 96.0]


def test_sums_of_which_each_device_keeps_a_slice_are_scattered():
  text = """HloModule m
%scatter (p: f32[8], q: f32[16]) -> (f32[2], f32[4]) {
  %p = f32[8] parameter(0)
  %q = f32[16] parameter(1)
  %r = (f32[8], f32[16]) all-reduce(%p, %q), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  %r0 = f32[8] get-tuple-element(%r), index=0
  %r1 = f32[16] get-tuple-element(%r), index=1
  %i = u32[] partition-id()
  %s0 = f32[2] dynamic-slice(%r0, %i), dynamic_slice_sizes={2}
  %s1 = f32[4] dynamic-slice(%r1, %i), dynamic_slice_sizes={4}
  ROOT %t = (f32[2], f32[4]) tuple(%s0, %s1)
}
ENTRY %main (x: f32[8], y: f32[16]) -> (f32[2], f32[4]) {
  %x = f32[8] parameter(0)
  %y = f32[16] parameter(1)
  ROOT %f = (f32[2], f32[4]) fusion(%x, %y), kind=kCustom, calls=%scatter
}
"""
  slices = groups.Slices([0] * 4)
  (one,) = costs.count(hlo.parse(text), slices).collectives
  assert one.kind == "reduce-scatter"
  assert one.sent == (8 + 16) * 4 * 3 / 4
  # Where one of the sums is wanted on every device, it is no scatter.
  (other,) = costs.count(
    hlo.parse(text.replace("tuple(%s0, %s1)", "tuple(%s0, %r1)")), slices
  ).collectives
  assert other.kind == "all-reduce"
  assert other.sent == 2 * one.sent


def test_what_the_runtime_of_slices_sends_is_counted():
  text = """HloModule m
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %token = token[] after-all()
  ROOT %s = (f32[64], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
  counted = costs.count(hlo.parse(text), groups.Slices([0, 0, 1, 1]))
  (sent,) = counted.collectives
  assert (sent.kind, sent.crosses_slices, sent.sent) == (
    "all-reduce",
    True,
    256.0,
  )


# A fusion that retiles all layers of a weight, converts them, and slices one;
# another one that writes the converted weight out.
SLICED = """HloModule jit_g, is_scheduled=true

%retile (a: s8[4,8,16]) -> s8[4,8,16] {
  %a = s8[4,8,16]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copied = s8[4,8,16]{2,1,0:T(8,128)(4,1)} copy(%a)
}

%one_layer (b: s8[4,8,16], at: s32[]) -> bf16[1,8,16] {
  %b = s8[4,8,16]{2,1,0:T(32,128)(4,1)} parameter(0)
  %tiled = s8[4,8,16]{2,1,0:T(8,128)(4,1)} fusion(%b), kind=kLoop, calls=%retile
  %wide = bf16[4,8,16]{2,1,0} convert(%tiled)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = bf16[1,8,16]{2,1,0} dynamic-slice(%wide, %at, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%whole (c: s8[4,8,16]) -> bf16[4,8,16] {
  %c = s8[4,8,16]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %all = bf16[4,8,16]{2,1,0} convert(%c)
}

ENTRY %main (w: s8[4,8,16], index: s32[]) -> (bf16[1,8,16], bf16[4,8,16]) {
  %w = s8[4,8,16]{2,1,0:T(32,128)(4,1)} parameter(0)
  %index = s32[] parameter(1)
  %first = bf16[1,8,16]{2,1,0} fusion(%w, %index), kind=kLoop, calls=%one_layer
  %second = bf16[4,8,16]{2,1,0} fusion(%w), kind=kLoop, calls=%whole
  ROOT %both = (bf16[1,8,16]{2,1,0}, bf16[4,8,16]{2,1,0}) tuple(%first, %second)
}
"""


def test_of_a_weight_that_a_fusion_converts_and_slices_the_slice_is_read():
  module = hlo.parse(SLICED)
  main = module.computations["main"]
  moved = {
    name: traffic.bytes_moved(module, main, main[name])
    for name in ("first", "second")
  }
  layer, index = 8 * 16, 4
  assert moved["first"] == layer + index + 2 * layer
  assert moved["second"] == 4 * (layer + 2 * layer)
