"""Export of a fitted defense, or of one encoder, to a file that runs without this library."""

from __future__ import annotations

import importlib
import io
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .._version import __version__
from ..config import require
from ..detectors import DetectorInputs, FittedDetector
from ..encoders import Encoder
from ..errors import CheckpointError, ConfigError, InputError, ZePADError
from ..files import flush, require_replaceable, write_bytes
from ..finite import check_finite
from ..fusion import AveragingRule, FusionRule
from ..modes import evaluating
from .weights import tensors_of

METADATA_FILE = "zepad.json"
"""File inside a `.pt2` that holds, as JSON, what an `.onnx` has in its `metadata_props`."""


class Exportable(Protocol):
    """The attributes of a fitted defense that an export needs; a `ZePAD` has them."""

    fusion: FusionRule
    channels: int
    class_names: tuple[str, ...] | None
    detector: FittedDetector
    threshold: float | None

    def detector_inputs(self, images: Tensor) -> DetectorInputs:
        """Return what fusion and detector look at."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the module and all its parts."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""


class _Deployed(nn.Module):
    """The outputs of a defense by name, as one graph. It returns a dict, since `.pt2` files know no types of ours."""

    def __init__(self, defense: Exportable) -> None:
        super().__init__()
        self.defense = defense
        self.names = ["logits", "probabilities"]
        if isinstance(defense.fusion, AveragingRule):
            self.names.append("weights")
        if defense.detector.is_fitted:
            self.names.append("detection_score")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        inputs = self.defense.detector_inputs(images)
        logits = self.defense.fusion(inputs.logits)
        outputs = {"logits": logits, "probabilities": logits.softmax(dim=-1)}
        weights = self.defense.fusion.weights(inputs.logits)
        if weights is not None:
            outputs["weights"] = weights.T  # transposed, because servers split batches along the first axis
        if self.defense.detector.is_fitted:
            outputs["detection_score"] = self.defense.detector(inputs)
        return outputs


class _Features(nn.Module):
    """The output of one encoder by its name."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = ["features"]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.encoder(images)}


def export_model(defense: Exportable, path: str | Path, *, image_size: tuple[int, int] | None = None) -> Path:
    """Write a fitted defense, resize and normalisation included, to one file that runs without zepad.

    The graph maps `images`, float32 `(N, C, H, W)` in [0, 1] for any N from 1 on, to `logits (N, K)`,
    `probabilities (N, K)`, the `weights (N, B)` of the branches (victim, auxiliary, benign) where the fusion rule has
    any, and the `detection_score (N,)` unless the detector must still be calibrated; an image is suspicious where that
    exceeds the threshold. Pixel values are not checked. Library, version, class names and threshold are stored in the
    `metadata_props` of an `.onnx` and in the extra file `zepad.json` of a `.pt2`.

    * An `.onnx` runs in any runtime that has the antialiased Resize of opset 18, where an encoder resizes. The weights
      are inside. One such file ends at 2 GB, so that weights beyond 1.5 GB lie beside it in a file of the same name
      with `.data` appended, or with `.2` before the suffix where that would replace those of an older graph, which is
      deleted once the new one is whole: keep the two together.
    * A `.pt2` is loaded by `torch.export.load(path).module()`, which returns a dict, on the device where the defense
      is now.

    Args:
        defense: The fitted defense. It is not changed.
        path: Path with the suffix `.onnx` or `.pt2`. An older file is replaced once the new one is whole.
        image_size: `(height, width)` of the images that the graph takes. None takes the size that the encoders state;
            images of another size are resized inside the graph.

    Returns:
        The path of the file.

    Raises:
        ConfigError: If suffix or size are invalid, no size is known, or the packages for ONNX are missing.
        StageError: If the defense is not fitted.
        InputError: If an encoder does not take images of that size, cannot be written as a graph, or an output is not
            finite.
        CheckpointError: If the file cannot be written.
    """
    path = _checked_path(path, tuple(_WRITERS))
    size = _known_size(defense) if image_size is None else _checked_size(image_size)
    facts = {
        "class_names": json.dumps(defense.class_names, ensure_ascii=False),
        "threshold": json.dumps(None if defense.threshold is None else float(defense.threshold)),
    }
    return _write_graph(_Deployed(defense), path, defense.channels, size, facts)


def export_encoder(
    encoder: Encoder, path: str | Path, *, channels: int, image_size: tuple[int, int] | None = None
) -> Path:
    """Write one encoder to a file that is used without zepad.

    * An `.onnx` or `.pt2` holds resize, normalisation, backbone and pooling as one graph, from `images`, float32
      `(N, C, H, W)` in [0, 1], to `features (N, D)`, as `export_model` describes it.
    * A `.safetensors` holds the weights of the backbone alone, under the names that its own library gives them, so that
      `load_state_dict` takes them. Its metadata say in `spec` where the backbone comes from, and in `preprocessing`,
      as JSON, the resize and normalisation of the images that the backbone must be given.

    Args:
        encoder: The encoder. It is not changed.
        path: Path with the suffix `.onnx`, `.pt2` or `.safetensors`. An older file is replaced once the new one is
            whole.
        channels: Number of channels of the images.
        image_size: `(height, width)` of the images that a graph takes. None takes the encoder's input size.

    Returns:
        The path of the file.

    Raises:
        ConfigError: If suffix or size are invalid, no size is known, or the packages for ONNX are missing.
        InputError: If the encoder does not take images of that size, cannot be written as a graph, or a feature is not
            finite.
        CheckpointError: If the file cannot be written, or a weight is not finite.
    """
    path = _checked_path(path, (*_WRITERS, ".safetensors"))
    facts = {
        "spec": str(encoder.spec),
        "pooling": json.dumps(encoder.pooling),
        "preprocessing": json.dumps(encoder.preprocessing.to_dict()),
    }
    if path.suffix != ".safetensors":
        size = _known_size(encoder) if image_size is None else _checked_size(image_size)
        return _write_graph(_Features(encoder), path, channels, size, facts)
    require(image_size is None, "image_size", image_size, "None for a file of weights, which holds no graph")
    content = save(tensors_of("the encoder", encoder.backbone), metadata={**_ORIGIN, **facts})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Choose a writable path.") from error
    return path


