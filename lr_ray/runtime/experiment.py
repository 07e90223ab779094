"""Every step of an experiment in turn; each one skips what is there already."""

from collections.abc import Collection
from typing import Any

from lr_ray.config import ExperimentConfig
from lr_ray.fewshot.methods import Ingredient, ingredients_of
from lr_ray.grid import Cell
from lr_ray.report.progress import Reporter
from lr_ray.runtime.evaluation import evaluate_methods
from lr_ray.runtime.evaluation_plan import check_evaluation
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.probe import choose_by_probe
from lr_ray.runtime.session import ray_session
from lr_ray.runtime.stand_ins import make_stand_ins
from lr_ray.runtime.training import KINDS, train_together
from lr_ray.runtime.tuning import tune_library


def run_experiment(config: ExperimentConfig, reporter: Reporter, *, fast: bool = False) -> list[dict[str, Any]]:
    """Tune (where the config names data for it and no adapters), invert, train, evaluate; returns the rows of results.

    Args:
        fast: invert as a probe of the machine finds fastest.
    """
    check_evaluation(config)
    needs = ingredients_of(config.evaluation.methods)
    with ray_session(config.ray):
        if config.data.tune is not None and config.adapters is None:
            tune_library(config, reporter)
        invert_library(choose_by_probe(config, reporter) if fast else config, reporter, strict=True)
        _train(config, needs | {"meta_lora"}, reporter)
        return evaluate_methods(config, reporter)


def run_cell(cell: Cell, reporter: Reporter) -> list[dict[str, Any]]:
    """The same for one cell of a grid, whose meta-LoRA is made only if it is measured."""
    config = cell.config
    check_evaluation(config)
    needs = ingredients_of(config.evaluation.methods)
    with ray_session(config.ray):
        if cell.tune:
            tune_library(config, reporter)
        if needs & {"meta_lora", "joint", "synthetic"}:
            if cell.stand_in is None or cell.stand_in.kind in ("shuffled", "mixed"):
                invert_library(config.model_copy(update={"synthetic": cell.inverted_root}), reporter, strict=True)
            if cell.stand_in is not None:
                make_stand_ins(config, cell.stand_in, cell.inverted_root, reporter)
        _train(config, needs, reporter)
        return evaluate_methods(config, reporter)


def _train(config: ExperimentConfig, needs: Collection[Ingredient], reporter: Reporter) -> None:
    """What the methods need of what is trained."""
    if kinds := [kind for kind in KINDS if kind in needs]:
        train_together(config, kinds, reporter)
