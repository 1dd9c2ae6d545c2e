from . import callbacks as callbacks
from . import conv as conv
from . import data as data
from . import errors as errors
from . import functional as functional
from . import model as model
from . import nn as nn
from . import plot as plot
from . import precision as precision
from . import strategy as strategy

__version__: str
