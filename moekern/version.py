"""The version, and those of the libraries that results depend on."""

from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """moekern, torch and transformers, as artefacts record them."""
    return {"moekern": __version__, **{name: version(name) for name in ("torch", "transformers")}}
