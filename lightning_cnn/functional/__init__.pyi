from .rounding import round_nearest as round_nearest
from .rounding import round_stochastic as round_stochastic
