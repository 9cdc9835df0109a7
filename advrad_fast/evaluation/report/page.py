"""The report's page, from its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from statistics import fmean
from typing import NamedTuple

from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.report.charts import COLOURS, Line, chart
from advrad_fast.evaluation.report.data import Category, Settings, Shown, View, budget_size, budgets
from advrad_fast.evaluation.report.markup import Node, document, embed, tag
from advrad_fast.overlay import FULL_SCALE, legend


class Published(NamedTuple):
    """A figure of the paper (arXiv 2408.04839).

    Attributes:
        what: in words.
        category: of MVTec AD; None for the mean over its 15.
        figure: the key of our figures that it stands beside.
        budget: the budget or radius, where the figure has one.
        value: in percent, as printed.
        printed: in the paper itself; else a third party's summary of it.
    """

    what: str
    category: str | None
    figure: str
    budget: str | None
    value: str
    printed: bool


PAPER = (
    Published("clean image AUROC, one denoising step", "screw", "image_auroc", None, "99.3", True),
    Published("clean image AUROC, one denoising step", "toothbrush", "image_auroc", None, "100", True),
    Published("clean image AUROC, one denoising step", "wood", "image_auroc", None, "98.3", True),
    Published("certified AUROC, l2 radius 0.2", "grid", "certified_auroc", "0.2", "98.2", False),
    Published("robust AUROC, linf 2/255", None, "robust_auroc", "linf 2/255", "81.1", False),
    Published("robust AUROC of the best undefended detector, linf 2/255", None, "", None, "at most 2.3", False),
)

MISSING = "\N{EN DASH}"  #: where there is no figure

Cell = Node | str | float | None


def page(
    categories: Sequence[Category],
    *,
    title: str | None = None,
    created: str = "",
    introduction: str | None = None,
    credit: str | None = None,
) -> bytes:
    """The page, in UTF-8; it needs no other file and no network.

    Args:
        categories: at least one.
        title: above the page.
        created: when, in words.
        introduction: a paragraph under the title.
        credit: a paragraph at the end: whose images these are.
    """
    names = ", ".join(c.name for c in categories)
    heading = title or f"Anomaly detection: {names}"
    good, bad = (sum(c.figures[key] for c in categories) for key in ("n_good", "n_bad"))
    counts = f"{good} good and {bad} defective test images"
    body = tag(
        "body",
        tag("header", tag("h1", heading), tag("p", introduction, class_="intro") if introduction else None),
        tag(
            "main",
            tag("p", " · ".join(filter(None, (counts, created, f"advrad_fast {_version(categories)}"))), class_="note"),
            _alarm(categories),
            _tiles(categories),
            _figures(categories),
            _paper(categories),
            _curves(categories),
            *map(_pictures, categories),
            _defects(categories),
            _latency(categories),
            _checks(categories),
            _samples(categories),
            _settings(categories),
        ),
        tag("footer", tag("p", credit)) if credit else None,
    )
    folder = files("advrad_fast") / "data"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return document(heading, body, style=style, script=script)


def percent(value: float | None) -> str:
    """A share as people write it: 99.36."""
    return MISSING if value is None else f"{100 * value:.2f}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    found = [v for v in values if v is not None]
    return fmean(found) if found else None


def _figure(category: Category, key: str, name: str | None = None) -> float | None:
    value = category.figures.get(key)
    return value if name is None else (value or {}).get(name)


def _mean(categories: Sequence[Category], key: str, name: str | None = None) -> float | None:
    return mean(_figure(c, key, name) for c in categories)


def _version(categories: Sequence[Category]) -> str:
    found = {str(c.settings.get("Machine", {}).get("advrad_fast", "")) for c in categories}
    return ", ".join(sorted(found - {""}))


def _section(title: str, *content: Node | None, note: str | None = None) -> Node:
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *content)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, label: str, foot: Sequence[Cell] | None = None) -> Node:
    """A table that can be sorted by any column; it scrolls by itself where the screen is narrower.

    Cells that are numbers stand for shares, and are shown in percent; nodes are put in as they are.
    """
    cells = [list(map(_cell, row)) for row in rows]
    numeric = ["number" if all(row[i].get("class") == "number" for row in cells) else None for i in range(len(heads))]
    columns = zip(heads, numeric, strict=True)
    head = tag("tr", *(tag("th", tag("button", t, type="button"), scope="col", aria_sort="none", class_=c) for t, c in columns))
    body = tag("tbody", *(tag("tr", *row) for row in cells))
    feet = tag("tfoot", tag("tr", *map(_cell, foot))) if foot else None
    table = tag("table", tag("thead", head), body, feet, class_="sortable")
    return tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=label)


def _cell(value: Cell) -> Node:
    if isinstance(value, Node):
        return value
    if value is None:
        return tag("td", MISSING, class_="number", data_value="")
    if isinstance(value, str):
        return tag("td", value)
    return _number(percent(value), value)


def _number(text: str, value: float) -> Node:
    """A cell that is sorted by ``value``."""
    return tag("td", text, class_="number", data_value=f"{value:.17g}")


def _count(value: int) -> Node:
    return _number(str(value), value)


def _share(part: int, whole: int) -> Node:
    return _number(f"{part} of {whole}", part / whole if whole else 0.0)


def _alarm(categories: Sequence[Category]) -> Node | None:
    """Figures of an attack that broke a sanity rule must not be read without that."""
    broken = [c.name for c in categories if not all(check.passed for check in c.checks)]
    if not broken:
        return None
    text = f"The attack broke a sanity rule on {', '.join(broken)}: the robust figures there are not to be trusted."
    return tag("p", text, class_="alarm")


def _over(categories: Sequence[Category], key: str, name: str | None = None) -> str:
    """What a mean is over: nothing to say if that is one category, and there is no other."""
    count = sum(_figure(c, key, name) is not None for c in categories)
    return "" if len(categories) == 1 else f"mean of {count} of {len(categories)} categories"


def _tiles(categories: Sequence[Category]) -> Node:
    """The headline: of the budgets and radii only the paper's, or else the largest; the table has them all."""

    def tile(name: str, value: str, *notes: str) -> Node:
        note = "; ".join(filter(None, notes))
        return tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", note)), class_="tile")

    def headline(key: str, chosen: tuple[str, ...]) -> list[str]:
        names = budgets(categories, key)
        return [name for name in names if name in chosen] or names[-1:]

    worst = min(categories, key=lambda c: float(c.figures["image_auroc"]))
    low, high = worst.figures["image_auroc_interval"]
    note = f"95 % interval {percent(low)} to {percent(high)}"
    if len(categories) > 1:
        note = f"{_over(categories, 'image_auroc')}; least {percent(worst.figures['image_auroc'])}, {worst.name}"
    tiles = [tile("Image AUROC", percent(_mean(categories, "image_auroc")), note)]
    if (pixel := _mean(categories, "pixel_auroc")) is not None:
        aupro = _mean(categories, "aupro")
        tiles.append(
            tile(
                "Pixel AUROC",
                percent(pixel),
                "" if aupro is None else f"AUPRO {percent(aupro)}",
                _over(categories, "pixel_auroc"),
            )
        )
    for name in headline("robust_auroc", ("linf 2/255", "l2 0.2")):
        value = percent(_mean(categories, "robust_auroc", name))
        had = [c for c in categories if _figure(c, "robust_auroc", name) is not None]
        part = f"under attack, {sum(c.attacked for c in had)} of {sum(len(c.samples) for c in had)} images"
        tiles.append(tile(f"Robust AUROC, {name}", value, part, _over(categories, "robust_auroc", name)))
    for name in headline("certified_auroc", ("0.2",)):
        value = percent(_mean(categories, "certified_auroc", name))
        tiles.append(tile(f"Certified, l2 radius {name}", value, "AUROC at least", _over(categories, "certified_auroc", name)))
    alarms, good = (sum(c.figures[key] for c in categories) for key in ("false_alarms", "n_good"))
    found, bad = (sum(c.figures[key] for c in categories) for key in ("defects_found", "n_bad"))
    tiles.append(tile("At the threshold", f"{found} of {bad}", f"defects found; {alarms} of {good} good parts rejected"))
    backends = ", ".join(sorted({str(c.figures["backend"]) for c in categories}))
    milliseconds = fmean(c.figures["p50_ms"] for c in categories)
    tiles.append(tile("An inspection", f"{milliseconds:.2f} ms", "median", backends))
    return tag("dl", *tiles, class_="tiles")


