from .batch_norm import reestimate_batch_norm as reestimate_batch_norm
from .features import features as features
from .features import pooled as pooled
from .stages import Stage as Stage
from .stages import stages as stages
