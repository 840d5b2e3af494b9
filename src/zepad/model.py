"""The facade: it conducts the parts and computes nothing itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from . import training
from .calibration import calibrate
from .config import (
    BenignConfig,
    HardenConfig,
    HeadConfig,
    check_budget,
)
from .detectors import Detector, DetectorInputs, FittedDetector
from .detectors import resolve as resolve_detector
from .encoders import Encoder, EncoderSpec, Preprocessing, build_encoder, probe, wrap_module
from .ensemble import BranchEnsemble
from .errors import ConfigError, InputError, StageError
from .evaluation import EvalReport, weights_digest
from .export import export_model
from .fusion import FusionRule
from .fusion import resolve as resolve_fusion
from .hub import HubRepo, Published
from .inputs import check_images, image_batches
from .inspection import BranchReport, inspect_branches
from .loading import load_saved
from .modes import evaluating
from .modules import Branch
from .objectives import Objective, Recipe
from .provenance import recorded, without
from .publishing import publish_folder, write_card
from .serialization import (
    Base,
    SavedConfig,
    SavedFile,
    describe_model,
    export_model,
    load_saved,
    model_card,
    push_model,
    save_model,
)
from .types import ENCODER_ROLES, HARDENED_ROLES, REFERENCE, ROLES, Loader, Role, Stage
from .zero_shot import ZeroShotHead, check_heads

_CHUNK = 256  # images of one tensor that are classified at a time


class ZePAD(
    BranchEnsemble,
    ModelHubMixin,
    library_name="zepad",
    tags=["adversarial-robustness", "image-classification"],
    paper_url="https://arxiv.org/abs/2602.11204",
):
    """A defense around public image encoders: two hardened branches, one benign branch, a confidence-weighted fusion.

    Build it with `from_encoders`, then `harden`, then `fit_benign`; or load it with `from_pretrained`. Images are float
    `(N, C, H, W)` in [0, 1], un-normalised, everywhere: each encoder normalises inside.

    Attributes:
        encoders: `Encoder` by role: victim, auxiliary, benign, and for some detectors sentinel. Frozen, and in
            evaluation mode whatever `train()` says.
        heads: `MLPHead` by role, once there are any.
        fusion: The rule that fuses the branches.
        detector: What scores images.
        stage: `"built"`, `"hardened"` or `"fitted"`.
        channels: Of the images.
        num_classes: Of the present task, or None before there is one.
        class_names: One per class where the data set names them, or None.
        threshold: Of the detection score. Until `calibrate` it is the paper's 0.1 for the confidence gap, and None for
            any other detector.
        provenance: Recipes, data sizes and results of the training behind the weights.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from zepad import BenignConfig, HardenConfig, ZePAD
        >>> from zepad.data import digits
        >>> loader = DataLoader(digits("train"), batch_size=130, shuffle=True)
        >>> defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
        >>> defense = defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
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
        shared_architecture: Mapping[str, str] | None = None,
    ) -> None:
        reference = Branch(encoders[REFERENCE]) if REFERENCE in encoders else None
        branches = {role: Branch(encoders[role]) for role in ROLES if role in encoders}
        super().__init__(branches, fusion=fusion, detector=detector, reference=reference)
        self.stage: Stage = "built"
        self.channels = channels
        self.num_classes = num_classes
        self.class_names: tuple[str, ...] | None = None
        self.threshold = self.detector.rule.first_threshold
        self.provenance: dict[str, Any] = {}
        self._declared_classes = num_classes
        self._features = dict(features)
        self._shared_architecture = dict(shared_architecture or {})
        self._home: Home | None = None
        self.requires_grad_(False)
        self.eval()

    # building ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_encoders(
        cls,
        victim: EncoderLike,
        auxiliary: EncoderLike,
        *,
        benign: EncoderLike | None = None,
        num_classes: int | None = None,
        preprocess: Preprocessing | None = None,
        fusion: FusionRule | str = "rfdm",
        detector: Detector | str = "gap",
    ) -> ZePAD:
        """Wrap public encoders.

        Args:
            victim: The public encoder to protect: any module from images to features, or a spec string that names
                one with its pre-trained weights (`"timm:resnet18"`, `"torchvision:resnet18"`). It is copied, never
                modified. A timm or torchvision model loses its classifier in the copy.
            auxiliary: A second public encoder, best pre-trained by another method.
            benign: The encoder that only ever sees clean local data. None fine-tunes a copy of the clean auxiliary;
                never the victim, on whose weights attacks are crafted.
            num_classes: Of the task; None takes it from the first loader.
            preprocess: What the encoders expect, where they do not say so themselves; an `Encoder` keeps its own.
            fusion: How branches are fused: a rule by name, such as `"bounded"`, or with parameters of your own. The
                paper's by default.
            detector: What scores images: a name, such as `"features"`. The paper's confidence gap by default. A
                detector that needs the undefended victim keeps a copy of it, at one or two more forward passes.

        Raises:
            InputError: If an encoder's output is no feature tensor, or the encoders take different images.
            ConfigError: If a spec or setting is wrong.
            HubError: If pre-trained weights cannot be had.
        """
        if num_classes is not None and num_classes < 2:
            raise ConfigError(f"num_classes must be at least 2, or None; got {num_classes!r}.")
        rule, scores = _checked_rule(fusion), resolve_detector(detector, argument="detector")
        given: dict[Role, EncoderLike | None] = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
        encoders: dict[str, Encoder] = {}
        shared: dict[str, Role] = {}
        for role, source in given.items():
            if source is not None:
                encoders[role] = as_encoder(role, source, preprocess)
        if benign is None:
            encoders["benign"] = copy.deepcopy(encoders["auxiliary"])
            if encoders["auxiliary"].spec.source == "custom":
                shared["benign"] = "auxiliary"
        if scores.needs_reference():
            encoders[REFERENCE] = copy.deepcopy(encoders["victim"])
            if encoders["victim"].spec.source == "custom":
                shared[REFERENCE] = "victim"
        for name, encoder in encoders.items():
            training.check_state(name, encoder)
        shapes = {role: _probe(role, encoder) for role, encoder in encoders.items()}
        channels = {c for c, _ in shapes.values()}
        if len(channels) != 1:
            each = ", ".join(f"{role} {c}" for role, (c, _) in shapes.items())
            raise InputError(f"all encoders must take images of the same channels; got {each}. Adapt one of them.")
        model = cls(
            dict(encoders),
            channels=channels.pop(),
            features={role: width for role, (_, width) in shapes.items()},
            num_classes=num_classes,
            fusion=rule,
            detector=scores,
            shared_architecture=shared,
        )
        origins = {role: encoder.origin for role, encoder in encoders.items() if encoder.origin}
        model.provenance = {"encoders": origins} if origins else {}
        return model

    # training ---------------------------------------------------------------------------------------------------

    def harden(
        self,
        loader: Loader,
        config: HardenConfig = HardenConfig(),
        *,
        objective: Objective | Recipe | None = None,
        zero_shot: Mapping[str, ZeroShotHead] | None = None,
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> ZePAD:
        """Adversarially fine-tune the victim and the auxiliary encoder (multi-pattern adversarial enhancement, MPAE).

        The model changes only when both are done; after an error it is what it was. It ends up on the device that was
        trained on.

        Args:
            loader: Yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]; of known or unknown length. Images
                alone will do with `objective=fare()`, and with `zero_shot` heads, which then label them.
            config: The recipe; `HardenConfig.paper()` for the paper's.
            objective: A recipe of `zepad.objectives` such as `trades(beta=6)`, or a plain function from branch and
                batch to an `ObjectiveOutput`. None is ZePAD's own recipe.
            zero_shot: Heads made from class names, for victim and auxiliary, that stand in for trained ones and stay as
                they are. Images without labels get those of the public encoders' zero-shot classifiers, averaged.
            val_loader: For choosing the best epoch; None holds out a part of `loader` where it can be split.
            checkpoint_dir: Keeps the newest epochs of each encoder there.
            resume: Go on from `checkpoint_dir`; the result is that of an undisturbed run.
            progress: Show bars with loss, adversarial and clean accuracy, and the time left.

        Returns:
            Itself, at stage `"hardened"`. Heads of an earlier task are dropped. Next comes `fit_benign`, or
            `fit_zero_shot` for a classifier made from class names.

        Raises:
            ConfigError: If `zero_shot` heads do not fit the encoders.
            InputError: If a batch does not fit, the loader is empty, or the folder cannot be written.
            TrainingError: If the loss is not finite.
            CheckpointError: If the folder holds another run.
        """
        self._require_whole("harden")
        heads = None if zero_shot is None else check_heads(zero_shot, HARDENED_ROLES, self._features)
        hardened = training.harden(
            {role: self.encoder(role) for role in HARDENED_ROLES},
            loader,
            config,
            objective=objective,
            zero_shot=heads,
            num_classes=self._declared_classes,
            val_loader=val_loader,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            progress=progress,
        )
        self._install(hardened.branches, hardened.num_classes, hardened.class_names, stage="hardened")
        self.provenance = recorded(self.provenance, "harden", hardened.record)
        return self

    def fit_benign(
        self,
        loader: Loader,
        config: BenignConfig = BenignConfig(),
        *,
        head_config: HeadConfig | None = HeadConfig(),
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> ZePAD:
        """Train the benign encoder on clean data (benign memory preservation, BMP), then the hardened ones' heads.

        Args:
            loader: As in `harden`; the task may be another one.
            config: The recipe; `BenignConfig(freeze_encoder=True)` trains its head alone.
            head_config: How the heads of the hardened encoders are fitted on the same clean data. None keeps those that
                `harden` trained along on attacked images: for the same task alone, and more robust against who knows
                the whole model (docs/recipe.md).
            val_loader: As in `harden`.
            checkpoint_dir: As in `harden`.
            resume: As in `harden`.
            progress: As in `harden`.

        Returns:
            Itself, at stage `"fitted"`.

        Raises:
            StageError: If the encoders are not hardened, or hardening left no heads to keep.
            ConfigError: If heads are to be kept that are for another number of classes.
            InputError: As `harden`.
            TrainingError: As `harden`.
            CheckpointError: As `harden`.
        """
        self._require_whole("fit_benign")
        if self.stage == "built":
            raise StageError("fit_benign needs hardened encoders. Call harden(loader) first.")
        kept = set(HARDENED_ROLES) if head_config is None else set()
        if not kept <= set(self.heads):
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
            num_classes=num_classes,
            val_loader=val_loader,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            progress=progress,
        )
        self.to(training.training_device())  # all of it, so that an error in between leaves no part elsewhere
        branches: dict[str, Branch] = {role: self.branch(role) for role in HARDENED_ROLES if role in kept}
        encoders: dict[str, Encoder] = {r: self.encoder(r) for r in self._roles if r not in kept and r != "benign"}
        if encoders:
            heads = training.fit_heads(
                encoders,
                loader,
                head_config or HeadConfig(seed=config.seed),
                channels=self.channels,
                num_classes=num_classes,
                progress=progress,
            )
            branches |= {role: Branch(encoders[role], head) for role, head in heads.items()}
        self._install({**branches, "benign": benign}, num_classes, training.class_names(loader), stage="fitted")
        fitted = None if head_config is None else head_config.to_dict()
        record = {"config": record["config"], "head_config": fitted, **record}
        self.provenance = recorded(self.provenance, "benign", record)
        return self

    def fit_heads(
        self,
        loader: Loader,
        config: HeadConfig = HeadConfig(),
        *,
        num_classes: int | None = None,
        progress: bool = True,
    ) -> ZePAD:
        """Fit three fresh heads for a new task; the encoders stay as they are and see each image once.

        Args:
            loader: As in `harden`, of the new task.
            config: Rates, length and feature cache.
            num_classes: Of the new task; None takes it from the loader.
            progress: Show bars.

        Returns:
            Itself. The detector forgets its threshold: calibrate it for the new task.

        Raises:
            StageError: If the model was never fitted.
            InputError: As `harden`.
            TrainingError: As `harden`.
        """
        self._require_fitted("fit_heads")
        classes = num_classes or training.count_classes(loader)
        self.to(training.training_device())
        encoders: dict[str, Encoder] = {role: self.encoder(role) for role in self._roles}
        heads = training.fit_heads(
            encoders, loader, config, channels=self.channels, num_classes=classes, progress=progress
        )
        branches = {role: Branch(encoder, heads[role]) for role, encoder in encoders.items()}
        self._install(branches, classes, training.class_names(loader), stage="fitted")
        record = {"config": config.to_dict(), "images": training.num_images(loader)}
        self.provenance = recorded(self.provenance, "heads", record)
        return self

    def fit_zero_shot(self, heads: Mapping[str, ZeroShotHead], *, class_names: Sequence[str] | None = None) -> ZePAD:
        """Classify by class names: three heads made from text take the place of fitted ones. Nothing is trained.

        The benign encoder may be as it was given: a public encoder that never saw an attack.

        Args:
            heads: `ZeroShotHead` for victim, auxiliary and benign, each made with the text tower of that very encoder.
                A benign encoder that started as a copy of the auxiliary takes the auxiliary's.
            class_names: One per class, for reports.

        Returns:
            Itself, at stage `"fitted"`. The detector forgets its threshold: calibrate it.

        Raises:
            StageError: If the encoders are not hardened.
            ConfigError: If heads are missing or do not fit the encoders or each other.
        """
        self._require_whole("fit_zero_shot")
        if self.stage == "built":
            raise StageError("fit_zero_shot needs hardened encoders. Call harden(loader) first.")
        checked = check_heads(heads, ROLES, self._features)
        classes = checked["victim"].classes
        if class_names is not None and len(class_names) != classes:
            raise ConfigError(f"class_names must name {classes} classes; got {len(class_names)}.")
        sources: dict[Role, Role] = {role: "victim" if role == REFERENCE else role for role in self._roles}
        branches = {
            str(role): Branch(self.encoder(role), copy.deepcopy(checked[source])) for role, source in sources.items()
        }
        names = None if class_names is None else tuple(map(str, class_names))
        self._install(branches, classes, names, stage="fitted")
        self.provenance = recorded(self.provenance, "zero_shot", {"classes": classes})
        return self

    def configure(
        self,
        *,
        fusion: FusionRule | str | None = None,
        detector: Detector | str | None = None,
    ) -> ZePAD:
        """Take another fusion rule or another detector; nothing is trained, and every encoder and head stays.

        Args:
            fusion: As in `from_encoders`; None keeps the rule.
            detector: As in `from_encoders`; None keeps the detector. Another one has no threshold until `calibrate`.

        Returns:
            Itself. What was measured of it is forgotten.

        Raises:
            ConfigError: If there is no such rule or detector, or the detector needs the undefended victim and the model
                was built without it.
        """
        rule = None if fusion is None else _checked_rule(fusion)
        scores = None if detector is None else resolve_detector(detector, argument="detector")
        if scores is not None and scores.needs_reference() and self.reference is None:
            raise ConfigError(
                f'the detector "{scores.name}" needs the undefended victim, which this model was built without. '
                f'Build it with from_encoders(..., detector="{scores.name}").'
            )
        if rule is not None:
            self.fusion = rule
        if scores is not None:
            self._renew_detector(scores)
        self.provenance = without(self.provenance, "calibration")
        return self

    def calibrate(
        self,
        loader: Loader | Tensor,
        *,
        fpr: float = 0.05,
        benign_floor: float | None = None,
        fit_loader: Loader | Tensor | None = None,
        eps: float | None = None,
    ) -> ZePAD:
        """Choose the parameters of the fusion, fit the detector and set its threshold, on validation images.

        The images must be ones that no training has seen, that of the public encoders included: an encoder knows
        its own training images too well to say how it does on others.

        * Where the loader yields labels and the rule has parameters to choose, they become as robust as the
          benign accuracy allows; see `zepad.calibration.calibrate_fusion`. Without labels they stay as they are.
        * The threshold is such that a benign image is flagged with probability at most `fpr`. A detector that has to
          be fitted is fitted on `fit_loader`, or else on every other image, and the threshold set on the rest.

        Args:
            loader: Benign images as a tensor or a loader, with labels or without.
            fpr: Tolerated false positive rate in (0, 1). The bound holds on average over calibration sets, for
                images exchangeable with these.
            benign_floor: Benign accuracy in [0, 1] that the fusion must keep, with a standard error to spare on these
                images. None asks for that of the undefended victim where the detector keeps it, and else for that of
                the benign branch alone.
            fit_loader: Other benign images for fitting the detector; training images will do. All of `loader` is then
                left for the threshold.
            eps: Budget of the attack by which `"mixed"` judges robustness; None takes that of the hardening.

        Returns:
            Itself.

        Raises:
            StageError: If the model is not fitted.
            ConfigError: If `benign_floor` or `eps` is out of range.
            InputError: If images or labels do not fit, `fpr` is out of range, or there are too few images for it.

        Warns:
            CalibrationWarning: If no parameters reach the floor; the most accurate are taken then.
        """
        self._require_fitted("calibrate")
        with evaluating(self):
            found = calibrate(
                self.detector_inputs,
                loader,
                branch_logits=self.branch_logits,
                fit_loader=fit_loader,
                fusion=self.fusion,
                detector=self.detector.rule,
                fpr=fpr,
                benign_floor=benign_floor,
                eps=self._budget(eps),
                channels=self.channels,
                num_classes=self.num_classes,
                device=self.device,
            )
        self.fusion = found.fusion
        self.detector, self.threshold = found.detector.train(self.training), found.threshold
        self.provenance = recorded(self.provenance, "calibration", found.record)
        return self

    def _budget(self, eps: float | None) -> float:
        if eps is None:
            eps = self.provenance.get("harden", {}).get("config", {}).get("eps", HardenConfig().eps)
        check_budget(eps)
        return eps

    def attach(self, report: EvalReport) -> ZePAD:
        """Keep what an evaluation of this model found: its config and its model card then say it.

        Training, new heads and calibration forget it again.

        Args:
            report: Of `zepad.evaluation.evaluate` on this very model.

        Returns:
            Itself.

        Raises:
            InputError: If the report is of other weights or of another threshold.
        """
        if report.provenance.get("weights_digest") != weights_digest(self) or report.threshold != self.threshold:
            raise InputError(
                f"the report on {report.model!r} is of another model: weights or threshold differ. Evaluate this one."
            )
        self.provenance = recorded(self.provenance, "evaluation", report.summary())
        return self

    # deciding ---------------------------------------------------------------------------------------------------

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch `(B, N, K)`: victim, auxiliary, benign. Differentiable.

        Values are not checked here, so that the model compiles and exports; `predict` checks them.

        Raises:
            StageError: If the model is not fitted.
        """
        self._require_fitted("forward")
        return super().branch_logits(images)

    def detector_inputs(self, images: Tensor) -> DetectorInputs:
        """Return all that the detector looks at, with one pass through every encoder that it needs. Differentiable.

        Raises:
            StageError: If the model is not fitted.
        """
        self._require_fitted("score")
        return super().detector_inputs(images)

    def predict(self, images: Tensor | Loader) -> Tensor:
        """Return the class of each image, int64 `(N,)`.

        Args:
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches with or without labels.

        Raises:
            StageError: If the model is not fitted.
            InputError: If images do not fit.
        """
        return self._map("predict", images, lambda chunk: self(chunk).argmax(dim=-1))

    def predict_proba(self, images: Tensor | Loader) -> Tensor:
        """Return class probabilities `(N, K)`, the softmax of the fused logits. Arguments and errors as `predict`."""
        return self._map("predict_proba", images, lambda chunk: self(chunk).softmax(dim=-1))

    def detection_score(self, images: Tensor | Loader) -> Tensor:
        """Return how suspicious each image is `(N,)`, larger is more; see `zepad.modules.Detector`.

        Arguments and errors as `predict`; also a StageError if the detector has to be calibrated first.
        """
        return self._map("detection_score", images, self.score)

    def detect(self, images: Tensor | Loader) -> Tensor:
        """Return whether each image looks attacked, bool `(N,)`. Arguments and errors as `detection_score`."""
        self._require_fitted("detect")
        if self.threshold is None:
            raise StageError(
                f'the detector "{self.detector.rule.name}" has no threshold yet. Call calibrate(benign_loader) first.'
            )
        return self.detection_score(images) > self.threshold

    def inspect(self, images: Tensor) -> BranchReport:
        """Report what every branch says of each image, how much it weighs, and the verdict.

        Args:
            images: `(N, C, H, W)` in [0, 1].

        Raises:
            StageError: If the model is not fitted.
            InputError: If images do not fit.
        """
        self._require_fitted("inspect")
        check_images(images, channels=self.channels)
        with self._deciding():
            inputs = self.detector_inputs(images.to(self.device))
            return inspect_branches(
                inputs.logits,
                self.fusion,
                scores=self.detector(inputs) if self.detector.is_fitted else None,
                threshold=self.threshold,
                class_names=self.class_names,
            )

    # parts ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return _device(self)

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by role: victim, auxiliary, benign, and for some detectors reference."""
        return {role: cast(Encoder, branch.encoder) for role, branch in self._all_branches().items()}

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The heads by role, once there are any."""
        return {role: branch.head for role, branch in self._all_branches().items() if branch.has_head}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides beside the weights, JSON-ready."""
        return {"fusion": self.fusion.config.to_dict(), "detector": self.detector.config.to_dict()}

    def encoder(self, name: Role) -> Encoder:
        """Return one encoder, preprocessing included, as a plain drop-in module: raw images to features `(N, D)`.

        It is the model's own, frozen, in evaluation mode: copy it before you change it.

        Raises:
            ConfigError: If there is no such encoder.
        """
        return cast(Encoder, self._part(name).encoder)

    def branch(self, name: Role) -> Branch:
        """Return one encoder with its head: raw images to the logits `(N, K)` of this branch alone.

        Raises:
            ConfigError: If there is no such encoder.
            StageError: If it has no head yet.
        """
        branch = self._part(name)
        if not branch.has_head:
            self._require_whole(f"branch({name!r})")
            raise StageError(f"the {name} branch has no head yet. Call {self._next_call()} first.")
        return branch

    def train(self, mode: bool = True) -> ZePAD:
        """Set the mode of the heads; the encoders stay in evaluation mode, so their BatchNorm statistics never move."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
        return self

    # saving and loading -----------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, heads_only: bool = False, card: CardDetails = CardDetails()
    ) -> None:
        """Write config.json, one safetensors file per encoder, one for the heads, and a model card.

        Under several processes the main one writes and the others wait. A model that cannot be saved leaves an older
        save in the folder as it was.

        Args:
            save_directory: Created if need be.
            heads_only: Leave out encoders that are on the Hub already, and name their repository and commit instead.
            card: What only you know of the model: license, data sets, base models.

        Raises:
            StageError: If `heads_only` and the encoders are not on the Hub, or there are no heads.
            CheckpointError: If the folder cannot be written, something in the model cannot be stored, or `heads_only`
                and the encoders changed since they were published.
        """
        # Not the mixin's: that deletes an older config.json before it is known whether this model can be saved.
        self._require_whole("save_pretrained")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            save_model(Path(save_directory), self._contents(), heads_only=heads_only, card=card)
        if distributed:
            torch.distributed.barrier()

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Push a model with zepad",
        heads_only: bool = False,
        card: CardDetails = CardDetails(),
    ) -> Published:
        """Publish the model in one commit, or not at all. Under several processes, call it on one.

        Args:
            repo_id: `"user/name"`; created if need be. An existing repository must be one of zepad's.
            private: Visibility; None is your account's default for a new repository and changes nothing in an old one.
            revision: Branch to commit to, created if need be; None is the default branch.
            token: Of the Hub; None is the stored one.
            commit_message: Its first line.
            heads_only: Publish the heads of a task alone; loading fetches the encoders from where they are.
            card: What only you know of the model: license, data sets, base models.

        Returns:
            Repository, commit and address. Load with `revision=` that commit to get these very weights.

        Raises:
            HubError: Saying whether anything was published.
            StageError: As `save_pretrained`.
            CheckpointError: As `save_pretrained`.
        """
        self._require_whole("push_to_hub")
        published, self._home = push_model(
            repo_id,
            self._contents(),
            heads_only=heads_only,
            card=card,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )
        return published

    def _write(self, folder: Path, heads_only: bool, card: CardDetails, model_id: str | None) -> SavedConfig:
        if heads_only and not self.heads:
            raise StageError(f"there are no heads to save alone. Call {self._next_call()} first.")
        if heads_only and self._published is None:
            raise StageError(
                "the encoders of this model are not on the Hub, so heads alone could not be loaded. "
                'Publish the whole model first: push_to_hub("user/name").'
            )
        base, published = self._published if heads_only and self._published else (None, None)
        encoders: dict[str, Encoder] = {role: self.encoder(role) for role in self._roles}
        described = replace(self._describe(), base=base)
        text = model_card(described, model_id=model_id, details=card)  # before an older save is replaced
        config = save_model(
            folder,
            described,
            encoders=encoders,
            heads=self.heads,
            detector=self.detector,
            published=published,
        )
        write_card(folder, text)
        return config

    def _describe(self) -> SavedConfig:
        return describe_model(
            stage=self.stage,
            channels=self.channels,
            num_classes=self.num_classes,
            class_names=self.class_names,
            encoders={role: self.encoder(role) for role in self._roles},
            features=self._features,
            shared_architecture=self._shared_architecture,
            heads=self.heads,
            fusion=self.fusion,
            detector=self.detector.rule,
            threshold=self.threshold,
            provenance=self.provenance,
            home=self._home,
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:  # noqa: ARG002 - the mixin's signature
        """Return the model card: what the model is, what was measured, how to use it, and its limits."""
        return ModelCard(model_card(self._contents().config), ignore_metadata_errors=False)

    def export(self, path: str | Path, *, image_size: tuple[int, int] | None = None) -> Path:
        """Write one graph of the whole defense: logits, probabilities, weights and detection score of a batch.

        Args:
            path: `"model.onnx"`, or `"model.pt2"` for `torch.export`.
            image_size: `(height, width)` of the images to come; None takes the encoders' own.

        Returns:
            The path.

        Raises:
            StageError: If the model is not fitted.
            ConfigError: If the suffix is another, the size is not known, or a package is missing.
            InputError: If an encoder does not take such images, or cannot be written as a graph.
            CheckpointError: If the file cannot be written.
        """
        self._require_fitted("export")
        return export_model(self, Path(path), image_size=image_size)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        victim: nn.Module | None = None,
        auxiliary: nn.Module | None = None,
        benign: nn.Module | None = None,
        branches: Sequence[Role] | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> ZePAD:
        """Load a saved model strictly: digests, keys and shapes must match, and nothing is unpickled.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id such as `"user/name"`.
            victim: The architecture of a custom victim; its weights do not matter, and it is copied.
            auxiliary: Likewise.
            benign: Likewise; not needed when the benign encoder started as a copy of the auxiliary.
            branches: Load these encoders alone, and download nothing else; such a model serves `encoder(name)`.
            device: Where to put the model.
            revision: Branch, tag or commit on the Hub; every file comes from the one commit it resolves to.
            token: Of the Hub.
            cache_dir: Of the Hub client.
            local_files_only: Use the Hub cache alone.
            force_download: Fetch again what is cached.

        Returns:
            The model in evaluation mode, at the stage it was saved at, with bit-identical predictions.

        Raises:
            CheckpointError: If anything is missing, damaged, newer than this version, or does not fit.
            ConfigError: If `branches` names no branch, or a source no longer knows an encoder's name.
            HubError: If the Hub cannot deliver.
        """
        repo = HubRepo(
            repo_id=str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        unknown = sorted(set(branches or ()) - set(ROLES))
        if unknown or (branches is not None and not branches):
            raise ConfigError(f"branches must be some of {ROLES}; got {list(branches or ())!r}.")
        modules = {r: m for r, m in (("victim", victim), ("auxiliary", auxiliary), ("benign", benign)) if m is not None}
        saved = load_saved(repo.repo_id, repo, branches=branches, modules=modules)
        config = saved.config
        model = cls(
            saved.encoders,
            channels=config.channels,
            features={role: record.features for role, record in config.encoders.items()},
            num_classes=config.num_classes,
            fusion=saved.fusion,
            detector=saved.detector.rule,
            shared_architecture={
                role: record.architecture_of for role, record in config.encoders.items() if record.architecture_of
            },
        )
        model.detector = saved.detector
        for role, head in saved.heads.items():
            model._part(role).head = head
        model.stage, model.class_names = config.stage, config.class_names
        model.threshold, model.provenance = config.threshold, config.provenance
        model._home = saved.home
        model.eval()
        return model if device is None else model.to(device)

    # helpers ----------------------------------------------------------------------------------------------------

    def _next_call(self) -> str:
        return {"built": "harden(loader)", "hardened": "fit_benign(loader)", "fitted": "predict(images)"}[self.stage]

    def _require_whole(self, call: str) -> None:
        if not set(self.encoders) >= set(ENCODER_ROLES if self.detector.rule.needs_reference() else ROLES):
            raise StageError(
                f"{call} needs all encoders, and this model was loaded with "
                f"{', '.join(self.encoders)} alone. Load it "
                "without branches=..."
            )

    def _require_fitted(self, call: str) -> None:
        if self.stage != "fitted":
            raise StageError(f"{call} needs a fitted model; this one is {self.stage}. Call {self._next_call()} first.")
        self._require_whole(call)

    def _install(
        self, branches: Mapping[str, Branch], num_classes: int | None, names: tuple[str, ...] | None, *, stage: Stage
    ) -> None:
        """Take over trained branches at once; until here nothing of the model has changed."""
        for role in ENCODER_ROLES:
            if role in branches:
                self._place(role, Branch(branches[role].encoder, None if num_classes is None else branches[role].head))
            elif role in self.encoders:  # a head of an earlier task says nothing of this one
                self._place(role, Branch(self.encoders[role]))
        self.to(_device(*branches.values()))
        self.stage, self.num_classes = stage, num_classes
        self._renew_detector(self.detector.rule)  # what it was fitted to and its threshold were another task's
        self.class_names = names if names and len(names) == num_classes else None
        self.eval()

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        with evaluating(self), torch.inference_mode():
            yield

    def _renew_detector(self, rule: Detector) -> None:
        self.detector, self.threshold = FittedDetector(rule).train(self.training), rule.first_threshold

    def _all_branches(self) -> dict[str, Branch]:
        found = {role: cast(Branch, branch) for role, branch in self.branches.items()}
        return found if self.reference is None else {**found, REFERENCE: self.reference}

    def _part(self, role: str) -> Branch:
        branches = self._all_branches()
        if role not in branches:
            raise ConfigError(f"there is no encoder {role!r}; this model has {', '.join(branches)}.")
        return branches[role]

    def _place(self, role: str, branch: Branch) -> None:
        if role == REFERENCE:
            self.reference = branch
        else:
            self.branches[role] = branch

    def _map(self, call: str, images: Tensor | Loader, function: Callable[[Tensor], Tensor]) -> Tensor:
        self._require_fitted(call)
        with self._deciding():
            results = [
                function(chunk.to(self.device)).to(batch.device)
                for batch in image_batches(images, channels=self.channels)
                for chunk in batch.split(_CHUNK)
            ]
        return torch.cat(results)

    @property
    def _roles(self) -> tuple[Role, ...]:
        return tuple(role for role in ENCODER_ROLES if role in self.encoders)


def _checked_rule(fusion: FusionRule | str) -> FusionRule:
    rule = resolve_fusion(fusion, argument="fusion")
    rule.check_branches(len(ROLES))
    return rule


def _device(*modules: nn.Module) -> torch.device:
    """Where the first weight is; a model without any is on the CPU."""
    return next((weight.device for module in modules for weight in module.parameters()), torch.device("cpu"))
