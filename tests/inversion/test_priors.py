import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from lr_ray.errors import BackboneError
from lr_ray.inversion.priors import BatchNormPrior, load_prior

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


@pytest.fixture
def network() -> nn.Sequential:
    """Two convolutions, each with a BatchNorm behind it, whose statistics are not the initial 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        )
        for layer in (network[1], network[4]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(4))


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def naive_prior(network: nn.Sequential, pixels: Tensor) -> Tensor:
    terms = []
    features = normalized(pixels)
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            channels = features.permute(1, 0, 2, 3).reshape(features.shape[1], -1)
            mean, variance = channels.mean(dim=1), channels.var(dim=1, unbiased=False)
            terms.append(
                (mean - layer.running_mean).norm() / (layer.running_mean.norm() ** 2 + layer.running_var.sum()).sqrt()
                + (variance - layer.running_var).norm() / layer.running_var.norm()
            )
        features = layer(features)
    return sum(terms) / len(terms)


def test_value_against_a_naive_computation(network: nn.Sequential, pixels: Tensor):
    expected = naive_prior(network, pixels)
    with BatchNormPrior(network, mean=MEAN, std=STD) as prior:
        torch.testing.assert_close(prior(pixels), expected)


def test_a_second_call_does_not_add_to_the_first(network: nn.Sequential, pixels: Tensor):
    with BatchNormPrior(network, mean=MEAN, std=STD) as prior:
        first = prior(pixels).item()
        prior(1 - pixels)
        assert prior(pixels).item() == first


@torch.no_grad()
def test_zero_for_a_batch_with_the_stored_statistics(network: nn.Sequential, pixels: Tensor):
    features = normalized(pixels)
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(features.mean(dim=(0, 2, 3)))
            layer.running_var.copy_(features.var(dim=(0, 2, 3), unbiased=False))
        features = layer(features)
    with BatchNormPrior(network, mean=MEAN, std=STD) as prior:
        assert prior(pixels).item() == pytest.approx(0, abs=1e-5)
        assert prior(pixels.square()).item() > 0.01


def test_stored_statistics_and_mode_stay_as_they_are(network: nn.Sequential, pixels: Tensor):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with BatchNormPrior(network.train(), mean=MEAN, std=STD) as prior:
        prior(pixels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_gradient_reaches_the_pixels_alone(network: nn.Sequential, pixels: Tensor):
    leaf = pixels.clone().requires_grad_()
    expected = pixels.clone().requires_grad_()
    naive_prior(network, expected).backward()
    network.zero_grad(set_to_none=True)
    with BatchNormPrior(network, mean=MEAN, std=STD) as prior:
        prior(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
    assert leaf.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def watched(network: nn.Module) -> int:
    return sum("forward" in vars(module) for module in network.modules())


def test_layers_are_watched_only_inside(network: nn.Sequential, pixels: Tensor):
    prior, before = BatchNormPrior(network, mean=MEAN, std=STD), network(pixels)
    assert watched(network) == 0
    for _ in range(2):
        with prior:
            assert watched(network) == 2
            torch.testing.assert_close(network(pixels), before)
        assert watched(network) == 0
    assert torch.equal(network(pixels), before)


def test_layers_are_not_watched_after_an_exception(network: nn.Sequential):
    with pytest.raises(KeyError), BatchNormPrior(network, mean=MEAN, std=STD):
        raise KeyError
    assert watched(network) == 0


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("affine", [True, False])
def test_timms_layers_have_their_activation_inside(pixels: Tensor, activation: type[nn.Module], affine: bool):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = BatchNormAct2d(3, act_layer=activation, affine=affine).eval()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.01, 0.1)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(243, 2)).eval()
    leaf, plain = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    prior = BatchNormPrior(network, mean=MEAN, std=STD)
    expected = network(normalized(plain))
    statistics = normalized(plain)
    mean, variance = statistics.mean(dim=(0, 2, 3)), statistics.var(dim=(0, 2, 3), unbiased=False)
    term = (mean - layer.running_mean).norm() / (layer.running_mean.norm() ** 2 + layer.running_var.sum()).sqrt()
    term = term + (variance - layer.running_var).norm() / layer.running_var.norm()
    (expected.square().sum() + term).backward()
    with prior:
        found = network(normalized(leaf))
        (found.square().sum() + prior._terms[0]).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_the_classifier_of_a_timm_network_is_not_run(network: nn.Sequential, pixels: Tensor):
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network

        def forward_features(self, inputs: Tensor) -> Tensor:
            return self.body(inputs)

        def forward(self, inputs: Tensor) -> Tensor:
            raise AssertionError("the head was run")

    expected = naive_prior(network, pixels)
    with BatchNormPrior(WithHead(), mean=MEAN, std=STD) as prior:
        torch.testing.assert_close(prior(pixels), expected)


def test_a_network_without_batchnorm_is_refused():
    with pytest.raises(BackboneError, match="Sequential has no BatchNorm"):
        BatchNormPrior(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), mean=MEAN, std=STD)


def test_an_unknown_name_is_refused():
    with pytest.raises(BackboneError, match="no_such_cnn.*inversion.prior is"):
        load_prior("no_such_cnn")


def test_efficientnet_lite0_finds_noise_unnatural():
    prior = load_prior("efficientnet-lite0")
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 3, 64, 64, generator=generator)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4, generator=generator), size=64, mode="bicubic").clamp(0, 1)
    with torch.no_grad(), prior:
        of_noise, of_smooth = prior(noise).item(), prior(smooth).item()
    assert 0.5 < of_noise < 1000
    assert of_smooth < of_noise
