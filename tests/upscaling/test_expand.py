"""From a base directory to a grown one: what is written, and that it computes the same."""

import dataclasses
import functools
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from opt_deus_jax.checkpoints.manifest import read_manifest, software_versions
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, outer_specs
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.fusion import fuse_blocks
from opt_deus_jax.upscaling.layout import plan_layout
from opt_deus_jax.upscaling.probe import probe_tokens
from tests.llama_checkpoints import (
    hf_config,
    load_directory,
    oracle_logits,
    random_tensors,
    smollm2,
    source_of,
    tokens,
    write_directory,
)

# Kernels of one shape, so that transport is compiled once.
CONFIG = hf_config(intermediate_size=32, num_key_value_heads=4)
LAYOUTS = ("top", "bottom", "middle", "top_and_bottom", "uniform", "explicit")
ZEROED = ("opt_deus", "llama_pro", "copy_previous", "copy_next", "half_next", "random")
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@functools.cache
def tensors_of(dtype="float32"):
    return random_tensors(CONFIG, dtype=np.dtype(dtype))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = write_directory(tmp_path_factory.mktemp("base") / "base", CONFIG, tensors_of())
    (directory / "tokenizer_config.json").write_bytes(b'{"a": 1}')
    (directory / "LICENSE").write_bytes(b"Apache\r\n")
    return open_checkpoint(str(directory))


@pytest.fixture(scope="module")
def base_logits(base):
    return oracle_logits(load_directory_of(base), tokens())


def load_directory_of(source):
    return load_directory(source.name)


def expand(source, directory, max_shard_bytes=10**9, **fields):
    return expand_checkpoint(
        source,
        UpscaleConfig(**fields),
        directory,
        probe_BT=tokens(),
        max_shard_bytes=max_shard_bytes,
    )


def layout_fields(layout):
    if layout == "explicit":
        return {"layout": layout, "gaps": (4, 0, 5)}
    return {"layout": layout, "num_new_layers": 3 if layout == "uniform" else 4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ZEROED)
def test_a_zero_initialised_model_computes_what_its_base_does(
    tmp_path, base, base_logits, method, layout
):
    fields = layout_fields(layout)
    made = expand(base, tmp_path / "grown", method=method, **fields)
    assert made.identity.bit_identical
    assert (made.identity.max_difference, made.identity.mean_divergence) == (0.0, 0.0)
    assert made.identity.tokens == tokens().size
    model = load_directory(tmp_path / "grown")
    assert model.config.num_hidden_layers == len(made.manifest.layers) > 6
    np.testing.assert_allclose(oracle_logits(model, tokens()), base_logits, rtol=0, atol=1e-5)
    # The new layers are not zero throughout, and the old ones not moved.
    state = model.state_dict()
    for layer in made.manifest.layers:
        prefix = f"model.layers.{layer['depth']}."
        zero = [name for name in OUTPUTS if not state[f"{prefix}{name}.weight"].any()]
        assert zero == (list(OUTPUTS) if layer["is_new"] else [])
        assert state[f"{prefix}mlp.gate_proj.weight"].any()


