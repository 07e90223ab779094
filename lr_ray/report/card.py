"""The model card of a meta-LoRA: `README.md` in its folder, by the Hugging Face convention."""

from collections.abc import Sequence
from string import Template
from typing import Any

import yaml

from lr_ray.errors import StorageError
from lr_ray.report.tables import shape_of
from lr_ray.storage.filesystem import join, read_if_there, write_bytes
from lr_ray.storage.manifest import CARD_NAME, METRIC_NAME, read_manifest
from lr_ray.vit.embedded import EMBEDDED_BACKBONE

_METHODS = {"meta_lora": "recycle", "joint": "joint", "oracle": "oracle"}
"""{kind of the manifest: method that measures it}."""
_USE = "## How to use it"
_ADAPTERS_SHOWN = 20
_UNKNOWN = "unknown: ask their authors"
_MARK = "<!-- Written by LR-Ray. `lr-ray eval` writes it again, unless this line is gone. -->"
_CARD = Template("""---
$metadata---
$mark

# $title

$lead

## How to use it

```python
import lr_ray
model = lr_ray.load("PATH")
logits = model.classify(support, labels, query)
```

`PATH` is this folder. PEFT loads it without LR-Ray too, onto the backbone's timm model.$metric

## Accuracy

$accuracy

## What it was made of

$ingredients

## Training

$training

## Licences

$licences

## How this was made

<details><summary>Resolved configuration</summary>

```yaml
$config```

</details>

$versions
""")


_IN_METRIC = (
    f" Classes are told apart in the metric of `{METRIC_NAME}`: "
    "`torch.nn.functional.normalize((features - mean) @ weight, dim=-1)`, which `lr_ray.load` applies by itself."
)


