import csv
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from lr_ray.report.tables import as_csv, as_html, as_latex, as_markdown, as_text, measured_last, results_table

EVIL = "a_b|<c>&%"


def row(method: str, n_shot: int = 1, accuracy: float = 60.0, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "source": "Hu et al., 2025",
        "dataset": "cifar-fs/val",
        "n_way": 5,
        "n_shot": n_shot,
        "n_query": 15,
        "episodes": 600,
        "accuracy": accuracy,
        "ci95": 0.9,
        "per_class": {"dolphin": accuracy, EVIL: 50.0},
        "difference": None,
        "difference_ci95": None,
        "p_value": None,
        "difference_episodes": None,
        "episode_ms": 96.34,
        "peak_memory_mib": 910,
        "trained_parameters": 0,
        "gflops_per_episode": 210.5,
        "images_per_s": 824.0,
    } | changes


def against(difference: float, p_value: float, **changes: Any) -> dict[str, Any]:
    return {"difference": difference, "difference_ci95": 0.4, "p_value": p_value, "difference_episodes": 600} | changes


OURS = [row("recycle", 1, 61.5), row("recycle", 5, 75.0)]
ROWS = [row("nn", 1, 50.0, **against(-11.5, 1e-9)), row("nn", 5, 68.0, **against(-7, 1e-9)), *OURS]
OLD = [
    {
        "method": method,
        "dataset": "digits",
        "n_way": 5,
        "n_shot": 1,
        "episodes": 600,
        "accuracy": 60.0,
        "ci95": 1.0,
        "images_per_s": 9.0,
    }
    for method in ("nn", "recycle")
]


