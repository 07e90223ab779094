"""The table of what was measured: described once, rendered as text, Markdown, LaTeX, HTML; and CSV of the rows."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
Shape = str
"""How a column calls it: `5-way 1-shot`."""

_CHANCE, _MINUS = "°", "−"
_SIGNIFICANT = 0.05
_HEAD_WIDTH = 16
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a line it would be an argument of it
    "±": r"$\pm$",
    "≥": r"$\geq$",
    _MINUS: "$-$",
    _CHANCE: r"$^{\circ}$",
} | {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What is read from a method's row of one shape.

    Attributes:
        text: of the row.
        rank: of the row, higher is better; None where it is not known or better means nothing.
        in_text: shown on a terminal too, where room is short.
    """

    head: str
    shape: Shape
    text: Callable[[Row], str]
    rank: Callable[[Row], float | None]
    in_text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A method: a text for each column, and the columns in which no other method does better."""

    name: str
    ours: bool
    texts: tuple[str, ...]
    best: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultsTable:
    """A line a method, a column a shape, then the difference to `recycle` and what an episode costs."""

    title: str
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


def results_table(rows: Sequence[Row]) -> ResultsTable:
    """The table of rows of `results.json`, also of those that an older version wrote."""
    measured = latest(rows)
    shapes = shapes_of(measured)
    usual = _usual_episodes(measured)
    datasets = list(dict.fromkeys(row["dataset"] for row in measured))
    columns = tuple(_columns(shapes))
    found: dict[tuple[str, str], dict[Shape, Row]] = {}
    for row in measured:
        found.setdefault((row["dataset"], row["method"]), {})[shape_of(row)] = row
    return ResultsTable(
        title=f"Accuracy on {', '.join(datasets)}, %, ± 95 % confidence interval, {usual} episodes",
        notes=tuple(_notes(shapes)),
        columns=columns,
        lines=tuple(
            Line(
                name=_name(method, dataset if len(datasets) > 1 else None, of.values(), usual),
                ours=method == "recycle",
                texts=tuple(column.text(of[column.shape]) if column.shape in of else "" for column in columns),
                best=_best(of, [other for key, other in found.items() if key[0] == dataset], columns),
            )
            for (dataset, method), of in found.items()
        ),
    )


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each method, data set and shape: `results.json` keeps what was measured with other settings."""
    return list({(row["dataset"], row["method"], shape_of(row)): row for row in rows}.values())


def measured_last(rows: Sequence[Row]) -> list[Row]:
    """Of the data set of the last row, the last row of each method and shape: what a picture can show."""
    return [row for row in latest(rows) if row["dataset"] == rows[-1]["dataset"]]


def shape_of(row: Row) -> Shape:
    """`5-way 1-shot`, or what a varying shape is called."""
    name: Shape = row.get("shape") or f"{row['n_way']}-way {row['n_shot']}-shot"
    return name


def shapes_of(rows: Sequence[Row]) -> list[Shape]:
    """All shapes, in the order of the rows."""
    return list(dict.fromkeys(map(shape_of, rows)))


def chance_of(row: Row) -> float:
    """The accuracy of guessing, in per cent."""
    chance: float | None = row.get("chance")
    return 100 / row["n_way"] if chance is None else chance


def wrapped(text: str, width: int) -> str:
    """A heading on lines of that many characters; `5-way` is not cut."""
    return fill(text, width, break_on_hyphens=False)


def _columns(shapes: Sequence[Shape]) -> list[Column]:
    accuracies = [
        Column(head=shape, shape=shape, text=_accuracy, rank=lambda row: row["accuracy"], in_text=True) for shape in shapes
    ]
    if not shapes:
        return []
    return [
        *accuracies,
        Column(head="difference", shape=shapes[0], text=_difference, rank=lambda _row: None, in_text=True),
        _cost("ms/episode", "episode_ms", shapes[0], in_text=True),
        _cost("peak MiB", "peak_memory_mib", shapes[0]),
        _cost("trained parameters", "trained_parameters", shapes[0], ranked=False),
        _cost("GFLOPs/episode", "gflops_per_episode", shapes[0]),
    ]


def _cost(head: str, key: str, shape: Shape, *, ranked: bool = True, in_text: bool = False) -> Column:
    def rank(row: Row) -> float | None:
        value = row.get(key)
        return -value if ranked and value is not None else None

    return Column(head=head, shape=shape, text=lambda row: _number(row.get(key)), rank=rank, in_text=in_text)


def _accuracy(row: Row) -> str:
    return f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"


def _difference(row: Row) -> str:
    difference, p_value = row.get("difference"), row.get("p_value")
    if difference is None:
        return ""
    ci95 = row.get("difference_ci95")
    text = f"{difference:+.2f}".replace("-", _MINUS) + ("" if ci95 is None else f" ± {ci95:.2f}")
    return text + (_CHANCE if p_value is not None and p_value >= _SIGNIFICANT else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.1f}"


def _usual_episodes(rows: Sequence[Row]) -> int:
    counts = Counter(int(row["episodes"]) for row in rows)
    return max(counts, key=lambda episodes: (counts[episodes], episodes), default=0)


