"""The page's sections, in their order, and the form of all parts of a result.

There is a room for each command: it states the `FORM` of its parts of the JSON, draws their charts, and prepares the
data of its templates. A section without data in the run is left out.
"""

from ggjac.report.schema import Check
from ggjac.report.sections import (
    answer,
    attend,
    attribute,
    compare,
    contrast,
    edges,
    experts,
    frame,
    jacobian,
    layers,
    norms,
    predict,
    ranks,
    reach,
    reads,
    steer,
    svd,
    verify,
)

ROOMS = (
    *(frame, predict, steer, compare, ranks, attribute, answer, reads, experts, edges, attend, reach),
    *(svd, norms, jacobian, layers, contrast, verify),
)

#: The form of every part that a result may have, by its key.
PARTS: dict[str, Check] = {key: check for room in ROOMS for key, check in room.FORM.items()}

SECTIONS = (
    *predict.SECTIONS,
    *steer.SECTIONS,
    *compare.SECTIONS,
    *ranks.SECTIONS,
    *answer.SECTIONS,
    *attribute.SECTIONS,
    *reads.SECTIONS,
    *experts.SECTIONS,
    *edges.SECTIONS,
    *attend.SECTIONS,
    *reach.SECTIONS,
    *svd.SECTIONS,
    *norms.SECTIONS,
    *jacobian.SECTIONS,
    *layers.SECTIONS,
    *contrast.SECTIONS,
    *verify.SECTIONS,
    frame.TOKENS,
    frame.CERTIFICATE,
)
