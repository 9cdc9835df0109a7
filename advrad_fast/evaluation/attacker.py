"""What is attacked and how hard, the attacks by name, and the rules that an attack must keep for its figures to mean anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.detector import Detector
from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.datasets import Sample
from advrad_fast.evaluation.evaluate import sample_name
from advrad_fast.evaluation.rows import Budget, auroc_of
from advrad_fast.model import ModelFile

ATTACKS = ("pgd", "square", "transfer")
SURFACES = ("prepared", "camera")
_UNBOUNDED = "linf 1"


@dataclass(frozen=True)
class RobustSettings:
    """What is attacked, and how hard.

    Attributes:
        budgets: names, as :meth:`Budget.parse` reads them.
        attacks: out of ``pgd``, ``square``, ``transfer``.
        steps, eot, restarts: of PGD (:class:`advrad_fast.evaluation.attacks.pgd.PGD`).
        queries: of the Square Attack.
        limit: at most this many good and this many bad images, evenly spread over the test set; None for all.
        sanity: good and bad images that the sanity rules are tried on; 0 for none.
        surfaces: out of ``prepared`` and ``camera``; None for both where the model aligns or brightens, else the first.
        seed: of all that is drawn.
    """

    budgets: tuple[str, ...] = ("linf 2/255", "l2 0.2")
    attacks: tuple[str, ...] = ("pgd",)
    steps: int = 100
    eot: int = 8
    restarts: int = 1
    queries: int = 500
    limit: int | None = None
    sanity: int = 2
    surfaces: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or len({Budget.parse(b) for b in self.budgets}) != len(self.budgets):
            raise ConfigError(expected("budgets", "at least one, each once", self.budgets))
        if not self.attacks or len(set(self.attacks)) != len(self.attacks) or not set(self.attacks) <= set(ATTACKS):
            raise ConfigError(expected("attacks", f"some of {', '.join(ATTACKS)}", self.attacks))
        if self.surfaces is not None and (not self.surfaces or not set(self.surfaces) <= set(SURFACES)):
            raise ConfigError(expected("surfaces", f"None or some of {', '.join(SURFACES)}", self.surfaces))
        for name, least in (("steps", 1), ("eot", 1), ("restarts", 1), ("queries", 1), ("sanity", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(expected(name, f"an integer of at least {least}", value))
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise ConfigError(expected("limit", "None or an integer of at least 1", self.limit))

    def run(self, detector: Detector, data: str, other: ModelFile | None) -> str:
        """The digest that rows carry: over all that a row depends on.  More images, budgets or attacks are the same run."""
        free = ("budgets", "attacks", "limit", "sanity", "surfaces")
        own = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        parts = [detector.model.fingerprint, detector.threshold, detector.backend, data, other and other.fingerprint, own]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def attacked(self, model: ModelFile) -> tuple[str, ...]:
        """The surfaces that are attacked of a model."""
        return self.surfaces if self.surfaces is not None else SURFACES if changes(model) else SURFACES[:1]


def changes(model: ModelFile) -> bool:
    """Whether a prepared image would be changed again by being prepared."""
    return model.config.image.pose is not None or model.config.image.brightness is not None


class Attacker:
    """The attacks by name, and the pipelines they run on, built when the first is needed."""

    def __init__(
        self, model: ModelFile, other: ModelFile | None, settings: RobustSettings, device: str, threads: int | None = None
    ) -> None:
        self.model, self.other, self.settings, self.device, self.threads = model, other, settings, device, threads
        self._pipelines: dict[str, Any] = {}

    def pipeline(self, name: str = "own", frame: NDArray[np.uint8] | None = None) -> Any:
        """The score of the attacked model, or of the ``other``, differentiable: of prepared images, or of ``frame``."""
        from advrad_fast.evaluation.attacks.camera import Preparation
        from advrad_fast.evaluation.attacks.pipeline import ScorePipeline

        model = self.other if name == "other" and self.other is not None else self.model
        if name not in self._pipelines:
            self._pipelines[name] = ScorePipeline(model, device=self.device, threads=self.threads)
        pipeline = self._pipelines[name]
        return pipeline if frame is None else pipeline.through(Preparation(frame, model.config.image))

    def attack(
        self,
        name: str,
        image: NDArray[np.uint8],
        label: int,
        budget: Budget,
        tag: str,
        steps: int | None = None,
        camera: bool = False,
    ) -> Any:
        """An :class:`~advrad_fast.evaluation.attacks.pipeline.Attacked` of one prepared image, or of the camera's frame."""
        from advrad_fast.evaluation.attacks.pgd import PGD, pgd
        from advrad_fast.evaluation.attacks.pipeline import generator
        from advrad_fast.evaluation.attacks.square import Square, square

        s = self.settings
        frame = image if camera else None
        generators = [generator(s.seed, "attack", tag, budget.name, name, *(["camera"] if camera else []))]
        if name == "square":
            return square(
                self.pipeline(frame=frame), image[None], [label], budget, Square(s.queries, s.eot), generators=generators
            )
        pipeline = self.pipeline("other" if name == "transfer" else "own", frame)
        made = PGD(steps or s.steps, s.eot, s.restarts)
        return pgd(pipeline, image[None], [label], budget, made, generators=generators)

    def sanity(self, chosen: Sequence[tuple[Sample, NDArray[np.uint8] | None]]) -> list[dict[str, Any]]:
        """The rules, on a few images, before rounding, all judged on the same fresh draws."""
        from advrad_fast.evaluation.attacks.pipeline import generator, signs_of, to_float

        found = [(s, image) for s, image in chosen if image is not None]
        if len({s.label for s, _ in found}) < 2:
            return []
        pipeline, settings = self.pipeline(), self.settings
        first = Budget.parse(settings.budgets[0])
        double = Budget(first.norm, 2 * first.size, f"twice {first.name}")
        unbounded = Budget.parse(_UNBOUNDED)
        plans: dict[str, tuple[str, Budget, int]] = {
            "full": ("pgd", first, settings.steps),
            "fewer": ("pgd", first, max(settings.steps // 4, 1)),
            "larger": ("pgd", double, settings.steps),
            "unbounded": ("pgd", unbounded, max(settings.steps, 40)),
            "square": ("square", first, 0),
        }
        gains: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("clean", *plans)}
        for sample, image in found:
            name = sample_name(sample.path)
            noise = pipeline.draw([generator(settings.seed, "sanity", name)], 8)
            signs = signs_of([sample.label], pipeline.device)

            def judged(x: Any, noise: Any = noise, signs: Any = signs) -> NDArray[np.float64]:
                return np.array([float(pipeline.gains(x, signs, noise[:, i : i + 1])) for i in range(noise.shape[1])])

            gains["clean"].append(judged(to_float(image[None], pipeline.device)))
            for plan, (attack, budget, steps) in plans.items():
                attacked = self.attack(attack, image, sample.label, budget, name, steps or None)
                gains[plan].append(judged(attacked.images))
        arrays = {name: np.array(values) for name, values in gains.items()}  # (images, draws)
        # What chance may do: three standard errors over the draws, for these images, and a hundredth of the clean scores.
        scale = 0.01 * float(np.abs(arrays["clean"]).mean())

        def no_less(rule: str, strong: str, weak: str, budget: str) -> dict[str, Any]:
            difference = arrays[strong] - arrays[weak]
            error = float(np.sqrt(difference.var(axis=1, ddof=1).sum() / difference.shape[1])) / len(difference)
            limit = -(3.0 * error + scale)
            value = float(difference.mean())
            return {"rule": rule, "budget": budget, "holds": value >= limit, "value": value, "limit": limit}

        signs_ = {str(i): (s.label, float(arrays["unbounded"][i].mean()) * (1 - 2 * s.label)) for i, (s, _) in enumerate(found)}
        area = auroc_of(signs_)
        return [
            no_less("more steps never help the defender", "full", "fewer", first.name),
            no_less("a larger budget never helps the defender", "larger", "full", double.name),
            no_less("a search without gradients does not beat the gradient", "full", "square", first.name),
            {"rule": "an unbounded budget breaks it", "budget": _UNBOUNDED, "holds": area <= 0.1, "value": area, "limit": 0.1},
        ]
