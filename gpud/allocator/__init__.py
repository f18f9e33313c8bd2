"""Decides what an order gets of the host. Pure: no clock, no files, no state of its own.

Whatever can be sold at all is sold: no order is refused because its parts would lie far apart. Where
an order can be served in several ways, it is served

1. from the fewest NUMA nodes, counting those of its GPUs and those of its cores and memory, and then
   with its GPUs on the fewest nodes;
2. with the fewest bundles: single GPUs can serve later orders of any count, a bundle cannot;
3. from the fewest NVLink sets (GPUs that reach each other over NVLink; one without NVLink is a set);
4. with the fewest NVLink sets broken, that is taken in part;
5. so that the most orders of the biggest count on sale can still be had on one node each, then the
   most within one NVLink set each; then of the next smaller count, and so on;
6. from the smallest sets that will do, so that the larger stay whole for counts not on sale today;
7. with the GPUs at the lowest addresses.

All ways are looked at, but of those that are mirror images of each other only one: some dozens even
with 16 GPUs. (Only a thousand, where many nodes all differ; then 1. still holds for the nodes of the
instance as a whole.) How far apart two nodes are does not count.
"""

from gpud.allocator.holdings import remaining
from gpud.allocator.placing import COUNTS, Placement, Shortage, how_many, place

__all__ = ["COUNTS", "Placement", "Shortage", "how_many", "place", "remaining"]
