from ._confirm import confirm as confirm
from ._report import Report as Report
from ._report import report as report
from ._swap import restore as restore
from ._swap import swap as swap
from .auto import ConvAlgorithm as ConvAlgorithm
