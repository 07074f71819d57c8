"""The way of docs/howto/cluster.md for strategies that the callbacks refuse: cut first, then train that."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

import lightning_prehab as lp
from lightning_prehab.callbacks._trainer import check_strategy

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "cluster.md"
SCRIPT = re.search(r'^```python title="two_phases.py"\n(.*?)^```$', PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)[1]
#: The second phase of the page's program, on one process or sharded on two; prints the matrices of its end.
SECOND = """
import sys

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import RandomDataset
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_phases import Model


class Sharded(Model):
    def configure_model(self):
        super().configure_model()
        if self.device_mesh is not None:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


processes, where = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
data = torch.utils.data.DataLoader(RandomDataset(32, 256), batch_size=256 // processes)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if processes == 2 else "auto"
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(accelerator="cpu", devices=processes, strategy=strategy, max_epochs=3, **quiet)
model = Sharded()
trainer.fit(model, data)
if processes == 2:
    model.layer.reshard()  # after its last forward pass it holds whole weights
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
if trainer.is_global_zero:
    torch.save(state, where)
"""


@pytest.mark.ddp
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="FSDP2 on the CPU needs torch 2.10"
)
def test_what_was_cut_before_trains_sharded_as_on_one_process(tmp_path, monkeypatch):
    (tmp_path / "two_phases.py").write_text(SCRIPT)
    (tmp_path / "second.py").write_text(SECOND)
    monkeypatch.chdir(tmp_path)
    program = {"__name__": "two_phases"}
    exec(compile(SCRIPT, "two_phases.py", "exec"), program)
    program["compress"]()
    start = lp.load_compressed("small", program["make_net"]()).state_dict()
    ends = []
    for processes in (1, 2):
        run = subprocess.run(
            [sys.executable, "second.py", str(processes), f"{processes}.pt"],
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        ends.append(torch.load(f"{processes}.pt", weights_only=True))
    assert ends[0].keys() == ends[1].keys() == {f"layer.{name}" for name in start}
    assert any(name.endswith("A.weight") for name in start)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(tensor, start[name.removeprefix("layer.")], atol=1e-4), name


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_the_refusal_names_the_page(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(lp.PrehabError, match=r"two phases: .* docs/howto/cluster\.md shows how"):
        check_strategy(trainer, lp.CompressionCallback(1))
    assert "## Two phases: FSDP1, DeepSpeed\n" in PAGE.read_text()
