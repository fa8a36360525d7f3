"""Six domains of real text, taken from Debian 12 packages: four natural languages and two programming languages.

The packages are downloaded with ``apt-get download`` and unpacked into a folder of the caller's; nothing is installed.
Every document belongs to exactly one of three splits: it is trained on, used for calibration, or used for evaluation.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from random import Random

from moekern.errors import InputError

CALIBRATION_BYTES = 50_000
EVALUATION_BYTES = 18_000
HELD_OUT_DOCUMENT_BYTES = 7_000
REPEATED_CODE_CHARS = 200
HELD_OUT_SOURCE_WEIGHT = 3
SHORTEST_DOCUMENT_CHARS = 300

_HANDBOOK = "debian-handbook"
_GUIDE = "installation-guide-amd64"
_OFFICE = "libreoffice-help-"


@dataclass(frozen=True)
class Source:
    """Files of one Debian package: those under `root` that match `glob` and whose path does not match `skip`.

    Only documents of a `redistributable` source may be held out, because held-out text ships with the project.
    """

    package: str
    root: str
    glob: str
    redistributable: bool = False
    skip: str = r"(?!)"


@dataclass
class Domain:
    """The documents of one domain, by split."""

    train: list[str] = field(default_factory=list)
    calibration: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)


def _language(handbook: str, guide: str, office: str) -> list[Source]:
    return [
        Source(_HANDBOOK, f"usr/share/doc/{_HANDBOOK}/html/{handbook}", "*.html", True, r"/(ix\d+|index)\.html"),
        Source(_GUIDE, f"usr/share/doc/{_GUIDE}/{guide}", "*.html", skip=r"/(apf|index)"),
        Source(_OFFICE + office.lower(), f"usr/share/libreoffice/help/{office}/text", "**/*.html"),
    ]


SOURCES: dict[str, list[Source]] = {
    "english": _language("en-US", "en", "en-US"),
    "german": _language("de-DE", "de", "de"),
    "french": _language("fr-FR", "fr", "fr"),
    "russian": _language("ru-RU", "ru", "ru"),
    "python": [
        Source(package, "usr/lib/python3.11", "**/*.py", True, r"/(test|encodings|pydoc_data)/|_sysconf")
        for package in ("libpython3.11-minimal", "libpython3.11-stdlib")
    ],
    "c": [
        Source("libcurl4-doc", "usr/share/doc/libcurl4/examples", "*.c", True),
        Source("zlib1g-dev", "usr/share/doc/zlib1g-dev/examples", "*.[ch]", True),
        Source("libstb-dev", "usr/include/stb", "*.h", True),
        Source("libpython3.11-dev", "usr/include/python3.11", "**/*.h"),
        Source("libsqlite3-dev", "usr/include", "*.h"),
        Source("gnulib", "usr/share/gnulib/lib", "*.[ch]"),
    ],
}
PACKAGES = sorted({source.package for sources in SOURCES.values() for source in sources})


class _Paragraphs(HTMLParser):
    """Collects the text of paragraph-like elements; what lies in navigation, scripts or page furniture is left out."""

    BLOCKS = frozenset({"p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "td", "th", "div"})
    FURNITURE = frozenset({"script", "style", "header", "footer", "aside", "nav", "head"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self._furniture_depth = 0
        self._preformatted = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._furniture_depth += tag in self.FURNITURE
        if tag in self.BLOCKS:
            self.flush()
            self._preformatted = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._furniture_depth -= tag in self.FURNITURE
        if tag in self.BLOCKS:
            self.flush()
            self._preformatted = False

    def handle_data(self, data: str) -> None:
        if not self._furniture_depth:
            self._open.append(data)

    def flush(self) -> None:
        """End the paragraph being read."""
        text = "".join(self._open)
        self._open.clear()
        text = text.strip("\n") if self._preformatted else " ".join(text.split())
        if text:
            self.paragraphs.append(text)


def fetch(folder: Path) -> dict[str, str]:
    """Download and unpack every package into `folder/<package>`, and return the version of each."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise InputError("apt-get and dpkg are needed to fetch the training text, and this machine lacks them")
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=debs, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "no reason given")
        raise InputError(f"apt-get download failed, is this Debian 12 with a fresh `apt-get update`? {reason}")
    versions = {}
    for deb in sorted(debs.glob("*.deb")):
        package = deb.name.split("_")[0]
        shown = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True)
        versions[package] = shown.stdout.strip()
        subprocess.run(["dpkg", "-x", deb, folder / package], check=True)
    return versions


