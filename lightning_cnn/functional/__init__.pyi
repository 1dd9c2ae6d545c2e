from .binary import binarize as binarize
from .binary import lsq as lsq
from .binary import ternarize as ternarize
from .receptive_field import receptive_field as receptive_field
from .rounding import round_nearest as round_nearest
from .rounding import round_stochastic as round_stochastic
