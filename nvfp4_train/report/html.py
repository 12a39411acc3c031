"""The report as one HTML file: styles and pictures stand in it, nothing is fetched and nothing runs."""

import hashlib
import re
from html import escape

from nvfp4_train import pictures
from nvfp4_train.report.blocks import Block, Code, Contents, Picture, Section, Table, Text
from nvfp4_train.report.style import STYLE


def page(contents: Contents) -> str:
    """The text of report.html."""
    links = "".join(
        f'<li><a href="#{_anchor(section.title)}">{escape(section.title)}</a></li>' for section in contents.sections
    )
    tiles = "".join(
        f"<div><dt>{escape(tile.label)}</dt><dd><strong>{escape(tile.value)}</strong>"
        + (f"<span>{escape(tile.note)}</span>" if tile.note else "")
        + "</dd></div>"
        for tile in contents.tiles
    )
    verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in contents.verdict)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without it a browser asks the server for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(contents.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(contents.title)}</h1>\n<p>{escape(contents.subtitle)}</p>\n</header>\n<main>\n"
        f'<section class="verdict" aria-label="Verdict">\n{verdict}\n'
        + (f"<dl>{tiles}</dl>\n" if tiles else "")
        + f'</section>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        + "".join(_section(section) for section in contents.sections)
        + "</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts, shown = [], False
    for block in section.blocks:
        # Pictures that follow each other share a grid.
        if isinstance(block, Picture) != shown:
            shown = not shown
            parts.append('<div class="pictures">' if shown else "</div>")
        parts.append(_block(block))
    if shown:
        parts.append("</div>")
    return f'<section id="{_anchor(section.title)}">\n<h2>{escape(section.title)}</h2>\n{chr(10).join(parts)}\n</section>\n'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>'
    if isinstance(block, Picture):
        return (
            f"<figure{' class=wide' if block.is_wide else ''}>\n"
            f'<div class="card" role="img" aria-label="{escape(block.says)}" tabindex="0">'
            f"{_svg(block)}</div>\n<details><summary>In numbers</summary>\n{_table(block.numbers)}\n</details>\n</figure>"
        )
    title = f"<h3>{escape(block.title)}</h3>\n" if block.title else ""
    return title + _table(block)


def _svg(picture: Picture) -> str:
    """The picture without names that nothing refers to, and with others of its own: pictures share what looks alike."""
    text = re.sub(r' id="[\w.]+_\d+"', "", pictures.svg(picture.figure))
    own = hashlib.sha256(picture.says.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>p{own}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _table(table: Table) -> str:
    if any(table.header):
        head = "".join(f"<th{_side(side)}>{escape(cell)}</th>" for cell, side in zip(table.header, table.align, strict=True))
        head = f"<thead><tr>{head}</tr></thead>"
    else:
        head = ""
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{_side(side)}>{escape(cell)}</td>" for cell, side in zip(rest, table.align[1:], strict=True))
        rows.append(f'<tr><th scope="row"{_side(table.align[0])}>{escape(first)}</th>{cells}</tr>')
    name = f' aria-label="{escape(table.title)}"' if table.title else ""
    return f'<div class="scroll" tabindex="0"{name}><table>{head}<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'


def _side(side: str) -> str:
    return ' class="r"' if side == "r" else ""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
