"""One self-contained HTML page on a run: its accuracies, its images, its curves, how to repeat it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

import yaml

from lr_ray.report.tables import as_html, measured_last, results_table, shape_of

_ADAPTERS_SHOWN, _CLASSES_SHOWN = 100, 12
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>LR-Ray: $name</title>
<style>
html { color-scheme: light; background: #fff }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a2e; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .lead { font-size: 1.15rem } .note { color: #667; font-size: .9rem }
.wide, figure { margin: 1rem 0; overflow-x: auto } .long { max-height: 30rem; overflow-y: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #dde } td { white-space: nowrap }
th:first-child, td:first-child, .texts th, .texts td { text-align: left }
.texts td { white-space: normal; vertical-align: top }
tr.ours { font-weight: 600; background: #fbeef0 } td.best { text-decoration: underline; text-underline-offset: .2em }
img { display: block; max-width: max(100%, 44rem) }
pre { background: #f4f4f8; padding: 1rem; overflow-x: auto; font-size: .85rem }
footer { margin-top: 3rem; color: #667 }
</style></head><body>
<h1>$name</h1>
<p class="lead">$lead</p>
<h2>Accuracy on unseen classes</h2>
$table
$sources
$bars
$time
$classes
$embeddings
<h2>Meta-training</h2>
$curves
<h2>Synthetic images</h2>
<p>$images</p>
$sheet
$metric_sheet
<h2>Adapters</h2>
$adapters
<h2>How this was made</h2>
<details><summary>Resolved configuration</summary><pre>$config</pre></details>
<footer>$versions</footer>
</body></html>
""")
_PICTURES = {
    "bars": ("", "Accuracy of each method"),
    "time": ("Accuracy and time", "Accuracy of each method against the time of an episode"),
    "classes": ("Class by class", "Accuracy of each class without the meta-LoRA, with it, and with the oracle"),
    "embeddings": ("One episode's features", "Support and query features before and after the meta-LoRA, in two dimensions"),
    "curves": ("", "Loss and accuracy by step"),
    "sheet": ("", "Contact sheet of synthetic images"),
    "metric_sheet": ("Images that the metric is learnt from", "Contact sheet of the images that the metric is learnt from"),
}
"""{key: (heading, text in place of the picture)}"""


def render_report(
    *,
    name: str,
    rows: Sequence[dict[str, Any]],
    adapters: Sequence[dict[str, Any]],
    num_images: int,
    config: dict[str, Any],
    versions: dict[str, str],
    pictures: Mapping[str, bytes],
) -> str:
    """The page.

    Args:
        rows: of `results.json`.
        adapters: manifests of the library.
        num_images: synthetic images made.
        pictures: PNGs `bars`, `time`, `classes`, `embeddings`, `curves`, `sheet`, `metric_sheet`; one that is not there is
            left out.
    """
    accuracies = [adapter["held_out_accuracy"] for adapter in adapters if "held_out_accuracy" in adapter]
    held_out = f", {100 * sum(accuracies) / len(accuracies):.1f} % accurate on images they did not see" if accuracies else ""
    return _PAGE.substitute(
        name=escape(name),
        lead=escape(_lead(rows)),
        table=as_html(results_table(rows)),
        sources=_sources(rows),
        images=escape(
            f"{num_images} images, inverted from {len(adapters)} adapters{held_out}. No real image was used to make them."
        ),
        adapters=_adapters(adapters),
        config=escape(yaml.safe_dump(config, allow_unicode=True, sort_keys=False)),
        versions=escape(", ".join(f"{package} {version}" for package, version in versions.items())),
        **{key: _figure(pictures.get(key), *texts) for key, texts in _PICTURES.items()},
    )


def _figure(png: bytes | None, heading: str, alt: str) -> str:
    if png is None:
        return ""
    above = f"<h2>{heading}</h2>\n" if heading else ""
    return f'{above}<figure><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def _lead(rows: Sequence[dict[str, Any]]) -> str:
    """The gain in a sentence."""
    measured = measured_last(rows)
    first = {row["method"]: row for row in measured if shape_of(row) == shape_of(measured[0])}
    if not {"nn", "recycle"} <= first.keys():
        return "Accuracy on few-shot tasks of unseen classes."
    ours, nothing = first["recycle"], first["nn"]
    shape = shape_of(ours)
    return (
        f"{shape[:1].upper()}{shape[1:]} tasks of unseen classes: {ours['accuracy']:.1f} % with the meta-LoRA, "
        f"{nothing['accuracy']:.1f} % without it; no fine-tuning, no real image."
    )


def _sources(rows: Sequence[dict[str, Any]]) -> str:
    found = {row["method"]: row["source"] for row in rows if row.get("source")}
    if not found:
        return ""
    table = _texts(["method", "from"], list(found.items()))
    return f"<details><summary>Where the methods are from</summary>{table}</details>"


def _adapters(adapters: Sequence[dict[str, Any]]) -> str:
    """A line each, the first of very many."""
    if not adapters:
        return "<p>None.</p>"
    lines = [
        (
            str(adapter.get("adapter_id", "unknown")),
            f"{100 * adapter['held_out_accuracy']:.1f}" if "held_out_accuracy" in adapter else "",
            _classes(adapter.get("class_names") or []),
        )
        for adapter in adapters[:_ADAPTERS_SHOWN]
    ]
    more = len(adapters) - len(lines)
    rest = f"<p class=note>and {more} more.</p>" if more else ""
    return f"<div class=long>{_texts(['adapter', 'accuracy on images it did not see, %', 'classes'], lines)}</div>{rest}"


def _classes(names: Sequence[str]) -> str:
    more = f", and {len(names) - _CLASSES_SHOWN} more" if len(names) > _CLASSES_SHOWN else ""
    return ", ".join(names[:_CLASSES_SHOWN]) + more


def _texts(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of words."""
    top = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>" for line in lines)
    return f'<div class="wide texts"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
