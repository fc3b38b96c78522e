"""Hook of mkdocs: a page's link to a file of the repository outside docs/ becomes that file's name, since the site has no such page."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_OUTWARD = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with such links as text.

    Raises:
      PluginError: there is no such file.
    """
    docs = Path(config.docs_dir)
    root = docs.parent

    def as_text(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(docs.name, posixpath.dirname(page.file.src_uri), link[2]))
        if not (root / target).exists():
            raise PluginError(f"{page.file.src_uri} links to {link[2]}, and the repository has no {target}.")
        return f"`{target}`" if link[1].strip("`") == Path(target).name else f"{link[1]} (`{target}`)"

    return _OUTWARD.sub(as_text, markdown)
