"""Draw the figures of README and documentation, and write README's table, from recorded numbers and images.

    python benchmarks/figures.py draw
    python benchmarks/figures.py record --model runs/ladder-digits/seed-0/models/private

`draw` needs no network and trains nothing. `record` attacks the test digits again, and keeps the first image whose
prediction the attack changes in the undefended classifier.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import recorded

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
PICTURE = recorded.FOLDER / "picture"
TABLE = ("<!-- summary: written by benchmarks/figures.py -->", "<!-- end of summary -->")
WIDTH = 440  # on a phone of 390 pixels the letters keep four fifths of their size


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a figure. Text has a contrast of at least 4.5 to 1 on what it stands on."""

    ink: str
    muted: str
    line: str
    panel: str
    good: str
    bad: str
    blue: str


THEMES = {
    "light": Theme(
        ink="#1c2330", muted="#566072", line="#9aa5b8", panel="#f1f4f9", good="#0b6e3f", bad="#b3261e", blue="#3949ab"
    ),
    "dark": Theme(
        ink="#eceff6", muted="#b4bccb", line="#6b7690", panel="#2a3142", good="#6fd6a2", bad="#ff9a90", blue="#a5b2ff"
    ),
}


# Elements of an SVG ---------------------------------------------------------------------------------------------------


def text(
    x: float, y: float, words: str, color: str, *, size: float = 15, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    at = f'x="{x:g}" y="{y:g}" fill="{color}" font-size="{size:g}" text-anchor="{anchor}"{weight}'
    return f"<text {at}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, edge: str) -> str:
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"'
    return f'<rect {shape} fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" stroke-width="1.8" fill="none"{dash} '
        f'marker-end="url(#{color[1:]})"/>'
    )


def svg(height: float, title: str, elements: list[str], theme: Theme) -> str:
    heads = "".join(
        f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
        for color in (theme.line, theme.bad, theme.blue)
    )
    body = "\n".join(elements)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" role="img">\n'
        f"<title>{escape(title)}</title>\n<defs>{heads}</defs>\n{body}\n</svg>\n"
    )


# The figures ----------------------------------------------------------------------------------------------------------


def attack(theme: Theme) -> str:
    """One image before and after an attack, and what two classifiers say."""
    facts = json.loads((PICTURE / "picture.json").read_text(encoding="utf-8"))
    side, top = 120, 28
    elements = []
    captions = ("clean image", f"change, {facts['magnified']}", "attacked image")
    for x, name, caption in zip((0, 160, 320), ("clean", "perturbation", "attacked"), captions, strict=True):
        data = base64.b64encode((PICTURE / f"{name}.png").read_bytes()).decode()
        elements += [
            text(x + side / 2, 17, caption, theme.ink),
            f'<image x="{x}" y="{top}" width="{side}" height="{side}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{data}"/>',
            f'<rect x="{x}" y="{top}" width="{side}" height="{side}" fill="none" stroke="{theme.line}"/>',
        ]
    elements += [text(x, top + side / 2 + 10, sign, theme.ink, size=30) for x, sign in ((140, "+"), (300, "="))]
    for y, who, key in (
        (166, "Classifier on the public encoder", "undefended"),
        (242, "The same, defended by zepad", "defended"),
    ):
        before, after = facts[key]["before"], facts[key]["after"]
        right = after["class"] == facts["label"]
        color = theme.good if right else theme.bad
        count = f"right on {facts[key]['kept']} of {facts['images']} attacked images"
        elements += [
            box(1, y, WIDTH - 2, 64, theme.panel, color),
            text(14, y + 26, who, theme.ink, anchor="start", bold=True),
            text(14, y + 48, count, theme.muted, anchor="start", size=14),
            text(WIDTH - 14, y + 26, f"clean: {before['class']}", theme.muted, anchor="end", size=14),
            text(
                WIDTH - 14,
                y + 48,
                f"attacked: {after['class']} {'✓' if right else '✗'}",
                color,
                anchor="end",
                bold=True,
            ),
        ]
    title = "An attack on the public encoder changes what an undefended classifier says, and not what zepad says"
    return svg(308, title, elements, theme)


def method(theme: Theme) -> str:
    """How two public encoders become one defended classifier."""
    plain, edge = theme.panel, theme.line
    width = 136
    first, second, third = (1 + width / 2 + step for step in (0, 151, 302))

    def branch(center: float, above: str, below: str) -> list[str]:
        return [
            box(center - width / 2, 176, width, 56, plain, theme.good),
            text(center, 199, above, theme.ink),
            text(center, 219, below, theme.ink, size=14),
        ]

    elements = [
        text(0, 16, "1  Public encoders: the attacker has them too", theme.ink, anchor="start", bold=True),
        box(first - width / 2, 30, width, 48, plain, edge),
        text(first, 59, "victim", theme.ink),
        box(second - width / 2, 30, width, 48, plain, edge),
        text(second, 59, "auxiliary", theme.ink),
        box(third - width / 2 + 12, 30, width - 12, 48, "none", theme.bad),
        text(third + 6, 51, "attacker", theme.bad, bold=True),
        text(third + 6, 69, "crafts images", theme.bad, size=14),
        arrow(third - width / 2 + 12, 54, second + width / 2 + 3, 54, theme.bad, dashed=True),
        arrow(first, 80, first, 136, edge),
        arrow(second, 80, second, 136, edge),
        arrow(second + 30, 80, third - 10, 136, edge),
        text(first + 8, 108, "harden", theme.blue, anchor="start", size=14),
        text(second - 8, 108, "harden", theme.blue, anchor="end", size=14),
        text(WIDTH - 2, 104, "keep or train", theme.blue, anchor="end", size=14),
        text(0, 160, "2  Your branches: the attacker has none of them", theme.ink, anchor="start", bold=True),
        *branch(first, "hardened", "victim + head"),
        *branch(second, "hardened", "auxiliary + head"),
        *branch(third, "benign", "encoder + head"),
        arrow(first, 234, second - 70, 284, edge),
        arrow(second, 234, second, 284, edge),
        arrow(third, 234, second + 70, 284, edge),
        text(0, 278, "3  One decision", theme.ink, anchor="start", bold=True),
        box(second - 120, 288, 240, 50, plain, theme.blue),
        text(second, 309, "fusion", theme.blue, bold=True),
        text(second, 328, "the benign vote is bounded", theme.ink, size=14),
        arrow(second - 60, 340, second - 100, 372, edge),
        arrow(second + 60, 340, second + 100, 372, edge),
        text(second - 100, 392, "predicted class", theme.ink, bold=True),
        text(second + 100, 392, "flagged as attacked?", theme.ink, bold=True),
    ]
    title = "Two public encoders are hardened, a third keeps the accuracy on clean images, and the three are fused"
    return svg(404, title, elements, theme)