def text_of(rows: list[dict[str, Any]], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(as_text(results_table(rows)))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


VARYING = {"shape": "varying-way varying-shot", "mean_way": 21.5, "chance": 7.3} | dict.fromkeys(("n_way", "n_shot", "n_query"))


def cells_of(line: str) -> list[str]:
    """Of a line of Markdown, by GitHub's rule: a bar that is not escaped ends a cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown_lines(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    lines = [cells_of(line) for line in as_markdown(results_table(rows)).splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines}


def test_a_line_tells_accuracies_difference_and_costs():
    assert markdown_lines(ROWS)["method"] == [
        "5-way 1-shot",
        "5-way 5-shot",
        "difference",
        "ms/episode",
        "peak MiB",
        "trained parameters",
        "GFLOPs/episode",
    ]
    assert markdown_lines(ROWS)["nn"] == ["50.00 ± 0.90", "68.00 ± 0.90", "−11.50 ± 0.40", "96.3", "910", "0", "210"]
    assert markdown_lines(ROWS)["**recycle**"][2] == ""


def test_difference_and_costs_are_those_of_the_first_shape():
    rows = [row("nn", 5, 68.0, **against(-7.0, 0.01), episode_ms=5000), *ROWS]
    assert markdown_lines(rows)["nn"][2:4] == ["−7.00 ± 0.40", "96.3"]
    assert "of 5-way 5-shot" in as_markdown(results_table(rows))
    lacking = markdown_lines([*OURS, row("nn", 5, **against(-7.0, 0.01))])["nn"]
    assert lacking == ["", "60.00 ± 0.90", "", "", "", "", ""]


def test_a_varying_shape_is_a_column_too():
    rows = [*ROWS, row("nn", accuracy=40.0) | VARYING]
    lines = markdown_lines(rows)
    assert lines["method"][:4] == ["5-way 1-shot", "5-way 5-shot", "varying-way varying-shot", "difference"]
    assert lines["nn"][2:4] == ["40.00 ± 0.90", "−11.50 ± 0.40"]
    assert lines["**recycle**"][2] == ""
    assert "varying-way varying-shot & difference" in as_latex(results_table(rows))
    assert "<th scope=col>varying-way varying-shot</th>" in as_html(results_table(rows))
    assert [found["shape"] for found in csv.DictReader(io.StringIO(as_csv(rows)))] == ["", "", "", "", VARYING["shape"]]
    printed = text_of(rows)
    assert {"varying-way", "varying-shot", "40.00 ± 0.90"} <= {cell.strip() for cell in re.split("[┃│\n]", printed)}
    assert max(map(len, printed.splitlines())) < 90
    alone = [row("nn", accuracy=40.0) | VARYING, row("recycle", accuracy=50.0) | VARYING]
    assert "those of varying-way varying-shot." in as_markdown(results_table(alone))


@pytest.mark.parametrize(("p_value", "marked"), [(0.049, False), (0.05, True), (0.9, True), (None, False)])
def test_a_difference_that_may_be_chance_is_marked(p_value: float, marked: bool):
    rows = [row("nn", **against(0.25, p_value)), *OURS]
    assert markdown_lines(rows)["nn"][2] == "+0.25 ± 0.40" + "°" * marked
    assert "°: p ≥ 0.05" in as_markdown(results_table(rows))
    assert ("$^{\\circ}$ &" in as_latex(results_table(rows))) == marked


def test_recycle_is_bold_and_the_best_besides_the_oracle_underlined():
    rows = [*ROWS, row("oracle", 1, 90.0), row("oracle", 5, 70.0), row("other", 5, 80.0)]
    lines = markdown_lines(rows)
    assert lines["**recycle**"][:2] == ["**<ins>61.50 ± 0.90</ins>**", "**75.00 ± 0.90**"]
    assert lines["other"][1] == "<ins>80.00 ± 0.90</ins>"
    assert lines["oracle"][:2] == ["90.00 ± 0.90", "70.00 ± 0.90"]
    latex = as_latex(results_table(rows))
    assert r"\textbf{recycle} & \textbf{\underline{61.50 $\pm$ 0.90}} & \textbf{75.00 $\pm$ 0.90} &  &" in latex
    html = as_html(results_table(rows))
    assert html.count("<tr class=ours>") == 1
    assert "<td class=best>80.00 ± 0.90</td>" in html


def test_the_fastest_leads_but_not_where_most_are_as_good():
    rows = [row("nn", episode_ms=10.0), row("bpa", episode_ms=11.0), row("recycle", episode_ms=12.0)]
    lines = markdown_lines(rows)
    assert lines["nn"][2] == "<ins>10</ins>"
    assert "<ins>" not in "".join(lines["bpa"])
    assert markdown_lines([row("recycle")])["**recycle**"][0] == "**60.00 ± 0.90**"


def test_other_numbers_of_episodes_are_told_at_the_method():
    tuned = [row("lora-linear", 1, episodes=100), row("lora-linear", 5, episodes=100)]
    rows = [*ROWS, *tuned, row("mixed", 1), row("mixed", 5, episodes=200)]
    assert list(markdown_lines(rows))[2:] == [
        "nn",
        "**recycle**",
        "lora-linear (100 episodes)",
        "mixed (600, 200 episodes)",
    ]
    assert "600 episodes" in as_text(results_table(rows)).title.plain  # type: ignore[union-attr]


def test_data_sets_have_lines_of_their_own_and_the_last_measurement_counts():
    rows = [row("nn", 1, 10.0), row("nn", 1, 20.0), row("recycle", 1, 15.0), row("nn", 1, 90.0, dataset="digits")]
    lines = markdown_lines(rows)
    assert lines["nn (cifar-fs/val)"][0] == "<ins>20.00 ± 0.90</ins>"
    assert lines["nn (digits)"][0] == "90.00 ± 0.90"
    assert list(lines)[2:] == ["nn (cifar-fs/val)", "**recycle (cifar-fs/val)**", "nn (digits)"]


def test_rows_of_an_older_version_leave_cells_empty():
    assert markdown_lines(OLD)["nn"] == ["60.00 ± 1.00", "", "", "", "", ""]
    for render in (as_latex, as_html, as_text):
        render(results_table(OLD))
    assert as_csv(OLD).splitlines()[1] == "nn,digits,5,1,600,60.0,1.0,9.0"


def test_without_recycle_and_without_rows():
    assert markdown_lines([row("nn"), row("bpa")])["nn"][1] == ""
    assert list(markdown_lines([])) == ["method", "---"]
    assert "\\begin{tabular}{l}" in as_latex(results_table([]))


def test_text_fits_into_100_characters():
    rows = [row("loras-avg-linear:2", shot, 50, **against(-11.5, 0.5), episodes=100) for shot in (1, 5)]
    out = text_of([*ROWS, *rows, row("nn-cosine", 1), row("nn-cosine", 5)])
    assert max(map(len, out.splitlines())) <= 100
    line = next(line for line in out.splitlines() if "loras-avg-linear" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "loras-avg-linear:2 (100 episodes)",
        "50.00 ± 0.90",
        "50.00 ± 0.90",
        "−11.50 ± 0.40°",
        "96.3",
    ]
    assert "peak" not in out


def test_names_are_no_markup_of_a_terminal():
    assert "[red]x[/red]" in text_of([row("[red]x[/red]")])


def test_markdown_is_escaped():
    (line,) = [cells for name, cells in markdown_lines([row(EVIL)]).items() if name.startswith("a")]
    assert len(line) == 6
    out = as_markdown(results_table([row(EVIL, dataset=f"x\n{EVIL}")]))
    assert out.count("a\\_b\\|&lt;c&gt;&amp;%") == 2
    assert "x a\\_b" in out
    assert "<c>" not in out


def test_latex_is_escaped():
    out = as_latex(results_table([row(EVIL + "\\{}$~^#"), row("[h]")]))
    expected = r"a\_b\textbar{}\textless{}c\textgreater{}\&\%\textbackslash{}\{\}\$\textasciitilde{}\textasciicircum{}\#"
    assert f"\n{expected} & " in out
    assert "\n{[}h] & " in out
    body = out[out.index("\\midrule") : out.index("\\bottomrule")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()[1:]] == [6, 6]
    assert out.count("{") - out.count(r"\{") == out.count("}") - out.count(r"\}")


class Cells(HTMLParser):
    """The texts of the cells, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_escaped():
    cells = Cells(as_html(results_table([row(EVIL, dataset="<script>")])))
    assert EVIL in cells.texts
    assert cells.tags == {"p", "div", "table", "thead", "tbody", "tr", "th", "td"}


def test_csv_reads_back():
    rows = [row(EVIL, source='say "x", y\nz'), row("nn") | {"new": 1}]
    first, second = csv.DictReader(io.StringIO(as_csv(rows)))
    assert first["method"] == EVIL
    assert first["source"] == 'say "x", y\nz'
    assert (first["difference"], first["new"], second["new"]) == ("", "", "1")
    assert float(first["episode_ms"]) == 96.34
    assert "per_class" not in first
    assert set(first) == (set(rows[1]) - {"per_class"})


def test_an_oracle_that_is_as_good_is_not_underlined():
    assert markdown_lines([*ROWS, row("oracle", 1, 61.5)])["oracle"][0] == "61.50 ± 0.90"


@pytest.mark.parametrize("label", ["oracle:metric=false", "bpa:oracle", "linear-probe:c=2,features=oracle", "pmf"])
def test_nor_is_the_oracle_by_other_settings(label: str):
    lines = markdown_lines([*ROWS, row(label, 1, 90.0)])
    assert lines[label][0] == "90.00 ± 0.90"
    assert "<ins>61.50" in lines["**recycle**"][0]


def test_pictures_show_the_last_measurement_on_the_last_data_set():
    rows = [row("nn", 1, 10.0, dataset="digits"), row("nn", 1, 20.0), row("nn", 5, 30.0), row("nn", 1, 40.0)]
    assert [(found["n_shot"], found["accuracy"]) for found in measured_last(rows)] == [(1, 40.0), (5, 30.0)]
    assert measured_last([]) == []
