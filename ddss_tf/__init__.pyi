"""The public names, for editors, type checkers and `__init__.py`.

Type checkers take `name as name` for a name that is public.
"""

from . import zoo as zoo
from .datasets.dataset import ImageDataset as ImageDataset
from .datasets.load import load_dataset as load_dataset
from .denoisers.clocks import on_schedule as on_schedule
from .denoisers.decoder import Decoder as Decoder, Standardised as Standardised
from .denoisers.denoiser import Denoiser as Denoiser
from .denoisers.gaussian import gaussian_denoiser as gaussian_denoiser
from .denoisers.table import ConditionTable as ConditionTable
from .errors import UserError as UserError
from .evaluation.compare import compare as compare
from .evaluation.evaluate import evaluate as evaluate
from .exporting.export import export as export
from .exporting.sample import sample as sample
from .features.clip import Clip as Clip, load_clip as load_clip
from .features.load import load_features as load_features, register_features as register_features
from .features.network import FeatureNetwork as FeatureNetwork
from .formats.keras_hub import of_keras_hub as of_keras_hub
from .formats.load import load_denoiser as load_denoiser, register_format as register_format
from .objectives.objective import register_objective as register_objective
from .reporting.inspection import inspect as inspect
from .reporting.published import load_published as load_published
from .reporting.report import report as report
from .samplers.card import SamplerCard as SamplerCard
from .samplers.chain import draw_noise as draw_noise, run_chain as run_chain
from .samplers.coefficients import Coefficients as Coefficients
from .samplers.families import GGDM as GGDM, make_sampler as make_sampler, register_family as register_family
from .samplers.learned import LearnedSampler as LearnedSampler
from .samplers.sampler import FixedSampler as FixedSampler, Sampler as Sampler, SolverSampler as SolverSampler
from .samplers.solvers import solver_coefficients as solver_coefficients
from .schedules import NoiseSchedule as NoiseSchedule, make_schedule as make_schedule
from .searching.search import search as search
