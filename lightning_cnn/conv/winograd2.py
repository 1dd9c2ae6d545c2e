"""F(2x2, 3x3): 2.25 times fewer multiplications.

Source: Lavin & Gray 2015, arXiv:1509.09308.
"""

from functools import partial

from lightning_cnn.conv import _winograd

refuses = partial(_winograd.refuses, m=2)
workspace = partial(_winograd.workspace, m=2)
compute = partial(_winograd.compute, m=2)
