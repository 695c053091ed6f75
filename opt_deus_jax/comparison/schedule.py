"""Which run is next, for as many processes as work on a comparison."""

import time
from typing import Any

from opt_deus_jax.checkpoints.lock import claimed
from opt_deus_jax.comparison.running import (
    Setting,
    claim_of,
    finished_result,
    make_result,
    refuse_other_exports,
)
from opt_deus_jax.comparison.runs import Run, starting_rate
from opt_deus_jax.comparison.sweep import best_exponent, next_exponent
from opt_deus_jax.config import Comparison, Contender

# Seconds between two looks at what other processes have finished.
_PAUSE = 1


def run_all(setting: Setting) -> list[dict[str, Any]]:
    """Makes every run that has no result yet: first the sweeps, then a seed after another.

    Processes that share a work directory share the runs. Each run is made by one of them; one that
    is left by a process that ends is gone on with by another. Where others make all that is left,
    this one waits for them: the next rates of a sweep hang on what they find. On a file system that
    knows no locks there may be one process only.

    Args:
        setting: From `prepare`.

    Returns:
        The result of each run, whoever made it: sweeps by contender, then seed by seed.

    Raises:
        UserError: A run fails, or a result is of another recipe.
    """
    refuse_other_exports(setting)
    told = ""
    while True:
        results, wanted = _survey(setting)
        if not wanted:
            return results
        if any(_make_unless_claimed(setting, run) for run in wanted):
            continue
        if told != (names := ", ".join(run.name for run in wanted)):
            setting.say(f"waiting for other processes: {names}")
        told = names
        time.sleep(_PAUSE)


def _survey(setting: Setting) -> tuple[list[dict[str, Any]], list[Run]]:
    """What is finished, and what can be begun now, in order of preference."""
    comparison, contenders = setting.comparison, setting.contenders
    results: list[dict[str, Any]] = []
    wanted: list[Run] = []

    def finished(run: Run) -> dict[str, Any] | None:
        result = finished_result(setting, run)
        if result is None:
            wanted.append(run)
        else:
            results.append(result)
        return result

    rates = {}
    for contender in contenders:
        losses: dict[int, float] = {}
        while (exponent := next_exponent(losses, comparison.max_rate_steps)) is not None:
            rate = _rate(comparison, contender, exponent)
            result = finished(Run(contender, "sweep", comparison.sweep_seed, rate))
            if result is None:
                break
            losses[exponent] = result["held_out"][-1]["loss"]
        else:
            rates[contender.name] = _rate(comparison, contender, best_exponent(losses))
    for seed in comparison.seeds:
        for contender in contenders:
            if contender.name in rates:
                finished(Run(contender, "final", seed, rates[contender.name]))
    return results, wanted


def _rate(comparison: Comparison, contender: Contender, exponent: int) -> float:
    # Six digits, so that it is the same number in a file and on another machine.
    rate = starting_rate(comparison, contender) * comparison.rate_factor**exponent
    return float(f"{rate:.6g}")


def _make_unless_claimed(setting: Setting, run: Run) -> bool:
    """Makes a run, unless another process does; whether it is made."""
    with claimed(claim_of(setting.workdir, run.name)) as is_ours:
        # Since the survey another process may have finished it.
        if is_ours and finished_result(setting, run) is None:
            make_result(setting, run)
        return is_ours
