"""What compiled programs cost, against counts by hand and those of the published models."""

import functools
import importlib
import math
import os
import pathlib
import re
import subprocess
import sys

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from gigatok_jax.model_config import model_config
from gigatok_jax.models import ar, parameters, tokenizer
from gigatok_jax.planning import flops, hlo, hlo_text, plan
from gigatok_jax.planning.hlo import Collective

ROOT = pathlib.Path(__file__).parents[1]
F32 = 4  # bytes


def on_eight_devices(*names) -> list[str]:
    """Texts of programs of `compiled`."""
    folder = tiny.session()
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": tiny.PYTHONPATH,
    }
    command = [sys.executable, "-m", "compiled", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / name).read_text() for name in names]


@functools.cache
def small_texts() -> dict[str, str]:
    names = [*compiled.BY_HAND, *compiled.PARTS]
    return dict(zip(names, on_eight_devices(*names), strict=True))


# Loops, branches, kinds. One execution sums f32[16 16] and multiplies it by another.

ONE, PRODUCT = 16 * 16 * F32, 2 * 16**3
TRIPS = {"in_loop": 5, "in_loops": 15, "counted": 14}


@pytest.mark.parametrize("name", TRIPS)
@pytest.mark.parametrize("noted", [True, False])  # by the compiler: TPUs' notes nothing
def test_what_a_loop_holds_counts_as_often_as_it_runs(name, noted):
    text = small_texts()[name]
    assert "known_trip_count" in text
    found = hlo.costs(text if noted else text.replace("known_trip_count", "nobody_knows"))
    n = TRIPS[name]
    assert found == hlo.Costs(n * PRODUCT, {"all-reduce": Collective(n * ONE, n)}, ())


def test_a_loop_without_a_trip_count_is_named_and_counts_once():
    found = hlo.costs(small_texts()["until"])
    assert found.collectives == {"all-reduce": Collective(ONE, 1)}
    (name,) = found.unknown_loops
    assert name.endswith("/while")


def test_the_larger_branch_of_a_conditional_counts():
    assert hlo.costs(small_texts()["either"]) == hlo.Costs(2 * PRODUCT, {}, ())


def test_every_kind_of_collective_is_found_with_its_bytes_and_devices():
    text = small_texts()["exchange"]
    moved = {one.kind: one for one in hlo.collectives(text)}
    bytes_of = {kind: one.bytes for kind, one in moved.items()}
    assert bytes_of == {
        "all-gather": 4 * ONE,  # what each device has afterwards
        "reduce-scatter": 4 * ONE,  # what each had before
        "all-to-all": ONE,
        "collective-permute": ONE,
    }
    assert {one.groups for one in moved.values() if one.group_size == 4} == {
        ((0, 1, 2, 3), (4, 5, 6, 7))
    }
    assert moved["collective-permute"].groups[:4] == ((0, 1), (1, 2), (2, 3), (3, 0))
    assert moved["all-gather"].op_name.endswith("all_gather")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups={}, to_apply=%add", ((0, 1, 2, 3),)),
        ("channel_id=1, to_apply=%add", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", ((0, 2), (1, 3))),
        ("replica_groups=mesh['d'=2,'f'=2] {'f'}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['d'=2,'f'=2] {'d'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['d'=2,'f'=2] {'d','f'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_groups_in_every_spelling(text, expected):
    assert hlo_text.groups(text, 4) == expected


# Forms of the compilers for TPUs and GPUs.

TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%scores (q: bf16[2,64,4,32], k: bf16[2,64,4,32]) -> f32[2,4,64,64] {
  %q = bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %k = bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution-base-dilated.21 = f32[2,4,64,64]{2,3,1,0:T(8,128)} convolution(%q, %k), \
window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf
}

%all-reduce-scatter.1 (g: bf16[64,32]) -> bf16[16,32] {
  %g = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.11 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%g), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.11, %zero, %zero), \
dynamic_slice_sizes={16,32}
}

%offloaded (g.3: bf16[64,32]) -> bf16[16,32] {
  %g.3 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.78 = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%g.3), kind=kCustom, \
calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/while/body/psum"}
}, execution_thread="sparsecore"

%body (carried: (s32[], bf16[2,64,4,32], bf16[64,32], s32[])) -> (s32[], bf16[2,64,4,32]) {
  %carried = (s32[]{:T(128)}, bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)S(1)}, \
bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %copy.16 = s32[]{:T(128)S(6)} copy(%i)
  %step = s32[]{:T(128)} get-tuple-element(%carried), index=3
  %add.58 = s32[]{:T(128)} add(%copy.16, %step)
  %x = bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)S(1)} get-tuple-element(%carried), index=1
  %g.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=2
  %convolution_fusion = f32[2,4,64,64]{2,3,1,0:T(8,128)} fusion(%x, %x), kind=kOutput, \
calls=%scores, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=12}
  %call-start = ((bf16[64,32]{1,0}), bf16[16,32]{1,0}, u32[]{:S(8)}) call-start(%g.1), \
async_execution_thread="sparsecore", to_apply=%offloaded
  %call-done = bf16[16,32]{1,0:T(8,128)(2,1)} call-done(%call-start)
  %collective-permute-start = (bf16[64,32]{1,0}, bf16[64,32]{1,0:S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%g.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = bf16[64,32]{1,0:S(1)} \
collective-permute-done(%collective-permute-start)
  ROOT %tuple.112 = (s32[]{:T(128)}, bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)S(1)}, \
bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) tuple(%add.58, %x, %g.1, %step)
}

%condition (carried.1: (s32[], bf16[2,64,4,32], bf16[64,32], s32[])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)S(1)}, \
bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %last = s32[]{:T(128)} constant(17)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carried.1), index=0
  ROOT %lt.20 = pred[]{:T(512)} compare(%i.1, %last), direction=LT
}

ENTRY %main (x.1: bf16[2,64,4,32], g.2: bf16[64,32]) -> bf16[2,64,4,32] {
  %x.1 = bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %g.2 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %first = s32[]{:T(128)} constant(3)
  %two = s32[]{:T(128)} constant(2)
  %tuple.119 = (s32[]{:T(128)}, bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)}, \
bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) tuple(%first, %x.1, %g.2, %two)
  %while.82 = (s32[]{:T(128)}, bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)}, \
bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) while(%tuple.119), \
condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %out = bf16[2,64,4,32]{3,1,2,0:T(8,128)(2,1)} get-tuple-element(%while.82), index=1
}
"""


def test_forms_of_the_tpu():
    """A batch of products as a dilated convolution, no noted trip counts, a fused scatter
    that another core does."""
    trips = 7  # 3, 5, ... 15
    scores = 2 * (2 * 4) * 64 * 64 * 32
    moved = {
        kind: Collective(trips * 64 * 32 * 2, trips)
        for kind in ("reduce-scatter", "collective-permute")
    }
    assert hlo.costs(TPU) == hlo.Costs(trips * scores, moved, ())
    names = {one.kind: one.op_name for one in hlo.collectives(TPU)}
    assert names == {
        "reduce-scatter": "jit(step)/while/body/psum",
        "collective-permute": "jit(step)/while",  # of what calls it
    }


SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=4

%began (p: bf16[16,8]) -> (bf16[16,8], bf16[16,32]) {
  %p = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.37 = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=14, \
replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="0"}, backend_config=\
{"flag_configs":[],"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %flags = (bf16[16,8]{1,0}, bf16[16,32]{1,0}) custom-call(%p, %all-gather.37), \
custom_call_target="AsyncCollectiveFusion"
}

%ended (p.1: bf16[16,8]) -> bf16[16,32] {
  %p.1 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.41 = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=14, \
replica_groups={{0,1,2,3}}, dimensions={1}, frontend_attributes={chain_id="0"}, backend_config=\
{"flag_configs":[],"async_collective_fusion_config":{"flag_start":"2","flag_end":"15"}}
}

ENTRY %main (x: bf16[16,8]) -> bf16[16,32] {
  %x = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %async-collective-start = (bf16[16,8]{1,0}, bf16[16,32]{1,0}) fusion(%x), kind=kCustom, \
calls=%began
  %after-all.6 = token[] after-all()
  %send.6 = (bf16[16,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%x, %after-all.6), \
channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.10_0",_xla_megascale_target=\
"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.6 = (bf16[16,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) recv(%after-all.6), \
channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type=\
"ALL_REDUCE"}
  %send-done.6 = token[] send-done(%send.6), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv-done.6 = (bf16[16,8]{1,0}, token[]) recv-done(%recv.6), channel_id=1
  %element = bf16[16,8]{1,0} get-tuple-element(%recv-done.6), index=0
  ROOT %async-collective-done = bf16[16,32]{1,0} fusion(%element), kind=kCustom, calls=%ended
}
"""