def _blocks(path: Path) -> list[str]:
    """The blocks of a document: its paragraphs, or in source code what stands between blank lines."""
    text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n").replace("\f", "")
    if path.suffix == ".html":
        parser = _Paragraphs()
        parser.feed(text)
        parser.close()
        parser.flush()
        return parser.paragraphs
    return re.split(r"\n(?:[ \t]*\n)+", text)


def _clean(block: str) -> str:
    printable = (char if char.isprintable() or char in "\n\t" else " " for char in block)
    return "\n".join(line.rstrip() for line in "".join(printable).expandtabs(4).split("\n")).strip("\n")


def _documents(source: Source, folder: Path, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document, less the blocks that an earlier document held already.

    That drops navigation, licence headers, text that help pages share, and paragraphs that a translation left in
    English. It also keeps a held-out document from repeating what was trained on. Short blocks of source code stay:
    programs repeat them for a reason.
    """
    root = folder / source.package / source.root
    shortest_repeat = 1 if source.glob.endswith("html") else REPEATED_CODE_CHARS
    for path in sorted(root.glob(source.glob)):
        if path.is_symlink() or re.search(source.skip, path.as_posix()):
            continue
        kept = []
        for block in map(_clean, _blocks(path)):
            if len(block) >= shortest_repeat:
                if block in seen:
                    continue
                seen.add(block)
            if block.strip():
                kept.append(block)
        text = "\n\n".join(kept)
        if len(text) >= SHORTEST_DOCUMENT_CHARS:
            yield path.relative_to(root).as_posix(), text


def _excerpt(text: str, limit: int) -> str:
    """The longest run of whole blocks from the start of `text` within `limit` bytes of UTF-8 (one block at least)."""
    blocks = text.split("\n\n")
    while len(blocks) > 1 and len("\n\n".join(blocks).encode()) > limit:
        blocks.pop()
    return "\n\n".join(blocks)


def _split(candidates: dict[str, str], domain: Domain) -> None:
    """Move some of the `candidates` to calibration, then evaluation, until each holds enough, and train on the rest.

    Which ones depends on the names of the candidates alone. The rest is weighted, as else the far larger sources that
    cannot be held out would decide what is learned.
    """
    names = sorted(candidates)
    Random(0).shuffle(names)
    splits = [(domain.calibration, CALIBRATION_BYTES), (domain.evaluation, EVALUATION_BYTES)]
    for name in names:
        if not splits:
            domain.train.extend([candidates[name]] * HELD_OUT_SOURCE_WEIGHT)
            continue
        documents, wanted = splits[0]
        documents.append(_excerpt(candidates[name], HELD_OUT_DOCUMENT_BYTES))
        if sum(len(document.encode()) for document in documents) >= wanted:
            del splits[0]


def load(folder: Path) -> dict[str, Domain]:
    """Read the unpacked packages in `folder` into the splits of each domain."""
    domains: dict[str, Domain] = {}
    seen: set[str] = set()
    for name, sources in SOURCES.items():
        domain = Domain()
        candidates: dict[str, str] = {}
        for source in sources:
            documents = list(_documents(source, folder, seen))
            if not documents:
                raise InputError(f"package {source.package} holds no {source.glob} under {source.root}")
            if source.redistributable:
                candidates.update((f"{source.package}/{path}", text) for path, text in documents)
            else:
                domain.train.extend(text for _, text in documents)
        _split(candidates, domain)
        domains[name] = domain
    return domains
