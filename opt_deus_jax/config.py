"""The dataclasses that describe one experiment, from base checkpoint to evaluation."""

import dataclasses
import types
import typing
from typing import Any

from opt_deus_jax.errors import UserError

AS_PUBLISHED = "published"
# What the paper evaluates on, zero-shot, by lm_eval's names.
PAPER_TASKS = (
    "arc_easy",
    "logiqa",
    "winogrande",
    "commonsense_qa",
    "boolq",
    "piqa",
    "mmlu",
    "wikitext",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "upscale.layout": (
        AS_PUBLISHED,
        "top",
        "bottom",
        "middle",
        "top_and_bottom",
        "uniform",
        "stack",
        "explicit",
    ),
    "upscale.transport": ("reference", "barycentric", "assignment", "symmetric"),
    "upscale.fusion": ("mean", "rescaled", "matched", "select"),
    "upscale.lesa_norms": ("mean", "reference"),
    "data.format": ("text", "alpaca", "messages"),
    "data.template": ("chat", "alpaca"),
    "optimizer.schedule": ("wsd", "cosine"),
    "training.compute_dtype": ("float32", "bfloat16"),
    "training.kernel_dtype": ("float32", "bfloat16"),
    "training.frozen_dtype": ("float32", "bfloat16"),
    "training.remat": ("none", "matmuls", "block"),
    "training.attention": ("reference", "cudnn", "splash"),
    "training.experts": ("dense", "grouped"),
    "evaluation.compute_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass
class UpscaleConfig:
    """Which layers are added, and with which weights.

    Attributes:
        method: A preset of `opt_deus_jax.upscaling.methods.METHODS`.
        layout: Where new layers go; `published` takes the layout of the method's paper.
        num_new_layers: How many layers are added.
        gaps: For `layout="explicit"` only: gap g lies between base layers g and g + 1.
        transport: How A's neurons are laid on B's before the two are fused: reference, barycentric,
            assignment, or symmetric (only by maps that leave A's function unchanged).
        epsilon: Entropy of Sinkhorn; None takes the transport's own: 0.06 absolute for
            `reference`, 0.01 of the mean cost for `barycentric`, and none for `symmetric`, which
            is then exact (a given one is relative to its mean squared cost, and blurs neurons).
        fusion: How A, laid on B, is fused with B. `mean`; `rescaled`: the mean with every row
            scaled to B's norm; for `transport="symmetric"` also `matched`: B's neuron or head mixed
            with A's as far as they are alike, and `select`: half of the neurons and heads A's, the
            others B's, all of them whole.
        zero_init: Whether o_proj and down_proj of new layers start at zero; None: as published.
        output_scale: In place of `zero_init`: a factor on o_proj and down_proj of new layers; 0
            zeroes them. Anything else gives up the identity.
        trained: `new`, `all`, `published`, or a regular expression: what it finds in the Hugging
            Face name of a tensor is trained.
        lesa_norms: For `method="lesa"`: norms and biases of new layers. `mean` of their parents';
            `reference`: those of layer 0, which the authors' code leaves in them.
        seed: Seed of the `random` method, and of what `lesa` learns.
    """

    method: str = "opt_deus"
    layout: str = AS_PUBLISHED
    num_new_layers: int = 0
    gaps: tuple[int, ...] = ()
    transport: str = "barycentric"
    epsilon: float | None = None
    fusion: str = "mean"
    zero_init: bool | None = None
    output_scale: float | None = None
    trained: str = AS_PUBLISHED
    lesa_norms: str = "mean"
    seed: int = 0


@dataclasses.dataclass
class DataConfig:
    """Text and how it becomes records.

    Attributes:
        train: Files or folders of text (txt, jsonl, jsonl.gz, jsonl.zst, jsonl.xz, parquet; for
            instructions json too), or `docstrings:` for the docstrings of the installed packages;
            several are separated by commas.
        held_out: The same for held-out text; empty splits the documents of `train`.
        held_out_fraction: Share of the documents (by hash) held out where `held_out` is empty.
        format: `text`, or instructions: `alpaca` (rows of instruction, input, output) or `messages`
            (rows of chat messages). Of instructions only the answers are trained on.
        text_field: For `text`: the field of jsonl and parquet rows that holds the text.
        template: For instructions: `chat` writes them through the tokenizer's chat template,
            `alpaca` through the prompt of Stanford Alpaca.
        packing: For instructions: whether a sequence holds several of them, each attended to alone.
        sequence_length: Tokens a training sequence; a record holds one more for the shift.
        max_train_tokens: Stop after this many training tokens, padding left out; 0 takes all.
        max_held_out_tokens: The same for held-out text.
        num_workers: Processes that tokenise; 0 means one a core.
        seed: Seed of the order in which records are seen.
    """

    train: str = "docstrings:"
    held_out: str = ""
    held_out_fraction: float = 0.05
    format: str = "text"
    text_field: str = "text"
    template: str = "chat"
    packing: bool = True
    sequence_length: int = 2048
    max_train_tokens: int = 0
    max_held_out_tokens: int = 100_000
    num_workers: int = 0
    seed: int = 0


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak learning rate.
        schedule: `wsd` (warm-up, stable, linear decay to zero) or `cosine` (to a tenth).
        warmup_steps: Steps of linear warm-up.
        decay_fraction: For `wsd`: share of all steps spent in the final decay.
        weight_decay: Decoupled weight decay, on kernels only.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        clip_norm: Global norm above which gradients are scaled down.
    """

    learning_rate: float = 5e-4
    schedule: str = "wsd"
    warmup_steps: int = 10
    decay_fraction: float = 0.2
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass
class MeshConfig:
    """How the devices are arranged; the product of the three is their number.

    Attributes:
        data: Groups of devices that each hold all parameters and see other sequences.
        fsdp: Devices over which parameters are cut by width, and sequences are spread too.
        tensor: Devices over which heads, MLP neurons and vocabulary are cut.

    One of them may be -1: it takes the devices that the others leave.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass
class TrainingConfig:
    """The training loop.

    Attributes:
        steps: Optimizer steps; 0 leaves it to `epochs`.
        epochs: Times that every record is seen, where `steps` is 0.
        batch_size: Sequences an optimizer step, over all devices.
        accumulation_steps: Parts into which each batch is cut; gradients are averaged over them.
        compute_dtype: Type of activations.
        kernel_dtype: Type of the kernels as multiplied; None takes `compute_dtype`. `bfloat16`
            under float32 activations rounds what is multiplied with a kernel and sums in float32:
            what a TPU does by itself, and faster on a CPU that has bfloat16 products. A CPU without
            them takes as long as for float32.
        frozen_dtype: Type in which frozen parameters are held.
        attention: `reference` (all scores in memory, anywhere), `cudnn` (NVIDIA GPU, bfloat16) or
            `splash` (TPU).
        experts: Of a mixture: `dense` multiplies every token with all of them, anywhere; `grouped`
            only with those that it is sent to, and is written for TPUs: on a CPU it computes the
            same and takes longer than `dense`.
        remat: `none` keeps every activation; `matmuls` keeps the products with kernels only;
            `block` recomputes each block in the backward pass.
        loss_chunk_tokens: Tokens whose logits exist at once on a device.
        log_every: Steps between lines of metrics.
        evaluate_every: Steps between held-out losses; 0 means only at both ends.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the latest checkpoints are kept, beside the one with the
            lowest held-out loss.
    """

    steps: int = 100
    epochs: int = 0
    batch_size: int = 8
    accumulation_steps: int = 1
    compute_dtype: str = "float32"
    kernel_dtype: str | None = None
    frozen_dtype: str = "float32"
    attention: str = "reference"
    experts: str = "dense"
    remat: str = "none"
    loss_chunk_tokens: int = 512
    log_every: int = 1
    evaluate_every: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2


@dataclasses.dataclass
class EvaluationConfig:
    """What a model is asked, and how.

    Attributes:
        tasks: Tasks, groups or tags of lm_eval.
        local_data: Folder with the questions of the paper's tasks as NAME_SPLIT.jsonl.gz, in the
            fields of the data sets that lm_eval loads; empty takes them from the hub.
        limit: Questions a task, the first ones; a group like mmlu spreads them over its tasks. 0
            asks all.
        num_fewshot: Solved examples before each question.
        compute_dtype: Type of parameters and activations.
        batch_tokens: Tokens a forward pass, over all devices.
    """

    tasks: tuple[str, ...] = PAPER_TASKS
    local_data: str = ""
    limit: int = 0
    num_fewshot: int = 0
    compute_dtype: str = "float32"
    batch_tokens: int = 2048


@dataclasses.dataclass
class Experiment:
    """Everything that one experiment needs; launchers share it through the work directory.

    Attributes:
        base: A Hugging Face directory, a `.gguf` file, a hub id, or a `config.json` alone (which
            is enough for `plan`).
        max_shard_bytes: Size above which exported safetensors are split.
        upscale: Which layers are added, and with which weights.
        data: Text and how it becomes records.
        optimizer: AdamW and its schedule.
        mesh: How the devices are arranged.
        training: The training loop.
        evaluation: What models are asked.
    """

    base: str = ""
    max_shard_bytes: int = 5_000_000_000
    upscale: UpscaleConfig = dataclasses.field(default_factory=UpscaleConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


@dataclasses.dataclass
class Contender:
    """One way to grow the base, in a comparison.

    Attributes:
        name: Of its runs, distinct among contenders; letters, digits, `_`, `.` and `-`.
        upscale: Which layers are added, and with which weights.
        learning_rate: Where its sweep begins; None takes the comparison's `optimizer` setting.
        base: What it is grown from, with the tokenizer of the comparison's base; empty takes that.
    """

    name: str
    upscale: UpscaleConfig = dataclasses.field(default_factory=UpscaleConfig)
    learning_rate: float | None = None
    base: str = ""


@dataclasses.dataclass
class Comparison:
    """Contenders that are trained alike: same base, text, order of records, recipe and questions.

    Attributes:
        experiment: What all share; its `upscale` is not used.
        contenders: What differs.
        seeds: Each contender is trained once for each: the seed is that of the order of the data.
        sweep_seed: The order of the data on which learning rates are tried, none of `seeds`.
        sweep_fraction: Share of the steps that a learning rate is tried for.
        rate_factor: Step of the sweep: from its start it tries rates by this factor up and down
            until the best has a worse one on both sides.
        max_rate_steps: How many factors away from its start a sweep goes.
        evaluations: Held-out losses that a run takes, after equal parts of its steps.
        questions: Questions a task after training, as `evaluation.limit`; 0 asks none.
        perplexity_pages: Pages of wikitext that are scored after training; 0 scores none.
        references: Contenders that the others are held against.
        exported: Contenders whose model, as the first seed trained it, is left in
            WORKDIR/exported/NAME; one with a result but no model there is trained again.
    """

    experiment: Experiment = dataclasses.field(default_factory=Experiment)
    contenders: tuple[Contender, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep_seed: int = 1000
    sweep_fraction: float = 0.4
    rate_factor: float = 2.0
    max_rate_steps: int = 3
    evaluations: int = 5
    questions: int = 0
    perplexity_pages: int = 0
    references: tuple[str, ...] = ("copy_next", "llama_pro")
    exported: tuple[str, ...] = ()


def _is_instance(value: Any, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_is_instance(value, member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return isinstance(value, tuple | list) and all(_is_instance(v, element) for v in value)
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def validate(experiment: Any, prefix: str = "") -> None:
    """Checks the type of every field and the value of every field that has choices.

    Args:
        experiment: An `Experiment`, or one of its parts with `prefix` naming it.
        prefix: The dotted path of the part, ending in a dot.

    Raises:
        UserError: A field has the wrong type or an unknown value.
    """
    hints = typing.get_type_hints(type(experiment))
    for field in dataclasses.fields(experiment):
        name, value = prefix + field.name, getattr(experiment, field.name)
        if dataclasses.is_dataclass(value):
            validate(value, name + ".")
            continue
        if not _is_instance(value, hints[field.name]):
            raise UserError(f"config field {name}={value!r}: expected {hints[field.name]}")
        choices = CHOICES.get(name.removeprefix("experiment."))
        if choices and value is not None and value not in choices:
            raise UserError(f"config field {name}={value!r}: use one of {', '.join(choices)}")
