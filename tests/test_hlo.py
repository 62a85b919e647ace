"""Collectives are read from the text of a compiled program: kinds, sizes, groups, and as often as a loop turns."""

from msr_jax.plan.hlo import Collective, collectives, forms

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %g = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %g)
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[2,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %o = f32[8,16] get-tuple-element(%w), index=1
}
"""


def test_a_loop_s_collectives_count_every_turn_and_a_tuple_s_shapes_add_up():
    gather, reduce = collectives(TEXT, 8)
    assert gather == Collective("all-gather", ((8, 16),), 8 * 16 * 4, 4, 3)
    assert gather.sent_bytes == 3 * 512 * 3 / 4
    assert reduce == Collective("all-reduce", ((4,), (2, 2)), 4 * 4 + 4 * 2, 2, 1)
    assert reduce.sent_bytes == 24


def test_a_tpu_s_loop_turns_as_often_as_its_condition_says():
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert collectives(text, 8)[0].times == 1  # nothing says how often
    compared = "  %n.1 = s32[]{:T(128)} constant(5), metadata={a=1}\n  ROOT %lt = pred[]{:T(512)} compare(%i, %n.1), direction=LT"
    text = text.replace("  ROOT %lt = pred[] compare(%i, %n), direction=LT", compared)
    assert collectives(text, 8)[0].times == 5


def test_without_groups_all_devices_take_part():
    text = "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %r = f32[2]{0} all-reduce(%p), to_apply=%add\n}\n"
    assert collectives(text, 16)[0].group == 16


STARTED = """ENTRY %main (p: f32[2]) -> f32[2] {
  %ag = ((bf16[16,128]{0,1}, f32[4,128]{0,1}), (bf16[16,1024]{0,1}, f32[4,1024]{0,1})) all-gather-start(%a, %b), replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={1}
  %gemm = bf16[8,1024]{1,0} fusion(%x, %y), kind=kCustom, calls=%gemm_fusion_dot.9_computation
  %agd = (bf16[16,1024]{0,1}, f32[4,1024]{0,1}) all-gather-done(%ag)
  %one = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%c), replica_groups=[1,8]<=[8], dimensions={0}
  %oned = bf16[16,8]{1,0} all-gather-done(%one)
  %rs = ((bf16[16,1024]{0,1}), bf16[16,128]{0,1}) reduce-scatter-start(%gemm), replica_groups=mesh['x'=2,'y'=8] {'y':(2)4}, dimensions={1}, to_apply=%add
  %rsd = bf16[16,128]{0,1} reduce-scatter-done(%rs)
  %ar = (f32[2]{0}, f32[3]{0}) all-reduce-start(%d, %e), replica_groups=mesh['x'=2,'y'=8] {'x','y'}, to_apply=%add
  %ard = (f32[2]{0}, f32[3]{0}) all-reduce-done(%ar)
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  ROOT %cpd = f32[5]{0} collective-permute-done(%cp)
}
"""


def test_what_is_started_and_awaited_counts_once_with_its_results_alone():
    several, one, scatter, reduce, permute = collectives(STARTED, 16)
    assert several == Collective("all-gather", ((16, 1024), (4, 1024)), 2 * 16 * 1024 + 4 * 4 * 1024, 8, 1, hidden=True)
    assert one == Collective("all-gather", ((16, 8),), 256, 8, 1)
    assert scatter == Collective("reduce-scatter", ((16, 128),), 2 * 16 * 128, 4, 1)
    assert reduce == Collective("all-reduce", ((2,), (3,)), 20, 16, 1)
    assert permute == Collective("collective-permute", ((5,),), 20, 16, 1)


# As a TPU's compiler writes a gather beside a product, and a sum of which each device keeps its part.
TPU_TEXT = """%starts (p: bf16[16,128]) -> bf16[16,1024] {
  %g.1 = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={1}
  ROOT %c = (bf16[16,128]{1,0}, bf16[16,1024]{1,0}, s32[2]{0}, /*index=3*/u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.48 (p: bf16[16,128]) -> bf16[16,1024] {
  %g.2 = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={1}
  ROOT %t = (bf16[8,1024]{1,0}, bf16[16,1024]{1,0}) tuple(%convolution.21, %g.2)
}
%awaits (p: bf16[16,128]) -> bf16[16,1024] {
  %g.3 = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={1}
  ROOT %c = bf16[16,1024]{1,0} custom-call(%p, %g.3), custom_call_target="AsyncCollectiveDone"
}
%all-reduce-scatter.2 (a: bf16[16,1024], b: bf16[1024,16]) -> (bf16[16,128], bf16[128,16]) {
  %r = (bf16[16,1024]{1,0}, bf16[1024,16]{0,1}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %d1 = bf16[16,128]{1,0} dynamic-slice(%r1, %zero, %at), dynamic_slice_sizes={16,128}
  ROOT %t = (bf16[16,128]{1,0}, bf16[128,16]{0,1}) tuple(%d1, %d2)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %async-collective-start = (bf16[16,128]{1,0}, bf16[16,1024]{1,0}) fusion(%p), kind=kCustom, calls=%starts
  %f = (bf16[8,1024]{1,0}, bf16[16,1024]{1,0}) fusion(%async-collective-start), kind=kOutput, calls=%async_collective_fusion.48
  %async-collective-done = bf16[16,1024]{1,0} fusion(%f), kind=kCustom, calls=%awaits
  ROOT %s = (bf16[16,128]{1,0}, bf16[128,16]{0,1}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.2
}
"""


def test_a_tpu_s_transfer_in_several_fusions_counts_once_and_its_scattered_sum_is_a_reduce_scatter():
    gather, scatter = collectives(TPU_TEXT, 8)
    assert gather == Collective("all-gather", ((16, 1024),), 2 * 16 * 1024, 8, 1, hidden=True)
    assert scatter == Collective("reduce-scatter", ((16, 128), (128, 16)), 2 * 2 * 16 * 128, 8, 1)


def test_a_computation_that_is_started_by_a_call_counts_once():
    text = """%wrapped (p: f32[8]) -> f32[1] {
  ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[1] {
  %s = ((f32[8]{0}), f32[1]{0}) async-start(%p), calls=%wrapped
  ROOT %d = f32[1]{0} async-done(%s), calls=%wrapped
}
"""
    assert collectives(text, 8) == [Collective("reduce-scatter", ((1,),), 4, 8, 1)]


def test_forms_that_matter_are_counted():
    text = 'a = f32[] custom-call(), custom_call_target="__cudnn$fmhaSoftmax"\n b = f32[8]{0} fft(x)\n'
    assert forms(text) == {"fused attention (cuDNN)": 1, "transforms (FFT)": 1}