def test_forms_of_two_tpu_slices():
    """A gather in two fusions counts once; hosts carry the sum from slice to slice."""
    gathered, summed = hlo.collectives(SLICES)
    assert (gathered.kind, gathered.bytes, gathered.group_size) == ("all-gather", 16 * 32 * 2, 4)
    assert (summed.kind, summed.bytes) == ("all-reduce", 16 * 8 * 2)
    assert summed.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("topology", "slices"), [("v5p:2x2x2", 1), ("v5e:2x2", 2)])
def test_programs_of_the_tpu_compiler(topology, slices):
    """Six rematerialised layers on 2 x 4 devices, whose two matrices are divided over the four."""
    pytest.importorskip("libtpu")
    described = {"platform": "tpu", "topology_name": topology}
    described |= {"num_slices": slices} if slices > 1 else {}
    devices = np.array(topologies.get_topology_desc(**described).devices).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
    n, width, hidden, rows = 6, 2048, 8192, 2048  # rows of one device

    def given(shape, dtype, *axes):
        sharding = jax.sharding.NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    @jax.checkpoint
    def layer(x, weights):
        x = jax.lax.with_sharding_constraint(x, P(("data", "fsdp")))
        up, down = (w.astype(x.dtype) for w in weights)
        return x + jnp.tanh(x @ up) @ down, None

    def loss(weights, x):
        return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).sum()

    weights = (
        given((n, width, hidden), jnp.float32, None, "fsdp"),
        given((n, hidden, width), jnp.float32, None, None, "fsdp"),
    )
    x = given((8 * 8, rows // 8, width), jnp.bfloat16, ("data", "fsdp"))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=tuple(w.sharding for w in weights))
        found = hlo.costs(step.lower(weights, x).compile().as_text())
    matrix, moved = 2 * width * hidden, found.collectives  # bytes in bfloat16
    # Two products forward, one again, four backward.
    assert found.flops == 7 * n * 2 * rows * width * hidden
    assert moved["all-gather"] == Collective(2 * 2 * n * matrix, 4 * n)
    assert moved["reduce-scatter"].bytes == pytest.approx(2 * n * matrix, rel=0.05)  # padded
    assert moved["all-reduce"].bytes == pytest.approx(2 * n * matrix / 4, rel=0.01)
    assert not found.unknown_loops


GPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%wrapped (a: bf16[8,32]) -> bf16[8,32] {
  %a = bf16[8,32]{1,0} parameter(0)
  ROOT %all-to-all.1 = bf16[8,32]{1,0} all-to-all(%a), channel_id=4, replica_groups=[1,4]<=[4], \
dimensions={0}
}, execution_thread="parallel"

%graph (x.1: bf16[8,32]) -> bf16[32,32] {
  %x.1 = bf16[8,32]{1,0} parameter(0)
  %all-gather-start.1 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%x.1), channel_id=1, \
replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"is_sync":false}
  ROOT %all-gather-done.1 = bf16[32,32]{1,0} all-gather-done(%all-gather-start.1)
}