def kept(theme: Theme) -> str:
    """What each model keeps under each attacker, as bars."""
    entries = recorded.load()
    models = [entries[name] for name in recorded.SUMMARY]
    colors = (theme.bad, theme.line, theme.blue, theme.good)
    longest, y = WIDTH - 260, 0
    elements = []
    for title, kind in (("no attack", None), *((recorded.KINDS[kind], kind) for kind in recorded.SUMMARY_KINDS)):
        y += 26
        elements.append(text(0, y, title, theme.ink, anchor="start", bold=True))
        y += 8
        for entry, color in zip(models, colors, strict=True):
            if kind is not None and kind not in entry.attacked:
                continue
            mean = (entry.benign if kind is None else entry.attacked[kind].worst).mean
            length = max(2.0, longest * mean / 100)
            words = f"{mean:.1f}  {entry.model.replace('`', '')}"
            elements += [
                f'<rect x="0" y="{y}" width="{length:.1f}" height="15" rx="2" fill="{color}"/>',
                text(length + 6, y + 12.5, words, theme.muted, anchor="start", size=14),
            ]
            y += 20
    return svg(y + 8, "Accuracy in per cent under each attacker; CIFAR-10, eps 8/255", elements, theme)


def drawn() -> Iterator[tuple[Path, str]]:
    """Yield the path and content of each figure, light and dark, and of README with its table."""
    for figure in (attack, method, kept):
        for name, theme in THEMES.items():
            yield FIGURES / f"{figure.__name__}-{name}.svg", figure(theme)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    yield readme, f"{before}{TABLE[0]}\n{recorded.summary(recorded.load())}\n{TABLE[1]}{after}"


# Recording ------------------------------------------------------------------------------------------------------------


def record(model: Path, *, count: int, eps: float, seed: int) -> None:
    """Attack the public victim on test digits, and keep one image and what both classifiers say."""
    import torch
    from PIL import Image

    from zepad import ZePAD
    from zepad.attacks import FeaturePGD
    from zepad.data import digits
    from zepad.types import REFERENCE

    test = digits("test")
    images, labels = test.images[:count], test.labels[:count]
    defense = ZePAD.from_pretrained(model)
    undefended = defense.branch(REFERENCE).eval()
    pgd = FeaturePGD(eps=eps, steps=20, step_size=eps / 8)
    attacked = pgd(undefended.encoder, images, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        said = {
            "undefended": [undefended(batch).softmax(-1) for batch in (images, attacked)],
            "defended": [defense.predict_proba(batch) for batch in (images, attacked)],
        }
    before, after = (probabilities.argmax(-1) for probabilities in said["undefended"])
    chosen = int(((before == labels) & (after != labels)).nonzero()[0])
    PICTURE.mkdir(parents=True, exist_ok=True)
    times = round(0.5 / eps)
    shown = {
        "clean": images[chosen],
        "perturbation": (attacked[chosen] - images[chosen]) * times + 0.5,
        "attacked": attacked[chosen],
    }
    for name, picture in shown.items():
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(PICTURE / f"{name}.png", optimize=True)
    facts = {
        "data": f"the first {count} test images of scikit-learn's handwritten digits",
        "attacker": "feature PGD-20 on the public victim encoder, zepad:digits-barlow-twins, without a label",
        "command": f"python benchmarks/figures.py record --model {model}",
        "training": "python benchmarks/ladder.py --setting digits --seed 0 --models private --out runs/ladder-digits",
        "eps": f"{eps * 255:g}/255",
        "seed": seed,
        "images": count,
        "image": chosen,
        "label": int(labels[chosen]),
        "magnified": f"{times} times",
    }
    for who, (clean, perturbed) in said.items():
        facts[who] = {
            "kept": int((perturbed.argmax(-1) == labels).sum()),
            **{
                when: {"class": int(p[chosen].argmax()), "probability": round(float(p[chosen].max()), 4)}
                for when, p in (("before", clean), ("after", perturbed))
            },
        }
    (PICTURE / "picture.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("draw", help="write docs/figures/*.svg and README's table")
    again = actions.add_parser("record", help="attack the digits again")
    again.add_argument("--model", type=Path, required=True, help="saved model of the preset private on digits")
    again.add_argument("--images", type=int, default=250)
    again.add_argument("--eps", type=float, default=25, help="radius in 255ths")
    again.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.action == "record":
        record(args.model, count=args.images, eps=args.eps / 255, seed=args.seed)
        return
    for path, content in drawn():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
