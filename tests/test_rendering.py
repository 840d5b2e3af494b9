"""Rendered reports have every number, do not embellish, and escape every name."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from functools import cache
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import example_reports as examples
from zepad.errors import InputError
from zepad.escaping import clean
from zepad.evaluation.attackers import THREAT_MODELS
from zepad.evaluation.rendering import comparison_html, comparison_markdown, markdown_tables, summary
from zepad.evaluation.rendering.charts import bar_svg, histogram_svg, mean_of_bins, roc_svg
from zepad.evaluation.rendering.content import cost_table
from zepad.evaluation.rendering.files import save_report
from zepad.evaluation.rendering.page import html_page
from zepad.evaluation.rendering.picture import draw_histograms, overview_png
from zepad.evaluation.rendering.table import Cell, Row, Table, markdown_table
from zepad.evaluation.rendering.templating import macros
from zepad.evaluation.rendering.wording import EXPLANATIONS, GROUPS, verdict
from zepad.evaluation.report import EvalReport
from zepad.evaluation.statistics import Rate

VOID = {"meta", "link", "img", "rect", "line", "path", "circle"}
EVERY = [pytest.param(name, marks=pytest.mark.slow if name == "large" else ()) for name in sorted(examples.EXAMPLES)]
DRAWN = [
    pytest.param(name, marks=() if name in ("full", "empty_rates") else pytest.mark.slow)
    for name in sorted(examples.EXAMPLES)
]


@cache
def example(name: str) -> EvalReport:
    return examples.EXAMPLES[name]()


@cache
def page(name: str) -> str:
    return html_page(example(name))


@cache
def markdown(name: str) -> str:
    return markdown_tables(example(name))


class Page(HTMLParser):
    """Elements, attributes and text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), "an attribute is repeated"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def text(self, tag: str | None = None) -> str:
        return "".join(said for within, said in self.texts if "style" not in within and (tag is None or tag in within))

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(t == tag and wanted.items() <= found.items() for t, found in self.tags)


def wilson(rate: Rate) -> str:
    """The interval by its closed form, as it is printed."""
    z, n, p = 1.959963984540054, rate.total, rate.hits / rate.total
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * max(low, 0):.1f} to {100 * min(high, 1):.1f}"


def every_rate(report: EvalReport) -> list[Rate]:
    held = [result.rates for result in report.attacks] + list(report.worst.values())
    rates = [report.benign_accuracy, *report.benign_branches.values()]
    for one in held:
        rates += [one.robust_accuracy, *one.branches.values()]
    for result in report.attacks:
        rates += [result.rates.fooling_rate, result.rates.attack_success_rate]
        rates += [result.detection.flagged, result.detection.evading] if result.detection else []
    return rates


@pytest.mark.parametrize("name", EVERY)
def test_tags_nest_and_nothing_is_loaded_or_run(name: str) -> None:
    found = Page(page(name))
    assert found.count("script") == 0
    for tag, attributes in found.tags:
        assert not [attribute for attribute in attributes if attribute.startswith("on")], "an event handler"
        assert (attributes.get("src") or "data:").startswith(
            "data:image/png;base64,"[: len(attributes.get("src") or "")]
        )
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    assert not re.search(r"@import|url\(", page(name).split("</style>")[0])


@pytest.mark.parametrize("name", EVERY)
def test_a_page_is_the_same_twice_and_never_says_nan_or_none(name: str) -> None:
    assert html_page(example(name)) == page(name)
    for text in (Page(page(name)).text(), markdown(name)):
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)