@pytest.mark.parametrize("fields", [
    {"method": "average", "num_new_layers": 3},
    {"method": "copy_next", "num_new_layers": 3, "output_scale": 0.5},
    {"method": "solar", "num_new_layers": 4},
    {"method": "opt_deus", "num_new_layers": 3, "zero_init": False},
])  # fmt: skip
def test_the_distance_of_the_other_methods_is_reported(tmp_path, base, base_logits, fields):
    made = expand(base, tmp_path / "grown", **fields)
    grown = oracle_logits(load_directory(tmp_path / "grown"), tokens())
    difference = np.abs(grown - base_logits).max()
    assert difference > 0.01
    assert not made.identity.bit_identical
    np.testing.assert_allclose(made.identity.max_difference, difference, rtol=1e-3)

    def log_softmax(x):
        x = x.astype(np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(base_logits), log_softmax(grown)
    divergence = (np.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose(made.identity.mean_divergence, divergence, rtol=1e-3)
    assert (
        f"{made.identity.mean_divergence:.4f} nats"
        in (tmp_path / "grown" / "README.md").read_text()
    )


def test_every_tensor_is_where_the_layout_puts_it(tmp_path, base):
    made = expand(base, tmp_path / "grown", method="opt_deus", num_new_layers=3, zero_init=False)
    grown = open_checkpoint(str(tmp_path / "grown"))
    config = read_model_config(CONFIG)
    specs = block_specs(config)

    def block(source, layer):
        return {k: source.read(spec.hf_name.format(layer=layer)) for k, spec in specs.items()}

    for origin in plan_layout("top", 6, 3):
        if origin.base_layer is not None:
            expected = block(base, origin.base_layer)
        else:
            assert origin.previous is not None
            assert origin.next is not None
            parents = block(base, origin.previous), block(base, origin.next)
            expected = fuse_blocks(
                *parents, config=config, weights="transport", zero_init=False
            ).block
            assert [report.name for report in made.reports[origin.depth]] == [
                name.removesuffix("_kernel") for name in specs if name.endswith("_kernel")
            ]
        for name, array in block(grown, origin.depth).items():
            np.testing.assert_array_equal(array, expected[name], strict=True)
    for spec in outer_specs(config).values():
        np.testing.assert_array_equal(grown.read(spec.hf_name), base.read(spec.hf_name))


def test_the_picture_is_drawn_before_the_folder_gets_its_name(tmp_path, base):
    seen = {}

    def draw(directory, maps, reports):
        assert not (tmp_path / "grown").exists()
        plot_diagnostics(directory, maps, reports)
        seen.update(maps=maps, reports=reports)

    made = expand_checkpoint(
        base,
        UpscaleConfig(num_new_layers=3),
        tmp_path / "grown",
        probe_BT=tokens(),
        max_shard_bytes=10**9,
        draw=draw,
    )
    assert (tmp_path / "grown" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert seen["reports"] == made.reports
    assert seen["maps"].keys() == {report.name for report in made.reports[3]}


def test_a_uniform_layer_above_the_last_takes_it_for_both_parents(tmp_path, base):
    fields = {"layout": "uniform", "num_new_layers": 2, "zero_init": False}
    expand(base, tmp_path / "grown", method="average", **fields)
    grown = open_checkpoint(str(tmp_path / "grown"))
    for name in (name for name in base.tensors if "layers.5." in name):
        above = grown.read(name.replace("layers.5.", "layers.7."))
        np.testing.assert_array_equal(above, base.read(name))


def test_solar_stacks_copies(tmp_path, base):
    expand(base, tmp_path / "grown", method="solar", num_new_layers=2)
    grown = open_checkpoint(str(tmp_path / "grown"))
    for depth, layer in enumerate([0, 1, 2, 3, 2, 3, 4, 5]):
        for name in (name for name in base.tensors if f"layers.{layer}." in name):
            copied = grown.read(name.replace(f"layers.{layer}.", f"layers.{depth}."))
            np.testing.assert_array_equal(copied, base.read(name))


def test_random_layers_differ_from_each_other_and_with_the_seed(tmp_path, base):
    def gates(seed):
        directory = tmp_path / str(seed)
        expand(base, directory, method="random", num_new_layers=2, seed=seed)
        grown = open_checkpoint(str(directory))
        return [grown.read(f"model.layers.{depth}.mlp.gate_proj.weight") for depth in (4, 6)]

    drawn = [*gates(0), *gates(100)]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not np.array_equal(first, second)


def test_the_manifest_tells_how_the_model_was_made(tmp_path, base):
    made = expand(base, tmp_path / "grown", method="opt_deus", num_new_layers=2)
    manifest = read_manifest(tmp_path / "grown")
    assert dataclasses.asdict(manifest) == dataclasses.asdict(made.manifest)
    assert manifest.method == "opt_deus"
    assert manifest.options == {
        **{"layout": "top", "weights": "transport", "zero_init": True, "trained": "new"},
        **{"output_scale": 1.0, "num_new_layers": 2, "transport": "barycentric", "epsilon": 0.01},
        "fusion": "mean",
    }
    assert manifest.trained == "new"
    assert manifest.layers == tuple(dataclasses.asdict(o) for o in plan_layout("top", 6, 2))
    assert [i for i, new in enumerate(manifest.is_new) if new] == [4, 6]
    lines = "".join(
        f"{name} {hashlib.sha256(tensors_of()[name].tobytes()).hexdigest()}\n"
        for name in sorted(tensors_of())
    )
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert manifest.base == {"name": "base", "num_layers": 6, "sha256": digest}
    assert manifest.identity == dataclasses.asdict(made.identity)
    assert manifest.identity["bit_identical"] is True
    assert manifest.versions == software_versions()
    names = ("query", "key", "value", "output", "gate", "up")
    assert [(d["depth"], d["name"]) for d in manifest.diagnostics] == [
        (depth, name) for depth in (4, 6) for name in names
    ]
    assert all(d["converged"] for d in manifest.diagnostics)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"transport": "reference", "epsilon": 0.1}, {"transport": "reference", "epsilon": 0.1}),
        ({"transport": "assignment"}, {"transport": "assignment"}),
        ({"transport": "symmetric"}, {"transport": "symmetric", "fusion": "mean"}),
        ({"method": "average", "fusion": "rescaled"}, {"fusion": "rescaled"}),
        (
            {"transport": "symmetric", "epsilon": 0.1},
            {"transport": "symmetric", "epsilon": 0.1},
        ),
        ({"method": "copy_next", "trained": "all"}, {"trained": "all"}),
        ({"method": "random", "seed": 7}, {"seed": 7}),
    ],
)
def test_options_that_had_an_effect_are_in_the_manifest(tmp_path, base, fields, options):
    made = expand(base, tmp_path / "grown", num_new_layers=1, **fields)
    assert made.manifest.options.items() >= options.items()
    assert made.manifest.options.keys() & {"transport", "epsilon", "seed"} == options.keys() - {
        *("trained", "fusion")
    }
    assert made.manifest.trained == options.get("trained", "new")


