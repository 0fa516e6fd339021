"""The pieces of an HTML page that needs nothing beside itself: tables, pictures, folded parts, the style."""

from __future__ import annotations

import html
import math

from jobs.charts import STYLE


def tiles(facts: list[tuple[str, str]]) -> str:
    """Figures in a row, each with its name: (name, value)."""
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts)
    return f'<div class="tiles">{cells}</div>'


def figure(title: str, svg: str, note: str = "") -> str:
    """A section with a picture and what is to be said about it."""
    caption = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f"<section><h2>{html.escape(title)}</h2><figure>{svg}{caption}</figure></section>"


def table(title: str, header: list[str], rows: list[list[str]], status: str | None = None) -> str:
    """A section with a table; nothing when it has no rows.

    Args:
        title: heading, may be empty.
        header: names of the columns.
        rows: their cells.
        status: name of a column whose words have the colours of what they say, such as rollback and clean.
    """
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    coloured = header.index(status) if status else -1
    body = "".join(
        f"<tr>{''.join(_cell(cell, place == coloured) for place, cell in enumerate(row))}</tr>" for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f'<section>{heading}<div class="wide"><table>{head}<tbody>{body}</tbody></table></div></section>'


def _cell(text: str, coloured: bool) -> str:
    is_number = bool(text) and text[0].isdigit() and not any(c.isalpha() for c in text.split(" ")[0][:-1])
    css = _STATES.get(text.replace(" ", "_"), "") if coloured else "number" if is_number and len(text) < 14 else ""
    return f'<td class="{css}">{html.escape(text)}</td>' if css else f"<td>{html.escape(text)}</td>"


_STATES = {
    **dict.fromkeys(("clean", "end"), "good"),
    **dict.fromkeys(
        ("poisoned", "corrupt", "rollback", "spike", "stop", "corrupt_checkpoint", "checkpoint_failed"), "bad"
    ),
    **dict.fromkeys(("resume", "worker_failure", "controller_failure"), "restart"),
    **dict.fromkeys(("preemption", "preempted", "resize", "interrupt", "waiting_for_nodes"), "resize"),
}


def folded(title: str, content: str) -> str:
    """Content that opens when its title is clicked; nothing when there is none."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>" if content else ""


_PAGE_STYLE = """
body { margin: 0 auto; max-width: 1000px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
header p, figcaption { color: var(--soft); margin: .2rem 0 0; } figure { margin: 0; }
h1 i { font: 600 .8rem system-ui; padding: .15rem .6rem; border-radius: 1rem; vertical-align: middle;
  background: var(--panel); color: var(--soft); } h1 i.finished { color: var(--good); }
h1 i.running { color: var(--train); }
h1 i.stopped { color: var(--rollback); }
.alert { border-left: 4px solid var(--rollback); background: var(--panel); padding: .7rem 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.tiles div { background: var(--panel); border-radius: 8px; padding: .6rem .9rem; flex: 1 1 auto; }
.tiles b { display: block; font-size: 1.05rem; white-space: nowrap; } .tiles span { color: var(--soft);
  font-size: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem;
  margin-top: 1.2rem; }
figure { overflow-x: auto; } svg { width: 100%; height: auto; } section > figure > svg { min-width: 620px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; color: var(--soft); font-weight: 500; } th, td { padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--grid); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--rollback); font-weight: 600; }
td.restart { color: var(--restart); font-weight: 600; } td.resize { color: var(--resize); font-weight: 600; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); }
pre, blockquote { background: var(--panel); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; margin: .6rem 0; overflow-wrap: anywhere; }
blockquote b { color: var(--train); }
"""


def page(title: str, body: str, again: float | None = None) -> str:
    """A whole HTML document that needs nothing beside itself.

    Args:
        title: of the window.
        body: its sections.
        again: seconds after which the browser looks for a newer one; None when none will come.
    """
    live = f'<meta http-equiv="refresh" content="{math.ceil(again)}">' if again else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{live}'
        f"<title>{html.escape(title)}</title><style>{STYLE}{_PAGE_STYLE}</style></head><body>{body}</body></html>\n"
    )
