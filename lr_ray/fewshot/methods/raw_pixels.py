"""`raw-pixels`: nearest class centre on the pixels; what the images alone give away."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import RAW_PIXELS
from lr_ray.fewshot.methods.nn import nearest_centre

METHOD = FeatureMethod(
    name="raw-pixels",
    source="a control: no backbone at all",
    features=lambda _settings: RAW_PIXELS,
    head=lambda _settings, _trained: nearest_centre,
)
