"""The public names, each with the module that it is in: the one list, which type checkers and lazy_loader read."""

from . import (
    bench as bench,
    data as data,
    detection as detection,
    environment as environment,
    errors as errors,
    finetune as finetune,
    functional as functional,
    images as images,
    keypoints as keypoints,
    macs as macs,
    masks as masks,
    ray as ray,
    resampling as resampling,
    timing as timing,
    viz as viz,
)
from .data import (
    Augment as Augment,
    SegmentationData as SegmentationData,
    data_kind as data_kind,
    open_data as open_data,
)
from .data.networks import build_model as build_model, list_models as list_models
from .elements.functional import Elements as Elements
from .elements.kernel_map import Window as Window
from .elements.lattice import Geometry as Geometry, Lattice as Lattice
from .elements.operations import operation as operation
from .masks import (
    Budget as Budget,
    MaskProvider as MaskProvider,
    MaskWrapper as MaskWrapper,
    list_masks as list_masks,
    mask_provider as mask_provider,
)
from .methods.anytime import AnytimeModel as AnytimeModel, anytime as anytime
from .methods.publish import push as push
from .methods.resampling import ResampledModel as ResampledModel, resample as resample
from .methods.sampling import SampledModel as SampledModel, sample as sample
from .methods.method_files import load as load, save as save
from .network.adaptify import adaptify as adaptify, plan as plan
from .network.export import export as export
from .network.export.kernels import kernels_for as kernels_for
from .network.model import AdaptiveModel as AdaptiveModel
from .network.points import macs_at as macs_at, read_at as read_at
from .network.within import read_within as read_within
from .support.errors import (
    CadError as CadError,
    CadWarning as CadWarning,
    CannotConvert as CannotConvert,
    FileError as FileError,
    InvalidInput as InvalidInput,
    NotConverted as NotConverted,
    NotInstalled as NotInstalled,
    TrainingStopped as TrainingStopped,
    UnknownName as UnknownName,
)
from .surgery.plan import Plan as Plan
from .surgery.rules import Call as Call, Treatment as Treatment, rule as rule
from .tasks.evaluation import EvaluationReport as EvaluationReport, evaluate as evaluate
from .tasks.recommend import Recommendation as Recommendation, recommend as recommend
from .tasks.segmentation.metrics import SegmentationMetrics as SegmentationMetrics

__version__: str
