"""What a traced function computes, read from its jaxpr."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def scans(jaxpr: Any) -> list[Any]:
    """Every scan of a jaxpr, in order, those within calls included, those within scans not."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation)
        else:
            for inner in jaxprs_in_params(equation.params):
                found += scans(inner)
    return found


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products, each scan as often as it runs."""
    return sum(_flops(jaxpr))


def _flops(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            products = math.prod(left[axis] for axis in contracted)
            yield 2 * products * math.prod(equation.outvars[0].aval.shape)
        elif name == "ragged_dot_general":
            yield _ragged_flops(equation)
        elif name == "cond" and equation.params.get("branches_platforms"):
            # One of them is lowered: the last is that of any platform without one of its own.
            assert equation.params["branches_platforms"][-1] is None
            yield matmul_flops(equation.params["branches"][-1].jaxpr)
        elif name in ("while", "cond"):
            raise NotImplementedError(f"how often a {name} runs is not in the jaxpr")
        else:
            repeats = equation.params["length"] if name == "scan" else 1
            for inner in jaxprs_in_params(equation.params):
                yield repeats * matmul_flops(inner)


def _ragged_flops(equation: Any) -> int:
    """Those of a grouped product whose groups have all of the rows, each in one of them."""
    rows, width = equation.invars[0].aval.shape
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    # With a kernel for each group every row is multiplied once; so is it in the kernels' gradient.
    other = equation.outvars[0].aval.shape[-1]
    assert len(dimensions.lhs_ragged_dimensions) == 1
    return 2 * rows * width * other
