import re
import shlex
from pathlib import Path

import pytest

from opt_deus_jax.distributed.pod_commands import tpu_vm_command, xpk_command, xpk_type
from opt_deus_jax.distributed.topology import parse_topology

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("slice_", "name"),
    # The first two are XPK's own examples, which BUILD.md quotes.
    [("v5p:2x4x4", "v5p-64"), ("v5e:4x4", "v5litepod-16"), ("v6e:8x8", "v6e-64")],
)
def test_xpk_counts_cores_of_v5p_and_chips_of_others(slice_: str, name: str) -> None:
    assert xpk_type(parse_topology(slice_)) == name


def _commands() -> dict[str, str]:
    config, workdir, text = "configs/llama3.py:8b_v5p", "/mnt/a b", ["--config.data.train=it's"]
    return {
        "tpu_vm.sh": tpu_vm_command(config, workdir, text, name="slice", zone="us-east5-a"),
        "xpk.sh": xpk_command(
            config,
            workdir,
            parse_topology("v5p:2x4x4"),
            text,
            cluster="c",
            project="p",
            zone="z",
            workload="w",
            image="i",
            storage="s",
        ),
    }


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_a_command_gives_its_script_every_setting_and_quotes_them(script: str) -> None:
    words = shlex.split(_commands()[script])
    place = words.index(f"experiments/launch/{script}")
    settings = dict(word.split("=", 1) for word in words[:place])
    needed = re.findall(
        r"^: \"\$\{(\w+):\?", (_ROOT / words[place]).read_text(), flags=re.MULTILINE
    )
    assert sorted(settings) == sorted(needed)
    assert settings["WORKDIR"] == "/mnt/a b"
    assert words[place + 1 :] == ["--config.data.train=it's"]
