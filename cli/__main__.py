"""`python -m lr_ray.cli`, for where the command is not on the path."""

from lr_ray.cli.main import main

main()