ENTRY %main (x: bf16[8,32], y: bf16[8,32], q: bf16[2,64,4,32], i: bf16[2,16,16,8]) -> bf16[8,32] {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[8,32]{1,0} parameter(1)
  %call = bf16[32,32]{1,0} call(%x), to_apply=%graph
  %all-reduce-start = (bf16[8,32]{1,0}, bf16[8,32]{1,0}) all-reduce-start(%x, %y), channel_id=2, \
replica_groups=[2,2]<=[4], to_apply=%add
  %all-reduce-done = (bf16[8,32]{1,0}, bf16[8,32]{1,0}) all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((bf16[32,32]{1,0}), bf16[8,32]{1,0}) reduce-scatter-start(%call), \
channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %reduce-scatter-done = bf16[8,32]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-to-all-start = ((bf16[8,32]{1,0}), bf16[8,32]{1,0}) async-start(%y), \
async_execution_thread="parallel", calls=%wrapped
  %all-to-all-done = bf16[8,32]{1,0} async-done(%all-to-all-start), calls=%wrapped
  %cublas-gemm.1 = (bf16[8,32]{1,0}, s8[4194304]{0}) custom-call(%x, %call), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %q = bf16[2,64,4,32]{3,2,1,0} parameter(2)
  %attention = (bf16[2,4,64,32]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":\
{"fmha_scale":1,"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","64",\
"64"],"tuple_shapes":[]}}}
  %i = bf16[2,16,16,8]{3,2,1,0} parameter(3)
  %w = bf16[24,3,3,8]{3,2,1,0} constant({...})
  %conv = (bf16[2,8,8,24]{3,2,1,0}, u8[0]{0}) custom-call(%i, %w), \
window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", backend_config={"conv_result_scale":1}
  %made = bf16[2,8,8,24]{3,2,1,0} get-tuple-element(%conv), index=0
  %to_input = (bf16[2,16,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%made, %w), \
window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %to_kernel = (bf16[24,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%i, %made), \
window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  ROOT %out = bf16[8,32]{1,0} get-tuple-element(%cublas-gemm.1), index=0
}
"""


def test_forms_of_the_gpu():
    """Asynchronous pairs, wrapped or not, graphs of commands, calls of cuBLAS and cuDNN."""
    one = 8 * 32 * 2
    product, attention = 2 * 8 * 32 * 32, 2 * 2 * (2 * 4) * 64 * 64 * 32
    convolution = 2 * (2 * 8 * 8 * 24) * 9 * 8
    assert hlo.costs(GPU) == hlo.Costs(
        product + attention + 3 * convolution,
        {
            "all-gather": Collective(4 * one, 1),
            "all-reduce": Collective(2 * one, 1),
            "reduce-scatter": Collective(4 * one, 1),
            "all-to-all": Collective(one, 1),
        },
        (),
    )


def test_a_text_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.costs("module @jit_f {}")


# FLOPs of one device.


def counts(function, *shapes):
    """FLOPs of a function as compiled and as traced."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return hlo.costs(text).flops, flops.of_jaxpr(jax.make_jaxpr(function)(*shapes))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [(3, 1, 1, 1, 1), (3, 2, (0, 1), 1, 1), (4, 2, 1, 1, 1), (1, 1, 0, 1, 1), (3, 1, 2, 2, 1),
     (3, 1, 1, 1, 4), (8, 8, 0, 1, 1), (3, 1, 0, 1, 1)],
)  # fmt: skip
def test_a_convolution_and_its_gradients_cost_outputs_x_taps_x_features(
    kernel, stride, padding, dilation, groups
):
    padding = padding if isinstance(padding, tuple) else (padding, padding)
    images, weights = (2, 16, 16, 8), (kernel, kernel, 8 // groups, 12)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=(padding, padding),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    out = jax.eval_shape(convolve, jnp.zeros(images), jnp.zeros(weights)).shape
    forward = 2 * math.prod(out) * kernel * kernel * 8 // groups
    assert counts(convolve, images, weights) == (forward, forward)

    def everything(x, w, cotangent):
        made, backward = jax.vjp(convolve, x, w)
        return made, backward(cotangent)

    assert counts(everything, images, weights, out) == (3 * forward, 3 * forward)


def test_products_cost_2_per_multiply_add():
    product = functools.partial(jnp.einsum, "bnhd,bmhd->bhnm")
    assert counts(product, (2, 6, 4, 8), (2, 10, 4, 8)) == (2 * 2 * 4 * 6 * 10 * 8,) * 2


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ((16, 3, 16, 1, 1), 48),  # forward, padded
        ((8, 3, 16, 1, 2, 2), 24),  # gradient to the input of a stride of 2
        ((16, 8, 3, 1, 0, 1, 2), 24),  # gradient to its kernel
        ((4, 4, 4, 3, 0, 4), 4),  # a batch of 4 products: one input each
        ((1, 16, 16, 1, 15), 16),  # an outer product: padding but for one input
        ((8, 8, 1, 1, 0), 8),  # a sum over 8
    ],
)
def test_meetings_along_an_axis(axis, expected):
    assert flops.meetings(*axis) == expected


def test_traced_loops_branches_and_recomputation():
    w = jnp.zeros((16, 16))

    def step(x, _):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x), None

    def loss(x):
        return jax.lax.scan(jax.checkpoint(step), x, None, length=5)[0].sum()

    assert flops.of_jaxpr(jax.make_jaxpr(loss)(w)) == 5 * 2 * PRODUCT
    # Twice forward, but for the last product's value, which no gradient needs; once backward.
    assert flops.of_jaxpr(jax.make_jaxpr(jax.grad(loss))(w)) <= 5 * 6 * PRODUCT


