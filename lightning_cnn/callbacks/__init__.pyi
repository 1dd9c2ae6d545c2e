from .batch_norm_reestimation import BatchNormReestimation as BatchNormReestimation
from .discriminative_lr import DiscriminativeLR as DiscriminativeLR
from .ema import EMA as EMA
from .frozen_batch_norm import FrozenBatchNorm as FrozenBatchNorm
from .gradual_unfreezing import GradualUnfreezing as GradualUnfreezing
from .l2_sp import L2SP as L2SP
from .model_soup import ModelSoup as ModelSoup
from .snapshot_ensemble import SnapshotEnsemble as SnapshotEnsemble
