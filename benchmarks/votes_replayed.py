"""Decisions and votes at a radius and thresholds, from scores that are drawn already.

    advrad-fast evaluate MODEL DATA --certified --sigma 0.25 --votes 256 --scores FILE
    python benchmarks/votes_replayed.py MODEL DATA FILE --radius 0.2 --threshold 4.737 5.380

The draws are independent, and each image's votes are taken in the order drawn until :class:`DecisionTest` has settled them, as
``Detector.certify`` would with ``max_votes`` draws.  Beside it (``fixed``) what all the draws certify by Clopper and Pearson's
bound, and the AUROC of the draws' quantiles without any correction for the number of draws (``plug_in``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from advrad_fast.bench.timing import commit
from advrad_fast.certify import DecisionTest, certified_auroc, fixed_certificate, vote_probability
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.evaluate import sample_name
from advrad_fast.evaluation.metrics import auroc
from advrad_fast.model import ModelFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--radius", type=float, default=0.2)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--threshold", type=float, nargs="*", help="default: the model's at this sigma")
    parser.add_argument("--out", type=Path, help="append rows to this file")
    options = parser.parse_args()
    model = ModelFile.load(options.model)
    header, *lines = map(json.loads, options.scores.read_text(encoding="utf-8").splitlines())
    if header["model"] != model.fingerprint:
        raise SystemExit(f"{options.scores}: draws of another model")
    drawn = {line["image"]: line["scores"] for line in lines}
    samples = [s for s in load_dataset(options.data).test if drawn.get(sample_name(s.path)) is not None]
    labels = np.array([s.label for s in samples])
    scores = np.array([drawn[sample_name(s.path)] for s in samples], dtype=np.float32).astype(np.float64)
    sigma, size = header["sigma"], model.config.image
    pixels = size.height * size.width * size.channels
    p = vote_probability(options.radius, sigma, pixels=pixels)
    plug_in = np.where(labels == 1, np.quantile(scores, 1 - p, axis=1), np.quantile(scores, p, axis=1))
    noise = {"sigma": sigma, "alpha": options.alpha, "pixels": pixels}
    own = model.smoothing[model.sigmas.index(sigma)].threshold
    for threshold in options.threshold or [own]:
        tests, fixed = [], []
        for row in scores:
            test = DecisionTest(options.radius, sigma, options.alpha, pixels=pixels)
            test.update(row > threshold)
            tests.append(test)
            found = fixed_certificate(
                int((row > threshold).sum()), row.size, threshold=threshold, at_radius=options.radius, **noise
            )
            fixed.append(found.outcome)
        outcomes = np.array([test.outcome or "ABSTAIN" for test in tests])
        votes = np.array([test.votes_used for test in tests])
        certified = outcomes != "ABSTAIN"
        counts: dict[str, Any] = {}
        for name, label in (("good", 0), ("bad", 1)):
            counts[name] = {o: int(((outcomes == o) & (labels == label)).sum()) for o in ("OK", "DEFECT", "ABSTAIN")}
            counts[f"{name}_fixed"] = {
                o: int(((np.array(fixed) == o) & (labels == label)).sum()) for o in ("OK", "DEFECT", "ABSTAIN")
            }
        row = {
            "data": options.data.name,
            **noise,
            "radius": options.radius,
            "threshold": threshold,
            "draws": scores.shape[1],
            "images": len(samples),
            **counts,
            "undecided": int(sum(test.outcome is None for test in tests)),
            "votes_median": float(np.median(votes)),
            "votes_mean": float(votes.mean()),
            "votes_worst": int(votes.max()),
            "votes_median_certified": float(np.median(votes[certified])) if certified.any() else None,
            "votes_mean_certified": float(votes[certified].mean()) if certified.any() else None,
            "median_auroc": auroc(labels, np.median(scores, axis=1)),
            "plug_in_auroc": auroc(labels, plug_in),
            "certified_auroc": float(certified_auroc(labels, scores, [options.radius], **noise)[0]),
            "commit": commit(),
        }
        line = json.dumps(row)
        print(line)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
