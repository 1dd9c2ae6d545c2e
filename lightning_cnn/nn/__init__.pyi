from .inject import Injection as Injection
from .inject import inject as inject
from .noise import DropConnectConv2d as DropConnectConv2d
from .noise import DropConnectLinear as DropConnectLinear
from .noise import Dropout as Dropout
from .noise import StochasticDepth as StochasticDepth
