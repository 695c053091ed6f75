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
        elif name in ("while", "cond"):
            raise NotImplementedError(f"how often a {name} runs is not in the jaxpr")
        else:
            repeats = equation.params["length"] if name == "scan" else 1
            for inner in jaxprs_in_params(equation.params):
                yield repeats * matmul_flops(inner)