_ORIGIN = {"library": "zepad", "version": __version__}


def _checked_path(path: str | Path, suffixes: Sequence[str]) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise ConfigError(f"path must end in {' or '.join(suffixes)}; got {str(path)!r}. The suffix names the format.")
    if path.suffix == ".onnx":
        _require_onnx()
    return path


def _write_graph(
    graph: _Deployed | _Features, path: Path, channels: int, size: tuple[int, int], facts: Mapping[str, str]
) -> Path:
    weight = next(graph.parameters(), None)
    # Two images, because a graph that is traced with one image may be specialised to a batch size of one.
    images = torch.full((2, channels, *size), 0.5, device=None if weight is None else weight.device)
    program = _trace(graph, images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(path)
        older = _data_files(path) if path.suffix == ".onnx" else set()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            _WRITERS[path.suffix](program, Path(folder) / _new_name(path, older), {**_ORIGIN, **facts}, graph.names)
            _put_in_place(Path(folder), path, older)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Choose a writable path.") from error
    return path


def _put_in_place(folder: Path, path: Path, older: Collection[str]) -> None:
    """Move a graph, and the weights beside it where there are any, from a folder into the place of an older one."""
    files = sorted(folder.iterdir(), reverse=True)  # the graph comes last, since it names its weights
    for file in files:
        flush(file)
    for file in files:
        file.replace(path.parent / file.name if file.suffix == ".data" else path)
        flush(path.parent)
    for name in {*older} - {file.name for file in files}:
        (path.parent / name).unlink(missing_ok=True)


def _new_name(path: Path, older: Collection[str]) -> str:
    """Return a name whose `.data` file is not one of the older graph, which stays whole until the new one is there."""
    return path.name if f"{path.name}.data" not in older else f"{path.stem}.2{path.suffix}"


def _data_files(path: Path) -> set[str]:
    """Return the names of the files beside an older graph that hold its weights."""
    names = {f"{path.name}.data", f"{path.stem}.2{path.suffix}.data"}
    if not (path.is_file() and any((path.parent / name).exists() for name in names)):
        return set()
    try:
        graph = importlib.import_module("onnx").load(path, load_external_data=False).graph
    except importlib.import_module("google.protobuf.message").DecodeError:  # some other file
        return set()
    stated = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return stated & names


def _require_onnx() -> None:
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ConfigError(f"ONNX cannot be written: {error}. Install it with: pip install 'zepad[onnx]'.") from error


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    pair = isinstance(size, (tuple, list)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    require(pair, "image_size", size, "a pair of positive integers (height, width), or None")
    return size


def _known_size(defense: Exportable | Encoder) -> tuple[int, int]:
    sizes = {
        size
        for part in defense.modules()
        if isinstance(part, Encoder) and (size := part.preprocessing.size) is not None
    }
    if len(sizes) != 1:
        stated = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)) or "none"
        raise ConfigError(
            f"the graph is made for images of one size; of the encoders' own there must be one, got {stated}. "
            "Say how large the images to come are: image_size=(height, width)."
        )
    return sizes.pop()


def _trace(graph: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with evaluating(graph):
        try:
            with torch.no_grad():
                # This distinguishes images that do not fit from models that cannot be exported.
                for name, values in graph(images).items():
                    check_finite(values, name)
        except ZePADError:
            raise
        except Exception as error:
            raise InputError(
                f"the encoders do not take images of shape {tuple(images.shape)}: {_brief(error)}. "
                "Pass another image_size=(height, width)."
            ) from error
        try:
            return torch.export.export(
                graph, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=False
            )
        except Exception as error:
            raise InputError(
                f"an encoder cannot be written as a graph for batches of any size: {_brief(error)}. "
                "torch.export must be able to trace it."
            ) from error


def _brief(error: BaseException) -> str:
    while error.__cause__ is not None:  # exporters wrap the original error in pages of advice
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], outputs: list[str]
) -> None:
    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes={"images": {0: "batch"}},  # names the dynamic axis, which the exported program already has
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"an encoder cannot be expressed in ONNX: {_brief(error)}. Export a .pt2 instead.") from error
    assert onnx_program is not None  # None is returned only without dynamo
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path)


def _write_pt2(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: dict[str, str],
    outputs: list[str],  # noqa: ARG001 - the program knows its names itself
) -> None:
    content = io.BytesIO()  # not the file, since PyTorch ends the process where a write fails, as on a full disk
    torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(metadata)})
    path.write_bytes(content.getbuffer())


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}
