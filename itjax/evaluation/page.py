"""One HTML page that needs nothing else: no network, no fonts, no libraries; light or dark as the reader's system is.

Whatever comes from data passes through `escape`. The page's own rules forbid it to load anything and to run any script
but the one it was made with.
"""

import base64
import hashlib
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1d1d1b; --soft: #6b6a66; --line: #e4e3df;
  --grid: #efeeea; --good: #0d7a4f; --bad: #b3261e; --bar: #c9d8f2; --chip: #f0efeb;
  --c0: #2b6cd4; --c1: #d0700b; --c2: #0e8f68; --c3: #b8398a; --c4: #7a55c7; --c5: #8f7a00; --c6: #c23b3b; --c7: #3a8ea8; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --text: #ecebe6; --soft: #a09f99;
  --line: #353431; --grid: #2a2a27; --good: #4cc493; --bad: #f2857d; --bar: #2f4468; --chip: #2b2a27;
  --c0: #6ea3f5; --c1: #f0a04b; --c2: #45c49a; --c3: #e57fc0; --c4: #b196f0; --c5: #d1bb3f; --c6: #ef8080; --c7: #74bfd6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.scroll { overflow: auto; max-height: 620px; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; font-size: 13px; z-index: 1;
  white-space: normal; vertical-align: bottom; }
tr:last-child td { border-bottom: 0; } td.left, th.left { text-align: left; }
td.left { white-space: normal; overflow-wrap: anywhere; min-width: 14em; } td.wrap { white-space: normal; }
tr.strong td { font-weight: 650; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; } details > summary { font-weight: 600; }
"""


def escape(text: object) -> str:
    """Text as HTML shows it, inside elements and inside quoted attributes."""
    return html.escape(str(text))


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole page. `body`, `style` and `script` are ours and go in as they are; the title is escaped."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = f"'sha256-{digest}'" if script else "'none'"
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src {source}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, strong: Sequence[int] = ()) -> str:
    """A table whose first `left` columns are text. Cells are HTML: escape what comes from data."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if number < left else ''}>{cell}</{tag}>" for number, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=strong' if number in strong else ''}>{line(row, 'td')}</tr>\n" for number, row in enumerate(rows)
    )
    return f'<div class="card scroll"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>\n{body}</tbody></table></div>'
