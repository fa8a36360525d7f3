"""What `make docs` does beside MkDocs: the files of the repository's root are pages of the site too.

On the repository's own pages README.md, DESIGN.md and LOG.md lie above docs/; a site has one folder, so that links are
written anew. Used by mkdocs.yml, and left out of the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ABOVE = {"README.md": "index.md"} | {name: name for name in ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")}
LINK = re.compile(r"\]\((?:\.\./|docs/)?([\w.-]+\.md)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie above docs/, under their names in the site."""
    for source, name in ABOVE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them, where all pages lie in one folder."""
    return LINK.sub(lambda found: f"]({ABOVE.get(found[1], found[1])}", markdown)