@pytest.mark.parametrize("name", EVERY)
def test_every_table_has_a_caption_headers_with_scope_and_a_region_of_its_own(name: str) -> None:
    found = Page(page(name))
    tables = found.count("table")
    regions = [a["aria-label"] for t, a in found.tags if t == "div" and a.get("role") == "region"]
    assert tables == found.count("caption") == len(regions) == len(set(regions))
    assert all(attributes.get("scope") for tag, attributes in found.tags if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_every_rate_is_shown_with_per_cent_interval_and_counts() -> None:
    report = example("full")
    page_text, tables = Page(page("full")).text(), markdown("full")
    for rate in every_rate(report):
        shown = f"{100 * rate.hits / rate.total:.1f} %"
        note = f"{wilson(rate)}; {rate.hits}/{rate.total}"
        assert f"{shown} {note}" in page_text
        assert f"{shown} ({note})" in tables


def test_every_attacker_is_in_its_group_with_budget_cost_and_settings() -> None:
    report = example("full")
    tables = markdown("full")
    sections = dict(zip(*[iter(re.split(r"^## (.*)$", tables, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for result in report.attacks:
        group = sections[f"{result.threat_model.capitalize()} attackers"]
        assert f"| {result.name} | 10/255 L∞ |" in group
        assert f"| {result.name} | {result.cost.seconds:.1f} s | 101.5 | 100 |" in sections["Cost"]
        assert f"**Settings of {result.name}**" in sections["Settings"]
    for table in (sections["Settings"], Page(page("full")).text("details")):
        assert "schedule.halvings" in table.replace("\\", "")
        assert "0.0392156862745098" in table
        assert "d1" * 32 in table


def test_the_verdict_names_numbers_attackers_budget_and_count() -> None:
    report = example("full")
    said = verdict(report)
    for group, count in (("semi-black-box", 5), ("white-box", 6)):
        worst = report.worst[group].robust_accuracy
        assert f"{100 * worst.value:.1f} % ({wilson(worst)}) under the worst of {count} {group} attackers" in said
        strongest = sorted(report.group(group), key=lambda result: result.rates.robust_accuracy.value)[:2]
        assert "(the strongest are {} and {})".format(*(result.name for result in strongest)) in said
    assert "on 500 images of made-up data, attacked at eps 10/255 L∞: 91.0 %" in said
    assert said.count("eps") == 1
    assert said in Page(page("full")).text("header")
    assert said in markdown("full")


def test_the_verdict_names_each_budget_where_they_differ() -> None:
    report = changed(example("full"), -1, eps=1 / 255)
    said = verdict(report)
    assert said.count("eps") == len(report.groups)
    assert "; eps 10/255 L∞ and 1/255 L∞)" in said


def test_the_verdict_says_what_was_not_measured() -> None:
    said = verdict(examples.report(attackers=(("PAP", "semi-black-box", 0.6),)))
    assert re.search(r"not measured under any .*white-box attacker \(knows everything\)\.$", said)
    assert "not measured under any semi-black-box attacker" in verdict(example("unattacked"))
    assert "says nothing about robustness" in Page(page("unattacked")).text("main")


def test_the_verdict_says_of_a_defense_that_nobody_repeated_or_published_it() -> None:
    defense = examples.report(attackers=(("PAP", "semi-black-box", 0.6), ("APGD", "white-box", 0.1)))
    for group in ("replica", "published"):
        assert f"{group} attacker" in verdict(defense).partition("not measured under any")[2]
        assert f"{group} attacker" not in verdict(example("plain"))  # it has nothing of that


def test_every_step_of_the_ladder_has_its_section_with_what_the_attacker_knows() -> None:
    report = examples.report(attackers=tuple((f"by {group}", group, 0.5) for group in THREAT_MODELS), samples=())
    tables, page_text = markdown_tables(report), Page(html_page(report)).text()
    places = [tables.index(f"## {GROUPS[group]}") for group in THREAT_MODELS]
    assert places == sorted(places)
    for group in THREAT_MODELS:
        assert EXPLANATIONS[group] in tables
        assert EXPLANATIONS[group] in page_text
        assert f"under one {group} attacker (by {group})" in verdict(report)


def test_a_failed_check_is_a_warning_between_verdict_and_numbers() -> None:
    failed = next(check for check in example("full").checks if not check.passed)
    header = Page(page("full")).text("header")
    assert header.index("ZePAD on 500") < header.index("1 of 3 sanity checks failed") < header.index(failed.detail)
    assert markdown("full").index(failed.detail) < markdown("full").index("|---|")
    assert Page(page("full")).count("div", class_="warning") == 1


def test_checks_that_passed_and_checks_that_were_not_run_are_told_apart() -> None:
    assert Page(page("plain")).count("div", class_="warning") == 0
    assert "All 3 sanity checks of this evaluation passed" in markdown("plain")
    assert Page(page("unattacked")).count("div", class_="warning") == 0
    for said in (Page(page("unattacked")).text("header"), markdown("unattacked")):
        assert "were left out of this evaluation" in said


def test_every_accuracy_stands_beside_the_undefended_models() -> None:
    report, bare = example("compared"), example("compared").baseline
    assert bare is not None
    found = Page(page("compared"))
    pairs = [(report.benign_accuracy, bare.benign_accuracy)]
    pairs += [(report.worst[group].robust_accuracy, bare.worst[group].robust_accuracy) for group in report.worst]
    known = {result.name: result.rates.robust_accuracy for result in bare.attacks}
    pairs += [(r.rates.robust_accuracy, known[r.name]) for r in report.attacks if r.name in known]
    assert len(pairs) == 1 + 4 + 11
    shown = re.sub(r"\s+", " ", found.text("li"))
    for own, undefended in pairs:
        both = f"{100 * undefended.value:.1f} % undefended {wilson(undefended)}{100 * own.value:.1f} % defended"
        assert both in shown
        row = f"| {100 * undefended.value:.1f} % ({wilson(undefended)}; {undefended.hits}/500) |"
        assert row in markdown("compared")
    assert f"against {100 * bare.worst['white-box'].robust_accuracy.value:.1f} % undefended" in verdict(report)
    fab = next(line for line in markdown("compared").splitlines() if line.startswith("| FAB "))
    assert fab.endswith("| not run |")  # the attacker of one model alone


def test_nothing_is_called_undefended_where_there_is_no_such_model() -> None:
    assert "undefended" not in Page(page("full")).text("main")
    assert "undefended" not in markdown("full").replace("undefended victim", "")


def test_the_first_sight_has_the_numbers_and_folds_the_rest() -> None:
    found = Page(page("compared"))
    for title in ("Every attacker", "Branches", "Confidence", "Cost", "Sanity checks", "Settings and provenance"):
        assert title in found.text("summary")
    for title in ("In short", "Examples", "Detector"):
        assert title in found.text("h2")
        assert title not in found.text("summary")
    assert all("details" in within for within, _ in found.texts if "table" in within)
    assert any("details" not in within for within, said in found.texts if "li" in within and "undefended" in said)


@pytest.mark.parametrize("seconds", [500.0, 100.0, None])
def test_costs_add_up(seconds: float | None) -> None:
    """The whole may be less than its parts in a report of an earlier version, which forgot what was resumed."""
    report = examples.report(samples=(), provenance={"seconds": seconds} if seconds else {})
    crafting = sum(result.cost.seconds for result in report.attacks)
    assert 100 < crafting < 500
    times = [cells[0].text for _, rows in cost_table(report).sections for cells in (row.cells for row in rows)]
    *parts, whole = (float(text.removesuffix(" s")) for text in times)
    assert sum(parts) == pytest.approx(whole, abs=0.05 * len(parts))
    assert whole == pytest.approx(500 if seconds == 500 else crafting, abs=0.05)


def test_no_peak_touches_the_frame_of_the_picture() -> None:
    from matplotlib.figure import Figure

    for counts in ((0, 0, 7), (1, 1, 1), (0, 0, 0)):
        axis = Figure().subplots()
        result = dataclasses.replace(example("full").attacks[0], scores=counts)
        draw_histograms(axis, (2, 2, 0), [(result, counts)], (-1, 2), "score")
        share = max(max(counts) / max(sum(counts), 1), 0.5)
        assert axis.get_ylim()[0] == 0
        assert axis.get_ylim()[1] > share
        assert axis.get_xlim() == (-1, 2)


@given(low=st.floats(-10, 0), width=st.floats(0.1, 20), share=st.floats(0, 1))
def test_the_threshold_stands_at_its_place_between_the_ends(low: float, width: float, share: float) -> None:
    threshold = low + share * width
    text = histogram_svg((1, 2), (2, 1), top=1, label="x", ends=(low, low + width), threshold=threshold)
    (line,) = (a for tag, a in Page(text).tags if a.get("class") == "threshold")
    assert float(line["x1"] or "") == pytest.approx(160 * share, abs=0.1)


def test_a_plain_classifier_has_no_branches_and_no_detector() -> None:
    text = Page(page("plain")).text()
    assert "This model has no detector." in text
    assert "Accuracy of each branch alone" not in text
    assert "AUROC 0" not in text
    assert "Detection of attacked images" not in markdown("plain")


def test_nothing_counted_is_called_undefined() -> None:
    assert "undefined (0/0)" in markdown("empty_rates")
    assert "undefined" in Page(page("empty_rates")).text("header")


def test_names_are_text_whatever_they_look_like() -> None:
    found = Page(page("hostile"))
    shown = clean(examples.HOSTILE)
    assert "<script>alert(1)</script>" in shown
    assert found.text("h1") == f"Robustness of {shown} on {shown}"
    assert found.count("caption") > 0
    assert f"Settings of {shown}" in found.text("summary")
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in Page(page("full")).tags}
    assert "<" not in markdown("hostile")
    for text in (page("hostile"), markdown("hostile")):
        text.encode("utf-8")
        assert "\x00" not in text
        assert "\u202e" not in text


@given(name=st.text(max_size=40), value=st.text(max_size=40))
def test_any_text_survives_a_table_in_html(name: str, value: str) -> None:
    table = Table(caption=name, columns=("a", value), sections=((name, (Row(name, (Cell(value, name),)),)),))
    found = Page(macros().html_table(table))
    assert found.text("caption") == clean(name)
    assert found.text("td") == clean(value) + (f" {clean(name)}" if name else "")
    assert found.text("thead") == f"\na{clean(value)}\n"


@given(name=st.text(max_size=40), value=st.text(max_size=40))
def test_any_text_stays_in_its_cell_in_markdown(name: str, value: str) -> None:
    table = Table(caption=name, columns=("a", value), sections=((name, (Row(name, (Cell(value),)),)),))
    lines = markdown_table(table).splitlines()[2:]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
    cells = lines[-1].removeprefix("| ").removesuffix(" |")
    read = re.sub(r"\\([\\`*_\[\]|~#])", r"\1", cells)
    for mark, entity in (("<", "&lt;"), (">", "&gt;"), ("&", "&amp;")):
        read = read.replace(entity, mark)
    assert read == f"{clean(name)} | {clean(value)}"


@pytest.mark.parametrize("name", EVERY)
def test_every_row_of_a_markdown_table_has_the_cells_of_its_header(name: str) -> None:
    width = 0
    for line in markdown(name).splitlines():
        bars = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else 0
        assert not bars or not width or bars == width
        width = bars


def test_twelve_attackers_with_four_samples_each_fit_on_a_page_of_three_megabytes() -> None:
    names = [name for name, _, _ in examples.ATTACKERS]
    report = examples.report(samples=examples.samples(names, noise=True))
    text = html_page(report)
    assert len(text.encode()) < 3_000_000
    assert Page(text).count("figure", class_="sample") == 48


def test_a_page_too_large_leaves_samples_out_and_says_how_many() -> None:
    report, found = example("large"), Page(page("large"))
    assert len(page("large").encode()) < 3_000_000
    shown = found.count("figure", class_="sample")
    assert 0 < shown < len(report.samples)
    assert f"{len(report.samples) - shown} more samples would not fit" in found.text("main")
    alts = " ".join(a["alt"] or "" for tag, a in found.tags if tag == "img")
    assert all(f"Attacked image, image 0 under {clean(result.name)}" in alts for result in report.attacks)


def test_a_sample_is_told_in_words() -> None:
    sample = dataclasses.replace(examples.samples(["PAP"], 1)[0], label=0, before=0, after=1, flagged=False)
    text = Page(html_page(examples.report(samples=(sample,)))).text("figure")
    assert "Truth: cat. Without the attack: cat (right). Under the attack: dog (wrong); not flagged by" in text
    beyond = dataclasses.replace(sample, after=7, flagged=None)
    text = Page(html_page(examples.report(samples=(beyond,)))).text("figure")
    assert "Under the attack: class 7 (wrong)." in text


@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_a_bar_is_as_long_as_its_rate_and_its_whisker_as_its_interval(total: int, share: float) -> None:
    rate = Rate(int(share * total), total)
    found = Page(bar_svg(rate, kind="defended"))
    (bar,) = (a for tag, a in found.tags if tag == "rect" and a["class"] == "defended")
    whisker = next(a for tag, a in found.tags if tag == "line" and a["class"] == "whisker")
    assert float(bar["width"].rstrip("%")) == pytest.approx(100 * rate.hits / rate.total, abs=0.006)
    ends = [float(end) for end in wilson(rate).split(" to ")]
    assert [float(whisker[x].rstrip("%")) for x in ("x1", "x2")] == pytest.approx(ends, abs=0.06)


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=25))
def test_a_histogram_keeps_proportions_and_its_mean_is_that_of_the_bins(counts: list[int]) -> None:
    text = histogram_svg(counts, counts, top=1.0, label="x")
    line = re.search(r'class="line" d="M([^"]*)"', text)
    assert line is not None
    heights = [76 - float(point.split()[1]) for point in line[1].split("L")][::2]
    total = sum(counts)
    assert heights == pytest.approx([72 * count / total if total else 0 for count in counts], abs=0.01)
    spread = [(i + 0.5) / len(counts) for i, count in enumerate(counts) for _ in range(count)]
    mean = mean_of_bins(counts)
    assert math.isnan(mean) if not spread else mean == pytest.approx(sum(spread) / len(spread))


def test_an_roc_curve_starts_low_left_and_ends_high_right() -> None:
    text = roc_svg(((0.0, 0.0), (0.25, 0.5), (1.0, 1.0)), threshold=(0.25, 0.5), label="x")
    assert 'd="M14 150L51.5 75L164 0"' in text
    assert '<circle class="ring" cx="51.5" cy="75"' in text


def test_models_are_compared_row_by_row() -> None:
    one, two = examples.report(model="one"), examples.plain(attackers=examples.ATTACKERS[::-1])
    weaker = dataclasses.replace(two.attacks[0], rates=examples.robust_rates(0.02, ()))
    two = dataclasses.replace(two, attacks=(weaker, *two.attacks[1:]))
    tables = comparison_markdown([one, two])
    assert "| attacker | one | plain classifier |" in tables
    row = next(line for line in tables.splitlines() if line.startswith("| FAB "))
    assert row.count("%") == 2
    assert "| 9.0 % (6.8 to 11.8; 45/500) | 2.0 % (1.1 to 3.6; 10/500) |" in row
    for group in ("white-box", "all"):
        worst = [f"{r.worst[group].robust_accuracy.hits}/500" for r in (one, two)]
        assert re.search(rf"^\| Worst of .*{worst[0]}.*{worst[1]}", tables, re.MULTILINE)
    found = Page(comparison_html([one, two]))
    assert found.count("table") == 2
    assert "1 of 3 sanity checks failed" in found.text("header")


def test_a_white_box_may_attack_more_of_an_ensemble_than_of_a_classifier() -> None:
    one, two = examples.report(model="one", samples=()), examples.report(model="two", samples=())
    last = two.group("white-box")[-1]
    fewer = dataclasses.replace(two, attacks=tuple(result for result in two.attacks if result is not last))
    row = next(line for line in comparison_markdown([fewer, one]).splitlines() if line.startswith(f"| {last.name} "))
    assert row.split("|")[2].strip() == "not run"
    assert "%" in row.split("|")[3]


def test_names_in_a_comparison_are_text() -> None:
    report = example("hostile")
    assert Page(comparison_html([report])).count("script") == 0
    assert "<" not in comparison_markdown([report])


def changed(report: EvalReport, index: int, **changes: object) -> EvalReport:
    attacks = list(report.attacks)
    attacks[index] = dataclasses.replace(attacks[index], **changes)
    return dataclasses.replace(report, attacks=tuple(attacks))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: dataclasses.replace(r, provenance={"data_digest": "other"}), "different data"),
        (lambda r: dataclasses.replace(r, provenance={}), 'two does not say .*"data_digest"'),
        (lambda r: dataclasses.replace(r, model="one"), "one more than once"),
        (lambda r: dataclasses.replace(r, attacks=r.attacks[1:]), "only one under AdvEncoder"),
        (lambda r: changed(r, 0, name="PGD"), "only one under AdvEncoder; only two under PGD"),
        (lambda r: changed(r, 0, eps=8 / 255), "AdvEncoder has another eps"),
        (lambda r: changed(r, 0, threat_model="semi-black-box+"), "AdvEncoder has another threat model"),
        (lambda r: changed(r, -1, eps=1 / 255), "white-box budgets"),
        (lambda r: changed(r, 6, eps=1 / 255), "published budgets"),
        (lambda r: changed(r, 0, settings={**r.attacks[0].settings, "steps": 5}), "another settings.steps"),
    ],
)
def test_reports_that_do_not_compare_are_refused(make, message: str) -> None:
    attackers = (*examples.ATTACKERS[:6], ("on the encoders", "published", 0.2), *examples.ATTACKERS[6:])
    one, two = (examples.report(model=name, samples=(), attackers=attackers) for name in ("one", "two"))
    for compare in (comparison_html, comparison_markdown):
        compare([one, two])
        with pytest.raises(InputError, match=message):
            compare([one, make(two)])


