"""Renders Python modules and their classes to HTML pages with pydoc: ``python -P -s demo_pages.py OUT < names``.

Runs in a process of its own: importing hundreds of modules has effects (memory, warnings, files in the home folder,
the odd crash) that must stay away from the process that runs the demo. It knows nothing of Ingot.
"""

import importlib
import inspect
import json
import os
import pydoc
import re
import sys
import sysconfig
import warnings

FOLDERS = sorted(
    {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}, key=len, reverse=True
)


class Pages(pydoc.HTMLDoc):
    """pydoc's pages without the values of variables: they hold this machine's environment, paths and handles."""

    def docother(self, object, name=None, mod=None, *ignored):  # noqa: A002  (pydoc's own signature)
        """A variable, as its name and the name of its type."""
        shown = self.escape(type(object).__name__)
        return f"<strong>{name}</strong> = {shown}" if name else shown


class ModulePages(Pages):
    """A module's own page, on which each class is one sentence: whole classes have pages of their own.

    All on one page, inherited methods would be told once for every class, and filters against repetition drop that.
    """

    def docclass(self, object, name=None, *ignored, **named):  # noqa: A002  (pydoc's own signature)
        """A class, as its name and the first sentence of its documentation."""
        summary = self.markup(pydoc.splitdoc(pydoc.getdoc(object))[0])
        return f"<p><strong>class {self.escape(name or object.__name__)}</strong><br>{summary}</p>"


def render(name: str) -> dict[str, str]:
    """The pages of one module and of the public classes that it defines, by their dotted names.

    Raises:
        BaseException: whatever importing the module raises, SystemExit among it.
    """
    module = importlib.import_module(name)
    pages = {name: _page(ModulePages(), pydoc.describe(module), module, name)}
    for key, value in sorted(vars(module).items()):
        if inspect.isclass(value) and not key.startswith("_") and (value.__module__, value.__name__) == (name, key):
            pages[f"{name}.{key}"] = _page(Pages(), f"{name}.{key}", value, key)
    return pages


def _page(pages: Pages, title: str, thing: object, name: str) -> str:
    """One page, without memory addresses and with this machine's folders replaced by common ones."""
    page = pages.page(title, pages.document(thing, name))
    for folder in FOLDERS:
        page = page.replace(folder, "/usr/lib/python3")
    page = page.replace(os.getcwd(), "/home/user")  # the renderer's HOME, in the page of cgi
    return re.sub(r"(?: |&nbsp;)at(?: |&nbsp;)0x[0-9a-fA-F]+", "", page)


def main() -> None:
    """Read module names from standard input, one a line; write ``{"name", "pages"}`` lines as they are done.

    A module that cannot be imported here (it needs another system, or a missing library) gets ``"pages": null``.
    """
    warnings.simplefilter("ignore")
    # pydoc shows comments where there is no docstring: half of its time goes into parsing sources to find some.
    inspect.getcomments = lambda thing: None
    names = sys.stdin.read().split()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for name in names:
            try:
                pages = render(name)
            except KeyboardInterrupt:
                raise
            except BaseException:  # SystemExit and whatever else a module raises when it is imported
                pages = None
            out.write(json.dumps({"name": name, "pages": pages}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
