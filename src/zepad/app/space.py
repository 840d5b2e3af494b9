"""The app as a folder that a Hugging Face Space runs."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .._version import __version__
from ..errors import ConfigError, InputError
from ..files import write_together, writing
from ..model import ZePAD

_MODEL = "model"  # subfolder of the Space
_APP = '''"""The app of a zepad model, as a Hugging Face Space or `python app.py` runs it."""

from pathlib import Path

from zepad import ZePAD
from zepad.app import launch

launch(ZePAD.from_pretrained({source}))
'''
_TEXT = (
    "Attack an image, and see what an undefended and a defended classifier say of it. "
    "Made with [zepad](https://arxiv.org/abs/2602.11204).\n"
)


def export_space(defense: ZePAD, folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write a folder that runs the app of a model as a Hugging Face Space.

    It holds app.py, requirements.txt and README.md, and the model itself unless it is published.

    Args:
        defense: A fitted model.
        folder: Folder to write, which is empty or missing.
        repo_id: Id of the published model, which the Space then downloads; None copies the model into the folder.

    Returns:
        The folder.

    Raises:
        StageError: If the model is not fitted.
        ConfigError: If Gradio is not installed, whose version the Space asks for.
        InputError: If the folder is not empty or cannot be written.
        CheckpointError: If the model cannot be written.
    """
    from huggingface_hub import SpaceCardData

    defense.branch("victim")  # refuses a model without heads before anything is written
    out = Path(folder)
    with writing(out, InputError):
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty. Name a folder for the Space alone.")
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        raise ConfigError('a Space of the app needs Gradio. Install it with: pip install "zepad[app]".') from error
    with writing(out, InputError):
        source = f'Path(__file__).parent / "{_MODEL}"' if repo_id is None else json.dumps(repo_id)
        metadata = SpaceCardData(title="zepad", sdk="gradio", sdk_version=gradio, app_file="app.py", pinned=False)
        contents = {
            "app.py": _APP.format(source=source),
            "requirements.txt": f"zepad[app]=={__version__}\n",
            "README.md": f"---\n{metadata.to_yaml()}\n---\n\n{_TEXT}",
        }
        if repo_id is None:
            defense.save_pretrained(out / _MODEL)
        write_together(out, {name: text.encode() for name, text in contents.items()})
    return out
