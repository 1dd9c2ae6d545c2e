from .ladder import ladder as ladder
from .picture_grid import picture_grid as picture_grid
from .schedule import schedule as schedule
from .sweep import sweep as sweep
