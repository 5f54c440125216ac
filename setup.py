"""Builds the extension modules; pyproject.toml describes everything else."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HEADERS = [str(path) for path in sorted(Path("shm").glob("*.h"))]


def extension(name: str, *headers: str) -> Extension:
    return Extension(
        f"refclock.{name}",
        [f"refclock/{name}.pyx"],
        include_dirs=["shm", "refclock"],
        depends=[*HEADERS, *headers],
        extra_compile_args=["-std=gnu11", "-O2", "-fno-strict-aliasing"],
    )


EXTENSIONS = [
    extension("page", "refclock/sigbus.h"),
    extension("hypervisor"),
    extension("segment"),
    extension("systemclock"),
]

setup(
    ext_modules=cythonize(
        EXTENSIONS,
        include_path=["."],
        compiler_directives={"language_level": 3, "cdivision": True, "wraparound": False},
    )
)
