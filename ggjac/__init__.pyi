"""The public names of ggjac, one a line: type checkers read this file, and `__init__.py` finds their modules in it."""

from ggjac.analysis.analyze import analyze as analyze
from ggjac.analysis.answer import attribute_answer as attribute_answer
from ggjac.analysis.attend import attend as attend
from ggjac.analysis.attribute import attribute as attribute
from ggjac.analysis.attribute import attribute_positions as attribute_positions
from ggjac.analysis.attribute import both_rules as both_rules
from ggjac.analysis.branches import attribute_branches as attribute_branches
from ggjac.analysis.compare import compare as compare
from ggjac.analysis.compare import portray as portray
from ggjac.analysis.compare_prompts import compare_prompts as compare_prompts
from ggjac.analysis.contrast import contrast as contrast
from ggjac.analysis.jacobian import dense as dense
from ggjac.analysis.layers import layers as layers
from ggjac.analysis.norms import norms as norms
from ggjac.analysis.per_token import per_token as per_token
from ggjac.analysis.predict import predict as predict
from ggjac.analysis.ranks import token_ranks as token_ranks
from ggjac.analysis.reach import ablate as ablate
from ggjac.analysis.reach import reach as reach
from ggjac.analysis.reads import attribute_reads as attribute_reads
from ggjac.analysis.steer import steer as steer
from ggjac.analysis.svd import spectrum as spectrum
from ggjac.analysis.svd import stable_rank as stable_rank
from ggjac.generation import generate as generate
from ggjac.gguf import open_gguf as open_gguf
from ggjac.inventory import local_models as local_models
from ggjac.jacobian import DetachedJacobian as DetachedJacobian
from ggjac.jacobian.reconstruction import reconstruction as reconstruction
from ggjac.linop import LinearOperator as LinearOperator
from ggjac.model import open_model as open_model
from ggjac.parity import verify as verify
from ggjac.prompts import token_groups as token_groups
from ggjac.report import write_figures as write_figures
from ggjac.report import write_report as write_report
from ggjac.session import Session as Session
from ggjac.studies import mean_map as mean_map
from ggjac.studies import measure as measure
from ggjac.studies import merge as merge
from ggjac.studies import merge_means as merge_means
from ggjac.studies import ranks as ranks
from ggjac.studies import study as study

__version__: str
