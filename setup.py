"""What pyproject.toml can't say: the C++ extension, and kernels/ installed as advrad_fast.kernels."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

if sys.platform == "win32":
    FLAGS = ["/O2", "/fp:precise"]
else:
    # No -march=native: a wheel runs everywhere, and csrc/philox.hpp picks the vector width at run time.  No -ffast-math: NaN must
    # survive.  No contraction to FMA: the same bits on every processor.  The last two only say that nobody reads errno or
    # the floating-point exception flags, without which square roots and selections aren't vectorised.
    FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(
    packages=[*find_packages(include=["advrad_fast", "advrad_fast.*"]), "advrad_fast.kernels"],
    package_dir={"advrad_fast": "advrad_fast", "advrad_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "advrad_fast._native",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.hpp")),
            cxx_std=17,
            extra_compile_args=FLAGS,
        )
    ],
)
