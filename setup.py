"""Builds moekern._C with CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = shutil.which("cmake", path=TOOLS), shutil.which("ninja", path=TOOLS)
        if not cmake:
            raise SystemExit("moekern: no CMake found; install it with: pip install cmake ninja")
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
            raise SystemExit("moekern: no C++17 compiler found; install g++ or clang++, or name one in CXX")
        build = Path(self.build_temp).resolve() / ("ninja" if ninja else "make")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(HERE),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
        ]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("moekern: the extension did not build; CMake's messages are above") from None


setup(ext_modules=[Extension("moekern._C", [])], cmdclass={"build_ext": CMakeBuild})
