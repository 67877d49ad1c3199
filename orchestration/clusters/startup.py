"""What the nodes of a file for `ray up` run, and who can reach them: images, setup, Ray, MLflow."""

import re
from collections.abc import Iterator

from orchestration.clusters.rules import (
    BUCKETS,
    LOOPBACK,
    Config,
    Start,
    all_starts,
    image_problems,
    in_background,
    mlflow_problems,
    part,
    parts,
    pinned_ray,
    requirement,
    stop_problems,
    texts,
    within,
)

CLIENTS = {"aws": ("boto3", "boto3"), "gcp": ("google-api-python-client", "google-api-python-client")}
"""What the autoscaler on the head needs, by provider: a field of head_setup_commands replaces Ray's, which bring it."""


def docker_image_problems(prepared: Config) -> Iterator[str]:
    docker, head = prepared.get("docker") or {}, prepared["head_node_type"]
    if not docker:
        yield f"docker: there is none, so nodes run what their disk image has; name an image with Ray {pinned_ray()}"
        return
    gpus = {name: kind["resources"].get("GPU", 0) > 0 for name, kind in prepared["available_node_types"].items()}
    for role, gpu in (("head", gpus[head]), ("worker", any(gpus[name] for name in gpus if name != head))):
        field = f"{role}_image" if f"{role}_image" in docker else "image"
        yield from image_problems(f"docker.{field}", docker.get(field), gpu)
    for name, kind in prepared["available_node_types"].items():
        if "worker_image" in kind.get("docker", {}):
            path = f"available_node_types.{name}.docker.worker_image"
            yield from image_problems(path, kind["docker"]["worker_image"], gpus[name])


def network_problems(provider: str, prepared: Config) -> Iterator[str]:
    if prepared["provider"].get("use_internal_ips") is not True:
        yield (
            f"provider.use_internal_ips: {prepared['provider'].get('use_internal_ips')} gives nodes public addresses, "
            "and Ray's ports run the code they are sent; set it to true"
        )
    rules = parts(part(prepared["provider"], "security_group"), "IpPermissions")
    for i, rule in enumerate(rules):
        ranges = [each.get("CidrIp") for each in parts(rule, "IpRanges")]
        ranges += [each.get("CidrIpv6") for each in parts(rule, "Ipv6Ranges")]
        if open_to_all := [each for each in ranges if each in ("0.0.0.0/0", "::/0")]:
            yield (
                f"provider.security_group.IpPermissions[{i}]: {open_to_all[0]} opens port {rule.get('FromPort')} to "
                "the internet; name your own network"
            )
    for name, kind in prepared["available_node_types"].items():
        path, node = f"available_node_types.{name}.node_config", kind["node_config"]
        for i, interface in enumerate(parts(node, "NetworkInterfaces")):
            if interface.get("AssociatePublicIpAddress"):
                yield f"{path}.NetworkInterfaces[{i}].AssociatePublicIpAddress: true is public; set it to false"
        if provider == "aws" and not node.get("SubnetIds") and "NetworkInterfaces" not in node:
            yield (
                f"{path}.SubnetIds: not set, so Ray takes any subnet of the account, and a default one gives machines "
                "public addresses; name private ones"
            )
        if provider != "gcp":
            continue
        if "networkInterfaces" not in node:
            yield f"{path}.networkInterfaces: not set, so Ray adds one with a public address; name your subnetwork"
        for i, interface in enumerate(parts(node, "networkInterfaces")):
            if interface.get("accessConfigs"):
                yield f"{path}.networkInterfaces[{i}].accessConfigs: this is a public address; leave it out"


