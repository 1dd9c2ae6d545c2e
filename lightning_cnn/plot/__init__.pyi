from .confusion_matrix import confusion_matrix as confusion_matrix
from .ladder import ladder as ladder
from .loss_curves import loss_curves as loss_curves
from .picture_grid import picture_grid as picture_grid
from .rejection_curve import rejection_curve as rejection_curve
from .reliability_diagram import reliability_diagram as reliability_diagram
from .schedule import schedule as schedule
from .sweep import sweep as sweep