def _figures(categories: Sequence[Category]) -> Node:
    columns: list[tuple[str, Callable[[Category], float | None]]] = [
        ("image AUROC", lambda c: _figure(c, "image_auroc")),
        ("F1max", lambda c: _figure(c, "f1_max")),
        ("pixel AUROC", lambda c: _figure(c, "pixel_auroc")),
        ("AUPRO", lambda c: _figure(c, "aupro")),
    ]
    robust = budgets(categories, "robust_auroc")
    for name in robust:
        columns.append((f"robust, {name}", lambda c, n=name: _figure(c, "robust_auroc", n)))  # type: ignore[misc]
    for name in budgets(categories, "certified_auroc"):
        columns.append((f"certified, r = {name}", lambda c, n=name: _figure(c, "certified_auroc", n)))  # type: ignore[misc]

    def row(c: Category) -> list[Cell]:
        f = c.figures
        low, high = f["image_auroc_interval"]
        interval = _number(f"{percent(low)} to {percent(high)}", low)
        first, *others = (read(c) for _, read in columns)
        counts = [_count(f["n_good"]), _count(f["n_bad"])]
        ends = [_share(f["defects_found"], f["n_bad"]), _share(f["false_alarms"], f["n_good"]), _count(f["abstained"])]
        ends += [_share(c.attacked, len(c.samples))] if robust else []
        return [tag("th", c.name, scope="row"), *counts, first, interval, *others, *ends]

    heads = ["category", "good", "defective", columns[0][0], "95 % interval", *(name for name, _ in columns[1:])]
    heads += ["defects found", "false alarms", "abstained", *(["attacked"] if robust else [])]
    foot: list[Cell] | None = None
    if len(categories) > 1:
        first, *others = (mean(read(c) for c in categories) for _, read in columns)
        counts = [_count(sum(c.figures[key] for c in categories)) for key in ("n_good", "n_bad")]
        foot = [tag("th", "mean", scope="row"), *counts, first, "", *others, *[""] * (4 if robust else 3)]
    note = (
        "In percent. Intervals are over the draw of the images. F1max is at the threshold that is best for these labels, so it "
        "is an upper bound. A mean is over the categories that have the figure."
    )
    return _section("Figures", _table(heads, map(row, categories), label="Figures by category", foot=foot), note=note)


