from ._file import load as load
from ._file import save as save
from .safe_checkpoint_io import SafeCheckpointIO as SafeCheckpointIO
