"""Commands that move a saved model to the Hub and back and write its card: `zepad push`, `zepad pull`, `zepad card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .ending import interruptible
from .root import JSON_OPTION, MODEL, app, say

_TOKEN = typer.Option(
    metavar="TOKEN", help="Access token of the Hub; the stored one by default.", envvar="HF_TOKEN", show_envvar=True
)


@app.command()
def push(
    path: Annotated[Path, MODEL],
    repo_id: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository to publish in: user/name. Created if need be.")
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility; your account's default if not given.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Branch to commit to, created if need be.")
    ] = None,
    token: Annotated[str | None, _TOKEN] = None,
    message: Annotated[str, typer.Option(metavar="LINE", help="Message of the commit.")] = "Push a model with zepad",
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Publish a saved model on the Hugging Face Hub, in one commit or not at all."""
    with interruptible("A push is one commit or none at all: what the Hub shows is whole."):
        from ..persistence import publish_folder

        published = publish_folder(
            path, repo_id, private=private, revision=revision, token=token, commit_message=message
        )
    if as_json:
        say(json.dumps({"repo_id": published.repo_id, "revision": published.revision, "url": published.url}))
        return
    say(f"published   {published.url}")
    say(f'load it     ZePAD.from_pretrained("{published.repo_id}", revision="{published.revision}")')


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository to copy: user/name.")],
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit.")] = None,
    token: Annotated[str | None, _TOKEN] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Copy a published model into a folder: verified, and whole even where it only adds heads to a base."""
    with interruptible(f"Files that came whole are in the cache of the Hub, and {path} is as it was."):
        from ..persistence import HubRepo, download

        config = download(HubRepo(repo_id=repo_id, revision=revision, token=token), path)
    size = sum(file.bytes for file in config.files.values())
    if as_json:
        say(json.dumps({"path": str(path), "bytes": size, "files": sorted(config.files)}))
        return
    say(f"model       {path}   ({size / 1e6:.1f} MB in {len(config.files)} files, digests verified)")
    say(f"Next: zepad info {path}")


@app.command()
def card(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a saved model; its README.md is written anew.")
    ],
    repo_id: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Repository it will be published in, for the usage lines.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence of the model, such as apache-2.0.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Hub id of training data; repeat for more.")
    ] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Hub id of a public encoder; repeat for more.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="Further tag of the card; repeat for more.")
    ] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Write the model card: metadata for the Hub, threat model, measured numbers with their attackers, limits."""
    from ..persistence import CardDetails, model_card, write_card
    from ..persistence.publishing import check_folder

    details = CardDetails(
        license=license_id,
        datasets=tuple(dataset or ()),
        base_models=tuple(base_model or ()),
        tags=tuple(tag or ()),
    )
    text = model_card(check_folder(path), model_id=repo_id, details=details)
    written = write_card(path, text)
    say(json.dumps({"path": str(written)}) if as_json else f"card        {written}")
