"""The public encoders that the benchmarks defend, and where each comes from.

    python benchmarks/public_encoders.py            # print the table
    python benchmarks/public_encoders.py --fetch    # download every file and compare its digest

All are residual networks for CIFAR-10 by Yerlan Idelbayev, trained *with labels* on all 50,000 training images. The
files lie in the repository akamaster/pytorch_resnet_cifar10, under the BSD-2-Clause licence. Each address is pinned to
one commit, and a file is opened only if its SHA-256 digest is the one written here. The digests were computed from the
files of that commit; the address itself was not downloaded from when this table was written.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zepad import Encoder, Preprocessing

_COMMIT = "d5489e8995e81e91ce6b1d69dcc98ad579b0b153"
_FOLDER = f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/{_COMMIT}/pretrained_models"


@dataclass(frozen=True, kw_only=True)
class PublicEncoder:
    """One encoder: its architecture, and the files its weights can be read from.

    Attributes:
        depth: Number of layers of the residual network, 6n + 2.
        url: Address of the published checkpoint.
        sha256: Digest of the published checkpoint.
        mirror: File name below `encoders/` of a local mirror, a safetensors file with the same tensors.
        mirror_sha256: Digest of the mirror's file.
        test_error: Error on the CIFAR-10 test images in per cent, as its author states it.
        licence: SPDX name of the licence.
    """

    depth: int
    url: str
    sha256: str
    mirror: str
    mirror_sha256: str
    test_error: float
    licence: str = "BSD-2-Clause"


PUBLIC_ENCODERS = {
    "cifar-resnet20": PublicEncoder(
        depth=20,
        url=f"{_FOLDER}/resnet20-12fca82f.th",
        sha256="12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        mirror="cifar_resnet20_supervised.safetensors",
        mirror_sha256="69110ab354ab4302f0ec332b097b5620d4e0bc136ea607e035b883f09dc9e736",
        test_error=8.27,
    ),
    "cifar-resnet32": PublicEncoder(
        depth=32,
        url=f"{_FOLDER}/resnet32-d509ac18.th",
        sha256="d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
        mirror="cifar_resnet32_supervised.safetensors",
        mirror_sha256="8a68a4b89bfa3aebdf47824dd9d24600afab73d170560e535964e4e32963ebb5",
        test_error=7.37,
    ),
    "cifar-resnet44": PublicEncoder(
        depth=44,
        url=f"{_FOLDER}/resnet44-014dd654.th",
        sha256="014dd6541728a1c700b1642ab640e211dc6eb8ed507d70697458dc8f8a0ae2e4",
        mirror="cifar_resnet44_supervised.safetensors",
        mirror_sha256="ee95e5032b855579c26368388f2dbeeaa40a780814d6efa24e2db7a678a05db4",
        test_error=6.90,
    ),
    "cifar-resnet56": PublicEncoder(
        depth=56,
        url=f"{_FOLDER}/resnet56-4bfd9763.th",
        sha256="4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        mirror="cifar_resnet56_supervised.safetensors",
        mirror_sha256="69ee6cdc3aa122040568d0d78aa2d757a5842dcaf552d5b0dfb7d2f0c798254f",
        test_error=6.61,
    ),
}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters.

    Where the block halves the image, the shortcut takes every second pixel and pads the new channels with zeros
    (option A of He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2).
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels_in, H, W)` to `(N, channels, H / stride, W / stride)`."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 1:
            return F.relu(residual + x)
        before = self.new_channels // 2
        # This pooling takes every second pixel. The gradient of a slice would leave the memory format of the others,
        # and each sum further down would then convert one of its two terms.
        shortcut = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(residual + shortcut)


class CifarResNet(nn.Module):
    """The residual network for 32x32 images without its classifier: normalised images to 64 features."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, 3, 32, 32)` to `(N, 64)`."""
        # The layers keep this memory format, in which the convolutions of a processor are faster.
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return F.avg_pool2d(x, x.shape[-2:]).flatten(1)


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def load_public(name: str, shared: Path | None = None) -> Encoder:
    """Return a public encoder, which takes raw images `(N, 3, 32, 32)` in [0, 1].

    Args:
        name: A key of `PUBLIC_ENCODERS`.
        shared: Local mirror that has the files below `encoders/`; None downloads the published checkpoint once and
            keeps it in torch.hub's folder.

    Raises:
        ValueError: If a file is not the one that the table names.
        OSError: If the file is missing, or cannot be downloaded.
    """
    entry = PUBLIC_ENCODERS[name]
    model = CifarResNet(entry.depth)
    model.load_state_dict(_mirrored(entry, shared) if shared is not None else _published(entry))
    return Encoder(model, preprocessing=Preprocessing.imagenet(size=(32, 32))).eval()


def _mirrored(entry: PublicEncoder, shared: Path) -> dict[str, Tensor]:
    file = shared / "encoders" / entry.mirror
    check_digest(file, entry.mirror_sha256)
    return _without_classifier(load_file(file))


def _published(entry: PublicEncoder) -> dict[str, Tensor]:
    file = fetch(entry.url, entry.sha256, Path(torch.hub.get_dir()) / "checkpoints")
    weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    return _without_classifier({key.removeprefix("module."): tensor for key, tensor in weights.items()})


def _without_classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.startswith("linear.")}


def fetch(url: str, sha256: str, folder: Path) -> Path:
    """Return the file of an address, downloaded into a folder unless it is there already.

    A file whose digest is another one is never kept.

    Raises:
        ValueError: If the address delivers another file.
        OSError: If nothing can be downloaded.
    """
    file = folder / url.rpartition("/")[2]
    if file.exists() and digest(file) != sha256:
        file.unlink()
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256, progress=False)
        except RuntimeError as error:  # the digest differs
            raise ValueError(f"{url} is not the file that was expected: {error}") from error
    return file


def check_digest(file: Path, sha256: str) -> None:
    """Refuse a file whose digest is another one.

    Raises:
        ValueError: If the digest differs.
        OSError: If the file is missing.
    """
    found = digest(file)
    if found != sha256:
        raise ValueError(f"{file} has SHA-256 {found}, expected {sha256}. Delete it, or get it again.")


def digest(file: Path) -> str:
    """Return the SHA-256 digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="download every file and compare its digest")
    options = parser.parse_args()
    print("| name | parameters | test error, % | licence | SHA-256 |\n|---|---|---|---|---|")
    for name, entry in PUBLIC_ENCODERS.items():
        parameters = sum(p.numel() for p in CifarResNet(entry.depth).parameters())
        print(f"| [{name}]({entry.url}) | {parameters:,} | {entry.test_error} | {entry.licence} | {entry.sha256} |")
        if options.fetch:
            load_public(name)


if __name__ == "__main__":
    main()
