"""Plans for hardware that is not there: topologies, shapes, what is printed; no compiler needed."""

import json
import runpy
import types

import jax
import jax.numpy as jnp
import pytest
from test_main import ROOT, run_main

from gigatok_jax import parallel
from gigatok_jax.benchmarks import plan as table
from gigatok_jax.errors import ConfigError
from gigatok_jax.models import parameters
from gigatok_jax.ops import implementation
from gigatok_jax.planning import compiled, hardware, hlo, plan, report, shapes
from gigatok_jax.train import program as program_lib

MIB = 2**20


def get(name, arg=None, **mesh):
    config = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](arg)
    config.mesh.update(mesh)
    return config


# Topologies.


@pytest.mark.parametrize(
    ("text", "slices", "devices", "neighbours"),
    [
        ("v5p:4x4x4", 1, 64, 64),
        ("v5e:16x16", 2, 512, 256),
        ("v6e:1x1", 1, 1, 1),
        ("h200x64", 1, 64, 8),
        ("h100x1", 1, 1, 8),
    ],
)
def test_a_topology_is_so_many_devices(text, slices, devices, neighbours):
    topology = hardware.parse(text, slices)
    assert (topology.devices, topology.neighbours) == (devices, neighbours)
    assert str(topology).endswith(text)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5q:4x4x4", 1, r"did you mean 'v5p:4x4x\d' or 'v5p:4x4x\d'\?"),
        ("h200:8", 1, "did you mean 'h200x8'"),
        ("v5px64", 1, "expected a TPU slice like 'v5p:4x4x4' or GPUs like 'h200x64'"),
        ("v5p:3x3x3", 1, "v5p has no slice 3x3x3, expected one of 2x2x1, 2x2x2"),
        ("h200x12", 1, "h200x12: expected 1 to 8 GPUs, or whole hosts of 8"),
        ("v5e:4x4", 0, "mesh.dcn is 0, expected the number of slices"),
        ("h200x16", 2, "mesh.dcn is 2, expected 1: only TPUs have slices"),
    ],
)
def test_a_topology_that_there_is_not_is_refused(text, slices, message):
    with pytest.raises(ConfigError, match=message) as refused:
        hardware.parse(text, slices)
    assert "\n" not in str(refused.value)


def test_a_run_does_not_start_on_a_topology():
    config = get("ss", "topology=v5p:4x4x4")
    assert config.mesh.topology == "v5p:4x4x4"
    with pytest.raises(ConfigError, match=r"'v5p:4x4x4', to plan for: add --dry_run"):
        parallel.make_mesh(config.mesh)