@pytest.mark.parametrize("defense_first", [True, False])
def test_a_defense_compares_with_a_classifier_that_publishes_nothing(defense_first: bool) -> None:
    attackers = (*examples.ATTACKERS, ("on the copies", "replica", 0.2), ("on the encoders", "published", 0.3))
    defense = examples.report(model="defense", samples=(), attackers=attackers)
    reports = [defense, examples.report(model="classifier", samples=(), branches=())]
    tables = comparison_markdown(reports if defense_first else reports[::-1])
    for group in ("replica", "published"):
        assert GROUPS[group] in tables
    for name in ("on the copies", "on the encoders"):
        (row,) = (line for line in tables.splitlines() if line.startswith(f"| {name} "))
        assert row.count("not run") == 1
        assert row.count("%") == 1
    assert tables.count("not run") == 4  # two attackers, and the worst of each group


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        comparison_html([])


def test_a_report_compares_with_one_read_from_json() -> None:
    one = examples.report(samples=())
    two = dataclasses.replace(EvalReport.from_json(one.to_json()), model="two")
    assert "| ZePAD | two |" in comparison_markdown([one, two])


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_drawn_whatever_is_missing(name: str) -> None:
    picture = Image.open(io.BytesIO(overview_png(example(name))))
    picture.load()
    assert picture.format == "PNG"
    low, high = picture.convert("L").getextrema()
    assert low < 64 < high