def test_fused_attention_counts_when_traced(monkeypatch):
    """As on an H200: cuDNN is only asked for when the program is compiled."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    query, key = (jax.ShapeDtypeStruct((2, n, 4, 32), jnp.bfloat16) for n in (64, 16))

    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").sum()

    product = 2 * (2 * 4) * 64 * 16 * 32
    assert flops.of_jaxpr(jax.make_jaxpr(loss)(query, key, key)) == 2 * product
    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert flops.of_jaxpr(jax.make_jaxpr(both)(query, key, key)) == (2 + 5) * product


def test_a_traced_program_counts_all_devices():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    spread = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    assert flops.of_jaxpr(jax.make_jaxpr(spread)(x)) == 8 * 2 * 8 * 8 * 16


# The published models: GFLOPs of one image in performance.md, rounded there.

TOKENIZERS = {"S-S": (151, 265), "S-B": (151, 314), "B-L": (200, 470), "XL-XXL": (645, 1218)}
PRIORS = {"prior-B": 52.3, "prior-L": 172.9, "prior-XL": 397.3, "prior-XXL": 728.0}
STEPS = {"ss": 1477, "bl": 2265, "xlxxl": 5887}
ROUNDED = 3e-3


def traced(module, params, *shapes, **options) -> float:
    """GFLOPs of a forward pass."""
    apply = lambda params, *x: module.apply({"params": params}, *x, **options)  # noqa: E731
    return flops.of_jaxpr(jax.make_jaxpr(apply)(params, *shapes)) / 1e9


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_cost_what_was_counted_on_the_original(name):
    model = model_config(name, align_block=0)  # only training needs the alignment MLP
    module, params = tokenizer.make(model), parameters.abstract_params(model)
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    encode = traced(module, params, images, method="encode")
    decode = traced(module, params, codes, method="decode_codes")
    np.testing.assert_allclose((encode, decode), TOKENIZERS[name], rtol=ROUNDED)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_cost_what_was_counted(name):
    model = model_config(name)
    shapes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, 256)))
    made = traced(ar.make(model), parameters.abstract_params(model), *shapes)
    np.testing.assert_allclose(made, PRIORS[name], rtol=ROUNDED)


def traced_step(config) -> float:
    """GFLOPs of one image in a training step."""
    mesh = compiled.make_mesh("1x1x1")
    program = plan.program_of(config, mesh)
    with jax.set_mesh(mesh):
        step = program.make_step(1).trace(
            program.abstract, program.batch, program.frozen, *program.phase
        )
    return flops.of_jaxpr(step.jaxpr) / config.train.global_batch / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_training_steps_cost_what_was_counted(name):
    """Encoder, decoder and alignment three times, LPIPS, teacher and discriminator."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.train.update(global_batch=2, remat="none")
    np.testing.assert_allclose(traced_step(config), STEPS[name], rtol=ROUNDED)


# What a mesh moves.

SMALL = 65536  # elements: codes and their history may be gathered


def layer_shapes(params) -> set[tuple[int, ...]]:
    """Of every parameter; of a stack's layers, one."""
    shapes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stacked = re.search(r"'blocks(_to_tap)?'", jax.tree_util.keystr(path))
        shapes.add(_squeezed(leaf.shape[1:] if stacked else leaf.shape))
    return shapes


def _squeezed(dims):
    return tuple(n for n in dims if n > 1)


def check_moves_only_layers(text, params) -> None:
    """Devices gather parameters, one layer at a time, and never tokens or images."""
    allowed, gathered = layer_shapes(params), []
    for one in hlo.collectives(text):
        for shape in one.shapes if one.kind not in ("all-reduce", "reduce-scatter") else ():
            gathered.append(shape)
            known = one.kind == "all-gather" and _squeezed(shape.dims) in allowed
            assert known or shape.elements <= SMALL, f"{one.kind} {shape} of {one.op_name}"
    assert any(shape.elements > SMALL for shape in gathered)  # the state is divided at all


@pytest.mark.parametrize("name", compiled.PARTS)
def test_no_part_gathers_images(name):
    check_moves_only_layers(small_texts()[name], compiled.parameters(name))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["2x4x1", "1x8x1"])
def test_xlxxl_gathers_one_layer_at_a_time_and_no_tokens(sizes):
    """The published training step with all its losses, compiled but not run."""
    config = compiled.step_config()
    (text,) = on_eight_devices(sizes)
    check_moves_only_layers(text, parameters.abstract_params(config.model))
    found = hlo.costs(text)
    assert not found.unknown_loops
    # The devices share the work, and none does another's.
    np.testing.assert_allclose(found.flops * 8 / 16 / 1e9, traced_step(config), rtol=ROUNDED)
