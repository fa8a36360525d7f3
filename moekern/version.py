"""The version, and those of the libraries that results depend on."""

from functools import cache
from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """moekern, torch and transformers, as artefacts record them."""
    return {"moekern": __version__, **{name: _installed(name) for name in ("torch", "transformers")}}


_installed = cache(version)
