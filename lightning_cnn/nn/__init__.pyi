from .pack import pack as pack
from .packed import PackedConv2d as PackedConv2d
from .packed import PackedLinear as PackedLinear
