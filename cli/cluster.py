"""`lr-ray cluster`: the clusters that `--cluster` takes."""

from typing import Annotated

import typer

cluster = typer.Typer(name="cluster", help="Bring a cluster up or down, look at it, check its YAML.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="A cluster-launcher YAML such as cluster/aws.yaml.")]


@cluster.command()
def up(file: File) -> None:
    """Start the cluster, or bring a running one to what its YAML says now; jobs that run there go on."""
    from lr_ray.runtime.clusters import bring_up

    bring_up(file)


@cluster.command()
def down(file: File) -> None:
    """End every node of the cluster."""
    from lr_ray.runtime.clusters import take_down

    take_down(file)


@cluster.command()
def status(
    where: Annotated[str, typer.Argument(metavar="CLUSTER", help="As for --cluster: a YAML, an address, or auto.")],
) -> None:
    """Nodes, resources, demands and jobs."""
    from lr_ray.runtime.jobs import cluster_status

    print(cluster_status(where))


@cluster.command()
def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A cluster-launcher YAML, or a RayJob, RayCluster or RayService of KubeRay.")
    ],
) -> None:
    """Check a YAML against Ray's own schema, without a network."""
    from lr_ray.runtime.clusters import check_cluster

    print(f"{file}: {check_cluster(file)}")