def ray_start_problems(prepared: Config) -> Iterator[str]:
    heads, workers = head_starts(prepared), worker_starts(prepared)
    if not heads:
        yield "head_start_ray_commands: none runs ray start --head; add one"
    if not workers:
        yield "worker_start_ray_commands: none runs ray start; add one with --address=$RAY_HEAD_IP:6379"
    mounted = mounted_folders(prepared)
    homes = {start.env.get("SLOTFORGE_HOME") for start in heads + workers}
    for start in heads + workers:
        if (mode := start.env.get("RAY_AUTH_MODE")) != "token":
            yield f"{start.path}: RAY_AUTH_MODE={mode} lets anybody run code; set RAY_AUTH_MODE=token before ray start"
        home = start.env.get("SLOTFORGE_HOME")
        if home is None or len(homes) > 1:
            yield f"{start.path}: SLOTFORGE_HOME={home}; every ray start needs the same, on storage of all nodes"
        elif not within(home, mounted):
            yield (
                f"{start.path}: SLOTFORGE_HOME={home} is inside the container, and lost with it; mount shared storage "
                f"there with docker.run_options, e.g. -v {home}:{home}"
            )
    for start in workers:
        cache = start.env.get("XDG_CACHE_HOME")
        if cache is None or not within(cache, mounted):
            yield (
                f"{start.path}: XDG_CACHE_HOME={cache}; set it to a folder that docker.run_options mounts from the "
                "node's disk, so that downloaded shards outlive the container"
            )
    for start in heads:
        yield from stop_problems(start.path, start.env)
        runs = start.env.get("SLOTFORGE_RUNS", "")
        if runs and not runs.startswith(BUCKETS) and not within(runs, mounted):
            yield (
                f"{start.path}: SLOTFORGE_RUNS={runs} is inside the container, and its checkpoints are lost with it; "
                "name a bucket, or a folder on shared storage"
            )
        host = start.option("--dashboard-host")
        if host is not None and host not in LOOPBACK:
            yield f"{start.path}: --dashboard-host={host} shows the dashboard to the network; set it to 127.0.0.1"
        if not (start.option("--autoscaling-config") or "").endswith("ray_bootstrap_config.yaml"):
            yield f"{start.path}: without --autoscaling-config=~/ray_bootstrap_config.yaml no worker ever comes; add it"
        for worker in workers:
            port = start.option("--port") or "6379"
            address = worker.option("--address") or ""
            if address != f"$RAY_HEAD_IP:{port}":
                yield f"{worker.path}: --address={address} is not the head's; write --address=$RAY_HEAD_IP:{port}"
    mounts = prepared.get("file_mounts") or {}
    if not any(str(target).endswith(".ray/auth_token") for target in mounts):
        yield (
            "file_mounts: no node gets the token; add /home/ray/.ray/auth_token: ~/.ray/auth_token, made by "
            "ray get-auth-token --generate"
        )


def notice_problems(provider: str, prepared: Config) -> Iterator[str]:
    """Nothing in Ray hears that a spot machine is taken back."""
    commands = prepared["worker_start_ray_commands"]
    watchers = all_starts("worker_start_ray_commands", commands, "python -m orchestration.clusters.spot")
    if not watchers:
        yield (
            "worker_start_ray_commands: nobody watches for spot notices, so a machine goes without a word; start "
            f"nohup setsid python -m orchestration.clusters.spot {provider} after ray start, in the background"
        )
    yield from _waiting("worker_start_ray_commands", commands, "python -m orchestration.clusters.spot")
    for watcher in watchers:
        cloud = next((word for word in watcher.arguments if not word.startswith(("-", ">", "<"))), None)
        if cloud != provider:
            yield f"{watcher.path}: orchestration.clusters.spot {cloud} asks another cloud; write {provider}"
        if watcher.env.get("RAY_AUTH_MODE") != "token":
            yield f"{watcher.path}: without RAY_AUTH_MODE=token Ray does not listen to the watcher; set it"


