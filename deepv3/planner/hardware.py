"""Devices, nodes and fabrics as rows of data, each number with its source.

A `Cluster` is a device type, how many of them, how many share one NVLink domain, and the fabric between the domains.
Peaks are dense (no sparsity) and nominal; what software reaches of them is `calibration`'s business, so that a row here
is a data sheet and nothing else. Bandwidths are per device and direction.
"""

from dataclasses import dataclass

from deepv3.config.schema import ClusterConfig
from deepv3.errors import ConfigError

GB = 1e9
GIB = 2**30
TERA = 1e12
GHZ = 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator.

    bf16, fp8: dense peak, FLOP/s. memory: bytes a process can allocate. hbm: bytes/s, nominal. sms: multiprocessors.
    nvlink: bytes/s per direction, nominal. domain: devices that reach each other by NVLink. nic: bytes/s of the
    device's share of the network cards, nominal. host: highest clock of a core of the processor that launches its
    kernels, Hz. source: where the numbers stand. exponentials: per clock and multiprocessor, over those of Hopper.
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    hbm: float
    sms: int
    nvlink: float
    domain: int
    nic: float
    host: float
    source: str
    exponentials: float = 1.0


HOPPER = "NVIDIA H100 data sheet (SXM5); DGX H100: Xeon 8480C"
ULTRA = "twice the exponentials: NVIDIA, 'Making softmax more efficient with Blackwell Ultra'"
DEVICES = {
    row.name: row
    for row in (
        Device(
            "h100", 989.4 * TERA, 1978.9 * TERA, 79.6 * GIB, 3350 * GB, 132, 450 * GB, 8, 50 * GB, 3.8 * GHZ, HOPPER,
        ),
        Device(
            "h800", 989.4 * TERA, 1978.9 * TERA, 79.6 * GIB, 3350 * GB, 132, 200 * GB, 8, 50 * GB, 3.8 * GHZ,
            f"{HOPPER}; NVLink 400 GB/s both ways and 8 x 400 Gb/s CX7 a node: HW 4.1, 4.3",
        ),
        Device(
            "h200", 989.4 * TERA, 1978.9 * TERA, 139.8 * GIB, 4800 * GB, 132, 450 * GB, 8, 50 * GB, 3.8 * GHZ,
            "NVIDIA H200 data sheet; DGX H200: Xeon 8480C",
        ),
        Device(
            "b200", 2250 * TERA, 4500 * TERA, 178.3 * GIB, 7700 * GB, 148, 900 * GB, 8, 50 * GB, 4.0 * GHZ,
            "NVIDIA HGX B200 data sheet: 8 devices have 36 PFLOP/s FP8 and 1.44 TB; DGX B200: Xeon 8570",
        ),
        Device(
            "b300", 2250 * TERA, 4500 * TERA, 267.0 * GIB, 8000 * GB, 148, 900 * GB, 8, 100 * GB, 4.6 * GHZ,
            f"NVIDIA HGX B300 data sheet; 800 Gb/s CX8; DGX B300: Xeon 6776P; {ULTRA}", 2.0,
        ),
        Device(
            "gb200", 2500 * TERA, 5000 * TERA, 184.0 * GIB, 8000 * GB, 148, 900 * GB, 64, 50 * GB, 3.4 * GHZ,
            "NVIDIA GB200 NVL72 data sheet (Grace); 64 of a rack's 72 devices are used, so that EP64 fits in a rack",
        ),
        Device(
            "gb300", 2500 * TERA, 5000 * TERA, 277.0 * GIB, 8000 * GB, 148, 900 * GB, 64, 100 * GB, 3.4 * GHZ,
            f"NVIDIA GB300 NVL72 data sheet (Grace); 64 of 72 as above; {ULTRA}", 2.0,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Fabric:
    """A switched network between the nodes.

    layers: of switches. planes: separate networks, one network card of every node on each (HW 5.1). radix: ports per
    switch. ends: devices it connects at most; switches, links: of a full one (switch-to-switch links only).
    """

    name: str
    layers: int
    planes: int
    radix: int = 64

    @property
    def ends(self) -> int:
        """A full fat-tree of k-port switches: k^2 / 2 ends in two layers, k^3 / 4 in three; planes multiply."""
        k = self.radix
        return self.planes * (k * k // 2 if self.layers == 2 else k**3 // 4)

    @property
    def switches(self) -> int:
        """k leaves and k / 2 spines in two layers; 5 k^2 / 4 in three."""
        k = self.radix
        return self.planes * (k + k // 2 if self.layers == 2 else 5 * k * k // 4)

    @property
    def links(self) -> int:
        """One link up for every end and layer above the leaves."""
        return self.ends * (self.layers - 1)


FABRICS = {
    "ft2": Fabric("two-layer fat-tree", 2, 1),
    "ft3": Fabric("three-layer fat-tree", 3, 1),
    "mpft": Fabric("8 planes of two-layer fat-trees", 2, 8),
}


@dataclass(frozen=True)
class Cluster:
    """`count` devices; `node`: how many share an NVLink domain."""

    device: Device
    count: int
    node: int
    fabric: Fabric

    @property
    def nodes(self) -> int:
        """NVLink domains, the last one perhaps part empty."""
        return -(-self.count // self.node)


def cluster_of(cluster: ClusterConfig) -> Cluster:
    """The rows a configuration names. Raises ConfigError for an unknown device, no size, or more than the fabric has.

    A domain of more than 8 devices (NVL72) is a property of the device; within it, `cluster.nproc_per_node` says how
    many share a host, which the network does not see.
    """
    if cluster.device not in DEVICES:
        raise ConfigError(
            f"cluster.device = {cluster.device!r} is none of {', '.join(DEVICES)}; name the machines to plan "
            "for: cluster=h800_2048, or set cluster.device=h100 cluster.devices=64"
        )
    if cluster.devices < 1:
        raise ConfigError(f"cluster.devices = {cluster.devices}; set how many devices the plan may use, at least 1")
    device, fabric = DEVICES[cluster.device], FABRICS[cluster.network]
    node = device.domain if device.domain > 8 else min(cluster.nproc_per_node, device.domain)
    if cluster.devices > node and cluster.devices > fabric.ends:
        raise ConfigError(
            f"cluster.devices = {cluster.devices} exceeds the {fabric.ends} ends of cluster.network={cluster.network} "
            f"({fabric.name}, {fabric.radix}-port switches); take fewer devices or "
            f"{' or '.join(f'cluster.network={n}' for n, f in FABRICS.items() if f.ends >= cluster.devices) or 'none'}"
        )
    return Cluster(device, cluster.devices, min(node, cluster.devices), fabric)
