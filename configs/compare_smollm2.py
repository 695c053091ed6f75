"""Initialisations of new layers at the same place, published presets, and places: SmolLM2-135M.

30 -> 45 layers, the paper's ratio. All contenders see the same tokens in the same order; each is
given its own learning rate by a sweep. Text and questions: --config.experiment.data.train=FILES,
--config.experiment.data.held_out=FILES, --config.experiment.evaluation.local_data=FOLDER.

Variants: none for two CPU cores (102,400 tokens a run); `ideas` for the ways to beat a copy at the
same place, on a fifth of the tokens (what is ahead of both copies there is to join the others);
`confirm` for the default transport beside both copies where no idea was chosen: 30 -> 38 layers,
in the middle, on text of another kind, of which documents are held out (data.held_out stays empty);
`gpu` for one GPU (50M tokens a run, the paper's context of 2048; never run yet); `smoke` to try it
out; `tuned` for all parameters of the published presets, as a comparison with
--workdir=runs/compare trained them, tuned on instructions (--config.experiment.data.train=ROWS, as
in configs/fine_tune.py) on two CPU cores: one trained model of each, so its errors are of the order
of the instructions only.

    python -m experiments.compare --config=configs/compare_smollm2.py --workdir=runs/compare
    python -m experiments.compare --config=configs/compare_smollm2.py:ideas --workdir=runs/ideas
    python -m experiments.compare --config=configs/compare_smollm2.py:confirm --workdir=runs/confirm
    python -m experiments.compare --config=configs/compare_smollm2.py:tuned --workdir=runs/tuning
"""

import dataclasses

import configs.fine_tune
from configs.smollm2_135m import smollm2_base
from opt_deus_jax.config import Comparison, Contender, Experiment, UpscaleConfig
from opt_deus_jax.errors import UserError

_NUM_NEW = 15
_PRESETS = ("base", "solar", "llama_pro", "average", "opt_deus_barycentric")
_COPIES = ("copy_next", "copy_previous")
_BESIDE_IDEAS = (*_COPIES, "opt_deus_barycentric", "random")
_PLACES = ("middle", "bottom", "top_and_bottom", "uniform")


def _contender(name: str, method: str, rate: float | None = None, **settings: object) -> Contender:
    settings = {"num_new_layers": 0 if method == "base" else _NUM_NEW, **settings}
    upscale = UpscaleConfig(method=method, **settings)  # pyright: ignore
    return Contender(name, upscale, rate)


def _contenders() -> tuple[Contender, ...]:
    same_place = (
        _contender("copy_next", "copy_next"),
        _contender("opt_deus_barycentric", "opt_deus"),
        _contender("copy_previous", "copy_previous"),
        _contender("opt_deus_reference", "opt_deus", transport="reference"),
        _contender("random", "random"),
        _contender("opt_deus_assignment", "opt_deus", transport="assignment"),
        _contender("average_zero", "average", zero_init=True),
        _contender("half_next", "half_next"),
        _contender("average", "average"),
        _contender("base", "base", 1.25e-4),
    )
    presets = (
        _contender("llama_pro", "llama_pro"),
        _contender("solar", "solar", 1.25e-4),
    )
    places = tuple(
        _contender(f"{name}_{place}", method, layout=place)
        for place in _PLACES
        for name, method in (("copy_next", "copy_next"), ("opt_deus", "opt_deus"))
    )
    learned = (_contender("lesa", "lesa"), _contender("lesa_zero", "lesa", zero_init=True))
    return (*same_place, *presets, *places, *learned)


def _idea_contenders() -> tuple[Contender, ...]:
    return (
        _contender("barycentric_rescaled", "opt_deus", fusion="rescaled"),
        _contender("symmetric", "opt_deus", transport="symmetric"),
        _contender("symmetric_rescaled", "opt_deus", transport="symmetric", fusion="rescaled"),
        _contender("symmetric_matched", "opt_deus", transport="symmetric", fusion="matched"),
        _contender("symmetric_select", "opt_deus", transport="symmetric", fusion="select"),
        _contender("copy_next_tenth", "copy_next", output_scale=0.1),
    )


