"""The BatchNorm-statistics prior: synthetic images should excite a CNN as natural images did in its training."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lr_ray.errors import BackboneError
from lr_ray.vit.embedded import EMBEDDED_PRIOR, load_embedded


class BatchNormPrior:
    """R_BN of a frozen CNN, normalised so that one weight serves any network.

    R_BN(X) = mean over BatchNorm layers l of ‖μ_l(X) − μ_l‖₂ / √(‖μ_l‖₂² + ‖σ_l‖₂²) + ‖σ²_l(X) − σ²_l‖₂ / ‖σ²_l‖₂

    The paper's is the plain sum of the numerators; in depthwise layers that runs into the thousands. The means are
    measured against the root mean square of the layer's input, since some layers have means of nearly zero beside a
    large variance: divided by the former alone, one layer gives 828 on real images and drowns the cross-entropy. Use as
    a context manager: the network's layers are watched only inside.
    """

    def __init__(self, network: nn.Module, *, mean: Tensor, std: Tensor) -> None:
        """Args: network, with BatchNorm2d layers; mean, std, (3,) the normalisation of its own input."""
        self.layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        if not self.layers:
            raise BackboneError(f"prior: {type(network).__name__} has no BatchNorm layers; use efficientnet-lite0 or resnet50")
        self._network = network.eval().requires_grad_(False)
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._targets = [_Target(layer) for layer in self.layers]
        self._terms: list[Tensor] = []

    def __enter__(self) -> "BatchNormPrior":
        for layer, target in zip(self.layers, self._targets, strict=True):
            layer.forward = partial(self._watch, target)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for layer in self.layers:
            del layer.forward
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

    def _watch(self, target: "_Target", inputs: Tensor) -> Tensor:
        """What the layer gives for (B, C, H, W) inputs; adds its term."""
        outputs, mean, variance = _Watched.apply(inputs, target.scale, target.shift, target.bounds)
        mean_term = torch.linalg.vector_norm(mean - target.mean) / target.root_mean_square
        variance_term = torch.linalg.vector_norm(variance - target.variance) / target.variance_norm
        self._terms.append(mean_term + variance_term)
        found: Tensor = target.activation(outputs)
        return found


class _Target:
    """What a BatchNorm layer stores, in the form in which every step needs it."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.mean, self.variance = layer.running_mean, layer.running_var
        self.root_mean_square = (self.mean.square().sum() + self.variance.sum()).sqrt()
        self.variance_norm = torch.linalg.vector_norm(self.variance)
        scale = (self.variance + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
        shift = (0 if layer.bias is None else layer.bias) - self.mean * scale
        self.scale, self.shift = scale[:, None, None], shift[:, None, None]
        activation = getattr(layer, "act", nn.Identity())  # part of the layer, as timm has it
        self.bounds = (0.0, 6.0) if isinstance(activation, nn.ReLU6) else None
        self.activation = nn.Identity() if self.bounds else activation


class _Watched(torch.autograd.Function):
    """(B, C, H, W) x → scale · x + shift within the bounds, and over (B, H, W) the mean and the variance of x, (C,) each.

    BatchNorm by stored statistics, its activation, and the statistics of its input, with as few ways through the features as
    there can be: on a CPU memory is what takes time.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, scale: Tensor, shift: Tensor, bounds: tuple[float, float] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = torch.batch_norm_update_stats(features, None, None, 0.0)
        outputs = torch.addcmul(shift, features, scale)
        if bounds:
            outputs.clamp_(*bounds)
        ctx.bounds = bounds
        ctx.save_for_backward(features, scale, mean, outputs if bounds else None)
        return outputs, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        features, scale, mean, outputs = ctx.saved_tensors
        of_outputs, of_mean, of_variance = gradients
        if ctx.bounds:
            of_outputs = torch.ops.aten.hardtanh_backward(of_outputs, outputs, *ctx.bounds)
        count = features.numel() // features.shape[1]
        slope = 2 / count * of_variance
        found = torch.addcmul((of_mean / count - mean * slope)[:, None, None], features, slope[:, None, None])
        return found.addcmul_(of_outputs, scale), None, None, None


def load_prior(name: str, *, device: torch.device | str = "cpu") -> BatchNormPrior:
    """`efficientnet-lite0` from the embedded weights, or any timm CNN by its name (`resnet50`).

    Raises:
        BackboneError: unknown name, weights that cannot be had, or no BatchNorm in it.
    """
    import timm
    from timm.data import resolve_model_data_config

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
