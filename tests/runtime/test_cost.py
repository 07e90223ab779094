"""Costs as they are told of a piece of work."""

import torch

from lr_ray.runtime.cost import begin_peak_memory, count_flops, peak_memory_mib

CPU = torch.device("cpu")


def test_flops_of_a_matrix_product() -> None:
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    assert count_flops(lambda: a @ b) == 2 * 10 * 20 * 30


def test_a_peak_is_that_since_it_was_forgotten() -> None:
    begin_peak_memory(CPU)
    large = torch.ones(100, 2**20)
    during = peak_memory_mib(CPU)
    del large
    begin_peak_memory(CPU)
    assert during - peak_memory_mib(CPU) > 300