def _ideas(shared: Experiment) -> Comparison:
    """Ideas at the top beside both copies, on a fifth of the tokens: rates, then three seeds."""
    shared.optimizer.learning_rate = 5e-4
    shared.optimizer.warmup_steps = 4
    shared.training.steps, shared.training.batch_size = 40, 2
    # A rate is tried for all of the steps: they are few, and the best rate hangs on their number.
    by_name = {contender.name: contender for contender in _contenders()}
    contenders = (*(by_name[name] for name in _BESIDE_IDEAS), *_idea_contenders())
    return Comparison(shared, contenders, sweep_fraction=1.0, evaluations=1, references=_COPIES)


def _confirm(shared: Experiment) -> Comparison:
    """The default transport beside both copies: another place, depth and text."""
    shared.optimizer.warmup_steps = 4
    shared.training.steps = 40
    contenders = tuple(
        _contender(name, method, 1e-3, num_new_layers=8, layout="middle")
        for name, method in (
            ("copy_next", "copy_next"),
            ("copy_previous", "copy_previous"),
            ("opt_deus_barycentric", "opt_deus"),
        )
    )
    return Comparison(
        shared,
        contenders,
        sweep_fraction=1.0,
        evaluations=2,
        questions=20,
        perplexity_pages=2,
        references=_COPIES,
    )


def _tuned(shared: Experiment) -> Comparison:
    """What `experiments.compare` left of the presets, tuned on the same instructions."""
    fine_tune = configs.fine_tune.get_config("smollm2")
    shared.data = dataclasses.replace(fine_tune.data, max_train_tokens=2_000_000)
    shared.optimizer = fine_tune.optimizer
    shared.training.steps, shared.training.checkpoint_every = 50, 25
    contenders = tuple(
        Contender(name, UpscaleConfig(method="base"), base=f"runs/compare/exported/{name}")
        for name in _PRESETS
    )
    references = ("base", "llama_pro")
    return Comparison(shared, contenders, questions=20, perplexity_pages=2, references=references)


def get_config(variant: str = "") -> Comparison:
    """Returns the comparison of a variant."""
    shared = Experiment(base=smollm2_base())
    shared.data.sequence_length = 256
    shared.data.max_train_tokens = 2_000_000
    shared.data.max_held_out_tokens = 8_192
    shared.optimizer.learning_rate = 2.5e-4
    shared.training.steps = 100
    shared.training.batch_size = 4
    shared.training.kernel_dtype = "bfloat16"
    shared.training.checkpoint_every = 50
    shared.training.keep_checkpoints = 1
    comparison = Comparison(
        shared, _contenders(), questions=20, perplexity_pages=2, exported=_PRESETS
    )
    if variant == "ideas":
        return _ideas(shared)
    if variant == "confirm":
        return _confirm(shared)
    if variant == "tuned":
        return _tuned(shared)
    if variant == "gpu":
        shared.data.sequence_length = 2048
        shared.data.max_train_tokens = 0
        shared.data.max_held_out_tokens = 400_000
        shared.optimizer.warmup_steps = 50
        shared.training.steps = 800
        shared.training.batch_size = 32
        shared.training.compute_dtype = shared.training.frozen_dtype = "bfloat16"
        shared.training.attention = "cudnn"
        shared.training.remat = "matmuls"
        shared.training.loss_chunk_tokens = 8192
        shared.evaluation.batch_tokens = 65_536
        comparison.questions, comparison.perplexity_pages = 1000, 62
    elif variant == "smoke":
        shared.data.max_train_tokens = 20_000
        shared.data.max_held_out_tokens = 1_024
        shared.data.sequence_length = 64
        shared.optimizer.warmup_steps = 1
        shared.training.steps = 5
        comparison.contenders = comparison.contenders[:2]
        comparison.seeds, comparison.max_rate_steps = (0, 1), 1
        comparison.questions, comparison.perplexity_pages = 2, 0
        comparison.references, comparison.exported = ("copy_next",), ()
    elif variant:
        raise UserError(
            f"configs/compare_smollm2.py: unknown variant {variant!r}; use ideas, confirm, gpu, "
            "smoke, tuned or none"
        )
    return comparison
