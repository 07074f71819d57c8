"""All that is known of one surgery; whoever writes it down or draws it starts from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.report.course import PrehabCourse
from lightning_prehab.report.latency import ModelLatency
from lightning_prehab.report.origin import Origin
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.report.scores import Scores
from lightning_prehab.report.thinned_spectrum import LayerSpectrum


@dataclass(frozen=True)
class Facts:
    """See :class:`~lightning_prehab.CompressionReport`, which also reads and writes them."""

    plan: CompressionPlan
    weight_errors: Mapping[str, float]
    parameters_before: int
    parameters_after: int
    spectra: Mapping[str, LayerSpectrum] = field(default_factory=dict)
    latency: ModelLatency | None = None
    scores: Scores | None = None
    prehab: PrehabCourse | None = None
    origin: Origin = field(default_factory=Origin, compare=False)
    refinement: RefinementReport | None = None

    @property
    def keep(self) -> float:
        """Achieved share of the targets' weight parameters, in (0, 1]."""
        return self.plan.keep

    @property
    def model_keep(self) -> float:
        """Achieved share of all parameters of the model."""
        return self.parameters_after / self.parameters_before

    @property
    def ranks(self) -> dict[str, int | None]:
        """The rank of each target by name; None for those that stayed dense."""
        return self.plan.ranks
