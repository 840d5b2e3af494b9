"""What each process of test_distributed runs: a deterministic training with accumulation, a tracker and a stop."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from test_training_accumulation import RECIPE, Smooth
from tiny import toy_data
from zepad import HardenConfig
from zepad.training import Callback, StopTraining, Tracker, TrainingStatus, harden_branch


class Stop(Callback):
    """Stops after the second epoch, and keeps on which process it was called."""

    def __init__(self) -> None:
        self.called = False

    def on_epoch_end(self, status: TrainingStatus) -> None:
        self.called = True
        if status.epoch == 2:
            raise StopTraining


def train(out: Path) -> None:
    """Write the weights and the TensorBoard files of the training to a folder, one of weights for each process."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(toy_data(20, size=8)[0]), batch_size=4, shuffle=True)
    config = HardenConfig(epochs=4, gradient_accumulation_steps=2, val_fraction=0, precision="fp32")
    stop = Stop()
    with Tracker("tensorboard", out) as tracker:
        told = {"progress": False, "callbacks": [stop, tracker]}
        branch, history = harden_branch(Smooth(), loader, config, objective=RECIPE, **told)
    state = PartialState()
    assert len(history["hardening"]) == 2
    assert stop.called == state.is_main_process
    out.mkdir(exist_ok=True)
    weights = {name: value.contiguous() for name, value in branch.state_dict().items()}
    save_file(weights, out / f"{state.num_processes}-{state.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
