"""The facade: stages and delegation. The computations are done in other modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from . import training
from .arguments import checked
from .assembly import assemble
from .calibration import choose_abstention
from .config import BenignConfig, HardenConfig, HeadConfig, check_classes
from .detectors import Detector, DetectorInputs
from .encoders import Encoder, EncoderLike, Preprocessing
from .ensemble import device_of
from .errors import ConfigError, StageError
from .functional.precision import HALVES
from .fusion import FusionRule
from .history import TrainingHistory
from .inputs import check_form
from .modules import Branch
from .objectives import Objective, Recipe
from .persistence.contents import Home, SavedModel, describe_model
from .persistence.export import export_encoder, export_model
from .persistence.pretrained import Pretrained
from .presets import RECOMMENDED, Preset, find_preset
from .provenance import recorded
from .roles import RoleEnsemble, resolve_detector, resolve_rule
from .training.benign import was_frozen
from .training.callbacks import Callback
from .types import HARDENED_ROLES, MEMORY, REFERENCE, ROLES, Loader, Role, Stage
from .zero_shot import ZeroShotHead, check_heads

_ORIGINALS: dict[str, Role] = {REFERENCE: "victim", MEMORY: "benign"}  # whose public encoder, and text, it has
_NEXT_CALL = {"built": "harden(loader)", "hardened": "fit_benign(loader)", "fitted": "predict(images)"}


class ZePAD(
    RoleEnsemble,
    Pretrained,
    library_name="zepad",
    tags=["adversarial-robustness", "image-classification"],
    paper_url="https://arxiv.org/abs/2602.11204",
):
    """A defense of public image encoders: two hardened branches, a benign branch, and a fusion of the three.

    Build it with `from_encoders`, then call `harden` and `fit_benign`; or load it with `from_pretrained`. Images are
    always float `(N, C, H, W)` in [0, 1] and un-normalised: each encoder normalises them itself. Encoders are frozen
    and stay in evaluation mode, also after `train()`.

    Attributes:
        fusion: Fusion rule.
        detector: Detector with its fitted state.
        stage: Stage of the model: `"built"`, `"hardened"` or `"fitted"`.
        channels: Number of channels of the images.
        num_classes: Number of classes of the present task, or None before there is one.
        class_names: One name per class if the data set has names, or None.
        memory: The benign encoder as it was public, with a head, which joins the benign branch under the presets
            `"published"` and `"cautious"`; None under the others.
        abstain_above: Largest gap between restored and public features (`zepad.functional.restoration_gap`) at which
            the memory speaks or, under the preset `"private"` if the benign encoder stays as it is public, the benign
            branch; None lets it always speak. `harden` and `fit_benign` set it. It may be set to None.
        threshold: Threshold of the detection score. Before `calibrate` it is the first threshold of the detector, or
            None if the detector has none.
        provenance: Recipes, data sizes and results of the steps that led to the weights.

    Examples:
        >>> from torch.utils.data import DataLoader, Subset
        >>> from zepad import BenignConfig, HardenConfig, ZePAD
        >>> from zepad.data import digits
        >>> loader = DataLoader(Subset(digits("train"), range(260)), batch_size=130, shuffle=True)
        >>> defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
        >>> defense = defense.harden(loader, HardenConfig(epochs=1), progress=False)
        >>> defense = defense.fit_benign(loader, BenignConfig(epochs=1), progress=False)
        >>> defense.predict(digits("test").images[:8]).shape
        torch.Size([8])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204).
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        channels: int,
        features: Mapping[str, int],
        num_classes: int | None = None,
        fusion: FusionRule | str = "rfdm",
        detector: Detector | str = "gap",
        shared_architecture: Mapping[str, Role] | None = None,
    ) -> None:
        super().__init__(encoders, fusion=fusion, detector=detector)
        self.stage: Stage = "built"
        self.channels = channels
        self.num_classes = num_classes
        self._declared_classes = num_classes
        self._features = dict(features)
        self._shared_architecture = dict(shared_architecture or {})
        self._home: Home | None = None
        self.requires_grad_(False)
        self.eval()

    # building ---------------------------------------------------------------------------------------------------

    @classmethod
    @checked
    def from_encoders(
        cls,
        victim: EncoderLike,
        auxiliary: EncoderLike,
        *,
        benign: EncoderLike | None = None,
        preset: str = RECOMMENDED,
        num_classes: int | None = None,
        preprocess: Preprocessing | None = None,
        fusion: FusionRule | str | None = None,
        detector: Detector | str = "gap",
    ) -> ZePAD:
        """Build a defense around copies of public encoders.

        Args:
            victim: The public encoder to protect: any module from images to features, an `EncoderSpec`, or a spec
                string that names an encoder and its pre-trained weights (`"timm:resnet18"`). The classifier of a timm
                or torchvision model is removed in the copy.
            auxiliary: A second public encoder, preferably pre-trained by another method.
            benign: The encoder of the benign branch, which keeps the accuracy. None takes a copy of the auxiliary. The
                victim is never copied for it, because attacks are crafted on its weights.
            preset: How `harden` and `fit_benign` train and which fusion rule is used where nothing else is said, by the
                attacker that is feared: `"private"` for one who has the public encoders, `"published"` for one who has
                your hardened encoders too, `"cautious"` for one who repeats the training or knows the whole model;
                `"paper"` is the method of the paper at the paper's rates (`zepad.presets.PRESETS`).
            num_classes: Number of classes of the task; None takes it from the first loader.
            preprocess: Preprocessing of encoders that do not define their own; an `Encoder` keeps its own.
            fusion: Fusion rule: the name of a registered rule, such as `"bounded"`, or a rule with settings of your
                own, such as `zepad.fusion.Bounded(vote=1.0)`. None takes that of the preset, which may give a benign
                branch that was trained to resist another weight.
            detector: Detector: the name of a registered detector, such as `"features"`, or a detector object. The
                default is the paper's detector. For a detector that needs the undefended victim, a copy is kept.

        Returns:
            The model at stage `"built"`. Encoders in half precision are converted to float32.

        Raises:
            InputError: If an encoder cannot be copied or does not hold to what docs/encoders.md asks of one (its output
                is no feature tensor, random, without a gradient, not finite and so on), or the encoders take different
                images.
            ConfigError: If a spec or setting is malformed.
            HubError: If pre-trained weights cannot be downloaded.

        Warns:
            UserWarning: If an `Encoder` holds a timm or torchvision model with its classifier.
        """
        check_classes(num_classes)
        chosen = find_preset(preset)
        rule, scores = resolve_rule(chosen.fusion if fusion is None else fusion), resolve_detector(detector)
        keeps_victim = chosen.keeps_victim or scores.needs_reference()
        parts = assemble(
            victim,
            auxiliary,
            benign,
            preprocess=preprocess,
            with_reference=keeps_victim,
            with_memory=chosen.remembers,
        )
        model = cls(
            parts.encoders,
            channels=parts.channels,
            features=parts.features,
            num_classes=num_classes,
            fusion=rule,
            detector=scores,
            shared_architecture=parts.shared_architecture,
        )
        stated = {name: "own" for name, value in {"benign": benign, "fusion": fusion}.items() if value is not None}
        known = {"encoders": parts.origins, "preset": {"name": preset, **stated}}
        model.provenance = {name: value for name, value in known.items() if value}
        return model

    @property
    def preset(self) -> Preset:
        """How `harden` and `fit_benign` train where nothing else is said.

        Raises:
            ConfigError: If the model was saved with a preset that this version does not have.
        """
        return find_preset(self.provenance.get("preset", {}).get("name", RECOMMENDED))

    # training ---------------------------------------------------------------------------------------------------

    @property
    def history(self) -> TrainingHistory:
        """What training measured: a sequence of one record per epoch, which becomes a data frame or a picture.

        Raises:
            CheckpointError: If the model was loaded and its provenance is not as zepad writes it.
        """
        return TrainingHistory.of(self.provenance)

    @checked
    def harden(
        self,
        loader: Loader,
        config: HardenConfig | None = None,
        *,
        objective: Objective | Recipe | None = None,
        zero_shot: Mapping[str, ZeroShotHead] | None = None,
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        bank_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> ZePAD:
        """Adversarially fine-tune the victim and the auxiliary encoder (multi-pattern adversarial enhancement, MPAE).

        The model is modified only after both encoders are trained; an error leaves it unchanged. The logger `zepad`
        reports at level INFO what each branch reached on held-out images, and `provenance["harden"]["outcome"]` records
        it beside the accuracy of a linear probe on the public encoder.

        Args:
            loader: Loader of `(images, labels)`, images float `(N, C, H, W)` in [0, 1]. Labels are not needed with
                `objective=fare()` or `restoration()`, nor with `zero_shot` heads, which then predict them.
            config: Learning rates, number of epochs and attack budget. None takes those of the preset.
            objective: A recipe of `zepad.objectives` such as `trades(beta=6)`, or a plain function from branch and
                batch to an `ObjectiveOutput`. None takes that of the preset.
            zero_shot: Zero-shot heads of victim and auxiliary, used in place of trained ones and kept fixed. Images
                without labels are labelled by the averaged zero-shot predictions of the public encoders.
            val_loader: Loader for choosing the best epoch; None holds out a part of `loader` if it can be split.
            checkpoint_dir: Folder for checkpoints of the newest epochs of each encoder, or None for no checkpoints.
            bank_dir: Folder where adversarial examples of the public encoders are kept and found again, for an
                objective such as `restoration()` that trains on them; None keeps them for this call alone.
            resume: Whether to resume from `checkpoint_dir`; the result equals that of an uninterrupted run.
            progress: Whether to show progress bars with loss, accuracies and the time left.
            callbacks: Objects that are told of every stage, update and epoch and may end a stage early, such as
                `zepad.training.Tracker("tensorboard", "runs")` (docs/training.md).

        Returns:
            The model itself at stage `"hardened"`, on the device of the training. Heads of an earlier task are removed.
            Call `fit_benign` next, or `fit_zero_shot` for a zero-shot classifier.

        Raises:
            ConfigError: If `zero_shot` heads do not fit the encoders.
            InputError: If a batch is malformed, the loader is empty, or the folder cannot be written.
            TrainingError: If the loss is not finite.
            CheckpointError: If the folder holds checkpoints of another run.

        Warns:
            HardeningWarning: If a branch is more than ten points less accurate than its public encoder, on at least 50
                held-out images.
        """
        self._require_whole("harden")
        self._require_accurate("harden")
        config = self.preset.harden if config is None else config
        hardened = training.harden(
            {role: self.encoder(role) for role in HARDENED_ROLES},
            loader,
            config,
            objective=self.preset.objective(config) if objective is None else objective,
            zero_shot=None if zero_shot is None else check_heads(zero_shot, HARDENED_ROLES, self._features),
            num_classes=self._declared_classes,
            val_loader=val_loader,
            checkpoint_dir=checkpoint_dir,
            bank_dir=bank_dir,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
        )
        benign, abstain_above = self.provenance.get("benign"), None
        if self.preset.abstains and (benign is None or was_frozen(benign)):  # which fit_zero_shot leaves as it is
            held_out = training.split(loader, val_loader, config.val_fraction, config.seed)[1]
            restored = hardened.branches["auxiliary"].encoder
            abstain_above = choose_abstention(
                restored,
                copy.deepcopy(self.encoder("benign")).to(device_of(restored)),
                loader if held_out is None else held_out,
                device=device_of(restored),
            )
        self._install(hardened.branches, hardened.num_classes, hardened.class_names, stage="hardened")
        self.abstain_above = abstain_above
        self.provenance = recorded(self.provenance, "harden", {**hardened.record, "abstain_above": abstain_above})
        return self

    @checked
    def fit_benign(
        self,
        loader: Loader,
        config: BenignConfig | None = None,
        *,
        objective: Recipe | None = None,
        head_config: HeadConfig | None = HeadConfig(),
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        bank_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> ZePAD:
        """Train the benign encoder on clean data (benign memory preservation, BMP), then fit the other heads.

        Args:
            loader: Loader of `(images, labels)`. Its task may differ from that of `harden`.
            config: Learning rates and number of epochs. `BenignConfig(freeze_encoder=...)` says whether the benign
                encoder is fine-tuned (the default), frozen, or the better of the two on held-out images. None takes the
                settings of the preset.
            objective: A recipe such as `static_adversarial_training()`, with which the branch also resists adversarial
                examples that others can craft beforehand: on the hardened encoders, on the benign encoder as it is
                public, and on the undefended victim where the model keeps it, alone and all together. Their radius is
                that of the hardening. None takes the recipe of the preset, or clean images alone where the config
                freezes the encoder.
            head_config: Settings for fitting the heads of the hardened encoders on the same clean data. None keeps the
                heads that `harden` trained on attacked images. They require the same task, and are more robust against
                an attacker who knows the whole model (docs/recipe.md).
            val_loader: Loader for choosing the best epoch; None holds out a part of `loader` if it can be split.
            checkpoint_dir: Folder for checkpoints of the newest epochs, or None for no checkpoints.
            bank_dir: Folder where adversarial examples are kept and found again, for an objective that trains on them;
                None keeps them for this call alone.
            resume: Whether to resume from `checkpoint_dir`; the result equals that of an uninterrupted run.
            progress: Whether to show progress bars.
            callbacks: Objects that are told of every stage, update and epoch and may end a stage early, such as
                `zepad.training.Tracker("tensorboard", "runs")` (docs/training.md).

        Returns:
            The model itself at stage `"fitted"`.

        Raises:
            StageError: If the encoders are not hardened, or `head_config` is None and there are no heads to keep.
            ConfigError: If `head_config` is None and the heads are for another number of classes, or the objective does
                not suit this stage.
            InputError: If a batch is malformed, the loader is empty, or the folder cannot be written.
            TrainingError: If a loss is not finite.
            CheckpointError: If the folder holds checkpoints of another run.
        """
        self._require_hardened("fit_benign")
        self._require_accurate("fit_benign")
        preset, eps = self.preset, self._budget(None)
        config = preset.benign if config is None else config
        if objective is None and preset.benign_objective is not None and not config.freeze_encoder:
            objective = preset.benign_objective(eps)
        kept = HARDENED_ROLES if head_config is None else ()
        if not set(kept) <= set(self.heads):
            raise StageError("hardening left no heads to keep. Pass head_config=HeadConfig() to fit some.")
        num_classes = self._declared_classes or training.count_classes(loader)
        if kept and num_classes != self.num_classes:
            raise ConfigError(
                f"the kept heads are for {self.num_classes} classes and the loader has {num_classes}. "
                "Pass head_config=HeadConfig() to fit new ones."
            )
        benign, record = training.train_benign(
            self.encoder("benign"),
            loader,
            config,
            objective=objective,
            known={role: encoder for role, encoder in self.encoders.items() if role != MEMORY},
            eps=eps,
            num_classes=num_classes,
            val_loader=val_loader,
            checkpoint_dir=checkpoint_dir,
            bank_dir=bank_dir,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
        )
        others = [role for role in self.encoders if role not in (*kept, "benign")]
        fitted = self._fit_heads(others, loader, head_config or HeadConfig(seed=config.seed), num_classes, progress)
        abstain_above, memory = None, fitted.get(MEMORY)
        frozen = was_frozen(record)
        if (preset.abstains and frozen) or (memory is not None and not frozen):
            held_out = training.split(loader, val_loader, config.val_fraction, config.seed)[1]
            abstain_above = self._abstention(benign, memory, loader if held_out is None else held_out)
        branches: dict[str, Branch] = {role: self.branch(role) for role in kept}
        branches |= {**fitted, "benign": benign}
        self._install(branches, num_classes, training.class_names(loader), stage="fitted")
        self.abstain_above = abstain_above
        if preset.resistant_fusion is not None and self._follows(preset):
            resists = objective is not None and objective.static is not None and not frozen
            self.fusion = preset.resistant_fusion if resists else preset.fusion
        head_record = None if head_config is None else head_config.to_dict()
        also = {"head_config": head_record, "abstain_above": abstain_above}
        self.provenance = recorded(self.provenance, "benign", {**record, **also})
        return self

    @checked
    def fit_heads(
        self,
        loader: Loader,
        config: HeadConfig = HeadConfig(),
        *,
        num_classes: int | None = None,
        progress: bool = True,
    ) -> ZePAD:
        """Fit new heads for a new task. The encoders stay fixed and compute the features of each image once.

        Args:
            loader: Loader of `(images, labels)` of the new task.
            config: Learning rate, number of epochs and feature cache.
            num_classes: Number of classes of the new task; None takes it from the loader.
            progress: Whether to show progress bars.

        Returns:
            The model itself. The threshold of the detector is reset: calibrate it for the new task.

        Raises:
            StageError: If the model is not fitted.
            InputError: If a batch is malformed or the loader is empty.
            TrainingError: If a loss is not finite.
        """
        self._require_ready("fit_heads")
        check_classes(num_classes)
        classes, abstain_above = num_classes or training.count_classes(loader), self.abstain_above
        branches = self._fit_heads(list(self.encoders), loader, config, classes, progress)
        if abstain_above is not None:
            abstain_above = self._abstention(branches["benign"], branches.get(MEMORY), loader)
        self._install(branches, classes, training.class_names(loader), stage="fitted")
        self.abstain_above = abstain_above
        record = {
            "config": config.to_dict(),
            "images": training.num_images(loader),
            "abstain_above": abstain_above,
        }
        self.provenance = recorded(self.provenance, "heads", record)
        return self

    @checked
    def fit_zero_shot(self, heads: Mapping[str, ZeroShotHead], *, class_names: Sequence[str] | None = None) -> ZePAD:
        """Use zero-shot heads in place of fitted ones, so that the model classifies by class names. Nothing is trained.

        The benign branch abstains where it did before, or where `harden` chose (`abstain_above`).

        Args:
            heads: A `ZeroShotHead` for each of victim, auxiliary and benign, built with the text tower that belongs to
                the encoder. A benign encoder that was copied from the auxiliary uses the auxiliary's.
            class_names: One name per class, for reports.

        Returns:
            The model itself at stage `"fitted"`. The threshold of the detector is reset: calibrate it.

        Raises:
            StageError: If the encoders are not hardened.
            ConfigError: If heads are missing or do not fit the encoders or each other.
            InputError: If a head is no `ZeroShotHead`.
        """
        self._require_hardened("fit_zero_shot")
        checked = check_heads(heads, ROLES, self._features)
        classes = checked["victim"].classes
        if class_names is not None and len(class_names) != classes:
            raise ConfigError(f"class_names must name {classes} classes; got {len(class_names)}.")
        branches = {
            role: Branch(encoder, copy.deepcopy(checked[_ORIGINALS.get(role, role)]))
            for role, encoder in self.encoders.items()
        }
        names = None if class_names is None else tuple(map(str, class_names))
        abstain_above = self.abstain_above  # a gap between encoders, whatever heads they have
        self._install(branches, classes, names, stage="fitted")
        self.abstain_above = abstain_above
        self.provenance = recorded(self.provenance, "zero_shot", {"classes": classes})
        return self

    # deciding ---------------------------------------------------------------------------------------------------

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch, `(B, N, K)` in the order victim, auxiliary, benign. Differentiable.

        The values of images are not checked here, so that the model can be compiled and exported; `predict` checks
        them.

        Raises:
            StageError: If the model is not fitted.
            InputError: If the images are of another type or shape.
        """
        self._require_ready("forward")
        return super().branch_logits(check_form(images, channels=self.channels))

    def detector_inputs(self, images: Tensor) -> DetectorInputs:
        """Return the detector's inputs, with one pass through every encoder that they need. Differentiable.

        Raises:
            StageError: If the model is not fitted.
            InputError: If the images are of another type or shape.
        """
        self._require_ready("score")
        return super().detector_inputs(check_form(images, channels=self.channels))

    # saving and loading; Pretrained has the public methods --------------------------------------------------------

    @checked
    def export(
        self, path: str | Path, *, encoder: str | None = None, image_size: tuple[int, int] | None = None
    ) -> Path:
        """Export the whole defense as one graph that returns logits, probabilities, weights and detection scores.

        Args:
            path: Path that ends in `.onnx`, or in `.pt2` for `torch.export`; for one encoder also in `.safetensors`,
                which holds its weights alone.
            encoder: Role of one encoder to export instead, as a graph that returns features; None exports the defense.
            image_size: Height and width of the images, `(H, W)`; None takes the input size of the encoders.

        Returns:
            The path.

        Raises:
            StageError: If the model is not fitted and no `encoder` is named.
            ConfigError: If the suffix is another, there is no such encoder, the image size is unknown, or a package is
                missing.
            InputError: If an encoder does not take images of this size, or cannot be exported.
            CheckpointError: If the file cannot be written.
        """
        if encoder is not None:
            return export_encoder(self.encoder(encoder), path, channels=self.channels, image_size=image_size)
        self._require_ready("export")
        return export_model(self, Path(path), image_size=image_size)

    def _contents(self, call: str) -> SavedModel:
        self._require_whole(call)
        return describe_model(
            stage=self.stage,
            channels=self.channels,
            num_classes=self.num_classes,
            class_names=self.class_names,
            encoders={role: self.encoder(role) for role in self._parts()},
            features=self._features,
            shared_architecture=self._shared_architecture,
            heads=dict(self.heads.items()),
            fusion=self.fusion,
            detector=self.detector,
            threshold=self.threshold,
            abstain_above=self.abstain_above,
            provenance=self.provenance,
            home=self._home,
        )

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> ZePAD:
        config = saved.config
        records = config.encoders.items()
        model = cls(
            saved.encoders,
            channels=config.channels,
            features={role: record.features for role, record in records},
            num_classes=config.num_classes,
            fusion=saved.fusion,
            detector=saved.detector.rule,
            shared_architecture={r: record.architecture_of for r, record in records if record.architecture_of},
        )
        for role, head in saved.heads.items():
            model._place(role, Branch(saved.encoders[role], head))
        model.detector, model.threshold = saved.detector, config.threshold
        model.abstain_above = config.abstain_above
        model.stage, model.class_names, model.provenance = config.stage, config.class_names, config.provenance
        model._home, model._remembers = saved.home, MEMORY in config.encoders
        return model.eval()

    # helpers ----------------------------------------------------------------------------------------------------

    def _next_call(self) -> str:
        return _NEXT_CALL[self.stage]

    def _require_hardened(self, call: str) -> None:
        self._require_whole(call)
        if self.stage == "built":
            raise StageError(f"{call} needs hardened encoders. Call harden(loader) first.")

    def _require_accurate(self, call: str) -> None:
        if any(weight.dtype in HALVES for weight in self.parameters()):
            raise StageError(
                f"{call} trains weights, which half precision rounds away. Load the model without dtype=, or with "
                "dtype=torch.float32."
            )

    def _check(self, call: str) -> int:
        self._require_ready(call)
        return self.channels

    def _require_ready(self, call: str) -> None:
        if self.stage != "fitted":
            raise StageError(f"{call} needs a fitted model; this one is {self.stage}. Call {self._next_call()} first.")
        self._require_whole(call)

    def _follows(self, preset: Preset) -> bool:
        """Return whether the fusion rule is one of the preset's, and none that the caller stated."""
        stated = "fusion" in self.provenance.get("preset", {})
        return not stated and self.fusion in (preset.fusion, preset.resistant_fusion)

    def _fit_heads(
        self, roles: Sequence[str], loader: Loader, config: HeadConfig, num_classes: int, progress: bool
    ) -> dict[str, Branch]:
        self.to(training.training_device())  # the whole model, so that an error does not leave it on two devices
        encoders: dict[str, Encoder] = {role: self.encoder(role) for role in roles}
        if not encoders:
            return {}
        heads = training.fit_heads(
            encoders, loader, config, channels=self.channels, num_classes=num_classes, progress=progress
        )
        return {role: Branch(encoders[role], heads[role]) for role in roles}

    def _install(
        self, branches: Mapping[str, Branch], num_classes: int | None, names: tuple[str, ...] | None, *, stage: Stage
    ) -> None:
        """Put trained branches into the model. Training itself leaves the model unchanged."""
        for role, part in self._parts().items():  # heads of an earlier task are removed
            new = branches.get(role)
            head = None if new is None or num_classes is None else new.head
            self._place(role, Branch(part.encoder if new is None else new.encoder, head))
        self.to(device_of(*branches.values()))
        self.stage, self.num_classes = stage, num_classes
        self._renew_detector(self.detector.rule)  # fitted state and threshold belong to the earlier branches
        self.abstain_above = None
        self.class_names = names if names and len(names) == num_classes else None
        self.eval()
