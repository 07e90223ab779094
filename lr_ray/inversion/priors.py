"""The BatchNorm-statistics prior: synthetic images should excite a CNN as natural images did in its training."""

from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from lr_ray.errors import BackboneError
from lr_ray.vit.embedded import EMBEDDED_PRIOR, load_embedded


class BatchNormPrior:
    """R_BN of a frozen CNN, normalised so that one weight serves any network.

    R_BN(X) = mean over BatchNorm layers l of ‖μ_l(X) − μ_l‖₂ / √(‖μ_l‖₂² + ‖σ_l‖₂²) + ‖σ²_l(X) − σ²_l‖₂ / ‖σ²_l‖₂

    The paper's is the plain sum of the numerators; in depthwise layers that runs into the thousands. The means are
    measured against the root mean square of the layer's input, since some layers have means of nearly zero beside a
    large variance: divided by the former alone, one layer gives 828 on real images and drowns the cross-entropy. Use as
    a context manager: hooks are on the network only inside.
    """

    def __init__(self, network: nn.Module, *, mean: Tensor, std: Tensor) -> None:
        """Args: network, with BatchNorm2d layers; mean, std, (3,) the normalisation of its own input."""
        self.layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        if not self.layers:
            raise BackboneError(f"prior: {type(network).__name__} has no BatchNorm layers; use efficientnet-lite0 or resnet50")
        self._network = network.eval().requires_grad_(False)
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._terms: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "BatchNormPrior":
        self._handles = [layer.register_forward_pre_hook(self._add_term) for layer in self.layers]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._terms.clear()

    def __call__(self, pixels: Tensor, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] → scalar R_BN; channels last is the faster layout (`lr-ray bench inversion`)."""
        self._terms.clear()
        self.run(pixels, memory_format)
        return torch.stack(self._terms).mean()

    def run(self, pixels: Tensor, memory_format: torch.memory_format) -> None:
        """The network on (B, 3, H, W) pixels in [0, 1]; whoever has a hook on its `layers` sees them."""
        self._network.to(memory_format=memory_format)
        inputs = ((pixels - self._mean) / self._std).to(memory_format=memory_format)
        getattr(self._network, "forward_features", self._network)(inputs)

    def _add_term(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        features, mean, mean_square = _Moments.apply(inputs[0])
        variance = mean_square - mean.square()
        root_mean_square = (layer.running_mean.square().sum() + layer.running_var.sum()).sqrt()
        mean_term = torch.linalg.vector_norm(mean - layer.running_mean) / root_mean_square
        variance_term = torch.linalg.vector_norm(variance - layer.running_var) / torch.linalg.vector_norm(layer.running_var)
        self._terms.append(mean_term + variance_term)
        return (features,)


class _Moments(torch.autograd.Function):
    """(B, C, H, W) x → x, and over (B, H, W) its mean and mean square, (C,) each.

    E[x²] − E[x]² is two thirds of the cost of `torch.var` on a CPU, and exact enough next to stored statistics. Written out
    because autograd would keep x² and go through the features five times on the way back, this twice: with it the prior
    costs 1.3 times its network, without it 1.85 times.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])  # no copy where channels are last
        ctx.save_for_backward(features)
        return features.view_as(features), rows.mean(dim=0), rows.square().mean(dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        of_features, of_mean, of_mean_square = gradients
        count = features.numel() // features.shape[1]
        scale, shift = 2 / count * of_mean_square, of_mean / count
        return torch.addcmul(of_features, features, scale[:, None, None]).add_(shift[:, None, None])


def load_prior(name: str, *, device: torch.device | str = "cpu") -> BatchNormPrior:
    """`efficientnet-lite0` from the embedded weights, or any timm CNN by its name (`resnet50`).

    Raises:
        BackboneError: unknown name, weights that cannot be had, or no BatchNorm in it.
    """
    if name == "efficientnet-lite0":
        network = timm.create_model(EMBEDDED_PRIOR.architecture)
        network.load_state_dict(load_embedded(EMBEDDED_PRIOR))
    else:
        try:
            network = timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"prior {name!r}: {error}; inversion.prior is 'efficientnet-lite0', a timm CNN such as 'resnet50', or null"
            ) from error
    data = resolve_model_data_config(network)
    mean, std = torch.tensor(data["mean"], device=device), torch.tensor(data["std"], device=device)
    return BatchNormPrior(network.to(device), mean=mean, std=std)
