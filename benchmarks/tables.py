"""The tables of latency.md from rows of ``advrad-fast bench --json``, in Markdown.

python benchmarks/tables.py benchmarks/results/bench.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    names = list(heads)
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def inspections(rows: list[Row]) -> None:
    def line(r: Row) -> list[str]:
        stages = r["details"]["stages_ms"]
        rest = stages["total"] - sum(stages[k] for k in ("noise", "network", "error"))
        times = [number(r[k]) for k in ("p50_ms", "p20_ms", "p80_ms")]
        parts = [number(stages[k]) for k in ("noise", "network", "error")]
        return [r["precision"], str(r["batch"]), *times, *parts, number(rest), f"{number(r['ratio_eager'])} times"]

    heads = (
        "precision",
        "batch",
        "p50 ms",
        "p20",
        "p80",
        "noise",
        "network",
        "error",
        "the rest",
        "against `reference` (eager fp32)",
    )
    table(heads, map(line, rows))
    parity = {r["precision"]: r["details"]["parity"] for r in rows}
    keys = ("score_worst", "score_p99", "map_p999_worst")
    lines = ([f"cpu {p}, reference", *(f"{v[k]:.1e}" for k in keys)] for p, v in parity.items())
    table(("pair", "score, worst", "score, p99", "map p99.9, worst"), lines)


def networks(rows: list[Row]) -> None:
    def line(r: Row) -> list[str]:
        others = r["details"]["others_p50_ms"]
        torch = [v for k, v in others.items() if k.startswith("torch")]
        return [
            r["name"].removeprefix("network "),
            r["precision"],
            str(r["batch"]),
            f"{r['p50_ms']:.4g}",
            f"{others['openvino bf16']:.4g}" if r["precision"] == "bf16" and "openvino bf16" in others else "-",
            f"{others['eager']:.4g}",
            f"{min(torch):.4g}",
            number(r["ratio_eager"]),
            number(r["ratio_best_torch"]),
            share(r["peak_share"]),
        ]

    heads = ("network", "precision", "batch", "p50 ms", "OpenVINO bf16", "PyTorch eager fp32", "best PyTorch", "against eager")
    table((*heads, "against best", "of the measured peak"), map(line, rows))


def votes(rows: list[Row]) -> None:
    lines = []
    for r in rows:
        rates = r["details"]["votes_a_second"]
        ratio = f"{number(r['ratio_eager'])} times"
        lines.append([r["precision"], str(r["details"]["draws_a_call"]), f"{rates['cpu']:.0f}", f"{rates['eager']:.0f}", ratio])
    table(("precision", "draws a call", "votes a second", "a loop over PyTorch eager fp32", "ratio"), lines)


def operations(rows: list[Row]) -> None:
    def line(r: Row) -> list[str]:
        times = [number(r[k]) for k in ("p50_ms", "p20_ms", "p80_ms")]
        return [
            r["name"],
            str(r["batch"]),
            *times,
            number(r["ratio_eager"], 1),
            number(r["ratio_best_torch"], 1),
            share(r["peak_share"]),
        ]

    table(("operation", "batch", "p50 ms", "p20", "p80", "against eager", "against best", "of the copy rate"), map(line, rows))


def main() -> None:
    rows: list[Row] = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    for name, show in (("inspect ", inspections), ("votes ", votes), ("network ", networks)):
        found = [r for r in rows if r["name"].startswith(name)]
        if found:
            first = found[0]
            print(f"### {name.strip()}\n{json.dumps(first['details']['peaks'])}; {first['machine']}; commit {first['commit']}\n")
            show(found)
    rest = [r for r in rows if r["name"].split()[0] not in ("inspect", "votes", "network")]
    if rest:
        print("### operations\n")
        operations(rest)


if __name__ == "__main__":
    main()
