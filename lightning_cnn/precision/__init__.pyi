from .binary_net import BinaryNet as BinaryNet
from .binary_net import bi_real as bi_real
from .binary_net import binary_connect as binary_connect
from .binary_net import xnor_net as xnor_net
from .low_bit import LowBit as LowBit
from .stochastic_rounding import StochasticRounding as StochasticRounding
