"""``advrad-fast evaluate --robust``: the detector under attack."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import engine_options, say
from advrad_fast.errors import ConfigError


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add the options of an attack."""
    group = parser.add_argument_group("under attack", "needs PyTorch; a run that was stopped goes on where it was")
    group.add_argument("--robust", action="store_true", help="attack the images and measure again")
    group.add_argument("--budgets", default="linf 2/255,l2 0.2", help="in [0, 1] units (default 'linf 2/255,l2 0.2')")
    group.add_argument("--attacks", default="pgd", help="some of pgd,square,transfer (default pgd)")
    group.add_argument("--attack-steps", type=int, help="of PGD (default 100; 20 with --limit)")
    group.add_argument("--eot", type=int, help="noise draws a gradient is averaged over (default 8; 2 with --limit)")
    group.add_argument("--restarts", type=int, default=1, help="random starts of PGD (default 1)")
    group.add_argument("--queries", type=int, help="of the Square Attack (default 500; 100 with --limit)")
    group.add_argument(
        "--surfaces", help="some of prepared,camera (default both where the model aligns or brightens, else prepared)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="attack N good and N bad images only")
    group.add_argument("--sanity", type=int, default=2, metavar="N", help="try the sanity rules on N + N images (default 2)")
    group.add_argument("--transfer-model", type=Path, metavar="FILE", help="the model that 'transfer' attacks are made on")
    group.add_argument("--results", type=Path, metavar="FILE", help="rows, as they come (default MODEL-DATA.robust.jsonl)")
    group.add_argument("--device", default="cpu", help="PyTorch's, for the attacks (default cpu)")


def run(options: argparse.Namespace, dataset: Any, detector: Any) -> Any:
    """Attack: a :class:`~advrad_fast.evaluation.report.Attack`."""
    from advrad_fast.detector import Detector
    from advrad_fast.evaluation.attacker import RobustSettings
    from advrad_fast.evaluation.report import Attack
    from advrad_fast.evaluation.robust import evaluate_robust
    from advrad_fast.model import ModelFile

    quick = options.limit is not None

    def given(value: int | None, full: int, short: int) -> int:
        return value if value is not None else short if quick else full

    settings = RobustSettings(
        budgets=tuple(part.strip() for part in options.budgets.split(",")),
        attacks=tuple(part.strip() for part in options.attacks.split(",")),
        steps=given(options.attack_steps, 100, 20),
        eot=given(options.eot, 8, 2),
        restarts=options.restarts,
        queries=given(options.queries, 500, 100),
        limit=options.limit,
        sanity=options.sanity,
        surfaces=None if options.surfaces is None else tuple(part.strip() for part in options.surfaces.split(",")),
        seed=options.seed,
    )
    folder = options.report or Path()
    results = options.results or folder / f"{options.model.stem}-{dataset.name}.robust.jsonl"
    if ("transfer" in settings.attacks) != (options.transfer_model is not None):
        raise ConfigError("--transfer-model: expected a model file exactly where 'transfer' is among --attacks")
    other = None if options.transfer_model is None else ModelFile.load(options.transfer_model)
    rows, summary = evaluate_robust(
        detector,
        dataset,
        results,
        settings,
        name=options.model.stem,
        make=partial(Detector, backend=options.backend, **engine_options(options)),
        other=other,
        device=options.device,
        keep=options.report is not None,
        on_step=_Eta(),
        ray=options.ray,
    )
    say(f"rows: {results}")
    return Attack(rows, summary, results.parent)


class _Eta:
    """``12/60 attacks, 3.1 min left`` on standard error.  Rows that were there already are not counted in the time left."""

    def __init__(self) -> None:
        self._first = self._last = time.monotonic()
        self._slow = 0
        self._said = -60.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._slow += now - self._last > 0.01
        self._last = now
        if now - self._said >= 10.0 or done == total:
            left = (now - self._first) / max(self._slow, 1) * (total - done) / 60.0
            say(f"{done}/{total} attacks, {left:.1f} min left")
            self._said = now


def figures(attack: Any) -> dict[str, Any]:
    """What the attack adds to the figures: ``robust_auroc`` {budget: value}, and ``robust``, the whole summary."""
    import dataclasses

    return {"robust_auroc": attack.summary.robust_auroc, "robust": dataclasses.asdict(attack.summary)}


def table(attack: Any) -> str:
    """The summary as text."""
    from advrad_fast.evaluation import robust

    return robust.table(attack.summary)


def check(attack: Any) -> None:
    """Fail, after all has been written, where a sanity rule was broken."""
    from advrad_fast.evaluation import robust

    robust.check_sanity(attack.summary)
