"""Forecasts: from the spec table alone, refused where memory does not fit."""

import json
from pathlib import Path

import pytest

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.upscaling import forecast
from opt_deus_jax.upscaling.methods import plan_layers, resolve_method
from tests.llama_checkpoints import hf_config

LLAMA_8B = json.loads((Path(__file__).parents[2] / "configs/llama3_1_8b.json").read_text())
LLAMA_1B = json.loads((Path(__file__).parents[2] / "configs/llama3_2_1b.json").read_text())
GIB = 2**30


def forecast_of(content, num_new_layers, together=None, **fields):
    config = read_model_config(content)
    upscale = UpscaleConfig(num_new_layers=num_new_layers, **fields)
    layers = plan_layers(upscale, config.num_layers, None)
    method = resolve_method(upscale)
    itemsize = forecast.stored_itemsize(content)
    made = forecast.forecast(config, upscale, method, layers, itemsize, **(together or {}))
    return made, upscale


def test_disk_is_the_size_of_the_published_models_in_bfloat16():
    assert forecast_of(LLAMA_8B, 16)[0].disk_bytes == 2 * 11_520_053_248
    assert forecast_of(LLAMA_1B, 8)[0].disk_bytes == 2 * 1_722_386_432
    # Without a dtype, transformers stores float32.
    content = hf_config(tie_word_embeddings=False)
    block = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert forecast_of(content, 2)[0].disk_bytes == 4 * (8 * block + 2 * 97 * 32 + 32)


def test_products_of_a_small_example_counted_by_hand():
    content = hf_config(num_key_value_heads=4)
    made, _ = forecast_of(content, 2)
    one = made.flops - forecast_of(content, 1)[0].flops
    # Cost and move of q, k, v, o and of gate and up, these two first moved along the stream.
    transport = 4 * 4 * 32**2 * 32 + 2 * (4 * 48**2 * 32 + 2 * 48 * 32 * 32)
    block = 2 * 32 + 4 * 32 * 32 + 3 * 32 * 48
    assert one == transport + 2 * 256 * block
    assert made.table_bytes == 2 * 300 * 8 * (4 * 32**2 + 2 * 48**2)
    assert made.assignment_seconds == 0
    exact, _ = forecast_of(content, 2, transport="assignment")
    assert exact.table_bytes == 0
    assert exact.assignment_seconds > 0
    assert forecast_of(content, 2, method="copy_next")[0].flops < made.flops


def test_llama_8b_fits_6_gib_and_an_assignment_takes_more():
    made, _ = forecast_of(LLAMA_8B, 16)
    assert 2 * GIB < made.memory_bytes < 6 * GIB
    assert "up" in made.peak
    exact, _ = forecast_of(LLAMA_8B, 16, transport="assignment")
    assert exact.memory_bytes > made.memory_bytes
    symmetric, _ = forecast_of(LLAMA_8B, 16, transport="symmetric")
    soft, _ = forecast_of(LLAMA_8B, 16, transport="symmetric", epsilon=0.05)
    # The table of squared distances alone is 1.6 GB.
    assert 2 * GIB < symmetric.memory_bytes < 6 * GIB < soft.memory_bytes
    # Depth costs time and disk, not memory.
    assert forecast_of(LLAMA_8B, 4)[0].memory_bytes == made.memory_bytes


def test_what_does_not_fit_is_refused_with_a_remedy(monkeypatch):
    made, upscale = forecast_of(LLAMA_8B, 16)
    monkeypatch.setattr(forecast, "available_memory", lambda: made.memory_bytes)
    forecast.check_memory(made, upscale)
    monkeypatch.setattr(forecast, "available_memory", lambda: GIB)
    with pytest.raises(UserError, match=r"memory: .* about .* GiB \(.*up.* 1.0 GiB are free; end"):
        forecast.check_memory(made, upscale)
    exact, upscale = forecast_of(LLAMA_8B, 16, transport="assignment")
    with pytest.raises(UserError, match=r"set upscale.transport=barycentric instead of assign"):
        forecast.check_memory(exact, upscale)


def test_each_gap_at_once_takes_memory_of_its_own(monkeypatch):
    one, upscale = forecast_of(LLAMA_8B, 16)
    three, _ = forecast_of(LLAMA_8B, 16, {"gaps_at_once": 3})
    # The largest tensor, of the embedding, may be written beside them.
    fusion = one.memory_bytes - forecast._RUNTIME_BYTES
    assert three.memory_bytes == one.memory_bytes + 2 * fusion + 2 * 128256 * 4096
    assert three.peak == f"3 gaps at once, each: {one.peak}"
    # There are no more at once than there are.
    assert forecast_of(LLAMA_8B, 1, {"gaps_at_once": 3})[0].memory_bytes == one.memory_bytes
    assert forecast_of(LLAMA_8B, 4, {"gaps_at_once": 3}, method="solar")[0].gaps_at_once == 1
    monkeypatch.setattr(forecast, "available_memory", lambda: three.memory_bytes)
    forecast.check_memory(three, upscale)
    with pytest.raises(UserError, match=r"2 processes here$"):
        forecast.check_memory(three, upscale, processes_here=2)
    monkeypatch.setattr(forecast, "available_memory", lambda: one.memory_bytes)
    with pytest.raises(UserError, match=r"\(3 gaps at once, .* or set --gaps_at_once below 3$"):
        forecast.check_memory(three, upscale)


def test_gaps_of_all_devices_and_processes_share_the_time():
    speed = forecast.Speed(1e10, 1e10)
    one, _ = forecast_of(LLAMA_8B, 16, transport="assignment")
    many, _ = forecast_of(LLAMA_8B, 16, {"gaps_at_once": 2, "processes": 4}, transport="assignment")
    alone = one.proof_flops / speed.flops + one.moved_bytes / 5e8
    assert forecast.forecast_seconds(many, speed) - alone == pytest.approx(
        (forecast.forecast_seconds(one, speed) - alone) / 8
    )
    # Sixteen gaps are all that there are.
    most, _ = forecast_of(LLAMA_8B, 16, {"gaps_at_once": 8, "processes": 9})
    assert most.abreast == 16


def test_time_is_products_passes_assignments_and_files():
    made = forecast.Forecast(0, "", 0, 10**9, 10**9, 3.0, int(5e8))
    assert forecast.forecast_seconds(made, forecast.Speed(5e8, 2.5e8)) == pytest.approx(
        2 + 4 + 3 + 1
    )
    speed = forecast.measure_speed()
    assert speed.flops > 1e8
    assert speed.table_bytes > 1e8
