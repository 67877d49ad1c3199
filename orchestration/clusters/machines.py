"""What the clouds' machines have, and which fields the clouds know: the part of a cluster file that Ray does not read.

Tables of what is used for training here and its neighbours, no catalogue: a machine that is missing is added in a line.
AWS: docs.aws.amazon.com/ec2 (instance types; RunInstances). GCP: cloud.google.com/compute/docs (machine types; the REST
resource Instance).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """vCPUs and GPUs of a machine type."""

    cpus: int
    gpus: int = 0


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _sizes(family: str, sizes: Mapping[str, int | tuple[int, int]]) -> dict[str, Machine]:
    return {f"{family}{size}": Machine(*has) if isinstance(has, tuple) else Machine(has) for size, has in sizes.items()}


_EC2 = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "8xlarge": 32, "12xlarge": 48, "16xlarge": 64}
_ONE_GPU = {size: (cpus, 1) for size, cpus in _EC2.items() if size in ("xlarge", "2xlarge", "4xlarge", "8xlarge")}

AWS: dict[str, Machine] = {
    name: machine
    for family in ("c6i.", "c7i.", "m6i.", "m7i.", "r6i.", "r7i.")
    for name, machine in _sizes(family, _EC2).items()
}
for _family in ("g4dn.", "g5.", "g6.", "g6e."):
    AWS |= _sizes(_family, {**_ONE_GPU, "12xlarge": (48, 4), "16xlarge": (64, 1)})
AWS |= _sizes("g5.", {"24xlarge": (96, 4), "48xlarge": (192, 8)})
AWS |= _sizes("g6.", {"24xlarge": (96, 4), "48xlarge": (192, 8)})
AWS |= _sizes("g6e.", {"24xlarge": (96, 4), "48xlarge": (192, 8)})
AWS |= {"p4d.24xlarge": Machine(96, 8), "p5.48xlarge": Machine(192, 8)}

_GCE = {str(cpus): cpus for cpus in (2, 4, 8, 16, 32)}
GCP: dict[str, Machine] = {
    name: machine
    for family in ("e2-standard-", "n2-standard-", "n2d-standard-")
    for name, machine in _sizes(family, _GCE).items()
}
GCP |= _sizes("n1-standard-", _GCE)  # the GPUs are given beside it
GCP |= _sizes("g2-standard-", {"4": (4, 1), "8": (8, 1), "12": (12, 1), "16": (16, 1), "24": (24, 2), "32": (32, 1)})
GCP |= _sizes("g2-standard-", {"48": (48, 4), "96": (96, 8)})
GCP |= _sizes("a2-highgpu-", {"1g": (12, 1), "2g": (24, 2), "4g": (48, 4), "8g": (96, 8)})
GCP |= _sizes("a3-highgpu-", {"8g": (208, 8)})

MACHINES = {"aws": AWS, "gcp": GCP}

RUN_INSTANCES = _words(
    "AdditionalInfo BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification "
    "DisableApiStop DisableApiTermination EbsOptimized EnclaveOptions HibernationOptions IamInstanceProfile ImageId "
    "InstanceInitiatedShutdownBehavior InstanceMarketOptions InstanceType Ipv6AddressCount Ipv6Addresses KeyName "
    "LaunchTemplate LicenseSpecifications MaintenanceOptions MetadataOptions Monitoring NetworkInterfaces Placement "
    "PrivateDnsNameOptions PrivateIpAddress SecurityGroupIds SecurityGroups SubnetId TagSpecifications UserData"
)
"""Fields of EC2's RunInstances that a node_config may have: what is checked where botocore, which knows each field's
type as well, is not installed."""

GCE_INSTANCE = _words(
    "advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description disks "
    "displayDevice guestAccelerators hostname keyRevocationActionType labels machineType metadata minCpuPlatform "
    "networkInterfaces networkPerformanceConfig params privateIpv6GoogleAccess reservationAffinity resourcePolicies "
    "scheduling serviceAccounts shieldedInstanceConfig sourceInstanceTemplate tags"
)
"""Fields of the resource Instance of GCP's Compute Engine that a node_config may have."""

KUBERAY: dict[str, frozenset[str]] = {
    "RayJob": _words(
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
        "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
        "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
        "ttlSecondsAfterFinished"
    ),
    "RayCluster": _words(
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
        "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs"
    ),
    "headGroupSpec": _words("enableIngress headService labels rayStartParams resources serviceType template"),
    "workerGroupSpecs": _words(
        "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas resources "
        "scaleStrategy suspend template"
    ),
    "autoscalerOptions": _words(
        "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version "
        "volumeMounts"
    ),
    "authOptions": _words("enableK8sTokenAuth mode secretName"),
}
"""Fields of ray.io/v1 as of KubeRay 1.6 (docs.ray.io, KubeRay CRD API reference), by what holds them."""