def test_config_side_files_and_model_card(tmp_path, base):
    expand(base, tmp_path / "grown", num_new_layers=2)
    folder = tmp_path / "grown"
    assert json.loads((folder / "config.json").read_text()) == CONFIG | {"num_hidden_layers": 8}
    for name, content in base.side_files.items():
        assert (folder / name).read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*base.side_files, "README.md", "config.json", "model.safetensors", "upscale_manifest.json"]
    )
    card = (folder / "README.md").read_text()
    assert "New layers: 4, 6." in card
    assert "computes exactly what its base computes" in card


@pytest.mark.parametrize("method", ["opt_deus", "random"])
def test_two_expansions_are_the_same_bytes(tmp_path, base, method):
    for run in ("a", "b"):
        fields = {"method": method, "num_new_layers": 2, "max_shard_bytes": 30_000}
        expand(base, tmp_path / run / "grown", **fields)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / run / "grown").iterdir()}
        for run in ("a", "b")
    )
    assert len([name for name in first if name.endswith(".safetensors")]) > 2
    assert first == second


@pytest.mark.parametrize("method", ["opt_deus", "copy_next", "average", "solar"])
def test_shards_with_an_index_are_loaded_by_transformers(tmp_path, base, method):
    for name, size in (("one", 10**9), ("many", 20_000)):
        expand(base, tmp_path / name, size, method=method, num_new_layers=2)
    one, many = (load_directory(tmp_path / name).state_dict() for name in ("one", "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert one.keys() == many.keys()
    assert all(one[name].equal(many[name]) for name in one)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("method", ["opt_deus", "average"])
def test_half_and_double_bases_keep_their_dtype(tmp_path, dtype, method):
    tensors = tensors_of(np.dtype(dtype))
    source = source_of(CONFIG, tensors)
    made = expand(source, tmp_path / "grown", method=method, num_new_layers=2)
    assert made.identity.bit_identical == (method == "opt_deus")
    grown = open_checkpoint(str(tmp_path / "grown"))
    assert {info.dtype for info in grown.tensors.values()} == {np.dtype(dtype)}
    name = "model.layers.{}.input_layernorm.weight"
    below, above = (tensors[name.format(layer)].astype(np.float32) for layer in (3, 4))
    expected = ((below + above) / 2).astype(dtype)
    np.testing.assert_array_equal(grown.read(name.format(4)), expected, strict=True)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_method_base_gives_back_every_tensor_in_its_own_dtype(tmp_path, max_shard_bytes):
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    drawn = tensors_of("float64")
    mixed = {name: array.astype(dtypes[i % 4]) for i, (name, array) in enumerate(drawn.items())}
    write_directory(tmp_path / "base", CONFIG, mixed, shards=3)
    source = open_checkpoint(str(tmp_path / "base"))
    made = expand(source, tmp_path / "copy", max_shard_bytes, method="base")
    assert made.identity.bit_identical
    assert made.manifest.is_new == (False,) * 6
    assert made.manifest.trained == "all"
    copy = open_checkpoint(str(tmp_path / "copy"))
    assert copy.tensors.keys() == mixed.keys()
    for name, array in mixed.items():
        assert copy.read(name).dtype == array.dtype
        assert copy.read(name).tobytes() == array.tobytes()


def test_a_grown_model_keeps_its_new_layers_when_it_is_a_base(tmp_path, base):
    grown = expand(base, tmp_path / "grown", method="copy_next", num_new_layers=2)
    source = open_checkpoint(str(tmp_path / "grown"))
    made = expand(source, tmp_path / "again", method="base", trained="new")
    assert made.identity.bit_identical
    assert made.manifest.is_new == grown.manifest.is_new
    assert [layer["base_layer"] for layer in made.manifest.layers] == list(range(8))
    assert read_manifest(tmp_path / "again").method == "base"


def test_progress_is_told_for_each_layer_in_order(tmp_path, base):
    seen = []
    expand_checkpoint(
        base,
        UpscaleConfig(method="copy_next", num_new_layers=2),
        tmp_path / "grown",
        probe_BT=tokens(),
        max_shard_bytes=10**9,
        on_layer=seen.append,
    )
    assert tuple(seen) == plan_layout("top", 6, 2)


def test_probe_tokens_are_the_models_own_words_or_spread_over_the_vocabulary(base):
    drawn = probe_tokens(base)
    assert drawn.shape == (2, 128)
    assert 0 <= drawn.min() < drawn.max() < 97
    real = smollm2()
    text = probe_tokens(real)
    assert text.dtype == np.int32
    assert text.shape[1] == 128
    assert len(np.unique(text)) > 60
