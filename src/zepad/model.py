"""The facade: it conducts the parts and computes nothing itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from .card import model_card
from .config import BenignConfig, FusionConfig, HardenConfig, HeadConfig
from .encoders import Encoder, EncoderSpec, Preprocessing, build_encoder, probe, wrap_module
from .errors import CheckpointError, ConfigError, InputError, StageError
from .evaluation import EvalReport, weights_digest
from .functional import conformal_threshold, detection_score
from .hub import HubRepo, locate
from .inputs import check_images, check_reiterable, image_batches
from .inspection import BranchReport, inspect_branches
from .modules import Branch, Fusion, evaluating
from .objectives import HardeningMethod, Objective
from .serialization import (
    HEADS_AT,
    HEADS_FILE,
    encoder_file,
    read_config,
    read_weights,
    rebuild_encoder,
    rebuild_heads,
    save_model,
)
from .training import (
    Recipe,
    Run,
    benign_recipe,
    check_state,
    checkpoint_folder,
    class_names,
    count_classes,
    fit_heads,
    harden_recipe,
    hardening_method,
    images_in,
    run_method,
    train_branch,
    training_device,
)
from .types import HARDENED_ROLES, ROLES, Loader, Role, Stage

PAPER_THRESHOLD = 0.1
_CHUNK = 256  # images of one tensor that are classified at a time

EncoderLike = nn.Module | EncoderSpec | str
"""An encoder as a user may give it: a module, an `Encoder`, a spec, or a spec string such as `"timm:resnet18"`."""


class ZePAD(
    nn.Module,
    ModelHubMixin,
    library_name="zepad",
    tags=["adversarial-robustness", "image-classification"],
    paper_url="https://arxiv.org/abs/2602.11204",
):
    """A defense around public image encoders: two hardened branches, one benign branch, a confidence-weighted fusion.

    Build it with `from_encoders`, then `harden`, then `fit_benign`; or load it with `from_pretrained`. Images are float
    `(N, C, H, W)` in [0, 1], un-normalised, everywhere: each encoder normalises inside.

    Attributes:
        encoders: `Encoder` by role: victim, auxiliary, benign. Frozen, and in evaluation mode whatever `train()` says.
        heads: `MLPHead` by role, once there are any.
        fusion: The rule that weighs the branches.
        stage: `"built"`, `"hardened"` or `"fitted"`.
        channels: Of the images.
        num_classes: Of the present task, or None before there is one.
        class_names: One per class where the data set names them, or None.
        threshold: Of the detection score; 0.1, the paper's, until `calibrate`.
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
        fusion: FusionConfig | None = None,
        shared_architecture: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({role: encoders[role] for role in ROLES if role in encoders})
        self.heads = nn.ModuleDict()
        self.fusion = Fusion(fusion)
        self.stage: Stage = "built"
        self.channels = channels
        self.num_classes = num_classes
        self.class_names: tuple[str, ...] | None = None
        self.threshold = PAPER_THRESHOLD
        self.provenance: dict[str, Any] = {}
        self._declared_classes = num_classes
        self._features = dict(features)
        self._shared_architecture = dict(shared_architecture or {})
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
        fusion: FusionConfig | None = None,
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
            fusion: How branches are weighed; the paper's rule by default.

        Raises:
            InputError: If an encoder's output is no feature tensor, or the encoders take different images.
            ConfigError: If a spec or setting is wrong.
            HubError: If pre-trained weights cannot be had.
        """
        if num_classes is not None and num_classes < 2:
            raise ConfigError(f"num_classes must be at least 2, or None; got {num_classes!r}.")
        given: dict[Role, EncoderLike | None] = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
        encoders: dict[str, Encoder] = {}
        shared: dict[str, str] = {}
        for role, source in given.items():
            if source is not None:
                encoders[role] = _as_encoder(role, source, preprocess)
        if benign is None:
            encoders["benign"] = copy.deepcopy(encoders["auxiliary"])
            if encoders["auxiliary"].spec.source == "custom":
                shared["benign"] = "auxiliary"
        for name, encoder in encoders.items():
            check_state(name, encoder)
        shapes = {role: _probe(role, encoder) for role, encoder in encoders.items()}
        channels = {c for c, _ in shapes.values()}
        if len(channels) != 1:
            each = ", ".join(f"{role} {c}" for role, (c, _) in shapes.items())
            raise InputError(f"all encoders must take images of the same channels; got {each}. Adapt one of them.")
        return cls(
            dict(encoders),
            channels=channels.pop(),
            features={role: width for role, (_, width) in shapes.items()},
            num_classes=num_classes,
            fusion=fusion,
            shared_architecture=shared,
        )

    # training ---------------------------------------------------------------------------------------------------

    def harden(
        self,
        loader: Loader,
        config: HardenConfig = HardenConfig(),
        *,
        objective: Objective | HardeningMethod | None = None,
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> ZePAD:
        """Adversarially fine-tune the victim and the auxiliary encoder (multi-pattern adversarial enhancement, MPAE).

        The model changes only when both are done; after an error it is what it was. It ends up on the device that was
        trained on.

        Args:
            loader: Yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]; of known or unknown length.
            config: The recipe; `HardenConfig.paper()` for the paper's.
            objective: What is minimised, ZePAD's own by default: a method of `zepad.objectives` such as
                `trades(beta=6)`, or a plain function from branch and batch to an `Outcome`.
            val_loader: For choosing the best epoch; None holds out a part of `loader` where it can be split.
            checkpoint_dir: Keeps the newest epochs of each encoder there.
            resume: Go on from `checkpoint_dir`; the result is that of an undisturbed run.
            progress: Show bars with loss, adversarial and clean accuracy, and the time left.

        Returns:
            Itself, at stage `"hardened"`. Heads of an earlier task are dropped.

        Raises:
            InputError: If a batch does not fit, the loader is empty, or the folder cannot be written.
            TrainingError: If the loss is not finite.
            CheckpointError: If the folder holds another run.
        """
        self._require_whole("harden")
        folder = checkpoint_folder(checkpoint_dir, resume=resume)
        num_classes = self._count_classes(loader)
        method, recipe = hardening_method(config, objective), harden_recipe(config, objective)
        branches: dict[str, Branch] = {}
        history: dict[str, Any] = {}
        record = {"config": config.to_dict(), "method": method.name, "images": images_in(loader), "history": history}
        for index, role in enumerate(HARDENED_ROLES):
            run = self._run(f"harden {role}", index, role, recipe, config, num_classes, folder, resume, progress)
            branches[role], stages = run_method(self._copy(role), method, run, loader, val_loader)
            history[role] = stages.pop("hardening")
            history.update({f"{role} {stage}": what for stage, what in stages.items()})
        self._install(branches, num_classes, loader, stage="hardened")
        self._record("harden", record)
        return self

    def fit_benign(
        self,
        loader: Loader,
        config: BenignConfig = BenignConfig(),
        *,
        head_config: HeadConfig = HeadConfig(),
        val_loader: Loader | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> ZePAD:
        """Train the benign encoder on clean data (benign memory preservation, BMP), then the hardened ones' heads.

        Args:
            loader: As in `harden`; the task may be another one.
            config: The recipe; `BenignConfig(freeze_encoder=True)` trains its head alone.
            head_config: How the heads of the hardened encoders are fitted on the same clean data.
            val_loader: As in `harden`.
            checkpoint_dir: As in `harden`.
            resume: As in `harden`.
            progress: As in `harden`.

        Returns:
            Itself, at stage `"fitted"`.

        Raises:
            StageError: If the encoders are not hardened.
            InputError: As `harden`.
            TrainingError: As `harden`.
            CheckpointError: As `harden`.
        """
        self._require_whole("fit_benign")
        if self.stage == "built":
            raise StageError("fit_benign needs hardened encoders. Call harden(loader) first.")
        folder = checkpoint_folder(checkpoint_dir, resume=resume)
        num_classes = self._count_classes(loader)
        index = ROLES.index("benign")
        run = self._run(
            "fit benign",
            index,
            "benign",
            benign_recipe(config),
            config,
            num_classes,
            folder,
            resume,
            progress,
        )
        benign, history = train_branch(self._copy("benign"), run, loader, val_loader)
        self.to(training_device())  # all of it, so that an error in between leaves no part elsewhere
        hardened: dict[str, Encoder] = {role: self.encoder(role) for role in HARDENED_ROLES}
        heads = fit_heads(
            hardened, loader, head_config, channels=self.channels, num_classes=num_classes, progress=progress
        )
        branches = {role: Branch(hardened[role], head) for role, head in heads.items()}
        self._install({**branches, "benign": benign}, num_classes, loader, stage="fitted")
        self._record(
            "benign",
            {
                "config": config.to_dict(),
                "head_config": head_config.to_dict(),
                "images": images_in(loader),
                "history": history,
            },
            keep=("harden",),
        )
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
            Itself. The detection threshold goes back to the paper's 0.1: calibrate it for the new task.

        Raises:
            StageError: If the model was never fitted.
            InputError: As `harden`.
            TrainingError: As `harden`.
        """
        self._require_fitted("fit_heads")
        check_reiterable(loader)
        classes = num_classes or count_classes(loader)
        self.to(training_device())
        encoders: dict[str, Encoder] = {role: self.encoder(role) for role in ROLES}
        heads = fit_heads(encoders, loader, config, channels=self.channels, num_classes=classes, progress=progress)
        self._install({r: Branch(encoders[r], heads[r]) for r in ROLES}, classes, loader, stage="fitted")
        record = {"config": config.to_dict(), "images": images_in(loader)}
        self._record("heads", record, keep=("harden", "benign"))
        return self

    def calibrate(self, loader: Loader | Tensor, *, fpr: float = 0.05) -> ZePAD:
        """Set the detection threshold so that a benign image is flagged with probability at most `fpr`.

        Args:
            loader: Benign images that no training has seen, as a tensor or a loader; labels are ignored.
            fpr: Tolerated false positive rate in (0, 1). The bound holds on average over calibration sets, for
                images exchangeable with these.

        Returns:
            Itself.

        Raises:
            StageError: If the model is not fitted.
            InputError: If images do not fit, `fpr` is out of range, or there are too few images for it.
        """
        scores = self._score("calibrate", loader, detection_score)
        try:
            self.threshold = conformal_threshold(scores, fpr=fpr)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._record("calibration", {"fpr": fpr, "images": len(scores)}, keep=("harden", "benign", "heads"))
        return self

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
        self.provenance = {**self.provenance, "evaluation": report.summary()}
        return self

    # deciding ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Return fused logits `(N, K)` of images `(N, C, H, W)` in [0, 1].

        Differentiable end to end and deterministic in evaluation mode: attack this, not a part of it. Values are not
        checked here, so that it compiles and exports; `predict` checks them.

        Raises:
            StageError: If the model is not fitted.
        """
        return cast(Tensor, self.fusion(self.branch_logits(images)))

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch `(B, N, K)`: victim, auxiliary, benign. Differentiable.

        Raises:
            StageError: If the model is not fitted.
        """
        self._require_fitted("forward")
        return torch.stack([self.heads[role](self.encoders[role](images)) for role in ROLES])

    def predict(self, images: Tensor | Loader) -> Tensor:
        """Return the class of each image, int64 `(N,)`.

        Args:
            images: One tensor `(N, C, H, W)` in [0, 1], or a loader of batches with or without labels.

        Raises:
            StageError: If the model is not fitted.
            InputError: If images do not fit.
        """
        return self._score("predict", images, lambda logits: self.fusion(logits).argmax(dim=-1))

    def predict_proba(self, images: Tensor | Loader) -> Tensor:
        """Return class probabilities `(N, K)`, the softmax of the fused logits. Arguments and errors as `predict`."""
        return self._score("predict_proba", images, lambda logits: self.fusion(logits).softmax(dim=-1))

    def detection_score(self, images: Tensor | Loader) -> Tensor:
        """Return how suspicious each image is `(N,)`, larger is more; see `zepad.functional.detection_score`.

        Arguments and errors as `predict`.
        """
        return self._score("detection_score", images, detection_score)

    def detect(self, images: Tensor | Loader) -> Tensor:
        """Return whether each image looks attacked, bool `(N,)`. Arguments and errors as `predict`."""
        return self._score("detect", images, detection_score) > self.threshold

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
            logits = self.branch_logits(images.to(self.device))
            return inspect_branches(logits, self.fusion, threshold=self.threshold, class_names=self.class_names)

    # parts ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters(), torch.zeros(())).device

    @property
    def branch_names(self) -> tuple[str, ...]:
        """The roles in the order of `branch_logits`: victim, auxiliary, benign."""
        return ROLES

    def encoder(self, name: Role) -> Encoder:
        """Return one encoder, preprocessing included, as a plain drop-in module: raw images to features `(N, D)`.

        It is the model's own, frozen, in evaluation mode: copy it before you change it.

        Raises:
            ConfigError: If there is no such encoder.
        """
        if name not in self.encoders:
            raise ConfigError(f"there is no encoder {name!r}; this model has {', '.join(self.encoders)}.")
        return cast(Encoder, self.encoders[name])

    def branch(self, name: Role) -> Branch:
        """Return one encoder with its head: raw images to the logits `(N, K)` of this branch alone.

        Raises:
            ConfigError: If there is no such encoder.
            StageError: If it has no head yet.
        """
        encoder = self.encoder(name)
        if name not in self.heads:
            self._require_whole(f"branch({name!r})")
            raise StageError(f"the {name} branch has no head yet. Call {self._next_call()} first.")
        return Branch(encoder, self.heads[name])

    def train(self, mode: bool = True) -> ZePAD:
        """Set the mode of the heads; the encoders stay in evaluation mode, so their BatchNorm statistics never move."""
        super().train(mode)
        self.encoders.eval()
        return self

    # saving and loading -----------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        self._require_whole("save_pretrained")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            save_model(
                save_directory,
                stage=self.stage,
                channels=self.channels,
                num_classes=self.num_classes,
                class_names=self.class_names,
                encoders={role: self.encoder(role) for role in ROLES},
                features=self._features,
                shared_architecture=self._shared_architecture,
                heads={role: self.heads[role] for role in HEADS_AT[self.stage]},
                fusion=self.fusion.config,
                threshold=self.threshold,
                provenance=self.provenance,
            )
            self.generate_model_card().save(save_directory / "README.md")
        if distributed:
            torch.distributed.barrier()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,  # noqa: ARG002 - config.json is written from the model alone
        model_card_kwargs: Any = None,  # noqa: ARG002
        **push_kwargs: Any,
    ) -> str | None:
        """Write config.json, one safetensors file per encoder, one for the heads, and a model card.

        Under several processes the main one writes and the others wait. A model that cannot be saved leaves an older
        save in the folder as it was.

        Args:
            save_directory: Created if need be.
            repo_id: On the Hub; the folder's name by default.
            push_to_hub: Publish it as well.
            config: Ignored; of `huggingface_hub.ModelHubMixin`.
            model_card_kwargs: Ignored; of `huggingface_hub.ModelHubMixin`.
            **push_kwargs: Of `push_to_hub`.

        Raises:
            CheckpointError: If the folder cannot be written or something in the model cannot be stored.
        """
        # Not the mixin's: that deletes an older config.json before it is known whether this model can be saved.
        folder = Path(save_directory)
        try:
            self._save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error}. Choose a writable folder.") from error
        return self.push_to_hub(repo_id or folder.name, **push_kwargs) if push_to_hub else None

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:  # noqa: ARG002 - the mixin's signature
        """Return the model card: what the model is, what it was trained on, how to use it, and its limits."""
        return ModelCard(
            model_card(
                stage=self.stage,
                encoders={role: str(self.encoder(role).spec) for role in ROLES},
                num_classes=self.num_classes,
                threshold=self.threshold,
                provenance=self.provenance,
            ),
            ignore_metadata_errors=False,
        )

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
        config_path, remote = locate(repo.repo_id, repo)
        config = read_config(config_path)
        folder = config_path.parent
        modules = {r: m for r, m in (("victim", victim), ("auxiliary", auxiliary), ("benign", benign)) if m is not None}

        def weights(name: str) -> dict[str, Tensor]:
            path = remote.fetch(name, revision=folder.name) if remote else folder / name
            return read_weights(path, config.files[name])

        roles = [role for role in ROLES if branches is None or role in branches]
        encoders: dict[str, Encoder] = {
            role: rebuild_encoder(role, config, modules, weights(encoder_file(role)), encoder_file(role))
            for role in roles
        }
        model = cls(
            encoders,
            channels=config.channels,
            features={role: record.features for role, record in config.encoders.items()},
            num_classes=config.num_classes,
            fusion=config.fusion,
            shared_architecture={
                role: record.architecture_of for role, record in config.encoders.items() if record.architecture_of
            },
        )
        if branches is None and HEADS_AT[config.stage]:
            model.heads.update(rebuild_heads(config, weights(HEADS_FILE), HEADS_FILE))
        model.stage, model.class_names = config.stage, config.class_names
        model.threshold, model.provenance = config.threshold, config.provenance
        model.eval()
        return model if device is None else model.to(device)

    # helpers ----------------------------------------------------------------------------------------------------

    def _next_call(self) -> str:
        return {"built": "harden(loader)", "hardened": "fit_benign(loader)", "fitted": "predict(images)"}[self.stage]

    def _require_whole(self, call: str) -> None:
        if len(self.encoders) < len(ROLES):
            raise StageError(
                f"{call} needs all three encoders, and this model was loaded with "
                f"{', '.join(self.encoders)} alone. Load it "
                "without branches=..."
            )

    def _require_fitted(self, call: str) -> None:
        if self.stage != "fitted":
            raise StageError(f"{call} needs a fitted model; this one is {self.stage}. Call {self._next_call()} first.")
        self._require_whole(call)

    def _count_classes(self, loader: Loader) -> int:
        check_reiterable(loader)
        return self._declared_classes or count_classes(loader)

    def _run(
        self,
        name: str,
        index: int,
        role: Role,
        recipe: Recipe,
        config: HardenConfig | BenignConfig,
        num_classes: int,
        folder: Path | None,
        resume: bool,
        progress: bool,
    ) -> Run:
        return Run(
            name=name,
            index=index,
            recipe=recipe,
            config=config,
            features=self._features[role],
            channels=self.channels,
            num_classes=num_classes,
            checkpoint_dir=folder / role if folder else None,
            resume=resume,
            progress=progress,
        )

    def _copy(self, role: Role) -> Encoder:
        return copy.deepcopy(self.encoder(role))

    def _install(self, branches: Mapping[str, Branch], num_classes: int, loader: Loader, *, stage: Stage) -> None:
        """Take over trained branches at once; until here nothing of the model has changed."""
        self.encoders.update({role: branch.encoder for role, branch in branches.items()})
        self.heads = nn.ModuleDict({role: branch.head for role, branch in branches.items()})
        self.to(next(self.heads.parameters()).device)
        self.stage, self.num_classes, self.threshold = stage, num_classes, PAPER_THRESHOLD
        names = class_names(loader)
        self.class_names = names if names and len(names) == num_classes else None
        self.eval()

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        with evaluating(self), torch.inference_mode():
            yield

    def _record(self, step: str, record: dict[str, Any], *, keep: Sequence[str] = ()) -> None:
        """Note what a step did and forget the steps that it undid."""
        self.provenance = {**{name: self.provenance[name] for name in keep if name in self.provenance}, step: record}

    def _score(self, call: str, images: Tensor | Loader, score: Callable[[Tensor], Tensor]) -> Tensor:
        self._require_fitted(call)
        with self._deciding():
            scores = [
                score(self.branch_logits(chunk.to(self.device))).to(batch.device)
                for batch in image_batches(images, channels=self.channels)
                for chunk in batch.split(_CHUNK)
            ]
        return torch.cat(scores)


def _probe(role: str, encoder: Encoder) -> tuple[int, int]:
    try:
        return probe(encoder)
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _as_encoder(role: str, source: EncoderLike, preprocess: Preprocessing | None) -> Encoder:
    if isinstance(source, str):
        source = EncoderSpec.parse(source)
    if isinstance(source, EncoderSpec):
        encoder = build_encoder(source, pretrained=True)
        if preprocess is None:
            return encoder
        return Encoder(encoder.backbone, preprocessing=preprocess, pooling=encoder.pooling, spec=encoder.spec)
    if isinstance(source, Encoder):
        return copy.deepcopy(source)
    if isinstance(source, nn.Module):
        return wrap_module(source, preprocess)
    raise InputError(
        f"{role} must be a torch.nn.Module, an EncoderSpec or a spec string; got "
        f"{type(source).__name__}. A function can be "
        "wrapped in a module."
    )
