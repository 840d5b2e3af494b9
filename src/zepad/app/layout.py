"""The app as a Gradio page: controls on one side, a trial on the other. Nothing is computed here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..config import is_number
from ..data import digits
from ..errors import ConfigError
from ..model import ZePAD
from .attackers import Choice, attackers_for
from .page import answer_section, attackers_section, trial_css

if TYPE_CHECKING:
    from gradio import Blocks

_LARGEST = 64  # of the budgets, in 255ths: far beyond what passes for the same image
_EXAMPLES = 10

_HEAD = """
# Attack an image
Drop an image and choose an attacker. zepad perturbs the image within the budget, and shows what a classifier on the
undefended public encoder says of it, what the defended one says, and whether the detector flags it.
"""
_WAITING = '<section class="trial"><p>The answer will appear here.</p></section>'

# On a phone the answer is far below the button.
_SHOW = """() => {
  const answer = document.getElementById("answer");
  if (answer.getBoundingClientRect().top > innerHeight / 2) answer.scrollIntoView();
}"""

# The page's colours by the names that the style of a report has for them.
_CSS = """
.gradio-container {
  --page: var(--body-background-fill); --ink: var(--body-text-color); --soft: var(--body-text-color-subdued);
  --rule: var(--border-color-primary); --band: var(--background-fill-secondary); --attack: #7fa9d6;
  --warn-page: #fff4e0; --warn-edge: #b45309; --warn-ink: #5c2c04;
}
.dark .gradio-container, .gradio-container.dark {
  --attack: #386aa3; --warn-page: #33240d; --warn-edge: #e0963c; --warn-ink: #ffdfb0;
}
.report-link {
  display: inline-block; margin-top: 1rem; padding: .5rem 1rem; border: 1px solid var(--rule); border-radius: .4rem;
}
"""


def build_app(defense: ZePAD) -> Blocks:
    """Return the app for a model as a Gradio page that has not been started; `launch` starts it.

    Args:
        defense: A fitted model.

    Raises:
        StageError: If the model is not fitted.
        ConfigError: If Gradio is not installed.
    """
    gr = require_gradio()
    choice = attackers_for(defense)

    def answer(path: str | None, attacker: str, budget: float) -> str:
        return answer_section(defense, choice.attackers[attacker], path, eps=budget / 255)

    with gr.Blocks(title="zepad: attack an image", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(_HEAD)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,  # the file as it is: the library turns, converts and refuses images itself
                    sources=["upload", "clipboard"],
                    height=260,
                    buttons=[],
                    placeholder="Drop an image file here to upload",  # what Gradio calls the area for screen readers
                    alt_text="The image to attack",
                )
                examples = _examples(defense)
                if examples:
                    gr.Examples(
                        list(examples.values()),
                        image,
                        label="Test images",
                        example_labels=list(examples),
                        cache_examples=False,
                    )
                attacker = gr.Radio(list(choice.attackers), value=_first(choice), label="Attacker")
                budget = gr.Slider(
                    1, _LARGEST, value=_first_budget(defense), step=1, label="Budget in 255ths of the pixel range"
                )
                start = gr.Button("Attack", variant="primary")
                with gr.Accordion("What each attacker knows", open=False):
                    gr.HTML(attackers_section(choice), apply_default_css=False, js_on_load=None)
            with gr.Column(scale=2, min_width=300):
                shown = gr.HTML(_WAITING, apply_default_css=False, js_on_load=None, elem_id="answer")
        answered = start.click(answer, [image, attacker, budget], shown, api_name="attack")
        answered.then(None, js=_SHOW)
    return app  # type: ignore[no-any-return]


def launch(
    defense: ZePAD, *, host: str | None = None, port: int | None = None, browser: bool = False, block: bool = True
) -> Any:
    """Serve the app. It is never shared through another server, and sends nothing about its use to anybody.

    Args:
        defense: A fitted model.
        host: Address to listen on; None takes that of the environment variable GRADIO_SERVER_NAME, which a Space sets,
            or else 127.0.0.1.
        port: Port to listen on; None takes the first free one from 7860 on.
        browser: Whether to open the page in the browser.
        block: Whether to serve until the process is interrupted; otherwise the call returns at once.

    Returns:
        The app, of which `local_url` is the address and `close()` ends it.

    Raises:
        StageError: If the model is not fitted.
        ConfigError: If Gradio is not installed, or the port is taken.
    """
    app = build_app(defense)
    gr = require_gradio()
    try:
        app.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=not block,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            quiet=True,
            css=_CSS + trial_css(),
            theme=_theme(gr),
        )
    except OSError as error:
        raise ConfigError(
            f"the app cannot listen on {host or 'this host'}, port {port}: {error}. Choose another."
        ) from error
    return app


def _theme(gr: Any) -> Any:
    """Return a theme with the system's fonts, and with text that is dark enough to be read by everybody."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="indigo", **fonts)
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def require_gradio() -> Any:
    """Return the module `gradio`, with its telemetry off.

    Raises:
        ConfigError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and in all its parts
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f'the app needs Gradio: {error}. Install it with: pip install "zepad[app]".') from error
    return gradio


def _first(choice: Choice) -> str:
    """Return the attacker of the paper where he can be had."""
    return next((name for name in ("public victim", "hardened encoders") if name in choice.attackers), "no attack")


def _first_budget(defense: ZePAD) -> int:
    """Return the budget of the hardening in 255ths, or 8 where it is not recorded."""
    eps = defense.provenance.get("harden", {}).get("config", {}).get("eps")
    return min(max(round(255 * eps), 1), _LARGEST) if is_number(eps) else 8


def _examples(defense: ZePAD) -> dict[str, Any]:
    """Return test digits by name where the model is built on the encoders of the demo."""
    if defense.encoder("victim").spec.source != "zepad" or defense.num_classes != 10:
        return {}
    from torchvision.transforms.functional import to_pil_image

    data = digits("test")
    first = {int(label): image for image, label in zip(data.images[:40].flip(0), data.labels[:40].flip(0), strict=True)}
    return {f"digit {label}": to_pil_image(image) for label, image in sorted(first.items())[:_EXAMPLES]}