def _name(method: str, dataset: str | None, rows: Any, usual: int) -> str:
    """The method, with what sets its line apart from the title: its data, another number of episodes."""
    counts = list(dict.fromkeys(row["episodes"] for row in rows))
    apart = [] if dataset is None else [dataset]
    if counts != [usual]:
        apart.append(f"{', '.join(map(str, counts))} episodes")
    return f"{method} ({', '.join(apart)})" if apart else method


def _notes(shapes: Sequence[Shape]) -> list[str]:
    if not shapes:
        return []
    return [
        f"Difference: accuracy minus that of recycle on the episodes that both did, in points; {_CHANCE}: p ≥ {_SIGNIFICANT}, "
        "may be chance.",
        f"Difference and costs are those of {shapes[0]}. Underlined: the best besides the oracle.",
    ]


def _best(of: Mapping[Shape, Row], others: Sequence[Mapping[Shape, Row]], columns: Sequence[Column]) -> frozenset[int]:
    return frozenset(i for i, column in enumerate(columns) if _leads(of, others, column))


def _leads(of: Mapping[Shape, Row], others: Sequence[Mapping[Shape, Row]], column: Column) -> bool:
    """Whether none does better, the oracle aside, which has seen real images; nobody leads where most are as good."""
    rows = [other[column.shape] for other in others if column.shape in other and not _of_oracle(other[column.shape])]
    ranks = [rank for rank in map(column.rank, rows) if rank is not None]
    own = of.get(column.shape)
    if own is None or _of_oracle(own) or len(ranks) < 2:
        return False
    return column.rank(own) == max(ranks) and 2 * ranks.count(max(ranks)) <= len(ranks)


def _of_oracle(row: Row) -> bool:
    """Also by other settings, by another head on its features, or fine-tuned, which is `pmf`."""
    return not {"oracle", "pmf"}.isdisjoint(re.split("[:,=]", row["method"]))


def as_text(table: ResultsTable) -> "Table":
    """For a terminal: the columns that fit into 100 characters beside two shapes."""
    from rich.table import Table
    from rich.text import Text

    shown = [i for i, column in enumerate(table.columns) if column.in_text]
    drawn = Table(title=Text(table.title), caption=Text(" ".join(table.notes)), caption_justify="left")
    drawn.add_column("method", overflow="fold")
    for i in shown:
        drawn.add_column(wrapped(table.columns[i].head, _HEAD_WIDTH), justify="right", no_wrap=True)
    for line in table.lines:
        cells = [Text(line.texts[i], style="underline" if i in line.best else "") for i in shown]
        drawn.add_row(Text(line.name), *cells, style="bold" if line.ours else None)
    return drawn


def as_markdown(table: ResultsTable) -> str:
    """A table as GitHub renders it, all columns; `recycle` bold, the best of a column underlined."""

    def cell(text: str, ours: bool, best: bool) -> str:
        plain = _markdown(text)
        marked = f"<ins>{plain}</ins>" if best else plain
        return f"**{marked}**" if ours and plain else marked

    head = ["method", *(column.head for column in table.columns)]
    rule = ["---", *("---:" for _ in table.columns)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *_cells(table, cell)])
    return "\n\n".join([_markdown(table.title), body, *(_markdown(note) for note in table.notes)]) + "\n"


def as_latex(table: ResultsTable) -> str:
    """A `table` of booktabs, all columns; `recycle` bold, the best of a column underlined."""

    def cell(text: str, ours: bool, best: bool) -> str:
        marked = rf"\underline{{{_latex(text)}}}" if best else _latex(text)
        return rf"\textbf{{{marked}}}" if ours and text else marked

    head = [_latex(text) for text in ("method", *(column.head for column in table.columns))]
    body = [f"{' & '.join(cells)} \\\\" for cells in _cells(table, cell)]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{' '.join(_latex(text) for text in (f'{table.title}.', *table.notes))}}}",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            f"{' & '.join(head)} \\\\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def as_html(table: ResultsTable) -> str:
    """A `<table>`, all columns; rows of class `ours`, cells of class `best`."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in ("method", *(column.head for column in table.columns)))
    lines = [
        f"<tr{' class=ours' if line.ours else ''}><td>{escape(line.name)}</td>"
        + "".join(f"<td{' class=best' if i in line.best else ''}>{escape(text)}</td>" for i, text in enumerate(line.texts))
        + "</tr>"
        for line in table.lines
    ]
    notes = escape(" ".join(table.notes))
    return (
        f"<p>{escape(table.title)}.</p>\n<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>\n<p class=note>{notes}</p>"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row of `results.json`, a column a key whose values are neither mappings nor lists."""
    keys = dict.fromkeys(key for row in rows for key in row)
    scalar = [key for key in keys if not any(isinstance(row.get(key), (Mapping, list)) for row in rows)]
    content = io.StringIO()
    writer = csv.DictWriter(content, scalar, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _cells(table: ResultsTable, cell: Callable[[str, bool, bool], str]) -> list[list[str]]:
    """Of each line the name and the texts, by `cell(text, ours, best)`."""
    return [
        [cell(line.name, line.ours, False), *(cell(text, line.ours, i in line.best) for i, text in enumerate(line.texts))]
        for line in table.lines
    ]


def _markdown(text: str) -> str:
    """Names may be anybody's: what they hold is neither markup nor the end of a cell."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
