"""Clusters' YAMLs: ours are what Ray accepts, others are refused in one line; the launcher is called as it must be."""

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lr_ray.errors import ClusterError
from lr_ray.runtime import clusters
from lr_ray.runtime.clusters import bring_up, check_cluster, job_server, take_down

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "cluster").glob("*.yaml"))
LAUNCHED = [path for path in SHIPPED if "kind" not in yaml.safe_load(path.read_text())]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def written(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_yaml_here_is_what_ray_accepts(path: Path) -> None:
    assert "cluster 'lr-ray', at most" in check_cluster(path)


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_the_nodes_get_what_the_package_depends_on(path: Path) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    commands = " ".join(read(path)["setup_commands"])
    assert [name for name in dependencies if f"'{name}'" not in commands and not name.startswith("ray[")] == []


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_rays_autoscaler_finds_the_image_of_every_node(name: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    autoscaling = AutoscalingConfig(read(ROOT / "cluster" / f"{name}.yaml"), skip_content_hash=True)
    images = {node: autoscaling.get_docker_config(node)["image"] for node in ("head", "worker")}
    assert images == {"head": "rayproject/ray:2.60.0-py311", "worker": "rayproject/ray:2.60.0-py311-gpu"}


def test_images_by_keys_that_the_autoscaler_does_not_read_alone_are_refused(tmp_path: Path) -> None:
    docker = {"container_name": "a", "head_image": "rayproject/ray:2.60.0", "worker_image": "rayproject/ray:2.60.0-gpu"}
    path = written(tmp_path, read(ROOT / "cluster" / "aws.yaml") | {"docker": docker})
    with pytest.raises(ClusterError, match=r"docker\.image is missing, without which Ray's autoscaler starts no head"):
        check_cluster(path)


def test_boto3_is_installed_together_with_s3fs() -> None:
    content = read(ROOT / "cluster" / "aws.yaml")
    assert content["setup_commands"][0].endswith(" boto3")
    assert content["head_setup_commands"] == []


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_the_dashboard_is_for_the_head_alone(path: Path) -> None:
    start = read(path)["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_workers_are_bought_on_demand_and_on_spot(name: str) -> None:
    types = read(ROOT / "cluster" / f"{name}.yaml")["available_node_types"]
    assert types["worker"]["min_workers"] == 0
    assert types["worker"]["resources"]["GPU"] == 1
    assert "spot" in str(types["worker"]["node_config"]).lower()
    assert "spot" not in str(types["head"]["node_config"]).lower()


def test_kuberay_starts_without_workers() -> None:
    (group,) = read(ROOT / "cluster" / "kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provider": {"type": "azurre"}}, "unknown provider 'azurre'; allowed are aws, gcp, azure, aliyun, vsphere, local"),
        ({"provider": {"region": "us-east-1"}}, "it lacks provider.type"),
        ({"provider": "aws"}, "it lacks provider.type"),
        ({"cluster_nam": "x"}, "Additional properties are not allowed ('cluster_nam' was unexpected)"),
        ({"max_workers": "many"}, "max_workers: 'many' is not of type 'integer'"),
        ({"head_node_type": "nobody"}, "`head_node_type` must be one of `available_node_types`"),
        ({"available_node_types": {"head": 1}}, "Ray does not accept it"),
    ],
)
def test_a_cluster_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, read(ROOT / "cluster" / "aws.yaml") | changes)
    with pytest.raises(ClusterError) as caught:
        check_cluster(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize("content", ["", "- aws", "a: b: c", "\x00"])
def test_no_yaml_of_a_cluster(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ClusterError, match=r"cluster .*cluster\.yaml: "):
        check_cluster(path)


def test_local_machines_that_are_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, read(ROOT / "cluster" / "local.yaml") | {"provider": {"type": "local"}})
    with pytest.raises(ClusterError, match="Please supply a `head_ip`"):
        check_cluster(path)
    assert capsys.readouterr() == ("", "")