def install_problems(provider: str, prepared: Config) -> Iterator[str]:
    mounts = [str(target).rstrip("/") for target in prepared.get("file_mounts") or {}]
    for section in ("head_setup_commands", "worker_setup_commands"):  # setup_commands are in both by now
        wanted, installed, missing = False, set(), ""
        common = len(prepared["setup_commands"])
        merged = [("setup_commands", prepared["setup_commands"]), (section, prepared[section][common:])]
        for start in (
            start
            for place, commands in merged
            for program in ("pip install", "uv pip install")
            for start in all_starts(place, commands, program)
        ):
            for word in start.arguments:
                if word.startswith("/"):
                    folder = word.partition("[")[0].rstrip("/")
                    wanted = wanted or folder in mounts
                    missing = missing or ("" if folder in mounts else f"{word} is in no file_mounts; ")
                elif not word.startswith("-") and (asked := requirement(word)) is not None:
                    installed.add(asked.name.lower())
                    wanted = wanted or asked.name.lower() == "slotforge"
                    if asked.name == "ray" and not asked.specifier.contains(pinned_ray()):
                        yield f"{start.path}: {word} replaces the image's Ray; the project pins {pinned_ray()}"
        if not wanted:
            yield (
                f"{section}: {missing}nothing installs this project; mount it with file_mounts and pip install "
                "that folder"
            )
        client, package = CLIENTS[provider]
        if section == "head_setup_commands" and client not in installed:
            yield f"{section}: the autoscaler on the head needs {package}, and nothing installs it; add it"


def tracking_problems(prepared: Config) -> Iterator[str]:
    commands = prepared["head_start_ray_commands"]
    servers = all_starts("head_start_ray_commands", commands, "mlflow server")
    if not servers:
        yield (
            "head_start_ray_commands: no MLflow server is started, so curves stay in a file that only one driver sees; "
            "start mlflow server"
        )
    for server in servers:
        yield from mlflow_problems(server, mounted_folders(prepared))
    yield from _waiting("head_start_ray_commands", commands, "mlflow server")


def shared_problems(prepared: Config) -> Iterator[str]:
    """A folder that containers share with their machine is one of all nodes only where a shared disk is mounted."""
    homes = {start.env.get("SLOTFORGE_HOME", "") for start in head_starts(prepared) + worker_starts(prepared)}
    commands = texts(prepared, "initialization_commands")
    for machine, container in _mounts(prepared):
        mounted = rf"\bmount(point)?\b.*\s{re.escape(machine)}(\s|$)"
        if any(within(home, [container]) for home in homes) and not any(re.search(mounted, each) for each in commands):
            yield (
                f"initialization_commands: nothing is mounted at {machine}, so each node has its own SLOTFORGE_HOME; "
                f"mount shared storage there, or where the image does it say mountpoint -q {machine}"
            )


def mounted_folders(prepared: Config) -> list[str]:
    """What containers see of their machine's folders."""
    return [container for _, container in _mounts(prepared)]


def _mounts(prepared: Config) -> list[tuple[str, str]]:
    """(folder of the machine, where its container sees it)."""
    found = []
    for option in texts(prepared.get("docker"), "run_options"):
        if re.match(r"(-v|--volume)[ =]\S+:\S+", option):
            machine, container = re.split(r"[ =]", option, maxsplit=1)[1].split()[0].split(":")[:2]
            found.append((machine.rstrip("/"), container))
    return found


def _waiting(section: str, commands: list[str], program: str) -> Iterator[str]:
    """Servers that `ray up` would wait for."""
    for i, command in enumerate(commands):
        if all_starts("", [command], program) and not in_background(command, program):
            yield f"{section}[{i}]: {program} does not end, and ray up waits for it; end the command with &"


def head_starts(prepared: Config) -> list[Start]:
    started = all_starts("head_start_ray_commands", prepared["head_start_ray_commands"], "ray start")
    return [start for start in started if "--head" in start.arguments]


def worker_starts(prepared: Config) -> list[Start]:
    return all_starts("worker_start_ray_commands", prepared["worker_start_ray_commands"], "ray start")