class Chip:
    """As much of a device as a mesh asks for."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number, slices):
        self.id, self.slice_index = number, number * slices // 8
        self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0


def test_data_is_divided_over_slices_first():
    config = get("ss", data=-1, fsdp=2, dcn=2).mesh
    mesh = parallel.make_mesh(config, [Chip(i, 2) for i in range(8)])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = [[chip.slice_index for chip in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    "data, message", [(1, "divisor of mesh.data, which is 1"), (4, "1 slices")]
)
def test_slices_that_are_not_there_are_refused(data, message):
    config = get("ss", data=data, fsdp=-1, dcn=2).mesh
    with pytest.raises(ConfigError, match=rf"mesh.dcn is 2, .*{message}"):
        parallel.make_mesh(config, [Chip(i, 1) for i in range(8)])


# What is traced for other devices.


@pytest.mark.parametrize(
    "platform, kind, impl", [("tpu", "TPU v5", "pallas_tpu"), ("gpu", "H200", "pallas_gpu")]
)
def test_a_mesh_to_compile_for_decides_which_kernels_are_taken(platform, kind, impl):
    device = jax.sharding.AbstractDevice(kind, None, platform)
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh(
        (4, 1, 1), parallel.AXES, axis_types=types, abstract_device=device
    )
    assert implementation.choose("search", 8, range(1, 9)) == "xla"
    with jax.sharding.use_abstract_mesh(mesh):
        assert implementation.platform() == platform
        assert implementation.choose("search", 8, range(1, 9)) == impl
    assert implementation.platform() == "cpu"


# Memory of traced programs.


def peak(function, *sizes):
    arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    return shapes.peak(jax.make_jaxpr(function)(*arguments)) / MIB


SQUARE = (512, 512)  # a MiB


def test_an_array_lives_until_it_is_last_needed():
    assert peak(lambda x: x @ x, SQUARE) == 1
    assert peak(lambda x: (x @ x) @ x, SQUARE) == 2
    assert peak(lambda x: ((x @ x) @ x) @ x, SQUARE) == 2  # the first has gone
    assert peak(lambda x, y: (x @ x) @ (y @ y), SQUARE, SQUARE) == 3


def test_what_is_cheap_to_make_again_is_not_kept():
    assert peak(lambda x: jnp.tanh(x.astype(jnp.bfloat16)).astype(jnp.float32) @ x, SQUARE) == 1
    assert peak(lambda x: jax.nn.silu(x @ x) @ x, SQUARE) == 2


def test_a_gradient_keeps_what_it_needs_of_every_layer():
    def loss(layers, x, remat):
        step = lambda x, w: (jnp.tanh(x @ w) @ w, None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, layers)[0].sum()

    def grads(remat):
        return peak(jax.grad(lambda w, x: loss(w, x, remat)), (16, 64, 64), (4096, 64))

    # Of each of 16 layers: its input, and without rematerialisation what tanh takes or gives.
    assert 16 <= grads(remat=True) <= 22
    assert 32 <= grads(remat=False) <= 52


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_unrolled_loop_counts_as_its_turns_written_out(remat, reverse):
    def step(x, w):
        y = jnp.tanh(x @ w) @ w
        return y, jnp.cos(y @ w)

    step, turns = jax.checkpoint(step) if remat else step, 6

    def written(x, layers):
        made = []
        for w in layers[::-1] if reverse else layers:
            x, y = step(x, w)
            made.append(y)
        return x.sum() + sum(y.sum() for y in made)

    def looped(x, layers, unroll):
        x, made = jax.lax.scan(step, x, layers, unroll=unroll, reverse=reverse)
        return x.sum() + made.sum()

    x, layers = jnp.zeros((512, 64)), jnp.zeros((turns, 64, 64))

    def counted(loss, layers):
        return shapes.peak(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, layers))

    expected = counted(written, list(layers))
    unrolled = counted(lambda *given: looped(*given, unroll=turns), layers)
    assert unrolled == pytest.approx(expected, rel=0.02)
    assert counted(lambda *given: looped(*given, unroll=1), layers) > 1.2 * expected


@pytest.mark.slow
def test_what_a_cpu_needs_is_near_what_is_counted():
    config = get("ar", "smoke")
    config.model.update(layers=4, width=128)
    config.train.global_batch = 64
    program = plan.program_of(config, parallel.make_mesh(config.mesh))
    needed = program_lib.memory_of(program.lower().compile())["temporaries"]
    traced = shapes.trace(config, "cpu")
    counted = traced.activations * 64 + 4 * parameters.count(program.abstract.params)
    assert 0.5 < counted / needed < 2


# Plans.


@pytest.fixture(scope="module")
def xlxxl():
    """Its state in full; FLOPs and activations need a trace of seconds."""
    config = get("xlxxl", data=1, fsdp=-1)
    program = plan.program_of(config, shapes.abstract_mesh(dict.fromkeys(parallel.AXES, 1)))
    return config, shapes.Traced(program.abstract, program.frozen, flops=7e12, activations=1e9)


def test_a_state_is_divided_over_the_devices(xlxxl):
    config, traced = xlxxl
    judge = sum(leaf.size for leaf in jax.tree.leaves(traced.state.discriminator))
    whole = 4 * (4 * 2_893_970_443 + 3 * judge)  # parameters, average, moments; of judge no average
    alone = shapes.analyse(get("xlxxl"), traced, hardware.parse("h200x1"))
    assert alone.memory["state"] == pytest.approx(whole, rel=1e-4)
    assert alone.memory["gradients"] == pytest.approx(8 * (2_893_970_443 + judge), rel=1e-4)
    shared = shapes.analyse(config, traced, hardware.parse("v5p:4x4x4"))
    assert whole / 64 < shared.memory["state"] < whole / 64 + 250 * MIB  # small arrays are whole
    assert shared.memory["activations"] == 4e9 and shared.flops == 7e12 * 4
    assert (alone.micro_batches, shared.micro_batches) == (8, 1)
    assert alone.fits and shared.fits


def test_gradients_and_parameters_travel(xlxxl):
    config, traced = xlxxl
    size = 2 * 2_893_970_443  # bfloat16
    fsdp = shapes.analyse(config, traced, hardware.parse("v5p:4x4x4"))
    sent = {one.kind: one for one in fsdp.traffic}
    assert sent["all-gather"].bytes == pytest.approx(3 * size, rel=0.02)  # again for remat
    assert sent["reduce-scatter"].bytes == pytest.approx(size, rel=0.02)
    data = shapes.analyse(get("xlxxl", dcn=2), traced, hardware.parse("v5p:4x4x4", 2))
    (sums,) = data.traffic
    assert sums.kind == "all-reduce" and (sums.near, sums.far) == (64, 2)
    assert sums.bytes == pytest.approx(size, rel=0.01)


def test_groups_of_gpus_reach_over_hosts():
    shape = {"data": 4, "fsdp": 4, "tensor": 4}
    groups = shapes._groups(shape, neighbours=8)
    assert groups == {"tensor": (4, 1), "fsdp": (2, 2), "data": (1, 4), "data+fsdp": (2, 8)}


def test_seconds_of_collectives():
    chip = hardware.CHIPS["v5e"]
    sums = plan.Traffic("all-reduce", 10**9, near=4, far=2)
    near, far = 2 * 1e9 * 3 / 4 / chip.link, 2 * 1e9 / 4 * 1 / 2 / chip.network
    assert plan._seconds(sums, chip) == pytest.approx(near + far)
    assert plan._seconds(sums._replace(kind="all-gather"), chip) == pytest.approx((near + far) / 2)


# As the TPU's compiler writes a sum over two slices, of what was summed within each.
SLICES = """HloModule two, num_partitions=4