def test_a_kind_that_is_no_word(tmp_path: Path) -> None:
    path = written(tmp_path, {"kind": ["RayJob"], "metadata": {"name": "x"}})
    for act in (check_cluster, take_down):
        with pytest.raises(ClusterError, match="lacks provider.type"):
            act(path)


@pytest.mark.parametrize(
    ("kind", "part"), [("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig"), ("RayCluster", "headGroupSpec")]
)
def test_a_kuberay_manifest_without_a_part(tmp_path: Path, kind: str, part: str) -> None:
    path = written(tmp_path, {"kind": kind, "metadata": {"name": "x"}, "spec": {}})
    with pytest.raises(ClusterError, match=f"Ray does not accept it: KeyError: '{part}'"):
        check_cluster(path)


def test_kubectl_brings_kuberay_up() -> None:
    with pytest.raises(ClusterError, match=r"kubectl apply -f .*kuberay-rayjob\.yaml"):
        bring_up(str(ROOT / "cluster" / "kuberay-rayjob.yaml"))


# -------------------------------------------------------------------------------------------- Ray's launcher, replaced


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`head`: its IP or None; `calls`: what was asked of the launcher."""
    state: dict[str, Any] = {"head": None, "calls": []}

    def head_ip(_path: str) -> str:
        if state["head"] is None:
            raise RuntimeError("Head node of cluster (lr-ray) not found!")
        return str(state["head"])

    monkeypatch.setattr("ray.autoscaler.sdk.get_head_node_ip", head_ip)
    monkeypatch.setattr(
        "ray.autoscaler.sdk.create_or_update_cluster",
        lambda _path, no_restart: state["calls"].append(("up", no_restart)),
    )
    monkeypatch.setattr("ray.autoscaler.sdk.teardown_cluster", lambda _path: state["calls"].append(("down",)))
    return state


LOCAL = str(ROOT / "cluster" / "local.yaml")


def test_up_starts_ray_only_where_it_does_not_run(launcher: dict[str, Any]) -> None:
    """Ray's own default restarts it, which ends the jobs."""
    bring_up(LOCAL)
    launcher["head"] = "192.0.2.10"
    bring_up(LOCAL)
    take_down(LOCAL)
    assert launcher["calls"] == [("up", False), ("up", True), ("down",)]


def test_a_cluster_that_is_not_up(launcher: dict[str, Any]) -> None:
    with pytest.raises(ClusterError, match="is not up; add --up, or run `lr-ray cluster up"), job_server(LOCAL):
        pass


@pytest.mark.parametrize("failure", [SystemExit(1), OSError("no credentials"), ImportError("boto3")])
def test_what_the_launcher_raises_is_one_line(
    launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(_path: str, no_restart: bool) -> None:
        raise failure

    monkeypatch.setattr("ray.autoscaler.sdk.create_or_update_cluster", fail)
    with pytest.raises(ClusterError, match=f"Ray's launcher could not bring it up: {type(failure).__name__}: {failure}"):
        bring_up(LOCAL)


def test_a_tunnel_that_breaks_off(launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launcher["head"] = "192.0.2.10"
    monkeypatch.setattr(clusters, "_tunnel_command", lambda _path, _port: [sys.executable, "-c", "raise SystemExit('refused')"])
    with pytest.raises(ClusterError, match=r"no SSH tunnel to its dashboard .* refused"), job_server(LOCAL):
        pass


def test_a_tunnel_ends_with_its_use(launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launcher["head"] = "192.0.2.10"
    monkeypatch.setattr(
        clusters, "_tunnel_command", lambda _path, port: [sys.executable, "-m", "http.server", "-b", "127.0.0.1", str(port)]
    )
    with job_server(LOCAL) as url:
        assert clusters._listens(int(url.rpartition(":")[2]))
    assert not clusters._listens(int(url.rpartition(":")[2]))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("auto", "http://127.0.0.1:8265"),
        ("head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://head", "https://head"),
    ],
)
def test_an_address_is_that_of_the_dashboard(given: str, url: str) -> None:
    with job_server(given) as found:
        assert found == url
