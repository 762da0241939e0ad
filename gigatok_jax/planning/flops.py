"""Counts FLOPs of matrix products and convolutions, in HLO instructions and in traced programs."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core

from gigatok_jax.planning.hlo_text import Computation, Instruction


def _dot(computation: Computation, op: Instruction) -> int:
    left, _ = computation.operand_shapes(op)
    contracted = math.prod(left.dims[i] for i in op.numbers("lhs_contracting_dims"))
    return 2 * op.shapes[0].elements * contracted


def _convolution(computation: Computation, op: Instruction) -> int:
    left, kernel = computation.operand_shapes(op)
    inputs, taps, outputs = (
        dict(zip(labels, shape.dims, strict=True))
        for labels, shape in zip(_labels(op), (left, kernel, op.shapes[0]), strict=True)
    )
    window = _window(op.rest)
    total = 2 * outputs["b"] * outputs["f"] * taps["i"]
    for i, axis in enumerate(window):
        total *= meetings(inputs[str(i)], taps[str(i)], outputs[str(i)], **axis)
    return total


def meetings(
    inputs: int,
    taps: int,
    outputs: int,
    stride: int = 1,
    low: int = 0,
    input_dilation: int = 1,
    tap_dilation: int = 1,
) -> int:
    """Counts the multiplications along one axis of a convolution.

    Taps in the padding count; taps in holes between dilated inputs do not. The number is at most
    inputs x taps and inputs x outputs: compilers write batches of matrix products as convolutions
    whose windows are mostly padding.

    Args:
        inputs: elements of the input along the axis.
        taps: elements of the kernel along the axis.
        outputs: elements of the output along the axis.
        stride: distance of two windows.
        low: padding before the first input.
        input_dilation: distance of two inputs.
        tap_dilation: distance of two taps.
    """
    positions = np.arange(outputs)[:, None] * stride + np.arange(taps) * tap_dilation - low
    count = int(np.count_nonzero(positions % input_dilation == 0))
    return min(count, inputs * taps, inputs * outputs)


def _labels(op: Instruction) -> tuple[str, str, str]:
    """Returns the axes of a convolution's input, kernel and output, e.g. b01f, 01io and b01f."""
    return re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()


def _window(rest: str) -> list[dict[str, int]]:
    """Reads a convolution's window; returns the keyword arguments of `meetings` for each axis."""
    match = re.search(r"window=\{(.*?)\}", rest)
    fields = dict(field.split("=") for field in match[1].split()) if match else {}
    names = {"stride": "stride", "lhs_dilate": "input_dilation", "rhs_dilate": "tap_dilation"}
    axes = [{} for _ in fields["size"].split("x")] if fields else []
    for field, name in names.items():
        for axis, n in zip(axes, fields.get(field, "").split("x"), strict=False):
            axis |= {name: int(n)} if n else {}
    for axis, n in zip(axes, fields.get("pad", "").split("x"), strict=False):
        axis |= {"low": int(n.split("_")[0])} if n else {}
    return axes


def _library(computation: Computation, op: Instruction) -> int:
    """Counts the FLOPs of a call of cuBLAS or cuDNN; returns 0 for other custom calls."""
    target = re.search(r'custom_call_target="([^"]*)"', op.rest)[1]
    shapes = computation.operand_shapes(op)
    if target.startswith("__cublas$"):
        contracted = _configured(op, "lhs_contracting_dimensions")
        return 2 * op.shapes[0].elements * math.prod(shapes[0].dims[i] for i in contracted)
    if target.startswith("__cudnn$fmha"):
        scores = math.prod(_configured(op, r"intermediate_tensor_shape.*?dimensions"))
        products = (
            5 if target.endswith("Backward") else 2
        )  # the backward pass recomputes the scores
        return 2 * products * scores * shapes[0].dims[-1]
    if target.startswith("__cudnn$conv"):
        # Labels are the forward pass's; here one of its three arrays is the result.
        roles = {"Input": (shapes[1:2], shapes[:1]), "Filter": (op.shapes, shapes[1:])}
        kernel, output = roles.get(target.rpartition("Backward")[2], (shapes[1:], op.shapes))
        features = kernel[0].dims[_labels(op)[1].index("o")]
        return 2 * output[0].elements * kernel[0].elements // features
    return 0


def _configured(op: Instruction, name: str) -> list[int]:
    """Returns the list of numbers under a name in the JSON of a library call."""
    match = re.search(rf'"{name}":\s*\[([^\]]*)\]', op.rest)
    return [int(n) for n in re.findall(r"\d+", match[1])]


OPCODES = {"dot": _dot, "convolution": _convolution, "custom-call": _library}


# Before compilation.


def of_jaxpr(jaxpr: Any) -> int:
    """Counts the FLOPs of a traced program over all devices, with the formulas of `hlo.costs`.

    No compiler is needed, and products inside kernels and custom calls count. Recomputation counts;
    a conditional counts as its largest branch; a loop without a constant length counts once.

    Args:
        jaxpr: from `jax.make_jaxpr(function)(*shapes)`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        dims = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(dims[i] for i in contracted)
    if name == "conv_general_dilated":
        return _traced_convolution(equation)
    if name.startswith("dot_product_attention"):  # cuDNN's; the backward pass recomputes the scores
        query, key = (
            variable.aval.shape for variable in equation.invars[:2]
        )  # [b n h d], [b m h d]
        return 2 * (5 if "bwd" in name else 2) * math.prod(query) * key[1]
    inside = [of_jaxpr(program) for program in _programs(equation.params)]
    if name == "cond":
        return max(inside)
    return _repeats(equation) * sum(inside)


def _repeats(equation) -> int:
    params = equation.params
    if equation.primitive.name == "scan":
        return params["length"]
    if equation.primitive.name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if equation.primitive.name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _programs(params: dict) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    """Yields the jaxprs among the parameters of a traced equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                yield item


def _traced_convolution(equation) -> int:
    params, names = equation.params, equation.params["dimension_numbers"]
    inputs, kernel = (variable.aval.shape for variable in equation.invars)
    outputs = equation.outvars[0].aval.shape
    total = 2 * outputs[names.out_spec[0]] * outputs[names.out_spec[1]]
    total *= kernel[names.rhs_spec[1]]
    axes = zip(names.lhs_spec[2:], names.rhs_spec[2:], names.out_spec[2:], strict=True)
    for i, (a, b, c) in enumerate(axes):
        total *= meetings(
            inputs[a], kernel[b], outputs[c], params["window_strides"][i], params["padding"][i][0],
            params["lhs_dilation"][i], params["rhs_dilation"][i],
        )  # fmt: skip
    return total
