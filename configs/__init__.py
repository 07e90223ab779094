"""One YAML per experiment. A package, so that an editable install finds `demo.yaml` too."""
