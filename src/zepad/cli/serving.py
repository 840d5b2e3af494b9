"""The command that shows a model in the browser: `zepad app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .root import app, say


@app.command("app")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder of a saved model, or the id of a published one.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets the whole network in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, metavar="NUMBER", help="Port to listen on; the first free one from 7860 on if not given."
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    export_space: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write a Hugging Face Space of the app into this folder, and serve nothing."
        ),
    ] = None,
) -> None:
    """Attack images in the browser, and see what the undefended and the defended classifier say."""
    if model is None:
        raise ConfigError("zepad app needs a model. Run `zepad demo` first, and then `zepad app zepad-demo/model`.")
    from .. import app as page
    from ..app.layout import require_gradio
    from ..model import ZePAD

    require_gradio()  # before a model is loaded, which may mean downloaded
    defense = ZePAD.from_pretrained(model)
    if export_space is not None:
        folder = page.export_space(defense, export_space, repo_id=None if Path(model).is_dir() else model)
        say(f"Space       {folder}")
        say(f"Next: python {folder / 'app.py'}, or hf upload USER/NAME {folder} . --repo-type space")
        return
    running = page.launch(defense, host=host, port=port, browser=browser, block=False)
    say(f"app         {running.local_url}   (Ctrl-C ends it)")
    running.block_thread()
