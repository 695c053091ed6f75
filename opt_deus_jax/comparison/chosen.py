"""Some of the runs of a comparison, and what is not there yet."""

from collections.abc import Mapping, Sequence

from opt_deus_jax.comparison.finished import FinishedRun
from opt_deus_jax.comparison.summary import Row
from opt_deus_jax.errors import UserError

# Table of a summary: its subject, and the field that says how much a row stands on.
_SUBJECTS = {
    "contenders": ("final held-out losses", "seeds"),
    "paired": ("differences to a reference", "loss_pairs"),
    "sweeps": ("learning rates tried", "losses"),
    "steps": ("step times by place of the new layers", "times"),
    "diagnostics": ("transport diagnostics", "matrices"),
}


def choose_runs(
    runs: Sequence[FinishedRun],
    contenders: Sequence[str] = (),
    layouts: Sequence[str] = (),
    *,
    references: Sequence[str] = (),
) -> list[FinishedRun]:
    """Takes the runs of some contenders at some places.

    Args:
        runs: From `read_runs`.
        contenders: Their names; empty takes all.
        layouts: Where their new layers are (`FinishedRun.layout`); empty takes all.
        references: Contenders that are taken in any case, to hold the others against.

    Returns:
        Runs in their order.

    Raises:
        UserError: No run has a name or layout that is given, or none is left.
    """
    for field, given, there in (
        ("contenders", contenders, sorted({run.contender for run in runs})),
        ("layouts", layouts, sorted({run.layout for run in runs})),
    ):
        unknown = [name for name in given if name not in there]
        if unknown:
            raise UserError(f"{field}: {unknown[0]!r} has no run; use some of {', '.join(there)}")

    def is_chosen(run: FinishedRun) -> bool:
        named = not contenders or run.contender in contenders
        return named and (not layouts or run.layout in layouts)

    chosen = [run for run in runs if is_chosen(run)]
    if not chosen:
        raise UserError(
            f"no run of contenders {', '.join(contenders)} has layout {' or '.join(layouts)}; "
            "choose more of either"
        )
    return [run for run in runs if is_chosen(run) or run.contender in references]


def missing_tables(summary: Mapping[str, Sequence[Row]]) -> list[str]:
    """What a summary cannot say yet.

    Args:
        summary: From `summarize`.

    Returns:
        The subject of each table of which no row stands on any run.
    """
    return [
        subject
        for table, (subject, field) in _SUBJECTS.items()
        if not any(row[field] for row in summary[table])
    ]