def _paper(categories: Sequence[Category]) -> Node:
    rows: list[list[Cell]] = []
    for published in PAPER:
        own: float | None = None
        whose = "MVTec AD, mean of 15" if published.category is None else f"MVTec AD, {published.category}"
        where = ""
        if published.category is None and published.figure:
            own = _mean(categories, published.figure, published.budget)
            where = "" if own is None else _over(categories, published.figure, published.budget) or categories[0].name
        elif published.category is not None:
            same = [c for c in categories if c.name.lower() == published.category]
            own = _mean(same, published.figure, published.budget)
        source = "printed in it" if published.printed else "a third party's summary"
        value = _number(published.value, float(published.value.rpartition(" ")[2]))
        rows.append([published.what, whose, value, own, where, source])
    heads = ["figure", "data", "paper", "here", "of", "source"]
    note = (
        "The figures of Cao, Lin and Chen, arXiv 2408.04839, that are known to us. A category here stands beside the paper's of "
        "the same name; that it is MVTec AD's is not checked. The paper's attack may differ in steps and in the scale of pixels."
    )
    return _section("Beside the paper", _table(heads, rows, label="The paper's figures"), note=note)


def _curves(categories: Sequence[Category]) -> Node:
    plots = []
    for category in categories:
        lines = []
        for number, budget in enumerate([None, *budgets([category], "robust_auroc")]):
            labels, scores = category.scores(budget)
            if 0 < labels.sum() < labels.size:
                curve = metrics.roc_curve(labels, scores)
                part = "" if labels.size == len(category.samples) else f", of {labels.size} images"
                name = f"{budget or 'clean'}: {percent(category.auroc(budget))}{part}"
                lines.append(Line(name, _corners(curve.fpr, curve.tpr), number % COLOURS))
        drawing = chart(lines, x_label="false alarms, %", y_label="defects found, %", x_percent=True, chance=True)
        plots.append(tag("figure", tag("figcaption", f"{category.name}: ROC"), drawing))
    sizes = [budget_size(name) for name in budgets(categories, "robust_auroc")]
    for norm in sorted({norm for norm, size in sizes if size >= 0.0}):  # not NaN
        starts = [c.figures.get("attacked_clean_auroc", c.figures["image_auroc"]) for c in categories]
        found = [_along(c, "robust_auroc", norm, start) for c, start in zip(categories, starts, strict=True)]
        plots.append(_against(categories, found, f"AUROC against the {norm} budget", f"{norm} budget, of a pixel range of 1"))
    if budgets(categories, "certified_auroc"):
        found = [_along(category, "certified_auroc", "") for category in categories]
        plots.append(_against(categories, found, "Certified AUROC against the radius", "l2 radius, of a pixel range of 1"))
    return _section("Curves", tag("div", *plots, class_="plots"))


