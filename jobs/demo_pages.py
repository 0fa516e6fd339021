"""Renders Python modules to HTML pages with pydoc, in a process of its own: ``python -P -s demo_pages.py OUT < names``.

A script rather than a module of the program: importing hundreds of modules has effects (memory, warnings, files in
the home folder, the odd crash) that must stay away from the process that runs the demo. It knows nothing of Ingot.
"""

import importlib
import json
import os
import pydoc
import re
import sys
import sysconfig
import warnings


class Pages(pydoc.HTMLDoc):
    """pydoc's pages without the values of variables: they hold this machine's environment, paths and handles."""

    def docother(self, object, name=None, mod=None, *ignored):  # noqa: A002  (pydoc's own signature)
        """A variable, as its name and the name of its type."""
        shown = self.escape(type(object).__name__)
        return f"<strong>{name}</strong> = {shown}" if name else shown


def render(name: str) -> str:
    """The page of one module, without memory addresses and with this machine's folders replaced by common ones.

    Raises:
        BaseException: whatever importing the module raises, SystemExit among it.
    """
    pages = Pages()
    page = pages.page(pydoc.describe(module := importlib.import_module(name)), pages.document(module, name))
    folders = {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    for folder in sorted(folders, key=len, reverse=True):
        page = page.replace(folder, "/usr/lib/python3")
    page = page.replace(os.getcwd(), "/home/user")  # the renderer's HOME, in the page of cgi
    return re.sub(r"(?: |&nbsp;)at(?: |&nbsp;)0x[0-9a-fA-F]+", "", page)


def main() -> None:
    """Read module names from standard input, one a line; write ``{"name", "html"}`` lines as they are done.

    A module that cannot be imported here (it needs another system, or a missing library) gets ``"html": null``.
    """
    warnings.simplefilter("ignore")
    names = sys.stdin.read().split()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for name in names:
            try:
                html = render(name)
            except KeyboardInterrupt:
                raise
            except BaseException:  # SystemExit and whatever else a module raises when it is imported
                html = None
            out.write(json.dumps({"name": name, "html": html}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