def model_card(manifest: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> str:
    """The card: a function of the manifest and of what was measured.

    Args:
        manifest: of a meta-LoRA or an oracle.
        rows: of `results.json`; none before it is measured.
    """
    config = manifest["config"]
    measured = [row for row in rows if row["method"] == _METHODS[manifest["kind"]]]
    return _CARD.substitute(
        metadata=yaml.safe_dump(_metadata(manifest, measured), allow_unicode=True, sort_keys=False),
        mark=_MARK,
        title=_title(manifest),
        lead=_lead(manifest),
        metric="" if manifest.get("metric") is None else _IN_METRIC,
        accuracy=_accuracy(measured, [row for row in rows if row["method"] == "nn"]),
        ingredients=_ingredients(manifest),
        training=_training(manifest),
        licences=_licences(manifest),
        config=yaml.safe_dump(config, allow_unicode=True, sort_keys=False),
        versions=", ".join(f"{package} {version}" for package, version in manifest["versions"].items()),
    )


def complete_card(folder: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put what was measured into the card of this folder; a card that is not LR-Ray's own stays as it is.

    Raises:
        StorageError: not readable or not writable.
    """
    content = read_if_there(join(folder, CARD_NAME))
    if content is None or _MARK.encode() not in content:
        return
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("kind") not in _METHODS:
        return
    card = model_card(manifest, rows).encode()
    if card != content:
        write_bytes(join(folder, CARD_NAME), card)


def fitted_card(content: str | None, *, usage: str, library: str, base_model: str | None, title: str) -> str:
    """The card of a meta-LoRA's folder for another form of it: how to use it, and what its metadata say of that.

    Args:
        content: of the folder's card; None where there is none.
        usage: takes the place of the section "How to use it", or is put at the end of a card without it.
        library, base_model: `library_name` and `base_model` of the metadata; None leaves the latter out.
        title: of a card where there was none.

    Raises:
        StorageError: its metadata are not YAML.
    """
    metadata, body = _taken_apart(content if content is not None else f"# {title}\n")
    metadata = {key: value for key, value in metadata.items() if key != "base_model"} | {"library_name": library}
    if base_model is not None:
        metadata["base_model"] = base_model
    section = f"{_USE}\n\n{usage}\n"
    before, found, after = body.replace(f"{_MARK}\n\n", "").partition(f"{_USE}\n")
    _, following, rest = after.partition("\n## ")
    body = before + section + following + rest if found else f"{before.rstrip()}\n\n{section}"
    return f"---\n{yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False)}---\n{body}"


def _taken_apart(content: str) -> tuple[dict[str, Any], str]:
    """Metadata and the rest."""
    if not content.startswith("---\n"):
        return {}, content
    front, _, body = content.removeprefix("---\n").partition("\n---\n")
    try:
        metadata = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise StorageError(f"{CARD_NAME}: its metadata are not YAML ({error}); correct or delete it") from error
    if not isinstance(metadata, dict):
        raise StorageError(f"{CARD_NAME}: its metadata are no YAML mapping; correct or delete it")
    return metadata, body


def hub_backbone(config: dict[str, Any]) -> str | None:
    """Of a resolved config's `backbone`: the model of the hub that has its weights, or None where none is known to."""
    return _backbone(config)[0]


def _metadata(manifest: dict[str, Any], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Front matter; `base_model` only where a model of the hub is meant."""
    hub_id, backbone_license, _ = _backbone(manifest["config"]["backbone"])
    licenses = {backbone_license} | {adapter["license"].lower() for adapter in manifest["adapters"]}
    if manifest["kind"] == "oracle" or "" in licenses:
        license_id = "unknown"
    else:
        license_id = licenses.pop() if len(licenses) == 1 else "other"
    metadata = {
        "library_name": "peft",
        "base_model": hub_id,
        "license": license_id,
        "pipeline_tag": "image-feature-extraction",  # it has no head
        "tags": ["lora", "meta-lora", "few-shot", "vision-transformer", "lr-ray"],
        "model-index": [{"name": _title(manifest), "results": [_result(row) for row in measured]}] if measured else None,
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _result(row: dict[str, Any]) -> dict[str, Any]:
    shape = shape_of(row)
    return {
        "task": {"type": "image-classification", "name": f"{shape} classification"},
        "dataset": {"type": row["dataset"].partition("[")[0], "name": row["dataset"], "config": shape},
        "metrics": [
            {
                "type": "accuracy",
                "value": row["accuracy"],
                "name": "accuracy, %",
                "args": {"ci95": row["ci95"], "episodes": row["episodes"]},
            }
        ],
    }


def _title(manifest: dict[str, Any]) -> str:
    titles = {"meta_lora": "meta-LoRA", "joint": "meta-LoRA by plain supervision", "oracle": "oracle"}
    return f"{manifest['config']['name']}: {titles[manifest['kind']]}"


def _lead(manifest: dict[str, Any]) -> str:
    if manifest["kind"] == "oracle":
        source = "the real images that the adapters were tuned on: what a meta-LoRA without them is measured against"
    else:
        source = f"the synthetic set below, which recycles {_count(len(manifest['adapters']), 'adapter')}"
    return (
        f"A meta-LoRA of the Vision Transformer `{manifest['backbone']}` at {manifest['inputs']['backbone']['image_px']} px. "
        "Backbone and meta-LoRA classify few-shot tasks of classes that they never saw, in one forward pass, without "
        f"fine-tuning. LR-Ray meta-trained it on {source}."
    )


def _accuracy(measured: Sequence[dict[str, Any]], nothing: Sequence[dict[str, Any]]) -> str:
    """A line a shape, beside the nearest centre on the backbone alone."""
    if not measured:
        return "Not measured yet; `lr-ray eval` does that."
    beside = {_task(row): row for row in nothing}
    lines = [
        _line(_cell(row["dataset"]), shape_of(row), str(row["episodes"]), _percent(row), _percent(beside.get(_task(row))))
        for row in measured
    ]
    head = f"| data | task | episodes | `{measured[0]['method']}`, % | `nn`, without it, % |\n|---|---|---|---|---|"
    return "\n".join(["Few-shot tasks of the test data, ± 95 % confidence interval.\n", head, *lines])


def _task(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("dataset", "shape", "n_way", "n_shot", "n_query", "episodes"))


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"


def _ingredients(manifest: dict[str, Any]) -> str:
    inputs = manifest["inputs"]
    images = f"{_count(manifest['num_images'], 'image')} of {_count(manifest['num_classes'], 'class', 'classes')}"
    if manifest["kind"] == "oracle":
        return f"Trained on {images}, all real, digest `{inputs['data']}`."
    adapters = manifest["adapters"]
    lines = [
        _line(_cell(adapter["adapter_id"]), _cell(adapter["digest"] or "not read"), _cell(adapter["license"] or _UNKNOWN))
        for adapter in adapters[:_ADAPTERS_SHOWN]
    ]
    if more := len(adapters) - len(lines):
        lines.append(f"\nand {more} more, all of them in `lr_ray.json`.")
    return "\n".join(
        [
            f"The synthetic set: {_count(len(inputs['synthetic']), 'file')}, named in `lr_ray.json`; trained on {images}.\n",
            f"{_count(len(adapters), 'adapter')}:\n\n| adapter | digest | licence |\n|---|---|---|",
            *lines,
        ]
    )


def _training(manifest: dict[str, Any]) -> str:
    step = f"The weights are those of step {manifest['best_step']} of at most {manifest['config']['training']['num_steps']}"
    accuracy = manifest["validation_accuracy"]
    if accuracy is None:
        return f"{step}, the last; nothing was held out to validate on."
    images = "real images" if manifest["config"]["data"]["validation"] else "synthetic images of adapters held out for it"
    return f"{step}, the best on validation episodes: {100 * accuracy:.2f} % accurate on {images}."


def _licences(manifest: dict[str, Any]) -> str:
    lines = [f"- Backbone: {_backbone(manifest['config']['backbone'])[2]}"]
    if manifest["kind"] == "oracle":
        return "\n".join([*lines, "- Images: unknown: ask those whom they belong to."])
    adapters = manifest["adapters"]
    stated = sum(bool(adapter["license"]) for adapter in adapters)
    others = "" if stated == len(adapters) else f"; the others' are {_UNKNOWN}"
    return "\n".join([*lines, f"- Adapters: {stated} of {len(adapters)} state one in their PEFT config{others}."])


def _backbone(config: dict[str, Any]) -> tuple[str | None, str, str]:
    """Its name on the hub if it is there, its licence or "", and a sentence on that."""
    import timm

    name = config["name"]
    if config["weights"] is not None:
        return None, "", f"unknown: ask the authors of the weights, {_cell(config['weights'])}."
    if not config["pretrained"]:
        return None, "", "none, its weights are random."
    if name == "embedded":
        return f"timm/{EMBEDDED_BACKBONE.hub_name}", "apache-2.0", f"{EMBEDDED_BACKBONE.source}."
    known = timm.get_pretrained_cfg(name) if "." in name else None  # without its tag a timm name is none of the hub's
    hub_id = known.hf_hub_id if known is not None else None  # which may have another name than the architecture
    return hub_id, "", f"unknown: ask its authors; {_cell(name)} of timm."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Code that breaks neither a table nor its own quotes; names may be anybody's."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
