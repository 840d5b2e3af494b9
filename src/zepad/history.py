"""The learning curves of a defense: one record per epoch, as a data frame and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from .arguments import checked
from .errors import CheckpointError, ConfigError, InputError, StageError
from .files import write_bytes, writing
from .types import HARDENED_ROLES, ROLES

COLUMNS = (
    "branch",
    "stage",
    "epoch",
    "step",
    "lr",
    "head_lr",
    "loss",
    "benign_accuracy",
    "adversarial_accuracy",
    "val_benign_accuracy",
    "val_adversarial_accuracy",
)
"""Names of the values of a record, in the order of the columns of a data frame."""

_STAGES = ("hardening", "adaptation", "benign")
_MOST_RECORDS = 10_000

_CURVES = (
    ("val_benign_accuracy", "benign, held out", "#1f6f9f", "-"),
    ("val_adversarial_accuracy", "attacked, held out", "#c2571a", "-"),
    ("benign_accuracy", "benign, in training", "#1f6f9f", ":"),
    ("adversarial_accuracy", "attacked, in training", "#c2571a", ":"),
)


class TrainingHistory(Sequence[Mapping[str, Any]]):
    """What training measured, epoch by epoch: a sequence of records, one for each epoch of each branch.

    A record holds, as far as it was measured:

    * `branch`, which is `"victim"`, `"auxiliary"` or `"benign"`, and `stage`, which is `"hardening"`, `"adaptation"`
      (the second stage of a recipe that has one) or `"benign"`;
    * `epoch`, from one, and `step`, the number of updates of this branch and stage up to its end;
    * `lr` and `head_lr`, the learning rates of encoder and head in the last update;
    * `loss`, the mean of the epoch;
    * `benign_accuracy` and `adversarial_accuracy` on the training images in [0, 1], while they were trained on;
    * `val_benign_accuracy` and `val_adversarial_accuracy` on the held-out images in [0, 1], which choose the epoch.

    Args:
        records: Records, as above.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._records = tuple(dict(record) for record in records)

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> TrainingHistory:
        """Return the history that the provenance of a model holds; it is empty for a model that was not trained.

        Raises:
            CheckpointError: If the provenance is not as zepad writes it.
        """
        hardening = provenance.get("harden", {}).get("history", {})
        benign = provenance.get("benign", {}).get("history", [])
        if not isinstance(hardening, Mapping):
            raise _foreign()
        runs = [(role, "hardening", hardening.get(role, [])) for role in HARDENED_ROLES]
        runs += [(role, "adaptation", hardening.get(f"{role} adaptation", [])) for role in HARDENED_ROLES]
        runs.append(("benign", "benign", benign))
        if not all(_is_run(records) for _, _, records in runs):
            raise _foreign()
        return cls(
            {
                "branch": branch,
                "stage": stage,
                "epoch": epoch,
                **{name: record[name] for name in COLUMNS if name in record},
            }
            for branch, stage, records in runs
            for epoch, record in enumerate(records, start=1)
        )

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TrainingHistory: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | TrainingHistory:
        return TrainingHistory(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._records)

    def __repr__(self) -> str:
        epochs = ", ".join(f"{_title(*run)} {len(records)}" for run, records in _runs(self).items())
        return f"TrainingHistory(epochs: {epochs or 'none'})"

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame` with one row per epoch and the columns `COLUMNS`, whatever was measured.

        What was not measured is missing: NaN, or `pandas.NA` for a step.

        Raises:
            ConfigError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("pandas is not installed. Install it with: pip install 'zepad[pandas]'.") from error
        frame = pandas.DataFrame(list(self), columns=list(COLUMNS))
        kinds = {"branch": "str", "stage": "str", "epoch": "int64", "step": "Int64"}
        return frame.astype({name: kinds.get(name, "float64") for name in COLUMNS})

    @checked
    def plot(self, path: str | Path) -> Path:
        """Draw loss and accuracies of each branch and write them to a PNG file.

        Args:
            path: Path that ends in `.png`. An existing file is replaced.

        Returns:
            The path.

        Raises:
            StageError: If there is nothing to draw, because nothing was trained.
            ConfigError: If the path ends otherwise.
            InputError: If the file cannot be written.
        """
        out = Path(path)
        if out.suffix.lower() != ".png":
            raise ConfigError(f"path must end in .png; got {str(out)!r}.")
        content = self.png()
        with writing(out, InputError):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out, content)
        return out

    def png(self) -> bytes:
        """Return the picture that `plot` writes.

        Raises:
            StageError: If there is nothing to draw, because nothing was trained.
        """
        # The object interface of matplotlib needs neither global state nor a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        runs = _runs(self)
        if not runs:
            raise StageError("there are no learning curves: nothing was trained. Call harden(loader) first.")
        figure = Figure(figsize=(max(7.0, 1 + 3 * len(runs)), 6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(runs), squeeze=False, sharex="col", sharey="row")
        for column, (run, records) in enumerate(runs.items()):
            _draw_run(axes[:, column], records)
            axes[0, column].set_title(_title(*run))
        axes[0, 0].set_ylabel("loss, mean of the epoch")
        axes[1, 0].set_ylabel("accuracy")
        handles = {
            label: line for axis in axes[1] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        ordered = [label for _, label, _, _ in _CURVES if label in handles]
        if ordered:
            shown = [handles[label] for label in ordered]
            figure.legend(shown, ordered, loc="outside lower center", ncols=len(ordered), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        return buffer.getvalue()


def is_history(records: object) -> bool:
    """Return whether these are records of `TrainingHistory`, which can be drawn: a stranger may have written them."""
    if not isinstance(records, Sequence) or len(records) > _MOST_RECORDS:
        return False
    for record in records:
        if not isinstance(record, dict) or record.get("branch") not in ROLES or record.get("stage") not in _STAGES:
            return False
    runs = [[_numbers(record) for record in run] for run in _runs(records).values()]
    return all(_is_run(run) and "epoch" in run[0] and run[0].keys() <= set(COLUMNS) for run in runs)


def _runs(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the records of each branch and stage, in their order."""
    runs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["branch"], record["stage"]), []).append(record)
    return runs


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("branch", "stage")}


def _foreign() -> CheckpointError:
    return CheckpointError("the training history is not as zepad writes it. Save or download the model again.")


def _title(branch: str, stage: str) -> str:
    return branch if stage == branch else f"{branch}, {stage}"


def _draw_run(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [record["epoch"] for record in records]
    mark = "." if len(records) < 30 else ""  # a single epoch is a point, which no line shows
    axes[0].plot(epochs, [record["loss"] for record in records], color="#444444", marker=mark)
    for name, label, colour, style in _CURVES:
        if name in records[0]:
            values = [record[name] for record in records]
            axes[1].plot(epochs, values, label=label, color=colour, linestyle=style, marker=mark)
    axes[1].set(ylim=(-0.02, 1.02), xlabel="epoch")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes[1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)


def _is_run(records: object) -> bool:
    """Return whether these are the records of a run: numbers by name, the same names in each, the loss among them."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        return False
    numbers = all(isinstance(value, (int, float)) for record in records for value in record.values())
    return numbers and all("loss" in record and record.keys() == records[0].keys() for record in records)
