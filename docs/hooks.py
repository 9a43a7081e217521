"""For the pages' builder: docstrings name functions as Sphinx does, which stands for nothing in a page."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles in front of names."""
    return _ROLE.sub("", html)
