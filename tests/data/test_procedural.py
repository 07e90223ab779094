import numpy as np
import pytest

from lr_ray.data.procedural import PROCEDURAL, ProceduralName


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_generator_alone_determines_the_image(name: ProceduralName):
    one, again, other = (np.array(PROCEDURAL[name](np.random.default_rng(seed), 30)) for seed in (1, 1, 2))
    assert one.shape == (30, 30, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def neighbours_correlation(name: ProceduralName) -> float:
    images = np.stack([np.array(PROCEDURAL[name](np.random.default_rng(seed), 42)) for seed in range(20)]).astype(float)
    return float(np.corrcoef(images[:, :, :-1].ravel(), images[:, :, 1:].ravel())[0, 1])


def test_noise_has_no_structure_and_dead_leaves_have():
    assert abs(neighbours_correlation("noise")) < 0.02
    assert neighbours_correlation("dead-leaves") > 0.8


def test_gradients_are_smooth_and_fractals_are_not():
    def steepest(name: ProceduralName) -> float:
        """Median over images of the largest step between neighbours."""
        images = np.stack([np.array(PROCEDURAL[name](np.random.default_rng(seed), 42)) for seed in range(20)]).astype(float)
        return float(np.median(np.abs(np.diff(images, axis=2)).max(axis=(1, 2, 3))))

    assert neighbours_correlation("gradients") > 0.99
    assert steepest("gradients") < 40 < 100 < steepest("fractals")


def test_fractals_show_a_thing_on_a_ground():
    for seed in range(20):
        image = np.array(PROCEDURAL["fractals"](np.random.default_rng(seed), 42)).reshape(-1, 3)
        colours, counts = np.unique(image, axis=0, return_counts=True)
        assert len(colours) > 2
        assert counts.max() < 0.97 * len(image)


def test_strokes_are_black_on_mostly_white():
    images = np.stack([np.array(PROCEDURAL["strokes"](np.random.default_rng(seed), 42)) for seed in range(20)])
    assert np.array_equal(images[..., 0], images[..., 2])
    shares = (images < 50).mean(axis=(1, 2, 3))
    assert ((shares > 0.01) & (shares < 0.5)).all()
    assert (images > 200).mean() > 0.6
