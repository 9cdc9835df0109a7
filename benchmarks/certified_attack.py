"""Certified decisions under attack: PGD with EOT on the smoothed vote, within each image's certified radius.

    advrad-fast evaluate MODEL DATA --certified --sigma 0.25 --votes 256 --scores FILE
    python benchmarks/certified_attack.py MODEL DATA --sigma 0.25 --votes 256 --scores FILE --threshold 5.63

Each image with a certificate at ``--radius`` or further is attacked to the edge of the largest radius that its own draws certify
(fixed number of votes, alpha 0.001), on the prepared image, of which the certificate speaks.  One row an image, appended as it is
made; what the rows hold is not done again, so a run may be stopped at any time.  The images nearest to losing their certificate
come first, OK and DEFECT in turn.  The file of scores is made if there is none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from advrad_fast.bench.timing import commit, machine
from advrad_fast.certify import Certificate, fixed_certificate
from advrad_fast.detector import Detector
from advrad_fast.evaluation.certified import draw_scores
from advrad_fast.evaluation.certified_attack import attack_certified
from advrad_fast.evaluation.datasets import Sample, load_dataset
from advrad_fast.evaluation.evaluate import sample_name
from advrad_fast.evaluation.robust import prepared_model
from advrad_fast.evaluation.rows import append_line
from advrad_fast.images import load_image, prepare

RESULTS = Path(__file__).parent / "results" / "certified-attack.jsonl"


def certified(options: argparse.Namespace, detector: Detector) -> Iterator[tuple[Sample, Certificate, float]]:
    """Image, certificate and share of votes for DEFECT, in the order in which they are attacked."""
    dataset = load_dataset(options.data)
    found = draw_scores(detector, dataset, draws=options.votes, sigma=options.sigma, file=options.scores)
    threshold = options.threshold
    if threshold is None:
        threshold = detector.model.smoothing[detector.model.sigmas.index(found.sigma)].threshold
    sides: dict[str, list[tuple[Sample, Certificate, float]]] = {"OK": [], "DEFECT": [], "ABSTAIN": []}
    for sample, scores in zip(dataset.test, found.scores, strict=True):
        defects = int(np.count_nonzero(scores.astype(np.float64) > threshold))
        made = fixed_certificate(defects, scores.size, threshold=threshold, sigma=found.sigma, pixels=found.pixels)
        if made.radius >= options.radius:
            sides[made.outcome].append((sample, made, defects / scores.size))
    for side in sides.values():
        side.sort(key=lambda row: row[1].radius)
    for pair in itertools.zip_longest(sides["OK"], sides["DEFECT"]):
        yield from (row for row in pair if row is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--radius", type=float, default=0.2, help="attack what is certified so far (default 0.2)")
    parser.add_argument("--threshold", type=float, help="instead of the model's at this sigma")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="of draws, as `advrad-fast evaluate --scores` keeps it")
    parser.add_argument("--votes", type=int, default=256, help="draws of every image (default 256)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eot", type=int, default=4, help="draws a gradient (default 4)")
    parser.add_argument("--check", type=int, default=256, help="fresh votes at the attacked image (default 256)")
    parser.add_argument("--factor", type=float, default=1.0, help="of the certified radius: above 1, what can the attack do?")
    parser.add_argument("--limit", type=int, help="this many images at most")
    parser.add_argument("--device", default="cpu", help="for the gradients (default cpu); votes are drawn on this package's")
    parser.add_argument("--part", metavar="I/N", default="1/1", help="the Ith of N processes side by side, each with its --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    detector = Detector.load(options.model)
    head = {"data": options.data.name, **{key: getattr(options, key) for key in ("sigma", "factor", "steps", "eot")}}
    made = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    prepared = Detector(prepared_model(detector.model))
    tail = {"backend": detector.backend, "commit": commit(), "machine": machine()}
    part, parts = (int(number) for number in options.part.split("/"))
    chosen = itertools.islice(certified(options, detector), part - 1, options.limit, parts)
    for sample, certificate, share in chosen:
        image = {**head, "threshold": certificate.threshold, "image": sample_name(sample.path)}
        if any(image.items() <= row.items() for row in made):
            continue
        start, used = time.perf_counter(), time.process_time()
        (found,) = attack_certified(
            prepared, [prepare(load_image(sample.path), detector.model.config.image).image], [certificate],
            steps=options.steps, eot=options.eot, votes=options.check, factor=options.factor, device=options.device,
        )  # fmt: skip
        row = {
            **image,
            "label": sample.label,
            "certified": certificate.outcome,
            "radius": certificate.radius,
            "votes": certificate.votes,
            "defect_share": share,
            "distance": found.distance,
            "attacked_votes": options.check,
            "attacked_defect_share": found.share,
            "attacked": "DEFECT" if found.share > 0.5 else "OK",
            "flipped": found.flipped,
            "device": options.device,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
            **tail,
        }
        append_line(options.out, json.dumps(row))
        print(f"{row['image']}: {certificate.outcome} at {certificate.radius:.3f}, {share:.3f} -> {found.share:.3f}", flush=True)


if __name__ == "__main__":
    main()
