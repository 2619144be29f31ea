"""The code of ``docs/distributed.md`` runs under torchrun, in every trainer that is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BLOCKS = re.findall(r"^```python torchrun ?(\w*)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

# Accelerate has no FSDP for CPUs; nothing but this keeps it from there.
ACCELERATE = """
from accelerate import state
from accelerate.utils import DistributedType
def start(self, *args, fsdp_plugin=None, start=state.AcceleratorState.__init__, **options):
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
state.AcceleratorState.__init__ = start
"""
# The trainer of torchtitan needs an accelerator; its parser and its container do not.
TORCHTITAN = """
import sys, torch
from torch.distributed.fsdp import fully_shard
from torchtitan.config import ConfigManager
config = ConfigManager().parse_args(["--module", "block", "--config", "llama3_8b_adafactor"])
if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    model = torch.nn.Linear(64, 64)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    container = config.optimizer.build(model_parts=[model])
    model(torch.ones(1, 64)).sum().backward()
    container.step()
    container.load_state_dict(container.state_dict())
    [optimizer] = container
    assert type(optimizer).__name__ == "Adafactor" and int(optimizer.state[model.weight]["step"]) == 1
    torch.distributed.destroy_process_group()
"""


def run(folder: Path, *command: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize(("package", "block"), BLOCKS, ids=[package or "torch" for package, _ in BLOCKS])
def test_the_page_s_code_runs_on_two_ranks(package: str, block: str, tmp_path: Path):
    for needed in filter(None, (package, "triton" if package == "torchtitan" else "")):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs the package {needed}")
    (tmp_path / "block.py").write_text((ACCELERATE if package == "accelerate" else "") + block)
    script = "block.py"
    if package == "torchtitan":
        script = "titan.py"
        (tmp_path / script).write_text(TORCHTITAN)
    run(tmp_path, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs the package accelerate")
def test_accelerate_takes_the_page_s_config_file(tmp_path: Path):
    [config] = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for package, block in BLOCKS if package == "accelerate"]
    block = re.sub(r"^plugin = .*?^\)\n", "", block, flags=re.MULTILINE | re.DOTALL)
    block = block.replace("fsdp_plugin=plugin", "")
    (tmp_path / "fsdp2.yaml").write_text(config)
    (tmp_path / "block.py").write_text(ACCELERATE + block + "\nassert accelerator.is_fsdp2\n")
    launch = ("accelerate.commands.launch", "--config_file", "fsdp2.yaml", "--num_processes", "2")
    run(tmp_path, *launch, "block.py", ACCELERATE_USE_CPU="true")
