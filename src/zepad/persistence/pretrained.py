"""Saving, publishing, exporting and loading, as methods of a model that says what it consists of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from ..arguments import check_device, checked
from ..config import require
from ..functional.precision import HALVES
from ..types import ROLES
from .card import CardDetails, model_card
from .commits import Published
from .contents import Home, SavedModel
from .hub import HubRepo
from .loading import load_saved
from .publishing import push_model
from .saving import save_model
from .weights import cast

_P = TypeVar("_P", bound="Pretrained")


class Pretrained(nn.Module, ModelHubMixin):
    """Gives a model `save_pretrained`, `push_to_hub`, `export` and `from_pretrained`.

    A subclass defines `_contents` and `_from_saved`, which are each other's inverse.
    """

    _home: Home | None = None

    @abstractmethod
    def _contents(self, call: str) -> SavedModel:
        """Return what the model consists of.

        Args:
            call: The public call that asks for it.

        Raises:
            StageError: If the model cannot serve the call.
        """

    @classmethod
    @abstractmethod
    def _from_saved(cls: type[_P], saved: SavedModel) -> _P:
        """Return the model, in evaluation mode, that consists of these parts."""

    @checked
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, heads_only: bool = False, card: CardDetails = CardDetails()
    ) -> None:
        """Write config.json, one safetensors file per encoder, one for the heads, and a model card.

        Under several processes the main one writes and the others wait. A model that cannot be saved leaves an older
        save in the folder as it was.

        Args:
            save_directory: Folder, created if need be.
            heads_only: Whether to leave out encoders that are on the Hub already, and name their repository and commit.
            card: Facts for the model card that only you know: license, data sets, base models.

        Raises:
            StageError: If `heads_only` and the encoders are not on the Hub, or there are no heads.
            CheckpointError: If the folder cannot be written, something in the model cannot be stored, or `heads_only`
                and the encoders changed since they were published.
        """
        # The mixin's method would delete an older config.json before it is known whether this model can be saved.
        contents = self._contents("save_pretrained")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            save_model(Path(save_directory), contents, heads_only=heads_only, card=card)
        if distributed:
            torch.distributed.barrier()

    @checked
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

        Publishing turns a private defense into a public encoder: everybody can then attack the hardened encoders
        themselves, as the attackers of `zepad.evaluation.published` do. A fitted model is published with its heads and
        its benign branch, so that everybody knows it whole (white box); publish it before `fit_benign` to keep these.

        Args:
            repo_id: Repository `"user/name"`, created if need be. An existing one must be one of zepad's.
            private: Visibility; None is your account's default for a new repository and changes nothing in an old one.
            revision: Branch to commit to, created if need be; None is the default branch.
            token: Access token of the Hub; None is the stored one.
            commit_message: First line of the commit message.
            heads_only: Whether to publish the heads of a task alone; loading fetches the encoders from where they are.
            card: Facts for the model card that only you know: license, data sets, base models.

        Returns:
            Repository, commit and address. Load with `revision=` that commit to get these very weights.

        Raises:
            HubError: If the push failed; the message says whether anything was published.
            StageError: If `heads_only` and the encoders are not on the Hub, or there are no heads.
            CheckpointError: If something in the model cannot be stored.
        """
        published, self._home = push_model(
            repo_id,
            self._contents("push_to_hub"),
            heads_only=heads_only,
            card=card,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )
        return published

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:  # noqa: ARG002 - the mixin's signature
        """Return the model card: what the model is, what was measured, how to use it, and its limits."""
        return ModelCard(model_card(self._contents("generate_model_card").config), ignore_metadata_errors=False)

    @classmethod
    @checked
    def from_pretrained(  # type: ignore[override]
        cls: type[_P],
        pretrained_model_name_or_path: str | Path,
        *,
        victim: nn.Module | None = None,
        auxiliary: nn.Module | None = None,
        benign: nn.Module | None = None,
        branches: Sequence[Literal["victim", "auxiliary", "benign"]] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> _P:
        """Load a saved model strictly: digests, keys and shapes must match, and nothing is unpickled.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id such as `"user/name"`.
            victim: Architecture of a custom victim; its weights do not matter, and it is copied.
            auxiliary: Architecture of a custom auxiliary encoder.
            benign: Architecture of a custom benign encoder; not needed when it started as a copy of the auxiliary.
            branches: Roles of the encoders to load alone; nothing else is downloaded, and the model serves
                `encoder(name)`.
            device: Device to put the model on.
            dtype: Precision that the encoders compute in: `torch.float32`, `torch.float16` or `torch.bfloat16`; None is
                that in which they were saved. Half precision takes half the memory and is faster on a GPU. Files are
                checked as they were saved, and heads, fusion and detector stay in float32. The threshold and every
                evaluation were measured in the saved precision: calibrate and evaluate what you deploy.
            revision: Branch, tag or commit on the Hub; every file comes from the one commit it resolves to.
            token: Access token of the Hub.
            cache_dir: Cache folder of the Hub client.
            local_files_only: Whether to use the Hub cache alone.
            force_download: Whether to fetch again what is cached.

        Returns:
            The model in evaluation mode, at the stage it was saved at, with bit-identical predictions unless `dtype`
            is another than the saved one.

        Raises:
            CheckpointError: If anything is missing, damaged, newer than this version, does not fit, or is too large for
                `dtype`.
            ConfigError: If `branches` names no branch, or a source no longer knows an encoder's name.
            HubError: If the Hub cannot deliver.
        """
        require(branches is None or len(branches) > 0, "branches", branches, f"some of {ROLES}, or None for all")
        if device is not None:
            check_device(device)
        allowed = (torch.float32, *HALVES)
        require(dtype is None or dtype in allowed, "dtype", dtype, f"one of {', '.join(map(str, allowed))}, or None")
        repo = HubRepo(
            repo_id=str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        given: dict[str, nn.Module | None] = {"victim": victim, "auxiliary": auxiliary, "benign": benign}
        modules = {role: module for role, module in given.items() if module is not None}
        saved = load_saved(repo.repo_id, repo, branches=branches, modules=modules)
        if dtype is not None:
            for role, encoder in saved.encoders.items():
                cast(encoder.backbone, dtype, f"the {role} encoder")
        model = cls._from_saved(saved)
        if device is not None:
            model.to(device)
        return model