def _corners(x: Iterable[float], y: Iterable[float]) -> list[tuple[float, float]]:
    """A curve without the points inside its straight lines."""
    kept: list[tuple[float, float]] = []
    for point in zip(map(float, x), map(float, y), strict=True):
        while len(kept) > 1 and ((kept[-2][0] == kept[-1][0] == point[0]) or (kept[-2][1] == kept[-1][1] == point[1])):
            kept.pop()
        kept.append(point)
    return kept


def _along(category: Category, key: str, norm: str, start: float | None = None) -> list[tuple[float, float]]:
    """(size, AUROC) of a category's budgets in one norm, by size."""
    sized = [(budget_size(name), value) for name, value in category.figures.get(key, {}).items()]
    points = [(size, float(value)) for (own, size), value in sized if own == norm and size >= 0.0]
    return sorted(points if start is None or not points else [(0.0, start), *points])


def _against(categories: Sequence[Category], found: Sequence[list[tuple[float, float]]], title: str, label: str) -> Node:
    """A line a category; with many of them quiet ones, and their mean where all have a point."""
    pairs = [(c.name, points) for c, points in zip(categories, found, strict=True) if points]
    many = len(pairs) >= COLOURS  # the mean has a colour too
    lines = [Line(name, points, None if many else i, marks=not many) for i, (name, points) in enumerate(pairs)]
    if len(pairs) > 1:
        shared = sorted(set.intersection(*({x for x, _ in points} for _, points in pairs)))
        middle = [(x, fmean(dict(points)[x] for _, points in pairs)) for x in shared]
        if middle:
            lines.append(Line("mean", middle, 0 if many else len(pairs), marks=True))
    x_max = max((x for _, points in pairs for x, _ in points), default=0.0) or 1.0
    return tag("figure", tag("figcaption", title), chart(lines, x_label=label, y_label="AUROC, %", x_max=x_max))


def _pictures(category: Category) -> Node:
    scale = tag("p", tag("span", "0"), tag("img", alt="colour scale", src=embed(legend())), class_="legend")
    scale.append(tag("span", f"{FULL_SCALE:g} times the threshold"))
    note = (
        "All on one colour scale, whose middle is the threshold. Images are spread evenly over the ranks of their label, so "
        "misses and false alarms show too; defective ones come first. A red edge: the detector is wrong about the clean image."
    )
    cards = [_card(shown) for shown in category.shown]
    return _section(f"{category.name}: heat maps", scale, tag("div", *cards, class_="cards"), note=note)


def _card(shown: Shown) -> Node:
    rows = [_view(shown, view) for view in shown.views]
    first = shown.views[0]
    wrong = (first.outcome != "OK") != bool(shown.label)
    caption = tag("figcaption", tag("span", shown.name, class_="name"), tag("span", f"labelled {shown.defect}"))
    return tag("figure", *rows, caption, class_="card wrong" if wrong else "card")