ENTRY %main (input: f32[256,2048]) -> f32[256,2048] {
  %input = f32[256,2048]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[256,2048]{1,0}, u32[], token[]) send(%input, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[256,2048]{1,0}, u32[], token[]) recv(%after-all), channel_id=1
  %recv-done = (f32[256,2048]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %result = f32[256,2048]{1,0} get-tuple-element(%recv-done), index=0
}
"""


def test_what_slices_send_each_other_is_counted():
    (sent,) = compiled._traffic(hlo.walk(SLICES).transfers, neighbours=4)
    assert sent == plan.Traffic("all-reduce", 256 * 2048 * 4, near=1, far=2)
    chip = hardware.CHIPS["v5e"]
    assert plan._seconds(sent, chip) == pytest.approx(sent.bytes / chip.network)


class Refusing:
    """A program that some compilers have no memory for."""

    def __init__(self, needed, text):
        self.needed, self.text = needed, text

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.text} {self.needed}")


@pytest.mark.parametrize(
    "told",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
        "memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G). HLO module",
    ],
)
def test_a_program_that_a_compiler_refuses_is_measured_by_what_it_says(told):
    mesh = parallel.make_mesh(get("ss").mesh)
    memory, text = compiled._compile(Refusing("", told), mesh)
    assert list(memory.values()) == [int(20.5 * 2**30)] and text is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        compiled._compile(Refusing("", "another reason"), mesh)


def test_micro_batches_follow_from_one_compilation(monkeypatch):
    tried = []

    def compiles(parts, mesh):
        tried.append(parts)
        return {"arguments": 2 * 2**30, "temporaries": 64 * 2**30 // parts}, "text"

    program = types.SimpleNamespace(abstract={}, frozen={}, lower=lambda parts: parts)
    monkeypatch.setattr(plan, "program_of", lambda *_: program)
    monkeypatch.setattr(compiled, "_compile", compiles)
    mesh, config = shapes.abstract_mesh({"data": 4, "fsdp": 1, "tensor": 1}), get("ss")
    assert compiled._fitted(config, mesh, 15 * 2**30, "ss")[0] == 8
    assert tried == [1, 8]
    assert compiled._fitted(config, mesh, 2**30, "ss")[0] == 32  # one image at a time does not fit


def test_a_plan_that_does_not_fit_says_so(xlxxl):
    _, traced = xlxxl
    made = shapes.analyse(get("xlxxl"), traced, hardware.parse("v5e:4x4"))
    assert not made.fits and made.micro_batches == 16  # one image at a time
    lines = report.lines(made)
    assert all(line.startswith("shape analysis for v5e:4x4: ") for line in lines)
    assert "of 15.75 GiB per device" in lines[0] and "does not fit" in lines[0]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 3}, "does not cover 1024 devices"),
        ({"data": 1, "tensor": 1024}, "which mesh.tensor=1024 does not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_a_topology_is_refused(xlxxl, mesh, message):
    _, traced = xlxxl
    with pytest.raises(ConfigError, match=message):
        shapes.analyse(get("xlxxl", **mesh), traced, hardware.parse("v5p:8x8x16"))


# Tables.


def test_a_table_names_the_smallest_slice_that_fits(xlxxl):
    config, traced = xlxxl
    traced = {"tpu": traced, "gpu": traced}
    on = {chip: table.first_fit(config, traced, chip) for chip in ("v5e", "v5p", "h100")}
    assert {chip: made.where for chip, made in on.items()} == {
        "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "h100": "h100x2",
    }  # fmt: skip
    assert on["v5p"].mesh["fsdp"] == 1 < on["v5e"].mesh["fsdp"]  # divided where it has to be
    two = table.best(config, traced, table.parse("2*v5e:16x16"))
    assert (two.where, two.batch) == ("2 slices of v5e:16x16", 512)
    assert "shape analysis" in table.row(two) and json.dumps(table.values(two))
    text = table.smallest_table({"xlxxl": on | {"v6e": None}})
    assert "| v5e:2x4 (" in text and text.endswith("| - |")


@pytest.mark.parametrize("text", ["x*v5e:4x4", "v5e*2"])
def test_a_table_of_unknown_slices_is_refused(text):
    with pytest.raises(ConfigError, match="topology"):
        table.parse(text)


def test_what_moved_is_named():
    before = {
        "temporaries bytes": 10**9,
        "flops": 10**12,
        "all-gather bytes": 10**8,
        "tiny bytes": 5,
    }
    now = before | {"temporaries bytes": 1.03e9, "flops": 1.01e12, "tiny bytes": 50}
    del now["all-gather bytes"]
    lines = table.moved(before, {name: int(size) for name, size in now.items()})
    assert lines == [
        "all-gather bytes: 100,000,000 to 0 (-100.0%)",
        "temporaries bytes: 1,000,000,000 to 1,030,000,000 (+3.0%)",
    ]


# The command.


def test_a_dry_run_plans_for_hardware_that_is_not_there():
    result = run_main("--config=configs/ar.py:size=b,smoke,topology=h200x4", "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "mesh: data=4, fsdp=1, tensor=1, on h200x4" in result.stdout
    assert "shape analysis for h200x4: " in result.stdout and "images/s" in result.stdout
    here = hardware.compiler(hardware.parse("h200x4")) is not None
    assert ("compiled for" in result.stdout) == ("compiled for h200x4: " in result.stdout) == here
    assert ("no GPU compiler is here: pip install jax-cuda13-plugin==" in result.stdout) != here


def test_a_dry_run_compiles_a_small_step_for_this_machine(capsys):
    report.show(get("ar", "size=b,smoke"))
    text = capsys.readouterr().out
    assert "shape analysis for cpux1: " in text and "compiled for cpux1: " in text