def test_the_picture_draws_letters_its_font_lacks_and_formulas_as_text() -> None:
    assert overview_png(examples.report(model=r"$\foo{ 猫 $ \$", attackers=(), samples=()))


def test_saving_writes_the_four_files(tmp_path) -> None:
    path = save_report(example("hostile"), tmp_path / "out")
    assert path.read_text(encoding="utf-8") == page("hostile")
    assert (path.parent / "report.md").read_text(encoding="utf-8") == markdown("hostile")
    assert (path.parent / "report.png").stat().st_size > 0


def test_learning_curves_are_drawn_where_there_are_any() -> None:
    with_curves = examples.report(samples=(), training=examples.TRAINING)
    assert '<img class="learning" src="data:image/png;base64,' in html_page(with_curves)
    assert "Learning curves of victim, auxiliary, benign" in html_page(with_curves)
    assert EvalReport.from_json(with_curves.to_json()) == with_curves
    assert "learning" not in html_page(examples.report(samples=())).partition("<main")[2]


# ten lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_summary_has_ten_lines_at_most_whatever_the_names_are(name: str) -> None:
    lines = summary(example(name)).split("\n")
    assert 2 <= len(lines) <= 10
    assert all(line.isprintable() and len(line) <= 200 for line in lines)
    assert [line.split("  ")[0].strip() for line in lines[2 : 2 + len(example(name).groups)]] == list(
        example(name).groups
    )


