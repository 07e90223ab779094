"""`lr-ray fetch`."""


def fetch() -> None:
    """Fetch the embedded weights into the cache now, so that later commands need no network."""
    from lr_ray.vit.embedded import EMBEDDED_BACKBONE, EMBEDDED_PRIOR, cache_dir, load_embedded

    for weights in (EMBEDDED_BACKBONE, EMBEDDED_PRIOR):
        load_embedded(weights)
        print(f"{weights.source}: in {cache_dir()}")
