"""How fast the test episodes of tuning-free methods are drawn and scored, from features computed once."""

import time
from typing import Any

import numpy as np
import torch
from lr_ray.bench.speed import write_result

from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import predict
from lr_ray.fewshot.methods import FeatureMethod, find_method

NUM_EPISODES, NUM_CLASSES, PER_CLASS, DIM = 10_000, 16, 600, 384
METHODS = ("nn", "nn-cosine", "linear-probe", "bpa")


def bench_episodes(*, threads: int) -> dict[str, Any]:
    """Of random features; returns what it wrote to bench/results/episodes.json."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    features = torch.randn(NUM_CLASSES, DIM, generator=generator)[torch.from_numpy(labels)]
    features = features + 3 * torch.randn(len(labels), DIM, generator=generator)
    rows = []
    for shape in (EpisodeShape(n_shot=1), EpisodeShape(n_shot=5)):
        start = time.perf_counter()
        episodes = draw_test_episodes(labels, shape, num_episodes=NUM_EPISODES, seed=0)
        drawn_s = round(time.perf_counter() - start, 2)
        for label in METHODS:
            chosen = find_method(label)
            assert isinstance(chosen.method, FeatureMethod)
            head = chosen.method.head(chosen.settings, {})
            start = time.perf_counter()
            with torch.inference_mode():
                predict(features, episodes, shape, head)
            scored_s = round(time.perf_counter() - start, 2)
            rows.append({"method": label, "n_shot": shape.n_shot, "draw_s": drawn_s, "score_s": scored_s})
    settings = {"episodes": NUM_EPISODES, "images": len(labels), "features": DIM, "threads": threads}
    return write_result("episodes", {"settings": settings, "rows": rows})
