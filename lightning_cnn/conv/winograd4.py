"""F(4x4, 3x3): 4 times fewer multiplications.

Source: Lavin & Gray 2015, arXiv:1509.09308.
"""

from functools import partial

from lightning_cnn.conv import _winograd

refuses = partial(_winograd.refuses, m=4)
workspace = partial(_winograd.workspace, m=4)
compute = partial(_winograd.compute, m=4)
