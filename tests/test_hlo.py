"""Collectives are read from the text of a compiled program: kinds, sizes, groups, and as often as a loop turns."""

from msr_jax.plan.hlo import Collective, collectives

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


def test_without_groups_all_devices_take_part():
    text = "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %r = f32[2]{0} all-reduce(%p), to_apply=%add\n}\n"
    assert collectives(text, 16)[0].group == 16
