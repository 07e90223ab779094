"""How a form of a meta-LoRA is loaded: the lines of its card."""

from importlib.metadata import PackageNotFoundError, version

from lr_ray.export.adapter import hub_id_of, hub_name_of
from lr_ray.export.files import is_distilled
from lr_ray.export.hugging_face import Counterpart, counterpart_of
from lr_ray.model import Parts
from lr_ray.storage.manifest import METRIC_NAME

_METRIC = (
    f", after `torch.nn.functional.normalize((features - mean) @ weight, dim=-1)` with `mean` and `weight` of `{METRIC_NAME}`"
)


def usage_timm(parts: Parts, where: str) -> str:
    """Of a repository of the hub with the merged model."""
    lines = [
        "import timm",
        "",
        f'model = timm.create_model("hf-hub:{where}", pretrained=True).eval()',
        "features = model(images)",
    ]
    return _usage(parts, lines, "")


def usage_peft(parts: Parts, where: str) -> str:
    """Of a PEFT folder for timm's model."""
    backbone = parts.backbone
    hub_id = hub_id_of(parts, foreign=False)
    name = hub_name_of(parts) if hub_id is not None else backbone.name
    given = f"pretrained={hub_id is not None}, num_classes=0, img_size={backbone.image_px}"
    cut = [f"del model.blocks[{len(backbone.model.blocks)}:]"] if backbone.name == "embedded" else []
    return _usage(
        parts,
        [
            "import timm",
            "from peft import PeftModel",
            "",
            f'model = timm.create_model("{name}", {given})',
            *cut,
            f'model = PeftModel.from_pretrained(model, "{where}").eval()',
            # timm's forward pass of a distilled model is the mean of two tokens
            "features = model.forward_features(images)[:, 0]" if is_distilled(backbone) else "features = model(images)",
        ],
        "" if hub_id is not None else f"The model needs the weights that the meta-LoRA was trained on ({backbone.source}).",
    )


def usage_peft_hf(parts: Parts, where: str) -> str:
    """Of a PEFT folder for the model of transformers."""
    backbone, counterpart = parts.backbone, counterpart_of(parts.backbone)
    hub_id, model_class = hub_id_of(parts, foreign=True), counterpart.model_class
    depth = ", num_hidden_layers=" + str(len(backbone.model.blocks)) if backbone.name == "embedded" else ""
    call = "" if counterpart.family == "dinov2" else ", interpolate_pos_encoding=True"
    note = (
        f"The names are those of transformers {_transformers()}, which renames modules family by family: with other names PEFT "
        "loads nothing or, worse, a part."
    )
    if hub_id is None:
        note += f" `BASE` is a {model_class} with the weights that the meta-LoRA was trained on ({backbone.source})."
    return _usage(
        parts,
        [
            "from peft import PeftModel",
            f"from transformers import {model_class}",
            "",
            f'model = {model_class}.from_pretrained("{hub_id or "BASE"}"{depth})',
            *_resized(parts, counterpart),
            f'model = PeftModel.from_pretrained(model, "{where}").eval()',
            f"features = model(pixel_values=images{call}).{counterpart.features}",
        ],
        note,
    )


def _transformers() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "5.24"


def _resized(parts: Parts, counterpart: Counterpart) -> list[str]:
    """Lines that give the position embedding its size as timm does, where it is another than the weights': transformers, which
    resizes it at every call, does so without antialiasing, from which the features differ."""
    backbone = parts.backbone
    if backbone.image_px == backbone.model.pretrained_cfg["input_size"][-1]:
        return []
    side, embeddings = backbone.image_px // backbone.patch_px, f"model.{counterpart.prefix}embeddings"
    size, prefixed = f"({side}, {side})", f"num_prefix_tokens={backbone.model.num_prefix_tokens}"
    lines = [
        "# as timm resizes the positions, and as the meta-LoRA was trained; transformers' own resizing gives other features",
        "import torch",
        "from timm.layers import resample_abs_pos_embed",
        "",
    ]
    if counterpart.family == "clip":
        return [
            *lines,
            f"positions = {embeddings}.position_embedding.weight.data[None]",
            f"positions = resample_abs_pos_embed(positions, {size})[0]",
            f"{embeddings}.position_embedding = torch.nn.Embedding.from_pretrained(positions)",
            f"{embeddings}.position_ids = torch.arange(len(positions))[None]",
        ]
    return [
        *lines,
        f"positions = {embeddings}.position_embeddings.data",
        f"positions = resample_abs_pos_embed(positions, {size}, {prefixed})",
        f"{embeddings}.position_embeddings = torch.nn.Parameter(positions)",
    ]


def _usage(parts: Parts, lines: list[str], note: str) -> str:
    backbone = parts.backbone
    mean, std = ([round(value, 6) for value in tensor.tolist()] for tensor in (backbone.mean, backbone.std))
    code = "\n".join(lines)
    metric = "" if parts.metric is None else _METRIC
    return (
        f"```python\n{code}\n```\n\n`images`: (N, 3, {backbone.image_px}, {backbone.image_px}), [0, 1] normalised by mean "
        f"{mean} and standard deviation {std}. A few-shot classifier takes the nearest mean of features{metric}. {note}"
    ).rstrip()
