from .binary import binarize as binarize
from .binary import lsq as lsq
from .binary import ternarize as ternarize