def _view(shown: Shown, view: View) -> Node:
    score = MISSING if view.score is None else f"{view.score:.4g}"
    line = tag("p", tag("b", view.outcome, class_=f"outcome {view.outcome.lower()}"), f" {view.title}, score {score}")
    frame = tag("img", src=view.frame, alt=f"{shown.name}, {view.title}", loading="lazy", decoding="async")
    heat = tag("img", src=view.heat_map, alt=f"heat map of {shown.name}, {view.title}", loading="lazy", decoding="async")
    return tag("div", line, tag("div", frame, heat, class_="pair"), class_="view")


def _defects(categories: Sequence[Category]) -> Node:
    names = budgets(categories, "robust_auroc")
    rows: list[list[Cell]] = []
    for category in categories:
        threshold = category.figures["threshold"]
        for kind in category.defects():
            labels, scores = category.scores(defect=kind)
            bad = scores[labels == 1]
            attacked = [category.auroc(name, kind) for name in names]
            share = _share(int((bad > threshold).sum()), bad.size)
            rows.append([category.name, kind, _count(bad.size), share, category.auroc(defect=kind), *attacked])
    heads = ["category", "defect", "images", "found", "image AUROC", *(f"robust, {name}" for name in names)]
    note = "Each kind of defect against all good parts of its category; AUROC in percent."
    return _section("Kinds of defect", _table(heads, rows, label="Kinds of defect"), note=note)


def _latency(categories: Sequence[Category]) -> Node:
    stages = list(dict.fromkeys(stage for c in categories for stage in c.latency))

    def row(c: Category) -> list[Cell]:
        cells: list[Cell] = []
        for stage in stages:
            for part in (0, 1) if stage == "total" else (0,):
                value = c.latency[stage][part] if stage in c.latency else None
                cells.append(None if value is None else _number(f"{value:.2f}", value))
        return [tag("th", c.name, scope="row"), str(c.figures["backend"]), *cells]

    heads = [h for stage in stages for h in ((f"{stage}, p50", "total, p99") if stage == "total" else (f"{stage}, p50",))]
    note = (
        "Milliseconds an inspection of one frame, maps included, as measured while this evaluation ran: not a benchmark "
        "(advrad-fast bench is)."
    )
    return _section("Latency", _table(["category", "backend", *heads], map(row, categories), label="Latency"), note=note)


def _checks(categories: Sequence[Category]) -> Node | None:
    rows: list[list[Cell]] = [
        [c.name, tag("td", "holds" if k.passed else "violated", class_="good" if k.passed else "bad"), k.rule, k.detail]
        for c in categories
        for k in c.checks
    ]
    if not rows:
        return None
    note = "What an attack must not do if it is sound. A violation means that the robust figures above are not to be trusted."
    table = _table(["category", "outcome", "rule", "measured"], rows, label="Sanity rules")
    return _section("Sanity of the attack", table, note=note)


def _samples(categories: Sequence[Category]) -> Node:
    names = budgets(categories, "robust_auroc")

    def score(value: float | None) -> Cell:
        return None if value is None else _number(f"{value:.4g}", value)

    rows: list[list[Cell]] = []
    for c in categories:
        for s in c.samples:
            attacked = [score(s.attacked.get(name)) for name in names]
            right = "yes" if (s.outcome != "OK") == bool(s.label) else "no"
            rows.append([c.name, s.name, s.defect, s.outcome, right, score(s.score), *attacked])
    heads = ["category", "image", "labelled", "outcome", "right", "score", *(f"score, {name}" for name in names)]
    table = _table(heads, rows, label="All test images")
    return _section("All test images", tag("details", tag("summary", f"{len(rows)} images with their scores"), table))


def _settings(categories: Sequence[Category]) -> Node:
    groups = []
    for c in categories:
        general: Settings = {key: c.figures[key] for key in ("model", "data", "seed", "threshold")}
        blocks = []
        for title, values in ({"Run": general} | c.settings).items():
            items = [tag("tr", tag("th", key, scope="row"), tag("td", _text(value))) for key, value in values.items()]
            heading = title if len(categories) == 1 else f"{c.name}: {title.lower()}"
            blocks.append(tag("div", tag("h3", heading), tag("table", tag("tbody", *items), class_="pairs")))
        groups.append(tag("div", *blocks, class_="settings"))
    return _section("Settings, seeds and versions", *groups)


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
