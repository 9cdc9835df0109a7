"""Report data for the tests: drawn parts, made-up figures, and names that try to become markup."""

from __future__ import annotations

from typing import Any

import numpy as np
from parts import disc, scratched
from PIL import Image

from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.report.data import Category, Check, Scored, Shown, View
from advrad_fast.evaluation.report.markup import embed

HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>.png"
BUDGETS = ("linf 1/255", "linf 2/255", "l2 0.2")


def category(name: str = "screw", *, seed: int = 0, attacked: bool = True, count: int = 20) -> Category:
    """A category whose scores fall apart as the budget grows; its figures are those of its scores."""
    rng = np.random.default_rng(seed)
    samples, shown = [], []
    for i in range(2 * count):
        label = i % 2
        score = float(rng.normal(1.0 + 1.6 * label, 0.5))
        down = {budget: score + (0.2 * (n + 1)) * (1 - 2 * label) for n, budget in enumerate(BUDGETS)} if attacked else {}
        defect = ("good", ("dent", "scratch")[i // 2 % 2])[label]
        title = HOSTILE if i == 1 else f"{defect}/{i:03d}.png"
        samples.append(Scored(title, label, defect, "DEFECT" if score > 1.8 else "OK", score, dict(down)))
        if i < 6:
            frame = embed(Image.fromarray((disc, scratched)[label](rng)))
            views = [View("clean", frame, frame, samples[-1].outcome, score)]
            views += [View(budget, frame, frame, "OK", value) for budget, value in list(down.items())[1:2]]
            shown.append(Shown(title, label, defect, views))
    samples.append(Scored("dent/lost.png", 1, "dent", "ABSTAIN", None, dict.fromkeys(BUDGETS) if attacked else {}))
    made = Category({"data": name}, samples, shown, {"prepare": [0.2, 0.4], "total": [1.8, 3.0]})
    labels, scores = made.scores()
    figures: dict[str, Any] = {
        "data": name,
        "n_good": count,
        "n_bad": count + 1,
        "image_auroc": metrics.auroc(labels, scores),
        "image_auroc_interval": list(metrics.auroc_interval(labels, scores)),
        "f1_max": metrics.f1_max(labels, scores)[0],
        "pixel_auroc": 0.97 + seed / 1000,
        "aupro": None,
        "robust_auroc": {budget: made.auroc(budget) for budget in BUDGETS} if attacked else {},
        "certified_auroc": {"0.05": 0.95, "0.1": 0.9, "0.2": 0.81} if attacked else {},
        "threshold": 1.8,
        "false_alarms": int((scores[labels == 0] > 1.8).sum()),
        "defects_found": int((scores[labels == 1] > 1.8).sum()),
        "abstained": 1,
        "seed": seed,
        "backend": "cpu (bf16)",
        "p50_ms": 1.8,
        "model": f"{name}.safetensors",
    }
    checks = [Check("a larger budget never helps the defender", True, "92.1 >= 86.8"), Check("more steps", False, "86.8 < 90.0")]
    settings: dict[str, Any] = {
        "Model": {"timestep k": 100, "pose laid level": False, "note": HOSTILE},
        "Machine": {"advrad_fast": "0.1.0", "cores": 2},
    }
    return Category(figures, samples, shown, made.latency, checks if attacked else [], settings)
