"""POT's log-domain Sinkhorn, timed; POT comes with the extra `test`."""

import time

import numpy as np


def time_pot(
    source_MD: np.ndarray,
    target_ND: np.ndarray,
    *,
    epsilon: float,
    marginal_error: float,
    max_iterations: int,
) -> tuple[float, float]:
    """Solves the same problem as `solve_sinkhorn(..., relative=True)` in float64.

    Args:
        source_MD: Rows of A.
        target_ND: Rows of B.
        epsilon: Entropy, relative to the mean cost.
        marginal_error: POT stops when the 2-norm of the target marginal's error is below this.
        max_iterations: POT stops here all the same.

    Returns:
        (seconds, the marginal error that it reached).
    """
    import ot

    start = time.perf_counter()
    cost = np.asarray(ot.dist(np.float64(source_MD), np.float64(target_ND), metric="euclidean"))
    m, n = cost.shape
    _, log = ot.bregman.sinkhorn_log(
        np.full(m, 1 / m),
        np.full(n, 1 / n),
        cost,
        reg=epsilon * float(cost.mean()),
        numItermax=max_iterations,
        stopThr=marginal_error,
        log=True,
        warn=False,
    )
    return time.perf_counter() - start, float(log["err"][-1])
