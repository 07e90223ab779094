"""`lr-ray library sample`: adapters of mixed rank and format, tuned on real images, as strangers would have shared them."""

from dataclasses import replace
from itertools import cycle

from lr_ray.config import ExperimentConfig
from lr_ray.errors import ConfigError
from lr_ray.library.market import DAMAGES, FORMATS, save_as_stranger
from lr_ray.report.progress import Reporter
from lr_ray.runtime.tuning import TuningTask, plan_tuning, tune_missing
from lr_ray.storage.adapters import read_adapter
from lr_ray.storage.filesystem import file_size, join
from lr_ray.vit.backbone import load_backbone

RANKS = (2, 4, 8, 16)


def make_market(to: str, config: ExperimentConfig, reporter: Reporter, *, num_damaged: int = 0) -> list[str]:
    """Tune `tuning.num_adapters` adapters that are not there yet, in `OUTPUT/market`, and save them as strangers would.

    Args:
        to: folder or URI.
        num_damaged: the last so many are damaged, each in another way.

    Returns:
        Where each is.

    Raises:
        ConfigError: a file in the folder's place, more damaged ones than there are, or no data to tune on.
        DataError: too few classes or images.
    """
    if file_size(to) is not None:
        raise ConfigError(f"{to} is a file; give a folder to write the adapters into")
    if num_damaged > config.tuning.num_adapters:
        raise ConfigError(f"--num-damaged {num_damaged}: there are {config.tuning.num_adapters} adapters (tuning.num_adapters)")
    originals = config.model_copy(update={"adapters": join(config.output_root, "market")})
    tasks = [_of_rank(task, rank) for task, rank in zip(plan_tuning(originals), cycle(RANKS), strict=False)]
    tune_missing(tasks, originals, reporter)
    backbone, damages = load_backbone(config.backbone), cycle(DAMAGES)
    written = []
    for index, (task, format_) in enumerate(zip(tasks, cycle(FORMATS), strict=False)):
        damage = next(damages) if index >= len(tasks) - num_damaged else ""
        kind = "timm" if damage else format_
        name = f"{damage or format_}-{index:03d}".replace(" ", "-").replace(",", "")
        written.append(save_as_stranger(to, name, read_adapter(task.folder), backbone, format_=kind, damage=damage))
    return written


def _of_rank(task: TuningTask, rank: int) -> TuningTask:
    scale = task.config.tuning.lora.alpha / task.config.tuning.lora.rank
    lora = task.config.tuning.lora.model_copy(update={"rank": rank, "alpha": scale * rank})
    tuning = task.config.tuning.model_copy(update={"lora": lora})
    config = task.config.model_copy(update={"tuning": tuning})
    return replace(task, config=config, folder=f"{task.folder}-rank-{rank}", inputs={**task.inputs, "rank": rank})
