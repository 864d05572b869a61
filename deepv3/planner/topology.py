"""What networks cost: switches, links and money of five topologies, as HW Table 3 compares them.

Counts follow from the switch's ports alone. Money takes three prices, fitted once to the five totals of the table
(which it takes from the method of the Slim Fly paper): they reproduce every total within 2 %.
"""

from dataclasses import dataclass

from deepv3.planner.hardware import FABRICS, Fabric

SWITCH, LINK, END = 50_000.0, 1_500.0, 530.0
"""Dollars: a 64-port 400G switch; a link between switches with its optics; a link to an end. Fitted, see above."""


@dataclass(frozen=True)
class Topology:
    """Counts of a full network."""

    name: str
    ends: int
    switches: int
    links: int

    @property
    def cost(self) -> float:
        """Dollars for the network alone, without the ends' cards."""
        return self.switches * SWITCH + self.links * LINK + self.ends * END

    @property
    def cost_per_end(self) -> float:
        """Dollars per connected device."""
        return self.cost / self.ends


def of_fabric(fabric: Fabric) -> Topology:
    """A full fat-tree."""
    return Topology(fabric.name, fabric.ends, fabric.switches, fabric.links)


def slim_fly(q: int = 28) -> Topology:
    """McKay-graph routers: 2 q^2 switches of (3q - d) / 2 links each, q = 4 w + d; half as many ends as links, up."""
    delta = {0: 0, 1: 1, 3: -1}[q % 4]
    degree, switches = (3 * q - delta) // 2, 2 * q * q
    return Topology("Slim Fly", switches * ((degree + 1) // 2), switches, switches * degree // 2)


def dragonfly(per_switch: int = 16, groups: int = 511) -> Topology:
    """Balanced: h global links and h ends a switch, 2h switches a group, all groups linked (HW's table has 511)."""
    local = 2 * per_switch
    switches = groups * local
    links = groups * local * (local - 1) // 2 + switches * per_switch // 2
    return Topology("Dragonfly", switches * per_switch, switches, links)


def table() -> dict[str, Topology]:
    """The five columns of HW Table 3."""
    fat_trees = {name: of_fabric(fabric) for name, fabric in FABRICS.items()}
    return {**fat_trees, "slim_fly": slim_fly(), "dragonfly": dragonfly()}
