"""Builds the optional extension rmtkern._C. Everything else is in pyproject.toml.

No instruction-set flag on purpose: each file under csrc/isa opens its own target region, and the CPU is asked at run
time. If no C++ compiler is there, the package still installs and runs on its NumPy reference.
"""

import os
import shlex
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]

extension = Pybind11Extension(
    "rmtkern._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    depends=sorted(glob("csrc/**/*.[hi]*", recursive=True)),
    cxx_std=17,
    extra_compile_args=[*FLAGS, *shlex.split(os.environ.get("RMTKERN_BUILD_FLAGS", ""))],  # after ours: they win
    extra_link_args=["-fopenmp"],
    optional=True,
)

ParallelCompile("MAX_JOBS", default=0).install()
setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
