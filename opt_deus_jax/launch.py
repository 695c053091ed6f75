"""What every launcher shares: the two flags, the resolved config in the work directory, errors."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from opt_deus_jax.config import Experiment, validate
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.preemption import EXIT_STATUS, Preempted
from opt_deus_jax.whole_files import write_json

CONFIG_FILE = "config.json"


def define_flags(*, needs_workdir: bool = True, others: Sequence[str] = ()) -> None:
    """Defines `--config` and, where results are written, `--workdir`; both show in `--help`.

    Args:
        needs_workdir: Whether the launcher writes anything.
        others: Flags that a module of the package defines, to be shown in `--help` too.
    """
    config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py[:variant]; fields: --config.upscale.method=... and so on."
    )
    names = ["config"]
    if needs_workdir:
        flags.DEFINE_string("workdir", None, "Folder of the experiment; all is written in it.")
        names.append("workdir")
    flags.mark_flags_as_required(names)
    for name in (*names, *others):
        # absl's --help shows the flags of the main module, which it knows as argv[0].
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        _fail(f"{reason}; see --help and opt_deus_jax/config.py for the fields")
        raise
    except UserError as error:
        _fail(str(error))
        raise


def run(main: Callable[[], None]) -> None:
    """Runs a launcher: bad flags and `UserError` become one line on stderr and exit status 1.

    A training that SIGTERM stopped says so in one line too, with `EXIT_STATUS`.

    Args:
        main: The launcher's work.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; everything is a --flag, see --help")
        # Orbax reports every file at INFO.
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            _fail(str(error))
        except Preempted as preempted:
            print(preempted, file=sys.stderr)
            sys.exit(EXIT_STATUS)

    app.run(guarded, flags_parser=_parse_flags)


def experiment_from_flags() -> Experiment:
    """The experiment of `--config`, checked.

    Raises:
        UserError: A field has the wrong type or value.
    """
    experiment = flags.FLAGS.config
    if not isinstance(experiment, Experiment):
        raise UserError("--config: get_config() must return opt_deus_jax.config.Experiment")
    validate(experiment)
    return experiment


def start(
    fixed: Sequence[str], recorded: Sequence[str] = (), *, is_writer: bool = True
) -> tuple[Experiment, Path]:
    """Reads the flags and checks the experiment against what earlier launchers recorded.

    `config.json` in the work directory holds each part of the experiment that some launcher has
    used. A fixed part that was used before must be the same now, or results would be mixed, unless
    the directory holds nothing else yet.

    Args:
        fixed: The fields of `Experiment` that this launcher and others depend on.
        recorded: Fields that this launcher records and checks in its own way.
        is_writer: Whether this process records them; of several one does.

    Returns:
        The experiment and the work directory, which exists.

    Raises:
        UserError: A field differs from what was recorded.
    """
    experiment = experiment_from_flags()
    workdir = Path(flags.FLAGS.workdir).expanduser().absolute()
    path = workdir / CONFIG_FILE
    # Where nothing was made yet, what a first command got wrong binds nobody.
    made = workdir.is_dir() and any(entry.name != CONFIG_FILE for entry in workdir.iterdir())
    is_read = path.exists() and (made or not is_writer)
    before = json.loads(path.read_text()) if is_read else {}
    now = json.loads(json.dumps(dataclasses.asdict(experiment)))
    for part in fixed:
        if part in before and before[part] != now[part]:
            raise UserError(_difference(part, before[part], now[part], path))
    if not is_writer:
        return experiment, workdir
    merged = before | {part: now[part] for part in (*fixed, *recorded)}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, merged)
    return experiment, workdir


def config_arguments() -> list[tuple[str, str]]:
    """Names and values of the `--config` flags of the command line, in their order."""
    words, given = sys.argv[1:], []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--config"):
            given.append((name, value if equals or following.startswith("--") else following))
    return given


def need(extra: str, *modules: str) -> None:
    """Refuses to go on without modules that an extra of the package brings.

    Raises:
        UserError: One is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"this needs {module}; run: pip install 'opt_deus_jax[{extra}]'")


def _difference(part: str, before: object, now: object, path: Path) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(k for k in {**before, **now} if before.get(k) != now.get(k))
        return _difference(f"{part}.{field}", before.get(field), now.get(field), path)
    return (
        f"config field {part}={now!r}: this work directory was made with {before!r} ({path}); "
        "use that or another --workdir"
    )
