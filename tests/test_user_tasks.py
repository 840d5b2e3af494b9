"""What people want to do, in at most five lines each: their inputs times the frameworks that they use."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD
from zepad.objectives import benign_recipe

CLASSES = ("blue", "green", "red")
QUICK = {"config": HardenConfig(epochs=1, steps=1), "progress": False}
QUICK_BENIGN = {"config": BenignConfig(epochs=1), "head_config": HeadConfig(epochs=3), "progress": False}

BEFORE = """
import csv, io
from pathlib import Path
import numpy as np, torch, zepad
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor
from zepad import ZePAD
"""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: What the user wants.
        code: The user's code, with `defense`, a fitted defense of the classes blue, green and red; `QUICK` and
            `QUICK_BENIGN`, short settings of training; `photo.png`, which is red; and `photos/CLASS/*.png`.
        outcome: Expression that must be true afterwards.
        needs: Package that the task needs besides those of the library.
    """

    name: str
    code: str
    outcome: str
    needs: str | None = None

    @property
    def lines(self) -> list[str]:
        """The lines that are not blank."""
        return [line for line in self.code.splitlines() if line.strip()]


TASKS = [
    Task(
        "classify a PIL image",
        """
image = Image.open("photo.png")
name = defense.class_names[defense.predict(image)]
""",
        'name == "red"',
    ),
    Task(
        "probabilities of a NumPy array",
        """
pixels = np.asarray(Image.open("photo.png"))
probabilities = defense.predict_proba(pixels)
""",
        "probabilities.shape == (3,) and probabilities.argmax() == 2",
    ),
    Task(
        "ask whether a file looks attacked",
        """
if not defense.detect("photo.png"):
    verdict = "fine"
""",
        'verdict == "fine"',
    ),
    Task(
        "read what every branch says of a file",
        """
report = defense.inspect("photo.png")
text = str(report)
""",
        'text.startswith("red (") and "benign" in text',
    ),
    Task(
        "classify a folder of photos of several sizes",
        """
paths = sorted(Path("photos").rglob("*.png"))
labels = defense.predict(paths)
names = [defense.class_names[label] for label in labels]
""",
        "names == [path.parent.name for path in paths] and len({Image.open(path).size for path in paths}) == 2",
    ),
    Task(
        "write the answers on a folder to a CSV file",
        """
paths = sorted(Path("photos").rglob("*.png"))
report = defense.inspect(paths)
rows = zip(paths, map(report.name, report.labels), report.flagged.tolist())
with open("answers.csv", "w", newline="") as file:
    csv.writer(file).writerows(rows)
""",
        'Path("answers.csv").read_text().count("red") == 2 * 12',
    ),
    Task(
        "classify what torchvision decodes",
        """
from torchvision.transforms.functional import pil_to_tensor
label = defense.predict(pil_to_tensor(Image.open("photo.png")))
""",
        "label == 2",
    ),
    Task(
        "the accuracy on an ImageFolder",
        """
from zepad.evaluation import accuracy
data = ImageFolder("photos", lambda path: ToTensor()(path.resize((16, 16))))
found = accuracy(defense, DataLoader(data, batch_size=8))
""",
        "found.rate == 1 and found.total == 36",
    ),
    Task(
        "classify what a loader of dicts yields",
        """
images = [{"image": ToTensor()(Image.open("photo.png")), "id": 7}]
labels = defense.predict(DataLoader(images))
""",
        "labels.tolist() == [2]",
    ),
    Task(
        "fit heads for a Hugging Face data set",
        """
import datasets
data = datasets.load_dataset("imagefolder", data_dir="photos", split="train", cache_dir="cache")
data = data.map(lambda row: {"image": row["image"].resize((16, 16))}).with_format("torch")
defense.fit_heads(DataLoader(data, batch_size=8, shuffle=True), progress=False)
""",
        'defense.class_names == ("blue", "green", "red") and defense.predict("photo.png") == 2',
        "datasets",
    ),
    Task(
        "train on a Hugging Face data set with columns of other names",
        """
import datasets
rows = {"img": [Image.open("photo.png").convert("RGB")] * 8, "fine_label": [0, 1] * 4}
data = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()).with_format("torch")
loader = zepad.data.columns(DataLoader(data, batch_size=4), image="img", label="fine_label")
defense.harden(loader, **QUICK)
""",
        'defense.stage == "hardened" and defense.num_classes == 2',
        "datasets",
    ),
    Task(
        "calibrate on a list of files",
        """
paths = sorted(Path("photos").rglob("*.png"))
defense.calibrate(paths, fpr=0.1)
flagged = defense.detect(paths)
""",
        "flagged.float().mean() <= 0.1",
    ),
    Task(
        "defend two timm models",
        """
import timm
victim, auxiliary = timm.create_model("test_resnet"), timm.create_model("test_convnext")
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((32, 32)))), batch_size=12)
own = ZePAD.from_encoders(victim, auxiliary).harden(loader, **QUICK).fit_benign(loader, **QUICK_BENIGN)
answers = own.predict("photo.png")
""",
        "answers.shape == ()",
        "timm",
    ),
    Task(
        "defend two torchvision models",
        """
from torchvision.models import mobilenet_v3_small, resnet18
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((32, 32)))), batch_size=12)
size = zepad.Preprocessing.imagenet(size=(32, 32))
own = ZePAD.from_encoders(resnet18(num_classes=8), mobilenet_v3_small(num_classes=8), preprocess=size)
own.harden(loader, **QUICK).fit_benign(loader, **QUICK_BENIGN)
""",
        'own.predict_proba("photo.png").shape == (3,)',
    ),
    Task(
        "defend two vision transformers of transformers",
        """
from transformers import ViTConfig, ViTModel
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((16, 16)))), batch_size=12)
own = ZePAD.from_encoders(ViTModel(config), ViTModel(config))
own.harden(loader, **QUICK).fit_benign(loader, **QUICK_BENIGN)
""",
        'own.predict(["photo.png"]).shape == (1,)',
        "transformers",
    ),
    Task(
        "defend an image tower of open_clip",
        """
import open_clip
tower = open_clip.model.VisionTransformer(16, 8, 8, 1, 1, 4.0, output_dim=8)
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((16, 16)))), batch_size=12)
own = ZePAD.from_encoders(tower, ENCODER, preprocess=zepad.Preprocessing.imagenet(size=(16, 16)))
own.harden(loader, **QUICK).fit_benign(loader, **QUICK_BENIGN)
""",
        'own.predict(Image.open("photo.png")).shape == ()',
        "open_clip",
    ),
    Task(
        "preprocess with an image processor of transformers",
        """
from transformers import ViTImageProcessor
processor = ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False)
label = defense.predict(processor(Image.open("photo.png"), return_tensors="pt"))
""",
        "label.tolist() == [2]",
        "transformers",
    ),
    Task(
        "compile the defense",
        """
compiled = torch.compile(defense, backend="aot_eager")
images = torch.stack([ToTensor()(Image.open("photo.png"))] * 4)
labels = compiled(images).argmax(dim=1)
""",
        "labels.tolist() == [2] * 4",
    ),
    Task(
        "run the defense in ONNX Runtime",
        """
import onnxruntime
session = onnxruntime.InferenceSession(defense.export("defense.onnx"))
images = ToTensor()(Image.open("photo.png"))[None].numpy()
logits, *_ = session.run(None, {"images": images})
""",
        "logits.argmax() == 2",
        "onnxscript",
    ),
    Task(
        "run one hardened encoder in ONNX Runtime",
        """
import onnxruntime
session = onnxruntime.InferenceSession(defense.export("victim.onnx", encoder="victim"))
images = ToTensor()(Image.open("photo.png"))[None]
(features,) = session.run(None, {"images": images.numpy()})
""",
        'torch.allclose(torch.from_numpy(features), defense.encoder("victim")(images), atol=1e-5)',
        "onnxscript",
    ),
    Task(
        "put the weights of a hardened encoder into one's own module",
        """
from safetensors.torch import load_file
path = defense.export("victim.safetensors", encoder="victim")
ENCODER.load_state_dict(load_file(path))
""",
        'torch.equal(ENCODER.conv.weight, defense.encoder("victim").backbone.conv.weight)',
    ),
    Task(
        "answer as a pipeline of transformers does",
        """
classify = zepad.pipeline("image-classification", model=defense)
best, *others = classify("photo.png", top_k=2)
""",
        'best["label"] == "red" and best["score"] > 0.5 and best["flagged"] is False and len(others) == 1',
    ),
    Task(
        "serve requests",
        """
def handler(body: bytes) -> dict:
    report = defense.inspect(Image.open(io.BytesIO(body)))
    return {"label": report.name(report.labels[0]), "flagged": bool(report.flagged[0])}
answer = handler(Path("photo.png").read_bytes())
""",
        'answer == {"label": "red", "flagged": False}',
    ),
    Task(
        "predict with Lightning",
        """
import pytorch_lightning as lightning
class Module(lightning.LightningModule):
    def predict_step(self, batch): return defense.predict(batch["image"])
trainer = lightning.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
labels = trainer.predict(Module(), DataLoader([{"image": ToTensor()(Image.open("photo.png"))}]))
""",
        "labels[0].tolist() == [2]",
        "pytorch_lightning",
    ),
    Task(
        "train one's own layer on a hardened encoder",
        """
model = nn.Sequential(defense.encoder("victim"), nn.LazyLinear(3))
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((16, 16)))), batch_size=12)
for images, labels in loader:
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
""",
        "model[1].weight.grad.any() and all(weight.grad is None for weight in model[0].parameters())",
    ),
    Task(
        "fit a classifier of scikit-learn on robust features",
        """
from sklearn.linear_model import LogisticRegression
loader = DataLoader(ImageFolder("photos", lambda image: ToTensor()(image.resize((16, 16)))), batch_size=36)
images, labels = next(iter(loader))
features = defense.encoder("victim")(images).numpy()
score = LogisticRegression(C=1e3, max_iter=1000).fit(features, labels).score(features, labels)
""",
        "score > 0.9",
    ),
    Task(
        "attack with ART",
        """
from art.attacks.evasion import FastGradientMethod
classifier = zepad.attacks.art_classifier(defense, num_classes=3, image_shape=(3, 16, 16))
images = ToTensor()(Image.open("photo.png"))[None].numpy()
attacked = FastGradientMethod(classifier, eps=8 / 255).generate(images)
""",
        "0 < abs(attacked - images).max() <= 8.001 / 255",
        "art",
    ),
    Task(
        "attack with Foolbox",
        """
import foolbox
model = zepad.attacks.foolbox_model(defense)
images = ToTensor()(Image.open("photo.png"))[None]
_, attacked, _ = foolbox.attacks.LinfPGD(steps=2)(model, images, defense.predict(images), epsilons=8 / 255)
""",
        "0 < (attacked - images).abs().max() <= 8.001 / 255",
        "foolbox",
    ),
    Task(
        "save, load in half precision and predict",
        """
defense.save_pretrained("saved")
half = ZePAD.from_pretrained("saved", dtype=torch.bfloat16, victim=ENCODER, auxiliary=ENCODER)
label = half.predict("photo.png")
""",
        'label == 2 and next(half.encoder("victim").parameters()).dtype == torch.bfloat16',
    ),
]


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> tuple[ZePAD, Path]:
    """A defense that knows red, green and blue, and a folder of photos of these colours, half of them enlarged."""
    folder = tmp_path_factory.mktemp("user")
    images, labels = toy_data(36)
    labels = 2 - labels  # the first channel is red, the last of the names
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        path = folder / "photos" / CLASSES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture if index % 2 else picture.resize((32, 24), Image.Resampling.NEAREST)).save(path)
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / "photo.png")
    torch.manual_seed(1)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preprocess=Preprocessing(size=(16, 16)))
    loader = DataLoader(torch.utils.data.TensorDataset(*toy_data(96)[:1], 2 - toy_data(96)[1]), batch_size=16)
    defense.harden(loader, HardenConfig(epochs=12, steps=1, eps=2 / 255), progress=False)
    config = {"objective": benign_recipe(), "head_config": HeadConfig(epochs=60), "progress": False}
    defense.fit_benign(loader, BenignConfig(epochs=24), **config)
    defense.class_names = CLASSES
    return defense.calibrate(toy_data(96, seed=5)[0], fpr=0.05), folder


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_a_task_is_done_as_it_is_written(
    task: Task, defended: tuple[ZePAD, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if task.needs is not None:
        pytest.importorskip(task.needs)
    defense, folder = defended
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {
        "defense": copy.deepcopy(defense),
        "ENCODER": TinyEncoder(),
        "QUICK": QUICK,
        "QUICK_BENIGN": QUICK_BENIGN,
    }
    exec(BEFORE, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        exec(task.code, names)
        assert eval(task.outcome, names), task.outcome


def test_there_are_25_tasks_of_at_most_five_lines() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) >= 25
    for task in TASKS:
        assert 1 <= len(task.lines) <= 5, task.name
        assert all(len(line) <= 120 and ";" not in line for line in task.lines), task.name
