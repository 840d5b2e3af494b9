"""The code of the page about the Hub runs against the loopback Hub."""

from __future__ import annotations

import re
from pathlib import Path

from hub.hub_client import HubClient
from hub.hub_server import WRITER, HubServer

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"

SETUP = """
import os
from torch.utils.data import DataLoader, Subset, TensorDataset
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.data import digits

os.environ["HF_TOKEN"] = token
os.chdir(folder)
data = digits("train")
train = DataLoader(Subset(data, range(32)), batch_size=32)
defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
defense.harden(train, HardenConfig(epochs=1, steps=1), progress=False)
defense.fit_benign(train, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
defense.save_pretrained("my-model")
other_loader = DataLoader(TensorDataset(data.images[:32], data.labels[:32] % 2), batch_size=32)
"""

CHECK = """
import torch
os.environ.pop("HF_TOKEN")
same = torch.equal(whole.predict_proba(data.images[:8]), defense.predict_proba(data.images[:8]))
result = {"same": same, "classes": whole.num_classes, "encoder": str(encoder.spec)}
"""


def test_the_page_runs_as_it_stands(hub: HubServer, lfs: HubClient, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    result = lfs.run("\n".join([SETUP, *blocks, CHECK]), folder=str(tmp_path), token=WRITER)
    assert result == {"same": True, "classes": 2, "encoder": "zepad:digits-barlow-twins"}
    assert hub.repos["alice/hardened"].private
    assert set(hub.files("alice/parity")) == {"config.json", "README.md", "heads.safetensors"}
