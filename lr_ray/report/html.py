"""One self-contained HTML page on a run: its accuracies, its images, its curves, how to repeat it."""

import base64
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

import yaml

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>LR-Ray: $name</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a2e; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .lead { font-size: 1.15rem }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #dde }
th:first-child, td:first-child { text-align: left } tr.ours { font-weight: 600; background: #fbeef0 }
img { max-width: 100% } figure { margin: 0; overflow-x: auto }
pre { background: #f4f4f8; padding: 1rem; overflow-x: auto; font-size: .85rem }
footer { margin-top: 3rem; color: #667 }
</style></head><body>
<h1>$name</h1>
<p class="lead">$lead</p>
<h2>Accuracy on unseen classes</h2>
$table
<figure><img alt="Accuracy of each method" src="$bars"></figure>
<h2>Synthetic images</h2>
<p>$images</p>
<figure><img alt="Contact sheet of synthetic images" src="$sheet"></figure>
<h2>Meta-training</h2>
<figure><img alt="Loss and accuracy by step" src="$curves"></figure>
<h2>How this was made</h2>
<details><summary>Resolved configuration</summary><pre>$config</pre></details>
<footer>$versions</footer>
</body></html>
""")


def render_report(
    *,
    name: str,
    rows: Sequence[dict[str, Any]],
    adapters: Sequence[dict[str, Any]],
    num_images: int,
    config: dict[str, Any],
    versions: dict[str, str],
    pictures: dict[str, bytes],
) -> str:
    """The page.

    Args:
        rows: of `results.json`.
        adapters: manifests of the library.
        num_images: synthetic images made.
        pictures: PNGs `bars`, `sheet`, `curves`.
    """
    accuracies = [adapter["held_out_accuracy"] for adapter in adapters if "held_out_accuracy" in adapter]
    held_out = f", {100 * sum(accuracies) / len(accuracies):.1f} % accurate on images they did not see" if accuracies else ""
    sources = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()}
    return _PAGE.substitute(
        name=escape(name),
        lead=escape(_lead(rows)),
        table=_table(rows),
        images=escape(
            f"{num_images} images, inverted from {len(adapters)} adapters{held_out}. No real image was used to make them."
        ),
        config=escape(yaml.safe_dump(config, allow_unicode=True, sort_keys=False)),
        versions=escape(", ".join(f"{package} {version}" for package, version in versions.items())),
        **sources,
    )


def _lead(rows: Sequence[dict[str, Any]]) -> str:
    """The gain in a sentence."""
    first = {row["method"]: row for row in rows if row["n_shot"] == rows[0]["n_shot"] and row["n_way"] == rows[0]["n_way"]}
    if not {"nn", "recycle"} <= first.keys():
        return "Accuracy on few-shot tasks of unseen classes."
    ours, nothing = first["recycle"], first["nn"]
    return (
        f"{ours['n_way']}-way {ours['n_shot']}-shot tasks of unseen classes: {ours['accuracy']:.1f} % with the meta-LoRA, "
        f"{nothing['accuracy']:.1f} % without it; no fine-tuning, no real image."
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"<tr{' class=ours' if row['method'] == 'recycle' else ''}><td>{escape(row['method'])}</td><td>{row['n_way']}</td>"
        f"<td>{row['n_shot']}</td><td>{row['accuracy']:.2f} ± {row['ci95']:.2f}</td><td>{row['episodes']}</td>"
        f"<td>{row['images_per_s']:.0f}</td></tr>"
        for row in rows
    ]
    head = "<tr><th>method</th><th>way</th><th>shot</th><th>accuracy, %</th><th>episodes</th><th>images/s</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"
