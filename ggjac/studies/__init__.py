"""One question about many prompts: a record each, from one process, several, or a cluster; the file is the journal.

`measures` has the questions, `study` the loop, `workers` the executors, `merging` puts the files of shards together,
`means` adds up maps instead of keeping records.
"""

from ggjac.studies.means import MeanMap, mean_map, merge_means
from ggjac.studies.measures import Measure, measure
from ggjac.studies.merging import merge
from ggjac.studies.study import OnePromptError, Study, ranks, shard_name, study

__all__ = [
    "MeanMap",
    "Measure",
    "OnePromptError",
    "Study",
    "mean_map",
    "measure",
    "merge",
    "merge_means",
    "ranks",
    "shard_name",
    "study",
]
