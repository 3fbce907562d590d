"""The public names, for editors, type checkers and `__init__.py`."""

from . import zoo
from .datasets.dataset import ImageDataset
from .datasets.load import load_dataset
from .denoisers.clocks import on_schedule
from .denoisers.decoder import Decoder, Standardised
from .denoisers.denoiser import Denoiser
from .denoisers.gaussian import gaussian_denoiser
from .denoisers.table import ConditionTable
from .errors import UserError
from .evaluation.compare import compare
from .evaluation.evaluate import evaluate
from .exporting.export import export
from .exporting.sample import sample
from .features.clip import Clip, load_clip
from .features.load import load_features, register_features
from .features.network import FeatureNetwork
from .formats.keras_hub import of_keras_hub
from .formats.load import load_denoiser, register_format
from .objectives.objective import register_objective
from .reporting.inspection import inspect
from .reporting.published import load_published
from .reporting.report import report
from .samplers.card import SamplerCard
from .samplers.chain import draw_noise, run_chain
from .samplers.coefficients import Coefficients
from .samplers.families import GGDM, make_sampler, register_family
from .samplers.learned import LearnedSampler
from .samplers.sampler import FixedSampler, Sampler, SolverSampler
from .samplers.solvers import solver_coefficients
from .schedules import NoiseSchedule, make_schedule
from .searching.search import search
