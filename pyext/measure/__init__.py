"""Real costs of a model (latency, memory, energy), its proxies (FLOPs, parameters), and the ratio between the two."""

from kernelpress.measure.comparison import Comparison, Speedup, compare
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.measure.layerwise import LayerCost, layer_table, profile_layers
from kernelpress.measure.profiling import Profile, profile
from kernelpress.measure.theory import Promise, layer_flops, promised_flops
from kernelpress.runtime.clock import Timing, time_alternately

__all__ = [
    "Comparison",
    "LayerCost",
    "Profile",
    "Promise",
    "Speedup",
    "Timing",
    "compare",
    "count_flops",
    "count_parameters",
    "layer_flops",
    "layer_table",
    "profile",
    "profile_layers",
    "promised_flops",
    "time_alternately",
]
