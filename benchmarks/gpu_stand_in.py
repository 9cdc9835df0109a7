"""``advrad-fast bench --gpu`` on a GPU that has no TensorRT: PyTorch runs the network in its place, between the same buffers.

    python benchmarks/gpu_stand_in.py part.safetensors --out rows.jsonl

All else is measured as with an engine: copies, the two kernels, the CUDA graph, the host.  The network's figures are PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from torch_engine import TorchEngine

from advrad_fast.bench import gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="fp16", help="of the network: fp32, fp16 or bf16 (default fp16)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each set of contestants (default 2)")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch:
        TorchEngine(patch)
        rows = list(gpu.run(options.model, precision=options.precision, seconds=options.seconds, compile_torch=False))
    for row in rows:
        row["details"]["network"] = "PyTorch, in TensorRT's place"
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    sys.stdout.write(gpu.table(rows) + "\n")


if __name__ == "__main__":
    main()