def test_a_summary_names_the_strongest_attacker_of_each_group_and_what_is_left() -> None:
    report = example("full")
    lines = summary(report).split("\n")
    assert f"{report.images} images" in lines[0]
    assert f"{100 * report.benign_accuracy.value:.1f} %" in lines[1]
    for line, group in zip(lines[2:], report.groups, strict=False):
        worst = min(report.group(group), key=lambda result: result.rates.robust_accuracy.value)
        assert f"{100 * report.worst[group].robust_accuracy.value:.1f} %" in line
        assert clean(worst.name)[:30] in line
        assert "eps" in line
    assert f"{100 * report.worst['all'].robust_accuracy.value:.1f} %" in next(x for x in lines if "all together" in x)


def test_a_summary_shows_the_undefended_model_beside() -> None:
    report = example("full")
    bare = dataclasses.replace(example("full"), model="undefended", samples=(), baseline=None)
    plain = summary(dataclasses.replace(report, baseline=None))
    lines = summary(dataclasses.replace(report, baseline=bare)).split("\n")
    assert "undefended" not in plain
    assert f"(undefended: {100 * bare.benign_accuracy.value:.1f} %)" in lines[1]
    for line, group in zip(lines[2:], report.groups, strict=False):
        assert f"(undefended: {100 * bare.worst[group].robust_accuracy.value:.1f} %)" in line
